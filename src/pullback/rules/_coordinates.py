r"""Relevance rules: what layer-wise relevance propagation does at an operation.

**Coordinates.** The relevance of a tensor `h` is carried as a cotangent `c` with :math:`R = h \odot c`. Then every
linear operation without parameters (reshape, concatenation, sum, mean, `+`, pooling, padding, interpolation, indexing,
multiplication by a constant) needs no rule: its ordinary derivative shares relevance out in proportion,
:math:`R_i = \frac{h_i w_i}{\sum_j h_j w_j} R`. Skips and reused tensors come out right because cotangents add up.
Relevance can also be put on an activation that is 0 (the z-box, flat and w-square rules do): zeros count as
:math:`10^{-12}` in these coordinates.

**A rule adds a zero.** With :math:`\hat h` the input as the pullback that is under way does not see it (a constant to
it, but differentiable to whoever differentiates the explanation),

.. math:: y = f(\hat h) + M(\hat h) \, (h - \hat h)

has the value of `f` and pulls cotangents back by the transpose of any linear map `M` that one likes. What `M` needs of
the forward, such as denominators, does not depend on the cotangent: it is computed once for all targets that are pulled
back together. `propagated` makes such a rule.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pullback._torch.internals import current_level, functorch

ZERO_STAND_IN = 1e-12


def _level() -> int:
    return current_level() or 0


_level._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]  # known while tracing


def stop_gradient(x: Tensor) -> Tensor:
    """Give `x` as a constant to the pullback that is under way, and to nobody else."""
    level = _level()
    return functorch._unwrap_for_grad(x, level) if level else x.detach()


def nonzero(x: Tensor) -> Tensor:
    """Count zeros as a tiny number, so that relevance on them has coordinates."""
    return torch.where(x == 0, max(ZERO_STAND_IN, torch.finfo(x.dtype).tiny), x)


def stabilised(z: Tensor, epsilon: float, sign: int = 0) -> Tensor:
    """Move `z` away from 0 by `epsilon`, the way of its `sign` where that is known; 0 itself counts as positive."""
    return z + sign * epsilon if sign else torch.where(z < 0, z - epsilon, z + epsilon)


def scaled(y: Tensor, factor: Tensor | float) -> Tensor:
    """Give `y`, whose cotangent is multiplied by a factor on the way back."""
    value = stop_gradient(y)
    return value + factor * (y - value)
