"""Score a model whose input, or the activation of a layer, is covered in many ways.

A perturbation method gives `cover(part, values)`, which sees copies of what is covered, ``[copy batch ...]``, and gives
what the model runs on instead. `MaskedModel` holds the rest: where that is, the target, and what the output is turned into
before it is scored. Target and parameters are never looked at, so that a forward on copies is shared by all targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pullback._core.batching import ACTIVATION_PER_INPUT, ChunkSize, chunks, rows_together
from pullback._core.channels_last import MIN_FORWARDS, constant, tried
from pullback._core.forward import run
from pullback._core.inputs import InputTree, folded, picked, picked_inputs, repeated, unfolded
from pullback._core.layers import Site
from pullback._core.shapes import layer_shapes
from pullback._core.targets import score
from pullback._core.types import Inputs, Model, Params, Select, Target

Perturb: TypeAlias = Callable[[int, Tensor], Tensor]
Link: TypeAlias = "str | Callable[[Tensor], Tensor] | None"


class MaskedModel:
    """A model, its input and a target, with the places that are covered.

    `shapes`: of the tensors that are covered, ``[batch ...]``: the floating-point ones of `x`, or the layer's
    activation.
    """

    def __init__(
        self,
        params: Params,
        model: Model,
        x: Inputs,
        target: Target,
        *,
        layer: str = "",
        at: str = "output",
        output: Select = None,
        strict: bool = False,
        link: Link = None,
    ) -> None:
        self.params, self.model, self.x = params, model, x
        # made a tensor before any transform of the method's own: its range can then be checked
        self.target: Target = torch.as_tensor(target) if type(target) in (int, list) else target
        self._targets: dict[int, Target] = {}
        self.output, self.strict, self.link = output, strict, link
        self.tree = InputTree(x)
        self.batch = self.tree.batch
        self.site = Site.parse(layer, at)
        self.seen: Any = ()
        if self.site.name:
            if not isinstance(model, nn.Module):
                raise ValueError("`layer` needs a torch.nn.Module, got a function as `model`: it has no named layers.")
            self.seen = layer_shapes(params, model, x, self.site)
            calls = range(len(self.seen)) if self.site.call is None else [self.site.call]
            found = {self.seen[call].shape: self.seen[call].dtype for call in calls if call < len(self.seen)}
            if len(found) != 1:
                raise ValueError(
                    f"`layer` names `{self.site}`, called {len(self.seen)} times with activations of "
                    f"{len(found)} shapes: choose a call, as in `{self.site.name}#0`."
                )
            self.shapes = list(found)
            self.dtype = next(iter(found.values()))
        else:
            if not self.tree.floating:
                raise TypeError(
                    "`x` holds no floating-point tensor to cover. Name a `layer`, such as the embedding, or cast `x`."
                )
            self.shapes = [t.shape for t in self.tree.tensors]
            self.dtype = self.tree.tensors[0].dtype
        self.device = next(t for _, t in self.tree.items if t is not None).device

    @property
    def covered(self) -> Tensor:
        """The one tensor of `x` that is covered."""
        return self.tree.tensors[0]

    def of_rows(self, rows: range) -> MaskedModel:
        """Give the scene of some rows of the batch, copies of which follow one another."""
        if len(rows) == self.batch and rows.start % self.batch == 0:
            return self
        index = torch.arange(rows.start, rows.stop, device=self.device) % self.batch
        x, target = picked_inputs(self.x, index, self.batch), picked(self.target, index, self.batch)
        how: dict[str, Any] = {"output": self.output, "strict": self.strict, "link": self.link}
        return MaskedModel(self.params, self.model, x, target, layer=str(self.site), at=self.site.at, **how)

    def parts(self, count: int, size: ChunkSize, *, rows: int | None = None, times: int = 1) -> Iterator[range]:
        """Cut what is to be run, `count` copies of the batch, or of so many `rows`, each so many `times`.

        ``"auto"`` takes as many together as run fastest. Before many forwards weights are laid out for them.
        """
        rows = self.batch if rows is None else rows
        size_of_number = torch.empty((), dtype=self.dtype).element_size()
        largest = ACTIVATION_PER_INPUT * size_of_number * sum(math.prod(shape[1:]) for shape in self.shapes)
        if count * rows * times >= MIN_FORWARDS:
            largest = self._settled() or largest
        return chunks(count, max(1, rows_together(largest, self.device) // max(1, rows)) if size == "auto" else size)

    def _settled(self) -> int:
        """Choose the layout of the weights, and give the bytes of a row's largest activation, where it is known."""
        model = self.model
        if not isinstance(model, nn.Module) or self.device.type != "cpu":
            return 0
        held = [
            t for part in (self.params if isinstance(self.params, tuple) else (self.params,)) for t in part.values()
        ]
        if not constant(*held, *(t for _, t in self.tree.items if t is not None)):
            return 0
        two = picked_inputs(self.x, torch.tensor([0, self.batch - 1]), self.batch)
        self.params, largest = tried(self.params, model, lambda params: run(params, model, two, output=self.output))
        return largest // 2

    def outputs(self, copies: int, cover: Perturb) -> Tensor:
        """Run the model on covered copies: ``[(copy batch) *output]``."""

        def others(value: Any) -> Any:
            return repeated(value, copies, self.batch)

        if not self.site.name:
            tensors = [
                folded(cover(part, t.unsqueeze(0).expand(copies, *t.shape))) for part, t in enumerate(self.tree.tensors)
            ]
            x = self.tree.rebuild(tensors, others)
            return self._linked(run(self.params, self.model, x, output=self.output, strict=self.strict))

        def edit(site: Site, call: int, activation: Tensor) -> Tensor:
            if site.call not in (None, call):
                return activation
            return folded(cover(0, unfolded(activation, copies)).to(activation.dtype))

        x = self.tree.rebuild([others(t) for t in self.tree.tensors], others)
        result = run(
            self.params,
            self.model,
            x,
            output=self.output,
            strict=self.strict,
            sites=(self.site,),
            edit=edit,
            seen={self.site: self.seen},
        )
        return self._linked(result)

    def _linked(self, output: Tensor) -> Tensor:
        if self.link is None or (callable(self.target) and isinstance(self.link, str)):
            return output
        if callable(self.link):
            return self.link(output)
        if self.link == "sigmoid":
            return output.sigmoid()
        if self.link == "softmax":
            return output.softmax(1) if output.ndim > 1 and output.shape[1] > 1 else output
        raise ValueError(f"`link` must be 'softmax', 'sigmoid', a function or None, got {self.link!r}.")

    def targets(self, copies: int) -> Target:
        """Repeat the target. Kept, so that what is repeated before a transform of the method's own can be checked."""
        if copies not in self._targets:
            self._targets[copies] = repeated(self.target, copies, self.batch)
        return self._targets[copies]

    def scores(self, copies: int, cover: Perturb) -> Tensor:
        """Give ``[copy batch]``."""
        return unfolded(score(self.outputs(copies, cover), self.targets(copies)), copies)


class MaskAxes:
    """Which axes of a tensor masks lie over: ``[batch channel ...]`` its spatial axes, tokens, or features alone.

    `to_channels_first` brings the example's axes, the last ones, to ``channel *sizes``; `undo` brings them back.
    """

    def __init__(self, shape: Sequence[int], tokens: bool = False) -> None:
        self.axes = len(shape) - 1  # of an example
        if tokens and self.axes != 2:
            raise ValueError(f"`tokens` needs [batch token channel], got {list(shape)}.")
        if not 1 <= self.axes <= 4:
            raise ValueError(f"Masks lie over [batch channel ...] with 1 to 3 spatial axes, got {list(shape)}.")
        self.tokens = tokens
        self.sizes = (shape[1],) if tokens or self.axes == 1 else tuple(shape[2:])

    def to_channels_first(self, values: Tensor) -> Tensor:
        if self.axes == 1:
            return values.unsqueeze(-2)
        return values.transpose(-1, -2) if self.tokens else values

    def undo(self, values: Tensor) -> Tensor:
        if self.axes == 1:
            return values.squeeze(-2)
        return values.transpose(-1, -2) if self.tokens else values


def mask_axes_of(masked: MaskedModel, tokens: bool = False) -> MaskAxes:
    """Give the canvas of the one tensor that is covered."""
    if len(masked.shapes) > 1:
        raise TypeError("`x` holds several floating-point tensors: a map is of one. Name a `layer`.")
    return MaskAxes(masked.shapes[0], tokens)


def axis_sizes(
    name: str, given: int | Sequence[int] | None, sizes: Sequence[int], default: Callable[[int], int]
) -> tuple:
    """Give one number an axis."""
    if given is None:
        return tuple(default(n) for n in sizes)
    chosen = (given,) * len(sizes) if isinstance(given, int) else tuple(given)
    if len(chosen) != len(sizes) or min(chosen) < 1:
        raise ValueError(f"`{name}` must be one positive number, or {len(sizes)}, one an axis, got {given}.")
    return chosen
