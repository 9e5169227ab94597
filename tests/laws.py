"""The contract's list: every public method, what a small call of it needs, and what it does not support.

A method is a public function whose first four arguments are `(params, model, x, target)`. It joins by being public.
What it needs, and how often a call runs the model, it declares beside its code. What is not supported stands in
`EXCEPTIONS` with the reason, and `test_laws.py` asserts that it raises: nothing is skipped. `python tests/laws.py`
writes the table of `docs/limits.md` from the same list.
"""

import functools
import inspect
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import slow
import torch
import torch._dynamo
from cases import CASES, UNSUPPORTED, Case
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import pullback
from pullback import rules
from pullback._core.entry import Declaration, Need, declaration_of

Method = Callable[..., Any]


def three_features(case: Case) -> dict[str, Any]:
    """Number what is perturbed, the input or the layer that stands for it, by threes."""
    if case.integer:
        (shape, *_) = slow.layer_shapes(case.twin(), case.call, case.x)[case.layers[0]]
        return {"feature_mask": torch.arange(torch.Size(shape[1:]).numel()).reshape(shape[1:]) % 3}

    def numbered(part: Tensor) -> Tensor:
        return torch.arange(part[0].numel()).reshape(part.shape[1:]) % 3

    return {"feature_mask": pytree.tree_map(numbered, case.x)}


def other_examples(case: Case) -> dict[str, Any]:
    return {"background": pytree.tree_map(lambda part: torch.cat([part + k for k in range(4)]), case.x)}


def some_words(case: Case) -> dict[str, Any]:
    width = 6 if case.integer or not isinstance(case.x, Tensor) else case.x.shape[-1]
    return {"words": torch.randn(11, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)}


def another_start(case: Case, factor: float = 0.3) -> Any:
    """A baseline of one example, and no mask over everything."""
    start = pytree.tree_map(lambda part: (factor if part.is_floating_point() else 0) * part[:1].flip(-1), case.x)
    return {k: v for k, v in start.items() if k != "attention_mask"} if isinstance(start, dict) else start


SEGMENTS = torch.arange(36).reshape(6, 6) // 7 == torch.arange(6).reshape(6, 1, 1)

# What a parameter of this name is given, where a method has one.
BY_PARAMETER: dict[str, Callable[[Case], dict[str, Any]]] = {
    "feature_mask": three_features,
    "background": other_examples,
    "baselines": lambda case: {"baselines": case.x},
    "words": some_words,
    "segments": lambda case: {"segments": SEGMENTS},
    "layers": lambda case: {"layers": case.layers[:1]},
    "head": lambda case: {"head": "head"},
    "neuron": lambda case: {"neuron": torch.ones((), dtype=torch.float64)},
}


def a_far_baseline(case: Case) -> dict[str, Any]:
    """Where zeros for a baseline move the scores by less than bfloat16 rounds them, a number that moves them."""
    return {"baseline": 4.0} if case.name == "batch norm before tokens" else {}


def channels_last(case: Case) -> dict[str, Any]:
    """An LSTM's channels are its units. Each step's units may sum to nearly 0, by which XGrad-CAM divides."""
    return {"tokens": "channels_last"} if case.name == "lstm" else {}


# What these methods are given beside that, for the reason that stands with each.
SUITED: dict[str, Callable[[Case], dict[str, Any]]] = {
    "sobol_attribution": a_far_baseline,
    "hsic_attribution": a_far_baseline,
    "xgrad_cam": channels_last,
    "finer_cam": lambda case: {"layer": case.layers[0]},  # for the method that it compares classes by
    # from zero, the path does not move what a normalisation returns
    "conductance": lambda case: {"baseline": another_start(case, -0.3)},
    "neuron_conductance": lambda case: {"baseline": another_start(case, -0.3)},
    "deep_lift": lambda case: {"baseline": another_start(case)},
    # without the kinks of epsilon at 0, and the pole of softplus, which is not 0 where its input is
    "lrp": lambda case: {"rules": {**rules.epsilon_plus(1e-12), F.softplus: rules.derivative()}},
}


def channels(case: Case) -> int:
    return slow.layer_shapes(case.twin(), case.call, case.x)[case.layers[0]][0][1]


def declared(name: str) -> Declaration:
    declaration = declaration_of(METHODS[name])
    assert declaration is not None, f"`{name}` is public but not declared"
    return declaration


def needs(need: Need) -> list[str]:
    """The methods that declare a need."""
    return [name for name in METHODS if need in declared(name).needs]


def in_backticks(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def is_method(value: Any) -> bool:
    """A public function that begins with `(params, model, x, target)`."""
    if not inspect.isfunction(value):
        return False
    return list(inspect.signature(value).parameters)[:4] == ["params", "model", "x", "target"]


METHODS: dict[str, Method] = {
    name: getattr(pullback, name) for name in pullback.__all__ if is_method(getattr(pullback, name))
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
    raises: type[Exception] | tuple[type[Exception], ...]
    match: str
    methods: Callable[[str], bool] = lambda name: True
    cases: Callable[[Case], bool] = lambda case: True
    who: str = "all methods"
    on: str = "any model"
    since: Callable[[], bool] = lambda: True
    always: bool = True


def takes_no_layer(name: str) -> bool:
    parameters = inspect.signature(METHODS[name]).parameters
    return not {"layer", "layers"} & {*parameters} and "positions at the layer" not in declared(name).needs


def has_no_positions(case: Case) -> bool:
    """The case's layer has no axis beside batch and channel."""
    (shape, *_) = slow.layer_shapes(case.twin(), case.call, case.x)[case.layers[0]]
    return len(shape) < 3


WITHOUT_POSITIONS = {case.name for case in (*CASES, *UNSUPPORTED) if has_no_positions(case)}


def is_one_tensor(case: Case) -> bool:
    return isinstance(case.x, Tensor)


def has_sides(case: Case) -> bool:
    """All of the input has positions."""
    parts = [part for part in pytree.tree_flatten(case.x)[0] if part.is_floating_point()]
    return all(part.ndim > 2 for part in parts)


def ends_in_cam(case: Case) -> bool:
    """The layer's channels go through positions' mean to a linear layer `head` that gives the output."""
    head = getattr(case.twin(), "head", None)
    return isinstance(head, torch.nn.Linear) and head.in_features == channels(case)


CLASSIFIES = {case.name for case in (*CASES, *UNSUPPORTED) if case.targets and case.call(case.twin(), case.x).ndim == 2}

# what torch says where it recomputes without what ran around the model, or refuses to; the last is torch 2.0's
RECOMPUTES = "saved tensor hooks|torch.utils.checkpoint|without checkpoint recomputation"

RELEVANCE = [name for name in METHODS if declared(name).family == "relevance"]
GROUPED = [name for name in METHODS if "feature_mask" in inspect.signature(METHODS[name]).parameters]

EXCEPTIONS: list[Exempt] = [
    Exempt(
        "call",
        "a mask, a blur or a map at the input needs one tensor",
        TypeError,
        "`x` must be one tensor",
        methods=lambda name: name in needs("one tensor"),
        cases=lambda case: not is_one_tensor(case),
        who=in_backticks(needs("one tensor")),
        on="several inputs",
    ),
    Exempt(
        "call",
        "there are no positions to blur or to map",
        (ValueError, TypeError),
        "`x` must|`segments` must",
        methods=lambda name: name in needs("positions"),
        cases=lambda case: not case.integer and not has_sides(case),
        who=in_backticks(needs("positions")),
        on="inputs without spatial axes",
    ),
    Exempt(
        "call",
        "it ranks segments of an image",
        ValueError,
        "`segments` must",
        methods=lambda name: name in needs("image"),
        cases=lambda case: is_one_tensor(case) and case.x.shape[2:] != (6, 6),
        who=in_backticks(needs("image")),
        on="inputs that are not images",
    ),
    Exempt(
        "call",
        "no path joins two integers; `integrated_gradients` takes a path at the embedding, by `layer`",
        TypeError,
        "`x` holds no floating-point tensor",
        methods=lambda name: name in needs("floating input") and declared(name).family == "paths",
        cases=lambda case: case.integer,
        who=in_backticks(name for name in needs("floating input") if declared(name).family == "paths"),
        on="inputs of integers only",
    ),
    Exempt(
        "call",
        "noise cannot be added to integers",
        TypeError,
        "`x` holds no floating-point tensor",
        methods=lambda name: name in needs("floating input") and declared(name).family == "cam",
        cases=lambda case: case.integer,
        who=in_backticks(name for name in needs("floating input") if declared(name).family == "cam"),
        on="inputs of integers only",
    ),
    Exempt(
        "call",
        "the path leads through the word vectors of one embedding",
        ValueError,
        "`words` must be",
        methods=lambda name: name in needs("one embedding"),
        cases=lambda case: case.name in ("two inputs", "keyword inputs"),
        who=in_backticks(needs("one embedding")),
        on="several floating-point inputs",
    ),
    Exempt(
        "call",
        "the weights of a class are read from a linear layer over the pooled channels",
        ValueError,
        "`head` |`layer` must have spatial axes",
        methods=lambda name: name in needs("pooled head"),
        cases=lambda case: not ends_in_cam(case) or case.name in WITHOUT_POSITIONS or case.name not in CLASSIFIES,
        who=in_backticks(needs("pooled head")),
        on="networks that do not end in pooling and one linear layer",
    ),
    Exempt(
        "call",
        "it compares a class with others",
        ValueError,
        "`others` must",
        methods=lambda name: name in needs("classes"),
        cases=lambda case: case.name not in CLASSIFIES,
        who=in_backticks(needs("classes")),
        on="outputs that are not `[batch class]`",
    ),
    Exempt(
        "call",
        "there are no attention weights to read",
        ValueError,
        "`model` has no self-attention",
        methods=lambda name: name in needs("self-attention"),
        cases=lambda case: not any(word in case.name for word in ("attention", "encoder", "dot product")),
        who=in_backticks(needs("self-attention")),
        on="models without self-attention",
    ),
    Exempt(
        "call",
        "rules cannot see the steps of a fused recurrent layer: it keeps its own derivative, and a warning says so",
        (pullback.PullbackWarning, RuntimeError),
        "do not cover `lstm`|aten::lstm",
        methods=lambda name: name in RELEVANCE,
        cases=lambda case: case.name == "lstm",
        who="relevance methods and DeepLIFT",
        on="`nn.LSTM`, `nn.GRU`, `nn.RNN`",
    ),
    Exempt(
        "call",
        "a map needs positions, and the layer's activation is `[batch channel]`",
        (ValueError, RuntimeError),
        f"`layer` must have spatial axes|{RECOMPUTES}",
        methods=lambda name: name in needs("positions at the layer"),
        cases=lambda case: case.name in WITHOUT_POSITIONS,
        who="class activation maps",
        on="layers without spatial axes or tokens",
    ),
    Exempt(
        "call",
        "a map belongs to one input: name a `layer`, or use `gradient`",
        TypeError,
        "`x` holds several",
        methods=lambda name: name in needs("one map"),
        cases=lambda case: case.name in ("two inputs", "keyword inputs"),
        who="`saliency` and methods that mask the input",
        on="several floating-point inputs",
    ),
    Exempt(
        "call",
        "integers cannot be differentiated; methods with `layer` explain the output of an embedding",
        TypeError,
        "`x` holds no floating-point tensor",
        methods=lambda name: takes_no_layer(name) and name not in needs("self-attention"),
        cases=lambda case: case.integer,
        who="methods without `layer`",
        on="inputs of integers only",
    ),
    Exempt(
        "call",
        "`torch.func` refuses the saved-tensor hooks of recomputation: the result is right, or an error",
        RuntimeError,
        RECOMPUTES,
        cases=lambda case: case.name == "checkpoint",
        on="`torch.utils.checkpoint` without re-entry that runs in eval mode too",
        always=False,
    ),
    Exempt(
        "compile",
        "its compiler cannot trace the function mode that sees the operations",
        torch._dynamo.exc.TorchDynamoException,
        "from user code",
        on="torch 2.0",
        since=lambda: torch.__version__.startswith("2.0."),
    ),
    Exempt(
        "compile",
        "the number of groups is read from the values of `feature_mask`; without a mask it compiles",
        torch._dynamo.exc.TorchDynamoException,
        "data-dependent",
        methods=lambda name: name in GROUPED,
        who="methods over features",
        on="groups of features (`feature_mask`)",
    ),
    Exempt(
        "params",
        "`vmap` cannot write a batched tensor into one that is not batched",
        RuntimeError,
        "doesn't match the broadcast shape",
        methods=lambda name: name not in needs("positions"),  # its input has none
        cases=lambda case: case.name == "adds a parameter in place",
        on="a parameter that is added in place to a tensor that depends on no parameter (`y = x.clone(); y += w`)",
    ),
]


# ---- what the tests ask -------------------------------------------------------------------------------------------


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


SHORT = ["residual", "attention", "tokens"]  # for what is a formula over mechanisms that have the whole of CORE


def exempt(name: str, case: Case, transform: str) -> Exempt | None:
    """The entry that takes this call out of the law, if there is one."""
    for about in (transform, "call"):  # a transform fails before the call is over
        for entry in EXCEPTIONS:
            if entry.transform == about and entry.methods(name) and entry.cases(case) and entry.since():
                return entry
    return None


def options(name: str, case: Case) -> dict[str, Any]:
    """The keyword arguments of a small call of this method on this model."""
    parameters = inspect.signature(METHODS[name]).parameters
    layer = parameters.get("layer")
    chosen = {**declared(name).small, **case.options}
    for parameter in BY_PARAMETER.keys() & {*parameters}:
        chosen |= BY_PARAMETER[parameter](case)
    chosen |= SUITED.get(name, lambda case: {})(case)
    if layer is not None and (case.integer or layer.default is inspect.Parameter.empty):
        chosen["layer"] = case.layers[0]
    return chosen


class Options(dict[str, Any]):
    """The options of a small call, and what of the model a count of forwards depends on."""

    def __init__(self, name: str, case: Case) -> None:
        super().__init__(options(name, case), features=3, cells=1, windows=1, examples=2)
        self.case = case

    def __missing__(self, key: str) -> Any:
        if key != "channels":
            raise KeyError(key)
        return channels(self.case)


def points(name: str, case: Case) -> int:
    """How many times one call runs the model."""
    return declared(name).forwards(Options(name, case))


def adaptive(name: str, case: Case) -> int:
    """How many of these depend on the target."""
    return declared(name).adaptive(Options(name, case))


def flat(result: Any) -> tuple[Tensor, ...]:
    """The tensors of a result; `vmap` takes nothing else, so the `None` of integer inputs go."""
    return tuple(leaf for leaf in pytree.tree_flatten(result)[0] if isinstance(leaf, Tensor))


def method_on(name: str, case: Case, **more: Any) -> Callable[..., tuple[Tensor, ...]]:
    """The method with its options for this case, silent about what the case is known to hold."""

    chosen = {**options(name, case), **more}

    @functools.wraps(METHODS[name])
    def call(params: Any, model: Any, x: Any, target: Any, **other: Any) -> tuple[Tensor, ...]:
        with warnings.catch_warnings():
            if declared(name).rectifiers and case.uncovered:
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
        mechanism = declared(name).mechanism
        quick = mechanism == "own" or case.name in (SHORT if mechanism == "formula" else CORE)
        return [] if quick else [pytest.mark.slow]

    return [
        pytest.param(name, case, id=f"{name}-{case.name}", marks=marks(name, case))
        for name in METHODS
        for case in (*CASES, *UNSUPPORTED)
    ]


def exceptions_table() -> str:
    """The table of `docs/limits.md`, a row for each entry of `EXCEPTIONS`."""
    rows = [f"| {TRANSFORMS[e.transform]} | {e.who} | {e.on} | {e.reason} |" for e in EXCEPTIONS]
    return "\n".join(["| not supported | by | on | because |", "|---|---|---|---|", *dict.fromkeys(rows)])


LIMITS = Path(__file__).parent.parent / "docs" / "limits.md"
BETWEEN = re.compile(r"(?<=<!-- exceptions -->\n).*?(?=\n<!-- /exceptions -->)", re.DOTALL)

if __name__ == "__main__":  # write the table into the page
    LIMITS.write_text(BETWEEN.sub(lambda _: exceptions_table(), LIMITS.read_text("utf-8")), "utf-8")
