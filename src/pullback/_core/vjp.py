"""Run a model once and be ready to pull cotangents back through that run.

Every gradient-like method is ``pull(cotangent(output, target))``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import vjp

from pullback._core.forward import run
from pullback._core.inputs import InputTree
from pullback._core.layers import LayerShape, Site
from pullback._core.many.pulls import shared_pull
from pullback._core.many.shortcuts import shortcuts
from pullback._core.many.state import only_targets
from pullback._core.shapes import layer_shapes
from pullback._core.types import Back, Inputs, Model, Params, Pull, Select
from pullback._ops.dispatch import Table
from pullback._torch.internals import (
    compiling,
    current_level,
    is_functorch_wrapped_tensor,
    outside_transforms,
    pulled_back,
)

# -- one pullback


class Pulled(NamedTuple):
    """A forward with its way back.

    `activations`: what the derivative is taken at: the tensors of `x`, or the layer's activation, one a call.
    `pull(cotangent, reduce)`: their cotangents, as a tuple, or what `reduce` makes of them.
    `rebuild`: gives a tuple of such tensors the structure of `x`, or of the activation.
    """

    output: Tensor
    activations: tuple[Tensor, ...]
    pull: Pull
    rebuild: Callable[[Sequence[Tensor]], Any]


def pullback(
    params: Params,
    model: Model,
    x: Inputs,
    *,
    layer: str = "",
    at: str = "output",
    output: Select = None,
    table: Table | None = None,
    strict: bool = False,
    given: Sequence[Tensor] | None = None,
) -> Pulled:
    """Run the model once, and be ready to pull cotangents of its output back to `x` or to a layer.

    For a layer, the derivative is taken with respect to a zero added to its activation: the backward pass stops there,
    what comes before records no graph, and each call of a layer that is called several times has its own zero.
    `given` takes the place of the tensors of `x`, or of the layer's activations.
    """
    site = Site.parse(layer, at)
    if site.name:
        return _pullback_to_layer(params, model, x, site, output, table, strict, given)
    tree = InputTree(x)
    if not tree.floating:
        raise TypeError(
            "`x` holds no floating-point tensor to explain. Name a `layer`, such as the embedding, or cast `x`."
        )

    def forward(*tensors: Tensor) -> tuple[tuple[Tensor, ...], tuple[()]]:
        y = run(params, model, tree.rebuild(tensors, lambda v: v), output=output, table=table, strict=strict)
        return (y, *shortcuts()), ()

    tensors = tree.tensors if given is None else tuple(given)
    outputs, back, _ = linearised(forward, tensors, _is_plain(params, model, tree, tensors, output))
    return Pulled(
        outputs[0],
        tensors,
        shared_pull(back, outputs, tensors),
        lambda tensors: tree.rebuild(tensors, lambda v: None),
    )


def _is_plain(params: Params, model: Model, tree: InputTree, primals: Sequence[Tensor], output: Select) -> bool:
    """Say whether nothing differentiates, batches or traces this call from outside.

    The `vmap` of `over_targets` does not count where the forward cannot depend on a target: it then runs outside.
    """
    if compiling() or forward_ad._current_level >= 0:
        return False
    parts = params if isinstance(params, tuple) else (params,)
    tensors = [t for part in parts for t in part.values()]
    tensors += (*(t for _, t in tree.items if t is not None), *primals)
    if current_level() is not None:
        pure = isinstance(model, nn.Module) and not callable(output)
        if not (pure and only_targets()) or any(is_functorch_wrapped_tensor(t) for t in tensors):
            return False
    return not (torch.is_grad_enabled() and any([t.requires_grad for t in tensors]))  # noqa: C419 (faster)


def linearised(
    function: Callable[..., tuple[tuple[Tensor, ...], tuple[Tensor, ...]]], primals: Sequence[Tensor], plain: bool
) -> tuple[tuple[Tensor, ...], Back, tuple[Tensor, ...]]:
    """Give outputs, pull and auxiliary tensors: `torch.func.vjp`, or `torch.autograd` where no transform is at work.

    They give the same; a call of torch.func costs some 10 microseconds an operation more. `None` is a cotangent of 0.
    """
    if not plain:
        return _by_vjp(function, primals)
    try:
        with nullcontext() if current_level() is None else outside_transforms(), torch.enable_grad():
            tree = [(p.clone() if p.is_inference() else p.detach()).requires_grad_() for p in primals]
            outputs, auxiliary = function(*tree)
    except RuntimeError as error:
        if current_level() is None or "vmap" not in str(error):
            raise
        return _by_vjp(function, primals)  # a rule holds the target

    def pull(cotangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        reached = [(y, c) for y, c in zip(outputs, cotangents, strict=True) if c is not None and y.requires_grad]
        if not reached:  # nothing on the way to the output depends on the primals
            return tuple(torch.zeros_like(p) for p in tree)
        gradients = pulled_back([y for y, _ in reached], tree, [c for _, c in reached])
        return tuple(torch.zeros_like(p) if g is None else g for g, p in zip(gradients, tree, strict=True))

    return tuple(output.detach() for output in outputs), pull, tuple(a.detach() for a in auxiliary)


def _by_vjp(function: Callable[..., Any], primals: Sequence[Tensor]) -> tuple[Any, Back, Any]:
    outputs, back, auxiliary = vjp(function, *primals, has_aux=True)  # pyright: ignore[reportAssignmentType]

    def pull(cotangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        return back(tuple(torch.zeros_like(y) if c is None else c for y, c in zip(outputs, cotangents, strict=True)))

    return outputs, pull, auxiliary


class _ShapeChanged(Exception):
    """A layer put out something else than the probe had seen."""


def _pullback_to_layer(
    params: Params,
    model: Model,
    x: Inputs,
    site: Site,
    output: Select,
    table: Table | None,
    strict: bool,
    given: Sequence[Tensor] | None,
) -> Pulled:
    if not isinstance(model, nn.Module):
        raise ValueError("`layer` needs a torch.nn.Module, got a function as `model`: it has no named layers.")
    seen = layer_shapes(params, model, x, site)
    try:
        return _pullback_to_seen(params, model, x, site, seen, output, table, strict, given)
    except _ShapeChanged:
        seen = layer_shapes(params, model, x, site, real=True)
    try:
        return _pullback_to_seen(params, model, x, site, seen, output, table, strict, given)
    except _ShapeChanged:
        raise RuntimeError(f"`layer` names `{site}`, whose activation changes its shape from run to run.") from None


def _pullback_to_seen(
    params: Params,
    model: nn.Module,
    x: Inputs,
    site: Site,
    seen: tuple[LayerShape, ...],
    output: Select,
    table: Table | None,
    strict: bool,
    given: Sequence[Tensor] | None = None,
) -> Pulled:
    chosen = range(len(seen)) if site.call is None else [site.call]
    if not seen or (site.call is not None and site.call >= len(seen)):
        raise ValueError(f"`layer` names `{site}`, but a forward calls `{site.name}` {len(seen)} times.")
    device = next(t for _, t in InputTree(x).items if t is not None).device
    # a zero takes no memory until something is added to it
    zeros = [torch.zeros((), dtype=seen[i].dtype, device=device).expand(seen[i].shape) for i in chosen]

    def forward(*deltas: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        activations: dict[int, Tensor] = {}

        def edit(site: Site, call: int, activation: Tensor) -> Tensor:
            if call not in chosen:
                if site.call is None:
                    raise _ShapeChanged
                return activation
            delta = deltas[list(chosen).index(call)]
            if activation.shape != delta.shape:
                raise _ShapeChanged
            if not activation.is_floating_point() and not activation.is_complex():
                raise TypeError(f"`layer` names `{site}`, whose activation is {activation.dtype}, not floating point.")
            if given is not None:
                activation = given[list(chosen).index(call)].to(activation.device, activation.dtype)
            activations[call] = activation
            # an overload of aten: the rules do not see it
            return torch.ops.aten.add.Tensor(activation, delta.to(activation.device, activation.dtype))

        y = run(
            params, model, x, output=output, table=table, strict=strict, sites=(site,), edit=edit, seen={site: seen}
        )
        if len(activations) != len(chosen):
            raise _ShapeChanged
        return (y, *shortcuts()), tuple(activations[call] for call in chosen)

    plain = _is_plain(params, model, InputTree(x), (*zeros, *(given or ())), output)
    outputs, back, activations = linearised(forward, zeros, plain)

    def pull(cotangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        return tuple(g.to(a.dtype) for g, a in zip(back(cotangents), activations, strict=True))

    return Pulled(
        outputs[0], activations, shared_pull(pull, outputs, activations), lambda tensors: _sum_calls(tensors, site)
    )


def _sum_calls(tensors: Sequence[Tensor], site: Site) -> Tensor:
    """Sum over the calls of a layer: the derivative with respect to a change that all of them share."""
    if any(t.shape != tensors[0].shape for t in tensors):
        raise ValueError(
            f"`layer` names `{site}`, called {len(tensors)} times with activations of different shapes: "
            f"choose a call, `{site}#0` to `{site}#{len(tensors) - 1}`."
        )
    return sum(tensors[1:], tensors[0])
