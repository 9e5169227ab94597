r"""Deconvolutional networks: rectifiers rectify what comes back, whatever went forward.

    map = deconvnet(model, x, target)

or, around a forward and backward of one's own, `DeConvNetContext`. The pure function is `pullback.deconvnet`, signed
and per channel.

.. math:: g \mapsto \max(g, 0)

Reference:
    Zeiler & Fergus, Visualizing and Understanding Convolutional Networks, 2014.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pullback._ops.dispatch import Table
from pullback.compat.torchray._arguments import ArgumentError
from pullback.compat.torchray.attribution.common import ReLUContext, relu_table, saliency
from pullback.rules._rectifiers import _Rectifier, variant

__all__ = ["DeConvNetContext", "DeConvNetReLU", "deconvnet"]

_RULE = variant("deconvnet")


class DeConvNetReLU(_Rectifier):
    """ReLU whose backward clamps what comes back at 0. Call it by `apply`."""

    @classmethod
    def apply(cls, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _RULE(torch.relu, x)


class DeConvNetContext(ReLUContext):
    """A context in which every ReLU is a `DeConvNetReLU`."""

    def __init__(self) -> None:
        super().__init__(DeConvNetReLU)

    def table(self) -> Table:
        return relu_table(_RULE, "The rules of DeConvNetContext")

    _rules = table


def deconvnet(*args: Any, context_builder: type[DeConvNetContext] = DeConvNetContext, **kwargs: Any) -> Any:
    """Give the deconvnet map. Takes what `common.saliency` takes, but for `context_builder`."""
    if context_builder is not DeConvNetContext:
        raise ArgumentError("`context_builder` must be left out: deconvnet has its own, DeConvNetContext.")
    return saliency(*args, context_builder=context_builder, **kwargs)
