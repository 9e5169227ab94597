"""DeepLIFT by the rescale rule, and its mean over baselines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pullback._core.batching import report
from pullback._core.call import Call, InputTree
from pullback._core.entry import method
from pullback._core.inputs import each
from pullback._core.targets import cotangent
from pullback._core.types import Inputs, Layer, Model, Output, Params, Progress, Target
from pullback.rules._secants import Tape, paired, recording

# -- DeepLIFT


@method("relevance", forwards=2, mechanism="own")
def deep_lift(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    baseline: Any = None,
    layer: str | Layer = "",
    output: Output = None,
) -> Any:
    r"""Share out the difference in score between the input and a baseline, by the rescale rule.

    .. math:: C_i = m_i \, (x_i - b_i), \quad m = \frac{f(x) - f(b)}{x - b} \text{ at each nonlinearity}

    The model runs on `baseline`, then on `x`; each nonlinearity, wherever it is called, pairs its two inputs and hands
    the secant back in place of the derivative. Products take the mean of the other factor, softmax and norms are
    made of elementwise steps and products, maximum pooling shares its difference between the two maxima: so
    attributions add up to the difference in score, skips, reuse and attention included. Costs 1 gradient and 1 forward.

    The reveal-cancel rule of sec. 3.5.3 is not offered. It gives each nonlinearity two multipliers, for the positive
    and for the negative part of the difference that enters, and defines these parts for an affine function alone, by
    the terms of its sum. After a skip, pooling, a product or a norm there are no such terms, or others for every way of
    writing the same function, so it would be the rescale rule in one half of a network and not in the other.

    What selects by values of the input other than those operations (`torch.where` with a condition that differs between
    `x` and `baseline`, indexing by a sort of one's own) is taken as selected at `x`, and what has no derivative
    (`sign`, `round`, `detach`) for a constant.

    Args:
        params, model, x, target, layer, output: See `gradient`. A function as `target` must be linear.
        baseline: With the structure of `x`, broadcast to it. Zeros if omitted; for integer inputs it must be given.

    Returns:
        Attribution, signed, shaped like `x` or the activation, in units of the score.

    Raises:
        ValueError: If `baseline` does not broadcast to `x`, or the model takes another path on it.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
        >>> params, x = params_of(model), torch.randn(5, 3)
        >>> a = deep_lift(params, model, x, target=0)
        >>> torch.allclose(a.sum(1), model(x)[:, 0] - model(0 * x)[:, 0], atol=1e-5)
        True

    Reference:
        Shrikumar, Greenside & Kundaje, Learning Important Features Through Propagating Activation Differences, 2017,
        sec. 3.5.1.
    """
    tape: Tape = []
    start = Call.bind(params, model, _start(InputTree(x), baseline), layer, recording(tape), output)
    before = _recorded(start)
    call = Call.bind(params, model, x, layer, paired(tape), output)
    pulled = call.pullback()
    multipliers = pulled.pull(cotangent(pulled.output, target))
    parts = zip(pulled.activations, before, multipliers, strict=True)
    return call.like([(a - b) * m for a, b, m in parts])


def _recorded(call: Call) -> tuple[Tensor, ...]:
    """Run the model by rules that record what goes into its operations; return the activations of the call's layer."""
    if call.layer is None:
        call.forward()
        return call.x.tensors
    read: list[Tensor] = []

    def edit(layer: Layer, number: int, tensor: Tensor) -> Tensor:
        if layer.call in (None, number):
            read.append(tensor.clone())
        return torch.ops.aten.clone.default(tensor)  # new to the rules, as what the second run adds to is

    call.forward(edit, {call.layer: ()})
    return tuple(read)


def _start(tree: InputTree, baseline: Any) -> Any:
    """Give the baseline with the structure and the size of `x`; integer members that it has not are those of `x`."""
    if baseline is None:
        if not tree.floating:
            raise ValueError("`baseline` must be given where `x` holds no floating-point tensor: other tokens, say.")
        return tree.rebuild([torch.zeros_like(t) for t in tree.tensors], lambda v: v)
    if isinstance(tree.x, Tensor):
        given = {None: baseline}
    elif isinstance(baseline, dict):
        given = baseline
    else:
        given = dict(enumerate(baseline))
    starts: dict[Any, Any] = {}
    for key, value in tree.items:
        start = given.get(key)
        if value is None or (start is None and key not in tree.floating):
            starts[key] = value
            continue
        start = torch.as_tensor(0 if start is None else start, dtype=value.dtype, device=value.device)
        try:
            starts[key] = start.expand_as(value)
        except RuntimeError:
            raise ValueError(
                f"`baseline` must broadcast to `x`, {list(value.shape)}, got {list(start.shape)}."
            ) from None
    if isinstance(tree.x, Tensor):
        return starts[None]
    return tuple(starts.values()) if isinstance(tree.x, tuple) else starts


@method("relevance", forwards=lambda o: 2 * o["examples"])
def deep_lift_shap(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    baselines: Any,
    layer: str | Layer = "",
    progress: Progress = None,
    output: Output = None,
) -> Any:
    r"""Average DeepLIFT over baselines: an estimate of Shapley values of the inputs.

    .. math:: a = \frac{1}{K} \sum_{k=1}^K C(x, b_k)

    Attributions add up to the score less the mean score of the baselines. Costs a gradient and a forward a baseline.

    Args:
        params, model, x, target, layer, output: See `deep_lift`.
        baselines: With the structure of `x`: ``[sample ...]``, each of which is compared with every example.
        progress: Called with (baselines done, baselines in all).

    Returns:
        Attribution, signed, shaped like `x` or the activation, in units of the score.

    Raises:
        ValueError: If there are no baselines, or they do not broadcast to `x`.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> params, x, others = params_of(model), torch.randn(5, 3), torch.randn(7, 3)
        >>> a = deep_lift_shap(params, model, x, target=0, baselines=others)
        >>> torch.allclose(a.sum(1), model(x)[:, 0] - model(others)[:, 0].mean(), atol=1e-5)
        True

    Reference:
        Lundberg & Lee, A Unified Approach to Interpreting Model Predictions, 2017, sec. 4.2.
    """
    members = [b for _, b in InputTree(baselines).items if b is not None]
    counts = {len(b) for b in members}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"`baselines` must hold the same number of samples, at least 1, got {sorted(counts)}.")
    options = {"layer": layer, "output": output}
    total: Any = None
    for k in range(len(members[0])):
        one = each(lambda b: b[k], baselines)  # noqa: B023
        attribution = deep_lift(params, model, x, target, baseline=one, **options)
        total = attribution if total is None else each(torch.add, total, attribution)
        report(progress, k + 1, len(members[0]))
    return each(lambda a: a / len(members[0]), total)
