"""Class activation maps: an activation's channels, weighted by what the model says of them.

All of them multiply an activation ``[batch channel ...]`` by weights for each channel, or each entry, and sum over
channels. They differ in the weights: from the gradient, from the score of the input behind a channel's mask, from the
score without the channel, or from the activation alone.

Token layers have no channels first and no positions. `tokens` says how they lie:

- `None`: ``[batch token channel]`` of an image ``[batch channel height width]`` is laid out on a grid with the aspect
  of the image; leading class and register tokens are left out. ``[batch height width channel]`` is told from
  ``[batch channel height width]`` by the aspect, where only the former fits (Swin);
- ``(rows, columns)``: the last ``rows * columns`` tokens are that grid;
- ``"channels_last"``: ``[batch ... channel]``; ``"channels_first"``: as it is;
- a function from the activation to ``[batch channel ...]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from pullback import maps
from pullback._batch import chunks, each, folded, repeated, unfolded
from pullback._call import (
    Inputs,
    Model,
    Params,
    Select,
    Target,
    activations,
    cotangent,
    public,
    pullback,
    run,
    score,
)
from pullback._random import Seed, normal
from pullback.gradients import gradient, guided_backprop, reduced
from pullback.noise import smooth_grad
from pullback.rules import Rules, table_of

Tokens: TypeAlias = "Literal['channels_first', 'channels_last'] | tuple[int, int] | Callable[[Tensor], Tensor] | None"
Method: TypeAlias = "Callable[..., Any]"


def gridded(activation: Tensor, x: Any, tokens: Tokens = None) -> Tensor:
    """Lay an activation out as ``[batch channel ...]``: see the head of this module."""
    image = isinstance(x, Tensor) and x.ndim == 4
    if callable(tokens):
        activation = tokens(activation)
    elif tokens == "channels_last" or (tokens is None and image and _is_channels_last(activation, x)):
        activation = activation.movedim(-1, 1)
    elif tokens is None and image and activation.ndim == 3:
        return maps.token_grid(activation, x)
    elif isinstance(tokens, tuple):
        rows, columns = tokens
        if activation.ndim != 3 or activation.shape[1] < rows * columns:
            raise ValueError(f"`tokens` asks for a {rows} x {columns} grid of an activation {list(activation.shape)}.")
        activation = activation[:, activation.shape[1] - rows * columns :].transpose(1, 2).unflatten(2, tokens)
    elif tokens not in (None, "channels_first"):
        raise ValueError(
            f"`tokens` must be None, (rows, columns), 'channels_first', 'channels_last' or a function, got {tokens!r}."
        )
    if activation.ndim < 3:
        raise ValueError(
            f"`layer` must have spatial axes, [batch channel ...], or tokens of an image; its activation is "
            f"{list(activation.shape)}."
        )
    return activation


def _is_channels_last(activation: Tensor, x: Tensor) -> bool:
    """Say whether only the first two axes of an example have the image's aspect, up to a pixel."""
    if activation.ndim != 4:
        return False

    def fits(height: int, width: int) -> bool:
        return abs(height * x.shape[3] - width * x.shape[2]) <= max(x.shape[2:])

    return fits(*activation.shape[1:3]) and not fits(*activation.shape[2:])


Weigh: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"


def _pulled(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    layer: str,
    at: str,
    tokens: Tokens,
    rules: Rules,
    output: Select,
    strict: bool,
    weigh: Weigh,
) -> Tensor:
    """Make a map of a layer's activation and gradient by `weigh`; the sum over calls of the layer."""

    def laid_out(activation: Tensor, gradient: Tensor) -> Tensor:
        return weigh(gridded(activation, x, tokens), gridded(gradient, x, tokens))

    pulled = pullback(params, model, x, layer=layer, at=at, output=output, table=table_of(rules), strict=strict)
    return reduced(pulled, cotangent(pulled.output, target), laid_out)


def over_positions(values: Tensor) -> Tensor:
    """Sum ``[batch channel ...]`` over positions, and keep the axes."""
    return values.sum(tuple(range(2, values.ndim)), keepdim=True)


@public
def grad_cam(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str,
    at: str = "output",
    tokens: Tokens = None,
    rules: Rules = None,
    output: Select = None,
    strict: bool = False,
) -> Tensor:
    r"""Weight a layer's channels by their mean gradient, and keep what speaks for the target.

    .. math:: m = \max\Big(0, \sum_c \Big(\tfrac{1}{|P|} \sum_{p \in P} \partial_{c p} f_t\Big) A_c\Big)

    with the activation A over positions P. Not normalised. Costs the forward and the backward from the output to the
    layer: for the last layer, little more than a forward, for any number of targets under `vmap`.

    Args:
        params, model, x, target, layer, at, rules, output, strict: See `gradient`. The layer's activation is
            ``[batch channel ...]`` with 1 to 3 spatial axes, or tokens of an image `x`. Calls of a reused layer are
            summed before the clamp.
        tokens: How token activations lie: see the head of this module. Leading class tokens are left out.

    Returns:
        Map ``[batch 1 ...]`` at the layer's resolution, not negative.

    Raises:
        ValueError: If the layer's activation has no spatial axes.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> params, x = params_of(model), torch.randn(2, 3, 6, 6)
        >>> cam = torch.einsum("c,bchw->bhw", model[3].weight[0], model[0](x)) / 16  # here it is CAM
        >>> torch.allclose(grad_cam(params, model, x, 0, layer="0")[:, 0], cam.clamp(min=0), atol=1e-6)
        True

    Reference:
        Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks, 2017, sec. 3.
    """

    def weigh(activation: Tensor, gradient: Tensor) -> Tensor:
        return maps.weighted_sum(activation, gradient.flatten(2).mean(2))

    return _pulled(params, model, x, target, layer, at, tokens, rules, output, strict, weigh).clamp(min=0)


@public
def linear_approx(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str,
    at: str = "output",
    tokens: Tokens = None,
    rules: Rules = None,
    output: Select = None,
    strict: bool = False,
) -> Tensor:
    r"""Multiply activation and gradient at each position, and sum over channels.

    .. math:: m_p = \sum_c A_{c p} \, \partial_{c p} f_t

    The score as the first-order approximation at the layer sees it, spread over positions. Costs 1 gradient at most.

    Args:
        params, model, x, target, layer, at, tokens, rules, output, strict: See `grad_cam`.

    Returns:
        Map ``[batch 1 ...]`` at the layer's resolution, signed, in units of the score.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2, bias=False))
        >>> params, x = params_of(model), torch.randn(2, 3, 6, 6)
        >>> m = linear_approx(params, model, x, 0, layer="0")
        >>> torch.allclose(m.sum((1, 2, 3)), model(x)[:, 0], atol=1e-5)  # linear above the layer
        True

    Reference:
        Kindermans, Schütt, Müller & Dähne, Investigating the Influence of Noise and Distractors, 2016, eq. 1.
    """
    return _pulled(params, model, x, target, layer, at, tokens, rules, output, strict, maps.weighted_sum)


@public
def hires_cam(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str,
    at: str = "output",
    tokens: Tokens = None,
    rules: Rules = None,
    output: Select = None,
    strict: bool = False,
) -> Tensor:
    r"""Keep where activation times gradient, summed over channels, speaks for the target.

    .. math:: m_p = \max\Big(0, \sum_c A_{c p} \, \partial_{c p} f_t\Big)

    The positive part of `linear_approx`; the paper leaves the clamp to the display. Unlike Grad-CAM it never shows
    where the model did not look. Costs 1 gradient at most.

    Args:
        params, model, x, target, layer, at, tokens, rules, output, strict: See `grad_cam`.

    Returns:
        Map ``[batch 1 ...]`` at the layer's resolution, not negative.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2, bias=False))
        >>> params, x = params_of(model), torch.randn(2, 3, 6, 6)
        >>> signed = linear_approx(params, model, x, 0, layer="0")
        >>> torch.equal(hires_cam(params, model, x, 0, layer="0"), signed.clamp(min=0))
        True

    Reference:
        Draelos & Carin, Use HiResCAM instead of Grad-CAM for Faithful Explanations, 2020, sec. 3.2.
    """
    return _pulled(params, model, x, target, layer, at, tokens, rules, output, strict, maps.weighted_sum).clamp(min=0)


@public
def elementwise_grad_cam(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str,
    at: str = "output",
    tokens: Tokens = None,
    rules: Rules = None,
    output: Select = None,
    strict: bool = False,
) -> Tensor:
    r"""Sum what speaks for the target entry by entry.

    .. math:: m_p = \sum_c \max(0, A_{c p} \, \partial_{c p} f_t)

    Costs 1 gradient at most.

    Args:
        params, model, x, target, layer, at, tokens, rules, output, strict: See `grad_cam`.

    Returns:
        Map ``[batch 1 ...]`` at the layer's resolution, not negative.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2, bias=False))
        >>> params, x = params_of(model), torch.randn(2, 3, 6, 6)
        >>> m = elementwise_grad_cam(params, model, x, 0, layer="0")
        >>> bool((m >= hires_cam(params, model, x, 0, layer="0") - 1e-6).all())
        True

    Reference:
        Gildenblat et al., PyTorch library for CAM methods, 2021 (GradCAMElementWise).
    """

    def weigh(activation: Tensor, gradient: Tensor) -> Tensor:
        return maps.channel_sum((activation * gradient).clamp(min=0))

    return _pulled(params, model, x, target, layer, at, tokens, rules, output, strict, weigh)


@public
def layer_cam(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str,
    at: str = "output",
    tokens: Tokens = None,
    rules: Rules = None,
    output: Select = None,
    strict: bool = False,
) -> Tensor:
    r"""Weight each entry of the activation by its gradient where that is positive.

    .. math:: m_p = \max\Big(0, \sum_c \max(0, \partial_{c p} f_t) \, A_{c p}\Big)

    Keeps its sense at shallow layers, where a channel's mean gradient says little; `fused_cam` joins several. Costs 1
    gradient at most.

    Args:
        params, model, x, target, layer, at, tokens, rules, output, strict: See `grad_cam`.

    Returns:
        Map ``[batch 1 ...]`` at the layer's resolution, not negative.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> params, x = params_of(model), torch.randn(2, 3, 6, 6)
        >>> m = layer_cam(params, model, x, 0, layer="0")
        >>> g = gradient(params, model, x, 0, layer="0").clamp(min=0)
        >>> torch.allclose(m, (g * model[0](x)).sum(1, keepdim=True).clamp(min=0), atol=1e-6)
        True

    Reference:
        Jiang et al., LayerCAM: Exploring Hierarchical Class Activation Maps for Localization, 2021, eq. 6.
    """

    def weigh(activation: Tensor, gradient: Tensor) -> Tensor:
        return maps.weighted_sum(activation, gradient.clamp(min=0))

    return _pulled(params, model, x, target, layer, at, tokens, rules, output, strict, weigh).clamp(min=0)


@public
def xgrad_cam(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str,
    at: str = "output",
    tokens: Tokens = None,
    rules: Rules = None,
    output: Select = None,
    strict: bool = False,
) -> Tensor:
    r"""Weight a layer's channels by their gradient, averaged over positions by the activation.

    .. math:: m = \max\Big(0, \sum_c \frac{\sum_p A_{c p} \partial_{c p} f_t}{\sum_p A_{c p}} A_c\Big)

    The weights by which the map's sum is nearest to that of activation times gradient. A channel whose activation sums
    to 0 gets no weight. Costs 1 gradient at most.

    Args:
        params, model, x, target, layer, at, tokens, rules, output, strict: See `grad_cam`.

    Returns:
        Map ``[batch 1 ...]`` at the layer's resolution, not negative.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> params, x = params_of(model), torch.randn(2, 3, 6, 6)
        >>> a = xgrad_cam(params, model, x, 0, layer="0")  # one gradient for all positions: Grad-CAM
        >>> torch.allclose(a, grad_cam(params, model, x, 0, layer="0"), atol=1e-4)
        True

    Reference:
        Fu et al., Axiom-based Grad-CAM, 2020, eq. 8.
    """

    def weigh(activation: Tensor, gradient: Tensor) -> Tensor:
        return maps.weighted_sum(
            activation, _ratio(over_positions(activation * gradient), over_positions(activation)).flatten(1)
        )

    return _pulled(params, model, x, target, layer, at, tokens, rules, output, strict, weigh).clamp(min=0)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """Divide, 0 where the divisor is 0."""
    return torch.where(b == 0, torch.zeros_like(a), a / torch.where(b == 0, torch.ones_like(b), b))


def _plus_plus(activation: Tensor, first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """Give Grad-CAM++'s weights ``[batch channel]`` from three derivatives of the score."""
    alpha = _ratio(second, 2 * second + third * over_positions(activation))
    return over_positions(alpha * first.clamp(min=0)).flatten(1)


@public
def grad_cam_plus_plus(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str,
    at: str = "output",
    tokens: Tokens = None,
    rules: Rules = None,
    output: Select = None,
    strict: bool = False,
) -> Tensor:
    r"""Weight a layer's channels by their positive gradients, each position by its share in the score.

    .. math:: m = \max\Big(0, \sum_c w_c A_c\Big), \quad w_c = \sum_p \alpha_{c p} \max(0, g_{c p}), \quad
              \alpha_{c p} = \frac{g_{c p}^2}{2 g_{c p}^2 + g_{c p}^3 \sum_q A_{c q}}, \quad g = \partial f_t

    The higher derivatives are those of :math:`e^{f_t}` for a network that is piecewise linear; the factor
    :math:`e^{f_t}` that all weights share is left out. Several places of one object get equal weight. Where the
    denominator is 0, so is alpha. Costs 1 gradient at most.

    Args:
        params, model, x, target, layer, at, tokens, rules, output, strict: See `grad_cam`.

    Returns:
        Map ``[batch 1 ...]`` at the layer's resolution, not negative.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> params, x = params_of(model), torch.randn(2, 3, 6, 6)
        >>> a = grad_cam_plus_plus(params, model, 3 * x, 0, layer="0")
        >>> bool((a >= 0).all())
        True

    Reference:
        Chattopadhyay et al., Grad-CAM++: Improved Visual Explanations for Deep Convolutional Networks, 2018, eq. 19.
    """

    def weigh(activation: Tensor, g: Tensor) -> Tensor:
        return maps.weighted_sum(activation, _plus_plus(activation, g, g**2, g**3))

    return _pulled(params, model, x, target, layer, at, tokens, rules, output, strict, weigh).clamp(min=0)


def _activation(params: Params, model: Model, x: Inputs, layer: str, at: str) -> Tensor:
    """Read a layer's activation; the sum over calls."""
    calls = activations(params, model, x, layer, at)
    return sum(calls[1:], calls[0])


@public
def smooth_grad_cam_plus_plus(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str,
    at: str = "output",
    tokens: Tokens = None,
    samples: int = 25,
    noise: float = 0.15,
    absolute: bool = False,
    seed: Seed = 0,
    chunk_size: int | None = None,
    rules: Rules = None,
    output: Select = None,
    strict: bool = False,
) -> Tensor:
    r"""Weight channels as Grad-CAM++ does, by derivatives averaged over noisy inputs.

    .. math:: w_c = \sum_p \alpha_{c p} \max(0, \bar g_{c p}), \quad
              \alpha_{c p} = \frac{\overline{g_{c p}^2}}{2 \overline{g_{c p}^2} + \overline{g_{c p}^3} \sum_q A_{c q}}

    with the mean over samples and the activation A of the input itself. The paper prints the first derivative in the
    numerator of alpha; that is taken for a slip, as torchcam does. Costs `samples` gradients at most, and a forward.

    Args:
        params, model, x, target, layer, at, tokens, rules, output, strict: See `grad_cam`.
        samples, noise, absolute, seed, chunk_size: See `smooth_grad`.

    Returns:
        Map ``[batch 1 ...]`` at the layer's resolution, not negative.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> params, x = params_of(model), torch.randn(2, 3, 6, 6)
        >>> a = smooth_grad_cam_plus_plus(params, model, x, 0, layer="0", noise=0.0, samples=2)
        >>> torch.allclose(a, grad_cam_plus_plus(params, model, x, 0, layer="0"), atol=1e-6)
        True

    Reference:
        Omeiza, Speakman, Cintas & Weldemariam, Smooth Grad-CAM++, 2019, sec. 3.
    """

    def powers(params: Params, model: Model, x: Inputs, target: Target) -> tuple[Tensor, ...]:
        g = gradient(params, model, x, target, layer=layer, at=at, rules=rules, output=output, strict=strict)
        g = gridded(g, x, tokens)
        return g, g**2, g**3

    sampling: dict[str, Any] = {"samples": samples, "noise": noise, "absolute": absolute, "seed": seed}
    derivatives = smooth_grad(params, model, x, target, method=powers, **sampling, chunk_size=chunk_size)
    activation = gridded(_activation(params, model, x, layer, at), x, tokens)
    return maps.weighted_sum(activation, _plus_plus(activation, *derivatives)).clamp(min=0)


# -- without a gradient


@public
def cam(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str,
    head: str,
    at: str = "output",
    tokens: Tokens = None,
    output: Select = None,
    strict: bool = False,
) -> Tensor:
    r"""Weight a layer's channels by the target's weights in the linear layer after global pooling.

    .. math:: m = \sum_c W_{t c} A_c

    The first class activation map, for networks that end in global average pooling and one linear layer. Elsewhere use
    Grad-CAM, which is its clamped mean here. Costs 1 forward, for any number of targets.

    Args:
        params, model, x, target, layer, at, tokens, output, strict: See `grad_cam`.
        head: Name of the linear layer, or of a convolution with a 1 x 1 window, that gives the output.

    Returns:
        Map ``[batch 1 ...]`` at the layer's resolution, signed.

    Raises:
        ValueError: If `head` has no weight, or one that does not fit output and layer.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4, 2, bias=False))
        >>> params, x = params_of(model), torch.randn(2, 3, 6, 6)
        >>> m = cam(params, model, x, 0, layer="0", head="3")
        >>> torch.allclose(m.mean((1, 2, 3)), model(x)[:, 0], atol=1e-6)
        True

    Reference:
        Zhou, Khosla, Lapedriza, Oliva & Torralba, Learning Deep Features for Discriminative Localization, 2016, eq. 2.
    """
    pulled = pullback(params, model, x, layer=layer, at=at, output=output, strict=strict)
    activation = gridded(pulled.activations[-1], x, tokens)
    weight = _weight_of(params, model, head)
    hot = cotangent(pulled.output, target)
    if hot.ndim != 2 or weight.shape != (hot.shape[1], activation.shape[1]):
        raise ValueError(
            f"`head` names `{head}`, whose weight {list(weight.shape)} does not lead from the layer's "
            f"{activation.shape[1]} channels to the output {list(hot.shape)}."
        )
    return maps.weighted_sum(activation, hot @ weight)


def _weight_of(params: Params, model: Model, head: str) -> Tensor:
    """Find a layer's weight, ``[class channel]``: in `params`, or else in the model."""
    for part in params if isinstance(params, tuple) else (params,):
        if f"{head}.weight" in part:
            return part[f"{head}.weight"].flatten(1)
    found = dict(model.named_modules()).get(head) if isinstance(model, nn.Module) else None
    weight = getattr(found, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"`head` must name a linear layer, got `{head}`, which has no weight in the model.")
    return weight.detach().flatten(1)


@public
def eigen_cam(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str,
    at: str = "output",
    tokens: Tokens = None,
    output: Select = None,
    strict: bool = False,
) -> Tensor:
    r"""Project a layer's activation onto its first principal component.

    .. math:: m_p = \sum_c V_{c 1} (A_{c p} - \bar A_c)

    It shows what stands out in the image, whatever the target, which is checked and otherwise without effect. The sign,
    which a principal component has not, is such that the entry with the largest absolute value is positive. The paper
    does not say whether means over positions are taken off; they are. Costs 1 forward.

    Args:
        params, model, x, target, layer, at, tokens, output, strict: See `grad_cam`.

    Returns:
        Map ``[batch 1 ...]`` at the layer's resolution, signed, with mean 0.

    Example:
        >>> model, x = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten()), torch.randn(2, 3, 6, 6)
        >>> m = eigen_cam(params_of(model), model, x, 0, layer="0")
        >>> s = torch.linalg.svdvals((model[0](x) - model[0](x).mean((2, 3), keepdim=True)).flatten(2))
        >>> torch.allclose(m.flatten(1).norm(dim=1), s[:, 0], atol=1e-4)
        True

    Reference:
        Muhammad & Yeasin, Eigen-CAM: Class Activation Map Using Principal Components, 2020, sec. III.
    """
    pulled = pullback(params, model, x, layer=layer, at=at, output=output, strict=strict)
    whole = pulled.rebuild([principal(gridded(a, x, tokens)) for a in pulled.activations])
    nothing = 0 * score(pulled.output, target)  # NaN for a target that is no class
    return whole + nothing.reshape(-1, *[1] * (whole.ndim - 1))


@public
def eigen_grad_cam(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str,
    at: str = "output",
    tokens: Tokens = None,
    rules: Rules = None,
    output: Select = None,
    strict: bool = False,
) -> Tensor:
    r"""Project activation times gradient onto its first principal component.

    .. math:: m_p = \sum_c V_{c 1} (B_{c p} - \bar B_c), \quad B = A \odot \partial f_t

    As `eigen_cam`, with the target's say. Costs 1 gradient at most.

    Args:
        params, model, x, target, layer, at, tokens, rules, output, strict: See `grad_cam`.

    Returns:
        Map ``[batch 1 ...]`` at the layer's resolution, signed, with mean 0.

    Example:
        >>> model, x = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten()), torch.randn(2, 3, 6, 6)
        >>> m = eigen_grad_cam(params_of(model), model, x, 0, layer="0")
        >>> torch.allclose(m.mean(), torch.zeros(()), atol=1e-5)
        True

    Reference:
        Gildenblat et al., PyTorch library for CAM methods, 2021 (EigenGradCAM).
    """

    def weigh(activation: Tensor, gradient: Tensor) -> Tensor:
        return principal(activation * gradient)

    return _pulled(params, model, x, target, layer, at, tokens, rules, output, strict, weigh)


def principal(features: Tensor) -> Tensor:
    """Project ``[batch channel ...]`` onto its first principal component over positions, ``[batch 1 ...]``."""
    centred = features.flatten(2) - features.flatten(2).mean(2, keepdim=True)
    wide = centred.to(torch.promote_types(centred.dtype, torch.float32))
    swapped = wide.shape[1] > wide.shape[2]  # the smaller of the two matrices has the same eigenvalues
    gram = wide.mT @ wide if swapped else wide @ wide.mT
    axis = _leading(gram)
    line = axis.unsqueeze(1)
    map = line * (wide @ axis.unsqueeze(2)).norm(dim=1, keepdim=True) if swapped else line @ wide
    peak = map.gather(2, map.abs().argmax(2, keepdim=True))
    return (map * peak.detach().sign()).to(features.dtype).unflatten(2, features.shape[2:])


def _leading(symmetric: Tensor) -> Tensor:
    """Give the unit eigenvector of the largest eigenvalue, ``[batch n n]`` to ``[batch n]``.

    Torch's derivative of eigenvectors needs all eigenvalues apart. Two of Newton's steps on ``S v = l v, v.v = 1``,
    from the solution itself, change nothing but carry the derivatives up to the third order.
    """
    values, vectors = torch.linalg.eigh(symmetric.detach().nan_to_num())  # NaN comes back in by the products
    value, vector = values[:, -1:], vectors[:, :, -1]
    size = torch.eye(symmetric.shape[-1], dtype=symmetric.dtype, device=symmetric.device)
    flat = (value <= 0).unsqueeze(2)  # no variance at all
    symmetric = torch.where(flat, size * torch.arange(len(size), device=size.device), symmetric)
    value, vector = torch.where(flat[:, 0], value + len(size) - 1, value), torch.where(flat[:, 0], size[-1], vector)
    for _ in range(2):
        residue = (symmetric @ vector.unsqueeze(2)).squeeze(2) - value * vector
        length = (1 - vector.square().sum(1, keepdim=True)) / 2
        top = torch.cat([symmetric - value.unsqueeze(2) * size, -vector.unsqueeze(2)], 2)
        bottom = torch.cat([vector.unsqueeze(1), torch.zeros_like(value).unsqueeze(2)], 2)
        step = torch.linalg.solve(torch.cat([top, bottom], 1), torch.cat([-residue, length], 1))
        vector, value = vector + step[:, :-1], value + step[:, -1:]
    return vector


# -- by forwards alone


def _scores_of(
    batch: int,
    target: Target,
    count: int,
    chunk_size: int | None,
    scored: Callable[[Sequence[int], Target], Tensor],
) -> Tensor:
    """Score variations of the model or its input, `chunk_size` at a time, ``[variation batch]``.

    `scored(indices, target)` gives scores ``[(variation batch)]`` for the target of each copy.
    """
    parts = []
    for part in chunks(count, chunk_size):
        parts.append(unfolded(scored(part, repeated(target, len(part), batch)), len(part)))
    return torch.cat(parts)


def _channel_masks(activation: Tensor, x: Tensor) -> Tensor:
    """Scale each channel to [0, 1] and to the size of `x`, ``[batch channel ...]``."""
    flat = activation.flatten(0, 1).unsqueeze(1)
    masks = maps.normalise(maps.resize(flat, x.shape[2:]) if flat.shape[2:] != x.shape[2:] else flat)
    return masks.squeeze(1).unflatten(0, activation.shape[:2])


def _scored_masks(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    layer: str,
    at: str,
    tokens: Tokens,
    output: Select,
    samples: int,
    chunk_size: int | None,
    vary: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Weight channels by the softmax of the mean score of the input behind variations of their masks.

    `vary(x, masks, sample)` gives inputs ``[variation batch ...]`` for masks ``[variation batch 1 ...]`` and sample
    indices ``[variation]``.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"`x` must be one tensor, which masks can cover, got {type(x).__name__}.")
    if samples < 1:
        raise ValueError(f"`samples` must be at least 1, got {samples}.")
    activation = gridded(_activation(params, model, x, layer, at), x, tokens)
    if activation.ndim != x.ndim:
        raise ValueError(
            f"`layer` must have the spatial axes of `x`, {list(x.shape)}, to mask it; its activation is "
            f"{list(activation.shape)}."
        )

    def scored(indices: Sequence[int], targets: Target) -> Tensor:
        index = torch.tensor(list(indices), device=x.device)
        masks = _channel_masks(activation[:, index // samples], x).movedim(1, 0).unsqueeze(2)
        return score(run(params, model, folded(vary(x, masks, index % samples)), output=output), targets)

    scores = _scores_of(x.shape[0], target, activation.shape[1] * samples, chunk_size, scored)
    weights = scores.unflatten(0, (-1, samples)).mean(1).softmax(0)
    return maps.weighted_sum(activation, weights.mT).clamp(min=0)


@public
def score_cam(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str,
    at: str = "output",
    tokens: Tokens = None,
    chunk_size: int | None = 32,
    output: Select = None,
    strict: bool = False,
) -> Tensor:
    r"""Weight a layer's channels by the score of the input as each of them masks it.

    .. math:: m = \max\Big(0, \sum_c w_c A_c\Big), \quad
              w = \operatorname{softmax}_c f_t(x \odot \operatorname{norm}(A_c))

    with each channel scaled to the input's size, then to [0, 1]. The paper takes off the score of a baseline, which the
    softmax does not see. No gradient, but as many forwards as the layer has channels; all targets share them under
    `vmap`.

    Args:
        params, model, x, target, layer, at, tokens, output, strict: See `grad_cam`; `x` is one tensor.
        chunk_size: Masks scored together; `None` means all.

    Returns:
        Map ``[batch 1 ...]`` at the layer's resolution, not negative.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 1, 3), nn.Flatten(), nn.Linear(16, 2))
        >>> params, x = params_of(model), torch.randn(2, 3, 6, 6)
        >>> m = score_cam(params, model, x, 0, layer="0")  # a single channel has all the weight
        >>> torch.allclose(m, model[0](x).clamp(min=0), atol=1e-6)
        True

    Reference:
        Wang et al., Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks, 2020, alg. 1.
    """

    def vary(x: Tensor, masks: Tensor, sample: Tensor) -> Tensor:
        return masks * x

    return _scored_masks(params, model, x, target, layer, at, tokens, output, 1, chunk_size, vary)


@public
def ss_cam(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str,
    at: str = "output",
    tokens: Tokens = None,
    samples: int = 10,
    noise: float = 2.0,
    place: Literal["mask", "input"] = "mask",
    seed: Seed = 0,
    chunk_size: int | None = 32,
    output: Select = None,
    strict: bool = False,
) -> Tensor:
    r"""Weight a layer's channels as Score-CAM does, by the mean score over noisy masks.

    .. math:: w = \operatorname{softmax}_c \tfrac{1}{n} \sum_s f_t\big(x \odot (\operatorname{norm}(A_c) + \sigma
              \epsilon_s)\big)

    The paper's other form adds the noise to the masked input: ``place="input"``. All channels see the same noise. Costs
    as many forwards as the layer has channels, times `samples`.

    Args:
        params, model, x, target, layer, at, tokens, chunk_size, output, strict: See `score_cam`.
        samples: Noisy masks a channel.
        noise: Standard deviation, in units of the mask, or of the input.
        place: ``"mask"`` or ``"input"``.
        seed: See `smooth_grad`.

    Returns:
        Map ``[batch 1 ...]`` at the layer's resolution, not negative.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2))
        >>> params, x = params_of(model), torch.randn(2, 3, 6, 6)
        >>> m = ss_cam(params, model, x, 0, layer="0", noise=0.0)
        >>> torch.allclose(m, score_cam(params, model, x, 0, layer="0"), atol=1e-5)
        True

    Reference:
        Wang, Naidu, Michael & Kundu, SS-CAM: Smoothed Score-CAM for Sharper Visual Feature Localization, 2020, sec. 3.
    """
    if place not in ("mask", "input"):
        raise ValueError(f"`place` must be 'mask' or 'input', got {place!r}.")

    def vary(x: Tensor, masks: Tensor, sample: Tensor) -> Tensor:
        if place == "mask":
            return (masks + noise * normal(seed, sample, masks.shape[2:], masks.dtype).unsqueeze(1)) * x
        covered = masks * x
        return covered + noise * normal(seed, sample, covered.shape[2:], covered.dtype).unsqueeze(1)

    return _scored_masks(params, model, x, target, layer, at, tokens, output, samples, chunk_size, vary)


@public
def is_cam(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str,
    at: str = "output",
    tokens: Tokens = None,
    samples: int = 10,
    chunk_size: int | None = 32,
    output: Select = None,
    strict: bool = False,
) -> Tensor:
    r"""Weight a layer's channels as Score-CAM does, by the mean score over masks of growing strength.

    .. math:: w = \operatorname{softmax}_c \tfrac{1}{n} \sum_{i=1}^n
              f_t\Big(\sum_{j=1}^i \tfrac{j}{n} \, x \odot \operatorname{norm}(A_c)\Big)

    The steps add up, as in the paper, so that late masks exceed 1. Costs as many forwards as the layer has channels,
    times `samples`.

    Args:
        params, model, x, target, layer, at, tokens, chunk_size, output, strict: See `score_cam`.
        samples: Strengths of each mask.

    Returns:
        Map ``[batch 1 ...]`` at the layer's resolution, not negative.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2))
        >>> params, x = params_of(model), torch.randn(2, 3, 6, 6)
        >>> m = is_cam(params, model, x, 0, layer="0", samples=1)  # one strength, which is 1
        >>> torch.allclose(m, score_cam(params, model, x, 0, layer="0"), atol=1e-5)
        True

    Reference:
        Naidu, Ghosh, Maurya, Nayak & Kundu, IS-CAM: Integrated Score-CAM for Axiomatic-based Explanations, 2020.
    """

    def vary(x: Tensor, masks: Tensor, sample: Tensor) -> Tensor:
        strength = ((sample + 1) * (sample + 2) / (2 * samples)).to(masks.dtype)
        return strength.reshape(-1, *[1] * (masks.ndim - 1)) * masks * x

    return _scored_masks(params, model, x, target, layer, at, tokens, output, samples, chunk_size, vary)


@public
def ablation_cam(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str,
    at: str = "output",
    tokens: Tokens = None,
    chunk_size: int | None = 32,
    rules: Rules = None,
    output: Select = None,
    strict: bool = False,
) -> Tensor:
    r"""Weight a layer's channels by how much the score falls without them.

    .. math:: m = \max\Big(0, \sum_c \frac{f_t(A) - f_t(A \text{ without } A_c)}{f_t(A)} A_c\Big)

    The divisor is the score of the input, which turns the sign where that is negative; a score of 0 gives no weight.
    As many forwards as the layer has channels, and one; all targets share them under `vmap`.

    Args:
        params, model, x, target, layer, at, tokens, rules, output, strict: See `grad_cam`.
        chunk_size: Channels left out together; `None` means all.

    Returns:
        Map ``[batch 1 ...]`` at the layer's resolution, not negative.

    Raises:
        ValueError: If the layer is called several times.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4, 2, bias=False))
        >>> params, x = params_of(model), torch.randn(2, 3, 6, 6)
        >>> share = model[0](x).mean((2, 3)) * model[3].weight[0] / model(x)[:, :1]  # of each channel in the score
        >>> m = torch.einsum("bc,bchw->bhw", share, model[0](x)).clamp(min=0)
        >>> torch.allclose(ablation_cam(params, model, x, 0, layer="0")[:, 0], m, atol=1e-4)
        True

    Reference:
        Desai & Ramaswamy, Ablation-CAM: Visual Explanations for Deep Convolutional Network via Gradient-free
        Localization, 2020, eq. 3.
    """
    whole = pullback(params, model, x, layer=layer, at=at, output=output, table=table_of(rules), strict=strict)
    activation, *more = whole.activations
    if more:
        raise ValueError(f"`layer` names `{layer}`, called {1 + len(more)} times: choose a call, such as `{layer}#0`.")
    laid_out, batch = gridded(activation, x, tokens), activation.shape[0]
    axis = 1 if laid_out is activation else activation.ndim - 1  # tokens have their channels last

    def scored(indices: Sequence[int], targets: Target) -> Tensor:
        index = torch.tensor(list(indices), device=activation.device)
        kept = (torch.arange(activation.shape[axis], device=index.device) != index[:, None]).to(activation.dtype)
        kept = kept.reshape(len(index), 1, *[-1 if k == axis else 1 for k in range(1, activation.ndim)])
        given = [folded(kept * activation)]
        copies = each(lambda v: repeated(v, len(index), batch), x)
        pulled = pullback(params, model, copies, layer=layer, at=at, output=output, table=table_of(rules), given=given)
        return score(pulled.output, targets)

    without = _scores_of(batch, target, laid_out.shape[1], chunk_size, scored)
    before = score(whole.output, target)
    weights = _ratio(before - without, before.expand_as(without))
    return maps.weighted_sum(laid_out, weights.mT).clamp(min=0)


# -- methods over methods


@public
def finer_cam(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    method: Method = grad_cam,
    others: int = 3,
    strength: float = 1.0,
    output: Select = None,
    strict: bool = False,
    **options: Any,
) -> Any:
    r"""Explain what sets the target apart from the classes that score most like it.

    .. math:: f_t - \frac{\lambda}{n} \sum_{d} f_d

    takes the place of the score, with the n classes d whose scores are nearest to that of the target. Costs a forward
    and what `method` costs.

    Args:
        params, model, x, target, output, strict: See `gradient`; `target` is an index.
        method: Any method ``method(params, model, x, target, **options)``.
        others: How many classes to compare with.
        strength: Their share, lambda.
        **options: Passed to `method`, such as `layer`.

    Returns:
        What `method` returns.

    Raises:
        ValueError: If the output has not so many classes, or `target` is not an index.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> params, x = params_of(model), torch.randn(4, 3)
        >>> a = finer_cam(params, model, x, 0, method=gradient, others=1)
        >>> torch.allclose(a, (model.weight[0] - model.weight[1]).expand(4, 3))
        True

    Reference:
        Zhang, Gu, Chowdhury, Mai, Carlyn, Berger-Wolf, Su & Chao, Finer-CAM, 2025, sec. 3.2.
    """
    found = run(params, model, x, output=output)
    hot = cotangent(found, target)
    if found.ndim != 2 or callable(target) or not 1 <= others < found.shape[1]:
        raise ValueError(
            "`others` must lie in 1 ... classes - 1 of an output [batch class], and `target` be an index; got "
            f"{others} for {list(found.shape)}."
        )
    distance = (found - (hot * found).sum(1, keepdim=True)).abs() + torch.where(hot == 1, torch.inf, 0.0)
    near = torch.zeros_like(found).scatter(1, distance.detach().argsort(dim=1)[:, :others], 1.0)
    difference = hot - strength / others * near
    return method(params, model, x, difference, output=output, strict=strict, **options)


@public
def fused_cam(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layers: Sequence[str],
    method: Method = layer_cam,
    scale: float = 2.0,
    output: Select = None,
    strict: bool = False,
    **options: Any,
) -> Tensor:
    r"""Join the maps of several layers by their maximum.

    .. math:: m = \max_l \tanh\Big(\gamma \frac{m_l}{\max m_l}\Big)

    each resized to the finest of them. The squashing lets deep layers, whose maps are smooth, not drown the shallow.
    Costs what `method` costs, a layer.

    Args:
        params, model, x, target, output, strict: See `gradient`.
        layers: Names of the layers.
        method: Any method that takes `layer` and returns a map that is not negative.
        scale: The factor, gamma.
        **options: Passed to `method`.

    Returns:
        Map ``[batch 1 ...]`` at the finest layer's resolution, in [0, 1].

    Raises:
        ValueError: If `layers` is empty.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 2))
        >>> params, x = params_of(model), torch.randn(2, 3, 6, 6)
        >>> m = fused_cam(params, model, x, 0, layers=["0", "1"])
        >>> bool((m <= torch.tanh(torch.tensor(2.0))).all())
        True

    Reference:
        Jiang et al., LayerCAM: Exploring Hierarchical Class Activation Maps for Localization, 2021, sec. III-C.
    """
    stack = _maps_at(layers, method, params, model, x, target, output=output, strict=strict, **options)
    peak = stack.amax(tuple(range(2, stack.ndim)), keepdim=True)
    return torch.tanh(scale * _ratio(stack, peak.expand_as(stack))).amax(0)


@public
def refine_cam(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layers: Sequence[str],
    method: Method = layer_cam,
    output: Select = None,
    strict: bool = False,
    **options: Any,
) -> Tensor:
    r"""Join the maps of several layers by their product: fine detail from shallow layers where deep layers agree.

    .. math:: m = \prod_l \operatorname{norm}(m_l)

    each scaled to [0, 1] and resized to the finest of them. Costs what `method` costs, a layer.

    Args:
        params, model, x, target, layers, method, output, strict, **options: See `fused_cam`.

    Returns:
        Map ``[batch 1 ...]`` at the finest layer's resolution, in [0, 1].

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 2))
        >>> params, x = params_of(model), torch.randn(2, 3, 6, 6)
        >>> one = refine_cam(params, model, x, 0, layers=["0"])
        >>> bool((refine_cam(params, model, x, 0, layers=["0", "1"]) <= one).all())
        True

    Reference:
        How to Evaluate and Refine your CAM, 2026, sec. 5.
    """
    stack = _maps_at(layers, method, params, model, x, target, output=output, strict=strict, **options)
    return maps.normalise(stack.flatten(0, 1)).unflatten(0, stack.shape[:2]).prod(0)


def _maps_at(layers: Sequence[str], method: Method, *args: Any, **options: Any) -> Tensor:
    """Give a method's maps at several layers, resized to the finest, ``[layer batch 1 ...]``."""
    if isinstance(layers, str) or not layers:
        raise ValueError(f"`layers` must be a list of names, got {layers!r}.")
    found = [method(*args, layer=layer, **options) for layer in layers]
    finest = found[0]
    for map in found:
        finest = map if map[0].numel() > finest[0].numel() else finest
    size = finest.shape[2:]
    return torch.stack([map if map.shape[2:] == size else maps.resize(map, size) for map in found])


@public
def guided_grad_cam(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str,
    at: str = "output",
    tokens: Tokens = None,
    method: Method = guided_backprop,
    map_method: Method = grad_cam,
    resize_mode: str = "bilinear",
    output: Select = None,
    strict: bool = False,
) -> Tensor:
    r"""Multiply guided backprop by Grad-CAM: fine detail where the class is.

    .. math:: a = G(x) \odot \operatorname{resize}(m)

    Costs 2 gradients. The detail is guided backprop's, which changes little when weights are randomised.

    Args:
        params, model, x, target, layer, at, tokens, output, strict: See `grad_cam`; `x` is one tensor.
        method: Any attribution shaped like `x`.
        map_method: Any method that takes `layer` and returns a map.
        resize_mode: How the map grows to the size of `x`: see `pullback.maps.resize`.

    Returns:
        Attribution, shaped like `x`, signed as that of `method` is.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        >>> params, x = params_of(model), torch.randn(2, 3, 6, 6)
        >>> a = guided_grad_cam(params, model, x, 0, layer="1")
        >>> torch.equal(a, guided_backprop(params, model, x, 0) * grad_cam(params, model, x, 0, layer="1"))
        True

    Reference:
        Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks, 2017, sec. 3.2.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"`x` must be one tensor, got {type(x).__name__}.")
    fine = method(params, model, x, target, output=output, strict=strict)
    map = map_method(params, model, x, target, layer=layer, at=at, tokens=tokens, output=output, strict=strict)
    return fine * (map if map.shape[2:] == x.shape[2:] else maps.resize(map, x.shape[2:], resize_mode))
