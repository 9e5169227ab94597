"""Weights from the gradient: one pullback to the layer, then a sum over channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

from pullback import maps
from pullback._core.call import Call
from pullback._core.entry import method
from pullback._core.types import ChunkSize, Inputs, Layer, Model, Output, Params, Progress, Target
from pullback._torch.random import Seed
from pullback.attribution.cam._channels import Tokens, gridded, over_positions, ratio, read_channels
from pullback.attribution.gradients import gradient, reduced
from pullback.attribution.smooth_grad import smooth_grad
from pullback.rules._table import Rules, table_of

Weigh: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"


def pulled_map(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    layer: str | Layer,
    tokens: Tokens,
    rules: Rules,
    output: Output,
    weigh: Weigh,
) -> Tensor:
    """Make a map of a layer's activation and gradient by `weigh`; the sum over calls of the layer."""

    def laid_out(activation: Tensor, gradient: Tensor) -> Tensor:
        return weigh(gridded(activation, x, tokens), gridded(gradient, x, tokens))

    call = Call.bind(params, model, x, layer, table_of(rules), output)
    return reduced(call, call.pullback(), target, laid_out)


@method("cam", "map", "positions at the layer", mechanism="own")
def grad_cam(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str | Layer,
    tokens: Tokens = None,
    rules: Rules = None,
    output: Output = None,
) -> Tensor:
    r"""Weight a layer's channels by their mean gradient, and keep what speaks for the target.

    .. math:: m = \max\Big(0, \sum_c \Big(\tfrac{1}{|P|} \sum_{p \in P} \partial_{c p} f_t\Big) A_c\Big)

    with the activation A over positions P. Not normalised. Costs the forward and the backward from the output to the
    layer: for the last layer, little more than a forward, for any number of targets under `vmap`.

    Args:
        params, model, x, target, layer, rules, output: See `gradient`. The layer's activation is
            ``[batch channel ...]`` with 1 to 3 spatial axes, or tokens of an image `x`. Calls of a reused layer are
            summed before the clamp.
        tokens: How token activations lie: see the head of `pullback.cam`. Leading class tokens are left out.

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

    return pulled_map(params, model, x, target, layer, tokens, rules, output, weigh).clamp(min=0)


@method("cam", "map", "positions at the layer", mechanism="formula")
def linear_approx(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str | Layer,
    tokens: Tokens = None,
    rules: Rules = None,
    output: Output = None,
) -> Tensor:
    r"""Multiply activation and gradient at each position, and sum over channels.

    .. math:: m_p = \sum_c A_{c p} \, \partial_{c p} f_t

    The score as the first-order approximation at the layer sees it, spread over positions. Costs 1 gradient at most.

    Args:
        params, model, x, target, layer, tokens, rules, output: See `grad_cam`.

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
    return pulled_map(params, model, x, target, layer, tokens, rules, output, maps.weighted_sum)


@method("cam", "map", "positions at the layer", mechanism="formula")
def hires_cam(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str | Layer,
    tokens: Tokens = None,
    rules: Rules = None,
    output: Output = None,
) -> Tensor:
    r"""Keep where activation times gradient, summed over channels, speaks for the target.

    .. math:: m_p = \max\Big(0, \sum_c A_{c p} \, \partial_{c p} f_t\Big)

    The positive part of `linear_approx`; the paper leaves the clamp to the display. Unlike Grad-CAM it never shows
    where the model did not look. Costs 1 gradient at most.

    Args:
        params, model, x, target, layer, tokens, rules, output: See `grad_cam`.

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
    return pulled_map(params, model, x, target, layer, tokens, rules, output, maps.weighted_sum).clamp(min=0)


@method("cam", "map", "positions at the layer", mechanism="formula")
def elementwise_grad_cam(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str | Layer,
    tokens: Tokens = None,
    rules: Rules = None,
    output: Output = None,
) -> Tensor:
    r"""Sum what speaks for the target entry by entry.

    .. math:: m_p = \sum_c \max(0, A_{c p} \, \partial_{c p} f_t)

    Costs 1 gradient at most.

    Args:
        params, model, x, target, layer, tokens, rules, output: See `grad_cam`.

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

    return pulled_map(params, model, x, target, layer, tokens, rules, output, weigh)


@method("cam", "map", "positions at the layer", mechanism="formula")
def layer_cam(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str | Layer,
    tokens: Tokens = None,
    rules: Rules = None,
    output: Output = None,
) -> Tensor:
    r"""Weight each entry of the activation by its gradient where that is positive.

    .. math:: m_p = \max\Big(0, \sum_c \max(0, \partial_{c p} f_t) \, A_{c p}\Big)

    Keeps its sense at shallow layers, where a channel's mean gradient says little; `fused_cam` joins several. Costs 1
    gradient at most.

    Args:
        params, model, x, target, layer, tokens, rules, output: See `grad_cam`.

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

    return pulled_map(params, model, x, target, layer, tokens, rules, output, weigh).clamp(min=0)


@method("cam", "map", "positions at the layer", mechanism="formula")
def xgrad_cam(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str | Layer,
    tokens: Tokens = None,
    rules: Rules = None,
    output: Output = None,
) -> Tensor:
    r"""Weight a layer's channels by their gradient, averaged over positions by the activation.

    .. math:: m = \max\Big(0, \sum_c \frac{\sum_p A_{c p} \partial_{c p} f_t}{\sum_p A_{c p}} A_c\Big)

    The weights by which the map's sum is nearest to that of activation times gradient. A channel whose activation sums
    to 0 gets no weight. Costs 1 gradient at most.

    Args:
        params, model, x, target, layer, tokens, rules, output: See `grad_cam`.

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
            activation, ratio(over_positions(activation * gradient), over_positions(activation)).flatten(1)
        )

    return pulled_map(params, model, x, target, layer, tokens, rules, output, weigh).clamp(min=0)


def _plus_plus(activation: Tensor, first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """Give Grad-CAM++'s weights ``[batch channel]`` from three derivatives of the score."""
    alpha = ratio(second, 2 * second + third * over_positions(activation))
    return over_positions(alpha * first.clamp(min=0)).flatten(1)


@method("cam", "map", "positions at the layer", mechanism="formula")
def grad_cam_plus_plus(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str | Layer,
    tokens: Tokens = None,
    rules: Rules = None,
    output: Output = None,
) -> Tensor:
    r"""Weight a layer's channels by their positive gradients, each position by its share in the score.

    .. math:: m = \max\Big(0, \sum_c w_c A_c\Big), \quad w_c = \sum_p \alpha_{c p} \max(0, g_{c p}), \quad
              \alpha_{c p} = \frac{g_{c p}^2}{2 g_{c p}^2 + g_{c p}^3 \sum_q A_{c q}}, \quad g = \partial f_t

    The higher derivatives are those of :math:`e^{f_t}` for a network that is piecewise linear; the factor
    :math:`e^{f_t}` that all weights share is left out. Several places of one object get equal weight. Where the
    denominator is 0, so is alpha. Costs 1 gradient at most.

    Args:
        params, model, x, target, layer, tokens, rules, output: See `grad_cam`.

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

    return pulled_map(params, model, x, target, layer, tokens, rules, output, weigh).clamp(min=0)


@method(
    "cam",
    "map",
    "positions at the layer",
    "floating input",
    small={"samples": 2, "noise": 0.1},
    forwards=lambda o: o["samples"] + 1,
    mechanism="formula",
)
def smooth_grad_cam_plus_plus(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str | Layer,
    tokens: Tokens = None,
    samples: int = 25,
    noise: float = 0.15,
    absolute: bool = False,
    seed: Seed = 0,
    chunk_size: ChunkSize = "auto",
    progress: Progress = None,
    rules: Rules = None,
    output: Output = None,
) -> Tensor:
    r"""Weight channels as Grad-CAM++ does, by derivatives averaged over noisy inputs.

    .. math:: w_c = \sum_p \alpha_{c p} \max(0, \bar g_{c p}), \quad
              \alpha_{c p} = \frac{\overline{g_{c p}^2}}{2 \overline{g_{c p}^2} + \overline{g_{c p}^3} \sum_q A_{c q}}

    with the mean over samples and the activation A of the input itself. The paper prints the first derivative in the
    numerator of alpha; that is taken for a slip, as torchcam does. Costs `samples` gradients at most, and a forward.

    Args:
        params, model, x, target, layer, tokens, rules, output: See `grad_cam`.
        samples, noise, absolute, seed, chunk_size, progress: See `smooth_grad`.

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
        g = gradient(params, model, x, target, layer=layer, rules=rules, output=output)
        g = gridded(g, x, tokens)
        return g, g**2, g**3

    sampling: dict[str, Any] = {"samples": samples, "noise": noise, "absolute": absolute, "seed": seed}
    derivatives = smooth_grad(
        params, model, x, target, method=powers, **sampling, chunk_size=chunk_size, progress=progress
    )
    activation = read_channels(params, model, x, layer, tokens)
    return maps.weighted_sum(activation, _plus_plus(activation, *derivatives)).clamp(min=0)
