"""What runs along a path, and where it leads from and to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pullback._core.forward import activations
from pullback._core.inputs import InputTree, folded, repeated, unfolded
from pullback._core.targets import cotangent, score
from pullback._core.types import Inputs, Model, Params, Select, Target
from pullback._core.vjp import Pulled, pullback
from pullback._ops.dispatch import Table
from pullback.attribution.paths._quadrature import Tensors


@dataclass(frozen=True)
class Course:
    """What runs along a path: the model and its target, from the input or from a layer on."""

    params: Params
    model: Model
    x: Inputs
    target: Target
    output: Select
    table: Table | None
    strict: bool
    layer: str = ""
    at: str = "output"

    def place(self, x: Inputs) -> tuple[Tensor, ...]:
        """Give where `x` lies: its tensors, or the layer's activations."""
        return activations(self.params, self.model, x, self.layer, self.at)

    def pulled(self, points: Tensors) -> tuple[Pulled, Target]:
        """Run the model at points ``[point batch ...]``; give the target of each as well."""
        tree, count = InputTree(self.x), len(points[0])
        given = [folded(point) for point in points]

        def each_point(v: Any) -> Any:
            return repeated(v, count, tree.batch)

        x = tree.rebuild([each_point(t) for t in tree.tensors] if self.layer else given, each_point)
        where = {"layer": self.layer, "at": self.at, "output": self.output, "table": self.table, "strict": self.strict}
        return pullback(self.params, self.model, x, **where, given=given), each_point(self.target)

    def slopes(self, points: Tensors) -> tuple[Tensor, list[Tensor]]:
        """Give scores ``[point batch]`` and gradients ``[point batch ...]`` at points ``[point batch ...]``."""
        pulled, target = self.pulled(points)
        slopes = pulled.pull(cotangent(pulled.output, target))
        count = len(points[0])
        return unfolded(score(pulled.output, target), count), [unfolded(g, count) for g in slopes]

    def shares(self, points: Tensors, velocities: Tensors) -> list[Tensor]:
        """Give velocity times gradient: what each entry adds to the score on its way."""
        return [v * g for v, g in zip(velocities, self.slopes(points)[1], strict=True)]

    def scores(self, points: Tensors) -> Tensor:
        """Give scores ``[point batch]``."""
        pulled, target = self.pulled(points)
        return unfolded(score(pulled.output, target), len(points[0]))

    def result(self, attributions: Tensors) -> Any:
        """Give attributions the structure of `x`; at a layer, the sum over its calls."""
        if not self.layer:
            return InputTree(self.x).rebuild(attributions, lambda v: None)
        if any(a.shape != attributions[0].shape for a in attributions):
            raise ValueError(
                f"`layer` names `{self.layer}`, whose calls have activations of different shapes: choose one, "
                f"`{self.layer}#0` to `{self.layer}#{len(attributions) - 1}`."
            )
        return sum(attributions[1:], attributions[0])


def needs_floating(x: Inputs) -> None:
    if not InputTree(x).floating:
        raise TypeError("`x` holds no floating-point tensor, so no path leads to it. Name a `layer`, or cast `x`.")


def starts_of(x: Inputs, baseline: Any) -> list[Any]:
    """Give the baselines, each with the structure of `x` and broadcast to it; a list means several."""
    tree = InputTree(x)
    several = baseline if isinstance(baseline, list) else [baseline]
    if not several:
        raise ValueError("`baseline` must not be an empty list.")
    return [_start(tree, one) for one in several]


def _start(tree: InputTree, baseline: Any) -> Any:
    """Give a baseline the structure and the shapes of `x`; what it leaves out is 0, or an integer of `x` as it is."""
    if isinstance(tree.x, Tensor):
        return _broadcast(baseline, tree.x) if tree.floating or baseline is not None else tree.x
    given = dict(baseline or {}) if isinstance(tree.x, dict) else dict(enumerate(baseline or ()))
    unknown = set(given) - {key for key, _ in tree.items}
    if unknown:
        raise ValueError(f"`baseline` must have the structure of `x`; `x` has nothing at {sorted(map(str, unknown))}.")

    def start(key: Any, value: Tensor | None) -> Tensor | None:
        stays = value is None or (key not in tree.floating and given.get(key) is None)
        return value if stays else _broadcast(given.get(key), value)  # pyright: ignore[reportArgumentType]

    values = {key: start(key, value) for key, value in tree.items}
    return tuple(values.values()) if isinstance(tree.x, tuple) else values


def _broadcast(baseline: Any, value: Tensor) -> Tensor:
    start = torch.as_tensor(0 if baseline is None else baseline, dtype=value.dtype, device=value.device)
    try:
        return start.expand_as(value)
    except RuntimeError:
        raise ValueError(f"`baseline` must broadcast to `x`, {list(value.shape)}, got {list(start.shape)}.") from None


def ends_of(course: Course, baseline: Any) -> tuple[list[tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Give the places where the paths start, and where they end."""
    if not course.layer:
        needs_floating(course.x)
    end = course.place(course.x)
    if baseline is None and course.layer and not InputTree(course.x).floating:
        return [tuple(torch.zeros_like(a) for a in end)], end
    return [course.place(start) for start in starts_of(course.x, baseline)], end


def convergence_delta(course: Course, attributions: Tensors, starts: Sequence[Tensors], end: Tensors) -> Tensor:
    """Sum of the attributions, less the difference in score between the end and the mean start."""
    total = sum(a.flatten(1).sum(1) for a in attributions)
    first = [torch.stack(t) for t in zip(*starts, strict=True)]
    return total - (course.scores([t.unsqueeze(0) for t in end])[0] - course.scores(first).mean(0))
