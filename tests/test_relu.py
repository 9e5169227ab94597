"""Rules for rectifiers: every spelling, the value at zero, tables, and rules of the user's own."""

import warnings

import pytest
import slow
import torch
from cases import BY_NAME, CLASSES
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.nn import functional as F

from pullback import deconvnet, gradient, guided_backprop, over_targets, params_of

# The first `jvp` in a process makes torch warn of a module of its own.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

NAMED = {"guided": slow.guided, "deconvnet": slow.deconvnet}


def pulled(function, x: Tensor, cotangent: Tensor, rules) -> Tensor:
    """The cotangent, carried back through one function of a pure model."""
    return gradient({}, lambda params, x: function(x), x, cotangent, rules=rules)


X = torch.tensor([[-2.0, -0.1, 0.0, 0.1, 0.3, 7.0]], dtype=torch.float64)
ONES = torch.ones_like(X)


@pytest.mark.parametrize(
    "function",
    [
        F.relu,
        torch.relu,
        Tensor.relu,
        lambda h: (h * 1).relu_(),
        lambda h: F.relu(h * 1, inplace=True),
        lambda h: F.relu_(h * 1),
        lambda h: h.clamp(min=0),
        lambda h: h.clamp(0),
        lambda h: h.clamp(0, None),
        lambda h: h.clip(min=0.0),
        lambda h: torch.clamp(h, min=0),
        lambda h: torch.clamp(input=h, min=0),
        lambda h: h.clamp_min(0),
        lambda h: (h * 1).clamp_(min=0),
        lambda h: (h * 1).clamp_min_(0),
        lambda h: F.threshold(h, 0, 0),
        lambda h: torch.threshold(h, 0, 0),
        nn.ReLU(),
        nn.Threshold(0, 0),
    ],
)
def test_every_spelling_has_the_rule(function):
    for cotangent in (ONES, -ONES):
        torch.testing.assert_close(
            pulled(function, X, cotangent, "guided"), ((X > 0) & (cotangent > 0)).to(X) * cotangent
        )
        torch.testing.assert_close(pulled(function, X, cotangent, "deconvnet"), cotangent.clamp(min=0))


@pytest.mark.parametrize("function", [F.relu6, lambda h: F.hardtanh(h, 0, 6), nn.ReLU6(), lambda h: h.clamp(0, 6)])
def test_a_rectifier_that_saturates_passes_nothing_there(function):
    torch.testing.assert_close(pulled(function, X, ONES, "guided"), ((X > 0) & (X < 6)).to(X))
    torch.testing.assert_close(pulled(function, X, -ONES, "guided"), 0 * X)


@pytest.mark.parametrize(
    "function",
    [
        lambda h: h.clamp(min=0.5),
        lambda h: h.clamp(max=0.0),
        lambda h: h.clamp(-1, 1),
        lambda h: F.hardtanh(h),
        lambda h: F.threshold(h, 0.2, 0),
        lambda h: F.leaky_relu(h, 0.1),
        F.gelu,
        torch.tanh,
    ],
)
def test_what_is_not_a_rectifier_keeps_its_derivative(function):
    """A clamp that is no rectifier is no activation either, so it may pass untold."""
    for rules in NAMED:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            ours = pulled(function, X, ONES, rules)
        torch.testing.assert_close(ours, pulled(function, X, ONES, None))


def test_no_rule_is_torchs_derivative():
    assert torch.equal(pulled(F.relu, X, ONES, None), (X > 0).to(X))


@pytest.mark.parametrize("rules", NAMED)
@pytest.mark.parametrize("function", [F.relu, F.relu6, lambda h: h.clamp(0, 0.2), lambda h: F.threshold(h, 0, 0)])
def test_the_forward_is_the_rectifiers_own(rules, function):
    """With a square on top, the gradient carries the forward value: twice the output."""
    cotangent = gradient({}, lambda params, x: function(x).square(), X, ONES, rules=rules)
    passed = pulled(function, X, 2 * function(X), rules)
    torch.testing.assert_close(cotangent, passed)


@pytest.mark.parametrize("rules", NAMED)
def test_rules_have_second_derivatives(rules):
    """The derivative of the pulled-back cotangent by the cotangent is the mask."""
    w = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(1, 6)

    def score(c: Tensor) -> Tensor:
        return (pulled(F.relu, X, c, rules) * w).sum()

    at = torch.tensor([[1.0, -1.0, 2.0, -2.0, 0.5, 1.0]], dtype=torch.float64)
    mask = (at > 0) & (X > 0) if rules == "guided" else at > 0
    torch.testing.assert_close(grad(score)(at), mask.to(X) * w)
    tangent = jvp(score, (at,), (ONES,))[1]
    torch.testing.assert_close(tangent, (mask.to(X) * w).sum())


@pytest.mark.parametrize("rules", NAMED)
def test_an_in_place_rectifier_writes_back(rules):
    """As a statement its effect would be lost if the rule only returned a value."""

    def model(params, x: Tensor) -> Tensor:
        h = x * 1.0
        view = h[:, 2:]
        view.relu_()
        return h * h

    out = []
    gradient({}, model, X, lambda y: out.append(1) or y.sum(1), rules=rules)
    with_rule = gradient({}, model, X, ONES, rules=rules)
    h = torch.cat([X[:, :2], X[:, 2:].relu()], 1)
    g = 2 * h
    tail = NAMED[rules]
    x = X[:, 2:].clone().requires_grad_()
    (expected,) = torch.autograd.grad(tail(x, float("inf")), x, g[:, 2:])
    torch.testing.assert_close(with_rule, torch.cat([g[:, :2], expected], 1))


def of_the_explanation(rules) -> None:
    """The derivative of an explanation, by input and by parameter, is what finite differences of it find."""
    case = BY_NAME["first in place"]
    model, x, way = case.model(), case.x, torch.randn_like(case.x)
    params = params_of(model)
    zero = torch.zeros((), dtype=torch.float64)

    def score(by_x: Tensor, by_weight: Tensor) -> Tensor:
        weight = params["conv.weight"] * (1 + by_weight)
        return (gradient({**params, "conv.weight": weight}, model, x + by_x * way, 1, rules=rules) * way).sum()

    numeric = (slow.derivative(lambda t: score(t, zero), zero), slow.derivative(lambda t: score(zero, t), zero))
    torch.testing.assert_close(grad(score, (0, 1))(zero, zero), numeric, rtol=1e-6, atol=1e-9)
    by_x, by_weight = zero.clone().requires_grad_(), zero.clone().requires_grad_()
    score(by_x, by_weight).backward()
    torch.testing.assert_close((by_x.grad, by_weight.grad), numeric, rtol=1e-6, atol=1e-9)
    many = vmap(grad(score))(torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(many, numeric[0].expand(2), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rules", NAMED)
def test_the_derivative_of_an_explanation_sees_the_rectifier_as_it_is(rules):
    of_the_explanation(rules)


FORWARD_BYTES = []


class Overwriting(nn.Module):
    """Writes to what its rectifiers put out, and to what went into one."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        FORWARD_BYTES.append(1)
        h = self.first(x)
        y, z = self.act(h), h.clamp(0, 0.5)
        h.mul_(0)
        y += 0.25
        y.relu_().mul_(2)
        return self.last(y * z)


@pytest.mark.parametrize("rules", NAMED)
def test_a_model_that_writes_to_what_its_rectifiers_keep(rules):
    model = Overwriting().double()
    h = model.first(X.detach())
    y, z = h.relu(), h.clamp(0, 0.5)
    g = model.last.weight[1]
    tail = NAMED[rules]
    at_y, at_z, at_sum = (t.clone().requires_grad_() for t in (h, h, y + 0.25))
    (by_sum,) = torch.autograd.grad(tail(at_sum, float("inf")), at_sum, 2 * g * z)
    (by_y,) = torch.autograd.grad(tail(at_y, float("inf")), at_y, by_sum)
    (by_z,) = torch.autograd.grad(tail(at_z, 0.5), at_z, g * 2 * (y + 0.25))
    expected = (by_y + by_z) @ model.first.weight
    for forwards in (2, 1):  # found out by the first forward, then known
        FORWARD_BYTES.clear()
        torch.testing.assert_close(gradient(params_of(model), model, X, 1, rules=rules), expected.detach())
        assert len(FORWARD_BYTES) == forwards


# ---- rules of the user's own --------------------------------------------------------------------------------------


class Doubled(torch.autograd.Function):
    """A rectifier whose backward is twice the derivative, as a user writes it for `torch.func`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clamp(min=0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, *cotangents):
        (x,) = ctx.saved_tensors
        return 2 * cotangents[0] * (x > 0)


def straight_through(operation, x: Tensor, *args, **kwargs) -> Tensor:
    """A rule that is a function: the rectifier's value, the identity's derivative."""
    return x + (operation(x, *args, **kwargs) - x).detach()


def test_a_table_with_an_autograd_function():
    ours = pulled(F.relu, X, ONES, {F.relu: Doubled})
    torch.testing.assert_close(ours, 2 * (X > 0).to(X))


def test_the_derivative_of_an_explanation_by_a_function_of_the_users_own():
    of_the_explanation({F.relu: Doubled})


@pytest.mark.parametrize("key", [F.relu, torch.relu, Tensor.relu, torch.relu_])
def test_a_table_may_be_keyed_by_any_spelling(key):
    case = BY_NAME["vgg"]
    model = case.model()
    ours = gradient(params_of(model), model, case.x, 1, rules={key: Doubled})
    torch.testing.assert_close(ours[0], pow(2, 3) * gradient(params_of(model), model, case.x, 1)[0])


def test_a_rule_is_called_with_the_operation_and_its_arguments():
    case = BY_NAME["h.relu_() statement"]
    model = case.model()
    heard = []

    def rule(operation, *args, **kwargs):
        heard.append((operation, args, kwargs))
        return straight_through(operation, *args, **kwargs)

    gradient(params_of(model), model, case.x, 1, rules={F.relu: rule})
    assert len(heard) == 2
    assert all(len(args) == 1 and not kwargs for _, args, kwargs in heard)
    x = torch.tensor([-1.0, 2.0])
    assert torch.equal(heard[0][0](x), x.relu())


def test_the_more_specific_key_wins():
    case = BY_NAME["vgg"]
    model = case.model()
    params = params_of(model)
    plain = gradient(params, model, case.x, 1)
    rules = {(pattern, F.relu): Doubled for pattern in ("features.1", "classifier.*")}
    torch.testing.assert_close(gradient(params, model, case.x, 1, rules=rules), 4 * plain)
    one_undone = {F.relu: Doubled, ("features.*", F.relu): lambda operation, *a, **k: operation(*a, **k)}
    torch.testing.assert_close(gradient(params, model, case.x, 1, rules=one_undone), 2 * plain)


def test_rules_hold_for_one_call_only():
    case = BY_NAME["vgg"]
    model = case.model()
    params = params_of(model)
    plain = gradient(params, model, case.x, 1)
    guided_backprop(params, model, case.x, 1)
    assert torch.equal(gradient(params, model, case.x, 1), plain)


def test_what_the_library_computes_is_not_subject_to_the_rules():
    """A rule for `+` must see the model's additions and no other."""
    case = BY_NAME["residual"]
    model = case.model()
    heard = []

    def rule(operation, *args, **kwargs):
        heard.append(operation)
        return operation(*args, **kwargs)

    params = params_of(model)
    rules = {torch.add: rule, torch.mul: rule}
    result = gradient(params, model, case.x, 1, layer="conv1", rules=rules)
    assert len(heard) == 2
    torch.testing.assert_close(result, gradient(params, model, case.x, 1, layer="conv1"))


def test_foreign_functions_are_left_as_they_are():
    class Foreign(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return torch.relu(x)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(inputs[0])

        @staticmethod
        def backward(ctx, *cotangents):
            (x,) = ctx.saved_tensors
            return 3 * cotangents[0] * (x > 0)

    ours = pulled(Foreign.apply, X, ONES, "guided")
    torch.testing.assert_close(ours, 3 * (X > 0).to(X))


def test_many_targets_under_a_rule_that_holds_the_target():
    """The forward then depends on the target: it cannot run outside of the batch of targets."""
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()

    def method(params, model, x, target):
        rule = lambda operation, h, **kwargs: operation(h) * (1 + target)  # noqa: E731
        return gradient(params, model, x, target, rules={F.relu: rule})

    many = over_targets(method)(params_of(model), model, X, [0, 2])
    for target, found in zip((0, 2), many):
        torch.testing.assert_close(found, (1 + target) * gradient(params_of(model), model, X, target))


def test_many_targets_and_models_under_rules():
    case = BY_NAME["residual"]
    model, x = case.model(), case.x
    params = params_of(model)
    for method in (guided_backprop, deconvnet):
        many = vmap(lambda target: method(params, model, x, target))(torch.arange(CLASSES))
        for target in range(CLASSES):
            torch.testing.assert_close(many[target], method(params, model, x, target))
