"""What every function of this package checks its arguments with."""

from __future__ import annotations


class ArgumentError(AssertionError, ValueError, TypeError):
    """An argument that does not fit. An `AssertionError` too: code written for TorchRay may catch that."""
