"""The contract's list: every public method, what a small call of it needs, and what it does not support.

A method is a public function whose first four arguments are `(params, model, x, target)`. It joins by being public; an
entry in `LAWS` is owed only where a call needs options or does not support something. What is not supported stands in
`EXCEPTIONS` with the reason, and `test_laws.py` asserts that it raises: nothing is skipped. README's table is made
from the same list, by `python tests/laws.py`.
"""

import functools
import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import slow
import torch
from cases import BY_NAME, CASES, UNSUPPORTED, Case
from torch import Tensor
from torch.utils import _pytree as pytree

import pullback

Method = Callable[..., Any]


@dataclass(frozen=True)
class Law:
    """How the laws call one method.

    Attributes:
        options: Keyword arguments that keep a call small.
        points: How many times one call runs the model, for any number of targets.
        rules: Changes the backward of rectifiers, and must tell of activations that it does not cover.
        basis: Stands for a mechanism of its own: `make test` tries it on every model, not on the core alone.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    points: int = 1
    rules: bool = False
    basis: bool = False


LAWS: dict[str, Law] = {
    "gradient": Law(basis=True),
    "guided_backprop": Law(rules=True, basis=True),
    "deconvnet": Law(rules=True),
    "grad_cam": Law(basis=True),
    "integrated_gradients": Law(options={"steps": 3}, points=3),
    "smooth_grad": Law(options={"samples": 3, "noise": 0.1}, points=3),
}

TRANSFORMS = {
    "targets": "`vmap` over targets",
    "inputs": "`vmap` over inputs",
    "params": "`vmap` over parameters",
    "seed": "`vmap` over seeds",
    "grad": "`grad` and `jacrev` through it",
    "jvp": "`jvp` through it",
    "compile": "`torch.compile(fullgraph=True)`",
    "call": "any call",
}


@dataclass(frozen=True)
class Exempt:
    """One thing that is not supported: by whom, on what, why, and how it says so.

    It does so `always`, or wherever it does not give what the law asks for.
    """

    transform: str
    reason: str
    raises: type[Exception]
    match: str
    methods: Callable[[str], bool] = lambda name: True
    cases: Callable[[Case], bool] = lambda case: True
    who: str = "all methods"
    on: str = "any model"
    since: Callable[[], bool] = lambda: True
    always: bool = True


def takes_no_layer(name: str) -> bool:
    return "layer" not in inspect.signature(METHODS[name]).parameters


def has_no_positions(case: Case) -> bool:
    """The case's layer has no axis beside batch and channel."""
    (shape, *_) = slow.layer_shapes(case.twin(), case.call, case.x)[case.layers[0]]
    return len(shape) < 3


WITHOUT_POSITIONS = {case.name for case in CASES if has_no_positions(case)}

EXCEPTIONS: list[Exempt] = [
    Exempt(
        "call",
        "a map needs positions: the layer's activation is `[batch channel]`",
        ValueError,
        "`layer` must have spatial axes",
        methods=lambda name: name in ("grad_cam", "linear_approx"),
        cases=lambda case: case.name in WITHOUT_POSITIONS,
        who="`grad_cam`, `linear_approx`",
        on="layers without spatial axes or tokens",
    ),
    Exempt(
        "call",
        "a map is of one input: name a `layer`, or use `gradient`",
        TypeError,
        "`x` holds several",
        methods=lambda name: name == "saliency",
        cases=lambda case: case.name in ("two inputs", "keyword inputs"),
        who="`saliency` at the input",
        on="several floating-point inputs",
    ),
    Exempt(
        "call",
        "there is nothing to move or to differentiate; methods with `layer` explain an embedding's output",
        TypeError,
        "`x` holds no floating-point tensor",
        methods=lambda name: takes_no_layer(name),
        cases=lambda case: case.integer,
        who="methods without `layer`",
        on="inputs that are integers alone",
    ),
    Exempt(
        "call",
        "`torch.func` refuses the saved-tensor hooks by which it recomputes: right, or an error",
        RuntimeError,
        "saved tensor hooks|torch.utils.checkpoint",
        cases=lambda case: case.name == "checkpoint",
        on="`torch.utils.checkpoint` without re-entry that runs in eval mode too",
        always=False,
    ),
    Exempt(
        "params",
        "`vmap` cannot write a batched tensor into one that is not",
        RuntimeError,
        "doesn't match the broadcast shape",
        cases=lambda case: case.name == "adds a parameter in place",
        on="in-place operations that bring parameters to what has met none (`y = x.clone(); y += w`)",
    ),
]


# ---- what the tests ask -------------------------------------------------------------------------------------------


def is_method(value: Any) -> bool:
    """A public function that begins with `(params, model, x, target)`."""
    if not inspect.isfunction(value):
        return False
    return list(inspect.signature(value).parameters)[:4] == ["params", "model", "x", "target"]


METHODS: dict[str, Method] = {
    name: getattr(pullback, name) for name in pullback.__all__ if is_method(getattr(pullback, name))
}

CORE = [
    "relu6 used twice",
    "residual",
    "aliased skip",
    "called twice",
    "attention",
    "keyword inputs",
    "tokens",
    "batch norm before tokens",
]


def law(name: str) -> Law:
    return LAWS.get(name, Law())


def exempt(name: str, case: Case, transform: str) -> Exempt | None:
    """The entry that takes this call out of the law, if there is one."""
    for entry in EXCEPTIONS:
        if entry.transform in (transform, "call") and entry.methods(name) and entry.cases(case) and entry.since():
            return entry
    return None


def options(name: str, case: Case) -> dict[str, Any]:
    """The keyword arguments of a small call of this method on this model."""
    layer = inspect.signature(METHODS[name]).parameters.get("layer")
    chosen = {**law(name).options, **case.options}
    if layer is not None and (case.integer or layer.default is inspect.Parameter.empty):
        chosen["layer"] = case.layers[0]
    return chosen


def flat(result: Any) -> tuple[Tensor, ...]:
    """The tensors of a result; `vmap` takes nothing else, so the `None` of integer inputs go."""
    return tuple(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))


def method_on(name: str, case: Case, **more: Any) -> Callable[..., tuple[Tensor, ...]]:
    """The method with its options for this case, silent about what the case is known to hold."""

    chosen = {**options(name, case), **more}

    @functools.wraps(METHODS[name])
    def call(params: Any, model: Any, x: Any, target: Any, **other: Any) -> tuple[Tensor, ...]:
        with warnings.catch_warnings():
            if law(name).rules and case.uncovered:
                warnings.simplefilter("ignore", UserWarning)
            return flat(METHODS[name](params, model, x, target, **{**chosen, **other}))

    return call


def targets(case: Case, count: int = 3) -> Tensor:
    """`[target batch]` indices, or cotangents where the output has no class axis."""
    if case.targets:
        return torch.stack([(torch.arange(2) + k) % case.targets for k in range(count)])
    shape = case.call(case.model(), case.x).shape
    return torch.stack([torch.full(shape, 1.0 + k, dtype=torch.float64) for k in range(count)])


def pairs(transform: str = "call") -> list[Any]:
    """Every method on every model; what `make test` leaves to `make test-all` is marked slow."""
    import pytest

    def marks(name: str, case: Case) -> list[Any]:
        quick = law(name).basis or case.name in CORE
        return [] if quick else [pytest.mark.slow]

    return [
        pytest.param(name, case, id=f"{name}-{case.name}", marks=marks(name, case))
        for name in METHODS
        for case in (*CASES, *UNSUPPORTED)
    ]


def exceptions_table() -> str:
    """README's table, a row for each entry of `EXCEPTIONS`."""
    rows = [f"| {TRANSFORMS[e.transform]} | {e.who} | {e.on} | {e.reason} |" for e in EXCEPTIONS]
    return "\n".join(["| not supported | by | on | because |", "|---|---|---|---|", *dict.fromkeys(rows)])


README = Path(__file__).parent.parent / "README.md"
BETWEEN = re.compile(r"(?<=<!-- exceptions -->\n).*?(?=\n<!-- /exceptions -->)", re.DOTALL)

if __name__ == "__main__":  # write the table into README
    README.write_text(BETWEEN.sub(lambda _: exceptions_table(), README.read_text("utf-8")), "utf-8")
