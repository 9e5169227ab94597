"""Where a pull of many targets may start: at the input of a linear head, or be cut: at a bottleneck."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pullback._core.batching import budget_on
from pullback._core.many.state import (
    COTANGENT_BYTES,
    LARGE_HEAD_NUMEL,
    MIN_TARGETS,
    Bottleneck,
    TargetRun,
    targets_per_chunk,
)
from pullback._ops.accounting import Account
from pullback._torch.internals import (
    is_functorch_wrapped_tensor,
    readable,
)


def note_forward(many: TargetRun, account: Account, output: Tensor, linear: bool) -> tuple[Tensor, ...]:
    """Note what a forward tells of its pulls. Returns the tensors at which a pull may start, or be cut.

    These are the input of a linear head, where a pull from there is cheaper, and a bottleneck.
    """
    many.largest = max(many.largest, account.largest)
    hidden, weight, result = account.linear or (output, output, None)
    is_head = result is output and readable(weight) and not weight.requires_grad
    many.head = (hidden, weight) if is_head else None
    many.linear, many.products = linear, account.products
    many.bottleneck = _find_bottleneck(many, account, output)
    found: dict[str, Tensor] = {}
    if is_head and hidden.ndim == 2 and weight.numel() >= LARGE_HEAD_NUMEL:
        found["head"] = hidden
    if many.bottleneck is not None:
        found["bottleneck"] = many.bottleneck.tensor
    many.places = {name: place for place, name in enumerate(found, 1)}
    return tuple(found.values())


def _find_bottleneck(many: TargetRun, account: Account, output: Tensor) -> Bottleneck | None:
    """Find where to cut a pull: late layers, with small activations and many weights, suit larger chunks."""
    device, count = output.device, len(many.targets)
    size = targets_per_chunk(many, device)
    most = count if many.chunk_size in ("auto", None) else min(count, many.chunk_size)
    if (
        size >= min(MIN_TARGETS, most)
        or not account.largest_after
        or output.grad_fn is None
        or is_functorch_wrapped_tensor(output)
    ):
        return None
    budget, ends = budget_on(device, COTANGENT_BYTES), (output, None if many.head is None else many.head[0])

    def wide(tensor: Tensor) -> int:
        return min(most, budget // (4 * max(account.largest_after, tensor.numel() * tensor.element_size())))

    for tensor in sorted(account.candidates, key=wide, reverse=True):  # of two that are as wide, the earlier one
        hooked = tensor._backward_hooks or tensor.retains_grad  # its hooks would run twice
        if wide(tensor) < 2 * size:
            return None
        if not hooked and not any(tensor is end for end in ends) and _all_pass(output, tensor):
            return Bottleneck(tensor, output, wide(tensor))
    return None


def _all_pass(output: Tensor, tensor: Tensor) -> bool:
    """Whether all paths of the graph from `output` back lead through `tensor`."""
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


def combines(many: TargetRun, width: int, primals: Sequence[Tensor]) -> bool:
    """Whether a pull for each unit of a narrow head, and a combination of them a target, take fewer products."""
    count, numbers = len(many.targets), sum(p.numel() for p in primals)
    return many.linear and (count - width) * many.products > count * width * numbers


def one_hot_rows(weight: Tensor, cotangents: Tensor) -> Tensor | None:
    """Return cotangents ``[target batch unit]`` at a head's input for one-hot ``[target batch class]`` at its output.

    They are rows of its weight. `None` where the cotangents are not one-hot.
    """
    if cotangents.ndim != 3 or not readable(cotangents):
        return None
    chosen = cotangents.argmax(2)
    hot = torch.zeros_like(cotangents).scatter_(2, chosen.unsqueeze(2), 1)
    return weight[chosen].to(cotangents.dtype) if torch.equal(hot, cotangents) else None
