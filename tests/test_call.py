"""Calling a model: its parameters, its targets and outputs, and the shell that keeps the caller's module untouched."""

import functools
import threading
import types
import warnings

import numpy as np
import pytest
import slow
import torch
from cases import BY_NAME, CLASSES, Plain, evaluated
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from pullback import grad_cam, gradient, guided_backprop, layers, params_of

some = settings(max_examples=60, deadline=None, derandomize=True)


reached: nn.Module


def reference(name: str, x, target):
    case = BY_NAME[name]
    return slow.gradient(functools.partial(case.call, case.twin()), x, target)


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


# ---- parameters ---------------------------------------------------------------------------------------------------


def test_params_are_parameters_and_floating_point_buffers_by_name():
    model = BY_NAME["buffers"].model()
    params = params_of(model)
    assert list(params) == ["conv.weight", "conv.bias", "head.weight", "head.bias", "mean", "scale"]
    assert not any(value.requires_grad for value in params.values())
    assert params["mean"].data_ptr() == model.mean.data_ptr()  # type: ignore[union-attr, operator]
    assert "norm.num_batches_tracked" not in params_of(BY_NAME["residual"].model())


def test_shared_and_tied_parameters_appear_once():
    assert [name for name in params_of(BY_NAME["shared linear"].model()) if "second" in name] == []
    assert "last.weight" not in params_of(BY_NAME["tied weights"].model())


@pytest.mark.parametrize("name", ["residual", "shared linear", "tied weights", "spectral norm", "weight norm by hook"])
def test_params_that_are_handed_in_are_used(name):
    """All of them: the explanation is that of a module that holds these values."""
    case = BY_NAME[name]
    model = case.model()
    params = {key: 1.3 * value for key, value in params_of(model).items()}
    loaded = case.twin()
    loaded.load_state_dict(params, strict=False)
    if name.startswith(("shared", "tied")):
        with torch.no_grad():  # one name stands for both
            for key, value in loaded.named_parameters():
                value.copy_(params[key])
    expected = slow.gradient(functools.partial(case.call, loaded), case.x, [1, 3])
    same(gradient(params, model, case.x, [1, 3]), expected)


def test_either_name_of_a_tied_parameter_sets_both():
    case = BY_NAME["tied weights"]
    model = case.model()
    value = 1.7 * params_of(model)["embed.weight"]
    same(gradient({"embed.weight": value}, model, case.x, 1), gradient({"last.weight": value}, model, case.x, 1))


def test_params_left_out_come_from_the_model():
    case = BY_NAME["residual"]
    model = case.model()
    everything = gradient(params_of(model), model, case.x, 1)
    same(gradient({}, model, case.x, 1), everything)
    same(gradient({"head.weight": model.head.weight.detach()}, model, case.x, 1), everything)  # type: ignore[union-attr, operator]


def test_params_may_be_several_dicts():
    case = BY_NAME["residual"]
    model = case.model()
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    same(gradient((params, buffers), model, case.x, 1), gradient(params_of(model), model, case.x, 1))
    changed = {key: 1.2 * value for key, value in params.items()}
    same(gradient((changed, buffers), model, case.x, 1), gradient({**params_of(model), **changed}, model, case.x, 1))


def test_an_unknown_parameter_is_named():
    case = BY_NAME["residual"]
    model = case.model()
    with pytest.raises(ValueError, match=r"`params`.*`conv9\.weight`"):
        gradient({"conv9.weight": torch.ones(1)}, model, case.x, 1)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_wrapped_module_is_explained_through_the_module_that_it_wraps(wrap):
    case = BY_NAME["residual"]
    model = case.model()
    wrapped = wrap(model)
    expected = gradient(params_of(model), model, case.x, 1)
    for params in (params_of(model), params_of(wrapped), {}, dict(wrapped.named_parameters())):
        same(gradient(params, wrapped, case.x, 1), expected)
    for params in (params_of(wrapped), dict(wrapped.named_parameters())):
        same(gradient(params, model, case.x, 1), expected)
    same(
        grad_cam(params_of(wrapped), wrapped, case.x, 1, layer="conv1"),
        grad_cam(params_of(model), model, case.x, 1, layer="conv1"),
    )
    same(guided_backprop(params_of(wrapped), wrapped, case.x, 1), guided_backprop(params_of(model), model, case.x, 1))


# ---- models -------------------------------------------------------------------------------------------------------


def test_a_model_may_be_a_pure_function():
    weight = torch.randn(5, 6, dtype=torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64)
    attribution = gradient({"w": weight}, lambda params, x: F.relu(x) @ params["w"].T, x, 2)
    same(attribution, (x > 0) * weight[2])


def test_forward_as_an_instance_attribute_is_bound_to_the_copy():
    """`model.forward = types.MethodType(new_forward, model)`, as patching libraries do."""
    case = BY_NAME["F.relu"]
    model = case.model()

    def forward(self, x: Tensor) -> Tensor:
        return 2 * Plain.forward(self, x)

    model.forward = types.MethodType(forward, model)
    params = {key: 1.1 * value for key, value in params_of(model).items()}
    twice = gradient(params, model, case.x, 1)
    same(twice, 2 * gradient(params, case.model(), case.x, 1))
    same(
        grad_cam(params, model, case.x, 1, layer="conv2"), 2 * grad_cam(params, case.model(), case.x, 1, layer="conv2")
    )


def test_forward_of_a_child_as_an_instance_attribute():
    case = BY_NAME["F.relu"]
    model = case.model()
    model.head.forward = functools.partial(model.head.forward)  # type: ignore[union-attr]
    params = {key: 1.1 * value for key, value in params_of(model).items()}
    same(gradient(params, model, case.x, 1), gradient(params, case.model(), case.x, 1))


def test_forward_that_closes_over_the_original_runs_on_the_copy():
    case = BY_NAME["F.relu"]
    model = case.model()
    original = model.forward
    model.forward = lambda x: 2 * original(x)
    params = {key: 1.1 * value for key, value in params_of(model).items()}
    same(gradient(params, model, case.x, 1), 2 * gradient(params, case.model(), case.x, 1))


def test_forward_that_reaches_the_original_through_a_global_is_refused():
    """Nothing can be handed to it: parameters would be those of the original, silently."""
    global reached
    case = BY_NAME["F.relu"]
    reached = case.model()
    reached.forward = lambda x: Plain.forward(reached, x)  # type: ignore[arg-type]
    with pytest.raises((ValueError, TypeError), match=r"`forward`.*`reached`"):
        gradient(params_of(reached), reached, case.x, 1)


def test_a_scripted_module_is_refused_where_its_inside_is_asked_for():
    case = BY_NAME["F.relu"]

    class Scriptable(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 4, 3), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.conv(x)).mean((2, 3)))

    model = evaluated(Scriptable().double())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(model)
    with pytest.raises((ValueError, TypeError), match="script"):
        guided_backprop(params_of(model), scripted, case.x, 1)
    with pytest.raises((ValueError, TypeError), match="script"):
        gradient(params_of(model), scripted, case.x, 1, layer="conv")
    inner = nn.Sequential(scripted, nn.Linear(5, 5).double()).eval()
    with pytest.raises((ValueError, TypeError), match="script"):
        guided_backprop(params_of(inner), inner, case.x, 1)
    same(
        gradient(params_of(model), scripted, case.x, 1),
        slow.gradient(lambda x: model(x), case.x, 1),
    )


def test_lazy_modules_are_asked_to_be_run_first():
    model = nn.Sequential(nn.LazyLinear(5)).eval()
    with pytest.raises((ValueError, TypeError, RuntimeError), match=r"[Ll]azy|uninitialized"):
        gradient({}, model, torch.randn(2, 6), 1)


def test_modules_that_refer_to_each_other():
    """A child that knows its parent outside the module tree, and a module that knows itself."""

    class Child(nn.Module):
        def __init__(self, parent: nn.Module):
            super().__init__()
            self.parent = [parent]

        def forward(self, x: Tensor) -> Tensor:
            return self.parent[0].linear(x)  # type: ignore[operator, union-attr]

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 5)
            self.child = Child(self)

        def forward(self, x: Tensor) -> Tensor:
            return self.child(x).tanh()

    model = Parent().double().eval()
    x = torch.randn(2, 6, dtype=torch.float64)
    params = {key: 1.3 * value for key, value in params_of(model).items()}
    same(
        gradient(params, model, x, 1),
        slow.gradient(lambda x: F.linear(x, params["linear.weight"], params["linear.bias"]).tanh(), x, 1),
    )


def test_plain_containers_of_modules_and_partial_methods():
    """Modules in a plain list beside their registration, and a method kept in a `partial` and a dict."""

    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 5)
            self.order = [self.one, self.two]
            self.steps = {"act": functools.partial(self.act, gain=2.0)}

        def act(self, h: Tensor, gain: float) -> Tensor:
            return torch.tanh(gain * self.one(h))

        def forward(self, x: Tensor) -> Tensor:
            return self.order[1](self.steps["act"](self.order[0](x)))

    model = Kept().double().eval()
    x = torch.randn(2, 6, dtype=torch.float64)
    params = {key: 1.3 * value for key, value in params_of(model).items()}

    def pure(x: Tensor) -> Tensor:
        h = F.linear(x, params["one.weight"], params["one.bias"])
        h = torch.tanh(2 * F.linear(h, params["one.weight"], params["one.bias"]))
        return F.linear(h, params["two.weight"], params["two.bias"])

    same(gradient(params, model, x, 1), slow.gradient(pure, x, 1))


def test_a_model_with_slots_properties_and_its_own_getattr():
    class Forwarding(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 5)

        def __getattr__(self, name: str):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

        @property
        def doubled(self) -> Tensor:
            return 2 * self.weight  # type: ignore[operator]

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.doubled, self.bias)  # type: ignore[arg-type]

    model = Forwarding().double().eval()
    x = torch.randn(2, 6, dtype=torch.float64)
    params = {key: 1.3 * value for key, value in params_of(model).items()}
    same(gradient(params, model, x, 1), (2 * params["inner.weight"])[1].expand(2, -1))


def test_what_forward_writes_on_its_module_stays_on_the_copy():
    class Remembering(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 5)
            self.last = None
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
            self.register_buffer("seen", torch.zeros(5))
            self.calls: Tensor
            self.steps: Tensor
            self.seen: Tensor

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            self.steps += 1
            self.seen.mul_(0.9).add_(0.1)
            self.last = self.linear(x)
            return self.last

    model = Remembering().eval()
    params = params_of(model)
    gradient(params, model, torch.randn(2, 6), 1)
    assert model.last is None
    assert model.calls == model.steps == params["calls"] == 0
    assert not model.seen.any()


def test_one_call_in_the_callers_training_mode_leaves_statistics_alone():
    model = BY_NAME["residual"].model().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = reference("residual", BY_NAME["residual"].x, [1, 3])
    same(gradient(params_of(model), model, BY_NAME["residual"].x, [1, 3]), expected)
    assert model.training
    assert all(module.training for module in model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_threads_do_not_see_each_others_parameters():
    """The failure of a swap-in, swap-out call: wrong numbers, and a module left changed."""
    case = BY_NAME["residual"]
    model = case.model()
    jobs = [{key: factor * value for key, value in params_of(model).items()} for factor in (0.7, 1.0, 1.3)]
    expected = [gradient(params, model, case.x, 1) for params in jobs]
    wrong: list[int] = []

    def work(k: int) -> None:
        for _ in range(30):
            if not torch.equal(gradient(jobs[k], model, case.x, 1), expected[k]):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---- targets ------------------------------------------------------------------------------------------------------

INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]
NUMPY = [np.int8, np.uint8, np.int16, np.int32, np.int64]


@st.composite
def index_forms(draw):
    """One class for all, or one for each of two examples, in every form that is taken."""
    one = draw(st.integers(0, CLASSES - 1))
    two = draw(st.integers(0, CLASSES - 1))
    kind = draw(st.sampled_from(["int", "numpy", "tensor", "list", "tuple", "array", "vector", "mixed"]))
    dtype, numpy = draw(st.sampled_from(INTEGERS)), draw(st.sampled_from(NUMPY))
    made = {
        "int": one,
        "numpy": numpy(one),
        "tensor": torch.tensor(one, dtype=dtype),
        "list": [one, two],
        "tuple": (one, two),
        "array": np.array([one, two], dtype=numpy),
        "vector": torch.tensor([one, two], dtype=dtype),
        "mixed": [numpy(one), torch.tensor(two, dtype=dtype)],
    }[kind]
    return made, [one, one] if kind in ("int", "numpy", "tensor") else [one, two]


@some
@given(form=index_forms(), name=st.sampled_from(["gelu mlp", "dense output", "output in a dict"]))
def test_indices_in_every_form(form, name):
    target, meaning = form
    case = BY_NAME[name]
    model = case.model()
    same(gradient(params_of(model), model, case.x, target, **case.options), reference(name, case.x, meaning))


@pytest.mark.parametrize("name", ["gelu mlp", "dense output", "one score", "one score kept"])
def test_a_cotangent(name):
    case = BY_NAME[name]
    model = case.model()
    cotangent = torch.randn_like(case.call(model, case.x))
    same(gradient(params_of(model), model, case.x, cotangent), reference(name, case.x, cotangent))


def test_a_cotangent_takes_the_outputs_dtype():
    case = BY_NAME["gelu mlp"]
    model = case.model()
    cotangent = torch.randn(2, CLASSES)
    same(
        gradient(params_of(model), model, case.x, cotangent),
        gradient(params_of(model), model, case.x, cotangent.double()),
    )


def test_a_score_function():
    case = BY_NAME["gelu mlp"]
    model = case.model()

    def margin(out: Tensor) -> Tensor:
        return out[:, 2] - out[:, [0, 1, 3, 4]].logsumexp(1)

    same(gradient(params_of(model), model, case.x, margin), reference("gelu mlp", case.x, margin))


@pytest.mark.parametrize("name", ["one score", "one score kept"])
def test_no_target_where_the_output_is_one_score(name):
    case = BY_NAME[name]
    model = case.model()
    same(gradient(params_of(model), model, case.x, None), reference(name, case.x, None))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_targets_under_vmap_in_every_integer_dtype(dtype):
    case = BY_NAME["gelu mlp"]
    model, x = case.model(), case.x
    many = vmap(lambda target: gradient(params_of(model), model, x, target))(torch.arange(CLASSES, dtype=dtype))
    for target in range(CLASSES):
        same(many[target], reference("gelu mlp", case.x, target))


@pytest.mark.parametrize(
    ("target", "match"),
    [
        (5, r"`target`.*0.*4.*5"),
        (-1, r"`target`.*0.*4.*-1"),
        (np.int64(-2), r"`target`.*0.*4.*-2"),
        ([0, 7], r"`target`.*0.*4.*7"),
        ([0, 1, 2], r"`target`.*2.*3"),
        (torch.zeros(2, 2, dtype=torch.long), r"`target`"),
        (torch.zeros(2, 4), r"`target`.*\(2, 4\)|`target`.*\[2, 4\]"),
        (1.0, r"`target`"),
        ("tabby", r"`target`.*str"),
        (None, r"`target`"),
        (True, r"`target`"),
        ([], r"`target`"),
        (torch.tensor([True, False]), r"`target`"),
        (lambda out: out, r"`target`.*\[2\].*\[2, 5\]"),
        (lambda out: out.sum(), r"`target`"),
        (lambda out: "high", r"`target`"),
    ],
)
def test_targets_that_mean_nothing(target, match):
    case = BY_NAME["gelu mlp"]
    model = case.model()
    with pytest.raises((ValueError, TypeError), match=match):
        gradient(params_of(model), model, case.x, target)


def test_an_index_into_one_score_is_an_error():
    case = BY_NAME["one score"]
    model = case.model()
    with pytest.raises(ValueError, match="`target`"):
        gradient(params_of(model), model, case.x, 0)


# ---- outputs ------------------------------------------------------------------------------------------------------


def test_selectors_agree():
    dataclass, tuple_ = BY_NAME["output in a dataclass"], BY_NAME["output in a tuple"]
    model, other = dataclass.model(), tuple_.model()
    params, x = params_of(model), dataclass.x
    expected = gradient(params, model, x, 1, output="logits")
    same(gradient(params, model, x, 1, output=lambda out: out.logits), expected)
    same(gradient(params, other, x, 1, output=1), expected)
    same(gradient(params, other, x, 1, output=-1), expected)
    same(
        gradient(params, model, x, 7, output="hidden"),
        slow.gradient(lambda x: F.softplus(model.body(x)), x, 7),  # type: ignore[operator]
    )


def test_a_target_function_reads_the_selected_output():
    case = BY_NAME["output in a dict"]
    model = case.model()
    same(
        gradient(params_of(model), model, case.x, lambda out: out[:, 1], output="logits"),
        gradient(params_of(model), model, case.x, 1, output="logits"),
    )


@pytest.mark.parametrize(
    ("name", "output", "match"),
    [
        ("output in a dict", "logit", r"`output`.*logits"),
        ("output in a dataclass", "logit", r"`output`.*logit"),
        ("output in a tuple", 5, r"`output`"),
        ("output in a tuple", "logits", r"`output`"),
        ("gelu mlp", "logits", r"`output`"),
        ("output in a dict", lambda out: "logits", r"`output`"),
    ],
)
def test_selectors_that_select_nothing(name, output, match):
    case = BY_NAME[name]
    model = case.model()
    with pytest.raises((ValueError, TypeError), match=match):
        gradient(params_of(model), model, case.x, 1, output=output)


@pytest.mark.parametrize("name", ["output in a dict", "output in a dataclass", "output in a tuple"])
def test_an_output_that_needs_a_selector_says_so(name):
    case = BY_NAME[name]
    model = case.model()
    with pytest.raises((ValueError, TypeError), match="`output`"):
        gradient(params_of(model), model, case.x, 1)


# ---- inputs -------------------------------------------------------------------------------------------------------


def test_integer_members_pass_through_and_get_none():
    case = BY_NAME["tokens and vectors"]
    model = case.model()
    result = gradient(params_of(model), model, case.x, 1)
    assert list(result) == ["input_ids", "attention_mask", "extra"]
    assert result["input_ids"] is None
    assert result["attention_mask"] is None
    assert result["extra"].shape == (2, 4, 6)


def test_inputs_of_different_batch_sizes_and_no_input():
    case = BY_NAME["two inputs"]
    model = case.model()
    with pytest.raises((TypeError, ValueError), match="`x`"):
        gradient(params_of(model), model, "photograph.png", 1)  # type: ignore[arg-type]
    with pytest.raises((TypeError, ValueError), match="`x`"):
        gradient(params_of(model), model, (), 1)
    with pytest.raises((TypeError, ValueError), match="`x`"):
        gradient(params_of(model), model, np.zeros((2, 6)), 1)  # type: ignore[arg-type]


@some
@given(batch=st.integers(1, 4), height=st.integers(4, 9), width=st.integers(4, 9))
def test_any_batch_and_size(batch, height, width):
    case = BY_NAME["residual"]
    model = case.model()
    x = torch.randn(batch, 2, height, width, generator=torch.Generator().manual_seed(batch), dtype=torch.float64)
    target = list(range(batch))
    same(gradient(params_of(model), model, x, target), reference("residual", x, target))


def test_an_empty_batch_gives_an_empty_attribution():
    case = BY_NAME["gelu mlp"]
    model = case.model()
    assert gradient(params_of(model), model, case.x[:0], 1).shape == (0, 6)


# ---- layers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vgg", "residual", "called twice", "attention", "lstm", "tokens", "shared linear"])
def test_layers_lists_shapes_call_by_call(name):
    case = BY_NAME[name]
    model = case.model()
    found = layers(params_of(model), model, case.x)
    expected = slow.layer_shapes(case.twin(), case.call, case.x)
    assert {key: tuple(map(tuple, found[key])) for key in expected} == expected
    ends = [key for key in found if key in expected]
    assert [key for key in ends if key in case.layers] == [key for key in expected if key in case.layers]


def test_layers_leaves_no_trace():
    case = BY_NAME["own train"]
    model = case.model()
    before = torch.random.get_rng_state()
    layers(params_of(model), model, case.x)
    assert model.switched == 0
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(module._forward_hooks == {} for module in model.modules())
    assert pytree.tree_all(lambda value: not value.requires_grad, params_of(model))
