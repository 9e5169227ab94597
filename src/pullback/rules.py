"""Rules: what changes the backward pass, by operation.

`rules=` of a method takes

- a name: ``"guided"``, ``"deconvnet"``, ...;
- a table ``{operation: rule}``; a key ``(layer name pattern, operation)`` holds in those layers only, and wins. Any
  spelling of an operation names it: `torch.relu`, `torch.nn.functional.relu` and `torch.Tensor.relu_` are one;
- an `autograd.Function` in the place of ReLU, or a rule for all rectifiers.

A rule is called as ``rule(operation, *args, **kwargs)`` with the operation in its pure form, and returns what the
operation returns, or `NotImplemented` for a use that it does not cover.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pullback import relu
from pullback._ops import Operation, Rule, Table, activations

Rules: TypeAlias = "str | Table | Mapping[Any, Rule] | type[torch.autograd.Function] | Rule | None"


def rectifier_rules(rule: Rule, name: str) -> Table:
    """Give the table that runs all rectifiers by one rule, and tells of other activations."""
    return Table.of(dict.fromkeys(relu.RECTIFIERS, rule), tell=activations(), name=name)


NAMED: dict[str, Callable[[], Table]] = {
    name: lambda name=name: rectifier_rules(relu.variant(name), f'The rules "{name}"') for name in relu.VARIANTS
}


def from_function(function: type[torch.autograd.Function]) -> Rule:
    """Make a rule for ReLU of an `autograd.Function`; a rectifier with a ceiling is not covered.

    Example:
        >>> class Doubled(torch.autograd.Function):
        ...     generate_vmap_rule = True
        ...     @staticmethod
        ...     def forward(x):
        ...         return x.clamp(min=0)
        ...     @staticmethod
        ...     def setup_context(ctx, inputs, output):
        ...         ctx.save_for_backward(inputs[0] > 0)
        ...     @staticmethod
        ...     def backward(ctx, cotangent):
        ...         return 2 * cotangent * ctx.saved_tensors[0]
        >>> from pullback import gradient, params_of
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> params, x = params_of(model), torch.ones(1, 3)
        >>> a, b = gradient(params, model, x, 0, rules=Doubled), gradient(params, model, x, 0)
        >>> torch.allclose(a, 2 * b)
        True
    """
    base = torch.autograd.function._SingleLevelFunction
    if function.setup_context is base.setup_context:
        raise TypeError(
            f"`rules` got {function.__name__}, an autograd.Function of the old form, `forward(ctx, x)`, which "
            "torch.func cannot run. Split it into `forward(x)` and `setup_context(ctx, inputs, output)`, with "
            "`generate_vmap_rule = True`."
        )

    def rule(operation: Operation, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        high = relu.ceiling(operation, input, *args, **kwargs)
        return function.apply(input) if high == float("inf") else NotImplemented

    return rule


def table_of(rules: Rules) -> Table | None:
    """Turn what `rules=` takes into a table."""
    if rules is None or isinstance(rules, Table):
        return rules
    if isinstance(rules, str):
        if rules not in NAMED:
            raise ValueError(f"`rules` must be one of {', '.join(map(repr, NAMED))}, or a table, got {rules!r}.")
        return NAMED[rules]()
    if isinstance(rules, Mapping):
        for key, rule in rules.items():
            operation = key[1] if isinstance(key, tuple) and len(key) == 2 else key
            if not callable(operation) or not callable(rule):
                raise TypeError(
                    "`rules` must map an operation, or a pair (layer name pattern, operation), to a rule, got "
                    f"{key!r}: {rule!r}."
                )
        return Table.of({key: _as_rule(rule) for key, rule in rules.items()}, name="The rules")
    if isinstance(rules, type) and issubclass(rules, torch.autograd.Function):
        return rectifier_rules(from_function(rules), f"The rules by {rules.__name__}")
    if callable(rules):
        return rectifier_rules(_for_rectifiers(rules), "The rules")
    raise TypeError(f"`rules` must be a name, a table, an autograd.Function or a function, got {type(rules).__name__}.")


def _as_rule(rule: Rule | type[torch.autograd.Function]) -> Rule:
    return from_function(rule) if isinstance(rule, type) and issubclass(rule, torch.autograd.Function) else rule


def _for_rectifiers(rule: Rule) -> Rule:
    def only(operation: Operation, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        covered = relu.ceiling(operation, input, *args, **kwargs) is not None
        return rule(operation, input, *args, **kwargs) if covered else NotImplemented

    return only
