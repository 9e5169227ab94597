"""The shim returns what TorchRay returns, and so do the pure functions, where they mean the same."""

import pytest
import torch
from compat import NETWORKS, all_cases, assert_equal, load, module_of

import pullback
from pullback import maps
from pullback.attribution.perturbation.extremal import extremal_perturbation


@pytest.mark.parametrize(("name", "number"), all_cases())
def test_shim(name, number):
    vectors = load(name)
    case = vectors.cases[number]
    module = module_of(case)
    function = getattr(module, case["function"].rpartition(".")[2])
    found = function(*vectors.first(case), **vectors.options(case, module))
    expected = vectors.results(case)
    if not isinstance(found, tuple):
        found = (found,)
    for f, e in zip(found, expected, strict=True):
        assert_equal(f, e)


def _pure(case, params, model, x):
    """The pure call with the same meaning, or None where there is none."""
    options = case["options"]
    target, layer = options.get("target"), options.get("saliency_layer", "")
    size = options.get("resize", False)
    size = tuple(size[::-1]) if isinstance(size, list) else size
    rest = {k: options[k] for k in ("resize_mode", "smooth") if k in options} | {"resize": size}
    function = case["function"].rpartition(".")[2]
    if isinstance(target, str):
        return None
    if function in ("saliency", "gradient"):
        return pullback.saliency(params, model, x, target, layer=layer, **rest)
    if function in ("guided_backprop", "deconvnet"):
        rules = {"guided_backprop": "guided", "deconvnet": "deconvnet"}[function]
        return pullback.saliency(params, model, x, target, layer=layer, rules=rules, **rest)
    if function == "grad_cam":
        map = pullback.grad_cam(params, model, x, target, layer=layer)
    elif function == "linear_approx" and layer:
        map = pullback.linear_approx(params, model, x, target, layer=layer)
    elif function == "linear_approx":
        map = maps.channel_sum(pullback.input_x_gradient(params, model, x, target))
    elif function == "excitation_backprop":
        map = maps.channel_sum(pullback.excitation_backprop(params, model, x, target, layer=layer))
    elif function == "contrastive_excitation_backprop":
        contrast = options["contrast_layer"]
        relevance = pullback.contrastive_excitation_backprop(
            params, model, x, target, layer=layer, contrast_layer=contrast
        )
        map = maps.channel_sum(relevance).clamp(min=0)
    elif function == "extremal_perturbation":
        names = {"areas": "areas", "max_iter": "iterations", "step": "step", "sigma": "sigma", "num_levels": "levels"}
        names |= {"variant": "variant", "perturbation": "perturbation"}
        same = {names[k]: v for k, v in options.items() if k in names}
        reward = "contrastive" if "reward_func" in options else "simple"
        return extremal_perturbation(params, model, x[:1], target, reward=reward, **same)[:, 0]
    else:
        return None
    return maps.resize(map, x.shape[2:]) if size is True else map


@pytest.mark.parametrize("name", NETWORKS)
def test_pure_functions(name):
    vectors = load(name)
    model = vectors.model()
    params, compared = pullback.params_of(model), 0
    for case in vectors.cases:
        found = None if case["first"] == "z" else _pure(case, params, model, vectors.x)
        if found is not None:
            assert_equal(found, vectors.results(case)[0])
            compared += 1
    assert compared >= (14 if name == "fcn" else 18)


def test_a_wrong_map_is_seen():
    vectors = load("vgg")
    (expected,) = vectors.results(vectors.cases[0])
    wrong = expected + 1e-3 * expected.max() * torch.eye(32)
    with pytest.raises(AssertionError):
        assert_equal(wrong, expected)
