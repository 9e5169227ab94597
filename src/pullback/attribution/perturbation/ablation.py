"""Cover, or exchange, one feature at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pullback._core.batching import report, wide
from pullback._core.checks import at_least
from pullback._core.entry import method
from pullback._core.masked import MaskedModel
from pullback._core.types import ChunkSize, Inputs, Layer, Model, Output, Params, Progress, Target
from pullback._torch.random import Seed, uniform
from pullback.attribution.perturbation._features import FeatureGroups


@method("perturbation", forwards=lambda o: 1 + o["features"])
def feature_ablation(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    feature_mask: Any = None,
    baseline: Any = None,
    layer: str | Layer = "",
    output: Output = None,
    chunk_size: ChunkSize = "auto",
    progress: Progress = None,
) -> Any:
    r"""Cover one feature at a time, and note by how much the score falls.

    .. math:: a_i = f_t(x) - f_t(x \text{ without } i)

    Costs a forward for each feature, and one, shared by all targets under `vmap`.

    Args:
        params, model, x, target, layer, output: See `gradient`.
        feature_mask: Integers from 0 with the structure of `x`, ``[...]`` for all examples or ``[batch ...]``. Numbers
            of one group (a superpixel, a word) are covered together, also across tensors. Each number is a group of its
            own if omitted.
        baseline: What is shown instead, with the structure of `x`: see `pullback.masks.fill`. Zeros if omitted.
        chunk_size: Features evaluated together: ``"auto"`` for as many as run fast, `None` for all.
        progress: Called with (features done, features in all).

    Returns:
        Signed, with the structure and shape of `x` or of the layer's activation, in units of the score: each number has
        what its group has.

    Raises:
        ValueError: If `feature_mask` are negative or do not broadcast to `x`.
        TypeError: If they are not integers.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> params, x = {}, torch.rand(4, 3)
        >>> torch.allclose(feature_ablation(params, model, x, 1), x * model.weight[1], atol=1e-6)
        True
    """
    masked = MaskedModel(params, model, x, target, layer=layer, output=output)
    groups = FeatureGroups(masked, feature_mask, baseline)

    def keep(part: range) -> list[Tensor]:
        index = torch.arange(part.start, part.stop, device=masked.device)
        return [index.reshape(-1, *[1] * ids.ndim) != ids for ids in groups.ids]

    whole = masked.scores(1, lambda _, values: values).to(wide(masked.dtype))
    return groups.laid_out((whole - groups.scores(groups.count, keep, chunk_size, progress)).T)


@method("perturbation", small={"samples": 2}, forwards=lambda o: 1 + o["samples"] * o["features"])
def feature_permutation(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    background: Inputs,
    feature_mask: Any = None,
    samples: int | None = None,
    seed: Seed = 0,
    output: Output = None,
    chunk_size: ChunkSize = "auto",
    progress: Progress = None,
) -> Any:
    r"""Replace one feature at a time by its values in other examples, and note by how much the score falls.

    .. math:: a_i = f_t(x) - \tfrac{1}{n} \sum_{s=1}^n f_t(x \text{ with } i \text{ from } b_s)

    The other examples are an argument, so that an example's result does not depend on its batch. Costs ``n features``
    forwards, and one.

    Args:
        params, model, x, target, output: See `gradient`.
        background: Examples with the structure of `x`, as many as there are.
        feature_mask: See `feature_ablation`.
        samples: Number of examples drawn from the background; each of them once if omitted.
        seed: Integer, or an integer tensor ``[]``.
        chunk_size: Replacements evaluated together: ``"auto"`` for as many as run fast, `None` for all.
        progress: Called with (replacements done, replacements in all).

    Returns:
        Signed, with the structure and shape of `x`, in units of the score.

    Raises:
        ValueError: If `background` does not have the shape of `x`, or `samples` is less than 1.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> x, b = torch.rand(4, 3), torch.rand(5, 3)
        >>> a = feature_permutation({}, model, x, 1, background=b)
        >>> torch.allclose(a, (x - b.mean(0)) * model.weight[1], atol=1e-6)
        True

    Reference:
        Fisher, Rudin & Dominici, All Models are Wrong, but Many are Useful, 2019, sec. 3.
    """
    masked = MaskedModel(params, model, x, target, output=output)
    groups = FeatureGroups(masked, feature_mask, None)
    others = [FeatureGroups._of(background, key) for key in groups.keys]
    for other, shape in zip(others, masked.shapes, strict=True):
        if not isinstance(other, Tensor) or other.shape[1:] != shape[1:] or not len(other):
            got = list(other.shape) if isinstance(other, Tensor) else type(other).__name__
            raise ValueError(f"`background` must be examples {list(shape[1:])}, as in `x`, got {got}.")
    available = len(others[0])
    count = available if samples is None else samples
    at_least("samples", count)
    index = torch.arange(count, device=masked.device)
    rows = index if samples is None else (uniform(seed, index, (), torch.float32) * available).long()
    whole = masked.scores(1, lambda _, values: values).to(wide(masked.dtype))
    found = []
    for part in masked.parts(count * groups.count, chunk_size):
        place = torch.arange(part.start, part.stop, device=masked.device)
        group, row = place // count, rows[place % count]

        def cover(which: int, values: Tensor) -> Tensor:
            ids = groups.ids[which]
            replaced = group.reshape(-1, *[1] * ids.ndim) == ids  # noqa: B023
            return torch.where(replaced, others[which][row].unsqueeze(1).to(values.dtype), values)  # noqa: B023

        found.append(masked.scores(len(part), cover))
        report(progress, part.stop, count * groups.count)
    total = torch.cat(found).to(whole.dtype).unflatten(0, (groups.count, count)).mean(1)  # [group batch]
    return groups.laid_out((whole - total).T)
