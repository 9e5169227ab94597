"""Call a model as a pure function, and pull cotangents back through the call.

`pullback` is the one wrapper on `torch.func.vjp`: every gradient-like method is `pull(cotangent(output, target))`.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any, TypeVar

import torch

from pullback._core.types import PullbackWarning
from pullback._torch.internals import (
    compiling,
)

# -- the door


F = TypeVar("F", bound=Callable[..., Any])
_scope = threading.local()


def public(function: F) -> F:
    """Make a public method of a function: it leaves inference mode, and tells what it has to tell once a call."""

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if compiling():
            return function(*args, **kwargs)
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            if getattr(_scope, "told", None) is not None:  # inside another method
                return function(*args, **kwargs)
            told: dict[str, dict[str, None]] = {}
            _scope.told = told
            try:
                result = function(*args, **kwargs)
            finally:
                _scope.told = None
            for message in told:
                warnings.warn(message, PullbackWarning, stacklevel=2)
            return result

    return called  # pyright: ignore[reportReturnType]


def tell(message: str) -> None:
    """Warn at the end of the call of the method that is running, once."""
    if compiling():
        return
    told = getattr(_scope, "told", None)
    if told is None:
        warnings.warn(message, PullbackWarning, stacklevel=3)
    else:
        told[message] = {}
