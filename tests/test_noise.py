"""Noise over any attribution, against loops over the same draws."""

import functools

import pytest
import slow
import torch
from cases import BY_NAME
from torch import vmap

import pullback
from pullback import grad_cam, gradient, input_x_gradient, params_of, saliency, smooth_grad
from pullback._torch.random import normal, uniform

CASE = BY_NAME["residual"]


def draws(x, samples, noise, absolute=False, seed=0):
    """The noise of each sample, as the method scales it."""
    unit = normal(seed, torch.arange(samples), x.shape[1:], x.dtype)
    scale = [noise if absolute else noise * float(part.max() - part.min()) for part in x]
    return [torch.stack([s * e for s in scale]) for e in unit]


@pytest.mark.parametrize("statistic", ["mean", "squared", "variance"])
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("method", [gradient, input_x_gradient])
def test_statistics_over_noisy_inputs(statistic, absolute, method):
    model, x = CASE.model(), CASE.x
    noises = draws(x, 4, 0.2, absolute)
    call = functools.partial(CASE.call, CASE.twin())
    definition = {gradient: slow.gradient, input_x_gradient: slow.input_x_gradient}[method]
    expected = slow.smooth_grad(lambda x: definition(call, x, 2), x, noises, statistic)
    ours = smooth_grad(
        params_of(model), model, x, 2, method=method, statistic=statistic, samples=4, noise=0.2, absolute=absolute
    )
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("chunk_size", [1, 2, 3])
@pytest.mark.parametrize("statistic", ["mean", "squared", "variance"])
def test_chunks_change_nothing(chunk_size, statistic):
    model, params = CASE.model(), params_of(CASE.model())
    whole = smooth_grad(params, model, CASE.x, 1, samples=4, statistic=statistic)
    parts = smooth_grad(params, model, CASE.x, 1, samples=4, statistic=statistic, chunk_size=chunk_size)
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-13)


def test_any_method_joins_also_a_users_own():
    model, x = CASE.model(), CASE.x
    params = params_of(model)

    def own(params, model, x, target):
        return model(x)[:, target].detach()

    expected = torch.stack([own(params, model, x + e, 1) for e in draws(x, 3, 0.1)]).mean(0)
    torch.testing.assert_close(smooth_grad(params, model, x, 1, method=own, samples=3, noise=0.1), expected)
    for method, options in ((saliency, {}), (grad_cam, {"layer": "conv1"})):
        calm = smooth_grad(params, model, x, 1, method=method, samples=2, noise=0.0, **options)
        torch.testing.assert_close(calm, method(params, model, x, 1, **options))


def test_seeds_are_mapped_over_and_touch_no_generator():
    model, x = CASE.model(), CASE.x
    params, before = params_of(model), torch.random.get_rng_state()
    many = vmap(lambda seed: smooth_grad(params, model, x, 1, samples=2, seed=seed))(torch.tensor([3, 9]))
    for row, seed in zip(many, (3, 9), strict=True):
        torch.testing.assert_close(row, smooth_grad(params, model, x, 1, samples=2, seed=seed), rtol=1e-9, atol=1e-13)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.allclose(many[0], many[1])


def test_draws_are_those_of_the_distribution_and_of_the_place():
    index = torch.arange(2000)
    u, n = (draw(5, index, (7,), torch.float64) for draw in (uniform, normal))
    assert abs(float(u.mean()) - 0.5) < 0.01
    assert abs(float(n.mean())) < 0.02
    assert abs(float(n.std()) - 1) < 0.02
    assert torch.equal(normal(5, index[10:12], (7,), torch.float64), n[10:12])  # whatever else is drawn with it
    large = uniform(5, index[:50], (7000,), torch.float64)  # more than is drawn together
    assert torch.equal(uniform(5, index[40:41], (7000,), torch.float64), large[40:41])
    assert torch.equal(uniform(5, index[:0], (7,), torch.float64), u[:0])


def test_errors():
    model, params = CASE.model(), params_of(CASE.model())
    for options, message in (
        ({"samples": 0}, "`samples` must be at least 1"),
        ({"samples": 1, "statistic": "variance"}, "`samples` must be at least 2"),
        ({"noise": -1.0}, "`noise`"),
        ({"statistic": "median"}, "`statistic`"),
    ):
        with pytest.raises(ValueError, match=message):
            pullback.smooth_grad(params, model, CASE.x, 1, **options)
