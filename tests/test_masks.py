"""Masks against pixel-by-pixel definitions, numbers of TorchRay, and what each promises."""

import pytest
import slow_perturbations as slow
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

from pullback import maps, masks

few = settings(max_examples=15, deadline=None, derandomize=True)


def uniform(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@few
@given(size=st.integers(1, 20), window=st.integers(1, 9), stride=st.integers(1, 9))
def test_windows_slide_to_the_end(size, window, stride):
    places = masks.windows(size, window, stride)
    for k, row in enumerate(places):
        assert row.nonzero().flatten().tolist() == list(range(k * stride, min(k * stride + window, size)))
    assert places[-1].any()
    assert size <= window or places[-1, -1] or stride > window


@few
@given(
    size=st.tuples(st.integers(3, 12), st.integers(3, 12)),
    cells=st.tuples(st.integers(2, 5), st.integers(2, 5)),
    data=st.data(),
)
def test_grids_are_enlarged_and_shifted(size, cells, data):
    shift = tuple(data.draw(st.integers(0, max(0, -(-n // c) - 1))) for n, c in zip(size, cells))
    grid = uniform(1, *cells)
    ours = masks.grid_masks(grid, torch.tensor([shift]), size)
    torch.testing.assert_close(ours[0, 0], slow.grid_mask(grid[0], shift, size), rtol=1e-9, atol=1e-9)


def test_grids_over_one_and_three_axes():
    line, plane = uniform(2, 4), uniform(2, 4)[:, :, None].expand(2, 4, 3)
    shift = torch.tensor([[1], [0]])
    ours = masks.grid_masks(line, shift, (9,))
    flat = masks.grid_masks(plane, torch.cat([shift, 0 * shift], 1), (9, 6))
    torch.testing.assert_close(ours, flat[..., 0])
    solid = masks.grid_masks(
        plane[..., None].expand(2, 4, 3, 2), torch.cat([shift, 0 * shift, 0 * shift], 1), (9, 6, 5)
    )
    torch.testing.assert_close(flat, solid[..., 0])


def test_a_grid_of_one_cell_is_refused():
    with pytest.raises(ValueError, match=r"`cells` must be at least 2"):
        masks.grid_masks(uniform(1, 1, 3), torch.tensor([[0, 0]]), (5, 5))


@few
@given(
    size=st.tuples(st.integers(3, 12), st.integers(3, 12)),
    step=st.integers(1, 5),
    sigma=st.sampled_from([1.0, 2.5, 4.0]),
)
def test_smooth_masks_are_softened_maxima(size, step, sigma):
    p = uniform(2, 1, *masks.smooth_grid(size, step))
    ours, whole = masks.smooth_masks(p, size, step=step, sigma=sigma)
    for k in (0, 1):
        torch.testing.assert_close(ours[k, 0], slow.smooth_mask(p[k, 0], size, step, sigma, 20.0), rtol=1e-9, atol=1e-9)
    plain = masks.plain_smooth_masks(p, size, step=step, sigma=sigma)
    torch.testing.assert_close(whole[:, 0], plain, rtol=1e-9, atol=1e-9)


def test_smooth_masks_over_one_and_three_axes():
    for size in ((11,), (5, 4, 6)):
        p = uniform(2, 1, *masks.smooth_grid(size, 2))
        _, whole = masks.smooth_masks(p, size, step=2, sigma=2.0)
        torch.testing.assert_close(whole[:, 0], masks.plain_smooth_masks(p, size, step=2, sigma=2.0))


def test_smooth_masks_have_torchrays_numbers():
    ones, one = torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    one[0, 0, 1, 2] = 1
    mask, whole = masks.smooth_masks(ones, (28, 28))
    assert whole.shape == (1, 1, 64, 64)
    expected = torch.tensor([0.975870, 0.995667, 0.847274])
    torch.testing.assert_close(torch.stack([mask.min(), mask.max(), whole.mean()]), expected, rtol=1e-5, atol=0)
    for pooling, total in (("softmax", 717.0916), ("sum", 717.1506), ("sigmoid", 783.9701)):
        mask, whole = masks.smooth_masks(one, (28, 28), pooling=pooling)
        assert float(mask.sum()) == pytest.approx(total, rel=1e-5)


def test_the_hard_maximum_is_the_limit_of_the_soft():
    p = uniform(1, 1, 4, 4)
    hard, _ = masks.smooth_masks(p, (12, 12), step=3, sigma=3.0, coldness=float("inf"))
    soft, _ = masks.smooth_masks(p, (12, 12), step=3, sigma=3.0, coldness=500.0)
    torch.testing.assert_close(hard, soft, rtol=0, atol=1e-2)
    assert bool((hard >= soft - 1e-12).all())


def test_smooth_masks_are_batched_and_differentiable():
    p = uniform(3, 2, 1, 3, 3)
    how = {"size": (6, 6), "step": 2, "sigma": 2.0}
    many = vmap(lambda p: masks.smooth_masks(p, **how)[0])(p)
    torch.testing.assert_close(many, torch.stack([masks.smooth_masks(one, **how)[0] for one in p]))
    assert torch.autograd.gradcheck(lambda p: masks.smooth_masks(p, clamp=False, **how)[1], p[0].requires_grad_())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 0}, "`step` must be at least 1"),
        ({"sigma": 0.0}, "`sigma` must be positive"),
        ({"pooling": "max"}, "`pooling` must be"),
        ({"step": 3}, r"`parameters` must be a grid of \[10, 10\]"),
    ],
)
def test_what_smooth_masks_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        masks.smooth_masks(torch.ones(1, 1, 4, 4), (28, 28), **options)


def test_the_pyramid_has_torchrays_numbers():
    x = (torch.arange(32.0) / 32).view(1, 2, 4, 4)
    steps = masks.pyramid(x, levels=3, max_blur=1.0)
    expected = torch.tensor([0.0396928, 0.0149316, 0.0])
    torch.testing.assert_close(steps[:, 0, 0, 0, 0], expected, rtol=0, atol=1e-6)
    blend = masks.blended(steps, torch.full((1, 1, 4, 4), 0.25))
    assert float(blend[0, 0, 0, 0]) == pytest.approx(0.0273122, abs=1e-6)
    assert torch.equal(steps[2], x)


@few
@given(levels=st.integers(2, 6))
def test_blending_is_linear_between_levels(levels):
    steps, mask = uniform(levels, 2, 3, 4, 4), uniform(2, 1, 4, 4)
    hats = (1 - (mask * (levels - 1) - torch.arange(levels).reshape(-1, 1, 1, 1, 1)).abs()).clamp(min=0)
    torch.testing.assert_close(masks.blended(steps, mask), (hats * steps).sum(0))
    slope = torch.func.grad(lambda m: masks.blended(steps, m).sum())(mask)
    numeric = (masks.blended(steps, mask + 1e-7) - masks.blended(steps, mask - 1e-7)).sum(1, keepdim=True) / 2e-7
    torch.testing.assert_close(slope, numeric, rtol=1e-5, atol=1e-6)


def test_what_covers():
    x = uniform(2, 3, 5, 5)
    assert not masks.fill(x, None).any()
    assert bool((masks.fill(x, 0.5) == 0.5).all())
    assert masks.fill(x, x[:1]) is not None
    torch.testing.assert_close(masks.fill(x, "blur", 2.0), maps.smooth(x, 2.0))
    torch.testing.assert_close(masks.fill(x, lambda x: 2 * x), 2 * x)
    with pytest.raises(ValueError, match="`baseline` must be 'mean'"):
        masks.fill(x, "median")
    with pytest.raises(ValueError, match=r"`baseline` must broadcast to \[2, 3, 5, 5\], got \[4\]"):
        masks.fill(x, torch.zeros(4))
    with pytest.raises(ValueError, match="`perturbation` must be 'blur' or 'fade'"):
        masks.pyramid(x, "noise")
    with pytest.raises(ValueError, match="`levels` must be at least 2"):
        masks.pyramid(x, levels=1)


def test_superpixels_number_from_zero():
    pytest.importorskip("skimage")
    image = torch.zeros(2, 3, 16, 16)
    image[0, :, :, 8:] = 1
    ids = masks.superpixels(image, segments=4)
    assert ids.shape == (2, 1, 16, 16)
    assert int(ids.min()) == 0
    assert not set(ids[0, 0, :, :7].flatten().tolist()) & set(ids[0, 0, :, 9:].flatten().tolist())


def test_cells_cut_the_image_evenly():
    ids = masks.cells((6, 9), (3, 3))
    assert ids.shape == (1, 6, 9)
    assert torch.bincount(ids.flatten()).tolist() == [6] * 9
