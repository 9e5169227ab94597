"""Read and edit what layers put out (or take in) during one call.

A `Site` names where: a layer, its output or input, which tensor of a tuple, which call of a layer that is called
several times. `attach` wraps the copy of the layer in a shell; `edit(site, call, tensor)` then sees each activation and
gives what the model goes on with.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pullback._core.module_copy import ModuleCopy
from pullback._core.modules import is_scripted, nearest, set_plainly

_SPEC = re.compile(r"^(?P<name>[^:#]*)(?::(?P<part>[^#]+))?(?:#(?P<call>\d+))?$")


@dataclass(frozen=True)
class Site:
    """A place in a model: ``"name"``, ``"name:1"`` (second tensor of a tuple), ``"name#0"`` (first call only)."""

    name: str
    at: str = "output"
    part: int | str | None = None
    call: int | None = None

    @staticmethod
    def parse(layer: str, at: str = "output") -> Site:
        if not isinstance(layer, str):
            raise TypeError(f"`layer` must be a dotted module name, got {type(layer).__name__}.")
        if at not in ("output", "input"):
            raise ValueError(f"`at` must be 'output' or 'input', got {at!r}.")
        match = _SPEC.match(layer)
        if match is None:
            raise ValueError(f"`layer` must read 'name', 'name:part' or 'name#call', got {layer!r}.")
        part, call = match["part"], match["call"]
        return Site(
            match["name"],
            at,
            int(part) if part is not None and part.lstrip("-").isdigit() else part,
            None if call is None else int(call),
        )

    def __str__(self) -> str:
        part = "" if self.part is None else f":{self.part}"
        call = "" if self.call is None else f"#{self.call}"
        return f"{self.name}{part}{call}"


@dataclass(frozen=True)
class LayerShape:
    """What a probe saw of one call of a layer. `through`: an edit must be written into the layer's own input tensor."""

    shape: torch.Size
    dtype: torch.dtype
    through: bool = False


def find_part(value: Any, site: Site) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Give the tensor that `site` means in what a layer returned, and how to put another in its place."""
    if isinstance(value, Tensor):
        if site.part not in (None, 0):
            raise ValueError(f"`layer` asks for part {site.part!r} of `{site.name}`, which gives a single tensor.")
        return value, lambda new: new
    if isinstance(value, Mapping):
        keys = [k for k, v in value.items() if isinstance(v, Tensor)]
        if isinstance(site.part, int) and site.part < len(keys):
            key = keys[site.part]
        else:
            key = keys[0] if site.part is None and keys else site.part
        if key not in keys:
            raise ValueError(f"`layer` asks for part {site.part!r} of `{site.name}`; it gives {keys}.")

        def put(new: Tensor) -> Any:
            if type(value) is dict:
                return {**value, key: new}
            return type(value)(**{**value, key: new})

        return value[key], put
    if isinstance(value, Sequence) and not isinstance(value, str):
        places = [i for i, v in enumerate(value) if isinstance(v, Tensor)]
        nested = [i for i, v in enumerate(value) if isinstance(v, list | tuple)]
        index = places[0] if site.part is None and places else site.part
        if not isinstance(index, int) or index not in places + nested:
            raise ValueError(f"`layer` asks for part {site.part!r} of `{site.name}`; it has tensors at {places}.")
        inner, put_inner = find_part(value[index], replace(site, part=None))

        def put_item(new: Tensor) -> Any:
            items = [*value[:index], put_inner(new), *value[index + 1 :]]
            if hasattr(value, "_fields"):
                return type(value)(*items)  # a named tuple
            return type(value)(items)  # pyright: ignore[reportCallIssue]

        return inner, put_item
    raise ValueError(f"`layer` names `{site.name}`, which gives {type(value).__name__}, not a tensor.")


Edit = Callable[[Site, int, Tensor], Tensor]


class attach:
    """Hook `edit` to the layers of `sites` in a shell. `calls` counts the calls of each site.

    `edit` runs outside of the rules: it must use operations that the mode of `pullback._ops` lets pass.
    """

    def __init__(
        self, model_copy: ModuleCopy, sites: Sequence[Site], edit: Edit, seen: Mapping[Site, Sequence[LayerShape]]
    ) -> None:
        self.calls = dict.fromkeys(sites, 0)
        self.edit, self.seen = edit, seen
        self.undo: list[Callable[[], None]] = []
        for site in sites:
            after = None if site.at == "input" else self._after
            before = self._before if site.at == "input" else self._before_in_place
            self.undo.append(around(layer_of(model_copy, site), site, before, after))

    def detach(self) -> None:
        for undo in self.undo:
            undo()

    def _edited(self, site: Site, tensor: Tensor) -> Tensor:
        call = self.calls[site]
        self.calls[site] = call + 1
        return self.edit(site, call, tensor)

    def _through(self, site: Site) -> bool:
        seen = self.seen.get(site, ())
        return self.calls[site] < len(seen) and seen[self.calls[site]].through

    def _before(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Edit what enters the layer; into the tensor itself where the layer writes to it, for whoever shares it."""
        through = self._through(site)
        if args:
            tensor, put = find_part(args, site)
        else:
            tensor, put = find_part(kwargs, site)
        if through:
            tensor.copy_(self._edited(site, tensor.clone()))
            return args, kwargs
        edited = put(self._edited(site, tensor))
        return (edited, kwargs) if args else (args, edited)

    def _before_in_place(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let a layer that works in place work on a copy; `_after` writes the edited result to the original."""
        if not self._through(site):
            return args, kwargs
        tensor, put = find_part(args, replace(site, part=None))
        return put(tensor.clone()), kwargs

    def _after(self, site: Site, args: tuple[Any, ...], result: Any) -> Any:
        through = self._through(site)
        tensor, put = find_part(result, site)
        edited = self._edited(site, tensor)
        if not through:
            return put(edited)
        original, _ = find_part(args, replace(site, part=None))
        return put(original.copy_(edited))


def around(
    layer: nn.Module, site: Site, before: Callable[..., Any], after: Callable[..., Any] | None
) -> Callable[[], None]:
    """Run `before(site, args, kwargs)` and `after(site, args, result)` around a layer's call, its hooks inside."""
    call = layer.forward
    if layer._forward_hooks or layer._forward_pre_hooks:
        twin = object.__new__(type(layer))
        twin.__dict__.update(layer.__dict__)
        layer._forward_hooks, layer._forward_pre_hooks = OrderedDict(), OrderedDict()
        call = twin

    def forward(*args: Any, **kwargs: Any) -> Any:
        args_, kwargs_ = before(site, args, kwargs)
        result = call(*args_, **kwargs_)
        return result if after is None else after(site, args, result)

    def undo() -> None:
        set_plainly(layer, "forward", call)

    set_plainly(layer, "forward", forward)
    return undo


def layer_of(model_copy: ModuleCopy, site: Site) -> nn.Module:
    layer = model_copy.of(site.name)
    if layer is None:
        near = nearest(site.name, [name for name, _ in model_copy.layers() if name])
        raise ValueError(f"No layer `{site.name}` in the model. {near}")
    if is_scripted(layer):
        raise TypeError(
            f"`layer` names `{site.name}`, a scripted module, whose inside cannot be reached. "
            "Explain the module before `torch.jit.script`."
        )
    return layer
