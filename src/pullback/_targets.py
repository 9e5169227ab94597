"""Many targets of one input: one forward, and pulls in chunks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pullback._batch import ENLARGED, GRADIENTS, Progress, Together, budget_on, chunks, each, report, rows_together
from pullback._ops import swapped
from pullback._torch import compiling, current_level, eye, functorch, is_functorch_wrapped_tensor, pulled_back

Tensors = tuple[Tensor, ...]
Back = Callable[[Sequence[Tensor | None]], Tensors]
Reduce = Callable[[Tensors], Tensors]


class Pull(Protocol):
    """Pull a cotangent back; what `reduce` makes of the gradients takes their place, chunk by chunk."""

    def __call__(self, cotangent: Tensor, reduce: Reduce | None = None) -> Tensors: ...


COTANGENTS = 24 * 2**20, 512 * 2**20  # bytes for those of a chunk, on a CPU and elsewhere

FEW = 4  # targets in a chunk: fewer read the weights of late layers too often

LARGE_HEAD = 2**14  # weights, from which it is worth while to go round a head's product


class Waist(NamedTuple):
    """A tensor of a forward that all ways from its output back lead through, and what comes after is small."""

    tensor: Tensor
    output: Tensor
    wide: int  # targets that go together from the output to here


@dataclass
class _Many:
    """The run of a method over targets that is under way in this thread."""

    targets: Tensor
    chunk_size: int | Literal["auto"] | None
    level: int = 0
    largest: int = 0  # bytes that the largest operation of the forward put out
    clean: bool | None = None  # whether all indices met are known to be classes
    head: tuple[Tensor, Tensor] | None = None  # input and weight of a linear map that gives the output
    waist: Waist | None = None
    places: dict[str, int] = field(default_factory=dict)  # of head and waist, among what a forward hands to its pull
    linear: bool = False  # whether what a cotangent is pulled back to is linear in it
    products: int = 0  # of inputs and weights in a forward


_local = threading.local()


def _running() -> _Many | None:
    return None if compiling() else getattr(_local, "many", None)


def over_targets(
    method: Callable[..., Any], *, chunk_size: int | Literal["auto"] | None = "auto"
) -> Callable[..., Any]:
    """Explain many targets at once: one forward shared by all, one backward a target, some of them at a time.

    ``over_targets(method)(params, model, x, targets, **options)`` gives what
    ``torch.vmap(method, (None, None, None, 0))(params, model, x, targets)`` gives, with memory kept to a budget.

    Args:
        method: Any method ``method(params, model, x, target, **options)``.
        chunk_size: Targets pulled back together, at most; `None` for all of them. ``"auto"`` takes as many as keep to a
            memory budget for their cotangents, 24 MB on a CPU and 512 MB elsewhere. On a CPU the budget cuts larger
            chunks too, which would not be faster; through late layers, whose activations are small and weights many,
            it lets more targets go together than through early ones.

    Returns:
        A function whose `targets` are class indices ``[target]`` or ``[target batch]``, or floating-point cotangents
        ``[target *output]``, and whose result is ``[target ...]``.

    Raises:
        ValueError: If `chunk_size` is less than 1, or an index is no class.

    Example:
        >>> model = torch.nn.Linear(3, 5)
        >>> params, x = params_of(model), torch.randn(1, 3)
        >>> a = over_targets(gradient)(params, model, x, range(5))
        >>> torch.allclose(a[:, 0], model.weight)
        True
    """
    if chunk_size not in ("auto", None) and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"`chunk_size` must be at least 1, 'auto' or None, got {chunk_size!r}.")

    @wraps(method)
    def many(params: Any, model: Any, x: Any, targets: Any, **options: Any) -> Any:
        targets = _stacked(targets)
        before = getattr(_local, "many", None)
        running = _Many(targets, chunk_size)

        def one(target: Tensor) -> Any:
            running.level = current_level() or 0
            return method(params, model, x, target, **options)

        if not compiling():
            _local.many = running
        try:
            return torch.vmap(one, randomness="same")(targets)
        finally:
            if not compiling():
                _local.many = before

    return many


def _stacked(targets: Any) -> Tensor:
    if not isinstance(targets, Tensor):
        try:
            targets = torch.as_tensor(np.asarray(list(targets) if isinstance(targets, range) else targets))
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"`targets` must be one tensor of integers or cotangents, targets first, got {type(targets).__name__}."
            ) from error
    if targets.ndim == 0 or not len(targets):
        raise ValueError(f"`targets` must be a list of at least one target, got shape {list(targets.shape)}.")
    return targets


def readable(tensor: Tensor) -> bool:
    """Say whether the values of a tensor can be looked at: not under a transform, nor while a graph is traced."""
    if compiling() or tensor.is_meta or is_functorch_wrapped_tensor(tensor):
        return False
    return type(tensor) in (Tensor, nn.Parameter)


def check_range(target: int | Tensor | np.ndarray, classes: int) -> None:
    if isinstance(target, int) or len(target.reshape(-1)):
        low, high = (target, target) if isinstance(target, int) else (int(target.min()), int(target.max()))
        if low < 0 or high >= classes:
            raise ValueError(f"`target` must lie in 0 ... {classes - 1}, got {low if low < 0 else high}.")


def check_indices(target: Any, classes: int) -> None:
    """Check the targets that are run together, of which `target` is made: one by one they cannot be read."""
    running = _running()
    if running is None:
        return
    if readable(running.targets) and not running.targets.is_floating_point():
        check_range(running.targets, classes)
        if functorch.is_batchedtensor(target):
            target = functorch.get_unwrapped(target)
            if readable(target) and target.data_ptr() == running.targets.data_ptr():
                running.clean = running.clean is not False
                return
    running.clean = False


def clean() -> bool:
    """Say whether every index of the targets that are run together is known to be a class."""
    running = _running()
    return running is not None and running.clean is True


def only_targets() -> bool:
    """Say whether the targets that are run together are the only thing that is batched or differentiated here."""
    running = _running()
    return running is not None and running.level == current_level() == 1


def measuring(tensors: Sequence[Tensor]) -> tuple[bool, int]:
    """Say whether to keep account of a forward, and how many bytes count as small, by the device of its inputs."""
    running = _running()
    if running is None or not tensors:
        return running is not None, 0
    return True, budget_on(tensors[0].device, COTANGENTS) // (4 * FEW)


def note_forward(mode: swapped, output: Tensor) -> None:
    """Keep what a forward tells of the size of its pulls, and its head, where that is a linear map."""
    running = _running()
    if running is not None:
        running.largest = max(running.largest, mode.largest)
        hidden, weight, result = mode.linear or (output, output, None)
        is_head = result is output and readable(weight) and not weight.requires_grad
        running.head = (hidden, weight) if is_head else None
        running.linear, running.products = mode.table is None, mode.products
        running.waist = _waist(running, mode, output)


def shortcuts() -> tuple[Tensor, ...]:
    """Give tensors of the forward that was just run at which a pull may start.

    The input of its linear head, where pulling from there may be cheaper, and its waist.
    """
    running = _running()
    if running is None:
        return ()
    found: dict[str, Tensor] = {}
    if running.head is not None and running.head[0].ndim == 2 and running.head[1].numel() >= LARGE_HEAD:
        found["head"] = running.head[0]
    if running.waist is not None:
        found["waist"] = running.waist.tensor
    running.places = {name: place for place, name in enumerate(found, 1)}
    return tuple(found.values())


def _waist(running: _Many, mode: swapped, output: Tensor) -> Waist | None:
    """Find where to cut a pull in two: late layers, small and heavy, are cheaper for many targets together."""
    device, count = output.device, len(running.targets)
    size = _chunk_size(running, device)
    most = count if running.chunk_size in ("auto", None) else min(count, running.chunk_size)
    if size >= min(FEW, most) or not mode.beyond or output.grad_fn is None or is_functorch_wrapped_tensor(output):
        return None
    budget, ends = budget_on(device, COTANGENTS), (output, None if running.head is None else running.head[0])

    def wide(tensor: Tensor) -> int:
        return min(most, budget // (4 * max(mode.beyond, tensor.numel() * tensor.element_size())))

    for tensor in sorted(mode.waists, key=wide, reverse=True):  # the earlier one of two that are as wide
        hooked = tensor._backward_hooks or tensor.retains_grad  # they would run twice
        if wide(tensor) < 2 * size:
            return None
        if not hooked and not any(tensor is end for end in ends) and _all_pass(output, tensor):
            return Waist(tensor, output, wide(tensor))
    return None


def _all_pass(output: Tensor, tensor: Tensor) -> bool:
    """Say whether all ways from `output` back lead through `tensor`."""
    if tensor.grad_fn is None or tensor.grad_fn is output.grad_fn:
        return False
    seen, left, met = {output.grad_fn}, [output.grad_fn], False
    while left:
        for node, place in left.pop().next_functions:  # pyright: ignore[reportOptionalMemberAccess]
            if node is tensor.grad_fn and place == tensor.output_nr:
                met = True
            elif node is tensor.grad_fn or type(node).__name__ == "AccumulateGrad":
                return False
            elif node is not None and node not in seen:
                seen.add(node)
                left.append(node)
    return met


def _combines(running: _Many, width: int, primals: Sequence[Tensor]) -> bool:
    """Say whether a pull for each unit of a narrow head, and a combination of them a target, take fewer products."""
    count, numbers = len(running.targets), sum(p.numel() for p in primals)
    return running.linear and (count - width) * running.products > count * width * numbers


def _rows(weight: Tensor, cotangents: Tensor) -> Tensor | None:
    """Give cotangents ``[target batch unit]`` at a head's input for one-hot ``[target batch class]`` at its output.

    They are rows of its weight. None where the cotangents are not one-hot.
    """
    if cotangents.ndim != 3 or not readable(cotangents):
        return None
    chosen = cotangents.argmax(2)
    hot = torch.zeros_like(cotangents).scatter_(2, chosen.unsqueeze(2), 1)
    return weight[chosen].to(cotangents.dtype) if torch.equal(hot, cotangents) else None


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

    running = _running()
    if running is None:
        return pull
    places = running.places if len(outputs) > 1 else {}
    head = running.head if "head" in places else None
    waist = running.waist if "waist" in places else None

    def chunked(cotangent: Tensor, reduce: Reduce | None = None) -> Tensors:
        level, count = running.level, len(running.targets)
        one_forward = not any(_is_mapped(output, level) for output in outputs)  # an adaptive method's has one a target
        if not (one_forward and _is_mapped(cotangent, level)) or current_level() != level:
            return pull(cotangent, reduce)
        size = _chunk_size(running, cotangent.device)
        if size >= count and head is None:
            return pull(cotangent, reduce)
        whole = functorch._remove_batch_dim(cotangent, level, count, 0)
        if head is not None and _combines(running, head[1].shape[1], primals):
            hidden = outputs[places["head"]]
            parts = _combined(partial(back_from, places["head"]), hidden, head[1], whole, size, reduce)
        elif head is not None and (rows := _rows(head[1], whole)) is not None:
            parts = cut(rows, size, head[0], places["head"], lambda gradients, _: _reduced(gradients, reduce))
        else:
            parts = cut(whole, size, waist and waist.output, 0, lambda gradients, c: _finished(gradients, c, reduce))
        return tuple(functorch._add_batch_dim(part, 0, level) for part in parts)

    def cut(
        cotangents: Tensor, size: int, start: Tensor | None, place: int, finish: Callable[[Tensors, Tensor], Tensors]
    ) -> list[Tensor]:
        """Pull cotangents of `start`, which is at `place` among the outputs, in chunks."""
        if waist is None or start is None:
            return _in_chunks(_vectorised(lambda c: finish(back_from(place, c), c)), size, cotangents)

        upward = _vectorised(partial(_between, start, waist.tensor))

        def in_two(some: Tensor) -> Tensors:
            (halfway,) = upward(some)
            onward = _vectorised(lambda h, c: finish(back_from(places["waist"], h), c))
            return tuple(_in_chunks(onward, size, halfway, some))

        return _in_chunks(in_two, waist.wide, cotangents)

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


def _chunk_size(running: _Many, device: torch.device) -> int:
    """Cut the targets so that a chunk's cotangents, about four of the largest activation a target, keep to a budget.

    On a CPU larger chunks are not faster, and slower with depthwise convolutions: `benchmarks/targets.py`.
    """
    count = len(running.targets)
    if running.chunk_size is None:
        return count
    on_cpu = device.type == "cpu"
    fitting = max(1, budget_on(device, COTANGENTS) // max(1, 4 * running.largest))
    if running.chunk_size == "auto":
        return min(count, fitting)
    return min(running.chunk_size, fitting) if on_cpu else running.chunk_size


def copies(count: int, size: Together, like: Sequence[Tensor], progress: Progress = None) -> Iterator[range]:
    """Cut the copies of a batch that a method runs together, `size` at a time, and tell after each how many are done.

    ``"auto"`` takes as many as run fast, guessed by what is explained, which is shaped `like` these; all of them where
    a graph is traced. While targets are run together, it takes as many as keep to four of their budgets, by the
    largest activation and by the attributions of all targets. The first copy then goes alone: its forward tells how
    large an activation is.
    """
    for part in _cut(count, size, like):
        yield part
        report(progress, part.stop, count)


def _cut(count: int, size: Together, like: Sequence[Tensor]) -> Iterator[range]:
    if size != "auto":
        yield from chunks(count, size)
        return
    running, bytes_of_copy = _running(), sum(t.numel() * t.element_size() for t in like)
    if running is None or running.chunk_size is None:
        whole = compiling() or running is not None
        yield from chunks(count, None if whole else rows_together(ENLARGED * bytes_of_copy, like[0].device, GRADIENTS))
        return
    yield range(min(1, count))
    held = len(running.targets) * bytes_of_copy
    budget = 4 * budget_on(like[0].device, COTANGENTS)
    for part in chunks(count - 1, max(1, budget // max(1, held, 4 * running.largest))):
        yield range(part.start + 1, part.stop + 1)
