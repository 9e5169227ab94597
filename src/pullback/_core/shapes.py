"""Call a model as a pure function, and pull cotangents back through the call.

`pullback` is the one wrapper on `torch.func.vjp`: every gradient-like method is `pull(cotangent(output, target))`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pullback._core.entry import warn_once
from pullback._core.inputs import InputTree, each
from pullback._core.layers import LayerShape, Site, around, find_part, layer_of
from pullback._core.module_copy import ModuleCopy
from pullback._core.modules import is_scripted
from pullback._core.types import Inputs, Params
from pullback._ops.dispatch import OperationMode
from pullback._torch.internals import (
    compiling,
    outside_transforms,
)


def layer_shapes(params: Params, model: nn.Module, x: Inputs, site: Site, real: bool = False) -> tuple[LayerShape, ...]:
    if compiling():
        plan = _plan(model, site.name, site.at, site.part, described(x))
        return tuple(LayerShape(torch.Size(shape), dtype, through) for shape, dtype, through in plan)
    seen = None if real else known(model, x, site)
    if seen is None:
        found, real = probe(params, model, x, (site,), real)
        seen = found[site]
        remember(model, x, site, seen)
        if real:
            warn_once(
                f"The shape of `{site.name}` took one more forward: the model does not run on the meta device or on "
                "fake tensors. It is remembered for this input shape."
            )
    return seen


def _plan(model: nn.Module, name: str, at: str, part: int | str | None, shapes: Any) -> tuple[Any, ...]:
    """Probe while a compiled call is traced."""
    site = Site(name, at, part)

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
        found, _ = probe({}, model, example(shapes), (site,))
    return tuple((tuple(seen.shape), seen.dtype, seen.through) for seen in found[site])


_plan._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def layers(params: Params, model: nn.Module, x: Inputs) -> dict[str, tuple[torch.Size, ...]]:
    """List the layers that a forward calls: name -> shape of what it puts out, one a call, in the order they finish.

    Costs no compute where the model runs on the meta device. Layers that put out no tensor are left out.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
        >>> layers(params_of(model), model, torch.zeros(2, 3))
        {'0': (torch.Size([2, 4]),), '1': (torch.Size([2, 4]),)}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module to have layers, got {type(model).__name__}.")
    InputTree(x)
    return shapes(params, model, x)


_known: WeakKeyDictionary[nn.Module, dict[Any, tuple[LayerShape, ...]]] = WeakKeyDictionary()
_lock = threading.Lock()

StandIn = Callable[[Tensor], Tensor]
Result = TypeVar("Result")


def described(x: Any) -> Any:
    """Give the shapes and dtypes of the tensors in `x`: what the shapes inside the model follow from."""
    if isinstance(x, Tensor):
        return x.shape, x.dtype
    if isinstance(x, Mapping):
        return tuple((key, described(value)) for key, value in x.items())
    if isinstance(x, tuple):
        return tuple(map(described, x))
    return None


def known(model: nn.Module, x: Any, site: Site) -> tuple[LayerShape, ...] | None:
    with _lock:
        return _known.get(model, {}).get((site.name, site.at, site.part, described(x)))


def remember(model: nn.Module, x: Any, site: Site, seen: tuple[LayerShape, ...]) -> None:
    with _lock:
        _known.setdefault(model, {})[site.name, site.at, site.part, described(x)] = seen


def probe(
    params: Params, model: nn.Module, x: Any, sites: Sequence[Site], real: bool = False
) -> tuple[dict[Site, tuple[LayerShape, ...]], bool]:
    """Give what each site puts out, call by call, and whether that took a real forward (or make it one by `real`)."""
    model_copy = ModuleCopy(model)
    for site in sites:  # before anything runs: an unknown name is the caller's error, not a reason to try another way
        layer_of(model_copy, site)
    return _without_compute(params, model, x, lambda model_copy, x: _watch(model_copy, x, sites), real)


def shapes(params: Params, model: nn.Module, x: Any) -> dict[str, tuple[torch.Size, ...]]:
    """Give the shape of what each layer puts out, one a call, in the order of the first calls' ends."""
    return _without_compute(params, model, x, _watch_all)[0]


def _without_compute(
    params: Params, model: nn.Module, x: Any, watch: Callable[[ModuleCopy, Any], Result], real: bool = False
) -> tuple[Result, bool]:
    model_copy = ModuleCopy(model)
    if not real and not any(is_scripted(layer) for _, layer in model_copy.layers()):
        with torch.no_grad(), outside_transforms():
            for attempt in (_on_meta, _on_fake):
                try:
                    return attempt(params, model, x, watch), False
                except Exception:  # whatever it is, a real run raises it again
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
    for _, layer in model_copy.layers():
        for owned in (layer._parameters, layer._buffers):
            for name, tensor in owned.items():
                if tensor is not None:
                    owned[name] = made.setdefault(id(tensor), stand_in(tensor))  # pyright: ignore[reportArgumentType]
    model_copy.place({})
    return model_copy


def _aliases(a: Tensor, b: Tensor) -> bool:
    base_a, base_b = (t if t._base is None else t._base for t in (a, b))
    return base_a is base_b


def _watch(model_copy: ModuleCopy, x: Any, sites: Sequence[Site]) -> dict[Site, tuple[LayerShape, ...]]:
    """Run the shell and note, for each call of each site, the shape, and whether input and output are one tensor."""
    notes: dict[Site, list[tuple[Tensor, Tensor | None, int, bool]]] = {site: [] for site in sites}
    entered: dict[Site, list[tuple[Tensor | None, int]]] = {site: [] for site in sites}

    def before(site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args and not kwargs:
            raise ValueError(f"`layer` names `{site.name}`, which is called without arguments.")
        try:
            tensor, _ = find_part(args or kwargs, site if site.at == "input" else Site(site.name))
        except ValueError:
            if site.at == "input":
                raise
            tensor = None
        entered[site].append((tensor, 0 if tensor is None else tensor._version))
        return args, kwargs

    def after(site: Site, args: tuple[Any, ...], result: Any) -> Any:
        source, version = entered[site].pop()
        written = source is not None and source._version != version
        if site.at == "input":
            assert source is not None
            notes[site].append((source, None, source._version, written))
            return result
        tensor, _ = find_part(result, site)
        shared = source is not None and _aliases(source, tensor)
        notes[site].append((tensor, source if shared else None, tensor._version, written and shared))
        return result

    for site in sites:
        around(layer_of(model_copy, site), site, before, after)
    _call(model_copy, x)
    return {
        site: tuple(
            # an alias that somebody writes to afterwards: input and output of the layer are one tensor to the model
            LayerShape(t.shape, t.dtype, written or (source is not None and source._version != version))
            for t, source, version, written in calls
        )
        for site, calls in notes.items()
    }


def _watch_all(model_copy: ModuleCopy, x: Any) -> dict[str, tuple[torch.Size, ...]]:
    found: dict[str, list[torch.Size]] = {}

    def before(site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, kwargs

    def after(site: Site, args: tuple[Any, ...], result: Any) -> Any:
        with suppress(ValueError):  # nothing to name there
            found.setdefault(site.name, []).append(find_part(result, site)[0].shape)
        return result

    for name, layer in model_copy.layers():
        if name and not is_scripted(layer):
            around(layer, Site(name), before, after)
    _call(model_copy, x)
    return {name: tuple(calls) for name, calls in found.items()}


def _call(model_copy: ModuleCopy, x: Any) -> None:
    with OperationMode():
        if isinstance(x, Mapping):
            model_copy.root(**x)
        else:
            model_copy.root(*(x if isinstance(x, tuple) else (x,)))
