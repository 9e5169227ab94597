"""Find the shape of a layer's activation without compute.

The derivative with respect to a layer is taken with respect to a zero that is added to its activation, and that zero
needs a shape before the model runs. So the model runs once on the meta device, which computes shapes only. Where that
fails (constants made on a fixed device, branches on values), it runs on fake tensors; where that fails too, once for
real. Shapes are kept by model and input shape, weakly, and checked against what each real run brings.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pullback._core.entry import warn_once
from pullback._core.inputs import each
from pullback._core.layers import LayerShape, around, find_module, find_part
from pullback._core.module_copy import ModuleCopy
from pullback._core.modules import is_scripted
from pullback._core.types import Inputs, Layer, Params
from pullback._ops.dispatch import OperationMode
from pullback._torch.internals import compiling, outside_transforms

_known: WeakKeyDictionary[nn.Module, dict[Any, tuple[LayerShape, ...]]] = WeakKeyDictionary()
_lock = threading.Lock()

StandIn = Callable[[Tensor], Tensor]
Result = TypeVar("Result")


def layer_shapes(
    params: Params, model: nn.Module, x: Inputs, layer: Layer, real: bool = False
) -> tuple[LayerShape, ...]:
    """Return the shape of a layer's activation in each of its calls."""
    if compiling():
        found = _while_tracing(model, layer.name, layer.at, layer.part, shapes_of(x))
        return tuple(LayerShape(torch.Size(shape), dtype, aliases) for shape, dtype, aliases in found)
    key = layer.name, layer.at, layer.part, shapes_of(x)
    with _lock:
        shapes = None if real else _known.get(model, {}).get(key)
    if shapes is None:
        shapes, real = _probe(params, model, x, layer, real)
        with _lock:
            _known.setdefault(model, {})[key] = shapes
        if real:
            warn_once(
                f"The shape of `{layer.name}` took one more forward: the model does not run on the meta device or on "
                "fake tensors. It is remembered for this input shape."
            )
    return shapes


def shapes_of(x: Any) -> Any:
    """Return the shapes and dtypes of the tensors in `x`, from which the shapes inside the model follow."""
    if isinstance(x, Tensor):
        return x.shape, x.dtype
    if isinstance(x, Mapping):
        return tuple((key, shapes_of(value)) for key, value in x.items())
    if isinstance(x, tuple):
        return tuple(map(shapes_of, x))
    return None


def _while_tracing(model: nn.Module, name: str, at: Any, part: int | str | None, shapes: Any) -> tuple[Any, ...]:
    """Probe while a compiled call is traced: arguments and result are constants of the graph."""

    def example(shape: Any) -> Any:
        if shape is None:
            return None
        if isinstance(shape[0], torch.Size):
            return torch.empty(shape[0], dtype=shape[1], device="meta")
        if isinstance(shape[0][0], str):
            return {key: example(value) for key, value in shape}
        return tuple(map(example, shape))

    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        found, _ = _probe({}, model, example(shapes), Layer(name, at, part))
    return tuple((tuple(shape.shape), shape.dtype, shape.aliases_input) for shape in found)


_while_tracing._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def all_shapes(params: Params, model: nn.Module, x: Any) -> dict[str, tuple[torch.Size, ...]]:
    """Return the shapes of each layer's activations, one a call, in the order in which the first calls end."""
    return _without_compute(params, model, x, _watch_all)[0]


def _probe(
    params: Params, model: nn.Module, x: Any, layer: Layer, real: bool = False
) -> tuple[tuple[LayerShape, ...], bool]:
    """Return the shapes of a layer's activations, and whether that took a real forward. `real` asks for one."""
    find_module(ModuleCopy(model), layer)  # an unknown name is the caller's error, not a reason to try another way
    return _without_compute(params, model, x, lambda model_copy, x: _watch(model_copy, x, layer), real)


def _without_compute(
    params: Params, model: nn.Module, x: Any, watch: Callable[[ModuleCopy, Any], Result], real: bool = False
) -> tuple[Result, bool]:
    model_copy = ModuleCopy(model)
    if not real and not any(is_scripted(module) for _, module in model_copy.named_modules()):
        with torch.no_grad(), outside_transforms():
            for attempt in (_on_meta, _on_fake):
                try:
                    return attempt(params, model, x, watch), False
                except Exception:  # a real run raises it again
                    continue
    model_copy.install(params)
    with torch.no_grad():
        return watch(model_copy, each(torch.clone, x)), True


def _on_meta(params: Params, model: nn.Module, x: Any, watch: Callable[[ModuleCopy, Any], Result]) -> Result:
    def stand_in(t: Tensor) -> Tensor:
        return torch.empty(t.shape, dtype=t.dtype, device="meta")

    return watch(_hollow(params, model, stand_in), each(stand_in, x))


def _on_fake(params: Params, model: nn.Module, x: Any, watch: Callable[[ModuleCopy, Any], Result]) -> Result:
    from torch._subclasses.fake_tensor import FakeTensorMode  # slow to import, seldom needed

    def stand_in(t: Tensor) -> Tensor:
        return torch.empty(t.shape, dtype=t.dtype, device=t.device)

    with FakeTensorMode(allow_non_fake_inputs=True):
        return watch(_hollow(params, model, stand_in), each(stand_in, x))


def _hollow(params: Params, model: nn.Module, stand_in: StandIn) -> ModuleCopy:
    model_copy = ModuleCopy(model)
    model_copy.place(params)
    made: dict[int, Tensor] = {}
    for _, module in model_copy.named_modules():
        for owned in (module._parameters, module._buffers):
            for name, tensor in owned.items():
                if tensor is not None:
                    owned[name] = made.setdefault(id(tensor), stand_in(tensor))  # pyright: ignore[reportArgumentType]
    model_copy.place({})
    return model_copy


def _share_memory(a: Tensor, b: Tensor) -> bool:
    base_a, base_b = (t if t._base is None else t._base for t in (a, b))
    return base_a is base_b


def _watch(model_copy: ModuleCopy, x: Any, layer: Layer) -> tuple[LayerShape, ...]:
    """Run the copy, and note for each call of the layer its shape, and whether input and output are one tensor."""
    calls: list[tuple[Tensor, Tensor | None, int, bool]] = []
    entered: list[tuple[Tensor | None, int]] = []

    def before(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args and not kwargs:
            raise ValueError(f"`layer` names `{layer.name}`, which is called without arguments.")
        try:
            tensor, _ = find_part(args or kwargs, layer if layer.at == "input" else Layer(layer.name))
        except ValueError:
            if layer.at == "input":
                raise
            tensor = None
        entered.append((tensor, 0 if tensor is None else tensor._version))
        return args, kwargs

    def after(layer: Layer, args: tuple[Any, ...], result: Any) -> Any:
        source, version = entered.pop()
        written = source is not None and source._version != version
        if layer.at == "input":
            assert source is not None
            calls.append((source, None, source._version, written))
            return result
        tensor, _ = find_part(result, layer)
        shared = source is not None and _share_memory(source, tensor)
        calls.append((tensor, source if shared else None, tensor._version, written and shared))
        return result

    around(find_module(model_copy, layer), layer, before, after)
    _call(model_copy, x)
    return tuple(
        # where an alias is written to afterwards, the layer's input and output are one tensor
        LayerShape(t.shape, t.dtype, written or (source is not None and source._version != version))
        for t, source, version, written in calls
    )


def _watch_all(model_copy: ModuleCopy, x: Any) -> dict[str, tuple[torch.Size, ...]]:
    found: dict[str, list[torch.Size]] = {}

    def before(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, kwargs

    def after(layer: Layer, args: tuple[Any, ...], result: Any) -> Any:
        with suppress(ValueError):  # the module returns no tensor
            found.setdefault(layer.name, []).append(find_part(result, layer)[0].shape)
        return result

    for name, module in model_copy.named_modules():
        if name and not is_scripted(module):
            around(module, Layer(name), before, after)
    _call(model_copy, x)
    return {name: tuple(calls) for name, calls in found.items()}


def _call(model_copy: ModuleCopy, x: Any) -> None:
    with OperationMode():
        if isinstance(x, Mapping):
            model_copy.root(**x)
        else:
            model_copy.root(*(x if isinstance(x, tuple) else (x,)))
