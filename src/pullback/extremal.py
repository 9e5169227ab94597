"""Masks found by optimisation: the small area that a prediction lives on, or that it cannot live without."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from pullback import maps
from pullback import masks as drawn
from pullback._batch import Progress, Together, report, unfolded
from pullback._call import Inputs, Model, Params, Select, Target, cotangent, public, score
from pullback._cover import Canvas, Scene, Squash, axis_sizes, canvas_of, wide
from pullback._random import Seed, uniform
from pullback._targets import readable

Reward = Callable[[Tensor, int], Tensor]
Judge = Callable[[Tensor, Any], Tensor]
PATIENCE = 20  # iterations over which a mask must rest to be done


def optimised_masks(
    reward: Reward,
    size: Sequence[int],
    areas: Tensor,
    *,
    step: int = 7,
    sigma: float = 21.0,
    iterations: int = 800,
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    dampening: float = 0.9,
    weight: float = 300.0,
    growth: float = 1.0035,
    tolerance: float | None = None,
    progress: Callable[[int], object] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Climb a reward by smooth masks whose area is held to a fraction of the image.

    .. math:: \max_p \; r(m_p) - \lambda_t \, \tfrac{1}{M} \| \mathrm{sort}(m_p) - \rho_a \|^2, \qquad
              \lambda_t = \lambda_0 \, \gamma^t

    where :math:`\rho_a` holds zeros and then a fraction a of ones. Gradient ascent with momentum on the parameters p of
    `pullback.masks.smooth_masks`, which start at 1 and stay in [0, 1]:
    :math:`v_t = \mu v_{t-1} + (1 - d) g_t` with :math:`v_0 = g_0`. The rows are independent of one another.

    Args:
        reward: From masks ``[row 1 *size]`` and the iteration to rewards ``[row]``.
        size: Of the masks.
        areas: ``[row]``: the fraction that each mask may cover.
        step, sigma: See `pullback.masks.smooth_masks`.
        iterations: Steps of ascent. The masks returned are those that the last step was taken from.
        learning_rate, momentum, dampening: Of the ascent.
        weight, growth: Of the area's term: :math:`\lambda_0` and :math:`\gamma`.
        tolerance: A row is done, and rests, when no pixel of its mask moves by more than this in 20 iterations.
        progress: Called after each iteration with the number of those done.

    Returns:
        Masks ``[row 1 *size]``, and the history ``[row 2 iteration]`` of reward and area's term.
    """
    rows = areas.shape[0]
    dtype, device = areas.dtype, areas.device
    grid = drawn.smooth_grid(size, step)
    start = torch.ones(rows, 1, *grid, dtype=dtype, device=device)
    first = _ranks_at_start(tuple(size), step, float(sigma)).to(device)
    pixels = len(first)
    # computed with the rounding of double precision, as a caller would count pixels
    zeros = (pixels * (1 - areas.double())).floor() if device.type != "mps" else (pixels * (1 - areas)).floor()
    reference = (torch.arange(pixels, device=device) >= zeros[:, None]).to(dtype)

    def objective(parameters: Tensor, iteration: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        masks, whole = drawn.smooth_masks(parameters, size, step=step, sigma=sigma)
        rewards = reward(masks, iteration).to(dtype)
        ordered = whole.flatten(1)
        ordered = ordered[:, first] if iteration == 0 else ordered.sort(1).values
        term = -weight * growth**iteration * (ordered - reference).square().mean(1)
        return (rewards + term).sum(), (masks, rewards, term)

    parameters, velocity = start, torch.zeros_like(start)
    masks, before, history = start, None, []
    resting = torch.zeros(rows, dtype=torch.bool, device=device)
    for iteration in range(iterations):
        slope, (now, *terms) = torch.func.grad(objective, has_aux=True)(parameters, iteration)
        masks = now if tolerance is None or iteration == 0 else torch.where(_rows(resting, now), masks, now)
        history.append(torch.stack(terms, 1))
        velocity = slope if iteration == 0 else momentum * velocity + (1 - dampening) * slope
        parameters = (parameters + learning_rate * velocity).clamp(0, 1)
        if progress is not None:
            progress(iteration + 1)
        if tolerance is not None and iteration % PATIENCE == 0:
            if before is not None:
                resting = resting | ((masks - before).abs().flatten(1).amax(1) <= tolerance)
            before = masks
            if readable(resting) and bool(resting.all()):
                break
    return masks, torch.stack(history, 2)


@lru_cache(maxsize=16)
def _ranks_at_start(size: tuple[int, ...], step: int, sigma: float) -> Tensor:
    """Order the pixels of the first mask by size.

    Nearly all of them are equal: they are ranked as the plain form rounds them, the same in any dtype.
    """
    start = torch.ones(1, 1, *drawn.smooth_grid(size, step))
    return drawn.plain_smooth_masks(start, size, step=step, sigma=sigma).clamp(0, 1).flatten().argsort()


def _rows(flags: Tensor, like: Tensor) -> Tensor:
    return flags.reshape(-1, *[1] * (like.ndim - 1))


def _contrast(output: Tensor, target: Target) -> Tensor:
    """Give the score less the highest among the other classes, ``[row]``."""
    if target is None or callable(target) or (isinstance(target, Tensor) and target.is_floating_point()):
        raise ValueError("`reward` 'contrastive' compares classes: `target` must be a class index.")
    hot = cotangent(output, target)
    others = torch.where(hot == 0, output, torch.full_like(output, -math.inf)).amax(1)
    return score(output, target) - others.flatten(1).sum(1) if others.ndim > 1 else score(output, target) - others


@public
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
    layer: str = "",
    at: str = "output",
    tokens: bool = False,
    output: Select = None,
    strict: bool = False,
    chunk_size: Together = "auto",
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
        params, model, x, target, layer, at, output, strict: See `gradient`. At a layer the masks lie over the
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
    judge = reward if callable(reward) else {"simple": score, "contrastive": _contrast}[reward]
    scene = Scene(params, model, x, target, layer=layer, at=at, output=output, strict=strict)
    canvas = canvas_of(scene, tokens)
    total = len(fractions) * scene.batch

    def levels_of(values: Tensor) -> Tensor:
        return drawn.pyramid(canvas.lay(values), perturbation, levels=levels, max_blur=max_blur)

    def optimise(rows: range) -> tuple[Tensor, Tensor]:
        return optimised_masks(
            _shown_through(scene.of_rows(rows), canvas, levels_of, judge, variant, jitter),
            canvas.sizes,
            torch.tensor([fractions[row // scene.batch] for row in rows], dtype=wide(scene.dtype), device=scene.device),
            step=step,
            sigma=sigma,
            iterations=iterations,
            learning_rate=learning_rate,
            tolerance=tolerance,
            progress=lambda done: report(progress, rows.start * iterations + done * len(rows), total * iterations),
        )

    found = _in_parts(scene, optimise, total, 2 if variant == "dual" else 1, iterations, chunk_size)
    if not isinstance(areas, int | float):
        found = [rows.unflatten(0, (len(fractions), scene.batch)) for rows in found]
    masks, history = found
    return (masks, {"history": history}) if return_info else masks


# What the model is shown of the image, by the mask, and what of its scores is raised.
VARIANTS: Mapping[str, tuple[Callable[[Tensor], list[Tensor]], Callable[[Tensor], Tensor]]] = {
    "preserve": (lambda mask: [mask], lambda scores: scores[0]),
    "delete": (lambda mask: [1 - mask], lambda scores: -scores[0]),
    "dual": (lambda mask: [mask, 1 - mask], lambda scores: scores[0] - scores[1]),
}


def _shown_through(
    scene: Scene, canvas: Canvas, levels_of: Callable[[Tensor], Tensor], judge: Judge, variant: str, jitter: bool
) -> Reward:
    """Give the reward of masks: how the model's output is judged where it sees the image through them."""
    covers_of, raised = VARIANTS[variant]
    copies = len(covers_of(torch.ones(())))
    at_input = not scene.site.name
    steady = levels_of(scene.covered) if at_input else None
    targets = scene.targets(copies)  # before the derivative is taken: what is repeated can be checked

    def reward(masks: Tensor, iteration: int) -> Tensor:
        covers = covers_of(masks)

        def cover(_: int, values: Tensor) -> Tensor:
            steps = levels_of(values[0]) if steady is None else steady
            covered = torch.stack([drawn.blended(steps, mask) for mask in covers])
            mirrored = jitter and at_input and iteration % 2 == 0
            return canvas.restore(covered.flip(-1) if mirrored else covered)

        return raised(unfolded(judge(scene.outputs(copies, cover), targets), copies))

    return reward


def _in_parts(
    scene: Scene,
    optimise: Callable[[range], tuple[Tensor, Tensor]],
    count: int,
    shown: int,
    iterations: int,
    chunk_size: Together,
) -> list[Tensor]:
    """Optimise `count` rows, of which the model sees each in so many copies: masks, and the history of them all."""
    if iterations < 1:
        raise ValueError(f"`iterations` must be at least 1, got {iterations}.")
    parts = scene.parts(count, chunk_size, rows=shown, times=2 * iterations)
    masks, histories = zip(*[optimise(rows) for rows in parts], strict=True)
    longest = max(history.shape[2] for history in histories)
    return [torch.cat(masks).to(scene.dtype), torch.cat([_held(history, longest) for history in histories])]


def _held(history: Tensor, length: int) -> Tensor:
    """Repeat the last column of a history that ended early."""
    return torch.cat([history, history[..., -1:].expand(*history.shape[:-1], length - history.shape[-1])], -1)


@public
def meaningful_perturbation(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    iterations: int = 300,
    cells: int | Sequence[int] = 28,
    baseline: drawn.Cover = "blur",
    squash: Squash = "softmax",
    area: float = 1e-4,
    variation: float = 1e-2,
    beta: float = 3.0,
    start: float = 1.0,
    jitter: int = 4,
    learning_rate: float = 0.1,
    seed: Seed = 0,
    layer: str = "",
    at: str = "output",
    tokens: bool = False,
    output: Select = None,
    strict: bool = False,
    chunk_size: Together = "auto",
    progress: Progress = None,
    return_info: bool = False,
) -> Any:
    r"""Find a small, smooth part without which the score is low.

    .. math:: \min_m \; f_t\big(m x + (1 - m) b\big) + \lambda_1 \sum_u |1 - m_u| +
              \lambda_2 \sum_u \|\nabla m_u\|_\beta^\beta

    over a coarse mask m in [0, 1], enlarged linearly; b is a blur of x. Adam, from a constant mask.
    Costs `iterations` gradients; images and, under `vmap`, targets run as one batch.

    Args:
        params, model, x, target, layer, at, output, strict: See `gradient`.
        iterations: Steps of Adam.
        cells: Of the mask, along each axis; at most the size of the image.
        baseline: What the mask blends into: see `pullback.masks.covering`. A blur by 10 pixels if omitted.
        squash: What the output goes through before it is scored: see `rise`.
        area, variation, beta: The weights :math:`\lambda_1` and :math:`\lambda_2` and the exponent.
        start: The mask to begin with, 1 keeping everything.
        jitter: The input is shifted at random by fewer pixels than this, around its border. Not at layers.
        learning_rate: Of Adam.
        seed: Of the shifts: an integer, or an integer tensor ``[]``.
        tokens: What is covered is ``[batch token channel]``.
        chunk_size: Images optimised together: ``"auto"`` for as many as run fast, `None` for all.
        progress: Called with (iterations done, iterations in all).
        return_info: Return ``(map, info)``; ``info["history"]``, ``[batch 3 iteration]``, holds the three terms.

    Returns:
        Map ``[batch 1 height width]`` in [0, 1]: one minus the mask, 1 on the part that is deleted.

    Raises:
        ValueError: If `iterations` is less than 1.

    Example:
        >>> model = lambda params, x: x[:, :, :4].sum((1, 2, 3))
        >>> m = meaningful_perturbation({}, model, torch.ones(1, 1, 8, 8), None, baseline=0.0, cells=4, iterations=9)
        >>> bool(m[0, 0, 0, 0] > m[0, 0, -1, -1])
        True

    Reference:
        Fong & Vedaldi, Interpretable Explanations of Black Boxes by Meaningful Perturbation, 2017, sec. 4.
    """
    scene = Scene(params, model, x, target, layer=layer, at=at, output=output, strict=strict, squash=squash)
    canvas = canvas_of(scene, tokens)
    grid = [min(c, n) for c, n in zip(axis_sizes("cells", cells, canvas.sizes, int), canvas.sizes, strict=True)]
    dtype = wide(scene.dtype)

    def optimise(rows: range) -> tuple[Tensor, Tensor]:
        part = scene.of_rows(rows)
        part.targets(1)  # before the derivative is taken: what is repeated can be checked

        def terms(mask: Tensor, iteration: int) -> Tensor:
            large = maps.resize(mask, canvas.sizes)
            at_t = torch.full((1,), iteration, device=scene.device)
            shift = (uniform(seed, at_t, (len(grid),), torch.float32)[0] * max(1, jitter)).long()

            def cover(_: int, values: Tensor) -> Tensor:
                shown = canvas.lay(values[0])
                under = drawn.covering(shown, baseline)
                blend = under + large.to(shown.dtype) * (shown - under)
                return canvas.restore(_rolled(blend, shift) if jitter and not layer else blend).unsqueeze(0)

            steps = [mask.diff(dim=axis).abs().pow(beta).flatten(1).sum(1) for axis in range(2, mask.ndim)]
            small, even = area * (1 - mask).abs().flatten(1).sum(1), variation * sum(steps[1:], steps[0])
            return torch.stack([part.scores(1, cover)[0].to(dtype), small, even], 1)

        mask, history = _descended(
            terms,
            torch.full((len(rows), 1, *grid), start, dtype=dtype, device=scene.device),
            iterations,
            learning_rate,
            lambda done: report(progress, rows.start * iterations + done * len(rows), scene.batch * iterations),
        )
        return 1 - maps.resize(mask, canvas.sizes), history

    map, history = _in_parts(scene, optimise, scene.batch, 1, iterations, chunk_size)
    return (map, {"history": history}) if return_info else map


def _descended(
    terms: Callable[[Tensor, int], Tensor],
    mask: Tensor,
    iterations: int,
    learning_rate: float,
    progress: Callable[[int], object],
) -> tuple[Tensor, Tensor]:
    """Minimise a sum of terms ``[row term]`` by Adam, the mask held in [0, 1]; the history ``[row term iteration]``."""

    def total(mask: Tensor, iteration: int) -> tuple[Tensor, Tensor]:
        found = terms(mask, iteration)
        return found.sum(), found

    mean, square, history = torch.zeros_like(mask), torch.zeros_like(mask), []
    for t in range(1, iterations + 1):
        slope, found = torch.func.grad(total, has_aux=True)(mask, t - 1)
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
        move = mean / (1 - 0.9**t) / (square / (1 - 0.999**t) + 1e-16).sqrt()
        mask = (mask - learning_rate * move).clamp(0, 1)
        history.append(found)
        progress(t)
    return mask, torch.stack(history, 2)


def _rolled(values: Tensor, shift: Tensor) -> Tensor:
    """Shift the trailing axes by as many pixels as `shift`, ``[axis]``, says, around the border."""
    axes = shift.shape[0]
    for k in range(axes):
        axis = values.ndim - axes + k
        length = values.shape[axis]
        places = (torch.arange(length, device=values.device) - shift[k]) % length
        shape = [1] * values.ndim
        shape[axis] = length
        values = torch.gather(values, axis, places.reshape(shape).expand(values.shape))
    return values
