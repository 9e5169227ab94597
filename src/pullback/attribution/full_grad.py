"""The gradient of everything: what the score owes to the input, and what to each bias on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from pullback import maps
from pullback._core.call import Call, InputTree
from pullback._core.entry import method
from pullback._core.targets import cotangent, score
from pullback._core.types import Inputs, Model, Output, Params, Target
from pullback._ops.accounting import Account
from pullback._ops.dispatch import Table
from pullback._ops.norms import layer_norm
from pullback._ops.replacements import REPLACEMENTS
from pullback._ops.spellings import ACTIVATIONS, Operation, canonical
from pullback._torch.levels import jvp

_CONVOLUTIONS = [getattr(F, f"{kind}{n}d") for kind in ("conv", "conv_transpose") for n in (1, 2, 3)]
_LAYER_NORM = canonical(F.layer_norm)
_NORMS = [F.batch_norm, F.instance_norm, F.layer_norm, F.group_norm]
_CURVED = [getattr(F, name) for name in ACTIVATIONS if name not in ("relu", "leaky_relu", "prelu", "rrelu")]
_CURVED += [torch.clamp, torch.clamp_min, torch.clamp_max, F.softmax, F.log_softmax, torch.softmax, torch.log_softmax]
_CURVED += [torch.pow, torch.square, torch.sqrt, torch.exp, torch.log]


@method("gradients", "map", "one tensor", "positions", forwards=2)
def full_grad(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    post: Callable[[Tensor], Tensor] = torch.abs,
    output: Output = None,
    return_info: bool = False,
) -> Any:
    r"""Join the gradient at the input and at every bias to one map.

    .. math:: f_t = \sum_i x_i \, \partial_i f_t + \sum_b b \, \partial_b f_t, \quad
              m = \sum_c \psi(x \odot \nabla_x f_t) + \sum_{b} \sum_c \psi(b \odot \nabla_b f_t)

    over all biases b, each at every position. The bias of any operation is what its output is more than its derivative
    times its input: that of a convolution, the shift of a normalisation, the height of a curved activation's tangent at
    0. :math:`\psi` takes the absolute value, scales to [0, 1] and resizes to the input. Biases without positions, such
    as those of the classifier, are in the sum and not in the map.

    The first equation holds exactly but for products of two activations (attention, gates) and constants that
    the model adds by hand. Costs 1 gradient and 1 forward.

    Args:
        params, model, x, target, output: See `gradient`; `x` is ``[batch channel ...]``.
        post: Taken of each share before it is scaled; `torch.relu` keeps what speaks for the target.
        return_info: Return ``(map, info)``, where ``info["input"]`` and ``info["biases"]`` are the shares of input and
            biases, and ``info["convergence_delta"]``, ``[batch]``, their sum less the score.

    Returns:
        Map ``[batch 1 ...]`` at the size of `x`, not negative with the default `post`.

    Raises:
        TypeError: If `x` is not one tensor with spatial axes.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
        >>> params, x = params_of(model), torch.randn(2, 3, 6, 6)
        >>> m, info = full_grad(params, model, x, 0, return_info=True)
        >>> torch.allclose(info["convergence_delta"], torch.zeros(2), atol=1e-5)
        True

    Reference:
        Srinivas & Fleuret, Full-Gradient Representation for Neural Network Visualization, 2019, sec. 3 and 4.
    """
    if not isinstance(x, Tensor) or x.ndim < 3:
        raise TypeError(f"`x` must be one tensor with spatial axes, [batch channel ...], got {_shape(x)}.")
    seen: list[Tensor] = []
    call = Call.bind(params, model, x, rules=_biases(seen, None), output=output)
    call.forward()
    zeros = [torch.zeros((), dtype=b.dtype, device=b.device).expand(b.shape) for b in seen]

    def forward(account: Account | None, x: Tensor, *deltas: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        met: list[Tensor] = []
        y = replace(call, x=InputTree(x), rules=_biases(met, deltas)).forward(account=account)
        return y, tuple(met)

    (y, *_), pull, biases = call.linearise(forward, [x, *zeros])
    slope, *slopes = pull(cotangent(y, target))
    shares = [x * slope, *(b * g for b, g in zip(biases, slopes, strict=True))]
    placed = [s for s in shares if s.ndim == x.ndim and s.shape[0] == x.shape[0]]
    map = sum(maps.resize(maps.channel_sum(maps.normalise(post(s))), x.shape[2:]) for s in placed)
    if not return_info:
        return map
    gap = sum(s.reshape(x.shape[0], -1).sum(1) for s in shares) - score(y, target)
    return map, {"input": shares[0], "biases": shares[1:], "convergence_delta": gap}


def _shape(x: Any) -> str:
    return str(list(x.shape)) if isinstance(x, Tensor) else type(x).__name__


Noted: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"


def _biases(met: list[Tensor], deltas: Sequence[Tensor] | None) -> Table:
    """Give rules that note the bias of each operation, as large as its output, and add `deltas` to the outputs."""

    def noted(y: Tensor, bias: Tensor) -> Tensor:
        place = len(met)
        met.append(bias.expand_as(y))
        return y if deltas is None else y + deltas[place]

    rules = {F.linear: _of_affine(noted, 0)}
    rules |= {operation: _of_affine(noted, int(operation.__name__[-2])) for operation in _CONVOLUTIONS}
    rules |= dict.fromkeys([*_NORMS, *_CURVED], _of_curved(noted))
    return Table.of(rules, name="The biases")


def _of_affine(noted: Noted, axes: int) -> Callable[..., Tensor]:
    """Note the bias of a linear map or a convolution over so many axes."""

    def rule(
        operation: Operation, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        y = operation(input, weight, bias, *args, **kwargs)
        return y if bias is None else noted(y, bias.reshape(-1, *[1] * axes))

    return rule


def _of_curved(noted: Noted) -> Callable[..., Tensor]:
    """Note what an operation puts out above its derivative times its input."""

    def rule(operation: Operation, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        form = REPLACEMENTS.get(operation)

        def function(input: Tensor) -> Tensor:
            if operation is _LAYER_NORM:
                return layer_norm(input, *args, **kwargs)
            return operation(input, *args, **kwargs) if form is None else form(None, operation, input, *args, **kwargs)

        y, *linear = jvp(function, (input,), (input,))
        return noted(y, y - linear[0])

    return rule
