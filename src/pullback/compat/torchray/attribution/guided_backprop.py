r"""Guided backpropagation: rectifiers rectify what comes back, and pass it only where they passed what went forward.

    map = guided_backprop(model, x, target)

or, around a forward and backward of one's own, `GuidedBackpropContext`. The pure function is
`pullback.guided_backprop`, signed and per channel; it passes nothing where a rectifier's input is exactly 0, as torch's
own derivative does, while TorchRay, and this module, pass the gradient there.

.. math:: g \mapsto \max(g, 0) \cdot 1[x \ge 0]

Reference:
    Springenberg, Dosovitskiy, Brox & Riedmiller, Striving for Simplicity, 2015.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pullback._ops.dispatch import Table
from pullback.compat.torchray._arguments import ArgumentError
from pullback.compat.torchray.attribution.common import ReLUContext, relu_table, saliency
from pullback.rules._rectifiers import _Rectifier, variant

__all__ = ["GuidedBackpropContext", "GuidedBackpropReLU", "guided_backprop"]

_RULE = variant("guided_torchray")


class GuidedBackpropReLU(_Rectifier):
    """ReLU whose backward clamps what comes back at 0 and drops it where the input is negative. Call it by `apply`."""

    @classmethod
    def apply(cls, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _RULE(torch.relu, x)


class GuidedBackpropContext(ReLUContext):
    """A context in which every ReLU is a `GuidedBackpropReLU`."""

    def __init__(self) -> None:
        super().__init__(GuidedBackpropReLU)

    def table(self) -> Table:
        return relu_table(_RULE, "The rules of GuidedBackpropContext")

    _rules = table


def guided_backprop(
    *args: Any, context_builder: type[GuidedBackpropContext] = GuidedBackpropContext, **kwargs: Any
) -> Any:
    """Give the guided backpropagation map. Takes what `common.saliency` takes, but for `context_builder`."""
    if context_builder is not GuidedBackpropContext:
        raise ArgumentError("`context_builder` must be left out: guided backprop has its own, GuidedBackpropContext.")
    return saliency(*args, context_builder=context_builder, **kwargs)
