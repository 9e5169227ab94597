"""Run a model once, on a copy of its structure, with operations replaced and layers read or edited."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pullback._core.entry import warn_once
from pullback._core.inputs import InputTree
from pullback._core.layers import LayerShape, Site, around, attach
from pullback._core.many.shortcuts import note_forward
from pullback._core.many.state import measuring
from pullback._core.module_copy import ModuleCopy
from pullback._core.modules import is_scripted
from pullback._core.types import Inputs, Layer, Model, Params, Select
from pullback._ops.bypass import bypass
from pullback._ops.dispatch import SAVED_TENSORS, OperationMode, Table
from pullback._torch.internals import (
    compiling,
)


def _report(mode: OperationMode, strict: bool) -> None:
    if compiling() and not strict:
        return
    if mode.dropouts:
        warn_once(
            f"Dropout hard-coded with training=True{_where(mode.dropouts)} is left out: an explanation is not random."
        )
    if not mode.uncovered:
        return
    assert mode.table is not None
    uncovered = ", ".join(f"`{operation}`{_where(layers)}" for operation, layers in mode.uncovered.items())
    message = f"{mode.table.name} do not cover {uncovered}: what they do not cover keeps its own derivative."
    if strict:
        raise ValueError(f"{message} Give `rules` that cover it, or `strict=False`.")
    warn_once(message)


def _where(layers: Mapping[str, None]) -> str:
    named = [f"`{layer}`" for layer in layers if layer]
    return f" in {', '.join(named[:5])}{' ...' if len(named) > 5 else ''}" if named else ""


# -- one forward


def run(
    params: Params,
    model: Model,
    x: Inputs,
    *,
    output: Select = None,
    table: Table | None = None,
    strict: bool = False,
    sites: Sequence[Site] = (),
    edit: Callable[[Site, int, Tensor], Tensor] | None = None,
    seen: Mapping[Site, Sequence[LayerShape]] | None = None,
) -> Tensor:
    """Run the model once, in eval mode, on a shell, with the operations of `table` traded and layers edited.

    Rules may rely on what the graph keeps; a model that writes to it is run again without, and known from then on.
    """
    read: list[Tensor] = []
    if isinstance(output, Layer):
        sites, edit = _reading(Site.parse(output.name, output.at), read, sites, edit)
    tree = InputTree(x)
    mode, result = _forward(params, model, tree, table, sites, edit, seen or {})
    if mode.overwritten():
        _writers.add(model)
        read.clear()
        mode, result = _forward(params, model, tree, table, sites, edit, seen or {})
    _report(mode, strict)
    if isinstance(output, Layer):
        y = select(_only_call(read, Site.parse(output.name, output.at)), None)
    else:
        y = select(result, output)
    note_forward(mode, y)
    return y


_writers: weakref.WeakSet[Any] = weakref.WeakSet()


def _forward(
    params: Params,
    model: Model,
    tree: InputTree,
    table: Table | None,
    sites: Sequence[Site],
    edit: Callable[[Site, int, Tensor], Tensor] | None,
    seen: Mapping[Site, Sequence[LayerShape]],
) -> tuple[OperationMode, Any]:
    x = tree.rebuild([t.clone() for t in tree.tensors], lambda v: None if v is None else v.clone())
    mode = OperationMode(table)
    mode.measures, mode.narrow = measuring(tree.tensors)
    if isinstance(model, nn.Module):
        if table is not None and not compiling() and model not in _writers:
            mode.memo[SAVED_TENSORS] = []
        return mode, _run_module(params, model, x, mode, sites, edit, seen)
    if not callable(model):
        raise TypeError(f"`model` must be a torch.nn.Module or a function, got {type(model).__name__}.")
    if sites:
        raise ValueError("`layer` needs a torch.nn.Module, got a function as `model`: it has no named layers.")
    _note_constants(mode, params)
    with mode:
        return mode, model(params, x)


def _reading(
    site: Site, read: list[Tensor], sites: Sequence[Site], edit: Callable[[Site, int, Tensor], Tensor] | None
) -> tuple[Sequence[Site], Callable[[Site, int, Tensor], Tensor]]:
    """Add to the edits of a forward that what passes `site` is kept in `read`."""

    def edited(at: Site, call: int, tensor: Tensor) -> Tensor:
        tensor = edit(at, call, tensor) if edit is not None and at in sites else tensor
        if at == site and site.call in (None, call):
            read.append(tensor.clone())  # what comes after may write to it
        return tensor

    return (sites if site in sites else (*sites, site)), edited


def activations(params: Params, model: Model, x: Inputs, layer: str = "", at: str = "output") -> tuple[Tensor, ...]:
    """Give what `pullback` takes the derivative at, without a derivative: one tensor a call of the layer."""
    site = Site.parse(layer, at)
    if not site.name:
        return InputTree(x).tensors
    read: list[Tensor] = []
    sites, edit = _reading(site, read, (), None)
    run(params, model, x, output=lambda result: torch.zeros(()), sites=sites, edit=edit)
    return tuple(read)


def _only_call(read: Sequence[Tensor], site: Site) -> Tensor:
    if len(read) != 1:
        raise ValueError(
            f"`{site}` is called {len(read)} times in a forward: choose a call, `{site}#0` to `{site}#{len(read) - 1}`."
        )
    return read[0]


def activation(params: Params, model: Model, x: Inputs, *, layer: str, at: str = "output") -> Tensor:
    """Read a layer's activation, ``[batch ...]``. Costs 1 forward.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(inplace=True))
        >>> params, x = params_of(model), torch.randn(2, 3)
        >>> torch.equal(activation(params, model, x, layer="0"), model[0](x))
        True
    """
    return run(params, model, x, output=Layer(layer, at))


def _run_module(
    params: Params,
    model: nn.Module,
    x: Any,
    mode: OperationMode,
    sites: Sequence[Site],
    edit: Callable[[Site, int, Tensor], Tensor] | None,
    seen: Mapping[Site, Sequence[LayerShape]],
) -> Any:
    args = (x,) if isinstance(x, Tensor) else x if isinstance(x, tuple) else ()
    kwargs = dict(x) if isinstance(x, Mapping) else {}
    if compiling():
        model_copy = _COMPILED_COPIES[_prepare(model)]
    else:
        model_copy = ModuleCopy(model)
        model_copy.install(params)
        _check_scripted(model_copy, mode.table)
    undo: list[Callable[[], None]] = []
    if mode.table is None and not compiling():
        undo.append(bypass(model_copy.copies(), mode))
    tap = None if edit is None else attach(model_copy, sites, _measured(edit, mode), seen)
    if tap is not None:
        undo.append(tap.detach)
    if mode.table is not None and mode.table.wants_layers:
        undo += _follow_layers(model_copy, mode)
    _note_constants(mode, params if compiling() else model_copy.root)
    with mode:
        if compiling():
            result = functional_call(model_copy.root, params, args, kwargs)  # pyright: ignore[reportArgumentType]
        else:
            result = model_copy.root(*args, **kwargs)
    for step in reversed(undo):  # a shell that compiled code runs on is kept
        step()
    if tap is not None:
        for site, calls in tap.calls.items():
            if calls <= (site.call or 0):
                raise ValueError(f"`layer` names `{site}`, but this forward calls `{site.name}` {calls} times.")
    return result


def _note_constants(mode: OperationMode, params: Any) -> None:
    """Note the tensors that a model holds, for rules that keep account of what depends on the input."""
    if mode.table is None or mode.table.on_operation is None:
        return
    if isinstance(params, nn.Module):
        held = [t for layer in params.modules() for own in (layer._parameters, layer._buffers) for t in own.values()]
    else:
        held = [t for part in (params if isinstance(params, tuple) else (params,)) for t in part.values()]
    mode.table.on_operation(mode.memo, None, (), {}, [t for t in held if isinstance(t, Tensor)])


def _measured(
    edit: Callable[[Site, int, Tensor], Tensor], mode: OperationMode
) -> Callable[[Site, int, Tensor], Tensor]:
    """Let the account of sizes start anew at a layer: nothing is pulled back further than there."""

    def edited(site: Site, call: int, tensor: Tensor) -> Tensor:
        if call == 0:
            mode.start_account(tensor)
        return edit(site, call, tensor)

    return edited if mode.measures else edit


def _follow_layers(model_copy: ModuleCopy, mode: OperationMode) -> list[Callable[[], None]]:
    """Keep `mode.layers` the stack of names of the layers that are running."""

    def enter(site: Site, args: Any, kwargs: Any) -> Any:
        mode.layers.append(site.name)
        return args, kwargs

    def leave(site: Site, args: Any, result: Any) -> Any:
        mode.layers.pop()
        return result

    return [around(layer, Site(name), enter, leave) for name, layer in model_copy.layers() if not is_scripted(layer)]


def _check_scripted(model_copy: ModuleCopy, table: Table | None) -> None:
    if model_copy.unheard:
        where = ", ".join(f"`{name}`" for name in dict.fromkeys(model_copy.unheard))
        warn_once(f"Backward hooks on {where} are left out: torch.func cannot run them.")
    if table is None or not model_copy.has_scripted:
        return
    for name, layer in model_copy.layers():
        if is_scripted(layer):
            raise TypeError(
                f"`rules` cannot reach into `{name or 'model'}`, a scripted module: its operations run out of sight. "
                "Explain the module before `torch.jit.script` or `torch.jit.trace`."
            )


# Dynamo cannot trace the making of a shell, nor call a module that a constant function returns, but it traces a look-up
# in a global dict. So a compiled call makes its shell once, while tracing, and keeps it here while the model lives.
_COMPILED_COPIES: dict[int, ModuleCopy] = {}


def _prepare(model: nn.Module) -> int:
    key = id(model)
    _COMPILED_COPIES[key] = model_copy = ModuleCopy(model)
    model_copy.own_buffers(1)  # counters; others may change between calls, and are looked up in each
    for _, layer in model_copy.layers():  # what wraps a layer's call puts back what it found, so that no guard fails
        if not is_scripted(layer):
            layer.forward = layer.forward
    weakref.finalize(model, _COMPILED_COPIES.pop, key, None)
    return key


_prepare._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]  # torch._dynamo's decorator, without its import


def select(result: Any, output: Select) -> Tensor:
    """Give the tensor that `output` names in what the model returned."""
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
        raise TypeError(f"The model returns {_described(result)}, not a tensor: name the part to explain by `output`.")
    raise ValueError(f"`output` must name a tensor in what the model returns, got {output!r} for {_described(result)}.")


def _described(result: Any) -> str:
    if isinstance(result, Mapping):
        return f"{type(result).__name__} with keys {', '.join(repr(k) for k in result)}"
    if hasattr(result, "__dataclass_fields__"):
        return f"{type(result).__name__} with fields {', '.join(map(repr, result.__dataclass_fields__))}"
    if isinstance(result, tuple | list):
        return f"{type(result).__name__} of {len(result)}"
    return type(result).__name__
