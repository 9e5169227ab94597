"""Average any attribution over noisy copies of the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from pullback._core.call import InputTree
from pullback._core.entry import method
from pullback._core.inputs import each, folded, repeated, unfolded
from pullback._core.many.copies import copies
from pullback._core.types import ChunkSize, Inputs, Model, Params, Progress, Target
from pullback._torch.random import Seed, normal
from pullback.attribution.gradients import gradient

Attribution = Callable[..., Any]


@method("gradients", small={"samples": 3, "noise": 0.1}, forwards=lambda o: o["samples"])
def smooth_grad(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    method: Attribution = gradient,
    statistic: Literal["mean", "squared", "variance"] = "mean",
    samples: int = 25,
    noise: float = 0.15,
    absolute: bool = False,
    seed: Seed = 0,
    chunk_size: ChunkSize = "auto",
    progress: Progress = None,
    **options: Any,
) -> Any:
    r"""Average an attribution over inputs with Gaussian noise.

    .. math:: a = \tfrac{1}{n} \sum_{s=1}^n A(x + \sigma \epsilon_s), \quad \epsilon_s \sim N(0, 1)

    ``"squared"`` averages the squares (SmoothGrad-squared), ``"variance"`` gives the variance over samples, divided by
    n - 1 (VarGrad). Costs `samples` times the method. The noise depends on `seed`, the sample and the position
    within the example, so that all examples of a batch see the same one, whatever the batch.

    Args:
        params, model, x, target: See `gradient`.
        method: Any attribution ``method(params, model, x, target, **options)`` whose result has the batch first.
        statistic: ``"mean"``, ``"squared"`` or ``"variance"``.
        samples: Number of noisy copies.
        noise: Standard deviation, as a fraction of each example's range (greatest less least value).
        absolute: Take `noise` in the units of `x`.
        seed: Integer, or an integer tensor ``[]`` (for `vmap` over seeds).
        chunk_size: Samples evaluated together: ``"auto"`` for as many as run fast, and under `over_targets` as its
            memory allows; `None` for all.
        progress: Called with (samples done, samples in all).
        **options: Passed to `method`.

    Returns:
        What `method` returns: in its units, squared for ``"squared"`` and ``"variance"``.

    Raises:
        ValueError: If `samples` is less than 1 (2 for the variance), or `noise` is negative.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> params, x = params_of(model), torch.randn(4, 3)
        >>> a = smooth_grad(params, model, x, target=0, samples=4)  # a linear model has one gradient everywhere
        >>> torch.allclose(a, gradient(params, model, x, target=0))
        True

    References:
        Smilkov et al., SmoothGrad: Removing Noise by Adding Noise, 2017, sec. 3.1. Hooker et al., A Benchmark for
        Interpretability Methods, 2019 (squared). Adebayo et al., Local Explanation Methods, 2018 (variance).
    """
    tree = _checked(x, statistic, samples, noise)
    scales = [torch.full_like(t[:1], noise) if absolute else noise * _span(t) for t in tree.tensors]

    def sampled(part: range) -> Any:
        """Give the attributions of some samples, ``[sample batch ...]``."""
        index = torch.arange(part.start, part.stop, device=tree.tensors[0].device)
        noisy = [
            folded(t + scale * normal(seed, index, t.shape[1:], t.dtype, stream).unsqueeze(1))
            for stream, (t, scale) in enumerate(zip(tree.tensors, scales, strict=True))
        ]

        def each_copy(v: Any) -> Any:
            return repeated(v, len(part), tree.batch)

        a = method(params, model, tree.rebuild(noisy, each_copy), each_copy(target), **options)
        return each(lambda v: unfolded(v, len(part)), a)

    totals: list[Any] = []
    first: Any = None
    for part in copies(samples, chunk_size, tree.tensors, progress):
        a = sampled(part)
        first = each(lambda v: v[0], a) if first is None else first
        sums = [each(lambda v: v.sum(0), moment) for moment in _moments(statistic, a, first)]
        totals = [each(torch.add, t, s) for t, s in zip(totals, sums, strict=True)] if totals else sums
    if statistic == "variance":
        return each(lambda t, q: (q - t.square() / samples) / (samples - 1), *totals)
    return each(lambda t: t / samples, totals[0])


def _checked(x: Inputs, statistic: str, samples: int, noise: float) -> InputTree:
    if statistic not in ("mean", "squared", "variance"):
        raise ValueError(f"`statistic` must be 'mean', 'squared' or 'variance', got {statistic!r}.")
    least = 2 if statistic == "variance" else 1
    if samples < least:
        raise ValueError(f"`samples` must be at least {least}, got {samples}.")
    if not noise >= 0:
        raise ValueError(f"`noise` must be a standard deviation of at least 0, got {noise}.")
    tree = InputTree(x)
    if not tree.floating:
        raise TypeError("`x` holds no floating-point tensor to add noise to. Give the embedding as `x`.")
    return tree


def _moments(statistic: str, a: Any, first: Any) -> list[Any]:
    """Give what is summed over samples: attributions, their squares, or both, for the variance.

    That is taken about the first sample: the variance of what is near a constant survives the rounding.
    """
    if statistic == "variance":
        a = each(torch.sub, a, first)
        return [a, each(torch.square, a)]
    return [a if statistic == "mean" else each(torch.square, a)]


def _span(x: Tensor) -> Tensor:
    flat = x.flatten(1)
    return (flat.amax(1) - flat.amin(1)).reshape(-1, *[1] * (x.ndim - 1))
