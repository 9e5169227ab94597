"""Slide a window over the input."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pullback._core.batching import report, wide
from pullback._core.entry import method
from pullback._core.masked import MaskedModel, axis_sizes, mask_axes_of
from pullback._core.types import ChunkSize, Inputs, Layer, Model, Output, Params, Progress, Target
from pullback.masks import Fill, fill, windows

# -- windows and masks over an image


@method("perturbation", "map", "one map", small={"window": 9}, forwards=lambda o: 1 + o["windows"])
def occlusion(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    window: int | Sequence[int] | None = None,
    stride: int | Sequence[int] | None = None,
    baseline: Fill = None,
    tokens: bool = False,
    layer: str | Layer = "",
    output: Output = None,
    chunk_size: ChunkSize = "auto",
    progress: Progress = None,
) -> Tensor:
    r"""Slide a window over the input, and note by how much the score falls where it covers.

    .. math:: m_p = \frac{1}{|W_p|} \sum_{w \in W_p} \big( f_t(x) - f_t(x \text{ covered in } w) \big)

    with :math:`W_p` the windows that cover p. Costs a forward for each place of the window, and one.

    Args:
        params, model, x, target, layer, output: See `gradient`.
        window: Size, one number or one a spatial axis; an eighth of each axis if omitted. A window with a size for
            the channels too slides over them as well.
        stride: From place to place; half the window if omitted.
        baseline: What is shown in the window: see `pullback.masks.fill`. Zeros if omitted.
        tokens: What is covered is ``[batch token channel]``: the window slides over tokens.
        chunk_size: Places evaluated together: ``"auto"`` for as many as run fast, `None` for all.
        progress: Called with (places done, places in all).

    Returns:
        Map ``[batch 1 height width]`` (or as many axes as there are), signed, in units of the score; shaped like `x`
        where the window has a size for the channels.

    Raises:
        ValueError: If `window` or `stride` is not positive or does not fit the axes.

    Example:
        >>> model = lambda params, x: x.sum((1, 2, 3))
        >>> x = torch.rand(2, 3, 6, 6)
        >>> m = occlusion({}, model, x, None, window=2, stride=2)
        >>> torch.allclose(m.sum((1, 2, 3)) / 4, x.sum((1, 2, 3)), atol=1e-4)  # each pixel is in one window
        True

    Reference:
        Zeiler & Fergus, Visualizing and Understanding Convolutional Networks, 2014, sec. 4.2.
    """
    masked = MaskedModel(params, model, x, target, layer=layer, output=output)
    mask_axes = mask_axes_of(masked, tokens)
    example = tuple(masked.shapes[0][1:])
    everywhere = (
        window is not None and not isinstance(window, int) and len(window) == len(example) > len(mask_axes.sizes)
    )
    sizes = example if everywhere else mask_axes.sizes
    window = axis_sizes("window", window, sizes, lambda n: math.ceil(n / 8))
    half = tuple(-(-w // 2) for w in window)
    stride = half if stride is None else axis_sizes("stride", stride, sizes, int)
    rows = [windows(n, min(w, n), s, masked.device) for n, w, s in zip(sizes, window, stride, strict=True)]
    count = math.prod(map(len, rows))
    whole = masked.scores(1, lambda _, values: values)
    found = []
    for part in masked.parts(count, chunk_size):
        covered = _windows_at(rows, torch.arange(part.start, part.stop, device=masked.device)).unsqueeze(1)

        def cover(_: int, values: Tensor) -> Tensor:
            if everywhere:
                return torch.where(covered, fill(values[0], baseline), values)  # noqa: B023
            shown = mask_axes.to_channels_first(values)
            return mask_axes.undo(torch.where(covered.unsqueeze(1), fill(shown[0], baseline), shown))  # noqa: B023

        found.append(whole - masked.scores(len(part), cover))
        report(progress, part.stop, count)
    map_ = _mean_of_windows(rows, torch.cat(found).to(wide(masked.dtype)).T)
    return (map_ if everywhere else map_.unsqueeze(1)).to(masked.dtype)


def _windows_at(rows: Sequence[Tensor], index: Tensor) -> Tensor:
    """Give the windows at some places, ``[index *size]``, from those along each axis; the last axis moves first."""
    covered = torch.ones(len(index), *[1] * len(rows), dtype=torch.bool, device=index.device)
    for axis, row in enumerate(rows):
        along = row[index // math.prod(map(len, rows[axis + 1 :])) % len(row)]
        covered = covered & along.reshape(len(index), *[1] * axis, -1, *[1] * (len(rows) - axis - 1))
    return covered


def _mean_of_windows(rows: Sequence[Tensor], values: Tensor) -> Tensor:
    """Give each place the mean over the windows that cover it: ``[batch window]`` -> ``[batch *size]``."""
    values = values.unflatten(1, [len(row) for row in rows])
    for axis, row in enumerate(rows):
        weight = row.to(values.dtype) / row.sum(0).clamp(min=1).to(values.dtype)
        values = torch.matmul(values.movedim(1 + axis, -1), weight).movedim(-1, 1 + axis)
    return values
