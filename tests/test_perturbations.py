"""Perturbation methods against loops, enumeration and captum, with the laws that each promises."""

import itertools
import math

import pytest
import slow_perturbations as slow
import torch
from torch import Tensor, nn
from torch.func import vmap

import pullback
from pullback import (
    feature_ablation,
    feature_permutation,
    hsic_attribution,
    kernel_shap,
    lime,
    masks,
    occlusion,
    over_targets,
    params_of,
    rise,
    shapley_sampling,
    shapley_values,
    similar_detections,
    sobol_attribution,
)
from pullback._torch.random import uniform

CLASSES = 4


def image_net() -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 25, CLASSES)).double().eval()
        return model, torch.randn(2, 2, 7, 7, dtype=torch.float64)


def vector_net(inputs: int = 6) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double().eval()
        return model, torch.randn(3, inputs, dtype=torch.float64)


# ---- occlusion ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (3, 1), (3, 2), (4, 3), (7, 7), (9, 2)])
def test_occlusion_is_the_loop_over_windows(window, stride):
    model, x = image_net()
    ours = occlusion(params_of(model), model, x, 2, window=window, stride=stride, baseline=0.5, chunk_size=5)
    theirs = slow.occlusion(lambda x: model(x)[:, 2].detach(), x, min(window, 7), stride, 0.5)
    torch.testing.assert_close(ours, theirs)


def test_occlusion_of_channels_too_and_of_vectors_is_ablation():
    for model, x in (image_net(), vector_net()):
        ours = occlusion(params_of(model), model, x, 1, window=[1] * (x.ndim - 1))
        alone = feature_ablation(params_of(model), model, x, 1)
        torch.testing.assert_close(ours.reshape(x.shape), alone)


def test_occlusion_over_tokens():
    model = nn.Sequential(nn.Linear(3, 5), nn.Flatten(), nn.Linear(20, 2)).double()
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    ours = occlusion(params_of(model), model, x, 0, window=1, stride=1, tokens=True)
    features = torch.arange(4)[:, None].expand(4, 3)
    theirs = feature_ablation(params_of(model), model, x, 0, feature_mask=features)
    torch.testing.assert_close(ours[:, 0], theirs[:, :, 0])
    with pytest.raises(ValueError, match=r"`tokens` needs \[batch token channel\]"):
        occlusion({}, lambda params, x: x.sum((1, 2, 3)), torch.zeros(1, 1, 2, 2), None, tokens=True)


@pytest.mark.parametrize(("options", "name"), [({"window": 0}, "window"), ({"stride": [1, 2, 3]}, "stride")])
def test_what_occlusion_refuses(options, name):
    model, x = image_net()
    with pytest.raises(ValueError, match=f"`{name}` must be one positive number, or 2"):
        occlusion(params_of(model), model, x, 0, **options)
    with pytest.raises(ValueError, match="`chunk_size`"):
        occlusion(params_of(model), model, x, 0, chunk_size=0)


def test_occlusion_at_a_layer_covers_its_activation():
    model, x = image_net()
    ours = occlusion(params_of(model), model, x, 1, window=2, stride=1, layer="1")
    theirs = slow.occlusion(lambda h: model[2:](h)[:, 1].detach(), model[:2](x).detach(), 2, 1, 0.0)
    torch.testing.assert_close(ours, theirs)


# ---- RISE ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("link", "normalise"), [("softmax", True), ("sigmoid", False), (None, True), (torch.exp, True)]
)
def test_rise_averages_masks_by_score(link, normalise):
    model, x = image_net()
    ours = rise(params_of(model), model, x, 1, samples=9, grid=3, p=0.4, link=link, normalise=normalise, seed=5)
    index = torch.arange(9)
    grids = (uniform(5, index, (3, 3), torch.float64) < 0.4).double()
    shifts = (uniform(5, index, (2,), torch.float32, stream=1) * 3).long()
    total = torch.zeros(2, 1, 7, 7, dtype=torch.float64)
    for mask in masks.grid_masks(grids, shifts, (7, 7)):
        y = model(x * mask).detach()
        y = {"softmax": y.softmax(1), "sigmoid": y.sigmoid(), None: y, torch.exp: y.exp()}[link]
        total += y[:, 1, None, None, None] * mask
    torch.testing.assert_close(ours, total / 9 / (0.4 if normalise else 1))


def test_rise_does_not_depend_on_the_chunk():
    model, x = image_net()
    maps = [rise(params_of(model), model, x, 1, samples=7, grid=3, chunk_size=size) for size in (None, 1, 3)]
    torch.testing.assert_close(maps[0], maps[1])
    torch.testing.assert_close(maps[0], maps[2])


def test_rise_for_all_classes_is_linear_in_the_target():
    """A cotangent over the probabilities weighs the maps of the classes."""
    model, x = image_net()
    each = over_targets(rise)(params_of(model), model, x, range(CLASSES), samples=6, grid=3)
    weights = torch.randn(2, CLASSES, dtype=torch.float64)
    mixed = rise(params_of(model), model, x, weights, samples=6, grid=3)
    torch.testing.assert_close(mixed, torch.einsum("bc,cbkhw->bkhw", weights, each))


def test_what_rise_refuses():
    model, x = image_net()
    for options, message in (
        ({"samples": 0}, "`samples` must be at least 1, got 0"),
        ({"p": 0.0}, "`p` must be a probability above 0"),
        ({"link": "tanh"}, "`link` must be 'softmax'"),
        ({"grid": 1}, "`(grid|cells)` must be at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            rise(params_of(model), model, x, 0, **{"samples": 2, **options})


# ---- features -----------------------------------------------------------------------------------------------------


def test_ablation_of_groups_across_tensors():
    def model(params: None, image: tuple[Tensor, Tensor]) -> Tensor:
        a, b = image
        return (a.sum(1) * b.sum(1)).unsqueeze(1)

    x = (torch.rand(2, 3, dtype=torch.float64), torch.rand(2, 2, dtype=torch.float64))
    features = (torch.tensor([0, 0, 1]), torch.tensor([1, 2]))
    a, b = feature_ablation(None, model, x, None, feature_mask=features)
    whole = x[0].sum(1) * x[1].sum(1)
    without = [x[0][:, 2] * x[1].sum(1), x[0][:, :2].sum(1) * x[1][:, 1], x[0].sum(1) * x[1][:, 0]]
    torch.testing.assert_close(a, torch.stack([whole - without[k] for k in (0, 0, 1)], 1))
    torch.testing.assert_close(b, torch.stack([whole - without[k] for k in (1, 2)], 1))


def test_features_of_each_example():
    model, x = vector_net()
    features = torch.stack([torch.arange(6), torch.arange(6) % 2, torch.zeros(6, dtype=torch.long)])
    together = feature_ablation(params_of(model), model, x, 1, feature_mask=features, baseline="mean")
    for i in range(3):
        alone = feature_ablation(params_of(model), model, x[i : i + 1], 1, feature_mask=features[i], baseline="mean")
        torch.testing.assert_close(together[i : i + 1], alone)


def test_what_features_must_be():
    model, x = vector_net()
    for features, error, message in (
        (torch.zeros(6), TypeError, "`feature_mask` must be an integer tensor.*float32"),
        (torch.arange(5), ValueError, r"`feature_mask` must broadcast to \[6\]"),
        (torch.arange(6) - 1, ValueError, "`feature_mask` must number groups from 0"),
    ):
        with pytest.raises(error, match=message):
            feature_ablation(params_of(model), model, x, 0, feature_mask=features)
    with pytest.raises(TypeError, match="`x` holds no floating-point tensor"):
        feature_ablation(params_of(model), model, torch.zeros(1, 6).long(), 0)


def test_permutation_replaces_by_the_background():
    model, x = vector_net()
    background = torch.randn(5, 6, dtype=torch.float64)
    ours = feature_permutation(params_of(model), model, x, 2, background=background, chunk_size=4)
    for i in range(6):
        scores = []
        for other in background:
            changed = x.clone()
            changed[:, i] = other[i]
            scores.append(model(changed)[:, 2])
        torch.testing.assert_close(ours[:, i], (model(x)[:, 2] - torch.stack(scores).mean(0)).detach())
    drawn = feature_permutation(params_of(model), model, x, 2, background=background, samples=400, seed=3)
    torch.testing.assert_close(drawn, ours, rtol=0, atol=0.15 * float(ours.abs().max()))
    with pytest.raises(ValueError, match=r"`background` must be examples \[6\]"):
        feature_permutation(params_of(model), model, x, 2, background=background[:, :5])


# ---- Shapley values -----------------------------------------------------------------------------------------------


def exact(model: nn.Module, x: Tensor, target: int, baseline: float = 0.3) -> Tensor:
    def game(kept) -> Tensor:
        shown = torch.full_like(x, baseline)
        shown[:, list(kept)] = x[:, list(kept)]
        return model(shown)[:, target].detach()

    return torch.stack(slow.shapley(game, x.shape[1]), 1)


def test_shapley_values_are_the_mean_over_all_orders():
    model, x = vector_net()
    ours = shapley_values(params_of(model), model, x, 1, baseline=0.3, chunk_size=7)
    torch.testing.assert_close(ours, exact(model, x, 1))


def test_kernel_shap_over_all_coalitions_is_exact():
    model, x = vector_net()
    ours = kernel_shap(params_of(model), model, x, 1, baseline=0.3, samples=62)
    torch.testing.assert_close(ours, exact(model, x, 1))
    one = kernel_shap(params_of(model), model, x, 1, feature_mask=torch.zeros(6).long())
    torch.testing.assert_close(one[:, 0], (model(x) - model(0 * x))[:, 1].detach())


def test_shapley_sampling_is_right_within_its_stated_error():
    model, x = vector_net()
    truth = exact(model, x, 1)
    for antithetic, samples in ((False, 600), (True, 200)):
        ours, info = shapley_sampling(
            params_of(model), model, x, 1, baseline=0.3, samples=samples, antithetic=antithetic, return_info=True
        )
        assert bool(((ours - truth).abs() < 4 * info["error"] + 1e-9).all())
        assert float(info["error"].max()) < 0.1 * float(truth.abs().max())
        torch.testing.assert_close(ours.sum(1), truth.sum(1))


def test_kernel_shap_from_samples_is_near_and_efficient():
    model, x = vector_net(12)
    truth = shapley_values(params_of(model), model, x, 1)
    ours = kernel_shap(params_of(model), model, x, 1, samples=1000)
    torch.testing.assert_close(ours.sum(1), truth.sum(1))
    assert float((ours - truth).abs().max()) < 0.05 * float(truth.abs().max())


def test_symmetric_features_share_and_null_features_have_nothing():
    def model(params: None, x: Tensor) -> Tensor:
        return x[:, 0] * x[:, 1] + x[:, 2]

    x = torch.ones(1, 4, dtype=torch.float64)
    for method in (shapley_values, kernel_shap):
        torch.testing.assert_close(method(None, model, x, None)[0], torch.tensor([0.5, 0.5, 1.0, 0.0]).double())


def test_too_many_features_for_enumeration():
    with pytest.raises(ValueError, match="at most 20, got 21"):
        shapley_values({}, lambda params, x: x.sum(1), torch.zeros(1, 21), None)


# ---- LIME ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "ridge"), [(0.25, 1.0), (math.inf, 0.1), (0.5, 0.0)])
def test_lime_is_weighted_ridge_regression(width, ridge):
    model, x = vector_net()
    z = torch.rand(40, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    ours, info = lime(
        params_of(model), model, x, 2, coalitions=z, width=width, ridge=ridge, return_info=True, baseline=0.1
    )
    weight = torch.exp(-((1 - (z.sum(1) / 6).double().sqrt()) ** 2) / (2 * width**2))
    for i in range(3):
        values = model(torch.where(z, x[i], 0.1))[:, 2].detach()
        torch.testing.assert_close(ours[i], slow.ridge(z.double(), values, weight, ridge), rtol=1e-6, atol=1e-9)
    assert bool(((info["fit"] > 0.3) & (info["fit"] <= 1)).all())


def test_lime_of_a_linear_model_is_the_model():
    model, x = nn.Linear(6, CLASSES).double(), vector_net()[1]
    ours, info = lime(params_of(model), model, x, 2, ridge=0.0, samples=60, return_info=True)
    torch.testing.assert_close(ours, x * model.weight[2].detach())
    torch.testing.assert_close(info["intercept"], model.bias[2].detach().expand(3))
    torch.testing.assert_close(info["fit"], torch.ones(3).double())


def test_what_the_regressions_refuse():
    model, x = vector_net()
    for method, options, message in (
        (lime, {"width": 0.0}, "`width` must be positive"),
        (lime, {"ridge": -1.0}, "`ridge` must be at least 0"),
        (lime, {"coalitions": torch.ones(3, 5)}, r"`coalitions` must be \[sample 6\]"),
        (kernel_shap, {"coalitions": torch.ones(3, 5)}, r"`coalitions` must be \[sample 6\]"),
        (kernel_shap, {"samples": 0}, "`samples` must be at least 1"),
        (shapley_sampling, {"samples": 0}, "`samples` must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            method(params_of(model), model, x, 0, **options)


# ---- dependence ---------------------------------------------------------------------------------------------------


def quadrants(params: None, x: Tensor) -> Tensor:
    """Top left counts twice as much as top right; the bottom does not count."""
    parts = x[:, 0].unflatten(2, (2, -1)).unflatten(1, (2, -1)).mean((2, 4))
    return 2 * parts[:, 0, 0] + parts[:, 0, 1]


def test_sobol_shares_of_an_additive_score():
    """Shares of the variance go with the squares of the weights, and cells that do not count have none."""
    map = sobol_attribution(None, quadrants, torch.ones(1, 1, 2, 2).double(), None, grid=2, samples=512)[0, 0]
    torch.testing.assert_close(map, torch.tensor([[0.8, 0.2], [0.0, 0.0]]).double(), rtol=0, atol=0.05)


def test_hsic_is_the_trace_and_ranks_by_dependence():
    x = torch.ones(1, 1, 2, 2).double()
    map = hsic_attribution(None, quadrants, x, None, grid=2, samples=64, seed=1)[0, 0]
    assert map[0, 0] > map[0, 1] > 3 * map[1].max()
    z = (uniform(1, torch.arange(64), (4,), torch.float32) < 0.5).double()
    y = 2 * z[:, 0] + z[:, 1]
    square = (y[:, None] - y) ** 2
    like = torch.exp(-square / (2 * square.flatten().median()))
    centre = torch.eye(64).double() - 1 / 64
    for i, value in enumerate(map.flatten()):
        same = (z[:, i, None] == z[:, i]).double()
        torch.testing.assert_close(value, torch.trace(same @ centre @ like @ centre) / 63**2)


# ---- detections ---------------------------------------------------------------------------------------------------


def test_detections_match_by_overlap_class_and_objectness():
    classes = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    boxes = torch.tensor([[0.0, 0, 2, 2], [1.0, 0, 3, 2]])
    proposals = torch.cat([boxes, torch.tensor([[0.5], [1.0]]), classes], 1)[None]
    score = similar_detections(torch.tensor([0.0, 0, 2, 2]), torch.tensor([1.0, 0.0]))(proposals)
    torch.testing.assert_close(score, torch.tensor([max(0.5, 1 / 3 * 0.6)]))
    plain = similar_detections(boxes[:1], classes[1:], objectness=False)(torch.cat([boxes, classes], 1)[None])
    torch.testing.assert_close(plain, torch.tensor([max(0.6, 1 / 3)]))
    with pytest.raises(ValueError, match=r"`box` must be \[4\]"):
        similar_detections(torch.zeros(5), torch.zeros(2))


def test_d_rise_finds_the_object():
    """A detector whose box is certain only while its corner of the image is shown."""

    def detector(params: None, x: Tensor) -> Tensor:
        certain = x[:, 0, :8, :8].mean((1, 2))
        box = torch.tensor([0.0, 0, 8, 8, 0, 1, 0]).expand(len(x), 7)
        return torch.cat([box[:, :4], certain[:, None], box[:, 5:]], 1).unsqueeze(1)

    target = similar_detections(torch.tensor([0.0, 0, 8, 8]), torch.tensor([1.0, 0.0]))
    map = rise(None, detector, torch.ones(2, 1, 16, 16), target, samples=300, grid=4)
    assert bool((map[:, 0, :8, :8].mean((1, 2)) > 1.1 * map[:, 0, 8:, 8:].mean((1, 2))).all())


# ---- captum -------------------------------------------------------------------------------------------------------


@pytest.fixture
def captum():
    return pytest.importorskip("captum.attr")


@pytest.mark.filterwarnings("ignore")
def test_occlusion_and_ablation_are_captums(captum):
    model, x = image_net()
    for window, stride in (((2, 3, 3), (2, 2, 2)), ((1, 2, 3), (1, 1, 2)), ((2, 7, 7), (1, 1, 1))):
        theirs = captum.Occlusion(model).attribute(x, window, strides=stride, target=1, baselines=0.2)
        ours = occlusion(params_of(model), model, x, 1, window=window, stride=stride, baseline=0.2)
        torch.testing.assert_close(ours, theirs.detach().to(ours.dtype), rtol=1e-5, atol=1e-6)
    ids = torch.randint(0, 5, (1, 2, 7, 7), generator=torch.Generator().manual_seed(0))
    theirs = captum.FeatureAblation(model).attribute(x, target=1, feature_mask=ids).to(x.dtype)
    ours = feature_ablation(params_of(model), model, x, 1, feature_mask=ids)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_shapley_values_are_captums(captum):
    model, x = vector_net(4)
    theirs = captum.ShapleyValues(model).attribute(x, target=1, baselines=0.5)
    ours = shapley_values(params_of(model), model, x, 1, baseline=0.5)
    torch.testing.assert_close(ours, theirs.detach().to(ours.dtype), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_lime_and_kernel_shap_are_captums_for_the_same_samples(captum):
    """captum is handed our coalitions, the ridge of scikit-learn, and, for KernelSHAP, its own two heavy samples."""
    pytest.importorskip("sklearn")
    from captum._utils.models.linear_model import SkLearnLinearRegression, SkLearnRidge
    from captum.attr._core.lime import LimeBase

    model, x = vector_net()
    z = torch.rand(50, 6, generator=torch.Generator().manual_seed(0)) < 0.5

    def theirs(weight, ridge, coalitions):
        rows = iter(coalitions)
        base = LimeBase(
            model,
            SkLearnRidge(alpha=ridge) if ridge else SkLearnLinearRegression(),
            lambda original, changed, z, **_: torch.tensor(weight(z), dtype=torch.float64),
            lambda original, **_: next(rows)[None].double(),
            True,
            lambda z, original, **_: original * z,
            None,
        )
        return base.attribute(x[:1], target=1, n_samples=len(coalitions))[0].double()

    def near(z: Tensor) -> float:
        return float(torch.exp(-((1 - (z.sum() / 6).sqrt()) ** 2) / (2 * 0.25**2)))

    ours = lime(params_of(model), model, x[:1], 1, coalitions=z, width=0.25, ridge=0.5)
    torch.testing.assert_close(ours[0], theirs(near, 0.5, z), rtol=1e-5, atol=1e-6)

    proper = z[(z.sum(1) > 0) & (z.sum(1) < 6)]
    both = torch.cat([proper, torch.zeros(1, 6).bool(), torch.ones(1, 6).bool()])

    def heavy(z: Tensor) -> float:
        return 1.0 if 0 < float(z.sum()) < 6 else 1e6

    ours = kernel_shap(params_of(model), model, x[:1], 1, coalitions=proper)
    torch.testing.assert_close(ours[0], theirs(heavy, 0.0, both), rtol=1e-4, atol=1e-4)


def test_targets_seeds_and_inputs_at_once():
    model, x = image_net()
    seeds, targets = torch.tensor([1, 2]), torch.tensor([0, 3])
    how = {"samples": 4, "grid": 2}
    call = lambda x, target, seed: rise(params_of(model), model, x, target, seed=seed, **how)  # noqa: E731
    many = vmap(vmap(vmap(call, (None, None, 0)), (None, 0, None)), (0, None, None))(
        torch.stack([x, -x]), targets, seeds
    )
    for (i, one), (j, target), (k, seed) in itertools.product(enumerate([x, -x]), enumerate([0, 3]), enumerate([1, 2])):
        alone = pullback.rise(params_of(model), model, one, target, seed=seed, **how)
        torch.testing.assert_close(many[i, j, k], alone)
