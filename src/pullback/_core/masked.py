"""Score a model whose input, or the activation of a layer, is perturbed in many ways.

A perturbation method gives a function ``perturb(part, values)`` that sees copies of what is perturbed,
``[copy batch ...]``, and returns what the model runs on instead. `MaskedModel` holds the rest. Target and parameters
are never read, so that all targets share a forward on copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pullback._core.batching import ACTIVATION_PER_INPUT, chunks, rows_together
from pullback._core.call import Call, InputTree
from pullback._core.channels_last import MIN_FORWARDS, constant, tried
from pullback._core.inputs import folded, picked, picked_inputs, repeated, unfolded
from pullback._core.layers import LayerShape
from pullback._core.shapes import layer_shapes
from pullback._core.targets import score
from pullback._core.types import ChunkSize, Inputs, Layer, Model, Output, Params, Target

Perturb: TypeAlias = "Callable[[int, Tensor], Tensor]"
Link: TypeAlias = "str | Callable[[Tensor], Tensor] | None"


class MaskedModel:
    """A call, a target, and what of the call is perturbed: the tensors of `x`, or the activation of a layer.

    Attributes:
        shapes: Of what is perturbed, ``[batch ...]`` each.
        link: What the output is turned into before it is scored.
    """

    def __init__(
        self,
        params: Params,
        model: Model,
        x: Inputs,
        target: Target,
        *,
        layer: str | Layer = "",
        output: Output = None,
        link: Link = None,
    ) -> None:
        self.call = call = Call.bind(params, model, x, layer, None, output)
        # a tensor is made before any transform of the method's own, so that its range can be checked
        self.target: Target = torch.as_tensor(target) if type(target) in (int, list) else target
        self._targets: dict[int, Target] = {}
        self.link = link
        self.batch, self.device = call.x.batch, call.x.device
        self.layer_shapes: tuple[LayerShape, ...] = ()
        if call.layer is None:
            if not call.x.floating:
                raise TypeError(
                    "`x` holds no floating-point tensor to cover. Name a `layer`, such as the embedding, or cast `x`."
                )
            self.shapes = [t.shape for t in call.x.tensors]
            self.dtype = call.x.tensors[0].dtype
            return
        if not isinstance(model, nn.Module):
            raise ValueError("`layer` needs a torch.nn.Module, got a function as `model`: it has no named layers.")
        self.layer_shapes = layer_shapes(params, model, call.x.x, call.layer)
        calls = range(len(self.layer_shapes)) if call.layer.call is None else [call.layer.call]
        found = {s.shape: s.dtype for i, s in enumerate(self.layer_shapes) if i in calls}
        if len(found) != 1:
            raise ValueError(
                f"`layer` names `{call.layer}`, called {len(self.layer_shapes)} times with activations of "
                f"{len(found)} shapes: choose a call, as in `{call.layer.name}#0`."
            )
        self.shapes = list(found)
        self.dtype = next(iter(found.values()))

    @property
    def covered(self) -> Tensor:
        """The first tensor of `x` that is perturbed."""
        return self.call.x.tensors[0]

    def like(self, tensors: Sequence[Tensor]) -> Any:
        """Give one tensor for each that is perturbed the structure of `x`, or of the layer's activation."""
        return tensors[0] if self.call.layer is not None else self.call.like(tensors)

    def of_rows(self, rows: range) -> MaskedModel:
        """Return the same for some rows of copies of the batch that follow one another."""
        if len(rows) == self.batch and rows.start % self.batch == 0:
            return self
        index = torch.arange(rows.start, rows.stop, device=self.device) % self.batch
        call, target = self.call, picked(self.target, index, self.batch)
        x = picked_inputs(call.x.x, index, self.batch)
        how: dict[str, Any] = {"layer": call.layer or "", "output": call.output, "link": self.link}
        return MaskedModel(call.params, call.model, x, target, **how)

    def parts(self, count: int, size: ChunkSize, *, rows: int | None = None, repeats: int = 1) -> Iterator[range]:
        """Cut `count` copies of the batch, or of as many `rows`, into parts that run together.

        ``"auto"`` takes as many together as run fastest. Where each copy runs `repeats` times, that counts as well.
        Before many forwards the weights are laid out for them.
        """
        rows = self.batch if rows is None else rows
        size_of_number = torch.empty((), dtype=self.dtype).element_size()
        largest = ACTIVATION_PER_INPUT * size_of_number * sum(math.prod(shape[1:]) for shape in self.shapes)
        if count * rows * repeats >= MIN_FORWARDS:
            largest = self._lay_out() or largest
        return chunks(count, max(1, rows_together(largest, self.device) // max(1, rows)) if size == "auto" else size)

    def _lay_out(self) -> int:
        """Choose the layout of the weights; return the bytes of a row's largest activation, or 0 where not known."""
        call = self.call
        if not isinstance(call.model, nn.Module) or self.device.type != "cpu":
            return 0
        held = [
            t for part in (call.params if isinstance(call.params, tuple) else (call.params,)) for t in part.values()
        ]
        if not constant(*held, *(t for _, t in call.x.items if t is not None)):
            return 0
        two = InputTree(picked_inputs(call.x.x, torch.tensor([0, self.batch - 1]), self.batch))
        plain = replace(call, x=two, layer=None)
        params, largest = tried(
            call.params, call.model, lambda params, account: replace(plain, params=params).forward(account=account)
        )
        self.call = replace(call, params=params)
        return largest // 2

    def outputs(self, copies: int, perturb: Perturb) -> Tensor:
        """Run the model on perturbed copies: ``[(copy batch) *output]``."""
        call = self.call

        def others(value: Any) -> Any:
            return repeated(value, copies, self.batch)

        if call.layer is None:
            points = [perturb(i, t.unsqueeze(0).expand(copies, *t.shape)) for i, t in enumerate(call.x.tensors)]
            return self._linked(call.at(points).forward())

        def edit(layer: Layer, number: int, activation: Tensor) -> Tensor:
            if layer.call not in (None, number):
                return activation
            return folded(perturb(0, unfolded(activation, copies)).to(activation.dtype))

        x = InputTree(call.x.rebuild([others(t) for t in call.x.tensors], others))
        return self._linked(replace(call, x=x).forward(edit, {call.layer: self.layer_shapes}))

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
        """Repeat the target. It is kept: what is repeated before a transform of the method's own can be checked."""
        if copies not in self._targets:
            self._targets[copies] = repeated(self.target, copies, self.batch)
        return self._targets[copies]

    def scores(self, copies: int, perturb: Perturb) -> Tensor:
        """Return the scores of perturbed copies, ``[copy batch]``."""
        return unfolded(score(self.outputs(copies, perturb), self.targets(copies)), copies)


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
    """Return the mask axes of the one tensor that is perturbed."""
    if len(masked.shapes) > 1:
        raise TypeError("`x` holds several floating-point tensors: a map is of one. Name a `layer`.")
    return MaskAxes(masked.shapes[0], tokens)


def axis_sizes(
    name: str, given: int | Sequence[int] | None, sizes: Sequence[int], default: Callable[[int], int]
) -> tuple:
    """Return one number for each axis."""
    if given is None:
        return tuple(default(n) for n in sizes)
    chosen = (given,) * len(sizes) if isinstance(given, int) else tuple(given)
    if len(chosen) != len(sizes) or min(chosen) < 1:
        raise ValueError(f"`{name}` must be one positive number, or {len(sizes)}, one an axis, got {given}.")
    return chosen
