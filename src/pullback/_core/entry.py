"""The entry of every public method: it leaves inference mode, and warns at its end, once for each message."""

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
            if getattr(_scope, "messages", None) is not None:  # inside another method
                return function(*args, **kwargs)
            messages: dict[str, dict[str, None]] = {}
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
    """Warn at the end of the call of the method that is running, once."""
    if compiling():
        return
    messages = getattr(_scope, "messages", None)
    if messages is None:
        warnings.warn(message, PullbackWarning, stacklevel=3)
    else:
        messages[message] = {}
