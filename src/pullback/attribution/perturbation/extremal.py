"""Extremal perturbation: the smooth mask of a given area that raises the score most."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pullback._core.batching import report, wide
from pullback._core.entry import method
from pullback._core.inputs import unfolded
from pullback._core.masked import MaskAxes, MaskedModel, mask_axes_of
from pullback._core.targets import score
from pullback._core.types import ChunkSize, Inputs, Layer, Model, Output, Params, Progress, Target
from pullback.attribution.perturbation._optimise import Judge, Reward, contrast, in_parts, optimised_masks
from pullback.masks import blended, pyramid


@method(
    "perturbation",
    "map",
    "one map",
    small={"iterations": 2, "step": 2, "sigma": 2.0, "levels": 3, "max_blur": 1.0, "areas": 0.3},
    forwards=lambda o: o["iterations"],
    adaptive=lambda o: o["iterations"] - 1,
)
def extremal_perturbation(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    areas: float | Sequence[float] = 0.1,
    variant: Literal["preserve", "delete", "dual"] = "preserve",
    reward: str | Judge = "simple",
    perturbation: Literal["blur", "fade"] = "blur",
    levels: int = 8,
    max_blur: float = 20.0,
    iterations: int = 800,
    step: int = 7,
    sigma: float = 21.0,
    learning_rate: float = 0.01,
    jitter: bool = True,
    tolerance: float | None = None,
    layer: str | Layer = "",
    tokens: bool = False,
    output: Output = None,
    chunk_size: ChunkSize = "auto",
    progress: Progress = None,
    return_info: bool = False,
) -> Any:
    r"""Find the part of a given area that raises the score most.

    .. math:: m_a = \arg\max_{m \,:\, |m| = a} f_t(m \otimes x)

    where :math:`m \otimes x` shows x through the mask and blurs or fades the rest. Masks are smooth; the area is held
    by a growing penalty (see `optimised_masks`). The values along areas tell how much of the image suffices. Costs
    `iterations` gradients for each area (twice that for ``"dual"``); images, areas and, under `vmap`, targets run as
    one batch.

    Args:
        params, model, x, target, layer, output: See `gradient`. At a layer the masks lie over the
            activation, whose levels are blurred or faded alike.
        areas: Fraction of the image, or several.
        variant: ``"preserve"`` shows the part alone, ``"delete"`` all but the part, and lowers the score; ``"dual"``
            takes the difference of the two scores.
        reward: ``"simple"``, the score; ``"contrastive"``, the score less that of the best other class; or a function
            ``(output, target) -> [batch]``.
        perturbation: ``"blur"`` or ``"fade"`` (to zero).
        levels: Steps from the strongest perturbation to the image itself.
        max_blur: Standard deviation of the strongest blur, in pixels.
        iterations: Steps of gradient ascent.
        step: Pixels from mask parameter to mask parameter.
        sigma: Smoothness of the mask in pixels.
        learning_rate: Of the ascent; larger with fewer iterations.
        jitter: Mirror the perturbed input in every other iteration. Not at layers.
        tolerance: Stop an example's mask when it moves less than this in 20 iterations; its result does not depend on
            the other examples.
        tokens: The tensor covered is ``[batch token channel]``.
        chunk_size: Masks (areas times images) optimised together: ``"auto"`` for as many as run fast, `None` for all.
        progress: Called with (iterations done, iterations in all).
        return_info: Return ``(masks, info)``; ``info["history"]``, ``[area batch 2 iteration]`` (or ``[batch 2
            iteration]``), holds reward and area's term.

    Returns:
        Masks ``[batch 1 height width]`` in [0, 1], 1 where the part is; ``[area batch 1 height width]`` for several
        areas. For ``"delete"`` too the mask is 1 on the part that is deleted.

    Raises:
        ValueError: If an area is not in [0, 1], or an option is unknown.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(16, 2))
        >>> params, x = params_of(model), torch.rand(3, 1, 16, 16)
        >>> m = extremal_perturbation(params, model, x, 0, areas=[0.1, 0.3], iterations=3, step=4, sigma=6.0)
        >>> m.shape == (2, 3, 1, 16, 16) and bool((m[0] <= 1).all())
        True

    References:
        Fong, Patrick & Vedaldi, Understanding Deep Networks via Extremal Perturbations and Smooth Masks, 2019, sec. 3.
        The authors' TorchRay fixes what the paper leaves open: the schedule, the kernel, the mirrored iterations.
    """
    if variant not in VARIANTS:
        raise ValueError(f"`variant` must be 'preserve', 'delete' or 'dual', got {variant!r}.")
    if not callable(reward) and reward not in ("simple", "contrastive"):
        raise ValueError(f"`reward` must be 'simple', 'contrastive' or a function, got {reward!r}.")
    fractions = [float(areas)] if isinstance(areas, int | float) else [float(area) for area in areas]
    if not fractions or not all(0 <= area <= 1 for area in fractions):
        raise ValueError(f"`areas` must be fractions between 0 and 1, got {areas}.")
    judge = reward if callable(reward) else {"simple": score, "contrastive": contrast}[reward]
    masked = MaskedModel(params, model, x, target, layer=layer, output=output)
    mask_axes = mask_axes_of(masked, tokens)
    total = len(fractions) * masked.batch

    def levels_of(values: Tensor) -> Tensor:
        return pyramid(mask_axes.to_channels_first(values), perturbation, levels=levels, max_blur=max_blur)

    def optimise(rows: range) -> tuple[Tensor, Tensor]:
        return optimised_masks(
            _shown_through(masked.of_rows(rows), mask_axes, levels_of, judge, variant, jitter),
            mask_axes.sizes,
            torch.tensor(
                [fractions[row // masked.batch] for row in rows], dtype=wide(masked.dtype), device=masked.device
            ),
            step=step,
            sigma=sigma,
            iterations=iterations,
            learning_rate=learning_rate,
            tolerance=tolerance,
            progress=lambda done: report(progress, rows.start * iterations + done * len(rows), total * iterations),
        )

    found = in_parts(masked, optimise, total, 2 if variant == "dual" else 1, iterations, chunk_size)
    if not isinstance(areas, int | float):
        found = [rows.unflatten(0, (len(fractions), masked.batch)) for rows in found]
    masks, history = found
    return (masks, {"history": history}) if return_info else masks


# What the model is shown of the image, by the mask, and what of its scores is raised.
VARIANTS: Mapping[str, tuple[Callable[[Tensor], list[Tensor]], Callable[[Tensor], Tensor]]] = {
    "preserve": (lambda mask: [mask], lambda scores: scores[0]),
    "delete": (lambda mask: [1 - mask], lambda scores: -scores[0]),
    "dual": (lambda mask: [mask, 1 - mask], lambda scores: scores[0] - scores[1]),
}


def _shown_through(
    masked: MaskedModel,
    mask_axes: MaskAxes,
    levels_of: Callable[[Tensor], Tensor],
    judge: Judge,
    variant: str,
    jitter: bool,
) -> Reward:
    """Give the reward of masks: how the model's output is judged where it sees the image through them."""
    covers_of, raised = VARIANTS[variant]
    copies = len(covers_of(torch.ones(())))
    at_input = masked.call.layer is None
    steady = levels_of(masked.covered) if at_input else None
    targets = masked.targets(copies)  # before the derivative is taken: what is repeated can be checked

    def reward(masks: Tensor, iteration: int) -> Tensor:
        covers = covers_of(masks)

        def cover(_: int, values: Tensor) -> Tensor:
            steps = levels_of(values[0]) if steady is None else steady
            covered = torch.stack([blended(steps, mask) for mask in covers])
            mirrored = jitter and at_input and iteration % 2 == 0
            return mask_axes.undo(covered.flip(-1) if mirrored else covered)

        return raised(unfolded(judge(masked.outputs(copies, cover), targets), copies))

    return reward
