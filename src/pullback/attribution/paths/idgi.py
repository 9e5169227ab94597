"""IDGI: each step's change in score, shared out by the squared gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pullback._core.call import Call
from pullback._core.entry import method
from pullback._core.many.copies import copies
from pullback._core.types import ChunkSize, Inputs, Model, Output, Params, Progress, Target
from pullback.attribution.paths._along import ends_of
from pullback.attribution.paths._quadrature import (
    Path,
    on_path,
    stacked,
    straight,
)
from pullback.rules._table import Rules, table_of


@method("paths", small={"steps": 3}, forwards=lambda o: o["steps"] + 1, mechanism="formula")
def idgi(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    baseline: Any = None,
    steps: int = 50,
    path: Path = straight,
    chunk_size: ChunkSize = "auto",
    progress: Progress = None,
    rules: Rules = None,
    output: Output = None,
) -> Any:
    r"""Share out each step's change in score by the squared gradient: the part of a path that matters to the score.

    .. math:: a = \sum_k \frac{g_k \odot g_k}{\|g_k\|^2} \big(f(x_{k+1}) - f(x_k)\big), \quad g_k = \nabla f(x_k)

    The direction of each step is taken as that of the gradient, which leaves out the noise of directions that do not
    change the score. Adds up to the difference in score between the path's ends exactly, for any number of steps, where
    no gradient is zero. Costs `steps` gradients and a forward.

    Args:
        params, model, x, target, rules, output: See `gradient`.
        baseline, path, chunk_size, progress: See `integrated_gradients`; one baseline.
        steps: Equal steps of the path.

    Returns:
        Attribution, shaped like `x`, signed by the change of score alone, in units of the score.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> params, x = params_of(model), torch.ones(4, 3)
        >>> a = idgi(params, model, x, target=0, steps=3)
        >>> torch.allclose(a.sum(1), model(x)[:, 0] - model(0 * x)[:, 0], atol=1e-5)
        True

    Reference:
        Yang, Wang & Bilgic, IDGI: A Framework to Eliminate Explanation Noise from Integrated Gradients, 2023, sec. 4.
    """
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}.")
    call = Call.bind(params, model, x, "", table_of(rules), output)
    (start, *_), end = ends_of(call, baseline)
    total: list[Tensor] = []
    before: tuple[Tensor, list[Tensor]] | None = None  # score and shares of the last point of the chunk before
    for part in copies(steps + 1, chunk_size, end, progress):
        scores, slopes = call.at(stacked([on_path(path, start, end, k / steps) for k in part])[0]).scores_and_gradients(
            target
        )
        shares = _shares(slopes)
        if before is not None:
            scores = torch.cat([before[0], scores])
            shares = [torch.cat(pair) for pair in zip(before[1], shares, strict=True)]
        change = scores.diff(dim=0)
        moves = [(s[:-1] * change.reshape(*change.shape, *[1] * (s.ndim - 2))).sum(0) for s in shares]
        total = [a + b for a, b in zip(total, moves, strict=True)] if total else moves
        before = scores[-1:], [s[-1:] for s in shares]
    return call.like(total)


def _shares(slopes: Sequence[Tensor]) -> list[Tensor]:
    """Give squares of ``[point batch ...]`` that add up to 1 for each point and example, or to 0 where all are 0."""
    norm = sum(g.flatten(2).square().sum(2) for g in slopes)
    assert isinstance(norm, Tensor)
    norm = torch.where(norm == 0, torch.ones_like(norm), norm)
    return [g.square() / norm.reshape(*norm.shape, *[1] * (g.ndim - 2)) for g in slopes]
