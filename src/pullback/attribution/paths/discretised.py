"""Discretised integrated gradients: a path from word to word."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from pullback._core.call import Call
from pullback._core.entry import method
from pullback._core.types import ChunkSize, Inputs, Layer, Model, Output, Params, Progress, Target
from pullback.attribution.paths._along import ends_of, slope_along
from pullback.attribution.paths._quadrature import Point, integral
from pullback.rules._table import Rules, table_of


@method(
    "paths",
    "attribution",
    "one embedding",
    small={"steps": 3, "neighbours": 4},
    forwards=lambda o: o["steps"] + 1,
    reads=1,
    mechanism="formula",
)
def discretised_integrated_gradients(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    words: Tensor,
    layer: str | Layer = "",
    baseline: Any = None,
    steps: int = 30,
    neighbours: int = 50,
    strategy: Literal["greedy", "max_count"] = "greedy",
    chunk_size: ChunkSize = "auto",
    progress: Progress = None,
    rules: Rules = None,
    output: Output = None,
) -> Any:
    r"""Integrate the gradient along paths between words that pass near words.

    .. math:: a = \sum_k \tfrac{1}{2} (g_k + g_{k+1}) \odot (z_k - z_{k+1}), \quad
              z_0 = x, \; z_\text{steps} = b, \; g_k = \nabla f(z_k)

    A straight line between embeddings leads through points that mean nothing to a language model. Here each step goes
    to one of the `neighbours` nearest words of the word before, made monotonic: an entry that does not lie between the
    point and the baseline is replaced by that of an equal step on the straight line. Adds up to the difference in score
    between input and baseline, up to the error of the trapezoidal sum. Costs `steps` gradients.

    Args:
        params, model, x, target, rules, output: See `gradient`.
        words: The embeddings, ``[word channel]``, such as ``params["embed.weight"]``.
        layer: Where the embeddings ``[batch token channel]`` are; ``""`` where `x` holds them.
        baseline, chunk_size, progress: See `integrated_gradients`; one baseline.
        steps: Steps of the path.
        neighbours: Words to choose from at each step.
        strategy: ``"greedy"`` chooses the word that its monotonic form is nearest to, ``"max_count"`` the one with most
            monotonic entries.

    Returns:
        Attribution ``[batch token channel]``, signed, in units of the score.

    Raises:
        ValueError: If `steps` or `neighbours` is less than 1, or `words` do not fit the embeddings.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 2))
        >>> params, x = params_of(model), torch.tensor([[1, 4, 6]])
        >>> words = params["0.weight"]
        >>> a = discretised_integrated_gradients(params, model, x, 0, words=words, layer="0", baseline=0)
        >>> torch.allclose(a.sum((1, 2)), (model(x) - model(0 * x))[:, 0], atol=1e-4)  # linear from the layer on
        True

    Reference:
        Sanyal & Ren, Discretized Integrated Gradients for Explaining Language Models, 2021, sec. 3.
    """
    for name, value in (("steps", steps), ("neighbours", neighbours)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if strategy not in ("greedy", "max_count"):
        raise ValueError(f"`strategy` must be 'greedy' or 'max_count', got {strategy!r}.")
    call = Call.bind(params, model, x, layer, table_of(rules), output)
    (start, *_), end = ends_of(call, baseline)
    if len(end) != 1 or words.ndim != 2 or end[0].shape[-1] != words.shape[-1]:
        shapes = ", ".join(str(list(t.shape)) for t in end)
        raise ValueError(f"`words` must be [word channel] for embeddings {shapes}, got {list(words.shape)}.")
    places = _word_path(end[0], start[0], words.to(end[0]), steps, neighbours, strategy)
    steps_taken = [b - a for a, b in zip(places[1:], places, strict=False)]
    none = torch.zeros_like(end[0])

    def point(k: int) -> Point:  # each gradient counts for half of the step before and half of the step after
        before, after = (steps_taken[j] if 0 <= j < steps else none for j in (k - 1, k))
        return [places[k]], [(before + after) / 2]

    return call.like(
        integral(partial(slope_along, call, target), point, (1.0,) * (steps + 1), chunk_size, end, progress)
    )


def _word_path(end: Tensor, start: Tensor, words: Tensor, steps: int, neighbours: int, strategy: str) -> list[Tensor]:
    """Give points from `end` to `start`, each in every entry between the one before and `start`."""
    neighbours = min(neighbours, len(words) - 1)
    wide = words.to(torch.promote_types(words.dtype, torch.float32))
    places, anchor = [end], end.detach()
    for left in range(steps, 1, -1):
        place = places[-1]
        nearest = (
            torch.cdist(anchor.to(wide.dtype), wide).topk(neighbours + 1, largest=False).indices[..., 1:]
        )  # but itself
        near = words[nearest]  # [batch token neighbour ...]
        here, there = place.unsqueeze(-2), start.unsqueeze(-2)
        between = (near - here) * (near - there) <= 0
        monotonic = torch.where(between, near, here + (there - here) / left)
        if strategy == "greedy":
            cost = (monotonic - near).norm(dim=-1)
        else:
            cost = -between.sum(-1)
        best = cost.argmin(-1)[..., None, None].expand(*cost.shape[:-1], 1, words.shape[1])
        places.append(monotonic.gather(-2, best).squeeze(-2))
        anchor = near.gather(-2, best).squeeze(-2).detach()
    return [*places, start]
