"""The way from one image to another, pixel group by pixel group, and what the model makes of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pullback._core.batching import chunks, report, wide
from pullback._core.masked import Link, MaskAxes, MaskedModel, mask_axes_of
from pullback._core.types import Inputs, Model, Output, Params, Progress, Target
from pullback._torch.random import Seed, normal
from pullback.masks import Fill, fill
from pullback.metrics._ranks import pixels, ranks

Images = Callable[[Tensor], Tensor]


class RemovalCurve:
    """An image, the map that orders its pixels, and a model that scores what becomes of it.

    `image` is ``[batch channel *sizes]``, `ranks` ``[batch 1 *sizes]``: 0 where the map is highest.
    """

    def __init__(
        self,
        params: Params,
        model: Model,
        x: Inputs,
        target: Target,
        map: Tensor,
        *,
        tokens: bool,
        output: Output,
        link: Link,
    ) -> None:
        self.masked = MaskedModel(params, model, x, target, output=output, link=link)
        self.mask_axes: MaskAxes = mask_axes_of(self.masked, tokens)
        self.sizes = self.mask_axes.sizes
        self.image = self.mask_axes.to_channels_first(self.masked.covered)
        self.map = pixels(map, self.masked.batch, self.sizes)
        self.count = self.map.shape[1]

    @property
    def ranks(self) -> Tensor:
        return self.laid(ranks(self.map))

    def laid(self, flat: Tensor) -> Tensor:
        """Lay ``[batch pixel]`` out as ``[batch 1 *sizes]``."""
        return flat.unflatten(1, (1, *self.sizes))

    def under(self, baseline: Fill, seed: Seed) -> Tensor:
        """Give what a pixel shows when the image does not: see `pullback.masks.fill`, or ``"noise"``."""
        if not (isinstance(baseline, str) and baseline == "noise"):
            return fill(self.image, baseline).expand_as(self.image)
        axes = tuple(range(2, self.image.ndim))
        mean, spread = self.image.mean(axes, keepdim=True), self.image.std(axes, correction=0, keepdim=True)
        first = torch.zeros(1, dtype=torch.long, device=self.image.device)
        return mean + spread * normal(seed, first, self.image.shape[1:], self.image.dtype)

    def scores(
        self, ranks: Tensor, counts: Tensor, images: Images, chunk_size: int | None, progress: Progress = None
    ) -> Tensor:
        """Score the image at each step: ``[batch step]``.

        `images` makes, of the places of rank below a count, ``[step batch 1 *sizes]``, what the model sees there,
        ``[step batch channel *sizes]``.
        """
        found = []
        for part in chunks(len(counts), chunk_size):
            until = counts[part.start : part.stop].reshape(-1, *[1] * ranks.ndim)
            shown = images(ranks < until)
            found.append(self.masked.scores(len(part), lambda _, __: self.mask_axes.undo(shown)))  # noqa: B023
            report(progress, part.stop, len(counts))
        return torch.cat(found).to(wide(self.masked.dtype)).T

    def steps(self, steps: int) -> tuple[Tensor, Tensor]:
        """Cut the pixels into steps as equal as can be: how many after each, from 0 on, and their share of all."""
        if steps < 1:
            raise ValueError(f"`steps` must be at least 1, got {steps}.")
        steps = min(steps, self.count)
        counts = torch.arange(steps + 1, device=self.image.device) * self.count // steps
        return counts, counts.to(wide(self.masked.dtype)) / self.count


def area(curve: Tensor, places: Tensor) -> Tensor:
    """Give the area under a curve ``[batch step]`` by trapezoids; `places` are ``[step]`` or ``[batch step]``."""
    return ((curve[:, 1:] + curve[:, :-1]) / 2 * places.diff(dim=-1)).sum(1)
