"""A shell: a structural copy of a module, made for one call.

`torch.func.functional_call` swaps the module's own tensors while it runs, so two threads with two sets of parameters
compute nonsense on one module, silently. A shell has the same classes and attributes as the module, but its own dicts
of submodules, parameters, buffers and hooks, and shares every tensor: parameters are installed in it, taps wrap its
layers, it is in eval mode, and the module that the caller holds is never touched. It costs some microseconds a layer.
"""

from __future__ import annotations

import difflib
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

Params = Mapping[str, Tensor] | tuple[Mapping[str, Tensor], ...]

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
_ATOMS = frozenset((bool, int, float, str, type(None), Tensor, nn.Parameter, torch.dtype, torch.device, torch.Size))


# modules of these are no wrappers, and what they hold beside parameters and modules takes no part in their forward
_PLAIN_HOMES = frozenset(
    f"torch.nn.modules.{name}" for name in ("activation", "batchnorm", "conv", "linear", "pooling", "normalization")
)


def is_scripted(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)


def unwrapped(module: nn.Module) -> nn.Module:
    """Give the module inside `torch.compile`, `DataParallel` and `DistributedDataParallel`."""
    while type(module).__module__ not in _PLAIN_HOMES:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules:
            module = module._modules["_orig_mod"]  # pyright: ignore[reportAssignmentType]
        else:
            break
    return module


def submodule(root: nn.Module, path: str) -> nn.Module | None:
    """Find a module by dotted name, with or without the names that wrappers put in between."""
    module: nn.Module | None = root
    for part in path.split(".") if path else ():
        assert module is not None
        inner = unwrapped(module)
        if part in inner._modules:
            module = inner._modules[part]
        elif part in module._modules:
            module = module._modules[part]
        elif part not in ("module", "_orig_mod"):  # a wrapper that is there no more
            return None
        if module is None:
            return None
    assert module is not None
    return unwrapped(module)


def named_layers(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name every module as `named_modules` does, wrappers left out."""
    seen: set[int] = set()

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        module = unwrapped(module)
        if id(module) in seen:
            return
        seen.add(id(module))
        yield prefix, module
        for name, child in module._modules.items():
            if child is not None:
                yield from walk(child, f"{prefix}.{name}" if prefix else name)

    yield from walk(root, "")


class Shell:
    """A structural copy of `model`, and the means to install parameters in it.

    `root` is the copy; `of(path)` the copy of a submodule; `unheard` names the layers whose backward hooks are left
    out, unless `backward_hooks` keeps them for a run on ordinary autograd.
    """

    def __init__(self, model: nn.Module, backward_hooks: bool = False) -> None:
        self.model = unwrapped(model)
        self._keeps_backward_hooks = backward_hooks
        self._copies: dict[int, nn.Module] = {}
        self._paths: dict[str, nn.Module] = {}
        self._slots: dict[int, list[tuple[dict[str, Any], str]]] = {}
        self._closures: dict[int, types.FunctionType] = {}
        self._originals: list[nn.Module] = []  # kept alive while their ids are keys
        self.unheard: list[str] = []
        self.has_scripted = False
        self.root = self._copy(self.model, "")
        for original in list(self._originals):
            if not is_scripted(original):
                self._rebind(original, self._copies[id(original)])

    def of(self, path: str) -> nn.Module | None:
        copy = self._paths.get(path)
        if copy is not None:
            return copy
        original = submodule(self.model, path)  # a second name of a shared module, or a name with wrappers in it
        if original is None or is_scripted(original):
            return original
        return self._copies.get(id(original))

    def layers(self) -> Iterator[tuple[str, nn.Module]]:
        for name, original in named_layers(self.model):
            yield name, self._copies.get(id(original), original)  # the inside of a scripted module is not copied

    def copies(self) -> Iterable[nn.Module]:
        """Give every layer that is copied, also those that no name leads to."""
        return self._copies.values()

    # -- copying

    def _copy(self, module: nn.Module, path: str | None = None) -> nn.Module:
        module = unwrapped(module)
        copy = self._copies.get(id(module))
        if copy is not None:
            return copy
        if is_scripted(module):  # C++ inside: it can only be used as it is
            if any(m.training for m in module.modules()):
                raise ValueError(
                    "`model` holds a scripted module in training mode, which cannot be switched in a copy. "
                    "Call `model.eval()` first."
                )
            self._copies[id(module)] = module
            self._originals.append(module)
            self.has_scripted = True
            return module
        copy = object.__new__(type(module))
        attributes = module.__dict__.copy()
        object.__setattr__(copy, "__dict__", attributes)
        attributes["training"] = False
        self._copies[id(module)] = copy
        self._originals.append(module)
        if path is not None:
            self._paths[path] = copy
        for name in _HOOKS:
            attributes[name] = hooks.copy() if (hooks := attributes.get(name)) else OrderedDict()
        for name in _BACKWARD_HOOKS:
            if attributes.get(name) and not self._keeps_backward_hooks:
                self.unheard.append(path or type(module).__name__)
                attributes[name] = OrderedDict()
        if attributes.get("_compiled_call_impl") is not None:  # set by `module.compile()`
            attributes["_compiled_call_impl"] = None
        for kind in ("_parameters", "_buffers"):
            owned = attributes[kind]
            if owned:
                attributes[kind] = owned = owned.copy()
                for name, tensor in owned.items():
                    if tensor is not None:
                        self._slots.setdefault(id(tensor), []).append((owned, name))
            else:
                attributes[kind] = {}
        if attributes["_buffers"] and not isinstance(module, _NormBase):
            for name, buffer in attributes["_buffers"].items():
                if buffer is not None and buffer.numel() <= 1:  # a counter that `forward` moves in place
                    attributes["_buffers"][name] = buffer.clone()
        children = module._modules
        attributes["_modules"] = copies = type(children)()
        for name, child in children.items():
            below = None if path is None else f"{path}.{name}" if path else name
            copies[name] = None if child is None else self._copy(child, below)
        return copy

    def _rebind(self, original: nn.Module, copy: nn.Module) -> None:
        attributes = copy.__dict__
        hooked = attributes["_forward_hooks"] or attributes["_forward_pre_hooks"]
        if type(original).__module__ in _PLAIN_HOMES and not hooked and "forward" not in attributes:
            return
        for name, value in original.__dict__.items():
            if name in _SKIPPED or type(value) in _ATOMS:
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
        """Give `value` with every module in it, and every method bound to one, exchanged for its copy."""
        kind = type(value)
        if kind in _ATOMS:
            return value
        if isinstance(value, nn.Module):
            new = id(unwrapped(value)) not in self._copies
            copy = self._copy(value)
            if new and not is_scripted(unwrapped(value)):
                self._rebind(unwrapped(value), copy)
            return copy
        if kind is types.MethodType:
            if not isinstance(value.__self__, nn.Module):
                return value
            return types.MethodType(value.__func__, self._bound(value.__self__))
        if kind is partial:
            return partial(self._bound(value.func), *map(self._bound, value.args), **self._bound(value.keywords))
        if kind in (list, tuple, set):
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
        """Put the tensors of `params` in the place of the module's own; a tied weight under all its names."""
        given: dict[str, Tensor] = {}
        for part in params if isinstance(params, tuple) else (params,):
            given.update(part)
        placed: set[tuple[int, str]] = set()
        ties: list[tuple[list[tuple[dict[str, Any], str]], Tensor]] = []
        for name, tensor in given.items():
            owned, leaf = self._slot(name, tensor)
            if owned is None:
                continue
            slots = self._slots.get(id(owned[leaf]), ())
            if len(slots) > 1:
                ties.append((list(slots), tensor))
            owned[leaf] = tensor.clone() if tensor.is_inference() else tensor
            placed.add((id(owned), leaf))
        for slots, tensor in ties:
            for owned, leaf in slots:
                if (id(owned), leaf) not in placed:
                    owned[leaf] = tensor
                    placed.add((id(owned), leaf))
        for copy in self._copies.values():
            if self.has_scripted and is_scripted(copy):
                continue
            for owned in (copy._parameters, copy._buffers):  # what is left out is constant
                for name, tensor in owned.items():
                    if tensor is None or (id(owned), name) in placed:
                        continue
                    if tensor.requires_grad or tensor.is_inference():
                        owned[name] = tensor.clone() if tensor.is_inference() else tensor.detach()  # pyright: ignore
            names = copy.__dict__.get("_flat_weights_names")
            if names is not None:
                self._flatten(copy, names)

    @staticmethod
    def _flatten(layer: nn.Module, names: list[str]) -> None:
        """Recurrent layers keep a flat list of their weights beside `_parameters`."""
        weights = [getattr(layer, name, None) for name in names]
        layer.__dict__["_flat_weights"] = weights
        if "_flat_weight_refs" in layer.__dict__:
            layer.__dict__["_flat_weight_refs"] = [None if w is None else weakref.ref(w) for w in weights]

    def _slot(self, name: str, tensor: Tensor) -> tuple[dict[str, Any] | None, str]:
        path, _, leaf = name.rpartition(".")
        copy = self.of(path)
        if copy is not None and is_scripted(copy):
            own = dict(copy.named_parameters()) | dict(copy.named_buffers())
            if leaf in own and own[leaf].data_ptr() == tensor.data_ptr():
                return None, leaf
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


def nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, 3, 0.3)
    return "Names near it: " + ", ".join(f"`{n}`" for n in near) + "." if near else "It has none near that name."
