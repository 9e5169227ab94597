"""From pixels to regions: rank segments of the image by what an attribution says of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import einsum
from torch import Tensor

from pullback import maps
from pullback._core.entry import method
from pullback._core.types import Model, Output, Params, Target
from pullback.attribution.paths.integrated import integrated_gradients


def _black_and_white(params: Params, model: Model, x: Tensor, target: Target, **options: Any) -> Tensor:
    """Integrate gradients from the least and from the greatest value of each example."""
    flat = x.flatten(1)
    ends = [v.reshape(-1, *[1] * (x.ndim - 1)) for v in (flat.amin(1), flat.amax(1))]
    return integrated_gradients(params, model, x, target, baseline=ends, **options)


@method(
    "regions",
    "attribution",
    "one tensor",
    "image",
    small={"steps": 2},
    forwards=lambda o: 2 * o["steps"],
    mechanism="formula",
)
def xrai(
    params: Params,
    model: Model,
    x: Tensor,
    target: Target,
    *,
    segments: Tensor,
    method: Callable[..., Any] = _black_and_white,
    reduce: Callable[[Tensor], Tensor] = lambda attribution: attribution.amax(1, keepdim=True),
    least_area: int = 1,
    output: Output = None,
    **options: Any,
) -> Tensor:
    r"""Grow the explanation by the segment with the greatest mean attribution, again and again.

    .. math:: s_k = \arg\max_s \operatorname{mean}_{p \in s \setminus R_k} a_p, \quad R_{k+1} = R_k \cup s_k

    A pixel's value is the mean attribution of the part of a segment that it came in with; pixels that no segment brings
    in share the mean over them. Costs what `method` costs, and one product of segments and map for each segment.

    Args:
        params, model, x, target, output: See `gradient`; `x` is ``[batch channel height width]``.
        segments: Masks ``[segment height width]`` or ``[batch segment height width]``, boolean, which may overlap; or
            integer labels ``[height width]`` or ``[batch height width]``. See `felzenszwalb_segments`.
        method: Attribution to begin with: any that is shaped like `x`. Integrated gradients from black and from white
            if omitted.
        reduce: From the attribution to a map ``[batch 1 height width]``; the maximum over channels if omitted.
        least_area: Pixels that a segment must add to be taken.
        **options: Passed to `method`.

    Returns:
        Map ``[batch 1 height width]``, signed, in units of the attribution, constant on regions.

    Raises:
        ValueError: If `segments` do not fit `x`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2))
        >>> params, x = params_of(model), torch.randn(1, 3, 4, 4)
        >>> m = xrai(params, model, x, 0, segments=torch.arange(16).reshape(4, 4) // 4)  # rows
        >>> torch.equal(m, m[..., :1].expand_as(m))
        True

    Reference:
        Kapishnikov, Bolukbasi, Viégas & Terry, XRAI: Better Attributions Through Regions, 2019, alg. 1.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"`x` must be one tensor, got {type(x).__name__}.")
    masks = _masks_of(segments, x)
    attribution = method(params, model, x, target, output=output, **options)
    values = reduce(attribution).flatten(1)  # [batch pixel]
    covered, map = torch.zeros_like(values), torch.zeros_like(values)
    taken = torch.zeros(len(x), masks.shape[1], dtype=torch.bool, device=x.device)
    place = torch.arange(masks.shape[1], device=x.device)
    for _ in range(masks.shape[1]):
        free = 1 - covered
        area = _summed(masks, free)
        density = _summed(masks, free * values) / area.clamp(min=1)
        fits = ~taken & (area >= least_area)
        best = torch.where(fits, density, torch.full_like(density, -torch.inf)).argmax(1, keepdim=True)
        found = fits.gather(1, best).to(values.dtype)
        added = (
            found * free * masks.expand(len(x), -1, -1).gather(1, best[..., None].expand(-1, 1, values.shape[1]))[:, 0]
        )
        map, covered = map + added * density.gather(1, best), covered + added
        taken = taken | (place == best)
    rest = 1 - covered
    left = (rest * values).sum(1, keepdim=True) / rest.sum(1, keepdim=True).clamp(min=1)
    return (map + rest * left).unflatten(1, (1, *x.shape[2:]))


def _summed(masks: Tensor, values: Tensor) -> Tensor:
    return einsum(masks.expand(len(values), -1, -1), values, "batch segment pixel, batch pixel -> batch segment")


def _masks_of(segments: Tensor, x: Tensor) -> Tensor:
    """Give masks ``[batch segment pixel]``, or ``[1 segment pixel]`` for all examples, in the dtype of `x`."""
    if segments.dtype != torch.bool:
        labels = segments.reshape(-1, 1, *segments.shape[-2:])
        count = int(segments.max()) + 1
        segments = labels == torch.arange(count, device=segments.device).reshape(1, -1, 1, 1)
    elif segments.ndim == 3:
        segments = segments.unsqueeze(0)
    if segments.shape[-2:] != x.shape[2:] or segments.ndim != 4 or segments.shape[0] not in (1, len(x)):
        raise ValueError(
            f"`segments` must be masks [segment height width] or labels [height width] of the size of `x`, "
            f"{list(x.shape[2:])}, got {list(segments.shape)}."
        )
    return segments.flatten(2).to(x)


def felzenszwalb_segments(
    image: Tensor,
    scales: Sequence[float] = (50, 100, 150, 250, 500, 1200),
    *,
    sigma: float = 0.8,
    least_size: int = 150,
    dilation: int = 5,
) -> Tensor:
    """Segment an image ``[channel height width]`` at several scales by scikit-image, as XRAI's authors do.

    The segments of all scales, each grown by `dilation` pixels, ``[segment height width]``, boolean.

    Args:
        image: Any range; it is scaled to [-1, 1].
        scales: The greater, the larger the segments.
        sigma: Of the Gaussian that the image is smoothed with.
        least_size: Pixels of the smallest segment.
        dilation: Radius of the disk that segments grow by.

    Raises:
        ImportError: If scikit-image is missing: ``pip install scikit-image``.
    """
    try:
        from skimage import morphology, segmentation
    except ImportError as error:
        raise ImportError("`felzenszwalb_segments` needs scikit-image: pip install scikit-image.") from error
    pixels = (2 * maps.normalise(image.unsqueeze(0))[0] - 1).movedim(0, 2).detach().cpu().double().numpy()
    disk = morphology.disk(dilation)
    masks = []
    for scale in scales:
        labels = segmentation.felzenszwalb(pixels, scale=scale, sigma=sigma, min_size=least_size)
        masks += [torch.from_numpy(morphology.dilation(labels == k, disk)) for k in range(labels.max() + 1)]
    return torch.stack(masks).to(image.device)
