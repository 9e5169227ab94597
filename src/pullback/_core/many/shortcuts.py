"""Where a pull of many targets may start: at the input of a linear head, or be cut: at a bottleneck."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pullback._core.batching import budget_on
from pullback._core.many.state import (
    COTANGENT_BYTES,
    FEW,
    LARGE_HEAD_NUMEL,
    Bottleneck,
    TargetRun,
    current_run,
    targets_per_chunk,
)
from pullback._ops.dispatch import OperationMode
from pullback._torch.internals import (
    is_functorch_wrapped_tensor,
    readable,
)


def note_forward(mode: OperationMode, output: Tensor) -> None:
    """Keep what a forward tells of the size of its pulls, and its head, where that is a linear map."""
    running = current_run()
    if running is not None:
        running.largest = max(running.largest, mode.largest)
        hidden, weight, result = mode.linear or (output, output, None)
        is_head = result is output and readable(weight) and not weight.requires_grad
        running.head = (hidden, weight) if is_head else None
        running.linear, running.products = mode.table is None, mode.products
        running.bottleneck = _find_bottleneck(running, mode, output)


def shortcuts() -> tuple[Tensor, ...]:
    """Give tensors of the forward that was just run at which a pull may start.

    The input of its linear head, where pulling from there may be cheaper, and its waist.
    """
    running = current_run()
    if running is None:
        return ()
    found: dict[str, Tensor] = {}
    if running.head is not None and running.head[0].ndim == 2 and running.head[1].numel() >= LARGE_HEAD_NUMEL:
        found["head"] = running.head[0]
    if running.bottleneck is not None:
        found["waist"] = running.bottleneck.tensor
    running.places = {name: place for place, name in enumerate(found, 1)}
    return tuple(found.values())


def _find_bottleneck(running: TargetRun, mode: OperationMode, output: Tensor) -> Bottleneck | None:
    """Find where to cut a pull in two: late layers, small and heavy, are cheaper for many targets together."""
    device, count = output.device, len(running.targets)
    size = targets_per_chunk(running, device)
    most = count if running.chunk_size in ("auto", None) else min(count, running.chunk_size)
    if size >= min(FEW, most) or not mode.beyond or output.grad_fn is None or is_functorch_wrapped_tensor(output):
        return None
    budget, ends = budget_on(device, COTANGENT_BYTES), (output, None if running.head is None else running.head[0])

    def wide(tensor: Tensor) -> int:
        return min(most, budget // (4 * max(mode.beyond, tensor.numel() * tensor.element_size())))

    for tensor in sorted(mode.bottlenecks, key=wide, reverse=True):  # the earlier one of two that are as wide
        hooked = tensor._backward_hooks or tensor.retains_grad  # they would run twice
        if wide(tensor) < 2 * size:
            return None
        if not hooked and not any(tensor is end for end in ends) and _all_pass(output, tensor):
            return Bottleneck(tensor, output, wide(tensor))
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


def combines(running: TargetRun, width: int, primals: Sequence[Tensor]) -> bool:
    """Say whether a pull for each unit of a narrow head, and a combination of them a target, take fewer products."""
    count, numbers = len(running.targets), sum(p.numel() for p in primals)
    return running.linear and (count - width) * running.products > count * width * numbers


def one_hot_rows(weight: Tensor, cotangents: Tensor) -> Tensor | None:
    """Give cotangents ``[target batch unit]`` at a head's input for one-hot ``[target batch class]`` at its output.

    They are rows of its weight. None where the cotangents are not one-hot.
    """
    if cotangents.ndim != 3 or not readable(cotangents):
        return None
    chosen = cotangents.argmax(2)
    hot = torch.zeros_like(cotangents).scatter_(2, chosen.unsqueeze(2), 1)
    return weight[chosen].to(cotangents.dtype) if torch.equal(hot, cotangents) else None
