"""Merge batch norm into the linear map before it, so that relevance is shared out once."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pullback._ops.constants import (
    Remembering,
    recall,
    remember,
    version,
)
from pullback._ops.dispatch import Rule
from pullback._ops.reading import (
    TRANSPOSED,
    LinearMap,
)
from pullback._ops.spellings import Operation
from pullback.rules._elementwise import detached_statistics

# -- relevance: batch norm


def _affine(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor] | None:
    """Give scale and shift of batch norm in eval mode, by channel."""
    if training or running_mean is None or running_var is None:
        return None
    scale = (running_var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale
    return scale, shift if bias is None else shift + bias


def _by_channel(v: Tensor, x: Tensor) -> Tensor:
    return v.reshape(-1, *[1] * (x.ndim - 2)).to(x.dtype)


def merged() -> Rule:
    """Give the rule for batch norm in eval mode that makes it one with the linear map before it, by that map's rule.

    Where no linear map comes before it, batch norm is a linear map by itself, one weight and one bias a channel, whose
    derivative is taken: its bias takes its share.
    """

    def rule(operation: Operation, input: Tensor, *args: Any, memo: dict[str, Any], **kwargs: Any) -> Any:
        # instance norm has another name for it
        renamed = {"training" if name == "use_input_stats" else name: value for name, value in kwargs.items()}
        affine = _affine(input, *args, **renamed)
        if affine is None:
            return detached_statistics()(operation, input, *args, **kwargs)
        scale, shift = affine
        found = recall(memo, "origins", input)
        if found is None or found[3] != version(input) or not _runs_along(found[1], input):
            return input * _by_channel(scale, input) + _by_channel(shift, input)
        rule, map, value, _ = found
        value = value * _by_channel(scale, input) + _by_channel(shift, input)
        bias = shift if map.bias is None else shift + scale * map.bias
        weight = _scaled_weight(map, scale)
        whole = map._replace(weight=weight, bias=bias)
        result = rule.apply_rule(whole, value)
        remember(memo, "origins", result, (rule, whole, value, version(result)))
        return result

    return Remembering(rule)


def _runs_along(map: LinearMap, y: Tensor) -> bool:
    return map.settings is not None and (map.axis is not None) and map.axis % y.ndim == 1


def _scaled_weight(map: LinearMap, scale: Tensor) -> Tensor:
    scale = scale.to(map.weight.dtype)
    if map.operation in TRANSPOSED:  # [in, out of a group, ...], groups along `in`
        assert map.settings is not None
        groups = map.settings[-1]
        grouped = map.weight.reshape(groups, -1, *map.weight.shape[1:])
        return (grouped * scale.reshape(groups, 1, -1, *[1] * (map.weight.ndim - 2))).reshape_as(map.weight)
    return map.weight * scale.reshape(-1, *[1] * (map.weight.ndim - 1))
