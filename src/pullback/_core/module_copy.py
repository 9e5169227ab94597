"""A structural copy of a module, made for one call.

`torch.func.functional_call` swaps the module's own tensors while it runs, so two threads with two sets of parameters on
one module silently compute nonsense. A copy has the same classes and attributes as the module, but its own dicts of
submodules, parameters, buffers and hooks. It shares every tensor but small buffers. Parameters are installed in the
copy, its layers are tapped, it is in eval mode, and the module that the caller holds is never touched. It costs some
microseconds a layer.

Methods, partials and closures on a module may hold the module: they are bound to the copy as well. Gain: a patched
`forward` (`types.MethodType`, a closure of a patching library) runs on the copy and not on the original, which would
silently ignore `params`. Switch: none; what holds no module is shared as it is.
"""

from __future__ import annotations

import types
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pullback._core.modules import (
    PARALLEL,
    PLAIN_HOMES,
    is_scripted,
    named_layers,
    nearest,
    set_plainly,
    submodule,
    unwrapped,
)
from pullback._core.types import Params

_OWN = nn.Identity().__dict__
_HOOKS = tuple(
    name
    for name in (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
    )
    if name in _OWN  # some are newer than the oldest torch
)
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
_SKIPPED = frozenset(
    (
        *(*_HOOKS, *_BACKWARD_HOOKS, "_parameters", "_buffers", "_modules"),
        *("training", "_non_persistent_buffers_set", "_compiled_call_impl", "_is_full_backward_hook"),
        *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
    )
)
STATE_NUMEL = 2**16  # size up to which a buffer is cloned for a run: `forward` may write to it
_ATOMS = frozenset((bool, int, float, str, type(None), Tensor, nn.Parameter, torch.dtype, torch.device, torch.Size))


# Layers of torch that call no operation which a run without rules would replace. Batch norm is the exception; `forward`
# runs its replacement.
DIRECT = frozenset(
    (
        *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
        *(nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish),
        *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
        *(nn.LayerNorm, nn.GroupNorm, nn.Flatten),
        *(getattr(nn, name) for name in nn.modules.padding.__all__),
    )
)


class ModuleCopy:
    """A structural copy of `model`, and the means to install parameters in it.

    Attributes:
        root: The copy.
        direct: Copies of layers of torch that may run out of sight of a mode.
        ignored_hooks: Names of the layers whose backward hooks are left out. `backward_hooks` keeps them, for a run on
            ordinary autograd.
        has_scripted: Whether a scripted module is among the layers.
    """

    def __init__(self, model: nn.Module, backward_hooks: bool = False) -> None:
        self._model = weakref.ref(model)  # a copy that is kept does not keep the model alive
        self._keeps_backward_hooks = backward_hooks
        self._copies: dict[int, nn.Module] = {}
        self._paths: dict[str, nn.Module] = {}
        self._owned: list[tuple[str | None, dict[str, Any]]] = []  # tensors, with the prefix of their names
        self._states: list[dict[str, Any]] = []  # buffers that `forward` may write to
        self._flat: list[nn.Module] = []  # layers that keep a list of their weights
        self._closures: dict[int, types.FunctionType] = {}
        self._holders: list[
            tuple[nn.Module, nn.Module]
        ] = []  # modules that may hold others elsewhere, with their copies
        self.direct: list[nn.Module] = []
        self.ignored_hooks: list[str] = []
        self.has_scripted = False
        self.root = self._copy(model, "")
        while self._holders:
            self._rebind(*self._holders.pop())
        self._closures.clear()
        self._ties = self._shared()

    @property
    def model(self) -> nn.Module:
        model = self._model()
        assert model is not None  # its caller holds it
        return unwrapped(model)

    def submodule(self, path: str) -> nn.Module | None:
        copy = self._paths.get(path)
        if copy is not None:
            return copy
        original = submodule(self.model, path)  # a second name of a shared module, or a name with wrappers
        if original is None or is_scripted(original):
            return original
        return self._copies.get(id(original))

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        for name, original in named_layers(self.model):
            yield name, self._copies.get(id(original), original)  # the inside of a scripted module is not copied

    # -- copying

    def _copy(self, module: nn.Module, path: str | None = None) -> nn.Module:
        plain = type(module).__module__ in PLAIN_HOMES
        if not plain and (isinstance(module, PARALLEL) or "_orig_mod" in module._modules):
            module = unwrapped(module)
        key, kind = id(module), type(module)
        if key in self._copies:
            return self._copies[key]
        if not plain and isinstance(module, torch.jit.ScriptModule):  # C++ inside: it can only be used as it is
            if any(m.training for m in module.modules()):
                raise ValueError(
                    "`model` holds a scripted module in training mode, which cannot be switched in a copy. "
                    "Call `model.eval()` first."
                )
            self._copies[key] = module
            self.has_scripted = True
            return module
        copy = self._copies[key] = object.__new__(kind)
        attributes = module.__dict__.copy()
        set_plainly(copy, "__dict__", attributes)
        attributes["training"] = False
        if path is not None:
            self._paths[path] = copy
        hooked = attributes["_forward_hooks"] or attributes["_forward_pre_hooks"]
        if hooked or not plain or "forward" in attributes:
            self._holders.append((module, copy))
        if kind in DIRECT and not hooked and "forward" not in attributes:  # a hook may change what a layer reads
            self.direct.append(copy)
        for name in _HOOKS:
            attributes[name] = hooks.copy() if hooked and (hooks := attributes.get(name)) else OrderedDict()
        for name in _BACKWARD_HOOKS:
            if attributes.get(name) and not self._keeps_backward_hooks:
                self.ignored_hooks.append(path or kind.__name__)
                attributes[name] = OrderedDict()
        if attributes.get("_compiled_call_impl") is not None:  # set by `module.compile()`
            attributes["_compiled_call_impl"] = None
        prefix = f"{path}." if path else path
        for owner in ("_parameters", "_buffers"):
            attributes[owner] = owned = attributes[owner].copy()
            if owned:
                self._owned.append((prefix, owned))
        if owned and not isinstance(module, _NormBase):  # in eval mode a norm writes to no buffer
            self._states.append(owned)
        if "_flat_weights_names" in attributes:
            self._flat.append(copy)
        children = module._modules
        attributes["_modules"] = copies = type(children)()
        for name, child in children.items():
            below = None if prefix is None else prefix + name
            copies[name] = None if child is None else self._copy(child, below)
        return copy

    def _shared(self) -> list[list[tuple[str | None, dict[str, Any], str]]]:
        """Return where each tensor is that has several names."""
        ids = [id(tensor) for _, owned in self._owned for tensor in owned.values() if tensor is not None]
        if len(set(ids)) == len(ids):
            return []
        places: dict[int, list[tuple[str | None, dict[str, Any], str]]] = {}
        for prefix, owned in self._owned:
            for name, tensor in owned.items():
                if tensor is not None:
                    places.setdefault(id(tensor), []).append((prefix, owned, name))
        return [found for found in places.values() if len(found) > 1]

    def _rebind(self, original: nn.Module, copy: nn.Module) -> None:
        attributes = copy.__dict__
        for name, value in original.__dict__.items():
            if type(value) in _ATOMS or name in _SKIPPED:
                continue
            bound = self._bound(value)
            if bound is not value:
                attributes[name] = bound
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):
            for key, hook in attributes[hooks].items() if attributes[hooks] else ():
                attributes[hooks][key] = self._bound(hook)
        forward = original.__dict__.get("forward")
        if isinstance(forward, types.FunctionType):
            self._refuse_global(forward)

    def _bound(self, value: Any) -> Any:
        """Return `value` with each module in it, and each method bound to one, exchanged for its copy."""
        kind = type(value)
        if kind in _ATOMS:
            return value
        if isinstance(value, nn.Module):
            return self._copy(value)
        if kind is types.MethodType:
            if not isinstance(value.__self__, nn.Module):
                return value
            return types.MethodType(value.__func__, self._bound(value.__self__))
        if kind is partial:
            return partial(self._bound(value.func), *map(self._bound, value.args), **self._bound(value.keywords))
        if kind is tuple:
            return value if _ATOMS.issuperset(map(type, value)) else tuple(map(self._bound, value))
        if kind in (list, set):
            return kind(value) if _ATOMS.issuperset(map(type, value)) else kind(map(self._bound, value))
        if kind in (dict, OrderedDict):
            return kind((k, self._bound(v)) for k, v in value.items())
        if kind is types.FunctionType and value.__closure__:
            return self._bound_closure(value)
        return value

    def _bound_closure(self, function: types.FunctionType) -> types.FunctionType:
        if id(function) in self._closures:
            return self._closures[id(function)]
        self._closures[id(function)] = function  # a closure may reach itself
        cells, changed = [], False
        for cell in function.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # an empty cell
                cells.append(cell)
                continue
            holds = isinstance(content, nn.Module | types.MethodType | partial | types.FunctionType)
            bound = self._bound(content) if holds else content
            changed |= bound is not content
            cells.append(cell if bound is content else types.CellType(bound))
        if not changed:
            return function
        copy = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
        )
        copy.__kwdefaults__ = function.__kwdefaults__
        self._closures[id(function)] = copy
        return copy

    def _refuse_global(self, forward: types.FunctionType) -> None:
        for name in forward.__code__.co_names:
            value = forward.__globals__.get(name)
            if isinstance(value, nn.Module) and id(unwrapped(value)) in self._copies:
                raise TypeError(
                    f"`model` has a `forward` set on the instance that reaches its module through the global "
                    f"`{name}`, so it cannot run on a copy. Bind it: "
                    f"`model.forward = types.MethodType({forward.__name__}, model)`."
                )

    # -- parameters

    def install(self, params: Params) -> None:
        """Make the copy ready to run on the tensors of `params`."""
        self.place(params)
        if self._states:
            self.own_buffers(STATE_NUMEL)

    def place(self, params: Params) -> None:
        """Put the tensors of `params` in the place of the module's own; a tied weight under all its names."""
        given: dict[str, Tensor] = {}
        for part in params if isinstance(params, tuple) else (params,):
            given.update(part)
        met = 0
        for prefix, owned in self._owned:
            for name, tensor in owned.items():
                new = None if prefix is None else given.get(prefix + name)
                if new is not None:
                    met += 1
                elif tensor is not None and (tensor.requires_grad or tensor.is_inference()):
                    new = tensor.detach()  # a parameter that is left out is a constant
                else:
                    continue
                owned[name] = new.clone() if new.is_inference() else new
        placed: set[tuple[int, str]] = set()
        if met < len(given):  # a second name of a shared module, a scripted module, a name with wrappers
            named = {prefix + name for prefix, owned in self._owned if prefix is not None for name in owned}
            for name, tensor in given.items():
                if name not in named and (slot := self._slot(name, tensor)) is not None:
                    owned, leaf = slot
                    owned[leaf] = tensor.clone() if tensor.is_inference() else tensor
                    placed.add((id(owned), leaf))
        for places in self._ties:
            own = [prefix is not None and prefix + name in given for prefix, _, name in places]
            own = [known or (id(owned), name) in placed for known, (_, owned, name) in zip(own, places, strict=True)]
            if any(own):
                _, owned, name = places[own.index(True)]
                for known, (_, other, leaf) in zip(own, places, strict=True):
                    if not known:
                        other[leaf] = owned[name]
        for layer in self._flat:
            self._flatten(layer)

    def own_buffers(self, most: int) -> None:
        """Copy buffers of at most so many numbers: `forward` may write to them, as to a counter or a running mean."""
        own: dict[int, tuple[Tensor, Tensor]] = {}  # a buffer may be shared
        for buffers in self._states:
            for name, buffer in buffers.items():
                if buffer is not None and buffer.numel() <= most:
                    buffers[name] = own.setdefault(id(buffer), (buffer, buffer.clone()))[1]

    @staticmethod
    def _flatten(layer: nn.Module) -> None:
        """Recurrent layers keep a flat list of their weights beside `_parameters`."""
        names: list[str] = layer.__dict__["_flat_weights_names"]
        weights = [getattr(layer, name, None) for name in names]
        layer.__dict__["_flat_weights"] = weights
        if "_flat_weight_refs" in layer.__dict__:
            layer.__dict__["_flat_weight_refs"] = [None if w is None else weakref.ref(w) for w in weights]

    def _slot(self, name: str, tensor: Tensor) -> tuple[dict[str, Any], str] | None:
        path, _, leaf = name.rpartition(".")
        copy = self.submodule(path)
        if copy is not None and is_scripted(copy):
            own = dict(copy.named_parameters()) | dict(copy.named_buffers())
            if leaf in own and own[leaf].data_ptr() == tensor.data_ptr():
                return None
            raise ValueError(
                f"`params` sets `{name}` of a scripted module, which can only run on its own parameters. "
                "Leave the name out, or explain the module before `torch.jit.script`."
            )
        if copy is not None:
            for owned in (copy._parameters, copy._buffers):
                if leaf in owned:
                    return owned, leaf
        raise ValueError(f"`params` names `{name}`, which the model has not. {nearest(name, self.names())}")

    def names(self) -> list[str]:
        return [n for n, _ in self.model.named_parameters()] + [n for n, _ in self.model.named_buffers()]
