"""Checks of arguments that several methods take."""

from __future__ import annotations


def at_least(name: str, value: int, least: int = 1) -> None:
    """Raise where a count is too small."""
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")
