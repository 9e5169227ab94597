r"""Grad-CAM: a layer's channels weighted by their mean gradient.

    map = grad_cam(model, x, target, saliency_layer="features.29")

or, around a forward and backward of one's own, ``gradient_to_grad_cam_saliency(probe.data[0])``. The pure function is
`pullback.grad_cam`.

.. math:: m = \max\Big(0, \sum_c \operatorname{mean}_p \Big(\frac{\partial y_t}{\partial x_{cp}}\Big) \, x_c\Big)

Reference:
    Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks, 2017.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pullback import maps
from pullback.compat.torchray._arguments import ArgumentError
from pullback.compat.torchray.attribution.common import gradient_of, saliency

__all__ = ["grad_cam", "gradient_to_grad_cam_saliency"]


def gradient_to_grad_cam_saliency(x: Tensor) -> Tensor:
    """Weight the channels of `x` by the mean of ``x.grad`` over positions, sum them, and clamp at 0. Not normalised."""
    gradient = gradient_of(x)
    if x.ndim != 4:
        raise ArgumentError(f"`x` must be the activation of a layer with positions, 4-D, got {list(x.shape)}.")
    with torch.no_grad():
        return maps.weighted_sum(x, gradient.mean((2, 3))).clamp(min=0)


def grad_cam(
    *args: Any,
    saliency_layer: str | nn.Module,
    gradient_to_saliency: Callable[[Tensor], Tensor] = gradient_to_grad_cam_saliency,
    **kwargs: Any,
) -> Any:
    """Give the Grad-CAM map. Takes what `common.saliency` takes; `saliency_layer` has no default."""
    return saliency(*args, saliency_layer=saliency_layer, gradient_to_saliency=gradient_to_saliency, **kwargs)
