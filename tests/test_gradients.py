"""One backward pass: against plain autograd on hand-written twins, on every model."""

import functools
import itertools
import warnings

import pytest
import slow
import torch
from cases import BY_NAME, CASES, Case
from torch.utils import _pytree as pytree

from pullback import (
    Layer,
    PullbackWarning,
    deconvnet,
    gradient,
    guided_backprop,
    input_x_gradient,
    params_of,
    saliency,
    smooth_grad,
)
from pullback.maps import channel_sum

FLOATING = [case for case in CASES if not case.integer]
RECTIFIED = [case for case in CASES if case.rewrite is not None and not case.uncovered]
RULES = {"guided": (guided_backprop, slow.guided), "deconvnet": (deconvnet, slow.deconvnet)}


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def target_of(case: Case):
    return torch.tensor([1, 3]) if case.targets else None


def called(case: Case, model):
    return functools.partial(case.call, model)


def same(ours, theirs, rtol=1e-9):
    for a, b in zip(pytree.tree_flatten(ours)[0], pytree.tree_flatten(theirs)[0]):
        if b is None:
            assert a is None
        else:
            torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12 + rtol * float(b.abs().max()))


def alone(case: Case):
    """The first example, at batch size 1."""
    return pytree.tree_map(lambda part: part[:1], case.x), None if target_of(case) is None else [1]


# ---- gradient -----------------------------------------------------------------------------------------------------


@each(FLOATING)
def test_gradient_is_autograd_on_the_twin(case):
    model = case.model()
    params = params_of(model)
    for x, target in ((case.x, target_of(case)), alone(case)):
        expected = slow.gradient(called(case, case.twin()), x, target)
        same(gradient(params, model, x, target, **case.options), expected)
    assert type(gradient(params, model, case.x, target_of(case), **case.options)) is type(case.x)


@each(CASES)
def test_gradient_at_a_layer(case):
    model = case.model()
    for layer in case.layers:
        for x, target in ((case.x, target_of(case)), alone(case)):
            [(_, expected)] = slow.at_layer(case.twin(), case.call, x, target, layer)
            same(gradient(params_of(model), model, x, target, layer=layer, **case.options), expected)


@each([case for case in FLOATING if case.name not in ("attention", "attention with weights")])
def test_gradient_at_the_input_of_a_layer(case):
    model = case.model()
    layer = case.layers[0]
    [(_, expected)] = slow.at_layer(case.twin(), case.call, case.x, target_of(case), layer, at="input")
    same(
        gradient(params_of(model), model, case.x, target_of(case), layer=Layer(layer, at="input"), **case.options),
        expected,
    )


def test_gradient_at_a_layer_is_linear_in_the_target():
    """A cotangent that mixes two classes gives the mixture of their gradients."""
    case = BY_NAME["residual"]
    model = case.model()
    params = params_of(model)
    one, two = (gradient(params, model, case.x, target, layer="conv1") for target in (1, 2))
    cotangent = torch.zeros(2, 5, dtype=torch.float64)
    cotangent[:, 1], cotangent[:, 2] = 0.3, -2.0
    same(gradient(params, model, case.x, cotangent, layer="conv1"), 0.3 * one - 2.0 * two)


def test_gradient_ignores_how_the_input_was_made():
    case = BY_NAME["vgg"]
    model = case.model()
    params = params_of(model)
    expected = gradient(params, model, case.x, 1)
    strided = case.x.transpose(2, 3).contiguous().transpose(2, 3)
    same(gradient(params, model, strided, 1), expected)
    same(gradient(params, model, case.x.to(memory_format=torch.channels_last), 1), expected)
    same(gradient(params, model, torch.nn.Parameter(case.x), 1), expected)
    same(gradient(params, model, case.x[:1].expand(2, -1, -1, -1), 1), expected[:1].expand(2, -1, -1, -1))


# ---- input times gradient -----------------------------------------------------------------------------------------


@each(FLOATING)
def test_input_x_gradient_is_the_product(case):
    model = case.model()
    expected = slow.input_x_gradient(called(case, case.twin()), case.x, target_of(case))
    same(input_x_gradient(params_of(model), model, case.x, target_of(case), **case.options), expected)


def test_input_x_gradient_is_complete_on_a_network_without_biases():
    """A rectifier network without biases is homogeneous: the attributions add up to the score."""
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 8, bias=False), torch.nn.ReLU(), torch.nn.Linear(8, 5, bias=False)
    ).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    attribution = input_x_gradient(params_of(model), model, x, 2)
    torch.testing.assert_close(attribution.sum(1), model(x)[:, 2].detach())


# ---- guided backprop and deconvnet --------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@each(RECTIFIED)
def test_rules_equal_a_reference_network_of_reference_functions(case, rule):
    method, reference = RULES[rule]
    model, twin = case.model(), case.twin(reference)
    params = params_of(model)
    expected = slow.gradient(called(case, twin), case.x, target_of(case))
    same(method(params, model, case.x, target_of(case), **case.options), expected)
    same(gradient(params, model, case.x, target_of(case), rules=rule, **case.options), expected)
    for layer in case.layers:
        [(_, expected)] = slow.at_layer(twin, case.call, case.x, target_of(case), layer)
        same(method(params, model, case.x, target_of(case), layer=layer, **case.options), expected)


@pytest.mark.parametrize("rule", RULES)
@each([case for case in CASES if case.uncovered])
def test_uncovered_activations_are_told_once(case, rule):
    method, _ = RULES[rule]
    model = case.model()
    params = params_of(model)
    chosen = {**case.options, **({"layer": case.layers[0]} if case.integer else {})}
    with pytest.warns(UserWarning, match="do not cover") as told:
        result = method(params, model, case.x, target_of(case), **chosen)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", PullbackWarning)
        with pytest.raises(PullbackWarning, match="do not cover"):
            method(params, model, case.x, target_of(case), **chosen)
    if case.rewrite is None or case.name.endswith("before tokens"):
        # What a rule does not cover keeps its own derivative.
        same(result, gradient(params, model, case.x, target_of(case), **chosen))


def test_what_is_told_names_operation_and_layer():
    case = BY_NAME["gelu mlp"]
    model = case.model()
    with pytest.warns(UserWarning, match=r"gelu.*net\.1") as told:
        guided_backprop(params_of(model), model, case.x, 1)
    assert "net.3" in str(told[0].message)
    assert told[0].filename == __file__


@pytest.mark.parametrize("rule", RULES)
@each(RECTIFIED)
def test_no_warning_where_all_is_covered(case, rule):
    method, _ = RULES[rule]
    model = case.model()
    method(params_of(model), model, case.x, target_of(case), **case.options)


def test_deconvnet_does_not_look_at_the_rectifiers_input():
    """On a network that is rectifiers and linear maps alone, deconvnet is the same for every input."""
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5)).double()
    params = params_of(net)
    one, two = (deconvnet(params, net, torch.randn(1, 6, dtype=torch.float64), 2) for _ in range(2))
    torch.testing.assert_close(one, two)


# ---- saliency -----------------------------------------------------------------------------------------------------

IMAGES = [case for case in FLOATING if case.image and isinstance(case.x, torch.Tensor)]


@each(IMAGES)
def test_saliency_is_the_peak_over_channels(case):
    model = case.model()
    expected = slow.channel_peak(slow.gradient(called(case, case.twin()), case.x, target_of(case)))
    result = saliency(params_of(model), model, case.x, target_of(case), **case.options)
    assert result.shape == (2, 1, *case.x.shape[2:])
    same(result, expected)


@pytest.mark.parametrize("name", ["vgg", "residual", "depthwise"])
def test_saliency_at_a_layer_resized_and_smoothed(name):
    case = BY_NAME[name]
    model, layer = case.model(), case.layers[0]
    params = params_of(model)
    [(_, g)] = slow.at_layer(case.twin(), case.call, case.x, target_of(case), layer)
    peak = slow.channel_peak(g)
    same(saliency(params, model, case.x, target_of(case), layer=layer), peak)
    same(saliency(params, model, case.x, target_of(case), layer=layer, resize=True), slow.resize(peak, (6, 6)))
    same(
        saliency(params, model, case.x, target_of(case), layer=layer, resize=(7, 4), resize_mode="nearest"),
        slow.resize(peak, (7, 4), "nearest"),
    )
    same(
        saliency(params, model, case.x, target_of(case), layer=layer, resize=(7, 4), smooth=0.1),
        slow.smooth(slow.resize(peak, (7, 4)), 0.1 * 7),
    )


def test_saliency_reduces_by_what_it_is_given():
    case = BY_NAME["vgg"]
    model, layer = case.model(), "features.0"
    params = params_of(model)
    [(activation, g)] = slow.at_layer(case.twin(), case.call, case.x, target_of(case), layer)
    result = saliency(
        params,
        model,
        case.x,
        target_of(case),
        layer=layer,
        reduce=lambda activation, gradient: channel_sum(activation * gradient),
    )
    same(result, slow.linear_approx(activation, g))
    result = saliency(params, model, case.x, target_of(case), reduce=lambda x, gradient: channel_sum(x + gradient))
    expected = case.x + slow.gradient(called(case, case.twin()), case.x, target_of(case))
    same(result, slow.channel_sum(expected))


@pytest.mark.parametrize("rule", RULES)
def test_saliency_takes_rules(rule):
    case = BY_NAME["residual"]
    model = case.model()
    expected = slow.gradient(called(case, case.twin(RULES[rule][1])), case.x, target_of(case))
    same(saliency(params_of(model), model, case.x, target_of(case), rules=rule), slow.channel_peak(expected))


def test_saliency_errors():
    case = BY_NAME["vgg"]
    model = case.model()
    with pytest.raises(ValueError, match="`resize_mode`"):
        saliency(params_of(model), model, case.x, 1, resize=True, resize_mode="wavelet")
    with pytest.raises((ValueError, TypeError), match="`resize`"):
        saliency(params_of(model), model, case.x, 1, resize=(3,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`smooth`"):
        saliency(params_of(model), model, case.x, 1, smooth=-1.0)


# ---- smooth_grad --------------------------------------------------------------------------------------------------


def draws(x, samples, **options):
    """The noise that `smooth_grad` adds, found out by asking it to explain the input by the input itself."""

    def handed(params, model, x, target):
        return x

    means = [
        n * (smooth_grad({}, torch.nn.Identity(), x, 0, method=handed, samples=n, **options) - x)
        for n in range(1, samples + 1)
    ]
    return [means[0], *(after - before for before, after in itertools.pairwise(means))]


@pytest.mark.parametrize("statistic", ["mean", "squared", "variance"])
@pytest.mark.parametrize("name", ["gelu mlp", "residual", "batch norm before tokens"])
def test_smooth_grad_is_the_loop_over_its_noise(name, statistic):
    case = BY_NAME[name]
    model = case.model()
    call, target = called(case, case.twin()), target_of(case)
    noises = draws(case.x, 5, noise=0.2, seed=3)
    expected = slow.smooth_grad(lambda x: slow.gradient(call, x, target), case.x, noises, statistic)
    result = smooth_grad(params_of(model), model, case.x, target, statistic=statistic, samples=5, noise=0.2, seed=3)
    same(result, expected, rtol=1e-7)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 100])
def test_smooth_grad_in_chunks_is_the_same(chunk_size):
    case = BY_NAME["residual"]
    model = case.model()
    whole, parts = (
        smooth_grad(params_of(model), model, case.x, 1, samples=5, noise=0.2, chunk_size=size)
        for size in (None, chunk_size)
    )
    same(parts, whole)


def test_smooth_grad_noise_is_normal_and_depends_on_the_seed():
    x = torch.zeros(1, 40, 50, dtype=torch.float64)
    x[0, 0, 0] = 1.0
    one, two = draws(x, 2, noise=0.3, seed=5)
    again, _ = draws(x, 2, noise=0.3, seed=5)
    elsewhere, _ = draws(x, 2, noise=0.3, seed=6)
    torch.testing.assert_close(one, again)
    for noise in (one, two, elsewhere):
        unit = noise / noise.std()
        assert abs(float(noise.std()) - 0.3) < 0.02
        assert abs(float(noise.mean())) < 0.02
        assert abs(float(unit.pow(3).mean())) < 0.15
        assert abs(float(unit.pow(4).mean()) - 3) < 0.4
    for a, b in ((one, two), (one, elsewhere)):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(float(correlation)) < 0.08


@pytest.mark.parametrize("method", [guided_backprop, input_x_gradient])
def test_smooth_grad_over_another_method(method):
    case = BY_NAME["residual"]
    model = case.model()
    params = params_of(model)
    noises = draws(case.x, 3, noise=0.2)
    expected = slow.smooth_grad(lambda x: method(params, model, x, 1), case.x, noises, "mean")
    same(smooth_grad(params, model, case.x, 1, method=method, samples=3, noise=0.2), expected)


def test_smooth_grad_errors():
    case = BY_NAME["gelu mlp"]
    model = case.model()
    params = params_of(model)
    with pytest.raises(ValueError, match="`samples`"):
        smooth_grad(params, model, case.x, 1, samples=0)
    with pytest.raises(ValueError, match="`noise`"):
        smooth_grad(params, model, case.x, 1, noise=-1.0)
    with pytest.raises(ValueError, match="`statistic`"):
        smooth_grad(params, model, case.x, 1, statistic="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`chunk_size`"):
        smooth_grad(params, model, case.x, 1, chunk_size=0)


# ---- errors -------------------------------------------------------------------------------------------------------


def test_an_unknown_layer_is_named_with_its_neighbours():
    case = BY_NAME["vgg"]
    model = case.model()
    with pytest.raises(ValueError, match=r"`features\.9`.*`features\.\d`"):
        gradient(params_of(model), model, case.x, 1, layer="features.9")
    with pytest.raises(ValueError, match=r"`at`"):
        gradient(params_of(model), model, case.x, 1, layer=Layer("features.0", at="middle"))


def test_a_layer_that_the_model_does_not_call():
    case = BY_NAME["containers"]
    model = case.model()
    with pytest.raises(ValueError, match=r"`heads\.coarse`"):
        gradient(params_of(model), model, case.x, 1, layer="heads.coarse")


def test_integer_inputs_need_a_layer():
    case = BY_NAME["tokens"]
    model = case.model()
    with pytest.raises((ValueError, TypeError), match=r"`x`.*`layer`|`layer`.*`x`"):
        gradient(params_of(model), model, case.x, 1)


def test_an_unknown_rule():
    case = BY_NAME["vgg"]
    model = case.model()
    with pytest.raises(ValueError, match=r"`rules`.*guided"):
        gradient(params_of(model), model, case.x, 1, rules="guidd")


def test_no_warning_of_torch_reaches_the_user():
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for name in ("scaled dot product", "transformer encoder, gelu", "lstm", "depthwise", "residual"):
            case = BY_NAME[name]
            model, x = case.model(), case.x
            params = params_of(model)
            for layer in ("", case.layers[0]):
                torch.func.vmap(lambda target: gradient(params, model, x, target, layer=layer))(torch.arange(3))
    assert not heard
