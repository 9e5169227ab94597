"""The run of a method over many targets that is under way in this thread, and what it knows of them."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pullback._core.batching import budget_on
from pullback._ops.accounting import Account
from pullback._torch.internals import (
    compiling,
    current_level,
    functorch,
    readable,
)

COTANGENT_BYTES = 24 * 2**20, 512 * 2**20  # budget for the cotangents of a chunk, on a CPU and elsewhere

MIN_TARGETS = 4  # in a chunk: with fewer, the weights of late layers are read too often
LARGE_HEAD_NUMEL = 2**14  # weights of a head, from which a pull that starts at its input is worth while


class Bottleneck(NamedTuple):
    """A tensor of a forward through which all paths from its output lead back, with only small tensors after it."""

    tensor: Tensor
    output: Tensor
    targets: int  # how many go together from the output to here


@dataclass
class TargetRun:
    """A method that runs over many targets in this thread, and what is known of its forward.

    Attributes:
        level: Of the `vmap` over targets, among the transforms.
        largest: Bytes of the largest result of an operation.
        clean: Whether all target indices met are known to be classes.
        head: Input and weight of the linear map that gives the output.
        places: Where head and bottleneck are among the outputs of a forward.
        linear: Whether the pull is linear in the cotangent.
        products: Of inputs and weights in a forward.
    """

    targets: Tensor
    chunk_size: int | Literal["auto"] | None
    level: int = 0
    largest: int = 0
    clean: bool | None = None
    head: tuple[Tensor, Tensor] | None = None
    bottleneck: Bottleneck | None = None
    places: dict[str, int] = field(default_factory=dict)
    linear: bool = False
    products: int = 0

    def account_on(self, device: torch.device) -> Account:
        """Start an account of a forward."""
        return Account(small=budget_on(device, COTANGENT_BYTES) // (4 * MIN_TARGETS))


local = threading.local()


def current_run() -> TargetRun | None:
    """Return the run over targets that is under way in this thread."""
    return None if compiling() else getattr(local, "many", None)


def check_range(target: Any, classes: int) -> None:
    """Raise where an index of a tensor or an array is no class."""
    if len(target.reshape(-1)):
        low, high = int(target.min()), int(target.max())
        if low < 0 or high >= classes:
            raise ValueError(f"`target` must lie in 0 ... {classes - 1}, got {low if low < 0 else high}.")


def check_indices(target: Any, classes: int) -> None:
    """Check the indices of all targets that run together: under `vmap` none of them can be read by itself."""
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
    """Whether every index of the targets that run together is known to be a class."""
    running = current_run()
    return running is not None and running.clean is True


def only_targets() -> bool:
    """Whether the `vmap` over targets is the only transform at work here."""
    running = current_run()
    return running is not None and running.level == current_level() == 1


def targets_per_chunk(running: TargetRun, device: torch.device) -> int:
    """Return how many targets go in a chunk, so that its cotangents keep to a budget: four of the largest a target.

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
