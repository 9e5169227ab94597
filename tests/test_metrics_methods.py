"""Metrics that judge methods: robustness and randomisation, against their definitions in loops."""

import math

import pytest
import slow_metrics as slow
import torch
from torch import nn
from torch.func import functional_call

from pullback import gradient, guided_backprop, input_x_gradient, metrics, over_targets, params_of
from pullback._torch.random import normal, uniform

TARGET = torch.tensor([2, 0, 1])
ROBUSTNESS = [metrics.max_sensitivity, metrics.average_sensitivity, metrics.local_lipschitz]


def network(classes: int = 4) -> nn.Sequential:
    torch.manual_seed(5)
    layers = (nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Softplus(), nn.Flatten(), nn.Linear(48, 8), nn.Tanh())
    return nn.Sequential(*layers, nn.Linear(8, classes)).double().eval().requires_grad_(False)


def masked() -> tuple[dict[str, torch.Tensor], nn.Sequential, torch.Tensor, torch.Tensor]:
    model = network()
    return params_of(model), model, torch.randn(3, 1, 6, 6, dtype=torch.float64), TARGET


def explain(model: nn.Module, x: torch.Tensor, target: int) -> torch.Tensor:
    """The gradient of one score at one example, ``[1 1 height width]``, by plain autograd."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x)[0, target], x)[0]


# -- robustness


@pytest.mark.parametrize("relative", [True, False])
def test_sensitivity(relative):
    params, model, x, target = masked()
    noise = 0.3 * (2 * uniform(4, torch.arange(7), x.shape[1:], x.dtype) - 1)
    changes = torch.zeros(7, 3, dtype=torch.float64)
    for i in range(3):
        original = explain(model, x[i : i + 1], int(target[i]))
        for s in range(7):
            moved = explain(model, x[i : i + 1] + noise[s], int(target[i]))
            changes[s, i] = math.sqrt(float(((moved - original) ** 2).sum()))
            changes[s, i] /= math.sqrt(float((original**2).sum())) if relative else 1
    how = {"samples": 7, "radius": 0.3, "relative": relative, "seed": 4}
    torch.testing.assert_close(metrics.max_sensitivity(params, model, x, target, gradient, **how), changes.amax(0))
    torch.testing.assert_close(metrics.average_sensitivity(params, model, x, target, gradient, **how), changes.mean(0))
    assert (noise.abs() < 0.3).all()


def test_local_lipschitz():
    params, model, x, target = masked()
    noise = 0.2 * normal(4, torch.arange(7), x.shape[1:], x.dtype)
    quotients = torch.zeros(7, 3, dtype=torch.float64)
    for i in range(3):
        original = explain(model, x[i : i + 1], int(target[i]))
        for s in range(7):
            moved = explain(model, x[i : i + 1] + noise[s], int(target[i]))
            quotients[s, i] = (moved - original).norm() / noise[s].norm()
    found = metrics.local_lipschitz(params, model, x, target, gradient, samples=7, noise=0.2, seed=4)
    torch.testing.assert_close(found, quotients.amax(0))


@pytest.mark.parametrize("metric", ROBUSTNESS)
def test_robustness_obeys_its_laws(metric):
    params, model, x, target = masked()
    whole = metric(params, model, x, target, gradient, samples=6)
    assert (whole > 0).all()
    alone = [metric(params, model, x[i : i + 1], int(target[i]), gradient, samples=6) for i in range(3)]
    torch.testing.assert_close(whole, torch.cat(alone))
    torch.testing.assert_close(metric(params, model, x, target, gradient, samples=6, chunk_size=4), whole)
    seeds = torch.vmap(lambda seed: metric(params, model, x, target, gradient, samples=6, seed=seed))(torch.arange(3))
    in_turn = [metric(params, model, x, target, gradient, samples=6, seed=seed) for seed in range(3)]
    torch.testing.assert_close(seeds, torch.stack(in_turn))
    assert not torch.allclose(seeds[0], seeds[1])
    unmoved = metric(params, model, x, target, lambda params, model, x, target: x * 0 + 2, samples=6)
    assert torch.equal(unmoved, torch.zeros_like(unmoved))
    lost = metric(params, model, x, target, lambda params, model, x, target: x * math.nan, samples=6)
    assert lost.isnan().all()


def test_explanations_drawn_anew_are_the_root_of_two_away():
    def drawn(params, model, x, target):
        return torch.randn(len(x), 4000)

    params, model, x, target = masked()
    for metric in (metrics.max_sensitivity, metrics.average_sensitivity):
        torch.testing.assert_close(metric(params, model, x, target, drawn), torch.full((3,), 2**0.5), rtol=0.06, atol=0)


def test_scale_and_more_draws():
    params, model, x, target = masked()

    def scaled(params, model, x, target):
        return -5 * gradient(params, model, x, target)

    for metric, factor in (
        (metrics.max_sensitivity, 1),
        (metrics.average_sensitivity, 1),
        (metrics.local_lipschitz, 5),
    ):
        found, of_scaled = (metric(params, model, x, target, method) for method in (gradient, scaled))
        torch.testing.assert_close(of_scaled, factor * found)
    for metric in (metrics.max_sensitivity, metrics.local_lipschitz):
        few, many = (metric(params, model, x, target, gradient, samples=n) for n in (5, 50))
        assert (many >= few).all()  # the first draws are the same


def test_several_inputs_and_options_of_the_method():
    pair = nn.Bilinear(3, 4, 2).double()
    params, x = params_of(pair), (torch.randn(5, 3).double(), torch.randn(5, 4).double())
    for metric in ROBUSTNESS:
        found = metric(params, pair, x, 1, input_x_gradient)
        assert found.shape == (5,)
        assert (found > 0).all()
    params, model, x, target = masked()
    of_layer = metrics.max_sensitivity(params, model, x, target, gradient, layer="4")
    torch.testing.assert_close(
        of_layer,
        metrics.max_sensitivity(params, model, x, target, lambda *call: gradient(*call, layer="4")),
    )


@pytest.mark.parametrize("metric", ROBUSTNESS)
def test_errors_of_robustness(metric):
    params, model, x, target = masked()
    with pytest.raises(ValueError, match="`samples` must be at least 1"):
        metric(params, model, x, target, gradient, samples=0)
    size = "noise" if metric is metrics.local_lipschitz else "radius"
    with pytest.raises(ValueError, match=f"`{size}` must be"):
        metric(params, model, x, target, gradient, **{size: 0})
    with pytest.raises(TypeError, match="`x` holds no floating-point tensor"):
        metric(params, model, x.long(), target, gradient)
    with pytest.raises(ValueError, match="`target` must lie in"):
        metric(params, model, x, 4, gradient)


# -- randomisation


def test_likeness():
    from pullback.metrics.randomisation import _likeness

    a, b = torch.randn(6, 11, dtype=torch.float64), torch.randn(6, 11, dtype=torch.float64)
    a[1], b[1:3] = a[1].round(), b[1:3].round()
    b[3], a[4] = a[3] ** 3, 2.0  # the same order; nothing to compare
    for name, definition in (("spearman", slow.spearman), ("pearson", slow.pearson)):
        found = _likeness(name)(a, b)
        assert found.tolist() == pytest.approx([definition(u.tolist(), v.tolist()) for u, v in zip(a, b)])
        torch.testing.assert_close(
            torch.vmap(_likeness(name))(torch.stack([a, b]), torch.stack([b, a])), found.expand(2, 6)
        )
        assert _likeness(name)(a.masked_fill(a > 1, math.nan), b).isnan().sum() == (a > 1).any(1).sum()
    torch.testing.assert_close(_likeness("cosine")(a, b), torch.cosine_similarity(a, b))
    assert _likeness("cosine")(0 * a, b).tolist() == [0] * 6
    with pytest.raises(ValueError, match="`similarity` must be one of spearman, pearson, cosine"):
        metrics.random_logit(*masked(), gradient, similarity="kendall")


LAYERS = ["6", "4", "1", "0"]  # the top one first


def redrawn(model: nn.Module, stage: int, mode: str, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters at a stage: those of the layers so far, or of the layer alone, are new."""
    layers = LAYERS[stage : stage + 1] if mode == "independent" else LAYERS[: stage + 1]
    return {name: values[name] if name.split(".")[0] in layers else p for name, p in model.named_parameters()}


@pytest.mark.parametrize("mode", ["cascading", "independent"])
def test_parameter_randomisation(mode):
    params, model, x, target = masked()
    given = {name: torch.randn(5, *p.shape, dtype=p.dtype) for name, p in model.named_parameters()}
    how = {"samples": 5, "mode": mode, "draw": lambda name, old, index: given[name][index], "return_info": True}
    found, info = metrics.parameter_randomisation(params, model, x, target, gradient, **how)
    assert info["layers"] == LAYERS
    expected = torch.zeros(4, 5, 3, dtype=torch.float64)
    for stage in range(4):
        for s in range(5):
            new = redrawn(model, stage, mode, {name: values[s] for name, values in given.items()})
            for i in range(3):
                changed = explain(lambda v: functional_call(model, new, (v,)), x[i : i + 1], int(target[i]))
                original = explain(model, x[i : i + 1], int(target[i]))
                expected[stage, s, i] = slow.spearman(changed.flatten().tolist(), original.flatten().tolist())
    torch.testing.assert_close(info["similarity"], expected)
    torch.testing.assert_close(found, expected.mean((0, 1)))
    for chunk_size in (1, 2, 5):
        _, parts = metrics.parameter_randomisation(params, model, x, target, gradient, chunk_size=chunk_size, **how)
        torch.testing.assert_close(parts["similarity"], expected)


def test_what_is_drawn():
    params, model, x, target = masked()
    seen = []

    def method(params, model, x, target):
        seen.append(params)
        return x

    metrics.parameter_randomisation(params, model, x, target, method, samples=2, chunk_size=1)
    new = seen[4]  # of the first draw, after the original and four layers
    for name, old in params.items():
        if "running" in name or name == "1.weight" or name == "1.bias":
            assert torch.equal(new[name], old)  # buffers, and what has one value
        else:
            assert not (new[name] == old).any()
            assert (new[name] - old.mean()).abs().max() <= math.sqrt(3) * old.std(correction=0)
    assert not torch.equal(seen[4]["0.weight"], seen[8]["0.weight"])
    assert not torch.equal(seen[4]["4.weight"][0, :9], seen[4]["0.weight"][0].flatten())
    weight = {"w": torch.randn(100, 100) * 3 + 1}
    metrics.parameter_randomisation(weight, lambda p, x: x @ p["w"], torch.rand(2, 100), 0, method, samples=1)
    assert seen[-1]["w"].mean().item() == pytest.approx(weight["w"].mean().item(), abs=0.1)
    assert seen[-1]["w"].std().item() == pytest.approx(weight["w"].std().item(), rel=0.02)


def test_layers_of_ones_own():
    params, model, x, target = masked()
    call = params, model, x, target, gradient
    _, info = metrics.parameter_randomisation(*call, samples=2, layers=["6", "4"], return_info=True)
    _, whole = metrics.parameter_randomisation(*call, samples=2, return_info=True)
    torch.testing.assert_close(info["similarity"], whole["similarity"][:2])
    nested = nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(36, 5)), nn.Tanh(), nn.Linear(5, 4)).double()
    _, info = metrics.parameter_randomisation({}, nested, x, target, gradient, layers=["2", "0"], return_info=True)
    _, whole = metrics.parameter_randomisation({}, nested, x, target, gradient, return_info=True)
    assert whole["layers"] == ["2", "0.1"]
    torch.testing.assert_close(info["similarity"], whole["similarity"])
    for wrong in (["7"], ["2", "missing"]):
        with pytest.raises(ValueError, match=r"`layers` names `.*`, which has no parameters"):
            metrics.parameter_randomisation(*call, layers=wrong)


def test_seeds_of_randomisation_at_once():
    params, model, x, target = masked()
    for metric in (metrics.parameter_randomisation, metrics.random_logit):
        together = torch.vmap(lambda seed: metric(params, model, x, target, gradient, samples=3, seed=seed))(
            torch.arange(4)
        )
        in_turn = [metric(params, model, x, target, gradient, samples=3, seed=seed) for seed in range(4)]
        torch.testing.assert_close(together, torch.stack(in_turn))
        assert not torch.equal(in_turn[0], in_turn[1])
        alone = [metric(params, model, x[i : i + 1], int(target[i]), gradient, samples=3) for i in range(3)]
        torch.testing.assert_close(torch.cat(alone), in_turn[0])


def test_what_fails_the_test():
    """Guided backprop hardly depends on the layers above (Sixt et al. 2020); the gradient does."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 8, 5), nn.ReLU(), nn.Conv2d(8, 8, 5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(*layers, nn.Linear(8, 6)).eval().requires_grad_(False)
    params, x = params_of(model), torch.rand(2, 1, 20, 20)
    how = {"samples": 20, "layers": ["6"]}
    blind = metrics.parameter_randomisation(params, model, x, 0, lambda params, model, x, target: x, **how)
    torch.testing.assert_close(blind, torch.ones(2))
    plain = metrics.parameter_randomisation(params, model, x, 0, gradient, **how)
    guided = metrics.parameter_randomisation(params, model, x, 0, guided_backprop, **how)
    assert (guided > plain + 0.1).all()
    assert (metrics.random_logit(params, model, x, 0, lambda params, model, x, target: x, samples=4) > 0.999).all()


@pytest.mark.parametrize("target", [1, [1, 0, 3], torch.tensor([2, 2, 0])])
def test_random_logit(target):
    params, model, x, _ = masked()
    every = over_targets(gradient)(params, model, x, torch.arange(4))  # [class batch ...]
    own = torch.as_tensor(target).expand(3).tolist()
    found = metrics.random_logit(params, model, x, target, gradient, samples=1, seed=3)
    others = []
    for i in range(3):
        values = [slow.spearman(every[own[i], i].flatten().tolist(), every[c, i].flatten().tolist()) for c in range(4)]
        matches = [c for c in range(4) if c != own[i] and abs(values[c] - float(found[i])) < 1e-9]
        assert len(matches) == 1
        others.append((matches[0] - own[i]) % 4)
    assert len(set(others)) == 1  # one step for all examples
    many = metrics.random_logit(params, model, x, target, gradient, samples=600)
    for i in range(3):
        values = [slow.spearman(every[own[i], i].flatten().tolist(), every[c, i].flatten().tolist()) for c in range(4)]
        mean = (sum(values) - values[own[i]]) / 3  # every other class is as likely
        assert many[i].item() == pytest.approx(mean, abs=0.15)


def test_nan_and_constant_explanations():
    params, model, x, target = masked()
    for metric in (metrics.parameter_randomisation, metrics.random_logit):
        assert metric(params, model, x, target, lambda params, model, x, target: x * math.nan).isnan().all()
        found = metric(params, model, x, target, lambda params, model, x, target: x * 0)
        assert torch.equal(found, torch.zeros_like(found))


def test_the_model_stays_as_it_is():
    params, model, x, target = masked()
    before = [t.clone() for t in (x, *params.values())]
    held = [p.data_ptr() for p in model.parameters()]
    state = torch.random.get_rng_state()
    metrics.parameter_randomisation(params, model, x, target, gradient, samples=2)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, *params.values())))
    assert held == [p.data_ptr() for p in model.parameters()]
    assert torch.equal(state, torch.random.get_rng_state())


def test_errors_of_randomisation():
    params, model, x, target = masked()
    call = params, model, x, target, gradient
    with pytest.raises(ValueError, match="`mode` must be 'cascading' or 'independent'"):
        metrics.parameter_randomisation(*call, mode="sideways")
    with pytest.raises(ValueError, match="hold no floating-point parameter"):
        metrics.parameter_randomisation({}, lambda params, x: x.mean((2, 3)), x, 0, gradient)
    for metric in (metrics.parameter_randomisation, metrics.random_logit):
        with pytest.raises(ValueError, match="`samples` must be at least 1"):
            metric(*call, samples=0)
        with pytest.raises(ValueError, match="`target` must lie in"):
            metric(params, model, x, 9, gradient)
    for wrong in (None, lambda y: y[:, 0], torch.randn(3, 4)):
        with pytest.raises(TypeError, match="`target` must be a class index"):
            metrics.random_logit(params, model, x, wrong, gradient)
    with pytest.raises(ValueError, match="at least 2 classes"):
        metrics.random_logit({}, lambda params, x: x.mean((1, 2, 3)), x, 0, gradient)
    told = []
    metrics.parameter_randomisation(*call, samples=3, chunk_size=2, progress=lambda *done: told.append(done))
    assert told == [(n, 8) for n in range(1, 9)]
