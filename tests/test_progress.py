"""How far a method is that runs long: told after each chunk, and given up at any without a trace."""

import inspect

import pytest
import torch
from torch import nn

import pullback
from pullback import (
    ablation_cam,
    blur_integrated_gradients,
    compiled,
    conductance,
    deep_lift_shap,
    discretised_integrated_gradients,
    expected_gradients,
    extremal_perturbation,
    feature_ablation,
    feature_permutation,
    guided_integrated_gradients,
    hsic_attribution,
    idgi,
    integrated_gradients,
    integrated_hessians,
    internal_influence,
    is_cam,
    kernel_shap,
    lime,
    meaningful_perturbation,
    neuron_conductance,
    occlusion,
    params_of,
    rise,
    score_cam,
    shapley_sampling,
    shapley_values,
    smooth_grad,
    smooth_grad_cam_plus_plus,
    sobol_attribution,
    ss_cam,
)

X = torch.rand(1, 2, 3, 3, generator=torch.Generator().manual_seed(0))
THREE = {"feature_mask": torch.arange(9).reshape(1, 3, 3) % 3}
AT_A_LAYER = {"layer": "0"}

# options, how many there are in all, and how many go together
LONG = {
    occlusion: ({"window": 1, "chunk_size": 2}, 9, 2),
    rise: ({"samples": 5, "grid": 2, "chunk_size": 2}, 5, 2),
    feature_ablation: ({"chunk_size": 2}, 18, 2),
    feature_permutation: ({"background": torch.rand(4, 2, 3, 3), "samples": 2, "chunk_size": 2, **THREE}, 6, 2),
    shapley_values: ({"chunk_size": 2, **THREE}, 8, 2),
    shapley_sampling: ({"samples": 2, "chunk_size": 2, **THREE}, 6, 2),
    kernel_shap: ({"samples": 4, "chunk_size": 2, **THREE}, 6, 2),
    lime: ({"samples": 7, "chunk_size": 2}, 7, 2),
    sobol_attribution: ({"samples": 2, "grid": 2, "chunk_size": 2}, 12, 2),
    hsic_attribution: ({"samples": 5, "grid": 2, "chunk_size": 2}, 5, 2),
    extremal_perturbation: ({"iterations": 3, "areas": 0.5}, 3, 1),
    meaningful_perturbation: ({"iterations": 3}, 3, 1),
    smooth_grad: ({"samples": 5, "chunk_size": 2}, 5, 2),
    smooth_grad_cam_plus_plus: ({"samples": 5, "chunk_size": 2, **AT_A_LAYER}, 5, 2),
    score_cam: ({"chunk_size": 2, **AT_A_LAYER}, 3, 2),
    ss_cam: ({"samples": 2, "chunk_size": 4, **AT_A_LAYER}, 6, 4),
    is_cam: ({"samples": 2, "chunk_size": 4, **AT_A_LAYER}, 6, 4),
    ablation_cam: ({"chunk_size": 2, **AT_A_LAYER}, 3, 2),
    integrated_gradients: ({"steps": 5, "baseline": [0.0, 1.0], "chunk_size": 4}, 10, 4),
    blur_integrated_gradients: ({"steps": 5, "chunk_size": 2}, 5, 2),
    expected_gradients: ({"samples": 5, "baselines": torch.rand(2, 2, 3, 3), "chunk_size": 2}, 5, 2),
    idgi: ({"steps": 4, "chunk_size": 2}, 5, 2),
    integrated_hessians: ({"steps": 3}, 3, 1),
    guided_integrated_gradients: ({"steps": 3}, 3, 1),
    discretised_integrated_gradients: ({"words": torch.rand(5, 3), "steps": 4, "chunk_size": 2}, 5, 2),
    internal_influence: ({"steps": 5, "chunk_size": 2, **AT_A_LAYER}, 5, 2),
    conductance: ({"steps": 5, "chunk_size": 2, **AT_A_LAYER}, 5, 2),
    neuron_conductance: ({"steps": 5, "neuron": (0, 1, 1), "chunk_size": 2, **AT_A_LAYER}, 5, 2),
    deep_lift_shap: ({"baselines": torch.rand(3, 2, 3, 3)}, 3, 1),
}
each_method = pytest.mark.parametrize("method", LONG, ids=lambda method: method.__name__)


def small_net():
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.Tanh(), nn.Flatten(), nn.Linear(27, 2))


def test_every_method_that_tells_is_in_the_table():
    reporting = [getattr(pullback, name) for name in pullback.__all__]
    reporting = {
        method
        for method in reporting
        if inspect.isfunction(method) and "progress" in inspect.signature(method).parameters
    }
    assert reporting == set(LONG)


@each_method
def test_progress_is_told_and_an_interruption_leaves_nothing(method):
    options, total, together = LONG[method]
    model, told = small_net().train(), []
    whole = method(params_of(model), model, X, 0, progress=lambda *now: told.append(now), **options)
    assert told == [(min(k, total), total) for k in range(together, total + together, together)]

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        method(params_of(model), model, X, 0, progress=stop, **options)
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(method(params_of(model), model, X, 0, **options), whole, rtol=0, atol=0)


@pytest.mark.parametrize("method", [smooth_grad, score_cam, integrated_gradients, guided_integrated_gradients])
def test_a_graph_tells_nothing(method):
    options, _, _ = LONG[method]
    model, told = small_net(), []
    whole = compiled(method, backend="eager")(params_of(model), model, X, 0, progress=told.append, **options)
    assert not told
    torch.testing.assert_close(whole, method(params_of(model), model, X, 0, **options))


def test_many_targets_tell_once():
    model, told = small_net(), []
    over = pullback.over_targets(integrated_gradients)
    over(params_of(model), model, X, [0, 1], steps=5, progress=lambda *now: told.append(now))
    assert told == [(1, 5), (5, 5)]  # the first goes alone
