"""Layers of torch's own run directly, where no rule looks at them.

To be seen by a mode costs an operation some ten microseconds, as much as a small one takes. The layers here call no
operation that a run without rules trades, or, for batch norm, one that is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import DisableTorchFunction, _len_torch_function_stack  # pyright: ignore[reportAttributeAccessIssue]

from pullback._native import FORMS
from pullback._ops import swapped

_WEIGHTED = {nn.Linear: F.linear, nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_OTHERS = (
    *(nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.LayerNorm, nn.GroupNorm),
    *(nn.Flatten, nn.Identity),
)


def _layer(forward: Callable[..., Any], layer: nn.Module, mode: swapped, func: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs or len(args) != 1 or type(args[0]) is not Tensor:
        return forward(layer, *args, **kwargs)
    with DisableTorchFunction():
        result = forward(layer, args[0])
    if mode.measures:
        mode.measure(func, (args[0], layer._parameters.get("weight")), result)
    return result


def _norm(layer: Any, mode: swapped, *args: Any, **kwargs: Any) -> Any:
    if kwargs or len(args) != 1 or type(args[0]) is not Tensor:
        return type(layer).forward(layer, *args, **kwargs)
    weights, statistics = layer._parameters, layer._buffers
    with DisableTorchFunction():
        layer._check_input_dim(args[0])
        mean, var = statistics["running_mean"], statistics["running_var"]
        weight, bias = weights["weight"], weights["bias"]
        result = FORMS[F.batch_norm](mode, F.batch_norm, args[0], mean, var, weight, bias, mean is None, 0.0, layer.eps)
    if mode.measures:
        mode.measure(F.batch_norm, (), result)
    return result


def run_directly(layers: Iterable[nn.Module], mode: swapped) -> Callable[[], None]:
    """Let the layers of a shell that can do so run out of the sight of `mode`. Gives what ends it."""
    if _len_torch_function_stack():  # somebody else looks as well
        return lambda: None
    changed: list[dict[str, Any]] = []
    for layer in layers:
        kind, attributes = type(layer), layer.__dict__
        hooked = attributes["_forward_hooks"] or attributes["_forward_pre_hooks"]  # these may set what it reads
        if hooked or "forward" in attributes:
            continue
        if not all(type(t) in _TENSORS for t in attributes["_parameters"].values()):
            continue
        if kind in _NORMS:
            attributes["forward"] = partial(_norm, layer, mode)
        elif kind in _DIRECT:
            attributes["forward"] = partial(_layer, kind.forward, layer, mode, _WEIGHTED.get(kind))
        else:
            continue
        changed.append(attributes)

    def end() -> None:
        for attributes in changed:
            attributes.pop("forward", None)

    return end


_TENSORS = frozenset((Tensor, nn.Parameter, type(None)))
_DIRECT = frozenset((*_WEIGHTED, *_OTHERS))
