"""XRAI against a loop over segments and pixels."""

import pytest
import torch
from cases import BY_NAME

from pullback import felzenszwalb_segments, gradient, integrated_gradients, params_of, xrai

CASE = BY_NAME["residual"]


def ranked(values, masks, least_area):
    """Kapishnikov et al. 2019, algorithm 1, for one map ``[height width]``."""
    result, covered, left = torch.full_like(values, float("nan")), torch.zeros_like(values, dtype=torch.bool), [*masks]
    while True:
        gains = []
        for mask in left:
            new = mask & ~covered
            gains.append(float(values[new].mean()) if int(new.sum()) >= least_area else -float("inf"))
        if not gains or max(gains) == -float("inf"):
            break
        best = left.pop(gains.index(max(gains)))
        result[best & ~covered] = max(gains)
        covered |= best
    result[~covered] = values[~covered].mean()
    return result


@pytest.mark.parametrize("least_area", [1, 4])
def test_segments_are_ranked_by_gain(least_area):
    model, x = CASE.model(), CASE.x
    masks = torch.rand(7, 6, 6) > 0.6
    values = gradient(params_of(model), model, x, 2).amax(1)
    expected = torch.stack([ranked(v, masks, least_area) for v in values]).unsqueeze(1)
    ours = xrai(params_of(model), model, x, 2, segments=masks, method=gradient, least_area=least_area)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    both = xrai(params_of(model), model, x, 2, segments=torch.stack([masks, masks]), method=gradient,
                least_area=least_area)  # fmt: skip
    torch.testing.assert_close(both, ours)


def test_labels_are_masks_and_the_default_is_black_and_white():
    model, x = CASE.model(), CASE.x
    labels = torch.randint(0, 5, (6, 6))
    masks = torch.stack([labels == k for k in range(5)])
    ends = [f(x, (1, 2, 3), keepdim=True) for f in (torch.amin, torch.amax)]

    def method(params, model, x, target, **options):
        return sum(integrated_gradients(params, model, x, target, baseline=b, steps=4, **options) for b in ends) / 2

    ours = xrai({}, model, x, 1, segments=labels, steps=4)
    torch.testing.assert_close(ours, xrai({}, model, x, 1, segments=masks, method=method), rtol=1e-9, atol=1e-12)
    for values in ours[0, 0][masks[0]]:
        assert float(values) == float(ours[0, 0][masks[0]][0])


def test_segments_from_scikit_image():
    image = torch.zeros(3, 24, 24)
    image[:, :, 12:] = 1
    chosen = {"sigma": 0.0, "least_size": 20}
    masks = felzenszwalb_segments(image, scales=(50,), dilation=0, **chosen)
    assert torch.equal(masks.sum(0), torch.ones(24, 24, dtype=torch.long))
    assert torch.equal(masks[0], image[0] == image[0, 0, 0])
    grown = felzenszwalb_segments(image, scales=(50, 100), dilation=2, **chosen)
    assert len(grown) == 2 * len(masks)
    assert bool((grown[: len(masks)] >= masks).all())
    assert int(grown[0].sum()) == int(masks[0].sum()) + 2 * 24


def test_errors():
    with pytest.raises(ValueError, match="`segments` must be masks"):
        xrai({}, CASE.model(), CASE.x, 1, segments=torch.zeros(3, 3, dtype=torch.long), method=gradient)
