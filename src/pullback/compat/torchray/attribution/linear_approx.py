r"""Linear approximation: activation times gradient, summed over channels.

    map = linear_approx(model, x, target, saliency_layer="features.29")

or, around a forward and backward of one's own, ``gradient_to_linear_approx_saliency(probe.data[0])``. The pure function
is `pullback.linear_approx`.

.. math:: m = \sum_c x_c \, \frac{\partial y_t}{\partial x_c}

Reference:
    Kindermans, Schütt, Müller & Dähne, Investigating the Influence of Noise and Distractors, 2016.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pullback import maps
from pullback.compat.torchray.attribution.common import gradient_of, saliency

__all__ = ["gradient_to_linear_approx_saliency", "linear_approx"]


def gradient_to_linear_approx_saliency(x: Tensor) -> Tensor:
    """Multiply `x` by ``x.grad`` and sum over channels. Signed."""
    gradient = gradient_of(x)
    with torch.no_grad():
        return maps.weighted_sum(x, gradient)


def linear_approx(
    *args: Any, gradient_to_saliency: Callable[[Tensor], Tensor] = gradient_to_linear_approx_saliency, **kwargs: Any
) -> Any:
    """Give the linear approximation. Takes what `common.saliency` takes."""
    return saliency(*args, gradient_to_saliency=gradient_to_saliency, **kwargs)
