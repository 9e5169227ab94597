"""The spellings of torch operations: which functions are one operation.

`nn.ReLU`, `F.relu`, `torch.relu`, `x.relu()` and `x.relu_()` all run the same operation. `canonical` gives the one
function that stands for all of them; it is the key of every table of rules.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

Operation = Callable[..., Any]

ACTIVATIONS = (
    "relu relu6 hardtanh threshold leaky_relu prelu rrelu elu selu celu gelu silu mish softplus softsign softshrink "
    "hardshrink tanhshrink logsigmoid tanh sigmoid hardsigmoid hardswish glu"
).split()

FUNCTIONS = (
    "exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal square abs erf erfc sin cos tan asin acos atan sinh "
    "cosh asinh acosh atanh sinc logit lgamma digamma"
).split()

_NAMES = (
    ACTIVATIONS
    + FUNCTIONS
    + (
        "clamp clamp_min clamp_max linear bilinear conv1d conv2d conv3d conv_transpose1d conv_transpose2d "
        "conv_transpose3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
        "adaptive_avg_pool3d max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d "
        "adaptive_max_pool3d lp_pool1d lp_pool2d batch_norm instance_norm layer_norm group_norm rms_norm "
        "local_response_norm normalize softmax log_softmax matmul mm bmm baddbmm addmm einsum add sub rsub mul div pow "
        "neg mean sum cat concat stack amax amin max min maximum minimum where "
        "embedding embedding_bag scaled_dot_product_attention multi_head_attention_forward interpolate pad dropout "
        "cumsum prod var std lstm gru rnn_tanh rnn_relu logsumexp logcumsumexp logaddexp softmin "
        "cumprod tensordot mv dot inner outer kron addmv addbmm addcmul addcdiv lerp atan2 hypot xlogy cdist norm "
        "vector_norm cosine_similarity pairwise_distance sort topk median quantile cummax multi_dot"
    ).split()
)

_ALIASES = {
    "clip": "clamp",
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "concat": "cat",
    "concatenate": "cat",
    "upsample": "interpolate",
    "negative": "neg",
    "__matmul__": "matmul",
    "__truediv__": "div",
    "__pow__": "pow",
    "__rsub__": "rsub",
    "expit": "sigmoid",
}
# the function of the same name in torch takes other arguments, or in another order
_ONLY_FUNCTIONAL = frozenset(
    "batch_norm instance_norm embedding embedding_bag max_pool1d max_pool2d max_pool3d adaptive_max_pool1d "
    "adaptive_max_pool2d adaptive_max_pool3d dropout".split()
)
_PREFIX = frozenset("max_pool1d max_pool2d max_pool3d".split())  # of these it takes the first ones
_NOT_IN_PLACE = {"max", "min", "mean", "sum", "linear", "prod", "var", "std", "stack", "cat"}


@dataclass(frozen=True)
class Spelling:
    """How a torch function spells an operation: its canonical form, and whether it writes to its first argument."""

    operation: Operation
    writes: bool = False
    flag: int | None = None  # position of an ``inplace`` argument
    name: str = ""  # of the operation; a compiled call cannot ask the operation itself

    def in_place(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if self.flag is None:
            return self.writes
        return bool(kwargs.get("inplace", args[self.flag] if len(args) > self.flag else False))


def _inplace_position(function: Operation) -> int | None:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # builtins have no flag
        return None
    return names.index("inplace") if "inplace" in names else None


def name_of(operation: Operation) -> str:
    return getattr(operation, "__name__", repr(operation))


def _spellings() -> dict[Operation, Spelling]:
    found: dict[Operation, Spelling] = {}
    homes = (torch, torch.Tensor, F, torch._C._nn, torch.special, torch.linalg)  # pyright: ignore[reportAttributeAccessIssue]
    for spelled in [*dict.fromkeys(_NAMES), *_ALIASES]:
        name = _ALIASES.get(spelled, spelled)
        functional = name in _ONLY_FUNCTIONAL
        named = [getattr(home, name, None) for home in ((F,) if functional else (torch, F, *homes))]
        canonical = next(filter(None, named), None)
        if canonical is None:  # newer than the torch that is here
            continue
        for home in (F, torch) if name in _PREFIX else (F,) if functional else homes:
            for attribute, writes in ((spelled, False), (spelled + "_", True)):
                function = getattr(home, attribute, None)
                if callable(function) and not (writes and spelled in _NOT_IN_PLACE):
                    found.setdefault(
                        function, Spelling(canonical, writes, _inplace_position(function), name_of(canonical))
                    )
    return found


SPELLINGS = _spellings()


def canonical(function: Operation) -> Operation:
    """Give the canonical form of a torch function: `F.relu`, `Tensor.relu_` and `torch.relu` are one operation."""
    spelling = SPELLINGS.get(function)
    return spelling.operation if spelling else function


def activations() -> frozenset[Operation]:
    """The pointwise nonlinearities, each in its canonical form."""
    return frozenset(canonical(getattr(F, name)) for name in ACTIVATIONS)
