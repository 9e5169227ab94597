"""Observe what the operations of a run return: the largest result, the products, the last linear map, bottlenecks.

Gain: `over_targets` sizes its chunks by it, which keeps the memory of 64 targets to that of 2, and pulls ResNet-50's
late layers back for several targets at once (`benchmarks/targets.py`). Switch: a run without an account observes
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pullback._ops.spellings import Operation

MAX_CANDIDATES = 16  # results that are kept as possible bottlenecks, from the last large one on
_WEIGHTED = frozenset((F.linear, F.conv1d, F.conv2d, F.conv3d))


class Account:
    """What a run has returned so far.

    Attributes:
        small: Bytes up to which a result counts as small.
        largest: Bytes of the largest result.
        products: Products of inputs and weights, in linear layers and convolutions.
        linear: Input, weight and output of the last linear layer.
        largest_after: Bytes of the largest result after the last one that was not small.
        candidates: That last large result, and the first small ones after it.
    """

    def __init__(self, small: int = 0) -> None:
        self.small = small
        self.largest = self.products = self.largest_after = 0
        self.linear: tuple[Tensor, Tensor, Tensor] | None = None
        self.candidates: list[Tensor] = []

    def restart(self, tensor: Tensor) -> None:
        """Forget what came before `tensor`: nothing is pulled back further than there."""
        self.largest, self.products = tensor.numel() * tensor.element_size(), 0
        self.largest_after, self.candidates = 0, []

    def note(self, func: Operation | None, args: Sequence[Any], result: Any) -> None:
        """Note the result of an operation."""
        if not isinstance(result, Tensor):
            return
        size = result.numel() * result.element_size()
        self.largest = max(self.largest, size)
        if size > self.small:
            self.candidates, self.largest_after = [result], 0
        else:
            self.largest_after = max(self.largest_after, size)
            if len(self.candidates) < MAX_CANDIDATES:
                self.candidates.append(result)
        if func in _WEIGHTED and len(args) > 1:
            self.products += result.numel() * (args[1].numel() // args[1].shape[0])
            self.linear = (args[0], args[1], result) if func is F.linear else self.linear
