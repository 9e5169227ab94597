"""Every method as its paper defines it: loops, finite differences, plain autograd on ordinary modules.

Nothing here is fast, general or shared with the library. What stands here is what the library must equal.

A model is given as `call(x) -> output`, an ordinary function; where a layer is read, as the module and
`call(module, x)`.
`x` may be a tensor, or a tuple or dict of tensors; parts that are not floating point have no gradient (`None`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Call = Callable[[Any], Tensor]


# ---- targets ------------------------------------------------------------------------------------------------------


def scores(out: Tensor, target: Any) -> list[Tensor]:
    """The score of each example, for a target in any of its forms."""
    examples = range(len(out))
    if target is None:
        return [out[i].reshape(()) for i in examples]
    if callable(target):
        per_example: Any = target(out)
        return [per_example[i] for i in examples]
    if isinstance(target, Tensor) and target.is_floating_point():
        return [(out[i] * target[i]).sum() for i in examples]
    indices = np.asarray(target)
    each = [int(indices)] * len(out) if indices.ndim == 0 else [int(c) for c in indices]
    return [out[i, each[i]].sum() for i in examples]


# ---- gradients ----------------------------------------------------------------------------------------------------


def mapped(function: Callable[[Tensor], Any], x: Any) -> Any:
    """Apply a function to every tensor of an input."""
    if isinstance(x, dict):
        return {name: mapped(function, part) for name, part in x.items()}
    if isinstance(x, tuple):
        return tuple(mapped(function, part) for part in x)
    return function(x)


def tree(x: Any) -> list[Tensor]:
    """The tensors of an input, one after the other."""
    found: list[Tensor] = []
    mapped(found.append, x)
    return found


def gradient(call: Call, x: Any, target: Any) -> Any:
    """The gradient of each example's score with respect to that example."""
    x = mapped(lambda part: part.clone().requires_grad_(part.is_floating_point()), x)
    free = [part for part in tree(x) if part.requires_grad]
    # A view may be written in place where a leaf may not.
    out = call(mapped(lambda part: part.view_as(part), x))
    rows = [torch.autograd.grad(score, free, retain_graph=True) for score in scores(out, target)]
    columns = iter([torch.stack([row[k][i] for i, row in enumerate(rows)]) for k in range(len(free))])
    return mapped(lambda part: next(columns) if part.requires_grad else None, x)


def finite_difference_gradient(call: Call, x: Tensor, target: Any, step: float = 1e-5) -> Tensor:
    """The same without any derivative: every entry moved up and down."""
    result = torch.zeros_like(x)
    with torch.no_grad():
        for entry in range(x.numel()):
            moved = []
            for sign in (+1, -1):
                copy = x.clone()
                copy.view(-1)[entry] += sign * step
                moved.append(sum(float(score) for score in scores(call(copy), target)))
            result.view(-1)[entry] = (moved[0] - moved[1]) / (2 * step)
    return result


def derivative(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-4) -> Tensor:
    """The derivative of a function of one number, by five points."""
    far, near = (function(at + k * step) - function(at - k * step) for k in (2, 1))
    return (8 * near - far) / (12 * step)


def at_layer(
    model: nn.Module, call: Callable[[nn.Module, Any], Tensor], x: Any, target: Any, layer: str, at: str = "output"
) -> list[tuple[Tensor, Tensor]]:
    """Activation and gradient at a layer, one pair for every time the layer is called."""
    seen: list[Tensor] = []

    def tap(value: Any) -> Any:
        rest = None
        if isinstance(value, tuple):
            value, rest = value[0], value[1:]
        # A copy of its own: others may read the tensor, and what comes after may write to it.
        value = value.clone() if value.requires_grad else value.detach().clone().requires_grad_()
        seen.append(value)
        return value.clone() if rest is None else (value.clone(), *rest)

    module = model.get_submodule(layer)
    if at == "input":
        handle = module.register_forward_pre_hook(lambda module, args: tap(args))
    else:
        handle = module.register_forward_hook(lambda module, args, out: tap(out))
    total = torch.stack(scores(call(model, x), target)).sum()
    handle.remove()
    return list(zip([value.detach() for value in seen], torch.autograd.grad(total, seen), strict=True))


def input_x_gradient(call: Call, x: Any, target: Any) -> Any:
    """Each entry of the input times its derivative."""
    gradients = iter(tree(gradient(call, x, target)))
    return mapped(lambda part: None if (g := next(gradients)) is None else part * g, x)


# ---- rectifiers whose backward is not their derivative ------------------------------------------------------------


class GuidedRectifier(torch.autograd.Function):
    """Springenberg et al. 2015: a gradient passes where both it and the input are positive."""

    @staticmethod
    def forward(ctx, h, high):
        ctx.save_for_backward(h)
        ctx.high = high
        return h.clamp(0, high)

    @staticmethod
    def backward(ctx, *cotangents):
        (g,) = cotangents
        (h,) = ctx.saved_tensors
        passed = torch.zeros_like(g)
        where = (h > 0) & (h < ctx.high) & (g > 0)
        passed[where] = g[where]
        return passed, None


class DeconvnetRectifier(torch.autograd.Function):
    """Zeiler & Fergus 2014: a gradient passes where it is positive, whatever the input was."""

    @staticmethod
    def forward(ctx, h, high):
        return h.clamp(0, high)

    @staticmethod
    def backward(ctx, *cotangents):
        (g,) = cotangents
        passed = torch.zeros_like(g)
        passed[g > 0] = g[g > 0]
        return passed, None


def guided(h: Tensor, high: float) -> Tensor:
    return GuidedRectifier.apply(h, high)


def deconvnet(h: Tensor, high: float) -> Tensor:
    return DeconvnetRectifier.apply(h, high)


# ---- paths and noise ----------------------------------------------------------------------------------------------


def along(x: Any, baseline: Any, alpha: float) -> Any:
    """The point at `alpha` on the line from the baseline to the input."""
    starts = iter(tree(baseline))
    return mapped(lambda part: moved(next(starts), part, alpha), x)


def moved(start: Tensor, end: Tensor, alpha: float) -> Tensor:
    return start + alpha * (end - start) if end.is_floating_point() else end


def weighted_path(call: Call, x: Any, target: Any, baseline: Any, nodes: Sequence[tuple[float, float]]) -> Any:
    """Sum of weight times gradient over points of the line, times the way from baseline to input."""
    totals: list[Any] = [0.0 for _ in tree(x)]
    for alpha, weight in nodes:
        for k, g in enumerate(tree(gradient(call, along(x, baseline, alpha), target))):
            totals[k] = None if g is None else totals[k] + weight * g
    ends = iter(zip(totals, tree(x), tree(baseline), strict=True))
    return mapped(lambda part: None if (t := next(ends))[0] is None else t[0] * (t[1] - t[2]), x)


def integrated_gradients(call: Call, x: Any, target: Any, baseline: Any, steps: int = 400) -> Any:
    """Sundararajan et al. 2017, by a fine midpoint sum."""
    return weighted_path(call, x, target, baseline, [((k + 0.5) / steps, 1 / steps) for k in range(steps)])


def integrated_gradients_gauss(call: Call, x: Any, target: Any, baseline: Any, steps: int) -> Any:
    """The same by a Gauss-Legendre sum of so many points."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return weighted_path(call, x, target, baseline, [((n + 1) / 2, w / 2) for n, w in zip(nodes, weights, strict=True)])


def smooth_grad(attribute: Callable[[Tensor], Tensor], x: Tensor, noises: Sequence[Tensor], statistic: str) -> Tensor:
    """Smilkov et al. 2017 (mean), its square, and Adebayo et al. 2018 (unbiased variance), over given noise."""
    draws = [attribute(x + noise) for noise in noises]
    mean = sum(draws) / len(draws)
    if statistic == "mean":
        return mean  # type: ignore[return-value]
    if statistic == "squared":
        return sum(draw * draw for draw in draws) / len(draws)  # type: ignore[return-value]
    return sum((draw - mean) ** 2 for draw in draws) / (len(draws) - 1)  # type: ignore[return-value]


# ---- class activation maps ----------------------------------------------------------------------------------------


def grad_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Selvaraju et al. 2017: channels weighed by their mean gradient, clamped at zero."""
    batch, channels = activation.shape[:2]
    result = torch.zeros(batch, 1, *activation.shape[2:], dtype=activation.dtype)
    for i in range(batch):
        for c in range(channels):
            result[i, 0] += gradient[i, c].mean() * activation[i, c]
    return result.clamp(min=0)


def linear_approx(activation: Tensor, gradient: Tensor) -> Tensor:
    """Activation times gradient, summed over channels, signed."""
    batch, channels = activation.shape[:2]
    result = torch.zeros(batch, 1, *activation.shape[2:], dtype=activation.dtype)
    for i in range(batch):
        for position in np.ndindex(*activation.shape[2:]):
            for c in range(channels):
                result[(i, 0, *position)] += activation[(i, c, *position)] * gradient[(i, c, *position)]
    return result


# ---- maps ---------------------------------------------------------------------------------------------------------


def channel_peak(attribution: Tensor) -> Tensor:
    """The largest absolute value over channels, at each position."""
    batch, channels = attribution.shape[:2]
    result = torch.zeros(batch, 1, *attribution.shape[2:], dtype=attribution.dtype)
    for i in range(batch):
        for position in np.ndindex(*attribution.shape[2:]):
            result[(i, 0, *position)] = max(abs(float(attribution[(i, c, *position)])) for c in range(channels))
    return result


def channel_sum(attribution: Tensor) -> Tensor:
    """The sum over channels, at each position."""
    batch, channels = attribution.shape[:2]
    result = torch.zeros(batch, 1, *attribution.shape[2:], dtype=attribution.dtype)
    for i in range(batch):
        for c in range(channels):
            result[i, 0] += attribution[i, c]
    return result


def interpolation(old: int, new: int, mode: str) -> Tensor:
    """The matrix that resizes one axis, pixel centres at half integers."""
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        if mode == "nearest":
            matrix[i, min(math.floor(i * old / new), old - 1)] = 1
            continue
        place = min(max((i + 0.5) * old / new - 0.5, 0.0), old - 1.0)
        left = math.floor(place)
        matrix[i, left] += 1 - (place - left)
        matrix[i, min(left + 1, old - 1)] += place - left
    return matrix


def resize(image: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """Resize the last two axes, bilinear or nearest, by a matrix on either side."""
    rows = interpolation(image.shape[-2], size[0], mode)
    columns = interpolation(image.shape[-1], size[1], mode)
    return rows @ image @ columns.T


def smooth(image: Tensor, sigma: float) -> Tensor:
    """Gaussian of `sigma` pixels, cut off at four of them, over an image whose border is repeated for ever."""
    if sigma == 0:
        return image
    reach = math.ceil(4 * sigma)
    weights = [math.exp(-(k**2) / (2 * sigma**2)) for k in range(-reach, reach + 1)]
    height, width = image.shape[-2:]
    result = torch.zeros_like(image)
    for row in range(height):
        for column in range(width):
            for dy, wy in zip(range(-reach, reach + 1), weights, strict=True):
                for dx, wx in zip(range(-reach, reach + 1), weights, strict=True):
                    y, x = min(max(row + dy, 0), height - 1), min(max(column + dx, 0), width - 1)
                    result[..., row, column] += wy * wx * image[..., y, x] / sum(weights) ** 2
    return result


# ---- layers -------------------------------------------------------------------------------------------------------


def layer_shapes(model: nn.Module, call: Callable[[nn.Module, Any], Tensor], x: Any) -> dict[str, tuple[tuple, ...]]:
    """Shapes of what each named layer returns, one for each call, in the order in which they end first."""
    shapes: dict[str, tuple[tuple, ...]] = {}
    handles = []

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, out: Any) -> None:
            first = out[0] if isinstance(out, tuple) else out
            shapes[name] = (*shapes.get(name, ()), tuple(first.shape))

        return record

    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_hook(hook(name)))
    with torch.no_grad():
        call(model, x)
    for handle in handles:
        handle.remove()
    return shapes
