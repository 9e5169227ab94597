"""The run of a method over many targets that is under way in this thread, and what it knows of them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pullback._core.batching import budget_on
from pullback._torch.internals import (
    compiling,
    current_level,
    functorch,
    readable,
)

COTANGENT_BYTES = 24 * 2**20, 512 * 2**20  # bytes for those of a chunk, on a CPU and elsewhere

FEW = 4  # targets in a chunk: fewer read the weights of late layers too often

LARGE_HEAD_NUMEL = 2**14  # weights, from which it is worth while to go round a head's product


class Bottleneck(NamedTuple):
    """A tensor of a forward that all ways from its output back lead through, and what comes after is small."""

    tensor: Tensor
    output: Tensor
    wide: int  # targets that go together from the output to here


@dataclass
class TargetRun:
    """The run of a method over targets that is under way in this thread."""

    targets: Tensor
    chunk_size: int | Literal["auto"] | None
    level: int = 0
    largest: int = 0  # bytes that the largest operation of the forward put out
    clean: bool | None = None  # whether all indices met are known to be classes
    head: tuple[Tensor, Tensor] | None = None  # input and weight of a linear map that gives the output
    bottleneck: Bottleneck | None = None
    places: dict[str, int] = field(default_factory=dict)  # of head and waist, among what a forward hands to its pull
    linear: bool = False  # whether what a cotangent is pulled back to is linear in it
    products: int = 0  # of inputs and weights in a forward


local = threading.local()


def current_run() -> TargetRun | None:
    return None if compiling() else getattr(local, "many", None)


def check_range(target: int | Tensor | np.ndarray, classes: int) -> None:
    if isinstance(target, int) or len(target.reshape(-1)):
        low, high = (target, target) if isinstance(target, int) else (int(target.min()), int(target.max()))
        if low < 0 or high >= classes:
            raise ValueError(f"`target` must lie in 0 ... {classes - 1}, got {low if low < 0 else high}.")


def check_indices(target: Any, classes: int) -> None:
    """Check the targets that are run together, of which `target` is made: one by one they cannot be read."""
    running = current_run()
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
    running = current_run()
    return running is not None and running.clean is True


def only_targets() -> bool:
    """Say whether the targets that are run together are the only thing that is batched or differentiated here."""
    running = current_run()
    return running is not None and running.level == current_level() == 1


def measuring(tensors: Sequence[Tensor]) -> tuple[bool, int]:
    """Say whether to keep account of a forward, and how many bytes count as small, by the device of its inputs."""
    running = current_run()
    if running is None or not tensors:
        return running is not None, 0
    return True, budget_on(tensors[0].device, COTANGENT_BYTES) // (4 * FEW)


def targets_per_chunk(running: TargetRun, device: torch.device) -> int:
    """Cut the targets so that a chunk's cotangents, about four of the largest activation a target, keep to a budget.

    On a CPU larger chunks are not faster, and slower with depthwise convolutions: `benchmarks/targets.py`.
    """
    count = len(running.targets)
    if running.chunk_size is None:
        return count
    on_cpu = device.type == "cpu"
    fitting = max(1, budget_on(device, COTANGENT_BYTES) // max(1, 4 * running.largest))
    if running.chunk_size == "auto":
        return min(count, fitting)
    return min(running.chunk_size, fitting) if on_cpu else running.chunk_size
