"""Weights from the classifier."""

from __future__ import annotations

from torch import Tensor, nn

from pullback import maps
from pullback._core.call import Call
from pullback._core.entry import method
from pullback._core.targets import cotangent
from pullback._core.types import Inputs, Layer, Model, Output, Params, Target
from pullback.attribution.cam._channels import Tokens, gridded


@method("cam", "map", "positions at the layer", "pooled head", mechanism="formula")
def cam(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str | Layer,
    head: str,
    tokens: Tokens = None,
    output: Output = None,
) -> Tensor:
    r"""Weight a layer's channels by the target's weights in the linear layer after global pooling.

    .. math:: m = \sum_c W_{t c} A_c

    The first class activation map, for networks that end in global average pooling and one linear layer. Elsewhere use
    Grad-CAM, which is its clamped mean here. Costs 1 forward, for any number of targets.

    Args:
        params, model, x, target, layer, tokens, output: See `grad_cam`.
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
    pulled = Call.bind(params, model, x, layer, None, output).pullback()
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
