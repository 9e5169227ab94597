"""The entry of every public method: what it is, and what happens around each call of it.

`method` declares a function to be a public method. Everything that lists methods (laws, evaluation, gallery, command
line) reads these declarations, so that a method is described in one place, beside its code.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Literal, TypeAlias, TypeVar

import torch

from pullback._core.types import PullbackWarning
from pullback._torch.internals import compiling

F = TypeVar("F", bound=Callable[..., Any])
_scope = threading.local()

Family: TypeAlias = Literal["gradients", "paths", "cam", "relevance", "attention", "perturbation", "regions", "metrics"]
Result: TypeAlias = Literal["attribution", "map", "pairs"]
Need: TypeAlias = Literal[
    "one tensor",  # `x` is a single tensor
    "one map",  # a map is of one input: `x` holds one floating-point tensor, or `layer` is named
    "floating input",  # `x` holds a floating-point tensor, also where `layer` is named
    "one embedding",  # what is explained is one tensor of embeddings
    "positions",  # the input has axes beside batch and channel
    "image",  # the input is an image of the size of `segments`
    "positions at the layer",  # the layer's activation has axes beside batch and channel
    "pooled head",  # the network ends in pooling and a linear layer that reads the layer's channels
    "classes",  # the output is [batch class]
    "self-attention",  # the model computes attention weights
]
Mechanism: TypeAlias = Literal["own", "shared", "formula"]


@dataclass(frozen=True)
class Declaration:
    """What the lists of methods need to know of one.

    Attributes:
        family: Where it is listed.
        result: ``"attribution"`` has the structure of `x`, ``"map"`` is ``[batch 1 ...]``, ``"pairs"`` is neither.
        needs: What it needs of the model and its input; elsewhere it raises.
        small: Options that keep a call small enough for a test or a demonstration.
        forwards: How many times a call runs the model: from its options, and where it counts from the number of
            ``"channels"`` of the layer, ``"features"``, ``"cells"``, ``"windows"`` or ``"examples"`` to compare with.
        reads: How many times more, to read a layer.
        adaptive: How many of the forwards depend on the target.
        rectifiers: It changes the backward of rectifiers, and must warn of activations that its rules do not cover.
        mechanism: ``"own"`` has a mechanism of its own, which is tested on every model; ``"shared"`` uses those of
            others; ``"formula"`` is a formula over them.
    """

    family: Family
    result: Result = "attribution"
    needs: frozenset[Need] = frozenset()
    small: Mapping[str, Any] = field(default_factory=dict)
    forwards: Callable[[Mapping[str, Any]], int] = lambda options: 1
    reads: int = 0
    adaptive: Callable[[Mapping[str, Any]], int] = lambda options: 0
    rectifiers: bool = False
    mechanism: Mechanism = "shared"


def method(
    family: Family,
    result: Result = "attribution",
    *needs: Need,
    small: Mapping[str, Any] | None = None,
    forwards: Callable[[Mapping[str, Any]], int] | int = 1,
    reads: int = 0,
    adaptive: Callable[[Mapping[str, Any]], int] | int = 0,
    rectifiers: bool = False,
    mechanism: Mechanism = "shared",
) -> Callable[[F], F]:
    """Declare a function to be a public method: see `Declaration`."""
    declaration = Declaration(
        family,
        result,
        frozenset(needs),
        dict(small or {}),
        forwards if callable(forwards) else lambda options: forwards,
        reads,
        adaptive if callable(adaptive) else lambda options: adaptive,
        rectifiers,
        mechanism,
    )

    def declare(function: F) -> F:
        called = public(function)
        called.declaration = declaration  # pyright: ignore[reportFunctionMemberAccess]
        return called

    return declare


def declaration_of(function: Callable[..., Any]) -> Declaration | None:
    """Return the declaration of a public method; `None` for other functions."""
    return getattr(function, "declaration", None)


def public(function: F) -> F:
    """Make a function leave inference mode, and warn at the end of a call, once for each message."""

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if compiling():
            return function(*args, **kwargs)
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            if getattr(_scope, "messages", None) is not None:  # inside another method
                return function(*args, **kwargs)
            messages: dict[str, None] = {}
            _scope.messages = messages
            try:
                result = function(*args, **kwargs)
            finally:
                _scope.messages = None
            for message in messages:
                warnings.warn(message, PullbackWarning, stacklevel=2)
            return result

    return called  # pyright: ignore[reportReturnType]


def warn_once(message: str) -> None:
    """Warn at the end of the method that is running, once."""
    if compiling():
        return
    messages = getattr(_scope, "messages", None)
    if messages is None:
        warnings.warn(message, PullbackWarning, stacklevel=3)
    else:
        messages[message] = None
