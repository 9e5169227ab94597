"""Find out what a layer will put out, without compute.

The derivative with respect to a layer is taken with respect to a zero that is added to its output, and that zero needs
a shape before the model runs. The model therefore runs once on the meta device (shapes only); where that fails
(constants made on a fixed device, branches on values) on fake tensors; where that fails too once for real. What was
seen is kept by model and input shape, weakly, and checked against what each real run brings.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pullback._batch import each
from pullback._ops import swapped
from pullback._shell import Params, Shell, is_scripted
from pullback._taps import Seen, Site, around, find_part, layer_of
from pullback._torch import outside_transforms

_known: WeakKeyDictionary[nn.Module, dict[Any, tuple[Seen, ...]]] = WeakKeyDictionary()
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


def known(model: nn.Module, x: Any, site: Site) -> tuple[Seen, ...] | None:
    with _lock:
        return _known.get(model, {}).get((site.name, site.at, site.part, described(x)))


def remember(model: nn.Module, x: Any, site: Site, seen: tuple[Seen, ...]) -> None:
    with _lock:
        _known.setdefault(model, {})[site.name, site.at, site.part, described(x)] = seen


def probe(
    params: Params, model: nn.Module, x: Any, sites: Sequence[Site], real: bool = False
) -> tuple[dict[Site, tuple[Seen, ...]], bool]:
    """Give what each site puts out, call by call, and whether that took a real forward (or make it one by `real`)."""
    shell = Shell(model)
    for site in sites:  # before anything runs: an unknown name is the caller's error, not a reason to try another way
        layer_of(shell, site)
    return _without_compute(params, model, x, lambda shell, x: _watch(shell, x, sites), real)


def shapes(params: Params, model: nn.Module, x: Any) -> dict[str, tuple[torch.Size, ...]]:
    """Give the shape of what each layer puts out, one a call, in the order of the first calls' ends."""
    return _without_compute(params, model, x, _watch_all)[0]


def _without_compute(
    params: Params, model: nn.Module, x: Any, watch: Callable[[Shell, Any], Result], real: bool = False
) -> tuple[Result, bool]:
    shell = Shell(model)
    if not real and not any(is_scripted(layer) for _, layer in shell.layers()):
        with torch.no_grad(), outside_transforms():
            for attempt in (_on_meta, _on_fake):
                try:
                    return attempt(params, model, x, watch), False
                except Exception:  # whatever it is, a real run raises it again
                    continue
    shell.install(params)
    with torch.no_grad():
        return watch(shell, each(torch.clone, x)), True


def _on_meta(params: Params, model: nn.Module, x: Any, watch: Callable[[Shell, Any], Result]) -> Result:
    def stand_in(t: Tensor) -> Tensor:
        return torch.empty(t.shape, dtype=t.dtype, device="meta")

    return watch(_hollow(params, model, stand_in), each(stand_in, x))


def _on_fake(params: Params, model: nn.Module, x: Any, watch: Callable[[Shell, Any], Result]) -> Result:
    from torch._subclasses.fake_tensor import FakeTensorMode  # slow to import, seldom needed

    def stand_in(t: Tensor) -> Tensor:
        return torch.empty(t.shape, dtype=t.dtype, device=t.device)

    with FakeTensorMode(allow_non_fake_inputs=True):
        return watch(_hollow(params, model, stand_in), each(stand_in, x))


def _hollow(params: Params, model: nn.Module, stand_in: StandIn) -> Shell:
    shell = Shell(model)
    shell.place(params)
    made: dict[int, Tensor] = {}
    for _, layer in shell.layers():
        for owned in (layer._parameters, layer._buffers):
            for name, tensor in owned.items():
                if tensor is not None:
                    owned[name] = made.setdefault(id(tensor), stand_in(tensor))  # pyright: ignore[reportArgumentType]
    shell.place({})
    return shell


def _aliases(a: Tensor, b: Tensor) -> bool:
    base_a, base_b = (t if t._base is None else t._base for t in (a, b))
    return base_a is base_b


def _watch(shell: Shell, x: Any, sites: Sequence[Site]) -> dict[Site, tuple[Seen, ...]]:
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
        around(layer_of(shell, site), site, before, after)
    _call(shell, x)
    return {
        site: tuple(
            # an alias that somebody writes to afterwards: input and output of the layer are one tensor to the model
            Seen(t.shape, t.dtype, written or (source is not None and source._version != version))
            for t, source, version, written in calls
        )
        for site, calls in notes.items()
    }


def _watch_all(shell: Shell, x: Any) -> dict[str, tuple[torch.Size, ...]]:
    found: dict[str, list[torch.Size]] = {}

    def before(site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, kwargs

    def after(site: Site, args: tuple[Any, ...], result: Any) -> Any:
        with suppress(ValueError):  # nothing to name there
            found.setdefault(site.name, []).append(find_part(result, site)[0].shape)
        return result

    for name, layer in shell.layers():
        if name and not is_scripted(layer):
            around(layer, Site(name), before, after)
    _call(shell, x)
    return {name: tuple(calls) for name, calls in found.items()}


def _call(shell: Shell, x: Any) -> None:
    with swapped():
        if isinstance(x, Mapping):
            shell.root(**x)
        else:
            shell.root(*(x if isinstance(x, tuple) else (x,)))
