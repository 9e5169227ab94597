"""Run other operations in place of torch's while a function runs.

A `torch.overrides.TorchFunctionMode` sees every torch function that Python calls, whatever its spelling (`nn.ReLU`,
`F.relu`, `torch.relu`, `x.relu()`, `x.relu_()`, a name bound before). It is local to the thread and to the ``with``
block, so nothing global is patched. It does not see what runs inside one C++ call (a scripted module, a fused kernel)
or inside an `autograd.Function`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch.overrides import TorchFunctionMode

from pullback._ops.accounting import Account
from pullback._ops.replacements import REPLACEMENTS
from pullback._ops.spellings import SPELLINGS, Operation, Spelling, canonical

Rule = Callable[..., Any]

SAVED_TENSORS = "saved tensors"  # key of a run's memo: tensors that its graph keeps, each with its version


def _matches(layer: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(layer, pattern)


_matches._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]  # dynamo cannot trace fnmatch


@dataclass
class Table:
    """Rules by operation, and by layer name pattern and operation. The more specific key wins, then the later one.

    A rule returns `NotImplemented` for a use of its operation that it does not cover; torch's own operation then runs.

    Attributes:
        must_cover: Operations that need a rule. The caller is warned of one that runs without.
        on_operation: Sees every operation: ``on_operation(memo, function, args, kwargs, result)``.
    """

    rules: dict[Operation, Rule] = field(default_factory=dict)
    by_layer: list[tuple[str, Operation | None, Rule]] = field(default_factory=list)
    must_cover: frozenset[Operation] = frozenset()
    name: str = "the rules"
    on_operation: Callable[..., None] | None = None

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


class OperationMode(TorchFunctionMode):
    """Run the operations that torch gets wrong in the form of `REPLACEMENTS`, and all others as they are."""

    account: Account | None = None
    dropouts: dict[str, None] | None = None  # layers with dropout that asks for training mode, which is left out
    layer = ""  # the name of the layer that is running, where it is followed

    def __torch_function__(
        self, func: Operation, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        replacement = REPLACEMENTS.get(func)
        result = (
            func(*args, **(kwargs or {})) if replacement is None else replacement(self, func, *args, **kwargs or {})
        )
        if self.account is not None:
            self.account.note(func, args, result)
        return result

    def within(self) -> Any:
        """The context in which a composite operation runs its parts, so that rules see them."""
        return nullcontext()

    def note_dropout(self) -> None:
        self.dropouts = {**(self.dropouts or {}), self.layer: None}


class RuleMode(OperationMode):
    """Run operations by the rules of a table, and what no rule covers as `OperationMode` does.

    Attributes:
        layers: The stack of names of the layers that are running.
        uncovered: Operations that ran without the rule that they need: name -> layer names.
        memo: What the rules remember for the length of this run.
    """

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table = table
        self.layers: list[str] = []
        self.uncovered: dict[str, dict[str, None]] = {}
        self.memo: dict[str, Any] = {}

    @property
    def layer(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.layers[-1] if self.layers else ""

    def within(self) -> Any:
        return self

    def overwritten(self) -> bool:
        """Whether the run wrote to a tensor that its graph keeps: there is then no way back through it."""
        return any(tensor._version != version for tensor, version in self.memo.get(SAVED_TENSORS, ()))

    def __torch_function__(
        self, func: Operation, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = self._by_rule(func, args, kwargs)
        if result is NotImplemented:
            result = super().__torch_function__(func, types, args, kwargs)
        if self.table.on_operation is not None:
            self.table.on_operation(self.memo, func, args, kwargs, result)
        return result

    def _by_rule(self, func: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation by its rule, if there is one that covers this use; `NotImplemented` otherwise."""
        spelling = SPELLINGS.get(func) or (Spelling(func) if func in self.table.rules else None)
        if spelling is None:
            return NotImplemented
        rule = self.table.find(self.layer, spelling.operation)
        result = NotImplemented if rule is None else _run_rule(rule, spelling, args, kwargs, self.memo)
        if result is NotImplemented and spelling.operation in self.table.must_cover:
            self.uncovered.setdefault(spelling.name, {})[self.layer] = None
        return result


def _run_rule(
    rule: Rule, spelling: Spelling, args: tuple[Any, ...], kwargs: dict[str, Any], memo: dict[str, Any]
) -> Any:
    """Call a rule with the pure form of an operation, and write the result back where the spelling is in place."""
    in_place = spelling.in_place(args, kwargs)
    if spelling.flag is not None:
        args = args[: spelling.flag] + args[spelling.flag + 1 :]
    pure = {k: v for k, v in kwargs.items() if k not in ("inplace", "_stacklevel")}
    if getattr(rule, "wants_memo", False):
        pure["memo"] = memo
    if getattr(rule, "writes", False):  # the rule itself writes, where the operation does
        pure["inplace"], in_place = in_place, False
    first: Any = args[0] if args else kwargs.get("input")
    if in_place:  # what the rule saves must outlive the write
        args, pure = ((first.clone(), *args[1:]), pure) if args else (args, {**pure, "input": first.clone()})
    result = rule(spelling.operation, *args, **pure)
    return first.copy_(result) if in_place and result is not NotImplemented else result
