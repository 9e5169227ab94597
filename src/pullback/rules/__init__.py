"""Rules: what changes the backward pass, by operation.

`rules=` of a method takes

- a name: ``"guided"``, ``"deconvnet"``, ...;
- a table ``{operation: rule}``; a key ``(layer name pattern, operation)`` holds in those layers only, and wins. Any
  spelling of an operation names it: `torch.relu`, `torch.nn.functional.relu` and `torch.Tensor.relu_` are one;
- an `autograd.Function` in the place of ReLU, or a rule for all rectifiers.

A rule is called as ``rule(operation, *args, **kwargs)`` with the operation in its pure form, and returns what the
operation returns, or `NotImplemented` for a use that it does not cover.
"""

from pullback._ops.dispatch import Rule, Table
from pullback.rules._batch_norm import merged
from pullback.rules._composites import (
    attn_lrp,
    composed,
    cp_lrp,
    epsilon_alpha2_beta1,
    epsilon_alpha2_beta1_flat,
    epsilon_gamma_box,
    epsilon_plus,
    epsilon_plus_flat,
    excitation_table,
    excitation_torchray,
)
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
from pullback.rules._linear import LinearRule, Share, product
from pullback.rules._lrp import (
    alpha_beta,
    contrasted,
    epsilon,
    excitation,
    first,
    flat,
    gamma,
    last,
    norm,
    w_square,
    z_box,
    z_plus,
)
from pullback.rules._table import NAMED, Rules, from_function, rectifier_rules, table_of

__all__ = [
    # what `rules=` takes
    "Rules",
    "Rule",
    "Table",
    "NAMED",
    "table_of",
    # rectifiers
    "from_function",
    "rectifier_rules",
    # linear maps with parameters
    "epsilon",
    "z_plus",
    "alpha_beta",
    "gamma",
    "excitation",
    "contrasted",
    "z_box",
    "w_square",
    "flat",
    "norm",
    "first",
    "last",
    "LinearRule",
    "Share",
    # everything else
    "propagated",
    "passing",
    "derivative",
    "constant",
    "detached_statistics",
    "merged",
    "product",
    "quotient",
    "power",
    "gated",
    # whole tables
    "composed",
    "epsilon_plus",
    "epsilon_gamma_box",
    "epsilon_alpha2_beta1",
    "epsilon_plus_flat",
    "epsilon_alpha2_beta1_flat",
    "attn_lrp",
    "cp_lrp",
    "excitation_table",
    "excitation_torchray",
]
