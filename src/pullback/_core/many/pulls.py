"""Pull the cotangents of many targets back through one forward, in chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from pullback._core.inputs import each
from pullback._core.many.shortcuts import combines, one_hot_rows
from pullback._core.many.state import clean, current_run, targets_per_chunk
from pullback._core.types import Back, Pull, Reduce, Tensors
from pullback._torch.internals import (
    current_level,
    eye,
    functorch,
    is_functorch_wrapped_tensor,
    pulled_back,
    readable,
)


def shared_pull(back: Back, outputs: Tensors, primals: Sequence[Tensor] = ()) -> Pull:
    """Make the pull of a forward's output; the targets that are run together go in chunks through the one forward.

    `back` takes a cotangent for each of `outputs`: the output and what `shortcuts` gave. Where there are more targets
    than the head is wide and the pull is linear, one for each unit of the head's input, and a combination of them,
    serve all targets. From the output to the waist more targets go together than from there on. `primals` are what it
    pulls back to.
    """

    def back_from(place: int, cotangent: Tensor) -> Tensors:
        return back([cotangent if i == place else None for i in range(len(outputs))])

    def pull(cotangent: Tensor, reduce: Reduce | None = None) -> Tensors:
        return _finished(back_from(0, cotangent), cotangent, reduce)

    running = current_run()
    if running is None:
        return pull
    places = running.places if len(outputs) > 1 else {}
    head = running.head if "head" in places else None
    bottleneck = running.bottleneck if "waist" in places else None

    def chunked(cotangent: Tensor, reduce: Reduce | None = None) -> Tensors:
        level, count = running.level, len(running.targets)
        one_forward = not any(_is_mapped(output, level) for output in outputs)  # an adaptive method's has one a target
        if not (one_forward and _is_mapped(cotangent, level)) or current_level() != level:
            return pull(cotangent, reduce)
        size = targets_per_chunk(running, cotangent.device)
        if size >= count and head is None:
            return pull(cotangent, reduce)
        whole = functorch._remove_batch_dim(cotangent, level, count, 0)
        if head is not None and combines(running, head[1].shape[1], primals):
            hidden = outputs[places["head"]]
            parts = _combined(partial(back_from, places["head"]), hidden, head[1], whole, size, reduce)
        elif head is not None and (rows := one_hot_rows(head[1], whole)) is not None:
            parts = cut(rows, size, head[0], places["head"], lambda gradients, _: _reduced(gradients, reduce))
        else:
            parts = cut(
                whole, size, bottleneck and bottleneck.output, 0, lambda gradients, c: _finished(gradients, c, reduce)
            )
        return tuple(functorch._add_batch_dim(part, 0, level) for part in parts)

    def cut(
        cotangents: Tensor, size: int, start: Tensor | None, place: int, finish: Callable[[Tensors, Tensor], Tensors]
    ) -> list[Tensor]:
        """Pull cotangents of `start`, which is at `place` among the outputs, in chunks."""
        if bottleneck is None or start is None:
            return _in_chunks(_vectorised(lambda c: finish(back_from(place, c), c)), size, cotangents)

        upward = _vectorised(partial(_between, start, bottleneck.tensor))

        def in_two(some: Tensor) -> Tensors:
            (halfway,) = upward(some)
            onward = _vectorised(lambda h, c: finish(back_from(places["waist"], h), c))
            return tuple(_in_chunks(onward, size, halfway, some))

        return _in_chunks(in_two, bottleneck.wide, cotangents)

    return chunked


def _between(output: Tensor, tensor: Tensor, cotangent: Tensor) -> Tensors:
    """Pull a cotangent of `output` back to `tensor`."""
    (gradient,) = pulled_back([output], [tensor], [cotangent])
    assert gradient is not None
    return (gradient,)


def _reduced(gradients: Tensors, reduce: Reduce | None) -> Tensors:
    return gradients if reduce is None else reduce(gradients)


def _finished(gradients: Tensors, cotangent: Tensor, reduce: Reduce | None) -> Tensors:
    result = _reduced(gradients, reduce)
    return result if clean() or readable(cotangent) else tuple(_poisoned(r, cotangent) for r in result)


def _combined(
    back: Callable[[Tensor], Tensors],
    hidden: Tensor,
    weight: Tensor,
    cotangents: Tensor,
    size: int,
    reduce: Reduce | None,
) -> list[Tensor]:
    """Pull each unit of the head's input back once: the pull of a cotangent is a combination of these."""
    units = eye(weight.shape[1], hidden).unsqueeze(1).expand(-1, *hidden.shape)
    basis = _in_chunks(_vectorised(back), size, units)

    def combine(chunk: Tensor) -> Tensors:
        with torch.autocast(weight.device.type, enabled=False):  # in the precision of the pulls
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


def _poisoned(gradient: Tensor, cotangent: Tensor) -> Tensor:
    """Keep the NaN of an index that is no class: a rectifier that is off would drop it, and leave zeros."""
    bad = (cotangent - cotangent).to(gradient.dtype)
    bad = bad.reshape(bad.shape[0], -1).sum(1) if bad.ndim else bad
    if gradient.ndim and gradient.shape[:1] == bad.shape:
        return gradient + bad.reshape(-1, *[1] * (gradient.ndim - 1))
    return gradient + bad.sum()


def _in_chunks(pull: Callable[..., Tensors], size: int, *stacked: Tensor) -> list[Tensor]:
    """Pull ``[target ...]`` cotangents, `size` at a time, into one result each."""
    count = len(stacked[0])
    gradients: list[Tensor] = []
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, count, size):
        part = pull(*(s[start : start + size] for s in stacked))
        if any(is_functorch_wrapped_tensor(g) or g.requires_grad for g in part):
            parts.append(part)  # somebody differentiates the result: nothing is written in place
            continue
        gradients = gradients or [g.new_empty(count, *g.shape[1:]) for g in part]
        for whole, g in zip(gradients, part, strict=True):
            whole[start : start + size] = g
    return gradients or [torch.cat(column) for column in zip(*parts, strict=True)]
