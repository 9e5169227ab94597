"""Run a model once, on a copy of its structure, with operations replaced and layers read or edited."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import DisableTorchFunction, _len_torch_function_stack  # pyright: ignore[reportAttributeAccessIssue]
from torch.func import functional_call

from pullback._core.entry import warn_once
from pullback._core.layers import Edit, LayerShapes, around, attach
from pullback._core.module_copy import ModuleCopy
from pullback._core.modules import is_scripted
from pullback._core.types import Layer, Model, Output, Params
from pullback._ops.accounting import Account
from pullback._ops.dispatch import OperationMode, RuleMode
from pullback._ops.replacements import REPLACEMENTS
from pullback._torch.internals import compiling


def run_model(
    params: Params,
    model: Model,
    x: Any,
    mode: OperationMode,
    layers: Sequence[Layer] = (),
    edit: Edit | None = None,
    shapes: LayerShapes | None = None,
) -> Any:
    """Run the model on `x`, which it may write to, with its operations seen by `mode` and `layers` edited.

    A module runs in eval mode on a copy of its structure, so that nothing of the caller's changes.
    """
    if not isinstance(model, nn.Module):
        if layers:
            raise ValueError("`layer` needs a torch.nn.Module, got a function as `model`: it has no named layers.")
        if isinstance(mode, RuleMode):
            _note_parameters(mode, _joined(params).values())
        with mode:
            return model(params, x)
    args = (x,) if isinstance(x, Tensor) else x if isinstance(x, tuple) else ()
    kwargs = dict(x) if isinstance(x, Mapping) else {}
    if compiling():
        model_copy = _COPIES[_copy_while_tracing(model)]
    else:
        model_copy = ModuleCopy(model)
        model_copy.install(params)
    undo: list[Callable[[], None]] = []
    if isinstance(mode, RuleMode):
        undo += _prepare_for_rules(model_copy, mode, params)
    elif not compiling() and not _len_torch_function_stack():  # no mode of the caller's own
        _run_directly(model_copy.direct, mode)
    if not compiling() and model_copy.ignored_hooks:
        where = ", ".join(f"`{name}`" for name in dict.fromkeys(model_copy.ignored_hooks))
        warn_once(f"Backward hooks on {where} are left out: torch.func cannot run them.")
    taps = None
    if edit is not None:
        taps = attach(model_copy, layers, edit, shapes or {})
        undo += taps.undo
    with mode:
        if compiling():
            result = functional_call(model_copy.root, params, args, kwargs)  # pyright: ignore[reportArgumentType]
        else:
            result = model_copy.root(*args, **kwargs)
    for step in reversed(undo):  # a copy that compiled code runs on is kept, and must be left as it was
        step()
    for layer, calls in taps.calls.items() if taps is not None else ():
        if calls <= (layer.call or 0):
            raise ValueError(f"`layer` names `{layer}`, but this forward calls `{layer.name}` {calls} times.")
    return result


def _joined(params: Params) -> dict[str, Tensor]:
    joined: dict[str, Tensor] = {}
    for part in params if isinstance(params, tuple) else (params,):
        joined.update(part)
    return joined


# -- layers that run out of sight of the mode
#
# Gain: to be seen by a mode costs an operation some 10 microseconds, as much as a small one takes; 0.5 of the 27 ms of
# EfficientNet-Lite0's gradient (`benchmarks/overhead.py`). Switch: with rules, or within a function mode of the
# caller's own, every operation is seen.

_WEIGHTED = {nn.Linear: F.linear, nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_TENSORS = frozenset((Tensor, nn.Parameter, type(None)))


def _run_directly(layers: Sequence[nn.Module], mode: OperationMode) -> None:
    """Let layers of torch's own run out of sight of the mode: they call no operation that it would replace."""
    for layer in layers:
        attributes, kind = layer.__dict__, type(layer)
        if _TENSORS.issuperset(map(type, attributes["_parameters"].values())):
            run = partial(_batch_norm, mode) if kind in _BATCH_NORMS else kind.forward
            attributes["forward"] = partial(_run_layer, run, layer, mode.account)


def _run_layer(run: Callable[..., Any], layer: nn.Module, account: Account | None, *args: Any, **kwargs: Any) -> Any:
    if kwargs or len(args) != 1 or type(args[0]) is not Tensor:
        return type(layer).forward(layer, *args, **kwargs)
    with DisableTorchFunction():
        result = run(layer, args[0])
    if account is not None:
        account.note(_WEIGHTED.get(type(layer)), (args[0], layer._parameters.get("weight")), result)
    return result


def _batch_norm(mode: OperationMode, layer: Any, x: Tensor) -> Tensor:
    layer._check_input_dim(x)
    mean, var = (layer._buffers[name] for name in ("running_mean", "running_var"))
    weight, bias = (layer._parameters[name] for name in ("weight", "bias"))
    run = REPLACEMENTS[F.batch_norm]
    return run(mode, F.batch_norm, x, mean, var, weight, bias, mean is None, 0.0, layer.eps)


# -- rules


def _prepare_for_rules(model_copy: ModuleCopy, mode: RuleMode, params: Params) -> list[Callable[[], None]]:
    """Refuse what rules cannot see, note parameters as constants, follow which layer runs. Returns what undoes it."""
    for name, module in model_copy.named_modules() if model_copy.has_scripted else ():
        if is_scripted(module):
            raise TypeError(
                f"`rules` cannot reach into `{name or 'model'}`, a scripted module: its operations run out of sight. "
                "Explain the module before `torch.jit.script` or `torch.jit.trace`."
            )
    if compiling():
        _note_parameters(mode, _joined(params).values())
    else:
        modules = model_copy.root.modules()
        _note_parameters(mode, [t for m in modules for own in (m._parameters, m._buffers) for t in own.values()])
    return _follow_layers(model_copy, mode) if mode.table.wants_layers else []


def _note_parameters(mode: RuleMode, held: Any) -> None:
    """Note the tensors that a model holds, for rules that distinguish what depends on the input."""
    if mode.table.on_operation is not None:
        mode.table.on_operation(mode.memo, None, (), {}, [t for t in held if isinstance(t, Tensor)])


def _follow_layers(model_copy: ModuleCopy, mode: RuleMode) -> list[Callable[[], None]]:
    """Keep `mode.layers` the stack of names of the layers that are running."""

    def enter(layer: Layer, args: Any, kwargs: Any) -> Any:
        mode.layers.append(layer.name)
        return args, kwargs

    def leave(layer: Layer, args: Any, result: Any) -> Any:
        mode.layers.pop()
        return result

    modules = model_copy.named_modules()
    return [around(module, Layer(name), enter, leave) for name, module in modules if not is_scripted(module)]


def report(mode: OperationMode) -> None:
    """Warn of what the rules do not cover, and of dropout that is left out."""
    if compiling():
        return
    if mode.dropouts:
        where = _where(mode.dropouts)
        warn_once(f"Dropout hard-coded with training=True{where} is left out: an explanation is not random.")
    if isinstance(mode, RuleMode) and mode.uncovered:
        uncovered = ", ".join(f"`{operation}`{_where(layers)}" for operation, layers in mode.uncovered.items())
        warn_once(f"{mode.table.name} do not cover {uncovered}: what they do not cover keeps its own derivative.")


def _where(layers: Mapping[str, None]) -> str:
    named = [f"`{layer}`" for layer in layers if layer]
    return f" in {', '.join(named[:5])}{' ...' if len(named) > 5 else ''}" if named else ""


# -- compiled calls

# Dynamo cannot trace the copying of a module, nor call a module that a constant function returns, but it traces a
# look-up in a global dict. So a compiled call copies its module once, while tracing, and keeps the copy as long as the
# model lives.
_COPIES: dict[int, ModuleCopy] = {}


def _copy_while_tracing(model: nn.Module) -> int:
    key = id(model)
    _COPIES[key] = model_copy = ModuleCopy(model)
    model_copy.own_buffers(1)  # counters alone: other buffers may change between calls, and each call looks them up
    for _, module in model_copy.named_modules():  # undoing a tap sets `forward`: set it before, so that guards hold
        if not is_scripted(module):
            module.forward = module.forward
    weakref.finalize(model, _COPIES.pop, key, None)
    return key


_copy_while_tracing._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]  # torch._dynamo's decorator, without its import


# -- what a model returns


def select(result: Any, output: Output) -> Tensor:
    """Return the tensor that `output` names in what the model returned."""
    if callable(output):
        chosen = output(result)
    elif output is None:
        chosen = result
    elif isinstance(output, str):
        chosen = result.get(output) if isinstance(result, Mapping) else getattr(result, output, None)
    elif isinstance(output, int) and isinstance(result, Sequence | Mapping):
        values = list(result.values()) if isinstance(result, Mapping) else result
        chosen = values[output] if -len(values) <= output < len(values) else None
    else:
        chosen = None
    if isinstance(chosen, Tensor):
        if not chosen.is_floating_point() and not chosen.is_complex():
            raise TypeError(f"The model's output must be floating point to be explained, got {chosen.dtype}.")
        return chosen
    if output is None:
        raise TypeError(f"The model returns {_kind(result)}, not a tensor: name the part to explain by `output`.")
    raise ValueError(f"`output` must name a tensor in what the model returns, got {output!r} for {_kind(result)}.")


def _kind(result: Any) -> str:
    if isinstance(result, Mapping):
        return f"{type(result).__name__} with keys {', '.join(repr(k) for k in result)}"
    if hasattr(result, "__dataclass_fields__"):
        return f"{type(result).__name__} with fields {', '.join(map(repr, result.__dataclass_fields__))}"
    if isinstance(result, tuple | list):
        return f"{type(result).__name__} of {len(result)}"
    return type(result).__name__
