"""The pointing game, against its definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pullback import metrics


@given(st.integers(0, 2**31), st.integers(1, 7), st.integers(1, 9), st.floats(0, 6))
def test_pointing_hits_by_definition(seed, height, width, tolerance):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(3, height, width, generator=generator) < 0.1
    points = torch.stack([torch.randint(-2, n + 2, (3,), generator=generator) for n in (width, height)], 1)
    found = metrics.pointing_hits(points, masks, tolerance=tolerance)
    for hit, mask, (u, v) in zip(found.tolist(), masks, points.tolist()):
        distances = [(v - i) ** 2 + (u - j) ** 2 for i, j in mask.nonzero().tolist()]
        assert hit == any(d < tolerance**2 for d in distances)


def test_the_edge_of_the_tolerance_misses():
    mask = torch.zeros(1, 30, 30, dtype=torch.bool)
    mask[0, 0, 0] = True
    for column, row, hit in ((15, 0, False), (14, 5, True), (0, 15, False), (9, 12, False), (9, 11, True)):
        assert bool(metrics.pointing_hits(torch.tensor([[column, row]]), mask)) is hit


def test_pointing_game_looks_at_the_peak():
    maps = torch.zeros(2, 1, 6, 8)
    maps[0, 0, 4, 7] = maps[1, 0, 0, 2] = maps[1, 0, 5, 5] = 1
    assert metrics.peak(maps).tolist() == [[7, 4], [2, 0]]  # (column, row), the first of several
    masks = torch.zeros(2, 6, 8, dtype=torch.bool)
    masks[:, 4, 6] = True
    assert metrics.pointing_game(maps, masks, tolerance=1.5).tolist() == [True, False]
    assert metrics.pointing_game(maps, masks, tolerance=1).tolist() == [False, False]
    batched = torch.vmap(lambda m: metrics.pointing_game(m, masks, tolerance=1.5))(torch.stack([maps, maps.flip(0)]))
    assert batched.tolist() == [[True, False], [False, True]]


def test_errors():
    masks = torch.zeros(2, 6, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="`masks` must be"):
        metrics.pointing_game(torch.zeros(2, 1, 3, 4), masks)
    with pytest.raises(ValueError, match="`points` must be"):
        metrics.pointing_hits(torch.zeros(1, 2), masks)
