"""Which tensors of a run do not depend on its input.

Parameters, and what is computed from parameters alone, take no part in sharing relevance. A run keeps this account in
its memo, by the identity of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pullback._ops.spellings import Operation, canonical
from pullback._torch.internals import compiling

# -- what a run remembers of tensors


def remember(memo: dict[str, Any], kind: str, t: Tensor, value: Any) -> None:
    """Keep a value with a tensor, for the length of the run."""
    if compiling():  # a tensor that is traced has identity, but no id
        memo.setdefault(kind, []).append((t, value))
    else:
        memo.setdefault(kind, {})[id(t)] = (t, value)


def recall(memo: dict[str, Any], kind: str, t: Tensor) -> Any:
    """Give the value that was kept with a tensor, or None."""
    if compiling():
        for known, value in memo.get(kind, ()):
            if known is t:
                return value
        return None
    return memo.get(kind, {}).get(id(t), (None, None))[1]


def version(t: Tensor) -> int:
    """Count the writes to a tensor; a traced one is not written to by this count."""
    return 0 if compiling() else t._version


def tensors_in(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    found = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    for group in args:
        if isinstance(group, list | tuple):
            found += [t for t in group if isinstance(t, Tensor)]
    return found


_WITHOUT_DERIVATIVE = frozenset(
    "detach sign sgn round floor ceil trunc heaviside zeros_like ones_like full_like empty_like rand_like randn_like "
    "new_zeros new_ones new_full new_empty new_tensor".split()
)


def watch_constants(memo: dict[str, Any], func: Operation, args: tuple[Any, ...], kwargs: Any, result: Any) -> None:
    """Keep account of the tensors that are computed from parameters alone: they take no part in sharing relevance."""
    fixed = canonical(func) is not F.embedding and constants_only(args, kwargs, memo)
    if fixed or getattr(func, "__name__", "") in _WITHOUT_DERIVATIVE:
        for value in result if isinstance(result, list | tuple) else (result,):
            if isinstance(value, Tensor) and value.is_floating_point():
                mark_constant(value, memo)
        return
    name = getattr(func, "__name__", "")
    if args and isinstance(args[0], Tensor) and (name == "__setitem__" or (name[-1:] == "_" and name[:2] != "__")):
        remember(memo, "constants", args[0], False)  # what depends on the input was written to it


def is_constant(t: Any, memo: dict[str, Any]) -> bool:
    """Say whether a tensor does not depend on the input, or has no relevance because it is no floating-point number."""
    if not isinstance(t, Tensor) or isinstance(t, torch.nn.Parameter) or not t.is_floating_point():
        return True
    return bool(recall(memo, "constants", t))


def constants_only(args: Sequence[Any], kwargs: dict[str, Any], memo: dict[str, Any]) -> bool:
    """Say whether an operation takes in nothing that depends on the input."""
    return all(is_constant(t, memo) for t in tensors_in(args, kwargs))


def mark_constant(t: Tensor, memo: dict[str, Any]) -> Tensor:
    remember(memo, "constants", t, True)
    return t


class Remembering:
    """A rule that reads the memo of the run."""

    wants_memo = True

    def __init__(self, rule: Callable[..., Any]) -> None:
        self.rule = rule

    def __call__(self, operation: Operation, *args: Any, memo: dict[str, Any], **kwargs: Any) -> Any:
        return self.rule(operation, *args, memo=memo, **kwargs)
