"""Methods over methods: classes compared, layers joined, maps laid over attributions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pullback import maps
from pullback._core.call import Call
from pullback._core.entry import method
from pullback._core.targets import cotangent
from pullback._core.types import Inputs, Layer, Model, Output, Params, Target
from pullback.attribution.cam._channels import Tokens, ratio
from pullback.attribution.cam.by_gradient import grad_cam, layer_cam
from pullback.attribution.gradients import guided_backprop

Method: TypeAlias = "Callable[..., Any]"


@method("cam", "map", "positions at the layer", "classes", forwards=2, mechanism="formula")
def finer_cam(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    method: Method = grad_cam,
    others: int = 3,
    strength: float = 1.0,
    output: Output = None,
    **options: Any,
) -> Any:
    r"""Explain what sets the target apart from the classes that score most like it.

    .. math:: f_t - \frac{\lambda}{n} \sum_{d} f_d

    takes the place of the score, with the n classes d whose scores are nearest to that of the target, all alike;
    pytorch-grad-cam weights them by their probabilities. Costs a forward and what `method` costs.

    Args:
        params, model, x, target, output: See `gradient`; `target` is an index.
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
    found = Call.bind(params, model, x, output=output).forward()
    hot = cotangent(found, target)
    if found.ndim != 2 or callable(target) or not 1 <= others < found.shape[1]:
        raise ValueError(
            "`others` must lie in 1 ... classes - 1 of an output [batch class], and `target` be an index; got "
            f"{others} for {list(found.shape)}."
        )
    distance = (found - (hot * found).sum(1, keepdim=True)).abs() + torch.where(hot == 1, torch.inf, 0.0)
    near = torch.zeros_like(found).scatter(1, distance.detach().argsort(dim=1)[:, :others], 1.0)
    difference = hot - strength / others * near
    return method(params, model, x, difference, output=output, **options)


@method("cam", "map", "positions at the layer", mechanism="formula")
def fused_cam(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layers: Sequence[str],
    method: Method = layer_cam,
    scale: float = 2.0,
    output: Output = None,
    **options: Any,
) -> Tensor:
    r"""Join the maps of several layers by their maximum.

    .. math:: m = \max_l \tanh\Big(\gamma \frac{m_l}{\max m_l}\Big)

    each resized to the finest of them. The squashing lets deep layers, whose maps are smooth, not drown the shallow.
    Costs what `method` costs, a layer.

    Args:
        params, model, x, target, output: See `gradient`.
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
    stack = _maps_at(layers, method, params, model, x, target, output=output, **options)
    peak = stack.amax(tuple(range(2, stack.ndim)), keepdim=True)
    return torch.tanh(scale * ratio(stack, peak.expand_as(stack))).amax(0)


@method("cam", "map", "positions at the layer", mechanism="formula")
def refine_cam(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layers: Sequence[str],
    method: Method = layer_cam,
    output: Output = None,
    **options: Any,
) -> Tensor:
    r"""Join the maps of several layers by their product: fine detail from shallow layers where deep layers agree.

    .. math:: m = \prod_l \operatorname{norm}(m_l)

    each scaled to [0, 1] and resized to the finest of them. Costs what `method` costs, a layer.

    Args:
        params, model, x, target, layers, method, output, **options: See `fused_cam`.

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
    stack = _maps_at(layers, method, params, model, x, target, output=output, **options)
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


@method("cam", "attribution", "positions at the layer", "one tensor", forwards=2, rectifiers=True, mechanism="formula")
def guided_grad_cam(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str | Layer,
    tokens: Tokens = None,
    method: Method = guided_backprop,
    map_method: Method = grad_cam,
    resize_mode: str = "bilinear",
    output: Output = None,
) -> Tensor:
    r"""Multiply guided backprop by Grad-CAM: fine detail where the class is.

    .. math:: a = G(x) \odot \operatorname{resize}(m)

    Costs 2 gradients. The detail is guided backprop's, which changes little when weights are randomised.

    Args:
        params, model, x, target, layer, tokens, output: See `grad_cam`; `x` is one tensor.
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
    fine = method(params, model, x, target, output=output)
    map = map_method(params, model, x, target, layer=layer, tokens=tokens, output=output)
    return fine * (map if map.shape[2:] == x.shape[2:] else maps.resize(map, x.shape[2:], resize_mode))
