"""Pull the cotangents of many targets back through one forward, in chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from pullback._core.inputs import each
from pullback._core.many.shortcuts import combines, one_hot_rows
from pullback._core.many.state import TargetRun, clean, targets_per_chunk
from pullback._core.targets import poisoned
from pullback._core.types import Back, Reduce, Tensors
from pullback._torch.internals import (
    current_level,
    eye,
    functorch,
    is_functorch_wrapped_tensor,
    pulled_back,
    readable,
)


class SharedPull:
    """The pull of a forward that many targets share: their cotangents go through it in chunks.

    Where there are more targets than the head is wide and the pull is linear, one pull for each unit of the head's
    input, and a combination of these for each target, serve all targets. From the output to a bottleneck more targets
    go together than from there on.

    Args:
        many: The run over targets.
        back: From a cotangent for each of `outputs` to cotangents of `primals`.
        outputs: The output, and what `note_forward` returned.
    """

    def __init__(self, many: TargetRun, back: Back, outputs: Tensors, primals: Sequence[Tensor]) -> None:
        self.many, self.back, self.outputs, self.primals = many, back, outputs, primals
        self.places = many.places if len(outputs) > 1 else {}
        self.head = many.head if "head" in self.places else None
        self.bottleneck = many.bottleneck if "bottleneck" in self.places else None

    def __call__(self, cotangent: Tensor, reduce: Reduce | None = None) -> Tensors:
        level, count = self.many.level, len(self.many.targets)
        shared = not any(
            _is_mapped(output, level) for output in self.outputs
        )  # an adaptive method has a forward for each target
        if not (shared and _is_mapped(cotangent, level)) or current_level() != level:
            return _finished(self._back_from(0, cotangent), cotangent, reduce)
        size = targets_per_chunk(self.many, cotangent.device)
        if size >= count and self.head is None:
            return _finished(self._back_from(0, cotangent), cotangent, reduce)
        whole = functorch._remove_batch_dim(cotangent, level, count, 0)
        return tuple(functorch._add_batch_dim(part, 0, level) for part in self._parts(whole, size, reduce))

    def _back_from(self, place: int, cotangent: Tensor) -> Tensors:
        return self.back([cotangent if i == place else None for i in range(len(self.outputs))])

    def _parts(self, cotangents: Tensor, size: int, reduce: Reduce | None) -> list[Tensor]:
        """Pull ``[target *output]`` cotangents back, from the head's input where that is cheaper."""
        if self.head is None:
            return self._cut(cotangents, size, 0, partial(_finished, reduce=reduce))
        hidden, weight = self.head
        place = self.places["head"]
        if combines(self.many, weight.shape[1], self.primals):
            return _combined(partial(self._back_from, place), self.outputs[place], weight, cotangents, size, reduce)
        rows = one_hot_rows(weight, cotangents)
        if rows is None:
            return self._cut(cotangents, size, 0, partial(_finished, reduce=reduce))
        return self._cut(rows, size, place, lambda gradients, _: _reduced(gradients, reduce), hidden)

    def _cut(
        self,
        cotangents: Tensor,
        size: int,
        place: int,
        finish: Callable[[Tensors, Tensor], Tensors],
        start: Tensor | None = None,
    ) -> list[Tensor]:
        """Pull cotangents of the output at `place` back in chunks: larger ones down to the bottleneck."""
        neck = self.bottleneck
        if neck is None:
            return _in_chunks(_vectorised(lambda c: finish(self._back_from(place, c), c)), size, cotangents)
        upward = _vectorised(partial(_between, neck.output if start is None else start, neck.tensor))
        onward = _vectorised(lambda h, c: finish(self._back_from(self.places["bottleneck"], h), c))

        def in_two(some: Tensor) -> Tensors:
            (halfway,) = upward(some)
            return tuple(_in_chunks(onward, size, halfway, some))

        return _in_chunks(in_two, neck.targets, cotangents)


def _between(output: Tensor, tensor: Tensor, cotangent: Tensor) -> Tensors:
    """Pull a cotangent of `output` back to `tensor`."""
    (gradient,) = pulled_back([output], [tensor], [cotangent])
    assert gradient is not None
    return (gradient,)


def _reduced(gradients: Tensors, reduce: Reduce | None) -> Tensors:
    return gradients if reduce is None else reduce(gradients)


def _finished(gradients: Tensors, cotangent: Tensor, reduce: Reduce | None) -> Tensors:
    result = _reduced(gradients, reduce)
    return result if clean() or readable(cotangent) else tuple(poisoned(r, cotangent) for r in result)


def _combined(
    back: Callable[[Tensor], Tensors],
    hidden: Tensor,
    weight: Tensor,
    cotangents: Tensor,
    size: int,
    reduce: Reduce | None,
) -> list[Tensor]:
    """Pull each unit of the head's input back once; the pull of a cotangent is a linear combination of these."""
    units = eye(weight.shape[1], hidden).unsqueeze(1).expand(-1, *hidden.shape)
    basis = _in_chunks(_vectorised(back), size, units)

    def combine(chunk: Tensor) -> Tensors:
        with torch.autocast(weight.device.type, enabled=False):  # autocast would multiply in half precision
            shares = chunk @ weight.to(chunk.dtype)
            gradients = [
                torch.einsum("kbj,jbx->kbx", shares.to(g.dtype), g.flatten(2)).unflatten(2, g.shape[2:]) for g in basis
            ]
        return _vectorised(lambda cotangent, *g: _finished(g, cotangent, reduce))(chunk, *gradients)

    return _in_chunks(combine, size, cotangents)


def _vectorised(one: Callable[..., Tensors]) -> Callable[..., Tensors]:
    def many(*stacked: Tensor) -> Tensors:
        if len(stacked[0]) > 1:
            return torch.vmap(one)(*stacked)
        return each(lambda g: g.unsqueeze(0), one(*(s[0] for s in stacked)))

    return many


def _is_mapped(tensor: Tensor, level: int) -> bool:
    return functorch.is_batchedtensor(tensor) and functorch.maybe_get_level(tensor) == level


def _in_chunks(pull: Callable[..., Tensors], size: int, *stacked: Tensor) -> list[Tensor]:
    """Pull ``[target ...]`` cotangents, `size` at a time, into one result each."""
    count = len(stacked[0])
    gradients: list[Tensor] = []
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, count, size):
        part = pull(*(s[start : start + size] for s in stacked))
        if any(is_functorch_wrapped_tensor(g) or g.requires_grad for g in part):
            parts.append(part)  # the result is differentiated: nothing may be written in place
            continue
        gradients = gradients or [g.new_empty(count, *g.shape[1:]) for g in part]
        for whole, g in zip(gradients, part, strict=True):
            whole[start : start + size] = g
    return gradients or [torch.cat(column) for column in zip(*parts, strict=True)]
