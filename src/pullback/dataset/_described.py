"""Say in JSON what results depend on: methods with their options, params, model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pullback._core.modules import params_of
from pullback._core.types import Model, Params


def described(value: Any) -> Any:
    """Describe an option: numbers and names as they are, tensors and functions without a name by a checksum.

    Two options that may give other results have other descriptions; the same option has the same in every process.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor | np.ndarray):
        tensor = torch.as_tensor(value)
        return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} {checksum({'': tensor})}"
    if isinstance(value, Mapping):
        return {str(described(k)): described(v) for k, v in value.items()}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes):
        members = [described(v) for v in value]
        return sorted(members, key=str) if isinstance(value, set | frozenset) else members
    if isinstance(value, partial):
        return described_method(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"class": named(type(value)), **described(fields)}
    if hasattr(value, "__qualname__"):
        return named(value)
    if isinstance(value, torch.dtype | torch.device | np.generic):
        return str(value)
    return {"class": named(type(value)), **described(getattr(value, "__dict__", {}))}


def described_method(method: Callable[..., Any]) -> dict[str, Any]:
    """Name the function, and the options that a `functools.partial` gives it."""
    options: dict[str, Any] = {}
    while isinstance(method, partial):
        if method.args:
            raise ValueError(
                "`method` must have its options by name: partial(method, steps=20), not partial(method, 20)."
            )
        options = {**method.keywords, **options}
        method = method.func
    return {"function": described(method), "options": {k: described(v) for k, v in sorted(options.items())}}


def named(function: Any) -> str:
    """Name a function or class by where it is found; one that is found nowhere also by a checksum of its code."""
    name = f"{getattr(function, '__module__', None) or 'builtins'}.{function.__qualname__}"
    if "<" in function.__qualname__ and (code := getattr(function, "__code__", None)) is not None:
        cells = [described(cell.cell_contents) for cell in function.__closure__ or ()]
        name += " " + digest(json.dumps([*_code(code), cells, described(function.__defaults__)]))
    return name


def _code(code: CodeType) -> list[Any]:
    constants = [_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return [code.co_code.hex(), list(code.co_names), constants]


def digest(*parts: str | bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part)
    return found.hexdigest()[:32]


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Add up names, shapes, dtypes and bytes, in the order of the names."""

    def parts() -> Iterable[str | bytes]:
        for name in sorted(tensors):
            tensor = tensors[name].detach().cpu().contiguous()
            yield f"{name} {list(tensor.shape)} {tensor.dtype}\n"
            yield tensor.reshape(-1).view(torch.uint8).numpy().tobytes()

    return digest(*parts())


def described_model(params: Params, model: Model) -> dict[str, str]:
    """Name the model, and add up what it is made of and the tensors that it runs with."""
    given = {k: v for part in (params if isinstance(params, tuple) else (params,)) for k, v in part.items()}
    if not isinstance(model, nn.Module):
        return {"model": described(model), "params": checksum(given)}
    others = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_floating_point()}
    tensors = {**others, **params_of(model), **given}
    return {"model": named(type(model)), "structure": digest(str(model)), "params": checksum(tensors)}


def differences(before: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> list[str]:
    """Name what is not the same in two descriptions."""
    found = []
    for key in dict.fromkeys([*before, *now]):
        a, b = before.get(key), now.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{path}{key}.")
        elif a != b:
            found.append(f"`{path}{key}` was {_short(a)} and is {_short(b)}")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
