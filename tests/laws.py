"""The contract's list: every public method, what a small call of it needs, and what it does not support.

A method is a public function whose first four arguments are `(params, model, x, target)`. It joins by being public; an
entry in `LAWS` is owed only where a call needs options or does not support something. What is not supported stands in
`EXCEPTIONS` with the reason, and `test_laws.py` asserts that it raises: nothing is skipped. `python tests/laws.py`
writes the table of `docs/limits.md` from the same list.
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
import torch._dynamo
from cases import CASES, UNSUPPORTED, Case
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import pullback
from pullback import rules

Method = Callable[..., Any]


@dataclass(frozen=True)
class Law:
    """How the laws call one method.

    Attributes:
        options: Keyword arguments that keep a call small.
        points: How many times one call runs the model, for any number of targets.
        reads: How many times more, to read a layer.
        adaptive: How many of these follow from the target, so that each target has its own.
        rules: Changes the backward of rectifiers, and must tell of activations that it does not cover.
        basis: Stands for a mechanism of its own: `make test` tries it on every model, not on the core alone.
        suited: More keyword arguments, made for the model.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    points: int | Callable[[Case], int] = 1
    reads: int = 0
    adaptive: int = 0
    rules: bool = False
    basis: bool = False
    suited: Callable[[Case], Mapping[str, Any]] = lambda case: {}


def three_features(case: Case) -> dict[str, Any]:
    """Number what is covered, the input or the layer that stands for it, by threes."""
    if case.integer:
        (shape, *_) = slow.layer_shapes(case.twin(), case.call, case.x)[case.layers[0]]
        return {"feature_mask": torch.arange(torch.Size(shape[1:]).numel()).reshape(shape[1:]) % 3}

    def numbered(part: Tensor) -> Tensor:
        return torch.arange(part[0].numel()).reshape(part.shape[1:]) % 3

    return {"feature_mask": pytree.tree_map(numbered, case.x)}


def other_examples(case: Case) -> dict[str, Any]:
    several = pytree.tree_map(lambda part: torch.cat([part + k for k in range(4)]), case.x)
    return {"background": several, **three_features(case)}


def a_far_baseline(case: Case) -> dict[str, Any]:
    """Where zeros for a baseline move the scores by less than bfloat16 rounds them, a number that moves them."""
    return {"baseline": 4.0} if case.name == "batch norm before tokens" else {}


def channels_last(case: Case) -> dict[str, Any]:
    """An LSTM's channels are its units. Each step's units may sum to nearly 0, by which XGrad-CAM divides."""
    return {"tokens": "channels_last"} if case.name == "lstm" else {}


LAWS: dict[str, Law] = {
    "gradient": Law(basis=True),
    "guided_backprop": Law(rules=True, basis=True),
    "deconvnet": Law(rules=True),
    "grad_cam": Law(basis=True),
    "integrated_gradients": Law(options={"steps": 3}, points=3, reads=1),
    "smooth_grad": Law(options={"samples": 3, "noise": 0.1}, points=3),
    "occlusion": Law(options={"window": 9}, points=2),
    "rise": Law(options={"samples": 4, "grid": 2}, points=4),
    "sobol_attribution": Law(options={"samples": 3, "grid": 1}, suited=a_far_baseline, points=9),
    "hsic_attribution": Law(options={"samples": 5, "grid": 2}, suited=a_far_baseline, points=5),
    "extremal_perturbation": Law(
        options={"iterations": 2, "step": 2, "sigma": 2.0, "levels": 3, "max_blur": 1.0, "areas": 0.3},
        points=2,
        adaptive=1,
    ),
    "meaningful_perturbation": Law(
        options={"iterations": 3, "grid": 3, "jitter": 3, "baseline": 0.0, "start": 0.5}, points=3, adaptive=2
    ),
    "feature_ablation": Law(suited=three_features, points=4),
    "feature_permutation": Law(options={"samples": 2}, suited=other_examples, points=7),
    "shapley_values": Law(suited=three_features, points=8),
    "shapley_sampling": Law(options={"samples": 2}, suited=three_features, points=6),
    "kernel_shap": Law(options={"samples": 4}, suited=three_features, points=6),
    "lime": Law(options={"samples": 5}, suited=three_features, points=5),
}


def channels(case: Case) -> int:
    return slow.layer_shapes(case.twin(), case.call, case.x)[case.layers[0]][0][1]


def at_its_layer(case: Case) -> dict[str, Any]:
    return {"layer": case.layers[0]}


def at_its_layers(case: Case) -> dict[str, Any]:
    return {"layers": case.layers[:1]}


def some_words(case: Case) -> dict[str, Any]:
    width = 6 if case.integer or not isinstance(case.x, Tensor) else case.x.shape[-1]
    return {"words": torch.randn(11, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)}


SEGMENTS = torch.arange(36).reshape(6, 6) // 7 == torch.arange(6).reshape(6, 1, 1)


def another_start(case: Case, factor: float = 0.3) -> Any:
    """A baseline of one example, and no mask over everything."""
    start = pytree.tree_map(lambda part: (factor if part.is_floating_point() else 0) * part[:1].flip(-1), case.x)
    return {k: v for k, v in start.items() if k != "attention_mask"} if isinstance(start, dict) else start


LAWS |= {
    "expected_gradients": Law(
        {"samples": 2, "noise": 0.1}, points=2, reads=2, suited=lambda case: {"baselines": case.x}
    ),
    "blur_integrated_gradients": Law({"steps": 2, "sigma": 0.3}, points=2),
    "idgi": Law({"steps": 3}, points=4),
    "guided_integrated_gradients": Law({"steps": 3}, points=3, adaptive=2),
    "discretised_integrated_gradients": Law({"steps": 3, "neighbours": 4}, points=4, reads=1, suited=some_words),
    "integrated_hessians": Law({"steps": 2}, points=5),
    "internal_influence": Law({"steps": 2}, points=2),
    # from zero, the path does not move what a normalisation puts out
    "conductance": Law({"steps": 2}, points=4, suited=lambda case: {"baseline": another_start(case, -0.3)}),
    "neuron_conductance": Law(
        {"steps": 2, "neuron": torch.ones((), dtype=torch.float64)},
        points=4,
        suited=lambda case: {"baseline": another_start(case, -0.3)},
    ),
    "cam": Law({"head": "head"}),
    "smooth_grad_cam_plus_plus": Law({"samples": 2, "noise": 0.1}, points=3),
    "score_cam": Law(points=lambda case: 1 + channels(case)),
    "ss_cam": Law({"samples": 2, "noise": 0.5}, points=lambda case: 1 + 2 * channels(case)),
    "is_cam": Law({"samples": 2}, points=lambda case: 1 + 2 * channels(case)),
    "ablation_cam": Law(points=lambda case: 1 + channels(case)),
    "finer_cam": Law(points=2, suited=at_its_layer),
    "xgrad_cam": Law(suited=channels_last),
    "fused_cam": Law(suited=at_its_layers),
    "refine_cam": Law(suited=at_its_layers),
    "guided_grad_cam": Law(points=2, rules=True),
    "full_grad": Law(points=2),
    # without the kinks of epsilon at 0, and the pole of softplus, which is not 0 where its input is
    "lrp": Law({"rules": {**rules.epsilon_plus(1e-12), F.softplus: rules.derivative()}}, basis=True),
    "deep_lift": Law(points=2, basis=True, suited=lambda case: {"baseline": another_start(case)}),
    "deep_lift_shap": Law(points=4, suited=lambda case: {"baselines": case.x}),
    "attention_relevance": Law(points=2),
    "xrai": Law({"steps": 2, "segments": SEGMENTS}, points=4),
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
    return name not in FUSED and "layer" not in inspect.signature(METHODS[name]).parameters


def has_no_positions(case: Case) -> bool:
    """The case's layer has no axis beside batch and channel."""
    (shape, *_) = slow.layer_shapes(case.twin(), case.call, case.x)[case.layers[0]]
    return len(shape) < 3


MASKED = "occlusion rise sobol_attribution hsic_attribution extremal_perturbation meaningful_perturbation".split()
WITHOUT_POSITIONS = {case.name for case in (*CASES, *UNSUPPORTED) if has_no_positions(case)}

BY_GRADIENT = "grad_cam linear_approx hires_cam elementwise_grad_cam layer_cam xgrad_cam grad_cam_plus_plus".split()
BY_FORWARDS = "score_cam ss_cam is_cam".split()
FUSED = "finer_cam fused_cam refine_cam".split()
OF_A_LAYER = [*BY_GRADIENT, *BY_FORWARDS, *FUSED, "smooth_grad_cam_plus_plus", "eigen_cam", "eigen_grad_cam",
              "ablation_cam"]  # fmt: skip
ON_A_PATH_OF_INPUTS = "conductance internal_influence neuron_conductance".split()


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

GROUPED = "feature_ablation feature_permutation shapley_values shapley_sampling kernel_shap lime".split()

# what torch says where it recomputes without what ran around the model, or refuses to; the last is torch 2.0's
RECOMPUTES = "saved tensor hooks|torch.utils.checkpoint|without checkpoint recomputation"

RELEVANCE = ("lrp", "excitation_backprop", "contrastive_excitation_backprop", "deep_lift", "deep_lift_shap")

EXCEPTIONS: list[Exempt] = [
    Exempt(
        "call",
        "a mask, a blur or a map at the input needs one tensor",
        TypeError,
        "`x` must be one tensor",
        methods=lambda name: name in (*BY_FORWARDS, "xrai", "full_grad", "guided_grad_cam", "integrated_hessians"),
        cases=lambda case: not is_one_tensor(case),
        who="`score_cam`, `ss_cam`, `is_cam`, `xrai`, `full_grad`, `guided_grad_cam`, `integrated_hessians`",
        on="several inputs",
    ),
    Exempt(
        "call",
        "there are no positions to blur or to map",
        (ValueError, TypeError),
        "`x` must|`segments` must",
        methods=lambda name: name in ("blur_integrated_gradients", "full_grad"),
        cases=lambda case: not case.integer and not has_sides(case),
        who="`blur_integrated_gradients`, `full_grad`",
        on="inputs without spatial axes",
    ),
    Exempt(
        "call",
        "it ranks segments of an image",
        ValueError,
        "`segments` must",
        methods=lambda name: name == "xrai",
        cases=lambda case: is_one_tensor(case) and case.x.shape[2:] != (6, 6),
        who="`xrai`",
        on="inputs that are not images",
    ),
    Exempt(
        "call",
        "no path joins two integers; `integrated_gradients` takes a path at the embedding, by `layer`",
        TypeError,
        "`x` holds no floating-point tensor",
        methods=lambda name: name in ON_A_PATH_OF_INPUTS,
        cases=lambda case: case.integer,
        who="`conductance`, `internal_influence`, `neuron_conductance`",
        on="inputs of integers only",
    ),
    Exempt(
        "call",
        "noise cannot be added to integers",
        TypeError,
        "`x` holds no floating-point tensor",
        methods=lambda name: name == "smooth_grad_cam_plus_plus",
        cases=lambda case: case.integer,
        who="`smooth_grad_cam_plus_plus`",
        on="inputs of integers only",
    ),
    Exempt(
        "call",
        "the path leads through the word vectors of one embedding",
        ValueError,
        "`words` must be",
        methods=lambda name: name == "discretised_integrated_gradients",
        cases=lambda case: case.name in ("two inputs", "keyword inputs"),
        who="`discretised_integrated_gradients`",
        on="several floating-point inputs",
    ),
    Exempt(
        "call",
        "the weights of a class are read from a linear layer over the pooled channels",
        ValueError,
        "`head` |`layer` must have spatial axes",
        methods=lambda name: name == "cam",
        cases=lambda case: not ends_in_cam(case) or case.name in WITHOUT_POSITIONS or case.name not in CLASSIFIES,
        who="`cam`",
        on="networks that do not end in pooling and one linear layer",
    ),
    Exempt(
        "call",
        "it compares a class with others",
        ValueError,
        "`others` must",
        methods=lambda name: name == "finer_cam",
        cases=lambda case: case.name not in CLASSIFIES,
        who="`finer_cam`",
        on="outputs that are not `[batch class]`",
    ),
    Exempt(
        "call",
        "there are no attention weights to read",
        ValueError,
        "`model` has no self-attention",
        methods=lambda name: name == "attention_relevance",
        cases=lambda case: not any(word in case.name for word in ("attention", "encoder", "dot product")),
        who="`attention_relevance`",
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
        methods=lambda name: name in (*OF_A_LAYER, "guided_grad_cam"),
        cases=lambda case: case.name in WITHOUT_POSITIONS,
        who="class activation maps",
        on="layers without spatial axes or tokens",
    ),
    Exempt(
        "call",
        "a map belongs to one input: name a `layer`, or use `gradient`",
        TypeError,
        "`x` holds several",
        methods=lambda name: name in ("saliency", *MASKED),
        cases=lambda case: case.name in ("two inputs", "keyword inputs"),
        who="`saliency` and methods that mask the input",
        on="several floating-point inputs",
    ),
    Exempt(
        "call",
        "integers cannot be differentiated; methods with `layer` explain the output of an embedding",
        TypeError,
        "`x` holds no floating-point tensor",
        methods=lambda name: takes_no_layer(name) and name != "attention_relevance",
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
        methods=lambda name: name not in ("blur_integrated_gradients", "full_grad"),  # its input has no positions
        cases=lambda case: case.name == "adds a parameter in place",
        on="a parameter that is added in place to a tensor that depends on no parameter (`y = x.clone(); y += w`)",
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


SHORT = ["residual", "attention", "tokens"]  # for what is a formula over mechanisms that have the whole of CORE
DERIVED = {*OF_A_LAYER, *ON_A_PATH_OF_INPUTS, "cam", "guided_grad_cam", "blur_integrated_gradients", "xrai"} | {
    *("discretised_integrated_gradients", "integrated_hessians", "expected_gradients", "idgi")
} - {"grad_cam"}


def law(name: str) -> Law:
    return LAWS.get(name, Law())


def exempt(name: str, case: Case, transform: str) -> Exempt | None:
    """The entry that takes this call out of the law, if there is one."""
    for about in (transform, "call"):  # a transform fails before the call is over
        for entry in EXCEPTIONS:
            if entry.transform == about and entry.methods(name) and entry.cases(case) and entry.since():
                return entry
    return None


def options(name: str, case: Case) -> dict[str, Any]:
    """The keyword arguments of a small call of this method on this model."""
    layer = inspect.signature(METHODS[name]).parameters.get("layer")
    chosen = {**law(name).options, **case.options}
    if layer is not None or not case.integer or name in (*FUSED, "expected_gradients", "feature_permutation"):
        chosen |= law(name).suited(case)
    if layer is not None and (case.integer or layer.default is inspect.Parameter.empty):
        chosen["layer"] = case.layers[0]
    return chosen


def points(name: str, case: Case) -> int:
    """How many times one call runs the model."""
    count = law(name).points
    return count if isinstance(count, int) else count(case)


def flat(result: Any) -> tuple[Tensor, ...]:
    """The tensors of a result; `vmap` takes nothing else, so the `None` of integer inputs go."""
    return tuple(leaf for leaf in pytree.tree_flatten(result)[0] if isinstance(leaf, Tensor))


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
        quick = law(name).basis or case.name in (SHORT if name in DERIVED else CORE)
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
