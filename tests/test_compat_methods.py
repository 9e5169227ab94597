"""Excitation backprop, RISE and extremal perturbations in the TorchRay dialect: by hand, by quirk, by number."""

import copy
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from compat import load
from torch import nn

import pullback
from pullback import PullbackWarning
from pullback.compat.torchray.attribution.common import Probe, get_module, saliency
from pullback.compat.torchray.attribution.excitation_backprop import (
    EltwiseSum,
    EltwiseSumFunction,
    ExcitationBackpropContext,
    contrastive_excitation_backprop,
    eltwise_sum,
    excitation_backprop,
    gradient_to_contrastive_excitation_backprop_saliency,
    gradient_to_excitation_backprop_saliency,
    update_resnet,
)
from pullback.compat.torchray.attribution.extremal_perturbation import (
    BLUR_PERTURBATION,
    DELETE_VARIANT,
    DUAL_VARIANT,
    FADE_PERTURBATION,
    PRESERVE_VARIANT,
    MaskGenerator,
    Perturbation,
    contrastive_reward,
    extremal_perturbation,
    simple_reward,
)
from pullback.compat.torchray.attribution.rise import rise, rise_class
from pullback.masks._grids import grid_masks

# -- excitation backprop


@pytest.fixture
def vgg():
    vectors = load("vgg")
    return vectors.model(), vectors.x


@pytest.mark.parametrize("layer", ["4", "6"])
def test_excitation_backprop_in_manual_style(vgg, layer):
    model, x = vgg
    simple = excitation_backprop(model, x, 3, saliency_layer=layer)
    probe = Probe(get_module(model, layer), target="output")
    with ExcitationBackpropContext():
        y = model(x)
        y[:, 3].sum().backward()
    assert torch.allclose(gradient_to_excitation_backprop_saliency(probe.data[0]), simple, atol=1e-7)
    assert torch.allclose(simple.sum((1, 2, 3)), torch.ones(2), atol=1e-5)  # a probability


@pytest.mark.parametrize(
    "negate", [lambda w: w.data.neg_(), torch.no_grad()(lambda w: w.neg_())], ids=["data", "no_grad"]
)
@pytest.mark.parametrize("name", ["vgg", "bn"])
def test_contrastive_excitation_backprop_in_manual_style(name, negate):
    """The weight of the classifier is negated between the forward and its backward."""
    vectors = load(name)
    model, x = vectors.model(), vectors.x[:1]
    layer, contrast, last = ("5", "10", "12") if name == "vgg" else ("4", "6", "9")
    simple = contrastive_excitation_backprop(model, x, 3, saliency_layer=layer, contrast_layer=contrast)
    classifier = get_module(model, last)
    contrast_probe = Probe(get_module(model, contrast), target="output")
    probe = Probe(get_module(model, layer), target="output")
    with ExcitationBackpropContext():
        y = model(x)
        negate(classifier.weight)
        y[0, 3].backward()
        negate(classifier.weight)
        contrast_probe.contrast = [contrast_probe.data[0].grad]
        y = model(x)
        y[0, 3].backward()
    found = gradient_to_contrastive_excitation_backprop_saliency(probe.data[0])
    assert torch.allclose(found, simple, atol=1e-7)
    assert simple.sum() > 0


def test_contrast_where_it_is_taken(vgg):
    """At the contrast layer itself the map is the difference, clamped."""
    model, x = vgg
    relevance = {}
    for negated in (False, True):
        opposite = copy.deepcopy(model)
        if negated:
            opposite[12].weight.data.neg_()
        relevance[negated] = saliency(
            opposite, x, 3, "6", context_builder=ExcitationBackpropContext, gradient_to_saliency=lambda a: a.grad
        )
    difference = relevance[False] - relevance[True]
    found = contrastive_excitation_backprop(model, x, 3, "6", "6", classifier_layer=model[12])
    assert torch.allclose(found, difference.sum(1, keepdim=True).clamp(min=0), atol=1e-7)


def test_contrastive_options(vgg):
    model, x = vgg
    weight = model[12].weight.detach().clone()
    plain = contrastive_excitation_backprop(model, x, [3, 0], "5", "10")
    named = contrastive_excitation_backprop(nn.DataParallel(model), x, [3, 0], "module.5", model[10], "module.12")
    assert torch.equal(plain, named)
    with pytest.warns(PullbackWarning, match="negative"):  # of the probed input
        resized, probes = contrastive_excitation_backprop(model, x, [3, 0], "5", "10", "12", True, debug=True)
    assert resized.shape == (2, 1, 32, 32)
    assert torch.allclose(F.interpolate(plain, (32, 32), mode="bilinear"), resized)
    assert list(probes) == [name for name, _ in model.named_modules()]
    assert torch.equal(model[12].weight, weight)
    with pytest.raises(AssertionError, match="No layer"):
        contrastive_excitation_backprop(model, x, 3, "5", "none")
    with pytest.raises(AssertionError, match="`classifier_layer` must be given"):
        contrastive_excitation_backprop(nn.Sequential(nn.ReLU()), x, 3, "0", "0")


def test_excitation_backprop_of_a_model_in_training_is_left_as_it_is(vgg):
    model, x = vgg
    model.train()

    def fails(output, target):
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        contrastive_excitation_backprop(model, x, 3, "5", "10", get_backward_gradient=fails)
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


class Skip(nn.Module):
    """A residual block, its sum a `+` or an `EltwiseSum`; convolutions with keyword arguments."""

    def __init__(self, summed, channels=4):
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, channels, 3), nn.Conv2d(channels, channels, 3, padding=1)
        self.head, self.summed = nn.Linear(channels, 3), summed

    def forward(self, x):
        h = self.stem(x).relu()
        b = F.conv2d(input=h, weight=self.branch.weight, bias=self.branch.bias, padding=1)
        h = self.summed(b, h).relu()
        return self.head(F.adaptive_avg_pool2d(input=h, output_size=1).flatten(1))


def test_relevance_at_a_skip():
    torch.manual_seed(2)
    plus, summed = Skip(torch.add).eval(), Skip(EltwiseSum()).eval()
    summed.load_state_dict(plus.state_dict())
    x = torch.randn(2, 3, 6, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to tell
        shared = excitation_backprop(summed, x, 1, saliency_layer="stem")
    assert torch.allclose(shared.sum((1, 2, 3)), torch.ones(2), atol=1e-5)
    with pytest.warns(PullbackWarning, match="do not cover `add`") as told:
        doubled = excitation_backprop(plus, x, 1, saliency_layer="stem")
    assert len(told) == 1
    assert (doubled.sum((1, 2, 3)) > 1.8).all()
    with pytest.warns(PullbackWarning, match="do not cover `add`"), ExcitationBackpropContext():
        plus(x)
    pure = pullback.excitation_backprop(pullback.params_of(plus), plus, x, 1, layer="stem")
    assert torch.allclose(pure.sum((1, 2, 3)), torch.ones(2), atol=1e-5)  # the pure function needs no EltwiseSum


def test_elementwise_sum():
    x, y = torch.tensor([2.0, 0.0, -1.0], requires_grad=True), torch.tensor([6.0, 0.0, 3.0], requires_grad=True)
    for function in (eltwise_sum, EltwiseSum(), EltwiseSumFunction.apply):
        z = function(x, y, y)
        assert torch.equal(z, x + 2 * y)
        assert [g.tolist() for g in torch.autograd.grad(z.sum(), (x, y))] == [[1, 1, 1], [2, 2, 2]]
    with ExcitationBackpropContext():
        z = eltwise_sum(x, y)
    assert torch.equal(z, x + y)
    a, b = torch.autograd.grad(z.sum(), (x, y))
    assert torch.allclose(a, torch.tensor([0.25, 0.0, 0.0]))  # no relevance of 0 / 0, none below 0
    assert torch.allclose(b, torch.tensor([0.75, 0.0, 1.0]))
    with ExcitationBackpropContext(enable=False):
        assert [g.tolist() for g in torch.autograd.grad(eltwise_sum(x, y).sum(), (x, y))] == [[1, 1, 1], [1, 1, 1]]


def test_disabled_excitation_backprop_is_the_gradient(vgg):
    model, x = vgg
    found = saliency(model, x, 3, "5", context_builder=lambda: ExcitationBackpropContext(enable=False))
    assert torch.equal(found, saliency(model, x, 3, "5"))
    with pytest.raises(AssertionError, match="`context_builder` must be left out"):
        excitation_backprop(model, x, 3, context_builder=lambda: ExcitationBackpropContext(enable=False))


def test_negative_inputs_are_told(vgg):
    model, x = vgg
    with pytest.warns(PullbackWarning, match="`conv2d` has negative ones"):
        map = excitation_backprop(model, x, 3)
    assert torch.allclose(map.sum((1, 2, 3)), torch.ones(2), atol=1e-4)
    assert (map < 0).any()


def test_excitation_backprop_with_probes(vgg):
    """`debug` runs on ordinary autograd: the same map."""
    model, x = vgg
    with pytest.warns(PullbackWarning, match="negative"):
        map, probes = excitation_backprop(model, x, 3, saliency_layer="5", debug=True)
    assert torch.allclose(map, excitation_backprop(model, x, 3, saliency_layer="5"), atol=1e-8)
    assert torch.allclose(probes["6"].data[0].grad.sum((1, 2, 3)), torch.ones(2), atol=1e-5)
    batch_norm = load("bn")
    model, x = batch_norm.model(), batch_norm.x
    with pytest.warns(PullbackWarning, match="negative"):
        map, probes = excitation_backprop(model, x, 3, saliency_layer="4", debug=True)
    assert torch.allclose(map, excitation_backprop(model, x, 3, saliency_layer="4"), atol=1e-8)
    assert torch.allclose(probes["5"].data[0].grad, probes["4"].data[0].grad)  # batch norm hands relevance on


def test_update_resnet(capsys):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    for make in (models.resnet18, models.resnet50):
        model = make(weights=None, num_classes=5).eval()
        x = torch.randn(1, 3, 32, 32)
        before = model(x).detach()
        assert update_resnet(model) is model
        assert torch.equal(model(x), before)
        assert torch.equal(copy.deepcopy(model)(x), before)
        model.double()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            map = excitation_backprop(model, x.double(), 1, saliency_layer="layer3")
        assert abs(float(map.sum()) - 1) < 1e-6
    update_resnet(models.resnet18(weights=None), debug=True)
    assert "layer1.0: " in capsys.readouterr().out
    with pytest.raises(AssertionError, match=r"ResNet of torchvision's"):
        update_resnet(nn.Sequential(nn.ReLU()))


# -- RISE


def test_rise_leaves_the_generators_alone(vgg):
    model, x = vgg
    before = torch.get_rng_state()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = rise(model, x, num_masks=8, seed=3)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, rise(model, x, num_masks=8, seed=3))
    assert not torch.equal(first, rise(model, x, num_masks=8, seed=4))
    torch.set_rng_state(before)

    def fails(x):
        raise RuntimeError("in the middle")

    model[3].forward = fails
    with pytest.raises(RuntimeError, match="in the middle"):
        rise(model, x, num_masks=8)
    assert torch.equal(torch.get_rng_state(), before)


def test_masks_of_rise():
    """Cells enlarged as TorchRay enlarges them: 7 x 7 of 3 x 3, of which a shift in 0, 1 cuts 5 x 5."""
    grid = torch.arange(9.0).reshape(1, 3, 3).expand(2, 3, 3)
    masks = grid_masks(grid, torch.tensor([[0, 0], [1, 1]]), (5, 5))[:, 0]
    assert torch.allclose(masks[0, 0, :4], torch.tensor([4 / 3, 1.0, 4 / 3, 5 / 3]))
    assert float(masks[0, 3, 3]) == pytest.approx(8 / 3)
    assert torch.allclose(masks[1, :-1, :-1], masks[0, 1:, 1:])


def test_rise_by_its_formula(vgg):
    """With masks given; the sum of scores times masks, over the number of masks, not over p."""
    model, x = vgg
    masks = torch.rand(5, 1, 32, 32)
    expected = torch.zeros(2, 7, 32, 32)
    for mask in masks:
        expected += torch.sigmoid(model(x * mask)).detach()[:, :, None, None] * mask / 5
    found = rise(model, x, num_masks=5, filter_masks=masks, batch_size=2)
    assert torch.allclose(found, expected, atol=1e-6)
    assert not found.requires_grad
    assert rise(model, x, num_masks=5, filter_masks=torch.ones(5, 1, 7, 7)).shape == (2, 7, 32, 32)
    assert rise(model, x, num_masks=5, filter_masks=masks, resize=(9, 5)).shape == (2, 7, 5, 9)
    of_class = rise_class(model, x, target=[3, 0], num_masks=5, filter_masks=masks)
    assert of_class.shape == (2, 1, 32, 32)
    assert torch.allclose(of_class[:, 0], torch.stack([expected[0, 3], expected[1, 0]]))
    assert torch.allclose(rise_class(model, x, target=3, num_masks=5, filter_masks=masks)[:, 0], expected[:, 3])
    one = nn.Sequential(model, nn.Unflatten(1, (7, 1, 1)))
    assert torch.allclose(rise(one, x, num_masks=5, filter_masks=masks), expected, atol=1e-6)
    with pytest.raises(AssertionError, match="`filter_masks` must be 6 masks"):
        rise(model, x, num_masks=6, filter_masks=masks)
    with pytest.raises(AssertionError, match="`target` must be one class"):
        rise_class(model, x, target=[1, 2, 3], num_masks=5, filter_masks=masks)
    with pytest.raises(AssertionError, match="1 x 1"):
        rise(load("fcn").model(), x, num_masks=2)
    with pytest.raises(AssertionError, match="`num_masks` must be at least 1"):
        rise(model, x, num_masks=0)


def test_rise_is_the_pure_function_with_other_masks(vgg):
    """The dialect divides by no p and squashes by the logistic function; so can the pure function."""
    model, x = vgg
    a = rise(model, x, num_masks=600, p=0.5)[:, 3]
    options = {"samples": 600, "link": "sigmoid", "normalise": False}
    b = pullback.rise(pullback.params_of(model), model, x, 3, **options)[:, 0]
    assert torch.allclose(a.mean(), b.mean(), rtol=0.05)


# -- extremal perturbations


def test_names():
    assert (BLUR_PERTURBATION, FADE_PERTURBATION) == ("blur", "fade")
    assert (PRESERVE_VARIANT, DELETE_VARIANT, DUAL_VARIANT) == ("preserve", "delete", "dual")


def test_mask_generator():
    generator = MaskGenerator((28, 28), 7, 21)
    assert (generator.padding, generator.radius, generator.coldness, generator.margin) == (7, 4, 20, 21)
    assert generator.shape_in == (4, 4)
    assert (generator.shape_mid, generator.shape_up, generator.shape_out) == ((10, 10), (70, 70), (64, 64))
    crop, whole = generator.to("cpu").generate(torch.ones(1, 1, 4, 4))
    assert crop.shape == (1, 1, 28, 28)
    assert whole.shape == (1, 1, 64, 64)
    assert float(crop.min()) == pytest.approx(0.975870, abs=1e-5)
    assert float(crop.max()) == pytest.approx(0.995667, abs=1e-5)
    assert float(whole.mean()) == pytest.approx(0.847274, abs=1e-5)
    one = torch.zeros(1, 1, 4, 4)
    one[0, 0, 1, 2] = 1
    crop, whole = generator.generate(one)
    assert float(crop.sum()) == pytest.approx(717.0916, rel=1e-5)
    assert float(whole.sum()) == pytest.approx(1669.280, rel=1e-5)
    for method, expected in (("sum", 717.1506), ("sigmoid", 783.9701)):
        crop, _ = MaskGenerator((28, 28), 7, 21, pooling_method=method).generate(one)
        assert float(crop.sum()) == pytest.approx(expected, rel=1e-5)
    assert MaskGenerator((224, 224), 7, 21).shape_out == (260, 260)


def test_perturbation():
    x = torch.arange(32.0).reshape(1, 2, 4, 4) / 32
    blurred = Perturbation(x, 3, max_blur=1)
    expected = torch.tensor([0.0396928, 0.0149316, 0.0])
    assert torch.allclose(blurred.pyramid[:, 0, 0, 0], expected, atol=1e-6)
    assert float(blurred.apply(torch.full((1, 1, 4, 4), 0.25))[0, 0, 0, 0]) == pytest.approx(0.0273122, abs=1e-6)
    assert torch.equal(blurred.apply(torch.ones(2, 1, 4, 4)), x.expand(2, 2, 4, 4))
    faded = Perturbation(x, 5, type="fade")
    mask = torch.rand(3, 1, 4, 4)
    assert torch.allclose(faded.apply(mask), mask * x, atol=1e-6)
    assert faded.to(torch.float64) is faded
    assert faded.pyramid.dtype == torch.float64  # it moves
    assert "fade" in str(faded)
    for wrong in (x[0], x.expand(2, 2, 4, 4)):
        with pytest.raises(AssertionError, match="one image"):
            Perturbation(wrong)
    with pytest.raises(AssertionError, match="`type` must be"):
        Perturbation(x, type="burn")


def test_rewards():
    y = torch.tensor([[1.0, 5.0, 2.0], [4.0, 0.0, 3.0]])
    assert simple_reward(y, 1, "preserve").tolist() == [5, 0]
    assert simple_reward(y, 1, "delete").tolist() == [-5, 0]
    assert simple_reward(y, 1, "dual").tolist() == [5]
    assert contrastive_reward(y, 1, "preserve").tolist() == [[3, -2], [1, -4]]  # each score meets each sample's others
    assert contrastive_reward(y, 1, "dual").tolist() == [[7]]
    with pytest.raises(AssertionError, match="`variant` must be"):
        simple_reward(y, 1, "destroy")


def golden():
    model = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(16, 3))
    with torch.no_grad():
        model[2].weight.copy_(torch.linspace(-1, 1, 48).reshape(3, 16))
        model[2].bias.zero_()
    return model, torch.linspace(0, 1, 256).reshape(1, 1, 16, 16)


def test_extremal_perturbation():
    model, x = golden()
    options = {"areas": 0.2, "max_iter": 20, "step": 4, "sigma": 4, "num_levels": 4}
    masks, history = extremal_perturbation(model, x, 2, **options)
    assert masks.shape == (1, 1, 16, 16)
    assert float(masks.mean()) == pytest.approx(0.375094, abs=1e-5)
    assert history[0, :, 0].tolist() == pytest.approx([5.66613, -177.5642], rel=1e-5)
    assert history[0, :, -1].tolist() == pytest.approx([2.09394, -7.90647], rel=1e-4)
    assert not masks.requires_grad
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.training  # as it was
    for target in (torch.tensor(2), torch.tensor([2]), [2]):
        assert torch.equal(extremal_perturbation(model, x, target, **options)[0], masks)
    pure, info = pullback.extremal_perturbation(
        pullback.params_of(model),
        model,
        x,
        2,
        areas=[0.2],
        iterations=20,
        step=4,
        sigma=4.0,
        levels=4,
        return_info=True,
    )
    assert torch.allclose(pure[:, 0], masks, atol=1e-5)
    assert torch.allclose(info["history"][:, 0], history, rtol=1e-4)


def test_options_of_extremal_perturbation(capsys):
    model, x = golden()
    few = {"max_iter": 3, "step": 4, "sigma": 4}
    calls = []

    def reward(activation, target, variant):
        calls.append((activation.shape, target, variant))
        return simple_reward(activation, target, variant)

    masks, history = extremal_perturbation(
        model, x, 2, areas=(0.1, 0.4), variant="dual", reward_func=reward, print_iter=2, debug=True, **few
    )
    assert history.shape == (2, 2, 3)
    assert set(calls) == {((4, 3), 2, "dual")}
    printed = capsys.readouterr().out
    assert printed.count("reward") == 2
    assert "variant 'dual'" in printed
    smoothed, _ = extremal_perturbation(model, x, 2, areas=(0.1, 0.4), variant="dual", smooth=0.1, **few)
    assert torch.allclose(smoothed, pullback.maps.smooth(masks, 1.6, padding="zeros"), atol=1e-5)
    resized, _ = extremal_perturbation(model, x, 2, resize=(8, 4), **few)
    assert resized.shape == (1, 1, 4, 8)
    unmoved, _ = extremal_perturbation(model, x, 2, jitter=False, **few)
    assert not torch.equal(unmoved, extremal_perturbation(model, x, 2, **few)[0])
    for wrong in ({"variant": "destroy"}, {"perturbation": "burn"}, {"max_iter": 0}):
        with pytest.raises(AssertionError, match="must be"):
            extremal_perturbation(model, x, 2, **{**few, **wrong})


def test_two_threads_perturb_one_model():
    model, x = golden()
    few = {"max_iter": 5, "step": 4, "sigma": 4}
    expected = [extremal_perturbation(model, x, target, **few)[0] for target in (0, 2)]
    found = [None, None]

    def explain(i, target):
        found[i] = extremal_perturbation(model, x, target, **few)[0]

    threads = [threading.Thread(target=explain, args=pair) for pair in ((0, 0), (1, 2))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, found, expected))
