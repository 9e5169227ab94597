"""Integrated Hessians: how pairs of features act together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from pullback._core.batching import report
from pullback._core.call import Call, InputTree
from pullback._core.entry import method
from pullback._core.targets import score
from pullback._core.types import Inputs, Model, Output, Params, Progress, Target
from pullback._ops.dispatch import Table
from pullback._ops.norms import layer_norm
from pullback._torch.internals import eye
from pullback.attribution.paths._along import starts_of
from pullback.attribution.paths._quadrature import (
    quadrature_of,
)
from pullback.attribution.paths.integrated import integrated_gradients

# the third derivative of torch's own layer norm is wrong
_SMOOTH = Table.of({torch.nn.functional.layer_norm: lambda operation, *args, **kwargs: layer_norm(*args, **kwargs)})


@method("paths", "pairs", "one tensor", small={"steps": 2}, forwards=lambda o: 1 + o["steps"] ** 2, mechanism="formula")
def integrated_hessians(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    baseline: Any = None,
    steps: int = 8,
    chunk_size: int | None = None,
    progress: Progress = None,
    output: Output = None,
    method: Callable[..., Any] = integrated_gradients,
) -> Tensor:
    r"""Explain an explanation: integrated gradients of each entry of integrated gradients, the pairs' interactions.

    .. math:: \Gamma_{ij} = (x_j - b_j) \int_0^1 \partial_j \, a_i(b + \beta (x - b)) \, d\beta

    with the attribution :math:`a_i` that integrated gradients give. Symmetric; rows add up to the attribution, all of
    it to the difference in score, up to the error of the sums. Smooth activations are needed: a ReLU has no second
    derivative. Costs about ``steps**2`` second-order gradients a feature.

    Args:
        params, model, x, target, output: See `gradient`; `x` is one tensor.
        baseline, steps: See `integrated_gradients`; one baseline.
        chunk_size: Features whose row is pulled back together. All of them if omitted.
        progress: Called with (steps done, steps in all).
        method: What is explained: any attribution with the options `baseline`, `steps`, `rules`, `output` and `strict`.

    Returns:
        Interactions ``[batch *features *features]``, in units of the score.

    Raises:
        ValueError: If `steps` is less than 1.
        TypeError: If `x` is not one tensor.

    Example:
        >>> model = lambda params, x: x[:, 0] * x[:, 1]
        >>> h = integrated_hessians({}, model, torch.tensor([[3.0, 5.0]]), None)
        >>> torch.allclose(h[0], torch.tensor([[3.75, 3.75], [3.75, 3.75]]))
        True

    Reference:
        Janizek, Sturmfels & Lee, Explaining Explanations: Axiomatic Feature Interactions, 2021, eq. 5.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"`x` must be one tensor, got {type(x).__name__}.")
    nodes, weights = quadrature_of("gauss_legendre", steps)
    start = starts_of(InputTree(x), baseline)[0]
    score(
        Call.bind(params, model, x, output=output).forward(), target
    )  # finds an index that is no class: below it cannot be read
    rows = eye(x[0].numel(), x).reshape(-1, 1, *x.shape[1:])

    def row_slopes(place: Tensor) -> Tensor:
        def attribution(place: Tensor) -> Tensor:
            options = {"baseline": start, "steps": steps, "output": output}
            return method(params, model, place, target, rules=_SMOOTH, **options)

        a, pull = vjp(attribution, place)  # pyright: ignore[reportAssignmentType]
        return torch.vmap(lambda row: pull(row.expand_as(a))[0], chunk_size=chunk_size)(rows)

    total: Any = 0
    for done, (node, weight) in enumerate(zip(nodes, weights, strict=True), 1):
        total = total + weight * row_slopes(start + node * (x - start))
        report(progress, done, steps)
    interactions = ((x - start) * total).movedim(0, 1)
    return interactions.reshape(len(x), *x.shape[1:], *x.shape[1:])
