"""Turn what `rules=` takes into a table, and the tables by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pullback._ops.constants import (
    Remembering,
    constants_only,
    watch_constants,
)
from pullback._ops.dispatch import Rule, Table
from pullback._ops.spellings import Operation, activations
from pullback._torch.levels import own_elsewhere
from pullback.rules._composites import (
    MUST_COVER,
    attn_lrp,
    cp_lrp,
    epsilon_alpha2_beta1,
    epsilon_alpha2_beta1_flat,
    epsilon_plus,
    epsilon_plus_flat,
    excitation_table,
    excitation_torchray,
)
from pullback.rules._elementwise import run_replaced
from pullback.rules._linear import LinearRule
from pullback.rules._rectifiers import RECTIFIERS, VARIANTS, ceiling, variant

Rules: TypeAlias = "str | Table | Mapping[Any, Rule] | type[torch.autograd.Function] | Rule | None"


def rectifier_rules(rule: Rule, name: str) -> Table:
    """Give the table that runs all rectifiers by one rule, and tells of other activations."""
    return Table.of(dict.fromkeys(RECTIFIERS, rule), must_cover=activations(), name=name)


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
        if ceiling(operation, input, *args, **kwargs) != float("inf"):
            return NotImplemented
        return own_elsewhere(function.apply(input), input, lambda: operation(input, *args, **kwargs))  # pyright: ignore[reportArgumentType]

    return rule


NAMED: dict[str, Callable[[], Table]] = {
    name: lambda name=name: rectifier_rules(variant(name), f'The rules "{name}"') for name in VARIANTS
}
for _name, _composite in {
    "excitation": excitation_table,
    "excitation_torchray": excitation_torchray,
    "epsilon": attn_lrp,
    "epsilon_plus": epsilon_plus,
    "epsilon_alpha2_beta1": epsilon_alpha2_beta1,
    "epsilon_plus_flat": epsilon_plus_flat,
    "epsilon_alpha2_beta1_flat": epsilon_alpha2_beta1_flat,
    "attn_lrp": attn_lrp,
    "cp_lrp": cp_lrp,
}.items():
    NAMED[_name] = lambda name=_name, make=_composite: _table(make(), f'The rules "{name}"')


def _table(mapping: Mapping[Any, Rule], name: str) -> Table:
    """Make a table of a mapping; one that shares out relevance watches what is constant, and tells what bends."""
    if not any(isinstance(rule, LinearRule | Remembering) for rule in mapping.values()):
        return Table.of(mapping, name=name)
    told = MUST_COVER - set(RECTIFIERS)
    untouched = dict.fromkeys(told, lambda *args, **kwargs: NotImplemented)
    chosen = {key: _of_the_input(rule) for key, rule in {**untouched, **mapping}.items()}
    return replace(Table.of(chosen, name=name), on_operation=watch_constants, must_cover=told)


def _of_the_input(rule: Rule) -> Rule:
    """Leave what is computed from parameters alone as it is: there is no relevance to share out, nor to tell of."""
    if getattr(rule, "writes", False):
        return rule
    wants_memo = getattr(rule, "wants_memo", False)

    def chosen(operation: Operation, *args: Any, memo: dict[str, Any], **kwargs: Any) -> Any:
        if constants_only(args, kwargs, memo):
            return run_replaced(operation, *args, **kwargs)
        return rule(operation, *args, memo=memo, **kwargs) if wants_memo else rule(operation, *args, **kwargs)

    return Remembering(chosen)


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
        return _table({key: _as_rule(rule) for key, rule in rules.items()}, "The rules")
    if isinstance(rules, type) and issubclass(rules, torch.autograd.Function):
        return rectifier_rules(from_function(rules), f"The rules by {rules.__name__}")
    if isinstance(rules, LinearRule | Remembering):
        raise TypeError(
            "`rules` as one function is a rule for rectifiers, and this one shares out relevance: say of which "
            "operations, as in {torch.nn.functional.linear: rule}."
        )
    if callable(rules):
        return rectifier_rules(_for_rectifiers(rules), "The rules")
    raise TypeError(f"`rules` must be a name, a table, an autograd.Function or a function, got {type(rules).__name__}.")


def _as_rule(rule: Rule | type[torch.autograd.Function]) -> Rule:
    return from_function(rule) if isinstance(rule, type) and issubclass(rule, torch.autograd.Function) else rule


def _for_rectifiers(rule: Rule) -> Rule:
    @wraps(rule)
    def only(operation: Operation, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if ceiling(operation, input, *args, **kwargs) is None:
            return NotImplemented
        result = rule(operation, input, *args, **kwargs)
        if not isinstance(result, Tensor) and result is not NotImplemented:
            raise TypeError(
                f"`rules` gave {type(result).__name__} where a rule gives a tensor. A function that makes rules is "
                "called first."
            )
        return result

    return only
