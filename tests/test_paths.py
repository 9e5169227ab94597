"""Path methods against sums by loops, and the law of completeness."""

import functools

import pytest
import slow
import slow_paths
import torch
from cases import BY_NAME, CASES
from torch.utils import _pytree as pytree

from pullback import (
    Layer,
    activation,
    blur_integrated_gradients,
    conductance,
    discretised_integrated_gradients,
    expected_gradients,
    gradient,
    guided_integrated_gradients,
    idgi,
    integrated_gradients,
    integrated_hessians,
    internal_influence,
    neuron_conductance,
    params_of,
    smooth_grad,
)
from pullback._torch.random import normal, uniform

FLOATING = [case for case in CASES if not case.integer]
SMOOTH = [case for case in FLOATING if case.smooth]


def target_of(case):
    return torch.tensor([1, 3]) if case.targets else None


def same(ours, theirs, rtol):
    for a, b in zip(pytree.tree_flatten(ours)[0], pytree.tree_flatten(theirs)[0], strict=True):
        if b is None:
            assert a is None
        else:
            torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12 + rtol * float(b.abs().max()))


def shifted(x):
    return pytree.tree_map(lambda part: 0.3 * part.flip(0) if part.is_floating_point() else part, x)


@pytest.mark.parametrize("case", FLOATING, ids=lambda case: case.name)
def test_integrated_gradients_is_the_gauss_sum(case):
    model = case.model()
    call = functools.partial(case.call, case.twin())
    zeros = pytree.tree_map(torch.zeros_like, case.x)
    expected = slow.integrated_gradients_gauss(call, case.x, target_of(case), zeros, 4)
    same(
        integrated_gradients(params_of(model), model, case.x, target_of(case), steps=4, **case.options), expected, 1e-9
    )
    start = shifted(case.x)
    expected = slow.integrated_gradients_gauss(call, case.x, target_of(case), start, 3)
    ours = integrated_gradients(
        params_of(model), model, case.x, target_of(case), baseline=start, steps=3, **case.options
    )
    same(ours, expected, 1e-9)


@pytest.mark.parametrize("case", SMOOTH, ids=lambda case: case.name)
def test_integrated_gradients_is_complete(case):
    model, twin, target = case.model(), case.twin(), target_of(case)
    start = shifted(case.x)
    attribution = integrated_gradients(
        params_of(model), model, case.x, target, baseline=start, steps=24, **case.options
    )
    with torch.no_grad():
        ends = (torch.stack(slow.scores(case.call(twin, x), target)) for x in (case.x, start))
        difference = next(ends) - next(ends)
    parts = [part.flatten(1).sum(1) for part in pytree.tree_flatten(attribution)[0] if part is not None]
    torch.testing.assert_close(torch.stack(parts).sum(0), difference, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["gelu mlp", "attention", "depthwise"])
def test_integrated_gradients_is_the_integral(name):
    case = BY_NAME[name]
    model = case.model()
    expected = slow.integrated_gradients(
        functools.partial(case.call, case.twin()), case.x, target_of(case), shifted(case.x), 300
    )
    ours = integrated_gradients(
        params_of(model), model, case.x, target_of(case), baseline=shifted(case.x), steps=20, **case.options
    )
    same(ours, expected, 1e-4)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 100])
def test_in_chunks_it_is_the_same(chunk_size):
    case = BY_NAME["residual"]
    model = case.model()
    whole, parts = (
        integrated_gradients(params_of(model), model, case.x, 1, steps=5, chunk_size=size)
        for size in (None, chunk_size)
    )
    same(parts, whole, 1e-9)


def test_baselines_are_broadcast():
    case = BY_NAME["residual"]
    model, x = case.model(), case.x
    params = params_of(model)
    for small in (x.new_full((2, 1, 1), 0.4), x.new_full((1, 2, 6, 6), 0.4), x.new_tensor(0.4), 0.4):
        ours = integrated_gradients(params, model, x, 1, baseline=small, steps=3)
        same(ours, integrated_gradients(params, model, x, 1, baseline=torch.full_like(x, 0.4), steps=3), 1e-12)


def test_a_path_of_no_length_attributes_nothing():
    case = BY_NAME["residual"]
    model = case.model()
    ours = integrated_gradients(params_of(model), model, case.x, 1, baseline=case.x, steps=3)
    assert torch.equal(ours, torch.zeros_like(case.x))


def test_errors():
    case = BY_NAME["residual"]
    model = case.model()
    params = params_of(model)
    with pytest.raises(ValueError, match="`steps` must be at least 1, got 0"):
        integrated_gradients(params, model, case.x, 1, steps=0)
    with pytest.raises(ValueError, match="`chunk_size`"):
        integrated_gradients(params, model, case.x, 1, chunk_size=0)
    with pytest.raises(ValueError, match="`baseline`"):
        integrated_gradients(params, model, case.x, 1, baseline=torch.zeros(3, 7, dtype=torch.float64))
    with pytest.raises(ValueError, match="`quadrature` must be"):
        integrated_gradients(params, model, case.x, 1, quadrature="simpson")
    with pytest.raises(ValueError, match="`steps` must be at least 2, got 1"):
        integrated_gradients(params, model, case.x, 1, quadrature="trapezoid", steps=1)
    with pytest.raises(ValueError, match="empty list"):
        integrated_gradients(params, model, case.x, 1, baseline=[])
    with pytest.raises(ValueError, match="`neuron` must be a place in an activation \\[4, 6, 6\\]"):
        neuron_conductance(params, model, case.x, 1, layer="conv1", neuron=(4, 0, 0))
    with pytest.raises(ValueError, match="`baselines` must be"):
        expected_gradients(params, model, case.x, 1, baselines=case.x[:, :1])
    with pytest.raises(ValueError, match="`sigma`"):
        blur_integrated_gradients(params, model, case.x, 1, sigma=0.0)
    with pytest.raises(ValueError, match="`fraction`"):
        guided_integrated_gradients(params, model, case.x, 1, fraction=0.0)
    with pytest.raises(TypeError, match="one tensor"):
        integrated_hessians({}, model, (case.x,), 1)
    with pytest.raises(ValueError, match="called 2 times"):
        neuron_conductance({}, BY_NAME["called twice"].model(), case.x, 1, layer="act", neuron=(0, 0, 0))


# ---- every quadrature, path and place -----------------------------------------------------------------------------

RESIDUAL, MLP, TOKENS = BY_NAME["residual"], BY_NAME["gelu mlp"], BY_NAME["tokens"]
RULES = ["gauss_legendre", "riemann_left", "riemann_right", "riemann_middle", "trapezoid"]


def ready(case):
    model = case.model()
    return params_of(model), model, case.x, functools.partial(case.call, case.twin())


@pytest.mark.parametrize("quadrature", RULES)
def test_quadratures(quadrature):
    params, model, x, call = ready(MLP)
    nodes = slow_paths.rule(quadrature, 5)
    assert abs(sum(weight for _, weight in nodes) - 1) < 1e-12
    expected = slow.weighted_path(call, x, 2, torch.zeros_like(x), nodes)
    same(integrated_gradients(params, model, x, 2, steps=5, quadrature=quadrature), expected, 1e-9)


def test_gauss_is_complete_to_1e_6_with_50_nodes():
    params, model, x, _ = ready(MLP)
    attribution, info = integrated_gradients(params, model, 5 * x, 1, return_info=True)
    assert float(info["convergence_delta"].abs().max()) < 1e-6
    gap = attribution.sum(1) - (model(5 * x) - model(0 * x))[:, 1].detach()
    torch.testing.assert_close(info["convergence_delta"], gap, rtol=0, atol=1e-12)


def test_several_baselines_are_their_mean():
    params, model, x, _ = ready(RESIDUAL)
    starts = [0.0, x.flip(0), torch.ones(2, 1, 1, dtype=x.dtype)]
    many, info = integrated_gradients(params, model, x, 1, baseline=starts, steps=4, chunk_size=5, return_info=True)
    parts = [integrated_gradients(params, model, x, 1, baseline=b, steps=4, return_info=True) for b in starts]
    same(many, sum(a for a, _ in parts) / 3, 1e-9)
    same(info["convergence_delta"], sum(i["convergence_delta"] for _, i in parts) / 3, 1e-9)


def test_any_path():
    params, model, x, call = ready(MLP)
    start = 0.2 * x.flip(0)

    def bent(start, end, alpha):
        return start + alpha**2 * (end - start) + torch.sin(torch.pi * alpha) * end.flip(1)

    expected = slow_paths.along_path(
        call, lambda a: bent(start, x, torch.tensor(a, dtype=x.dtype)), 2, slow_paths.gauss(4)
    )
    same(integrated_gradients(params, model, x, 2, baseline=start, path=bent, steps=4), expected, 1e-8)
    info = integrated_gradients(params, model, x, 2, baseline=start, path=bent, steps=40, return_info=True)[1]
    assert float(info["convergence_delta"].abs().max()) < 1e-6


def test_at_a_layer_the_path_is_that_of_activations():
    params, model, x, _ = ready(RESIDUAL)
    start = 0.3 * x.flip(0)
    end, begin = (activation(params, model, v, layer="norm1") for v in (x, start))
    slopes = sum(w * _from(model, x, begin + a * (end - begin), "norm1") for a, w in slow_paths.gauss(4))
    ours, info = integrated_gradients(
        params, model, x, 1, baseline=start, steps=4, layer="norm1", chunk_size=3, return_info=True
    )
    same(ours, (end - begin) * slopes, 1e-9)
    between = model(x)[:, 1].detach() - _score_from(model, x, begin, "norm1").detach()
    same(info["convergence_delta"], ours.flatten(1).sum(1) - between, 1e-9)


def _score_from(model, x, value, layer):
    """The score where a hook replaces the layer's output."""
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, out: value.clone())
    out = model(x)[:, 1]
    handle.remove()
    return out


def _from(model, x, value, layer):
    value = value.detach().requires_grad_()
    return torch.autograd.grad(_score_from(model, x, value, layer).sum(), value)[0]


def test_words_have_their_own_baseline():
    params, model, x, _ = ready(TOKENS)
    pad = torch.zeros_like(x["input_ids"])
    ours, info = integrated_gradients(
        params, model, x, 1, layer="embed", baseline={"input_ids": pad}, steps=30, return_info=True
    )
    assert ours.shape == (2, 4, 6)
    difference = (model(**x) - model(pad, x["attention_mask"]))[:, 1].detach()
    same(ours.sum((1, 2)), difference, 1e-8)
    zero = integrated_gradients(params, model, x, 1, layer="embed", steps=30, return_info=True)[1]
    assert float(zero["convergence_delta"].abs().max()) < 1e-8
    assert float(info["convergence_delta"].abs().max()) < 1e-8


def test_of_a_neuron():
    """What a layer puts out, explained: any attribution of any unit."""
    params, model, x, _ = ready(RESIDUAL)
    unit = slow.gradient(lambda x: _tapped(RESIDUAL.twin(), x, "norm1")[:, 2, 3, 1], x, None)
    same(gradient(params, model, x, lambda y: y[:, 2, 3, 1], output=Layer("norm1")), unit, 1e-9)
    whole = slow.gradient(lambda x: _tapped(RESIDUAL.twin(), x, "norm1")[:, 2].sum((1, 2)), x, None)
    same(gradient(params, model, x, 2, output=Layer("norm1")), whole, 1e-9)
    ours = integrated_gradients(params, model, x, lambda y: y[:, 2, 3, 1], output=Layer("norm1"), steps=100)
    values = [_tapped(RESIDUAL.twin(), v, "norm1")[:, 2, 3, 1] for v in (x, 0 * x)]
    same(ours.flatten(1).sum(1), (values[0] - values[1]).detach(), 0.05)
    with pytest.raises(ValueError, match="choose a call"):
        gradient(params, model, x, 0, output=Layer("act"))


def _tapped(model, x, layer):
    seen = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    model(x)
    handle.remove()
    return seen[0]


# ---- the rest of the family ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_expected_gradients_over_the_same_draws(noise):
    params, model, x, call = ready(RESIDUAL)
    pool = torch.stack([x[0] - 1, x[1] + 1, 0 * x[0]])
    total = torch.zeros_like(x)
    for k in range(6):
        index = torch.tensor([k])
        alpha, choice = (float(uniform(4, index, (), torch.float64, stream)) for stream in (0, 1))
        end = x + noise * normal(4, index, x.shape[1:], x.dtype, 1)
        start = pool[int(choice * 3)]
        total += (end - start) * slow.gradient(call, start + alpha * (end - start), 2) / 6
    ours = expected_gradients(params, model, x, 2, baselines=pool, samples=6, noise=noise, seed=4, chunk_size=4)
    same(ours, total, 1e-9)


def test_expected_gradients_tend_to_the_mean_over_baselines():
    params, model, x, _ = ready(MLP)
    pool = 0.5 * torch.randn(4, 6, dtype=x.dtype)
    limit = integrated_gradients(params, model, x, 2, baseline=list(pool))
    same(expected_gradients(params, model, x, 2, baselines=pool, samples=4000), limit, 0.1)


def test_blur_is_the_integral_over_scales():
    params, model, x, call = ready(RESIDUAL)
    widest, reach = 0.4 * 6, 10
    expected = slow_paths.along_path(
        call, lambda a: slow_paths.blur(x, (1 - a) * widest, reach), 1, slow_paths.gauss(4)
    )
    same(blur_integrated_gradients(params, model, x, 1, sigma=0.4, steps=4), expected, 1e-6)


def test_idgi():
    params, model, x, call = ready(RESIDUAL)
    start = 0.3 * x.flip(0)
    expected = slow_paths.idgi(call, [start + k / 5 * (x - start) for k in range(6)], 1)
    for chunk_size in (None, 1, 2, 4):
        same(idgi(params, model, x, 1, baseline=start, steps=5, chunk_size=chunk_size), expected, 1e-9)
    difference = (model(x) - model(start))[:, 1].detach()
    same(expected.flatten(1).sum(1), difference, 1e-9)


@pytest.mark.parametrize(("fraction", "max_distance"), [(0.25, 0.1), (0.1, 1.0), (1.0, 0.02)])
def test_guided(fraction, max_distance):
    params, model, x, call = ready(MLP)
    start = 0.3 * x.flip(0)
    expected = slow_paths.guided(call, x, start, 2, 6, fraction, max_distance)
    ours = guided_integrated_gradients(
        params, model, x, 2, baseline=start, steps=6, fraction=fraction, max_distance=max_distance
    )
    same(ours, expected, 1e-9)


def test_guided_is_nearly_complete():
    params, model, x, _ = ready(RESIDUAL)
    ours = guided_integrated_gradients(params, model, x, 1, steps=400)
    same(ours.flatten(1).sum(1), (model(x) - model(0 * x))[:, 1].detach(), 0.02)


@pytest.mark.parametrize("strategy", ["greedy", "max_count"])
def test_discretised_goes_by_words(strategy):
    params, model, x, _ = ready(TOKENS)
    words = params["embed.weight"]
    end, start = words[x["input_ids"]], words[torch.zeros_like(x["input_ids"])]
    paths = [[slow_paths.word_path(end[i, t], start[i, t], words, 5, 4, strategy) for t in range(4)] for i in range(2)]
    points = [torch.stack([torch.stack([token[k] for token in row]) for row in paths]) for k in range(6)]
    mask = x["attention_mask"]

    def call(h):
        h = torch.nn.functional.softplus(model.mix(h)) * mask.to(h.dtype).unsqueeze(-1)
        return model.head(h.sum(1) / mask.sum(1, keepdim=True))

    ours = discretised_integrated_gradients(
        params, model, x, 1, words=words, layer="embed", baseline={"input_ids": 0 * x["input_ids"]}, steps=5,
        neighbours=4, strategy=strategy, chunk_size=4,
    )  # fmt: skip
    same(ours, slow_paths.trapezoid_over(call, points, 1), 1e-9)


def test_conductance_of_a_recurrent_layer_in_float32():
    """torch has no forward mode for it on a CPU."""
    case = BY_NAME["lstm"]
    model, layer = case.model(), case.layers[0]
    exact = conductance(params_of(model), model, case.x, 1, layer=layer, steps=3)
    model, x = case.model().float(), case.x.float()
    ours = conductance(params_of(model), model, x, 1, layer=layer, steps=3)
    same(ours.double(), exact, 1e-4)


def test_conductance_by_full_jacobians():
    params, model, x, _ = ready(MLP)
    lower, upper = (torch.nn.Sequential(*list(model.net)[part]) for part in (slice(0, 3), slice(3, None)))
    start = 0.3 * x.flip(0)
    chosen = {"layer": "net.2", "baseline": start, "steps": 4}
    rows = [slow_paths.conductance(lower, upper, x[i], start[i], 2, 4) for i in range(2)]
    influence, neurons, pairs = (torch.stack(part) for part in zip(*rows, strict=True))
    same(internal_influence(params, model, x, 2, **chosen), influence, 1e-9)
    same(conductance(params, model, x, 2, **chosen, chunk_size=3), neurons, 1e-9)
    for unit in (0, 5):
        same(neuron_conductance(params, model, x, 2, neuron=(unit,), **chosen), pairs[:, unit], 1e-9)
    hot = torch.eye(8, dtype=x.dtype)
    many = torch.vmap(lambda neuron: neuron_conductance(params, model, x, 2, neuron=neuron, **chosen))(hot)
    same(many.movedim(0, 1), pairs, 1e-9)
    same(many.sum(0), integrated_gradients(params, model, x, 2, baseline=start, steps=4), 1e-9)


def test_conductance_of_a_layer_that_all_passes_is_complete():
    params, model, x, _ = ready(RESIDUAL)
    ours = conductance(params, model, x, 1, layer="norm", steps=400)
    same(ours.flatten(1).sum(1), (model(x) - model(0 * x))[:, 1].detach(), 0.02)


def test_integrated_hessians():
    params, model, x, _ = ready(MLP)
    start = 0.3 * x.flip(0)
    ours = integrated_hessians(params, model, x, 2, baseline=start, steps=6, chunk_size=4)
    for i in range(2):
        expected = slow_paths.integrated_hessians(lambda v: model(v[None])[0, 2], x[i], start[i], 6)
        same(ours[i], expected, 1e-6)
    same(ours, ours.mT, 1e-8)
    difference = (model(x) - model(start))[:, 2].detach()
    same(ours.sum((1, 2)), difference, 1e-5)


def test_methods_go_over_methods():
    params, model, x, _ = ready(RESIDUAL)
    calm = smooth_grad(params, model, x, 1, method=integrated_gradients, samples=2, noise=0.0, steps=3)
    same(calm, integrated_gradients(params, model, x, 1, steps=3), 1e-9)


def test_memory_follows_the_chunk():
    """No more points at once than `chunk_size`, however many steps."""
    params, model, x, _ = ready(RESIDUAL)
    seen = []
    model.stem.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    for method, options in (
        (integrated_gradients, {}), (idgi, {}), (blur_integrated_gradients, {}), (conductance, {"layer": "norm1"}),
        (expected_gradients, {"baselines": x, "samples": 20}), (internal_influence, {"layer": "norm1"}),
        (integrated_gradients, {"layer": "norm1"}),
    ):  # fmt: skip
        seen.clear()
        steps = {} if "samples" in options else {"steps": 20}
        method(params, model, x, 1, chunk_size=3, **steps, **options)
        assert max(seen) == 3 * len(x)
