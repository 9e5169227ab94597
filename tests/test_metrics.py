"""Metrics of maps alone: localisation and simplicity, against their definitions; the table of metrics."""

import inspect
import math
from functools import partial
from pathlib import Path

import pytest
import slow_metrics as slow
import torch
from hypothesis import given
from hypothesis import strategies as st

from pullback import metrics

LOCALISATION = {
    "energy_pointing_game": (metrics.energy_pointing_game, slow.energy),
    "relevance_mass": (metrics.relevance_mass, slow.mass),
    "relevance_rank": (metrics.relevance_rank, slow.rank),
    "top_k_intersection": (partial(metrics.top_k_intersection, k=7), partial(slow.top_k, k=7)),
    "iou_at_area": (metrics.iou_at_area, partial(slow.iou, area=None)),
    "iou_at_area, a fifth": (partial(metrics.iou_at_area, area=0.2), partial(slow.iou, area=0.2)),
}


def drawn(batch: int = 6, height: int = 5, width: int = 7, ties: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    map = torch.randn(batch, 1, height, width, dtype=torch.float64)
    masks = torch.rand(batch, height, width) < torch.rand(batch, 1, 1)
    masks[0], masks[1] = False, True
    return (map * 2).round() if ties else map, masks


# -- the pointing game


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


def test_nothing_to_point_at_and_nothing_that_points():
    map, masks = drawn(3)
    map[2, 0, 1, 1] = float("nan")
    assert metrics.pointing_game(map, masks, tolerance=100).tolist() == [False, True, False]


def torchray_game():
    from pullback._networks.models import import_torchvision

    pytest.importorskip("torchvision")
    import_torchvision()
    return pytest.importorskip("torchray.benchmark.pointing_game", exc_type=ImportError).PointingGame


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tolerance", [0, 1, 3, 15])
def test_the_verdicts_of_torchray(tolerance):
    game = torchray_game()(10, tolerance=tolerance)
    points = torch.stack((torch.randint(0, 24, (200,)), torch.randint(0, 18, (200,))), 1)
    masks = torch.rand(200, 18, 24) < torch.rand(200, 1, 1) ** 4
    masks[0], masks[1] = False, True
    masks[2:40] = False
    masks[2:20, 0, 0] = masks[20:40, -1, -1] = True  # an object of one pixel, in a corner
    points[2:6] = torch.tensor([[15, 0], [0, 15], [9, 12], [14, 5]])  # at the edge of the tolerance, and in it
    theirs = [game.evaluate(mask, tuple(point.tolist())) for mask, point in zip(masks, points)]
    ours = metrics.pointing_hits(points, masks, tolerance=tolerance)
    assert [1 if hit else -1 for hit in ours.tolist()] == theirs


# -- the others


@pytest.mark.parametrize("name", LOCALISATION)
@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
def test_localisation_by_definition(name, ties):
    function, definition = LOCALISATION[name]
    map, masks = drawn(ties=ties)
    expected = torch.tensor([definition(m[0], o) for m, o in zip(map, masks)], dtype=torch.float64)
    torch.testing.assert_close(function(map, masks).double(), expected, equal_nan=True, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LOCALISATION)
def test_localisation_obeys_its_laws(name):
    function, _ = LOCALISATION[name]
    map, masks = drawn(40, 10, 10)
    map = map.abs()
    whole = function(map, masks)
    assert whole[0].isnan()  # no object
    assert whole[1] == pytest.approx(0.2 if "fifth" in name else 1)  # the object is everywhere
    assert ((whole[1:] >= 0) & (whole[1:] <= 1)).all()
    torch.testing.assert_close(function(7 * map, masks), whole, equal_nan=True)  # the scale says nothing
    one_by_one = torch.cat([function(map[i : i + 1], masks[i : i + 1]) for i in range(40)])
    torch.testing.assert_close(whole, one_by_one, equal_nan=True)
    stacked = torch.stack([map, map.flip(-1)])
    torch.testing.assert_close(
        torch.vmap(function, (0, None))(stacked, masks),
        torch.stack([function(m, masks) for m in stacked]),
        equal_nan=True,
    )
    map[3, 0, 4, 4] = float("nan")
    assert function(map, masks)[3].isnan()
    assert not function(map, masks)[4].isnan()
    volume, inside = torch.rand(2, 1, 3, 4, 5), torch.rand(2, 3, 4, 5) < 0.5
    flat = function(volume.reshape(2, 1, 12, 5), inside.reshape(2, 12, 5))
    assert torch.equal(function(volume, inside), flat)  # any number of spatial axes


@pytest.mark.parametrize("name", ["energy_pointing_game", "relevance_mass", "relevance_rank", "top_k_intersection"])
def test_chance_is_the_share_of_the_image(name):
    masks = (torch.rand(1, 8, 8) < 0.3).expand(4000, 8, 8)
    result = LOCALISATION[name][0](torch.rand(4000, 1, 8, 8), masks)
    error = float(result.std()) / math.sqrt(4000)
    assert float(result.mean()) == pytest.approx(float(masks[0].double().mean()), abs=4 * error)


def test_a_perfect_map():
    _, masks = drawn()
    masks = masks[1:]
    map = masks.double().unsqueeze(1)
    for function in (metrics.energy_pointing_game, metrics.relevance_mass, metrics.relevance_rank, metrics.iou_at_area):
        assert torch.equal(function(map, masks).double(), torch.ones(5, dtype=torch.float64))
    assert metrics.pointing_game(map, masks, tolerance=1).all()


def test_signs():
    map, masks = torch.tensor([[[[3.0, -1.0], [1.0, -2.0]]]]), torch.tensor([[[True, True], [False, False]]])
    assert metrics.energy_pointing_game(map, masks).tolist() == [0.75]
    assert metrics.relevance_mass(map, masks).tolist() == [2.0]  # out of [0, 1]: the map has signs
    assert metrics.energy_pointing_game(-map.abs(), masks).isnan().all()


def test_errors_of_localisation():
    masks = torch.zeros(2, 6, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="`points` must be"):
        metrics.pointing_hits(torch.zeros(1, 2), masks)
    for function in (metrics.pointing_game, *(function for function, _ in LOCALISATION.values())):
        with pytest.raises(ValueError, match="`masks` must be"):
            function(torch.zeros(2, 1, 3, 4), masks)
        with pytest.raises(ValueError, match="`masks` must be"):
            function(torch.zeros(2, 3, 6, 8), masks)
        with pytest.raises(TypeError, match=r"`masks` must be a bool tensor.*Choose a threshold"):
            function(torch.zeros(2, 1, 6, 8), masks.float())
    with pytest.raises(ValueError, match=r"`k` must lie in 1 ... 48.*got 49"):
        metrics.top_k_intersection(torch.zeros(2, 1, 6, 8), masks, k=49)
    for area in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="`area` must be a share"):
            metrics.iou_at_area(torch.zeros(2, 1, 6, 8), masks, area=area)


# -- simplicity


@pytest.mark.parametrize(
    ("function", "definition"), [(metrics.sparseness, slow.gini), (metrics.complexity, slow.entropy)]
)
def test_simplicity(function, definition):
    a = torch.randn(4, 3, 4, 5, dtype=torch.float64)
    a[1] = a[1].round()
    found = function(a)
    assert found.tolist() == pytest.approx([definition(v.flatten().tolist()) for v in a])
    torch.testing.assert_close(function(-3 * a), found)  # neither scale nor sign
    torch.testing.assert_close(function(a.flip(-1)), found)  # nor place
    stacked = torch.stack([a, a**3])
    torch.testing.assert_close(torch.vmap(function)(stacked), torch.stack([function(v) for v in stacked]))
    a[2] = 0
    a[3, 0, 0, 0] = float("nan")
    assert function(a).isnan().tolist() == [False, False, True, True]
    with pytest.raises(TypeError, match="`attribution` must be a floating-point tensor"):
        function(torch.ones(3, 4, dtype=torch.long))


def test_the_ends_of_simplicity():
    n = 24
    even, single = torch.full((1, n), -0.3), torch.eye(n)[:1]
    assert metrics.sparseness(even).item() == pytest.approx(0, abs=1e-6)
    assert metrics.sparseness(single).item() == pytest.approx(1 - 1 / n)
    assert metrics.complexity(even).item() == pytest.approx(math.log(n))
    assert metrics.complexity(single).item() == 0
    uniform = torch.rand(1, 100_000)
    assert metrics.sparseness(uniform).item() == pytest.approx(1 / 3, abs=0.01)
    assert metrics.complexity(uniform).item() == pytest.approx(math.log(100_000) - 0.193, abs=0.01)


# -- the table


def test_the_table_of_metrics():
    beside = {"METRICS", "Metric", "peak", "pointing_hits", "residual_entropy"}
    assert set(metrics.METRICS) == set(metrics.__all__) - beside
    for name, metric in metrics.METRICS.items():
        assert metric.function is getattr(metrics, name)
        arguments = list(inspect.signature(metric.function).parameters)
        first = ["params", "model", "x", "target"] if metric.model else []
        judged = [metric.judges] if metric.judges != "map" or metric.model or metric.masks else ["attribution"]
        assert arguments[: len(first) + 1 + metric.masks] == [*first, *judged, *(["masks"] if metric.masks else [])]
        doc = inspect.getdoc(metric.function)
        assert ("igher is better" if metric.higher else "ower is better") in doc, name
        assert ("higher is better" if not metric.higher else "lower is better") not in doc.lower(), name
        said = {"share": "the share of the image" if name == "pointing_game" else "the object's share of the image",
                "random map": "chance", None: "No chance level", 0.0: "0 by chance"}[metric.chance]  # fmt: skip
        assert said in doc, name
        assert metric.range[0] < metric.range[1]
        assert not (metric.chance == "share" and not metric.masks)


def table_of_metrics() -> str:
    lines = ["| metric | judges | better | range | chance |", "|---|---|---|---|---|"]
    for name, metric in metrics.METRICS.items():
        judges = (
            f"{metric.judges}, masks" if metric.masks else f"{metric.judges}, model" if metric.model else metric.judges
        )
        low, high = ("∞" if math.isinf(end) else f"{end:g}" for end in map(abs, metric.range))
        ends = ("-" if metric.range[0] < 0 else "") + low, high
        range = f"{'(' if 'inf' in str(metric.range[0]) else '['}{ends[0]}, {ends[1]}{')' if high == '∞' else ']'}"
        chance = {None: "none", 0.0: "0"}.get(metric.chance, metric.chance)
        lines.append(f"| `{name}` | {judges} | {'higher' if metric.higher else 'lower'} | {range} | {chance} |")
    return "\n".join(lines)


def test_the_page_has_the_table():
    page = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert page.split("<!-- table -->\n")[1].split("\n<!-- /table -->")[0] == table_of_metrics()
