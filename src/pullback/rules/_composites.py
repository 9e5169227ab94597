"""Tables of rules: which rule belongs to which operation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from pullback._ops.dispatch import Rule
from pullback._ops.reading import (
    BILINEAR,
    CONVOLUTIONS,
    LINEAR,
    PRODUCTS,
    SUMMED_PRODUCTS,
    TRANSPOSED,
)
from pullback._ops.spellings import ACTIVATIONS, FUNCTIONS, canonical
from pullback.rules._batch_norm import merged
from pullback.rules._elementwise import (
    constant,
    derivative,
    detached_statistics,
    gated,
    passing,
    power,
    propagated,
    quotient,
)
from pullback.rules._linear import product
from pullback.rules._lrp import alpha_beta, epsilon, excitation, first, flat, gamma, norm, z_box, z_plus

# -- relevance: tables

_ELEMENTWISE = tuple(
    canonical(getattr(torch if hasattr(torch, name) else F, name))
    for name in [*ACTIVATIONS, *FUNCTIONS, *"clamp clamp_min clamp_max normalize".split()]
    if name not in ("glu", "rsqrt", "reciprocal")
)
_NORMS = tuple(
    canonical(getattr(F, name))
    for name in "layer_norm group_norm instance_norm rms_norm".split()
    if hasattr(F, name)  # the last is newer than the oldest torch
)
_POOLING = tuple(canonical(getattr(F, f"{kind}avg_pool{n}d")) for kind in ("", "adaptive_") for n in (1, 2, 3))
_OTHERS = (
    *(torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu, torch.softmax, torch.log_softmax, F.softmin, torch.pow),
    *(torch.prod, torch.cumprod, torch.tensordot, torch.addmv, torch.addbmm, torch.addcmul, torch.addcdiv, torch.lerp),
    *(
        torch.logsumexp,
        torch.logcumsumexp,
        torch.logaddexp,
        torch.atan2,
        torch.xlogy,
        torch.cdist,
        torch.linalg.multi_dot,
    ),
    *(F.cosine_similarity, F.glu, F.bilinear, F.batch_norm, F.local_response_norm, F.lp_pool1d, F.lp_pool2d),
)
_SCALES = (torch.rsqrt, torch.reciprocal, torch.var, torch.std)
# what is not piecewise linear, or has parameters: told where a table of relevance rules does not cover it
MUST_COVER = frozenset(
    map(
        canonical,
        (*_ELEMENTWISE, *_NORMS, *_OTHERS, *_SCALES, *PRODUCTS, *SUMMED_PRODUCTS, *BILINEAR, *LINEAR, torch.div),
    )
)

MUST_COVER -= {canonical(torch.relu), canonical(torch.abs)}


def composed(linear: Rule, convolution: Rule | None = None, *, zeros: bool = False) -> dict[Any, Rule]:
    """Give the table of a composite: a rule for linear layers, one for convolutions, and what belongs around them.

    Batch norm is merged, the scale of other norms is a constant, activations pass relevance on, products share it
    equally, attention weights are expanded (AttnLRP). It is a plain dict: change or add what you like. `zeros` says
    that `linear` or `convolution` puts relevance on activations that are 0, which rectifiers then must pass on.
    """
    table: dict[Any, Rule] = dict.fromkeys(_ELEMENTWISE, passing())
    table |= dict.fromkeys(_NORMS, detached_statistics())
    table |= dict.fromkeys((*PRODUCTS, *SUMMED_PRODUCTS, F.linear), linear)
    table |= dict.fromkeys((*CONVOLUTIONS, *TRANSPOSED), convolution or linear)
    table |= dict.fromkeys(_SCALES, constant())
    table |= dict.fromkeys(BILINEAR, product())
    table |= {
        torch.pow: power(),
        F.batch_norm: merged(),
        F.instance_norm: merged(),
        F.glu: gated(),
        torch.div: quotient(),
    }
    table |= {torch.softmax: derivative()}
    if not zeros:
        for rectifier in (torch.relu, torch.abs):
            del table[canonical(rectifier)]
    return table


def excitation_table() -> dict[Any, Rule]:
    """Give the table of excitation backprop: norms and activations pass on, attention weights are constants."""
    table: dict[Any, Rule] = dict.fromkeys((*_ELEMENTWISE, *_NORMS, F.batch_norm), passing())
    table |= dict.fromkeys((*LINEAR, *SUMMED_PRODUCTS, *PRODUCTS), excitation())
    table |= dict.fromkeys((*_SCALES, torch.softmax), constant())
    table |= dict.fromkeys(BILINEAR, product())
    return table | {torch.pow: power(), torch.div: quotient(), F.glu: gated()}


def excitation_torchray() -> dict[Any, Rule]:
    """Give TorchRay's table, by which the cotangent itself is relevance.

    ReLU, maximum pooling and `+` keep their derivatives: at a skip relevance is doubled.
    """
    table: dict[Any, Rule] = dict.fromkeys((F.linear, *CONVOLUTIONS), excitation(plain=True))
    table |= dict.fromkeys(_POOLING, norm(1e-20, plain=True))
    return table | {F.batch_norm: propagated(lambda y, x: torch.ones_like(x))}


def epsilon_plus(epsilon_: float = 1e-6) -> dict[Any, Rule]:
    """Give the composite of the epsilon rule for linear layers and z-plus for convolutions."""
    return composed(epsilon(epsilon_), z_plus())


def epsilon_gamma_box(low: Any, high: Any, epsilon_: float = 1e-6, gamma_: float = 0.25) -> dict[Any, Rule]:
    """Give the composite of epsilon for linear layers, gamma for convolutions, z-box for the first of them."""
    return composed(epsilon(epsilon_), first(z_box(low, high), gamma(gamma_)))


def epsilon_alpha2_beta1(epsilon_: float = 1e-6) -> dict[Any, Rule]:
    """Give the composite of epsilon for linear layers and alpha-beta (2, 1) for convolutions."""
    return composed(epsilon(epsilon_), alpha_beta(2.0, 1.0))


def epsilon_plus_flat(epsilon_: float = 1e-6) -> dict[Any, Rule]:
    """Give the composite `epsilon_plus` with the flat rule at the first linear map."""
    return composed(first(flat(), epsilon(epsilon_)), first(flat(), z_plus()))


def epsilon_alpha2_beta1_flat(epsilon_: float = 1e-6) -> dict[Any, Rule]:
    """Give the composite `epsilon_alpha2_beta1` with the flat rule at the first linear map."""
    return composed(first(flat(), epsilon(epsilon_)), first(flat(), alpha_beta(2.0, 1.0)))


def attn_lrp(epsilon_: float = 1e-6) -> dict[Any, Rule]:
    """Give the composite of Achtibat et al. (2024): epsilon, and the rules for attention that every composite has."""
    return composed(epsilon(epsilon_))


def cp_lrp(epsilon_: float = 1e-6, bias: bool = True) -> dict[Any, Rule]:
    """Give the composite of Ali et al. (2022): attention weights and scales of norms are constants.

    With ``bias=False`` it conserves relevance where norms have no bias.
    """
    return composed(epsilon(epsilon_, bias)) | {torch.softmax: constant()}
