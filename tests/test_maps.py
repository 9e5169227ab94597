"""Attribution to map: against loops, with shapes and sizes drawn by hypothesis."""

import pytest
import slow
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

from pullback.maps import channel_peak, channel_sum, normalise, resize, smooth

sizes = st.integers(1, 9)
counts = st.integers(1, 3)
few = settings(max_examples=40, deadline=None, derandomize=True)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@few
@given(batch=counts, channels=counts, axes=st.lists(sizes, min_size=0, max_size=3))
def test_channels_are_reduced_by_peak_or_sum(batch, channels, axes):
    attribution = drawn(batch, channels, *axes)
    torch.testing.assert_close(channel_peak(attribution), slow.channel_peak(attribution))
    torch.testing.assert_close(channel_sum(attribution), slow.channel_sum(attribution))


@few
@given(
    batch=counts,
    old=st.tuples(sizes, sizes),
    new=st.tuples(sizes, sizes),
    mode=st.sampled_from(["bilinear", "nearest"]),
)
def test_resizing_is_a_matrix_on_either_side(batch, old, new, mode):
    image = drawn(batch, 1, *old)
    torch.testing.assert_close(resize(image, new, mode), slow.resize(image, new, mode), rtol=1e-9, atol=1e-9)


@few
@given(size=st.tuples(sizes, sizes))
def test_resizing_to_the_same_size_changes_nothing(size):
    image = drawn(2, 1, *size)
    assert torch.equal(resize(image, size, "bilinear"), image)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(size=st.tuples(st.integers(1, 6), st.integers(1, 6)), sigma=st.sampled_from([0.0, 0.3, 1.0, 2.2]))
def test_smoothing_is_a_gaussian_over_a_repeated_border(size, sigma):
    """Also where the Gaussian is wider than the image."""
    image = drawn(1, 1, *size)
    torch.testing.assert_close(smooth(image, sigma), slow.smooth(image, sigma), rtol=1e-9, atol=1e-9)


def test_smoothing_keeps_type_and_constants():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        flat = torch.full((2, 1, 5, 7), 2.0, dtype=dtype)
        assert smooth(flat, 1.3).dtype == dtype
        torch.testing.assert_close(smooth(flat, 1.3), flat, rtol=1e-2, atol=0)


def test_normalising_bounds_each_example_and_keeps_sign_and_zero():
    attribution = drawn(3, 1, 4, 5) * torch.tensor([1.0, 100.0, 0.0]).reshape(3, 1, 1, 1)
    result = normalise(attribution, signed=True)
    peaks = result.abs().flatten(1).amax(1)
    torch.testing.assert_close(peaks[:2], torch.ones(2, dtype=torch.float64))
    assert torch.equal(result[2], attribution[2])
    assert torch.equal(result.sign(), attribution.sign())


def test_normalising_a_map_goes_from_nought_to_one():
    images = drawn(3, 1, 4, 5) * torch.tensor([1.0, 100.0, 0.0]).reshape(3, 1, 1, 1) + 7
    result = normalise(images)
    for image, scaled in zip(images[:2], result[:2]):
        torch.testing.assert_close(scaled, (image - image.min()) / (image.max() - image.min()))
    assert torch.equal(result[2], torch.zeros_like(result[2]))


@pytest.mark.parametrize(
    "function",
    [channel_peak, channel_sum, normalise, lambda a: resize(a, (7, 3), "bilinear"), lambda a: smooth(a, 0.8)],
    ids=["peak", "sum", "normalise", "resize", "smooth"],
)
def test_maps_go_under_vmap(function):
    many = drawn(3, 2, 2, 4, 5)
    torch.testing.assert_close(vmap(function)(many), torch.stack([function(one) for one in many]))


def test_errors():
    image = drawn(1, 1, 4, 5)
    with pytest.raises(ValueError, match="`resize_mode`"):
        resize(image, (3, 3), "wavelet")
    with pytest.raises(ValueError, match="`resize`"):
        resize(image, (3, 0), "bilinear")
    with pytest.raises(ValueError, match="`smooth`"):
        smooth(image, -1.0)
