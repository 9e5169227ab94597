"""What the command line says: problems that a user can mend, and lines on the terminal."""

from __future__ import annotations

import difflib
import importlib
import importlib.resources
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class Problem(Exception):
    """Something the user can mend; the message says what and how."""


def needed(extra: str, *modules: str) -> list[Any]:
    """Import what is optional; `extra` of this package brings it, or it is installed by its own name."""
    found = []
    for module in modules:
        try:
            found.append(importlib.import_module(module))
        except ModuleNotFoundError as error:
            package = f"'pullback[{extra}]'" if extra else module.partition(".")[0]
            raise Problem(f"this needs {error.name}: pip install {package}") from error
    return found


@contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Turn whatever fails in code that is not ours, such as a user's model, into a `Problem`."""
    try:
        yield
    except Problem:
        raise
    except Exception as error:
        raise Problem(f"{what}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=4, cutoff=0.5)
    return f"unknown {kind} {name!r}" + (f"; close to it: {', '.join(close)}" if close else "")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
