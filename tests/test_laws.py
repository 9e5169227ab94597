"""The contract, over every public method: pure, closed under transforms, one forward for all targets, and robust.

The list of methods and of exceptions is `laws.py`. What is excepted is asserted to raise, never skipped.
"""

import ast
import contextlib
import inspect
import itertools
import os
import re
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import laws
import pytest
import slow
import torch
import torch._dynamo  # importing it exchanges functions of torch's, which must not count as a method's doing
from cases import BY_NAME, CASES, UNSUPPORTED, Case
from laws import METHODS, method_on, pairs, targets
from torch import Tensor, nn
from torch.func import grad, jacrev, jvp, vmap
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import pullback
from pullback import over_targets, params_of
from pullback._torch.internals import LSTM_IS_ONE_PIECE

# The first `jvp` in a process makes torch warn of a module of its own.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
on_every_case = pytest.mark.parametrize(("name", "case"), pairs())
FAST_PATH = getattr(torch.backends, "mha", None)  # torch 2.0 has no switch for it
TIGHT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}


def close(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], rtol: float = 1e-9, atol: float = 1e-11) -> None:
    assert len(ours) == len(theirs)
    assert ours
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@contextlib.contextmanager
def lawful(name: str, case: Case, transform: str):
    """Run the law; where an exemption is declared, the law must end in the error that it names."""
    entry = laws.exempt(name, case, transform)
    if entry is None:
        yield
    elif entry.always:
        with pytest.raises(entry.raises, match=entry.match):
            yield
    else:
        try:
            yield
        except entry.raises as error:
            if not re.search(entry.match, str(error)):
                raise


def stacked(values: list[Any]) -> Any:
    """Stack nested inputs of one structure."""
    columns = zip(*(pytree.tree_flatten(value)[0] for value in values))
    return pytree.tree_unflatten([torch.stack(column) for column in columns], pytree.tree_flatten(values[0])[1])


def other(x: Any) -> Any:
    """Another input of the same structure: the examples change places, floating-point parts change value too."""
    return pytree.tree_map(lambda part: 0.7 * part.flip(0) + 0.1 if part.is_floating_point() else part.flip(0), x)


def example(x: Any, i: int) -> Any:
    return pytree.tree_map(lambda part: part[i : i + 1], x)


def scaled(params: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {name: factor * value for name, value in params.items()}


# ---- the list itself ----------------------------------------------------------------------------------------------


def test_every_entry_names_a_method():
    assert {"words", "segments"} <= {*laws.BY_PARAMETER}
    assert set(laws.SUITED) <= set(METHODS)
    assert {"gradient", "saliency", "integrated_gradients", "smooth_grad", "grad_cam"} <= set(METHODS)


def test_options_are_keyword_only_and_the_first_four_are_the_same():
    for name, method in METHODS.items():
        kinds = [parameter.kind for parameter in inspect.signature(method).parameters.values()]
        assert inspect.Parameter.POSITIONAL_OR_KEYWORD not in kinds[4:], name
        parameters = inspect.signature(method).parameters
        handed_on = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
        assert handed_on or "output" in parameters, name


def test_every_exception_excepts_something():
    for entry in laws.EXCEPTIONS:
        assert entry.transform in laws.TRANSFORMS
        if entry.since():
            assert any(
                entry.methods(name) and entry.cases(case) for name in METHODS for case in (*CASES, *UNSUPPORTED)
            ), entry


def test_the_limits_page_has_the_table_of_exceptions():
    between = laws.BETWEEN.search(laws.LIMITS.read_text("utf-8"))
    assert between is not None
    assert between.group() == laws.exceptions_table(), "run `python tests/laws.py`"


# ---- pure ---------------------------------------------------------------------------------------------------------


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a careless library could change about a module."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        state[f"{name}/training"] = module.training
        for key, value in vars(module).items():
            if isinstance(value, dict):
                state[f"{name}/{key}"] = {k: id(v) for k, v in value.items()}
            else:
                state[f"{name}/{key}"] = (id(value), value) if isinstance(value, (int, float, str)) else id(value)
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        state[f"{name}/tensor"] = (id(tensor), tensor.data_ptr(), tensor._version, tensor.requires_grad, tensor.grad)
        state[f"{name}/value"] = tensor.detach().clone().numpy().tobytes()
    return state


def state_of_torch() -> dict[str, Any]:
    """The globals that a method could lean on and leave changed."""
    return {
        "rng": torch.random.get_rng_state().numpy().tobytes(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark),
        "mkldnn": torch.backends.mkldnn.enabled,
        "attention": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()),
        "fast path": FAST_PATH is None or FAST_PATH.get_fastpath_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "modes": torch._C._len_torch_function_stack(),
        "autocast": torch.is_autocast_enabled(),
        "filters": list(warnings.filters),
    }


def functions_of_torch() -> dict[str, Any]:
    """What a global patch would replace."""
    return {
        f"{space.__name__}.{k}": v for space in (torch, F, torch.Tensor) for k, v in vars(space).items() if callable(v)
    }


def worn(case: Case) -> nn.Module:
    """The model as somebody's training loop left it: modes mixed, some parameters frozen, some with a gradient."""
    model = case.model()
    for k, (module, parameter) in enumerate(zip(itertools.cycle(model.modules()), model.parameters())):
        if k % 2:
            parameter.requires_grad_(False)
        else:
            parameter.grad = torch.ones_like(parameter)
        if not isinstance(module, (nn.Dropout, nn.BatchNorm1d, nn.BatchNorm2d)):
            module.training = bool(k % 3)
    return model


def floating(x: Any) -> list[Tensor]:
    return [part for part in pytree.tree_flatten(x)[0] if part.is_floating_point()]


@on_every_case
def test_pure(name, case):
    model, x, target = worn(case), case.x, targets(case)[0]
    for part in floating(x):
        part.requires_grad_()
        part.grad = torch.ones_like(part)
    call = method_on(name, case)
    params = params_of(model)
    with lawful(name, case, "call"):
        call(params, model, x, target)  # a first call may fill a cache of shapes
        before, functions = (state_of(model), state_of_torch()), functions_of_torch()
        inputs = [(part, part._version, part.grad, part.detach().clone()) for part in pytree.tree_flatten(x)[0]]
        mine = {key: (value, value._version, value.clone()) for key, value in params.items()}
        target_before = (target._version, target.clone())

        first = call(params, model, x, target)

        assert (state_of(model), state_of_torch()) == before
        assert functions_of_torch().items() >= functions.items()
        for part, version, gradient, value in inputs:
            assert part._version == version
            assert part.grad is gradient
            assert torch.equal(part.detach(), value)
        for part in floating(x):
            assert torch.equal(part.grad, torch.ones_like(part))  # type: ignore[arg-type]
        assert list(params) == list(mine)
        for key, (tensor, version, value) in mine.items():
            assert params[key] is tensor
            assert tensor._version == version
            assert torch.equal(tensor, value)
        assert (target._version, bool(torch.equal(target, target_before[1]))) == (target_before[0], True)

        torch.randn(3)  # a method that draws from the global generator would now draw something else
        second = call(params, model, x, target)
        assert all(torch.equal(a, b) for a, b in zip(first, second))
        assert not any(torch.isnan(a).any() for a in first)


class BreakError(Exception):
    pass


def as_tuple(kinds: Any) -> tuple[type[Exception], ...]:
    return kinds if isinstance(kinds, tuple) else (kinds,)


@on_every_case
def test_pure_also_when_the_model_raises_in_the_middle(name, case):
    model, x, target = worn(case), case.x, targets(case)[0]
    call = method_on(name, case)
    params = params_of(model)
    inside = model.get_submodule(case.layers[0])

    def broken(module: nn.Module, args: Any) -> None:
        raise BreakError

    handle = inside.register_forward_pre_hook(broken)
    functions = functions_of_torch()
    before, values = (state_of(model), state_of_torch()), pytree.tree_map(torch.clone, x)
    with warnings.catch_warnings():
        # A shape probe that fails says so; what matters here is what is left behind.
        warnings.simplefilter("ignore", UserWarning)
        entry = laws.exempt(name, case, "call")  # then either error may come first
        errors: Any = BreakError if entry is None else (BreakError, *as_tuple(entry.raises))
        with pytest.raises(errors):
            call(params, model, x, target)
    assert (state_of(model), state_of_torch()) == before
    assert functions_of_torch().items() >= functions.items()
    assert all(torch.equal(a, b) for a, b in zip(pytree.tree_flatten(x)[0], pytree.tree_flatten(values)[0]))
    handle.remove()


# ---- closed under vmap --------------------------------------------------------------------------------------------


@on_every_case
def test_vmap_over_targets_is_the_loop(name, case):
    model, x, many = case.model(), case.x, targets(case)
    call, params = method_on(name, case), params_of(model)
    with lawful(name, case, "targets"):
        batched = vmap(call, (None, None, None, 0))(params, model, x, many)
        close(batched, stacked([call(params, model, x, target) for target in many]))


@on_every_case
def test_vmap_over_inputs_is_the_loop(name, case):
    model, x, target = case.model(), case.x, targets(case)[0]
    call, params = method_on(name, case), params_of(model)
    inputs = [x, other(x), example_pair(x)]
    with lawful(name, case, "inputs"):
        batched = vmap(call, (None, None, 0, None))(params, model, stacked(inputs), target)
        close(batched, stacked([call(params, model, one, target) for one in inputs]))


def example_pair(x: Any) -> Any:
    """The first example twice."""
    return pytree.tree_map(lambda part: torch.cat([part[:1], part[:1]]), x)


@on_every_case
def test_vmap_over_parameters_is_the_loop(name, case):
    model, x, target = case.model(), case.x, targets(case)[0]
    call = method_on(name, case)
    ensemble = [scaled(params_of(model), factor) for factor in (1.0, 1.1, 0.8)]
    with lawful(name, case, "params"):
        batched = vmap(call, (0, None, None, None))(stacked(ensemble), model, x, target)
        close(batched, stacked([call(params, model, x, target) for params in ensemble]))


SEEDED = [name for name, method in METHODS.items() if "seed" in inspect.signature(method).parameters]


@pytest.mark.parametrize("name", SEEDED)
@pytest.mark.parametrize("case", [BY_NAME[name] for name in laws.CORE], ids=lambda case: case.name)
def test_vmap_over_seeds_is_the_loop(name, case):
    model, x, target = case.model(), case.x, targets(case)[0]
    call, params = method_on(name, case), params_of(model)
    with lawful(name, case, "seed"):
        seeds = torch.tensor([0, 7, 2**40])
        batched = vmap(lambda seed: call(params, model, x, target, seed=seed))(seeds)
        loop = [call(params, model, x, target, seed=int(seed)) for seed in seeds]
        close(batched, stacked(loop))
        if name == "meaningful_perturbation" and case.integer:
            return  # its seed moves the image about, and words have no place to be moved to
        assert not torch.equal(loop[0][0], loop[1][0])
        assert not torch.equal(loop[1][0], loop[2][0])


@pytest.mark.parametrize("name", list(METHODS))
def test_vmap_over_everything_at_once(name):
    case = BY_NAME["residual"]
    model, x, many = case.model(), case.x, targets(case)
    call = method_on(name, case)
    ensemble = [scaled(params_of(model), factor) for factor in (1.0, 1.1)]
    inputs = [x, other(x)]
    with lawful(name, case, "targets"):
        over = vmap(vmap(vmap(call, (None, None, None, 0)), (None, None, 0, None)), (0, None, None, None))
        (batched, *_) = over(stacked(ensemble), model, stacked(inputs), many)
        for (i, params), (j, one), (k, target) in itertools.product(
            enumerate(ensemble), enumerate(inputs), enumerate(many)
        ):
            torch.testing.assert_close(batched[i, j, k], call(params, model, one, target)[0], **TIGHT)


# ---- one forward --------------------------------------------------------------------------------------------------


class Count(torch.autograd.Function):
    """The identity, which writes down how many numbers really went through it; a probe without compute does not count.

    Under `vmap` it sees the whole batch, so a forward that was repeated for each target inside one call is counted too.
    """

    @staticmethod
    def forward(x, seen):
        if x.device.type != "meta" and not isinstance(x, torch._subclasses.FakeTensor):
            seen.total += x.numel()
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *cotangents):
        return cotangents[0], None

    @staticmethod
    def jvp(ctx, *tangents):
        return tangents[0].clone()

    @staticmethod
    def vmap(info, in_dims, x, seen):  # pyright: ignore[reportIncompatibleMethodOverride]
        return Count.apply(x, seen), in_dims[0]


class Tally:
    """How much went by; not a list, which copies of a module and of arguments would not share."""

    def __init__(self):
        self.total = 0

    def taken(self) -> int:
        total, self.total = self.total, 0
        return total


class Counted(nn.Module):
    """A model that counts at its door and at its exit."""

    def __init__(self, case: Case):
        super().__init__()
        self.inner, self.case = case.model(), case
        self.entered, self.left = Tally(), Tally()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x: Any = kwargs or (args[0] if len(args) == 1 else args)
        x = pytree.tree_map(lambda part: Count.apply(part, self.entered) if part.is_floating_point() else part, x)
        return Count.apply(self.case.call(self.inner, x), self.left)  # type: ignore[return-value]

    def forwards(self) -> tuple[float, float]:
        """How many times over everything was computed, at the door and at the exit."""
        whole = sum(part.numel() for part in floating(self.case.x)) or 1
        out = self.case.call(self.inner, self.case.x).numel()
        return self.entered.taken() / whole, self.left.taken() / out


def inside(name: str, case: Case) -> dict[str, Any]:
    """The options for a model that sits one level down, and selects its output itself."""
    chosen: dict[str, Any] = {"output": None}
    if "layer" in laws.options(name, case):
        chosen["layer"] = f"inner.{laws.options(name, case)['layer']}"
    if "layers" in laws.options(name, case):
        chosen["layers"] = [f"inner.{layer}" for layer in laws.options(name, case)["layers"]]
    if "contrast_layer" in laws.options(name, case):
        chosen["contrast_layer"] = f"inner.{laws.options(name, case)['contrast_layer']}"
    if "head" in laws.options(name, case):
        chosen["head"] = "inner.head"
    return chosen


@on_every_case
def test_all_targets_take_one_forward(name, case):
    model, x, many = Counted(case), case.x, targets(case)
    call, params = method_on(name, case, **inside(name, case)), params_of(model)
    points = laws.points(name, case) + ("layer" in laws.options(name, case)) * laws.declared(name).reads
    expected = (0.0 if case.integer else float(points), float(points))
    with lawful(name, case, "targets"):
        call(params, model, x, many[0])
        assert model.forwards() == expected
        more = laws.adaptive(name, case) * (len(many) - 1)
        expected = (0.0 if case.integer else float(points + more), float(points + more))
        vmap(call, (None, None, None, 0))(params, model, x, many)
        assert model.forwards() == expected
        over_targets(call)(params, model, x, many)
        assert model.forwards() == expected
        over_targets(call, chunk_size=2)(params, model, x, many)
        assert model.forwards() == expected


@on_every_case
def test_over_targets_is_the_loop(name, case):
    model, x = case.model(), case.x
    many = targets(case, 5)
    call, params = method_on(name, case), params_of(model)
    with lawful(name, case, "targets"):
        loop = stacked([call(params, model, x, target) for target in many])
        close(over_targets(call)(params, model, x, many), loop)
        close(over_targets(call, chunk_size=2)(params, model, x, many), loop)


@pytest.mark.parametrize("name", list(METHODS))
def test_over_targets_hands_options_on(name):
    case = BY_NAME["residual"]
    model, x = case.model(), case.x
    params = params_of(model)
    chosen = laws.options(name, case)
    for many in ([0, 3, 1], torch.tensor([0, 3, 1]), torch.tensor([[0, 1], [3, 3], [1, 4]])):
        with lawful(name, case, "call"):
            result = over_targets(METHODS[name])(params, model, x, many, **chosen)
            for k, target in enumerate(many):
                close(laws.flat(result[k]), laws.flat(METHODS[name](params, model, x, target, **chosen)))


# ---- differentiable -----------------------------------------------------------------------------------------------


def directions(case: Case, model: nn.Module) -> tuple[Any, dict[str, Tensor]]:
    """A random direction in the space of inputs and one in the space of parameters."""
    generator = torch.Generator().manual_seed(3)

    def drawn(part: Tensor) -> Tensor:
        if not part.is_floating_point():
            return torch.zeros_like(part)
        return torch.randn(part.shape, generator=generator, dtype=part.dtype)

    along_params = {
        key: torch.zeros_like(value) if is_state(key) else 0.1 * drawn(value) for key, value in params_of(model).items()
    }
    return pytree.tree_map(drawn, case.x), along_params


def is_state(key: str) -> bool:
    """Singular vectors that spectral norm keeps: they go through no derivative of torch's own either."""
    return key.endswith(("_u", "_v"))


def step(values: Any, way: Any, t: Any) -> Any:
    parts, structure = pytree.tree_flatten(values)
    moved = [v + t * d if v.is_floating_point() else v for v, d in zip(parts, pytree.tree_flatten(way)[0])]
    return pytree.tree_unflatten(moved, structure)


@on_every_case
def test_derivatives_of_the_attribution_are_right(name, case):
    """`grad` and `jvp` of a weighted sum of the attribution, by `x` and by parameters, against finite differences."""
    model, x, target = case.model(), case.x, targets(case)[1]
    call, params = method_on(name, case), params_of(model)
    along_x, along_params = directions(case, model)
    zero = torch.zeros((), dtype=torch.float64)

    def score(t_params: Tensor, t_x: Tensor) -> Tensor:
        result = call(step(params, along_params, t_params), model, step(x, along_x, t_x), target)
        weighted = [(part * torch.linspace(-1, 1, part.numel()).reshape(part.shape)).sum() for part in result]
        return torch.stack(weighted).sum()

    def numeric() -> list[Tensor]:
        return [
            # small steps: an attribution jumps where a rectifier switches
            slow.derivative(lambda t: score(t, zero).detach(), zero, step=1e-6),
            slow.derivative(lambda t: score(zero, t).detach(), zero, step=1e-6),
        ]

    with lawful(name, case, "grad"):
        for ours, theirs in zip(grad(score, argnums=(0, 1))(zero, zero), numeric()):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)
    with lawful(name, case, "jvp"):
        for tangents, theirs in zip(torch.eye(2, dtype=torch.float64), numeric()):
            ours = jvp(score, (zero, zero), tuple(tangents))[1]
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "integrated_hessians"])
@pytest.mark.parametrize("case", [BY_NAME[n] for n in ("gelu mlp", "residual", "attention")], ids=lambda c: c.name)
def test_the_jacobian_of_the_attribution_is_right(name, case):
    check_jacobian(name, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [BY_NAME[n] for n in ("gelu mlp", "residual", "attention")], ids=lambda c: c.name)
def test_the_jacobian_of_hessians_is_right(case):
    check_jacobian("integrated_hessians", case)


def check_jacobian(name, case):
    model, x, target = case.model(), case.x[:1], 1
    call, params = method_on(name, case), params_of(model)
    way = torch.randn_like(x)
    with lawful(name, case, "grad"):
        (jacobian, *_) = jacrev(lambda x: call(params, model, x, target))(x)
        result = call(params, model, x, target)[0]
        assert jacobian.shape == (*result.shape, *x.shape)
        numeric = slow.derivative(
            lambda t: call(params, model, x + t * way, target)[0], torch.zeros((), dtype=torch.float64)
        )
        ours = (jacobian * way).flatten(result.ndim).sum(-1)
        torch.testing.assert_close(ours, numeric, rtol=1e-5, atol=1e-7 * float(numeric.abs().max() + 1e-3))


@pytest.mark.parametrize("name", list(METHODS))
def test_ordinary_autograd_goes_through_as_well(name):
    """`loss.backward()` on an attribution, the way a training loop regularises explanations."""
    case = BY_NAME["depthwise"]
    model, x = case.model(), case.x.requires_grad_()
    params = {key: value.requires_grad_() for key, value in params_of(model).items()}
    call = method_on(name, case)
    with lawful(name, case, "grad"):

        def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.stack([part.square().sum() for part in call(params, model, x, 1)]).sum()

        loss(params, x).backward()
        by_params, by_x = grad(loss, argnums=(0, 1))(params, x)
        for leaf, theirs in ((x, by_x), *((value, by_params[key]) for key, value in params.items())):
            ours = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            torch.testing.assert_close(ours, theirs, **TIGHT)
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- each example on its own --------------------------------------------------------------------------------------


@on_every_case
def test_each_example_on_its_own(name, case):
    model, x, target = case.model(), case.x, targets(case)[0]
    call, params = method_on(name, case), params_of(model)
    with lawful(name, case, "call"):
        together = call(params, model, x, target)
        for i in (0, 1):
            alone = call(params, model, example(x, i), target[i : i + 1])
            close(tuple(part[i : i + 1] for part in together), alone)


# ---- where people run it ------------------------------------------------------------------------------------------


def cast(x: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map(lambda part: part.to(dtype) if part.is_floating_point() else part, x)


def near(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], part: float) -> None:
    """Close as a picture: the distance is a small part of the whole."""
    for a, b in zip(ours, theirs):
        assert torch.isfinite(a).all()
        assert (a.double() - b.double()).norm() <= part * b.double().norm() + 1e-12


@on_every_case
def test_dtypes(name, case):
    target = targets(case)[0]
    call = method_on(name, case)
    with lawful(name, case, "call"):
        model = case.model()
        exact = call(params_of(model), model, case.x, target)
        for dtype, part in ((torch.float32, 1e-3), (torch.bfloat16, 0.5)):
            model = case.model().to(dtype)
            low = target.to(dtype) if target.is_floating_point() else target
            result = call(params_of(model), model, cast(case.x, dtype), low)
            assert all(tensor.dtype == dtype for tensor in result)
            near(result, exact, part)


@on_every_case
def test_grad_modes(name, case):
    """Frozen parameters, `no_grad`, `inference_mode`: all the same."""
    model, x, target = case.model(), case.x, targets(case)[0]
    call = method_on(name, case)
    with lawful(name, case, "call"):
        expected = call(params_of(model), model, x, target)
        with torch.no_grad():
            close(call(params_of(model), model, x, target), expected)
        with torch.inference_mode():
            close(call(params_of(model), model, x, target), expected)
            close(call(params_of(model), model, pytree.tree_map(torch.clone, x), target), expected)
        close(call(params_of(model), model, pytree.tree_map(lambda part: made_in_inference(part), x), target), expected)
        close(call(dict(model.named_parameters()), model, x, target), expected)
        close(call({}, model, x, target), expected)
        model.requires_grad_(False)
        close(call(params_of(model), model, x, target), expected)


def made_in_inference(part: Tensor) -> Tensor:
    with torch.inference_mode():
        return part.clone()


@on_every_case
def test_autocast(name, case):
    target = targets(case)[0]
    call = method_on(name, case)
    model, x = case.model().float(), cast(case.x, torch.float32)
    low = target.float() if target.is_floating_point() else target
    with lawful(name, case, "call"):
        exact = call(params_of(model), model, x, low)
        with torch.autocast("cpu", torch.bfloat16):
            if case.name == "lstm" and not (has_low_lstm() or LSTM_IS_ONE_PIECE):
                with pytest.raises(RuntimeError):  # torch's own
                    call(params_of(model), model, x, low)
                return
            result = call(params_of(model), model, x, low)
        near(result, exact, 0.5)


def has_low_lstm() -> bool:
    """Whether torch runs an LSTM in bfloat16 on this processor."""
    try:
        torch.nn.LSTM(2, 2)(torch.zeros(1, 1, 2))
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize(
    "case", [BY_NAME[n] for n in ("residual", "called twice", "spectral norm", "attention")], ids=lambda c: c.name
)
@pytest.mark.filterwarnings("ignore::pullback.PullbackWarning")
def test_several_threads_on_one_model(case):
    """Other parameters, other methods, one module: no thread sees another's."""
    model, x, target = case.model(), case.x, targets(case)[0]
    jobs = [
        (name, scaled(params_of(model), factor))
        for name in METHODS
        for factor in (1.0, 1.3, 0.7)
        if laws.exempt(name, case, "call") is None
    ]
    calls = {name: without_catching(name, case) for name in METHODS}
    serial = [calls[name](params, model, x, target) for name, params in jobs]
    before = state_of(model)
    with ThreadPoolExecutor(4) as pool:
        parallel = list(pool.map(lambda job: calls[job[0]](job[1], model, x, target), 3 * jobs))
    for ours, theirs in zip(parallel, 3 * serial):
        close(ours, theirs)
    assert state_of(model) == before


def without_catching(name: str, case: Case) -> Any:
    """As `method_on`, without `catch_warnings`, which is not for threads; the cases here warn of nothing else."""
    chosen = laws.options(name, case)

    def call(params: Any, model: Any, x: Any, target: Any) -> tuple[Tensor, ...]:
        return laws.flat(METHODS[name](params, model, x, target, **chosen))

    return call


# ---- targets under transforms -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("case", [BY_NAME[n] for n in ("residual", "dense output")], ids=lambda c: c.name)
def test_an_index_out_of_range(name, case):
    """Read, it is an error that names the range; traced, it turns the map to NaN and leaves its neighbours alone."""
    model, x = case.model(), case.x
    call, params = method_on(name, case), params_of(model)
    for bad in (case.targets, -1, torch.tensor(case.targets), torch.tensor([0, -1]), [0, case.targets]):
        entry = laws.exempt(name, case, "call")
        with pytest.raises(ValueError, match=r"`target`.*0.*4" + ("" if entry is None else f"|{entry.match}")):
            call(params, model, x, bad)
    with lawful(name, case, "targets"):
        (batched, *_) = vmap(call, (None, None, None, 0))(params, model, x, torch.tensor([1, case.targets, -1]))
        assert torch.isnan(batched[1:]).all()
        torch.testing.assert_close(batched[0], call(params, model, x, 1)[0], **TIGHT)
        (batched, *_) = vmap(call, (None, None, None, 0))(params, model, x, torch.tensor([[1, case.targets], [2, 3]]))
        assert torch.isnan(batched[0, 1]).all()
        torch.testing.assert_close(batched[0, 0], call(params, model, x, 1)[0][0], **TIGHT)
        torch.testing.assert_close(batched[1], call(params, model, x, [2, 3])[0], **TIGHT)


# ---- compile ------------------------------------------------------------------------------------------------------

COMPILED = ["F.relu", "h.relu_() statement", "relu6 used twice", "residual", "aliased skip", "gelu mlp", "attention"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, BY_NAME[on], id=f"{name}-{on}")
        for name in METHODS
        for on in COMPILED
        if laws.exempt(name, BY_NAME[on], "call") is None  # what raises when it is not compiled is asserted above
    ],
)
def test_compiles_as_one_graph(name, case):
    model, x, target = case.model(), case.x, targets(case)[0]
    params, chosen = params_of(model), laws.options(name, case)
    torch._dynamo.reset()
    with lawful(name, case, "compile"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own, and what the rules tell while it traces
        compiled = torch.compile(
            lambda params, x, target: METHODS[name](params, model, x, target, **chosen),
            fullgraph=True,
            backend="aot_eager",
        )
        for values, data in ((params, x), (scaled(params, 1.1), other(x))):
            ours = laws.flat(compiled(values, data, target))
            close(ours, method_on(name, case)(values, model, data, target))


# ---- import -------------------------------------------------------------------------------------------------------


def test_importing_brings_in_no_optional_package():
    code = "import sys, torch; with_torch = set(sys.modules); import pullback; print(set(sys.modules) - with_torch)"
    environment = {**os.environ, "PYTHONPATH": str(Path(pullback.__file__).parent.parent)}
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    packages = {name.partition(".")[0] for name in ast.literal_eval(loaded.stdout)}
    assert "pullback" in packages
    assert not packages & {"matplotlib", "PIL", "tqdm", "torchvision", "timm", "transformers", "skimage", "scipy"}
