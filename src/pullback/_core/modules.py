"""Modules by name, with and without the wrappers around them, and their parameters."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

PARALLEL = nn.DataParallel, nn.parallel.DistributedDataParallel
set_plainly = object.__setattr__  # that of a module looks for parameters and submodules first


# Modules of these files are no wrappers, and their forward uses nothing but their parameters, buffers and submodules.
PLAIN_HOMES = frozenset(
    f"torch.nn.modules.{name}"
    for name in "activation batchnorm container conv dropout flatten linear normalization padding pooling".split()
)


def is_scripted(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside `torch.compile`, `DataParallel` and `DistributedDataParallel`."""
    while type(module).__module__ not in PLAIN_HOMES:
        if isinstance(module, PARALLEL):
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
        elif part not in ("module", "_orig_mod"):  # a wrapper that is no longer there
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


def nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, 3, 0.3)
    return "Names near it: " + ", ".join(f"`{n}`" for n in near) + "." if near else "It has none near that name."


def params_of(model: nn.Module) -> dict[str, Tensor]:
    """Collect parameters and floating-point buffers by name, detached.

    Wrappers (`torch.compile`, `DataParallel`) leave no trace in the names. Integer buffers stay with the model, so that
    `torch.func.grad` over the dict works.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
        >>> list(params_of(model))
        ['0.weight', '0.bias', '1.weight', '1.bias', '1.running_mean', '1.running_var']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for kind in ("_parameters", "_buffers"):
        for prefix, module in named_layers(model):
            if is_scripted(module):
                named = module.named_parameters() if kind == "_parameters" else module.named_buffers()
            else:
                named = getattr(module, kind).items()
            for name, tensor in named:
                if tensor is None or not (tensor.is_floating_point() or tensor.is_complex()):
                    continue
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[f"{prefix}.{name}" if prefix else name] = tensor.detach()
    return found
