"""Our metrics beside those of Quantus, on the same inputs, where the definitions agree: see `docs/metrics.md`."""

import numpy as np
import pytest
import torch
from torch import nn

from pullback import gradient, metrics, params_of
from pullback._torch.random import normal, uniform

quantus = pytest.importorskip("quantus")
pytestmark = pytest.mark.filterwarnings("ignore")  # Quantus warns of what its parameters do

PLAIN = {"disable_warnings": True, "normalise": False, "abs": False}
TARGET = torch.tensor([2, 0, 1, 3])
HEIGHT, WIDTH = 12, 12


def network(classes: int = 4) -> nn.Sequential:
    torch.manual_seed(7)
    layers = (nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(300, 8), nn.Tanh(), nn.Linear(8, classes))
    return nn.Sequential(*layers).eval().requires_grad_(False)


def images() -> torch.Tensor:
    return torch.rand(4, 1, HEIGHT, WIDTH)


def maps() -> torch.Tensor:
    return torch.randn(4, 1, HEIGHT, WIDTH)


def objects() -> torch.Tensor:
    masks = torch.rand(4, HEIGHT, WIDTH) < 0.3
    masks[3] = False
    masks[3, 5:9, 2:7] = True
    return masks


def explain_func(model, inputs, targets, **kwargs):
    model = model if isinstance(model, nn.Module) else model.get_model()
    x, target = torch.as_tensor(inputs).float(), torch.as_tensor(targets)
    return gradient(params_of(model), model, x, target).numpy()


def theirs(metric, x, a=None, masks=None, model=None, target=TARGET, **how):
    arrays = {"x_batch": x.numpy(), "y_batch": target.numpy(), "a_batch": None if a is None else a.numpy()}
    masks = None if masks is None else masks.unsqueeze(1).numpy()
    found = metric(model=model or network(), s_batch=masks, channel_first=True, device="cpu", **arrays, **how)
    return found if isinstance(found, dict) else torch.as_tensor(np.asarray(found, dtype=np.float64)).squeeze()


def same(ours, theirs, **how):
    torch.testing.assert_close(ours.double(), theirs.double(), **{"rtol": 1e-4, "atol": 1e-5, **how})


LOCALISATION = {
    "PointingGame": (lambda m, o: metrics.pointing_game(m, o, tolerance=1), {}),
    "RelevanceMassAccuracy": (metrics.relevance_mass, {}),
    "RelevanceRankAccuracy": (metrics.relevance_rank, {}),
    "TopKIntersection": (lambda m, o: metrics.top_k_intersection(m, o, k=20), {"k": 20}),
    "AttributionLocalisation": (metrics.energy_pointing_game, {"positive_attributions": True}),
}


@pytest.mark.parametrize("name", LOCALISATION)
def test_localisation(name):
    function, how = LOCALISATION[name]
    map, masks = maps(), objects()
    map[2, 0, 6, 6] = 9.0
    masks[2, 6, 6] = True
    same(function(map, masks), theirs(getattr(quantus, name)(**how, **PLAIN), images(), map, masks))


@pytest.mark.parametrize(("name", "function"), [("Sparseness", metrics.sparseness), ("Complexity", metrics.complexity)])
def test_simplicity(name, function):
    a = maps()
    metric = getattr(quantus, name)(disable_warnings=True, normalise=False, abs=True)
    same(function(a), theirs(metric, images(), a.clone()))


def test_deletion_and_pixel_flipping():
    model, x, map = network(), images(), maps()
    metric = quantus.PixelFlipping(features_in_step=12, perturb_baseline=0.2, **PLAIN)
    after_each = theirs(metric, x, map, model=model, softmax=True)
    _, info = metrics.deletion(params_of(model), model, x, TARGET, map, steps=12, baseline=0.2, return_info=True)
    same(info["curve"][:, 1:], after_each)


def test_irof(monkeypatch):
    monkeypatch.setattr(np, "trapz", np.trapezoid, raising=False)  # numpy 2.4 has it no more
    slic = pytest.importorskip("skimage.segmentation").slic
    model, x, map = network(), images(), maps()
    metric = quantus.IROF(perturb_baseline=0.2, return_aggregate=False, **PLAIN)
    found = theirs(metric, x, map, model=model, softmax=True)
    segments = [slic(np.moveaxis(image, 0, -1).astype("double"), start_label=0) for image in x.numpy()]
    segments = torch.from_numpy(np.stack(segments)).unsqueeze(1)
    how = {"segments": segments, "baseline": 0.2, "return_info": True}
    ours, info = metrics.irof(params_of(model), model, x, TARGET, map, **how)
    for i, curve in enumerate(info["curve"]):
        count = int(segments[i].max()) + 1
        relative = curve[1 : count + 1]  # Quantus leaves the whole image out, and does not divide by the count
        same(count - torch.trapezoid(relative), found[i])
        same(1 - torch.trapezoid(curve[: count + 1]) / count, ours[i])


def test_filling_in():
    from pullback.metrics._inpainting import filled_in

    image, gone = torch.rand(3, 9, 11, dtype=torch.float64), torch.rand(9, 11) < 0.6
    indices = gone.flatten().nonzero().squeeze(1).numpy()
    expected = quantus.functions.perturb_func.noisy_linear_imputation(image.numpy(), indices, noise=0.0)
    found = filled_in(image[None], gone[None, None], tolerance=1e-9)[0]
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=0, atol=1e-6)


def test_road():
    model, x, map = network(), images(), maps()
    metric = quantus.ROAD(percentages=[10, 30, 50, 70], noise=0.0, **PLAIN)
    found = theirs(metric, x, map, model=model)

    def highest(scores):
        return (scores == scores.amax(1, keepdim=True)).float()

    how = {"shares": (0.1, 0.3, 0.5, 0.7), "noise": 0.0, "link": highest, "return_info": True}
    _, info = metrics.road(params_of(model), model, x, TARGET, map, **how)
    assert info["curve"].mean(0).tolist() == pytest.approx(list(found.values()))


def test_infidelity():
    """Quantus covers patch after patch and keeps what it covered: we are given its perturbations."""
    model, x, a = network(), images(), maps()
    metric = quantus.Infidelity(perturb_patch_sizes=[4], n_perturb_samples=1, perturb_baseline=0.2, **PLAIN)
    found = theirs(metric, x, a, model=model)

    def perturbation(x, index):
        covered = torch.stack([_patch(int(k)) for k in index])[:, None, None]
        return torch.where(covered, x - 0.2, 0)

    def _patch(last):
        cells = (torch.arange(HEIGHT) // 4)[:, None] * (WIDTH // 4) + torch.arange(WIDTH) // 4
        return cells <= last

    ours = metrics.infidelity(params_of(model), model, x, TARGET, a, samples=9, perturbation=perturbation)
    same(ours, found)


def test_completeness():
    model = nn.Sequential(nn.Flatten(), nn.Linear(HEIGHT * WIDTH, 4, bias=False)).eval().requires_grad_(False)
    nn.init.ones_(model[1].weight)
    x = torch.randint(0, 5, (4, 1, HEIGHT, WIDTH)).float()
    a = x.clone()
    a[1, 0, 0, 0] += 1
    found = theirs(quantus.Completeness(perturb_baseline=0.0, **PLAIN), x, a, model=model)
    assert (metrics.completeness(params_of(model), model, x, TARGET, a) == 0).tolist() == found.bool().tolist()
    assert found.tolist() == [1, 0, 1, 1]


def given_noise(noise: torch.Tensor):
    """A perturbation for Quantus that adds the draws, ``[sample *example]``, one after the other."""
    draws = iter(noise.flatten(1).numpy())
    return lambda arr, indices, **kwargs: arr + next(draws)


@pytest.mark.parametrize("name", ["MaxSensitivity", "AvgSensitivity", "LocalLipschitzEstimate"])
def test_robustness(name):
    model, x = network(), images()
    index = torch.arange(6)
    if name == "LocalLipschitzEstimate":
        metric, size, noise = metrics.local_lipschitz, {"noise": 0.2}, 0.2 * normal(0, index, x.shape[1:], x.dtype)
    else:
        metric = metrics.max_sensitivity if name == "MaxSensitivity" else metrics.average_sensitivity
        size, noise = {"radius": 0.2}, 0.2 * (2 * uniform(0, index, x.shape[1:], x.dtype) - 1)
    peer = getattr(quantus, name)(nr_samples=6, perturb_func=given_noise(noise), **PLAIN)
    found = theirs(peer, x, model=model, explain_func=explain_func)
    same(metric(params_of(model), model, x, TARGET, gradient, samples=6, **size), found)


@pytest.mark.parametrize(("mode", "order"), [("cascading", "top_down"), ("independent", "independent")])
def test_parameter_randomisation(mode, order):
    model, x = network(), images()
    metric = quantus.MPRT(
        layer_order=order, seed=3, similarity_func=quantus.similarity_func.correlation_spearman, **PLAIN
    )
    found = theirs(metric, x, model=model, explain_func=explain_func)
    wrapped = quantus.helpers.model.pytorch_model.PyTorchModel(network(), channel_first=True)
    drawn = {}
    for layer, changed in wrapped.get_random_layer_generator(order="independent", seed=3):
        state = changed.state_dict()
        drawn.update({name: p.clone() for name, p in state.items() if name.startswith(f"{layer}.")})
    how = {"samples": 1, "mode": mode, "draw": lambda name, old, index: drawn[name][None], "return_info": True}
    _, info = metrics.parameter_randomisation(params_of(model), model, x, TARGET, gradient, **how)
    ours = dict(zip(info["layers"], info["similarity"][:, 0]))
    assert set(ours) == set(found) - {"original"}
    for layer, likeness in ours.items():
        same(likeness, torch.tensor(found[layer]))


def test_random_logit():
    model, x, target = network(classes=2), images(), torch.tensor([1, 0, 0, 1])  # one other class
    similarity = quantus.similarity_func.correlation_spearman
    metric = quantus.RandomLogit(num_classes=2, similarity_func=similarity, **PLAIN)
    found = theirs(metric, x, model=model, target=target, explain_func=explain_func)
    same(metrics.random_logit(params_of(model), model, x, target, gradient), found)
