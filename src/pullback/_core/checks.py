"""Explain by covering: run the model on many perturbed inputs, and account for the change of its score.

Costs are quoted in forwards. The perturbations do not depend on the target, so that under `vmap` over targets one
forward of each perturbed input serves all of them.
"""

from __future__ import annotations


def _positive(name: str, value: int, least: int = 1) -> None:
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")
