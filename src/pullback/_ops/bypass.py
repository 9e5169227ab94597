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

from pullback._ops.dispatch import OperationMode
from pullback._ops.replacements import REPLACEMENTS

_WEIGHTED = {nn.Linear: F.linear, nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_OTHERS = (
    *(nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.LayerNorm, nn.GroupNorm),
    *(getattr(nn, name) for name in nn.modules.padding.__all__),
    nn.Flatten,
)
_DIRECT = frozenset((*_WEIGHTED, *_NORMS, *_OTHERS))
_TENSORS = frozenset((Tensor, nn.Parameter, type(None)))


def _bypassed(direct: Callable[..., Any], layer: nn.Module, mode: OperationMode, *args: Any, **kwargs: Any) -> Any:
    if kwargs or len(args) != 1 or type(args[0]) is not Tensor:
        return type(layer).forward(layer, *args, **kwargs)
    with DisableTorchFunction():
        result = direct(layer, args[0])
    if mode.measures:
        mode.measure(_WEIGHTED.get(type(layer)), (args[0], layer._parameters.get("weight")), result)
    return result


def _norm(mode: OperationMode, layer: Any, x: Tensor) -> Tensor:
    layer._check_input_dim(x)
    mean, var = (layer._buffers[name] for name in ("running_mean", "running_var"))
    weight, bias = (layer._parameters[name] for name in ("weight", "bias"))
    return REPLACEMENTS[F.batch_norm](mode, F.batch_norm, x, mean, var, weight, bias, mean is None, 0.0, layer.eps)


def bypass(layers: Iterable[nn.Module], mode: OperationMode) -> Callable[[], None]:
    """Let the layers of a shell that can do so run out of the sight of `mode`. Gives what ends it."""
    if _len_torch_function_stack():  # somebody else looks as well
        return lambda: None
    changed: list[dict[str, Any]] = []
    for layer in layers:
        kind = type(layer)
        if kind not in _DIRECT:
            continue
        attributes = layer.__dict__
        if attributes["_forward_hooks"] or attributes["_forward_pre_hooks"] or "forward" in attributes:
            continue  # hooks may set what it reads
        if not _TENSORS.issuperset(map(type, attributes["_parameters"].values())):
            continue
        direct = partial(_norm, mode) if kind in _NORMS else kind.forward
        attributes["forward"] = partial(_bypassed, direct, layer, mode)
        changed.append(attributes)

    def end() -> None:
        for attributes in changed:
            attributes.pop("forward", None)

    return end
