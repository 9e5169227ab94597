"""Class activation maps: an activation's channels, weighted by what the gradient says of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pullback import maps
from pullback._call import Inputs, Model, Params, Select, Target, cotangent, public, pullback
from pullback.gradients import reduced
from pullback.rules import Rules, table_of


def _gridded(activation: Tensor, gradient: Tensor, x: Any) -> tuple[Tensor, Tensor]:
    """Lay token activations out on the image's grid: the gradient of an image's tokens is ``[batch token channel]``."""
    if isinstance(x, Tensor) and x.ndim == 4 and activation.ndim == 3:
        return maps.token_grid(activation, x), maps.token_grid(gradient, x)
    if activation.ndim < 3:
        raise ValueError(
            f"`layer` must have spatial axes, [batch channel ...], or tokens of an image; its activation is "
            f"{list(activation.shape)}."
        )
    return activation, gradient


@public
def grad_cam(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str,
    at: str = "output",
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
            ``[batch channel ...]`` with 1 to 3 spatial axes, or ``[batch token channel]`` for an image `x`: its tokens
            are laid out on the image's grid, leading class tokens left out. Calls of a reused layer are summed before
            the clamp.

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

    def weighted(activation: Tensor, gradient: Tensor) -> Tensor:
        activation, gradient = _gridded(activation, gradient, x)
        return maps.weighted_sum(activation, gradient.flatten(2).mean(2))

    pulled = pullback(params, model, x, layer=layer, at=at, output=output, table=table_of(rules), strict=strict)
    return reduced(pulled, cotangent(pulled.output, target), weighted).clamp(min=0)


@public
def linear_approx(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str,
    at: str = "output",
    rules: Rules = None,
    output: Select = None,
    strict: bool = False,
) -> Tensor:
    r"""Multiply activation and gradient at each position, and sum over channels.

    .. math:: m_p = \sum_c A_{c p} \, \partial_{c p} f_t

    The score as the first-order approximation at the layer sees it, spread over positions. Costs 1 gradient at most.

    Args:
        params, model, x, target, layer, at, rules, output, strict: See `grad_cam`.

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

    def product(activation: Tensor, gradient: Tensor) -> Tensor:
        return maps.weighted_sum(*_gridded(activation, gradient, x))

    pulled = pullback(params, model, x, layer=layer, at=at, output=output, table=table_of(rules), strict=strict)
    return reduced(pulled, cotangent(pulled.output, target), product)
