"""Trade torch operations for others while a function runs.

A `torch.overrides.TorchFunctionMode` sees every call of a torch function that Python makes, whatever its spelling
(`nn.ReLU`, `F.relu`, `torch.relu`, `x.relu()`, `x.relu_()`, a name bound before). It is local to the thread and to the
``with`` block, so nothing global is patched. What runs inside one C++ call (a scripted module, a fused kernel) and
inside a foreign `autograd.Function` is out of its sight.

`canonical` brings the spellings of one operation together: it is the key of every table of rules.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pullback._ops.replacements import REPLACEMENTS
from pullback._ops.spellings import SPELLINGS, Operation, Spelling, canonical

MAX_BOTTLENECKS = 16  # operations that are looked at for a waist, from the last large one on
Rule = Callable[..., Any]

SAVED_TENSORS = "kept"  # in a run's memo: tensors that its graph keeps with their versions, where a rule may note them


def _matches(layer: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(layer, pattern)


_matches._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]  # dynamo cannot trace fnmatch


@dataclass
class Table:
    """Rules by operation, and by layer name pattern and operation; the more specific key wins, then the later.

    `must_cover` names the operations that must have a rule: one without is told. A rule returns `NotImplemented` for a use of
    its operation that it does not cover; torch's own operation then runs.
    """

    rules: dict[Operation, Rule] = field(default_factory=dict)
    by_layer: list[tuple[str, Operation | None, Rule]] = field(default_factory=list)
    must_cover: frozenset[Operation] = frozenset()
    name: str = "the rules"
    on_operation: Callable[..., None] | None = (
        None  # sees every operation: on_operation(memo, function, args, kwargs, result)
    )

    @staticmethod
    def of(mapping: Mapping[Any, Rule], must_cover: Iterable[Operation] = (), name: str = "the rules") -> Table:
        table = Table(must_cover=frozenset(map(canonical, must_cover)), name=name)
        for key, rule in mapping.items():
            if isinstance(key, tuple):
                pattern, operation = key
                table.by_layer.append((pattern, canonical(operation), rule))
            else:
                table.rules[canonical(key)] = rule
        return table

    @property
    def wants_layers(self) -> bool:
        return bool(self.by_layer or self.must_cover)

    def find(self, layer: str, operation: Operation) -> Rule | None:
        for pattern, wanted, rule in reversed(self.by_layer):
            if wanted is operation and _matches(layer, pattern):
                return rule
        return self.rules.get(operation)


_WEIGHTED = frozenset((F.linear, F.conv1d, F.conv2d, F.conv3d))


class OperationMode(TorchFunctionMode):
    """Run torch operations by the rules of a table, and what torch gets wrong by `pullback._native`.

    `layer` (a function that names the layer being run) is needed where the table has rules by layer or tells.
    What was met without a rule is in `told`: operation name -> layer names.
    """

    def __init__(self, table: Table | None = None) -> None:
        super().__init__()
        self.table = table
        self.layers: list[str] = []  # the stack of layers being run, filled by the shell's hooks
        self.uncovered: dict[str, dict[str, None]] = {}
        self.dropouts: dict[str, None] = {}  # layers with dropout that asks for training mode, which is left out
        self.memo: dict[str, Any] = {}  # what the rules keep for the length of this run
        self.measures = False  # keep account of what operations put out
        self.largest = 0  # in bytes
        self.products = 0  # of inputs and weights, in linear layers and convolutions
        self.linear: tuple[Tensor, Tensor, Tensor] | None = None  # input, weight and output of the last linear map
        self.narrow = 0  # in bytes: what counts as small
        self.beyond = 0  # the largest after the last that was not small
        self.bottlenecks: list[Tensor] = []  # that last one, and the first few after it

    def start_account(self, tensor: Tensor) -> None:
        """Count what operations put out from here on, beginning with `tensor`."""
        self.largest, self.products, self.beyond, self.bottlenecks = tensor.numel() * tensor.element_size(), 0, 0, []

    def note_uncovered(self, operation: str) -> None:
        self.uncovered.setdefault(operation, {})[self.layers[-1] if self.layers else ""] = None

    def note_dropout(self) -> None:
        self.dropouts[self.layers[-1] if self.layers else ""] = None

    def overwritten(self) -> bool:
        """Say whether the run wrote to what its graph keeps: there is no way back through it."""
        return any(tensor._version != version for tensor, version in self.memo.get(SAVED_TENSORS, ()))

    def within(self) -> Any:
        """Give the context in which a composite operation runs its parts, so that the rules see them."""
        return nullcontext() if self.table is None else self

    def __torch_function__(
        self, func: Operation, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.table is None and not self.measures and func not in REPLACEMENTS:  # the same, sooner
            return func(*args, **kwargs)
        if self.table is None or self.table.on_operation is None:
            return self._run(func, args, kwargs)
        result = self._run(func, args, kwargs)
        self.table.on_operation(self.memo, func, args, kwargs, result)
        return result

    def _run(self, func: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        spelling = self._spelling(func)
        if spelling is not None:
            done = self._by_rule(spelling, func, args, kwargs)
            if done is not NotImplemented:
                return done
        native = REPLACEMENTS.get(func)
        result = func(*args, **kwargs) if native is None else native(self, func, *args, **kwargs)
        if self.measures and isinstance(result, Tensor):
            self.measure(func, args, result)
        return result

    def measure(self, func: Operation | None, args: tuple[Any, ...], result: Tensor) -> None:
        """Keep account of what an operation puts out."""
        size = result.numel() * result.element_size()
        self.largest = max(self.largest, size)
        if size > self.narrow:
            self.bottlenecks, self.beyond = [result], 0
        else:
            self.beyond = max(self.beyond, size)
            if len(self.bottlenecks) < MAX_BOTTLENECKS:
                self.bottlenecks.append(result)
        if func in _WEIGHTED and len(args) > 1:
            self.products += result.numel() * (args[1].numel() // args[1].shape[0])
            self.linear = (args[0], args[1], result) if func is F.linear else self.linear

    def _spelling(self, func: Operation) -> Spelling | None:
        """Give how `func` spells an operation that the table may have a rule for: torch's, or the caller's own one."""
        if self.table is None:
            return None
        return SPELLINGS.get(func) or (Spelling(func) if func in self.table.rules else None)

    def _by_rule(self, spelling: Spelling, func: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        table, operation = self.table, spelling.operation
        assert table is not None
        rule = table.find(self.layers[-1] if self.layers else "", operation)
        if rule is None:
            if operation in table.must_cover:
                self.note_uncovered(spelling.name)
            return NotImplemented
        in_place = spelling.in_place(args, kwargs)
        if spelling.flag is not None:
            args = args[: spelling.flag] + args[spelling.flag + 1 :]
        pure = {k: v for k, v in kwargs.items() if k not in ("inplace", "_stacklevel")}
        if getattr(rule, "wants_memo", False):
            pure["memo"] = self.memo
        if getattr(rule, "writes", False):  # itself, where the operation does
            pure["inplace"], in_place = in_place, False
        first: Any = args[0] if args else kwargs.get("input")
        if in_place:  # what the rule saves must outlive the write
            args, pure = ((first.clone(), *args[1:]), pure) if args else (args, {**pure, "input": first.clone()})
        result = rule(operation, *args, **pure)
        if result is NotImplemented:  # the rule does not cover this use of the operation
            if operation in table.must_cover:
                self.note_uncovered(spelling.name)
            return NotImplemented
        if in_place:
            return first.copy_(result)
        return result
