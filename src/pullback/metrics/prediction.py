"""Does an attribution predict how the score changes? Completeness and infidelity.

Costs are in forwards of the batch. `chunk_size` of them are run together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pullback._core.batching import chunks, report, wide
from pullback._core.entry import public
from pullback._core.masked import MaskAxes, MaskedModel, axis_sizes, mask_axes_of
from pullback._core.types import Inputs, Model, Output, Params, Progress, Target
from pullback._torch.random import Seed, normal, uniform
from pullback.masks import Fill, fill

# -- attributions as predictions of the score


@public
def completeness(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    attribution: Any,
    *,
    baseline: Any = None,
    output: Output = None,
) -> Tensor:
    r"""Measure by how much an attribution's sum misses the difference in score that it should share out.

    .. math:: \Big| \sum_i a_i - \big( f_t(x) - f_t(b) \big) \Big|

    At least 0, lower is better; not bounded. Complete methods reach 0, up to the error of an integral. No chance level:
    an attribution of zeros misses the whole difference. Costs 2 forwards, in one batch.

    Args:
        params, model, x, target, output: See `gradient`.
        attribution: ``[batch ...]``, of the input or of a layer; a tuple or dict where there are several, with `None`
            where there is none.
        baseline: What the attribution is relative to: zeros if omitted; a number, a tensor, ``"mean"``, ``"blur"`` or a
            function, see `pullback.masks.fill`. Where `x` is a tuple or dict, so may it be.

    Returns:
        ``[batch]``, in units of the score; NaN where the attribution holds NaN.

    Raises:
        ValueError: If the attribution has another batch size than `x`.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> params, x = params_of(model), torch.randn(4, 3)
        >>> gap = completeness(params, model, x, 0, input_x_gradient(params, model, x, 0))
        >>> torch.allclose(gap, torch.zeros(4), atol=1e-5)
        True

    Reference:
        Sundararajan, Taly & Yan, Axiomatic Attribution for Deep Networks, 2017, sec. 3.
    """
    masked = MaskedModel(params, model, x, target, output=output)
    parts = attribution if isinstance(attribution, tuple | list) else [attribution]
    parts = [part for part in (attribution.values() if isinstance(attribution, Mapping) else parts) if part is not None]
    if not parts or any(part.shape[:1] != (masked.batch,) for part in parts):
        got = [list(part.shape) for part in parts]
        raise ValueError(f"`attribution` must be [batch ...] with a batch of {masked.batch}, got {got}.")
    keys = masked.call.x.floating

    def cover(part: int, values: Tensor) -> Tensor:
        own = baseline[keys[part]] if isinstance(baseline, tuple | list | Mapping) else baseline
        return torch.stack((values[0], fill(values[0], own).expand_as(values[0])))

    whole, without = masked.scores(2, cover).to(wide(masked.dtype))
    total = sum(part.flatten(1).to(whole.dtype).sum(1) for part in parts)
    return (total - (whole - without)).abs()


@public
def infidelity(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    attribution: Tensor,
    *,
    samples: int = 100,
    perturbation: str | Callable[[Tensor, Tensor], Tensor] = "square",
    window: int | Sequence[int] | None = None,
    noise: float = 0.1,
    baseline: Fill = None,
    rescale: bool = False,
    seed: Seed = 0,
    output: Output = None,
    chunk_size: int | None = 32,
    progress: Progress = None,
) -> Tensor:
    r"""Measure how well an attribution predicts what random perturbations do to the score.

    .. math:: \mathbb{E}_I \Big[ \big( I^\top a - (f_t(x) - f_t(x - I)) \big)^2 \Big]

    At least 0, lower is better; not bounded, in units of the score squared. No chance level: an attribution of zeros,
    which says nothing, gets the mean square of what the perturbations do. Costs ``samples + 1`` forwards.

    Args:
        params, model, x, target, output: See `gradient`.
        attribution: Signed, of the shape of `x`.
        samples: Number of perturbations. They are the same for all examples.
        perturbation: The I: ``"square"`` takes a square at a random place to the baseline, ``"noise"`` takes Gaussian
            noise off, a function of `x` and the sample indices gives ``[sample batch ...]``.
        window: Size of the square, one number or one a spatial axis; a quarter of each axis if omitted.
        noise: Standard deviation, in units of `x`.
        baseline: See `pullback.masks.fill`. Zeros if omitted.
        rescale: Multiply each attribution by the one number that serves it best, for attributions that are right up to
            their scale: :math:`\sum I^\top a \, \Delta f / \sum (I^\top a)^2`. Ours; not in the paper.
        seed: Integer, or an integer tensor ``[]`` (for `vmap` over seeds).
        chunk_size: Samples evaluated together. `None` for all of them.
        progress: Called with (samples done, samples in all).

    Returns:
        ``[batch]``; NaN where the attribution holds NaN.

    Raises:
        ValueError: If the attribution is not of the shape of `x`, `samples` is less than 1, the window does not fit or
            the perturbation is unknown.

    Example:
        >>> model = torch.nn.Linear(6, 2).double()
        >>> params, x = params_of(model), torch.randn(4, 6).double()
        >>> a = gradient(params, model, x, 0)  # a linear model does what its gradient says
        >>> torch.allclose(infidelity(params, model, x, 0, a), torch.zeros(4).double())
        True

    Reference:
        Yeh, Hsieh, Suggala, Inouye & Ravikumar, On the (In)fidelity and Sensitivity of Explanations, 2019, sec. 2.
    """
    if samples < 1:
        raise ValueError(f"`samples` must be at least 1, got {samples}.")
    masked = MaskedModel(params, model, x, target, output=output)
    mask_axes = mask_axes_of(masked)
    image = masked.covered
    if attribution.shape != image.shape:
        raise ValueError(
            f"`attribution` must have the shape of `x`, {list(image.shape)}, got {list(attribution.shape)}."
        )
    squares = _squares(mask_axes, window)

    def moved(index: Tensor) -> Tensor:
        if callable(perturbation):
            return perturbation(image, index)
        if perturbation == "noise":
            return noise * normal(seed, index, image.shape[1:], image.dtype).unsqueeze(1)
        if perturbation == "square":
            shown = mask_axes.to_channels_first(image)
            away = shown - fill(shown, baseline)
            return mask_axes.undo(torch.where(squares(seed, index)[:, None, None], away, 0))
        raise ValueError(f"`perturbation` must be 'square', 'noise' or a function, got {perturbation!r}.")

    whole = masked.scores(1, lambda _, values: values)
    dtype, predicted, found = wide(masked.dtype), [], []
    for part in chunks(samples, chunk_size):
        change = moved(torch.arange(part.start, part.stop, device=masked.device))
        found.append(whole - masked.scores(len(part), lambda _, values: values - change))  # noqa: B023
        predicted.append((change * attribution).to(dtype).flatten(2).sum(2))
        report(progress, part.stop, samples)
    told, done = torch.cat(predicted), torch.cat(found).to(dtype)  # [sample batch]
    if rescale:
        square = told.square().sum(0)
        told = told * ((told * done).sum(0) / torch.where(square == 0, 1, square))
    return (told - done).square().mean(0)


def _squares(mask_axes: MaskAxes, window: int | Sequence[int] | None) -> Callable[[Seed, Tensor], Tensor]:
    """Place a window at random: from seed and sample indices to ``[sample *sizes]``, True within."""
    window = axis_sizes("window", window, mask_axes.sizes, lambda n: math.ceil(n / 4))
    if any(w > n for w, n in zip(window, mask_axes.sizes, strict=True)):
        raise ValueError(f"`window` must fit the spatial axes {list(mask_axes.sizes)}, got {list(window)}.")

    def squares(seed: Seed, index: Tensor) -> Tensor:
        places = uniform(seed, index, (len(window),), torch.float32)
        within = torch.ones(len(index), *mask_axes.sizes, dtype=torch.bool, device=index.device)
        for axis, (length, width) in enumerate(zip(mask_axes.sizes, window, strict=True)):
            start = (places[:, axis] * (length - width + 1)).long()
            place = torch.arange(length, device=index.device)
            along = (place >= start[:, None]) & (place < start[:, None] + width)
            within = within & along.reshape(-1, *[length if k == axis else 1 for k in range(len(window))])
        return within

    return squares
