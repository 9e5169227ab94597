"""Relevance: the score, or a probability, shared out backwards from layer to layer.

The rules that do so are in `pullback.rules`. They catch operations, so they are right on any architecture without
preparation: skips, in-place additions, concatenation, shared layers, attention.

Layer-wise relevance propagation is covered by patents in some places: before you use it in a product, check.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp

from pullback import _secant
from pullback._batch import Progress, each, report
from pullback._call import (
    Inputs,
    Leaves,
    Model,
    Params,
    Pulled,
    Select,
    Target,
    activations_at,
    cotangent,
    public,
    pullback,
    run,
)
from pullback._relevance import LINEAR, Remembering, nonzero
from pullback._shell import named_layers, nearest
from pullback._taps import Site
from pullback._torch import compiling
from pullback.rules import Rules, contrasted, excitation, excitation_table, last, table_of


def _times_activation(pulled: Pulled, cotangents: Sequence[Tensor]) -> Any:
    """Give relevance: the activation times its cotangent, zeros counted as a tiny number as in the rules."""
    return pulled.rebuild([nonzero(a) * c for a, c in zip(pulled.activations, cotangents, strict=True)])


@public
def lrp(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    rules: Rules = "epsilon_plus",
    layer: str = "",
    at: str = "output",
    output: Select = None,
    strict: bool = False,
) -> Any:
    r"""Share out the score backwards, operation by operation, to the input or to a layer.

    .. math:: R_i = \sum_j \frac{q_{ji}}{\sum_k q_{jk}} R_j

    with contributions q that the rules define. Relevance adds up to the score where the rules conserve it: biases and
    the epsilon in denominators take their share unless a rule is made with ``bias=False``, which does harm where batch
    norm is merged: see `docs/relevance.md`. Costs 1 gradient with the epsilon rule, and with others, at each linear
    map, one more forward and backward for each kind of contribution that they tell apart; under `vmap` over targets the
    forwards are shared.

    Args:
        params, model, x, target, layer, at, output: See `gradient`.
        rules: The name of a composite (``"epsilon"``, ``"epsilon_plus"``, ``"epsilon_alpha2_beta1"``, these two with
            ``"_flat"``, ``"attn_lrp"``, ``"cp_lrp"``, ``"excitation"``), or a table ``{operation: rule}``: see
            `pullback.rules`.
        strict: Raise where `rules` do not cover an operation that is not piecewise linear, instead of warning.

    Returns:
        Relevance, signed, shaped like `x` or the activation, in units of the score. Calls of a reused layer are summed.

    Raises:
        ValueError: If there are no such rules, or `strict` and they do not cover the model.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
        >>> params, x = params_of(model), torch.randn(5, 3)
        >>> r = lrp(params, model, x, 0, rules="epsilon")
        >>> torch.allclose(r.sum(1), model(x)[:, 0], atol=1e-4)
        True

    Reference:
        Bach, Binder, Montavon, Klauschen, Müller & Samek, On Pixel-Wise Explanations for Non-Linear Classifier
        Decisions by Layer-Wise Relevance Propagation, 2015, sec. 2.
    """
    pulled = pullback(params, model, x, layer=layer, at=at, output=output, table=table_of(rules), strict=strict)
    return _times_activation(pulled, pulled.pull(cotangent(pulled.output, target)))


@public
def relevance_flow(
    params: Params,
    model: nn.Module,
    x: Inputs,
    target: Target,
    *,
    layers: Sequence[str],
    rules: Rules = "epsilon_plus",
    output: Select = None,
    strict: bool = False,
) -> dict[str, Tensor]:
    """Sum the relevance of `lrp` at each of several layers, to see where it is lost or made.

    A total that stays that of the score is necessary, not enough: two errors at a branching may cancel, and a layer
    beside which a skip passes has but a part of the total. Costs one call of `lrp` for all layers.

    Args:
        params, model, x, target, output: See `gradient`.
        layers: Layer names; ``""`` is the input.
        rules, strict: See `lrp`.

    Returns:
        By layer, ``[batch]``: the sum over all of its activation, calls of a reused layer included.

    Raises:
        ValueError: If the model has no such layers.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False)).double()
        >>> params, x = params_of(model), torch.randn(5, 3).double()
        >>> flow = relevance_flow(params, model, x, 1, layers=("", "0", "1", "2"), rules="epsilon")
        >>> all(torch.allclose(total, model(x)[:, 1], rtol=1e-3) for total in flow.values())
        True
    """
    sites = {name: Site.parse(name, "output") for name in layers if name}
    seen = {site: activations_at(params, model, x, site) for site in sites.values()}
    zeros = {(s, i): torch.zeros(v.shape, dtype=v.dtype) for s, calls in seen.items() for i, v in enumerate(calls)}
    leaves = Leaves(x)

    def forward(inputs: tuple[Tensor, ...], added: dict[tuple[Site, int], Tensor]) -> tuple[Tensor, Any]:
        activations: dict[tuple[Site, int], Tensor] = {}

        def edit(site: Site, call: int, activation: Tensor) -> Tensor:
            if site.call not in (None, call):
                return activation
            activations[site, call] = activation
            return torch.ops.aten.add.Tensor(activation, added[site, call].to(activation.device, activation.dtype))

        options: dict[str, Any] = {"output": output, "table": table_of(rules), "strict": strict}
        given = leaves.rebuild(inputs, lambda v: v)
        return run(params, model, given, sites=tuple(seen), edit=edit, seen=seen, **options), activations

    y, pull, activations = vjp(forward, leaves.tensors, zeros, has_aux=True)  # pyright: ignore[reportAssignmentType]
    inputs, cotangents = pull(cotangent(y, target))
    found: dict[str, Tensor] = {}
    for name in layers:
        if name:
            parts = [(a, cotangents[at]) for at, a in activations.items() if at[0] == sites[name]]
        else:
            parts = list(zip(leaves.tensors, inputs, strict=True))
        found[name] = sum((nonzero(a) * c).flatten(1).sum(1) for a, c in parts)  # pyright: ignore[reportArgumentType]
    return found


@public
def excitation_backprop(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str = "",
    at: str = "output",
    output: Select = None,
    strict: bool = False,
) -> Any:
    r"""Share out a probability of 1 backwards, in proportion to positive contributions.

    .. math:: R_i = x_i \sum_j \frac{w_{ji}^+}{\sum_k w_{jk}^+ x_k} R_j

    A winner-take-all walk from the target to the input. It adds up to 1 for each example: at a skip and at a
    concatenation relevance is split in proportion, batch norm and activations hand it on. Where no weight into a unit
    is positive, its relevance ends. Where numbers of both signs are added, as at a skip, shares may be negative.

    Args:
        params, model, x, layer, at, output, strict: See `gradient`.
        target: See `gradient`; a cotangent is taken as the relevance of the output.

    Returns:
        Relevance, shaped like `x` or the activation. Sum it over channels for a map.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
        >>> params, x = params_of(model), torch.randn(2, 3, 6, 6)
        >>> r = excitation_backprop(params, model, x, target=0, layer="1")
        >>> torch.allclose(r.sum((1, 2, 3)), torch.ones(2), atol=1e-5)
        True

    Reference:
        Zhang, Lin, Brandt, Shen & Sclaroff, Top-down Neural Attention by Excitation Backprop, 2016, sec. 3.2.
    """
    table = table_of("excitation")
    pulled = pullback(params, model, x, layer=layer, at=at, output=output, table=table, strict=strict)
    return _times_activation(pulled, pulled.pull(_probability(pulled.output, target)))


def _probability(y: Tensor, target: Target) -> Tensor:
    """Give the cotangent whose relevance is the target's indicator."""
    return cotangent(y, target) / nonzero(y)


@public
def contrastive_excitation_backprop(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str = "",
    contrast_layer: str | None = None,
    classifier: str | None = None,
    at: str = "output",
    output: Select = None,
    strict: bool = False,
) -> Any:
    r"""Excitation backprop of the target less that of its opposite, a classifier with negated weights.

    .. math:: R = T (P - \bar P)

    with relevance P of the target and :math:`\bar P` of its opposite before the classifier, and T the way from there to
    `layer`. What all classes share cancels. T is linear, so the rule of the classifier hands on the difference, and one
    pass serves both. Costs 1 gradient with the rules of excitation backprop.

    Args:
        params, model, x, target, at, output, strict: See `excitation_backprop`.
        layer: Where relevance is wanted, before the classifier.
        contrast_layer: Where the paper compares target and opposite. As T is linear, the result is the same at every
            layer that all paths pass through: it need not be given.
        classifier: The layer whose weight is negated. The last linear layer or convolution if omitted.

    Returns:
        Relevance, signed, shaped like `x` or the activation.

    Raises:
        ValueError: If the model has no such layers, or the classifier is no linear layer or convolution.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> params, x = params_of(model), torch.randn(5, 3)
        >>> a = contrastive_excitation_backprop(params, model, x, 0, layer="1")
        >>> b = excitation_backprop(params, model, x, 0, layer="1")
        >>> bool((a <= b + 1e-6).all())
        True

    Reference:
        Zhang, Lin, Brandt, Shen & Sclaroff, Top-down Neural Attention by Excitation Backprop, 2016, sec. 3.3.
    """
    if not isinstance(model, nn.Module):
        raise TypeError("`model` must be a torch.nn.Module, whose classifier can be negated, got a function.")
    names = [name for name, _ in named_layers(model)]
    if contrast_layer is not None and Site.parse(contrast_layer, at).name not in names:
        raise ValueError(f"No layer `{contrast_layer}` in the model. {nearest(contrast_layer, names)}")
    by_itself = classifier is None and not compiling()
    if classifier is None:
        linear = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        classifier = next((n for n, layer in reversed([*named_layers(model)]) if isinstance(layer, linear)), None)
        if classifier is None:
            raise ValueError("`classifier` must be named: the model has no linear layer or convolution.")
    met: list[bool] = []

    def rule(*args: Any, **kwargs: Any) -> Any:
        met.append(True)
        return contrast(*args, **kwargs)

    def ending(*given: Any) -> Any:
        return (plain if met else contrast).shares(*given)  # pyright: ignore[reportOptionalCall]

    contrast, plain = contrasted(), excitation()
    chosen = excitation_table()
    if by_itself:  # where the classifier's forward is called past the layer, the last map is it
        chosen |= dict.fromkeys(LINEAR, last(replace(contrast, shares=ending), plain))
    table = table_of({**chosen, **{(classifier, operation): Remembering(rule) for operation in LINEAR}})
    pulled = pullback(params, model, x, layer=layer, at=at, output=output, table=table, strict=strict)
    if not met and not by_itself:
        raise ValueError(f"`classifier` must name a linear layer or a convolution that runs, got {classifier!r}.")
    return _times_activation(pulled, pulled.pull(_probability(pulled.output, target)))


# -- DeepLIFT


@public
def deep_lift(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    baseline: Any = None,
    layer: str = "",
    at: str = "output",
    output: Select = None,
    strict: bool = False,
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
        params, model, x, target, layer, at, output: See `gradient`. A function as `target` must be linear.
        baseline: With the structure of `x`, broadcast to it. Zeros if omitted; for integer inputs it must be given.
        strict: Raise where a nonlinear operation has no pair of inputs to take the secant of, instead of warning.

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
    leaves = Leaves(x)
    start = _start(leaves, baseline)
    tape: _secant.Tape = []
    before = _recorded(params, model, start, Site.parse(layer, at), output, tape)
    table = _secant.paired(tape)
    pulled = pullback(params, model, x, layer=layer, at=at, output=output, table=table, strict=strict)
    multipliers = pulled.pull(cotangent(pulled.output, target))
    parts = zip(pulled.activations, before, multipliers, strict=True)
    return pulled.rebuild([(a - b) * m for a, b, m in parts])


def _recorded(
    params: Params, model: Model, x: Inputs, site: Site, output: Select, tape: _secant.Tape
) -> tuple[Tensor, ...]:
    """Run the model, keep what goes into its nonlinear operations, and give the activations of a layer."""
    read: list[Tensor] = []

    def edit(at: Site, call: int, tensor: Tensor) -> Tensor:
        if site.call in (None, call):
            read.append(tensor.clone())
        return torch.ops.aten.clone.default(tensor)  # new to the rules, as what the second run adds to is

    sites = (site,) if site.name else ()
    run(params, model, x, output=output, table=_secant.recording(tape), sites=sites, edit=edit if site.name else None)
    return tuple(read) if site.name else Leaves(x).tensors


def _start(leaves: Leaves, baseline: Any) -> Any:
    """Give the baseline with the structure and the size of `x`; integer members that it has not are those of `x`."""
    if baseline is None:
        if not leaves.floating:
            raise ValueError("`baseline` must be given where `x` holds no floating-point tensor: other tokens, say.")
        return leaves.rebuild([torch.zeros_like(t) for t in leaves.tensors], lambda v: v)
    if isinstance(leaves.x, Tensor):
        given = {None: baseline}
    elif isinstance(baseline, dict):
        given = baseline
    else:
        given = dict(enumerate(baseline))
    starts: dict[Any, Any] = {}
    for key, value in leaves.items:
        start = given.get(key)
        if value is None or (start is None and key not in leaves.floating):
            starts[key] = value
            continue
        start = torch.as_tensor(0 if start is None else start, dtype=value.dtype, device=value.device)
        try:
            starts[key] = start.expand_as(value)
        except RuntimeError:
            raise ValueError(
                f"`baseline` must broadcast to `x`, {list(value.shape)}, got {list(start.shape)}."
            ) from None
    if isinstance(leaves.x, Tensor):
        return starts[None]
    return tuple(starts.values()) if isinstance(leaves.x, tuple) else starts


@public
def deep_lift_shap(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    baselines: Any,
    layer: str = "",
    at: str = "output",
    progress: Progress = None,
    output: Select = None,
    strict: bool = False,
) -> Any:
    r"""Average DeepLIFT over baselines: an estimate of Shapley values of the inputs.

    .. math:: a = \frac{1}{K} \sum_{k=1}^K C(x, b_k)

    Attributions add up to the score less the mean score of the baselines. Costs a gradient and a forward a baseline.

    Args:
        params, model, x, target, layer, at, output, strict: See `deep_lift`.
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
    members = [b for _, b in Leaves(baselines).items if b is not None]
    counts = {len(b) for b in members}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"`baselines` must hold the same number of samples, at least 1, got {sorted(counts)}.")
    options = {"layer": layer, "at": at, "output": output, "strict": strict}
    total: Any = None
    for k in range(len(members[0])):
        one = each(lambda b: b[k], baselines)  # noqa: B023
        attribution = deep_lift(params, model, x, target, baseline=one, **options)
        total = attribution if total is None else each(torch.add, total, attribution)
        report(progress, k + 1, len(members[0]))
    return each(lambda a: a / len(members[0]), total)
