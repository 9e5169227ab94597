"""One backward pass: the gradient, its rectified relatives, and the driver that turns them into maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pullback import maps
from pullback._core.call import Call, Pulled
from pullback._core.entry import method
from pullback._core.targets import cotangent
from pullback._core.types import Inputs, Layer, Model, Output, Params, Target
from pullback.rules._table import Rules, table_of


@method("gradients", mechanism="own")
def gradient(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str | Layer = "",
    rules: Rules = None,
    output: Output = None,
) -> Any:
    r"""Differentiate the score with respect to the input, or to a layer's activation.

    .. math:: a = \partial f_t / \partial x

    Each example's gradient is that of its own score. Costs 1 gradient; under `vmap` over targets one forward and one
    backward a target.

    Args:
        params: Parameters and buffers by name, as `params_of` gives; names left out come from the model. A tuple of
            dicts is joined.
        model: A `torch.nn.Module`, run in eval mode on a copy of its structure, or a function ``model(params, x)``.
        x: ``[batch ...]``; a tuple (positional inputs) or dict (keyword inputs) of tensors.
        target: Class index, one for all examples or ``[batch]``; a floating-point cotangent shaped like the output; a
            function from the output to scores ``[batch]``; `None` where the output is one score an example. On outputs
            ``[batch class ...]`` an index selects the class at every position.
        layer: Dotted module name; ``""`` is the model's input. ``"name:1"`` takes the second tensor that the layer
            returns; ``"name#0"`` the first call of a layer that is called several times: without it the result is
            the derivative with respect to a change that all calls share.
        rules: What changes the backward: see `pullback.rules`.
        output: Which part of a dict or tuple output is explained: a name, an index or a function.

    Returns:
        Signed, with the structure and shape of `x` (`None` for members that are not floating point), or the shape of
        the layer's activation; in units of the score per unit of it.

    Raises:
        ValueError: If an index is no class, or no layer has that name.
        TypeError: If `x`, `target` or the model's output is of the wrong kind.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> params, x = params_of(model), torch.randn(4, 3)
        >>> torch.allclose(gradient(params, model, x, target=1), model.weight[1].expand(4, 3))
        True

    Reference:
        Simonyan, Vedaldi & Zisserman, Deep Inside Convolutional Networks, 2014, sec. 3.
    """
    call = Call.bind(params, model, x, layer, table_of(rules), output)
    pulled = call.pullback()
    return call.like(pulled.pull(cotangent(pulled.output, target)))


@method("gradients")
def input_x_gradient(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str | Layer = "",
    rules: Rules = None,
    output: Output = None,
) -> Any:
    r"""Multiply the input, or a layer's activation, by its gradient.

    .. math:: a = x \odot \partial f_t / \partial x

    Adds up to the score where the model is linear without bias. Calls of a reused layer are multiplied one by one and
    summed. Costs 1 gradient.

    Args:
        params, model, x, target, layer, rules, output: See `gradient`.

    Returns:
        Signed, shaped like `x` or the activation, in units of the score.

    Example:
        >>> model = torch.nn.Linear(3, 2, bias=False)
        >>> params, x = params_of(model), torch.randn(4, 3)
        >>> torch.allclose(input_x_gradient(params, model, x, target=1).sum(1), model(x)[:, 1], atol=1e-6)
        True

    Reference:
        Shrikumar, Greenside, Shcherbina & Kundaje, Not Just a Black Box, 2016, sec. 2.
    """
    call = Call.bind(params, model, x, layer, table_of(rules), output)
    pulled = call.pullback()
    gradients = pulled.pull(cotangent(pulled.output, target))
    return call.like([a * g for a, g in zip(pulled.activations, gradients, strict=True)])


@method("gradients", rectifiers=True, mechanism="own")
def guided_backprop(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str | Layer = "",
    output: Output = None,
) -> Any:
    r"""Backpropagate through rectifiers only what is positive, forward and backward.

    .. math:: g \mapsto \max(g, 0) \cdot 1[x > 0] \quad \text{at each rectifier}

    Reaches every spelling of ReLU, and `relu6`, `hardtanh`, `clamp` and `threshold` where they rectify. Costs 1
    gradient.
    It restores the image more than it explains the class: it changes little when the weights above are randomised
    (Adebayo et al., Sanity Checks for Saliency Maps, 2018).

    Args:
        params, model, x, target, layer, output: See `gradient`.

    Returns:
        Signed, shaped like `x` or the activation.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> params, x = params_of(model), torch.randn(5, 3)
        >>> g = gradient(params, model, x, target=0, layer="1")
        >>> a = guided_backprop(params, model, x, target=0, layer="0")
        >>> torch.allclose(a, g.clamp(min=0) * (model[0](x) > 0))
        True

    Reference:
        Springenberg, Dosovitskiy, Brox & Riedmiller, Striving for Simplicity, 2015, sec. 3.4.
    """
    return gradient(params, model, x, target, layer=layer, rules="guided", output=output)


@method("gradients", rectifiers=True)
def deconvnet(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str | Layer = "",
    output: Output = None,
) -> Any:
    r"""Backpropagate through rectifiers whatever is positive backward, independent of the forward.

    .. math:: g \mapsto \max(g, 0) \quad \text{at each rectifier}

    Costs 1 gradient. Like guided backprop it fails the randomisation check of Adebayo et al. (2018).

    Args:
        params, model, x, target, layer, output: See `gradient`.

    Returns:
        Signed, shaped like `x` or the activation.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> params, x = params_of(model), torch.randn(5, 3)
        >>> a = deconvnet(params, model, x, target=0)
        >>> torch.allclose(a, (model[2].weight[0].clamp(min=0) @ model[0].weight).expand(5, 3), atol=1e-6)
        True

    Reference:
        Zeiler & Fergus, Visualizing and Understanding Convolutional Networks, 2014, sec. 2.1.
    """
    return gradient(params, model, x, target, layer=layer, rules="deconvnet", output=output)


def _peak(activation: Tensor, gradient: Tensor) -> Tensor:
    return maps.channel_peak(gradient)


@method("gradients", "map", "one map")
def saliency(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str | Layer = "",
    rules: Rules = None,
    reduce: Callable[[Tensor, Tensor], Tensor] = _peak,
    resize: bool | tuple[int, ...] = False,
    resize_mode: str = "bilinear",
    smooth: float = 0.0,
    output: Output = None,
) -> Tensor:
    r"""Reduce the gradient at the input, or at a layer, to a map.

    .. math:: m = \max_c | \partial f_t / \partial x_c |

    by default; Grad-CAM and linear approximation are other reductions. Calls of a reused layer are reduced one by one
    and summed. Costs 1 gradient.

    Args:
        params, model, x, target, layer, rules, output: See `gradient`.
        reduce: From ``(activation, gradient)``, both ``[batch channel ...]``, to a map ``[batch 1 ...]``.
        resize: True for the size of `x`, or (height, width).
        resize_mode: How: see `pullback.maps.resize`.
        smooth: Standard deviation of a Gaussian, as a fraction of the longer side of the map.

    Returns:
        Map ``[batch 1 height width]``.

    Raises:
        ValueError: If `smooth` is negative, or `resize` does not fit the map.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
        >>> params, x = params_of(model), torch.randn(2, 3, 6, 6)
        >>> peak = gradient(params, model, x, target=0).abs().amax(1, keepdim=True)
        >>> torch.equal(saliency(params, model, x, target=0), peak)
        True

    Reference:
        Simonyan, Vedaldi & Zisserman, Deep Inside Convolutional Networks, 2014, sec. 3.1.
    """
    call = Call.bind(params, model, x, layer, table_of(rules), output)
    if call.layer is None and len(call.x.tensors) > 1:
        raise TypeError("`x` holds several floating-point tensors: a map is of one. Use `gradient`, or name a `layer`.")
    map = reduced(call, call.pullback(), target, reduce)
    if resize is True:
        size = _sides(x)
    else:
        size = tuple(resize) if resize else ()
    map = maps.resize(map, size, resize_mode) if size else map
    if not smooth >= 0:
        raise ValueError(f"`smooth` must be a fraction of at least 0, got {smooth}.")
    return maps.smooth(map, smooth * max(map.shape[2:])) if smooth else map


def _sides(x: Inputs) -> tuple[int, ...]:
    if not isinstance(x, Tensor):
        raise ValueError("`resize=True` means the size of `x`, which is not a single tensor: give (height, width).")
    return tuple(x.shape[2:])


def reduced(call: Call, pulled: Pulled, target: Target, reduce: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Pull back, reduce each call of the layer to a map, and sum the maps."""

    def maps(gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(reduce(a, g) for a, g in zip(pulled.activations, gradients, strict=True))

    return call.like(pulled.pull(cotangent(pulled.output, target), maps))
