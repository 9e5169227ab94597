"""Driver, probes, contexts and patches of the TorchRay dialect: what TorchRay gives is kept, what it leaves is not."""

import copy
import gc
import threading
import weakref
from collections import OrderedDict, UserDict, namedtuple

import pytest
import torch
import torch.nn.functional as F
from compat import load
from torch import nn

import pullback
from pullback import PullbackWarning
from pullback.compat.torchray.attribution import common
from pullback.compat.torchray.attribution.common import (
    NullContext,
    Patch,
    Probe,
    ReLUContext,
    attach_debug_probes,
    get_backward_gradient,
    get_module,
    get_pointing_gradient,
    gradient_to_saliency,
    resize_saliency,
    saliency,
)
from pullback.compat.torchray.attribution.deconvnet import DeConvNetContext, DeConvNetReLU, deconvnet
from pullback.compat.torchray.attribution.grad_cam import grad_cam, gradient_to_grad_cam_saliency
from pullback.compat.torchray.attribution.gradient import gradient
from pullback.compat.torchray.attribution.guided_backprop import (
    GuidedBackpropContext,
    GuidedBackpropReLU,
    guided_backprop,
)
from pullback.compat.torchray.attribution.linear_approx import gradient_to_linear_approx_saliency, linear_approx


class OldGuided(torch.autograd.Function):
    """What users of TorchRay wrote: the form that torch.func cannot run, saving its input."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g.clamp(min=0) * (x >= 0)


class Spelled(nn.Module):
    """A rectifier in each spelling, and a skip that shares the tensor an in-place one writes to."""

    def __init__(self, spelling):
        super().__init__()
        self.spelling = spelling
        self.stem, self.body, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(64, 3)

    def forward(self, x):
        h = self.stem(x)
        if self.spelling == "statement":
            h.relu_()
        else:
            spelled = {
                "module": nn.ReLU(),
                "inplace": nn.ReLU(inplace=True),
                "functional": F.relu,
                "torch": torch.relu,
                "method": lambda h: h.relu(),
                "torch_": torch.relu_,
            }
            h = spelled[self.spelling](h)
        return self.head((h + self.body(h)).flatten(1))


SPELLINGS = ["module", "inplace", "functional", "torch", "method", "torch_", "statement"]


def spelled(spelling="module"):
    torch.manual_seed(1)
    return Spelled(spelling).eval(), torch.randn(2, 3, 6, 6)


@pytest.fixture
def vgg():
    vectors = load("vgg")
    return vectors.model(), vectors.x


def state_of(model, x):
    return (
        [
            (m.training, getattr(m, "inplace", None), len(m._forward_hooks), len(m._forward_pre_hooks))
            for m in model.modules()
        ],
        [(p.requires_grad, p.grad, p.detach().clone()) for p in model.parameters()],
        x.requires_grad,
        torch.get_rng_state(),
        torch.relu,
        F.relu,
    )


def same(a, b):
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a is b or a == b


# -- simple style and manual style give the same


CONTEXTS = {
    gradient: (NullContext, gradient_to_saliency),
    deconvnet: (DeConvNetContext, gradient_to_saliency),
    guided_backprop: (GuidedBackpropContext, gradient_to_saliency),
    grad_cam: (NullContext, gradient_to_grad_cam_saliency),
    linear_approx: (NullContext, gradient_to_linear_approx_saliency),
}


@pytest.mark.parametrize("method", CONTEXTS, ids=lambda method: method.__name__)
@pytest.mark.parametrize("layer", ["5", "6"])  # before an in-place ReLU, and a ReLU
def test_manual_style(vgg, method, layer):
    model, x = vgg
    context, to_saliency = CONTEXTS[method]
    simple = method(model, x, 3, saliency_layer=layer)
    probe = Probe(get_module(model, layer), target="output")
    with context():
        y = model(x)
    (y[0, 3] + y[1, 3]).backward()
    assert torch.allclose(to_saliency(probe.data[0]), simple, rtol=1e-5, atol=1e-9)
    probe.remove()


@pytest.mark.parametrize("method", [gradient, deconvnet, guided_backprop], ids=lambda method: method.__name__)
def test_manual_style_at_the_input(vgg, method):
    model, x = vgg
    simple = method(model, x.clone(), 3)
    x.requires_grad_()
    with CONTEXTS[method][0]():
        y = model(x)
        y[:, 3].sum().backward()
    assert torch.allclose(gradient_to_saliency(x), simple, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("context", [DeConvNetContext, GuidedBackpropContext])
def test_contexts_reach_every_spelling(spelling, context):
    model, x = spelled(spelling)
    plain, x = spelled("module")
    expected = saliency(plain, x, 1, context_builder=context)
    assert not torch.allclose(expected, saliency(plain, x, 1))
    assert torch.allclose(saliency(model, x, 1, context_builder=context), expected, atol=1e-7)
    x = x.clone().requires_grad_()
    with context():
        y = model(x)
    assert torch.equal(y, model(x))  # also where what an in-place ReLU writes to is shared
    y[:, 1].sum().backward()
    assert torch.allclose(gradient_to_saliency(x), expected, atol=1e-7)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_users_function_of_the_old_form(spelling):
    model, x = spelled(spelling)
    expected = guided_backprop(model, x.clone(), 1)
    assert torch.allclose(
        saliency(model, x.clone(), 1, context_builder=lambda: ReLUContext(OldGuided)), expected, atol=1e-7
    )
    x.requires_grad_()
    with ReLUContext(OldGuided) as context:
        y = model(x)
    assert context.patches == []
    y[:, 1].sum().backward()
    assert torch.allclose(gradient_to_saliency(x), expected, atol=1e-7)


def test_a_users_context_sees_the_model_and_its_hooks():
    vectors = load("fcn")
    model, x = vectors.model(), vectors.x

    class Hooked:
        """Guided backprop by backward hooks on the modules, as it is often written."""

        def __enter__(self):
            self.hooks = [
                m.register_full_backward_hook(lambda m, gi, go: (gi[0].clamp(min=0),))
                for m in model.modules()
                if isinstance(m, nn.Conv2d) and m.in_channels > 3
            ]

        def __exit__(self, *error):
            for hook in self.hooks:
                hook.remove()

    hooked = saliency(model, x.clone(), 3, context_builder=Hooked)
    x.requires_grad_()
    with Hooked():
        y = model(x)
        (expected,) = torch.autograd.grad(y[:, 3].sum(), x)
    assert torch.allclose(hooked, expected.abs().amax(1, keepdim=True), atol=1e-9)
    assert not torch.allclose(hooked, saliency(model, x.detach(), 3))


def test_gradient_at_zero_passes():
    x = torch.tensor([[-1.0, 0.0, 2.0]], requires_grad=True)
    for function, expected in ((GuidedBackpropReLU, [0.0, 3.0, 3.0]), (DeConvNetReLU, [3.0, 3.0, 3.0])):
        y = function.apply(x)
        assert torch.equal(y, x.clamp(min=0))
        (g,) = torch.autograd.grad(y, x, torch.full_like(y, 3.0))
        assert g.tolist() == [expected]
        (g,) = torch.autograd.grad(function.apply(x), x, torch.full_like(y, -3.0))
        assert torch.equal(g, torch.zeros_like(x))
        with ReLUContext(function):
            (g,) = torch.autograd.grad(torch.relu(x), x, torch.full_like(y, 3.0))
        assert g.tolist() == [expected]


def test_only_relu_is_traded_and_the_rest_is_told():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Flatten(), nn.Linear(64, 3)).eval()
    x = torch.randn(1, 3, 6, 6)
    with pytest.warns(PullbackWarning, match="do not cover `hardtanh` in `1`"):
        assert torch.equal(guided_backprop(model, x, 0), gradient(model, x, 0))
    with pytest.warns(PullbackWarning, match="do not cover `hardtanh`"), GuidedBackpropContext():
        model(x)


def test_contexts_are_local_to_their_thread():
    model, x = spelled("functional")
    x.requires_grad_()
    entered, seen = threading.Event(), []
    left = threading.Event()

    def train():
        entered.wait()
        seen.append(torch.autograd.grad(model(x)[0, 1], x)[0])
        left.set()

    thread = threading.Thread(target=train)
    thread.start()
    with GuidedBackpropContext():
        entered.set()
        left.wait()
    thread.join()
    assert torch.equal(seen[0], torch.autograd.grad(model(x)[0, 1], x)[0])


def test_a_thread_explains_while_another_trains():
    explained, x = spelled("inplace")
    expected = guided_backprop(explained, x, 1)

    def trained(model):
        model.train()
        optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
        generator = torch.Generator().manual_seed(0)
        for _ in range(30):
            loss = model(torch.randn(4, 3, 6, 6, generator=generator)).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return [p.detach().clone() for p in model.parameters()]

    alone = trained(spelled("statement")[0])
    wrong, together, done = [], [], threading.Event()

    def explain():
        while not done.is_set():
            if not torch.equal(guided_backprop(explained, x.clone(), 1), expected):
                wrong.append(1)

    thread = threading.Thread(target=explain)
    thread.start()
    try:
        together = trained(spelled("statement")[0])
    finally:
        done.set()
        thread.join()
    assert not wrong
    assert same(together, alone)


def test_one_model_explained_by_several_threads(vgg):
    model, x = vgg
    builders = [NullContext, DeConvNetContext, GuidedBackpropContext, lambda: ReLUContext(OldGuided)]
    expected = [saliency(model, x.clone(), 3, context_builder=b) for b in builders]
    wrong = []

    def explain(i):
        for _ in range(10):
            if not torch.equal(saliency(model, x.clone(), 3, context_builder=builders[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=explain, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -- the driver


def test_positions_and_keywords_of_the_driver(vgg):
    model, x = vgg
    a = saliency(model, x, [3, 0], "5", True, "bilinear", 0.02, GuidedBackpropContext)
    b = saliency(
        model=model,
        input=x,
        target=torch.tensor([3, 0]),
        saliency_layer=model[5],
        resize=True,
        smooth=0.02,
        context_builder=GuidedBackpropContext,
        gradient_to_saliency=gradient_to_saliency,
        get_backward_gradient=get_backward_gradient,
        debug=False,
    )
    assert torch.equal(a, b)
    assert a.shape == (2, 1, 32, 32)


@pytest.mark.parametrize("builder", [NullContext, lambda: ReLUContext(OldGuided)], ids=["functional", "autograd"])
def test_callbacks_of_the_driver(vgg, builder):
    model, x = vgg
    seen = {}

    def cotangent(output, target):
        seen["output"], seen["target"] = output.detach().numpy().copy(), target
        return torch.ones_like(output)

    def reduce(activation):
        seen["shapes"] = activation.shape, activation.grad.shape
        assert type(activation.detach().numpy()).__name__ == "ndarray"  # an ordinary tensor
        return activation.grad[:, :1]

    map = saliency(model, x, "any", "5", False, "bilinear", 0, builder, reduce, cotangent)
    assert seen["target"] == "any"
    assert seen["shapes"] == ((2, 12, 16, 16),) * 2
    assert torch.allclose(torch.from_numpy(seen["output"]), model(x))
    if builder is NullContext:
        expected = pullback.gradient(pullback.params_of(model), model, x, torch.ones(2, 7), layer="5")[:, :1]
        assert torch.allclose(map, expected, atol=1e-9)


@pytest.mark.parametrize("builder", [NullContext, GuidedBackpropContext, lambda: ReLUContext(OldGuided)])
@pytest.mark.parametrize("layer", ["", "2"])
@pytest.mark.parametrize("debug", [False, True])
def test_nothing_of_the_callers_changes(vgg, builder, layer, debug):
    model, x = vgg
    model.train()
    model[8].eval()  # a layer that is frozen in the middle of training
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 2 == 0)
    before = state_of(model, x)
    saliency(model, x, 3, layer, context_builder=builder, debug=debug)
    assert same(before, state_of(model, x))

    def fails(x):
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        saliency(model, x, 3, layer, context_builder=builder, gradient_to_saliency=fails, debug=debug)
    assert same(before, state_of(model, x))
    model[9].forward = fails
    with pytest.raises(RuntimeError, match="in the middle"):
        saliency(model, x, 3, layer, context_builder=builder, debug=debug)
    del model[9].forward
    assert same(before, state_of(model, x))


@pytest.mark.parametrize("builder", [NullContext, lambda: ReLUContext(OldGuided)], ids=["functional", "autograd"])
def test_dropout_is_off_also_below_a_root_in_eval_mode(vgg, builder):
    model, x = vgg
    expected = saliency(model, x, 3, context_builder=builder)
    model[11].train()
    assert torch.equal(saliency(model, x, 3, context_builder=builder), expected)
    assert model[11].training


@pytest.mark.parametrize("builder", [NullContext, lambda: ReLUContext(OldGuided)], ids=["functional", "autograd"])
def test_the_gradient_of_the_input_is_left_for_the_caller(vgg, builder):
    model, x = vgg
    earlier = torch.ones_like(x)
    x.grad = earlier
    map = saliency(model, x, 3, context_builder=builder)
    assert x.grad is not None
    assert torch.equal(x.grad.abs().amax(1, keepdim=True), map)
    assert torch.equal(earlier, torch.ones_like(x))  # not zeroed in place
    assert not x.requires_grad
    full = x.grad
    x = x.detach().clone()
    saliency(model, x, 3, "5", context_builder=builder)
    assert x.grad is None  # nobody asked for it
    x.requires_grad_()
    saliency(model, x, 3, "5", context_builder=builder)
    assert torch.allclose(x.grad, full, atol=1e-9)


@pytest.mark.parametrize("method", CONTEXTS, ids=lambda method: method.__name__)
def test_maps_carry_no_graph(vgg, method):
    model, x = vgg
    assert not method(model, x.requires_grad_(), 3, saliency_layer="5").requires_grad


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("builder", [GuidedBackpropContext, lambda: ReLUContext(OldGuided)])
def test_inside_other_modes(vgg, around, builder):
    model, x = vgg
    expected = saliency(model, x, 3, "2", context_builder=builder)
    with around():
        assert torch.equal(saliency(model, x.clone(), 3, "2", context_builder=builder), expected)


def test_debug_gives_probes_of_every_module(vgg):
    model, x = vgg
    map, probes = saliency(model, x, 3, "6", debug=True)
    assert list(probes) == [name for name, _ in model.named_modules()]
    assert torch.allclose(gradient_to_saliency(probes["6"].data[0]), map)
    assert torch.allclose(gradient_to_saliency(probes[""].data[0]), saliency(model, x, 3), atol=1e-9)
    assert all(probes[name].module is module for name, module in model.named_modules())
    assert all(probe.hook is None for probe in probes.values())
    assert torch.equal(map, saliency(model, x, 3, "6"))


def test_a_layer_as_module_means_its_output(vgg):
    model, x = vgg
    root = saliency(model, x, 3, model)
    assert root.shape == (2, 1)
    assert torch.equal(root, torch.ones(2, 1))  # the cotangent's peak
    with pytest.raises(AssertionError, match="A layer must be one of the model's"):
        saliency(model, x, 3, nn.ReLU())
    with pytest.raises(AssertionError, match=r"No layer `features` in the model"):
        saliency(model, x, 3, "features")


@pytest.mark.parametrize("builder", [NullContext, lambda: ReLUContext(OldGuided)], ids=["functional", "autograd"])
def test_a_module_called_twice_counts_both_calls(builder):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Conv2d(3, 3, 1), nn.Linear(48, 2)

        def forward(self, x):
            return self.head(self.layer(self.layer(x).square()).flatten(1))

    model, x = Twice().eval(), torch.randn(1, 3, 4, 4)
    first = model.layer(x).detach().requires_grad_()
    second = model.layer(first.square())
    second.retain_grad()
    model.head(second.flatten(1))[0, 1].backward()
    expected = (first * first.grad).sum(1) + (second * second.grad).sum(1)
    found = saliency(
        model, x, 1, "layer", context_builder=builder, gradient_to_saliency=gradient_to_linear_approx_saliency
    )
    assert torch.allclose(found[:, 0], expected, atol=1e-6)


def test_a_layer_followed_by_an_inplace_relu_is_seen_before_it(vgg):
    model, x = vgg  # the layer "0" is followed by ReLU(inplace=True)
    for given in (x, x.clone().requires_grad_()):
        seen = []
        saliency(model, given, 3, "0", gradient_to_saliency=lambda a: seen.append(a.clone()) or a.grad[:, :1])
        assert torch.allclose(seen[0], model[0](x), atol=1e-6)
        assert bool((seen[0] < 0).any())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_compiled_and_wrapped_models(vgg):
    model, x = vgg
    expected = guided_backprop(model, x, 3, saliency_layer="5")
    assert torch.equal(guided_backprop(nn.DataParallel(model), x, 3, saliency_layer="module.5"), expected)
    assert torch.equal(guided_backprop(torch.compile(model), x, 3, saliency_layer="5"), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_model_is_refused_where_its_operations_must_be_traded(vgg):
    model, x = vgg
    scripted = torch.jit.trace(model, x)
    with pytest.raises(TypeError, match="scripted"):
        guided_backprop(scripted, x, 3)


def test_methods_refuse_a_context_of_another(vgg):
    model, x = vgg
    for method in (gradient, deconvnet, guided_backprop):
        with pytest.raises(AssertionError, match="`context_builder` must be"):
            method(model, x, 3, context_builder=lambda: ReLUContext(OldGuided))
    with pytest.raises(TypeError):
        grad_cam(model, x, 3)


# -- cotangents, maps, modules


def test_backward_gradient_forms():
    y = torch.zeros(2, 3, 2, 2)
    one = torch.zeros_like(y)
    one[:, 1] = 1
    for target in (1, [1], [1, 1], torch.tensor(1), torch.tensor([1, 1]), torch.tensor([1, 1]).numpy(), (1, 1)):
        assert torch.equal(get_backward_gradient(y, target), one)
    cotangent = torch.randn_like(y)
    assert get_backward_gradient(y, cotangent) is cotangent
    for wrong in (torch.ones(2), 3, [0, 1, 2]):
        with pytest.raises(ValueError, match=r"must (be|lie)"):
            get_backward_gradient(y, wrong)
    with pytest.raises(ValueError, match="no class axis"):
        get_backward_gradient(torch.zeros(3), 1)
    get_backward_gradient(y, 1).add_(1)  # a tensor of its own


def test_pointing_gradient():
    z = torch.tensor([[0.0, 1.0, 2.0]])
    assert get_pointing_gradient(z, 2).tolist() == [[0, 0, 1]]
    assert torch.allclose(get_pointing_gradient(z, 1, normalize=False), torch.tensor([[0, torch.e, 0]]))
    big = torch.full((1, 2, 2, 2), 1e4)
    assert torch.allclose(get_pointing_gradient(big, 0)[:, 0], torch.full((1, 2, 2), 0.25))  # no overflow
    for y, c in ((torch.zeros(2, 3), 1), (torch.zeros(1, 3, 2), 1), (z, torch.tensor(1)), (z, 3)):
        with pytest.raises(AssertionError):
            get_pointing_gradient(y, c)


def test_resize():
    x, map = torch.zeros(1, 3, 12, 20), torch.randn(1, 1, 6, 5)
    assert resize_saliency(x, map, False, "bilinear") is map
    assert resize_saliency(x, map, True, "bilinear").shape == (1, 1, 12, 20)
    assert resize_saliency(x, map, (20, 12), "bilinear").shape == (1, 1, 12, 20)  # (width, height)
    expected = F.interpolate(map, (12, 20), mode="bilinear", align_corners=False)
    assert torch.allclose(resize_saliency(x, map, [20, 12], "bilinear"), expected)
    assert torch.equal(resize_saliency(x, map, True, "nearest"), F.interpolate(map, (12, 20), mode="nearest"))
    with pytest.warns(PullbackWarning, match=r"reads it as \(width, height\)"):
        assert resize_saliency(x, map, x.shape[2:], "bilinear").shape == (1, 1, 20, 12)
    assert resize_saliency(x, map, torch.Size([7, 7]), "bilinear").shape == (1, 1, 7, 7)
    for wrong in (None, 12):
        with pytest.raises(AssertionError, match="`resize` must be"):
            resize_saliency(x, map, wrong, "bilinear")


def test_get_module(vgg):
    model, _ = vgg
    assert get_module(model, "") is model
    assert get_module(model, "5") is model[5]
    assert get_module(model, model[5]) is model[5]
    assert get_module(model, "nothing") is None


def test_gradient_is_needed():
    with pytest.raises(ValueError, match="no `grad`"):
        gradient_to_saliency(torch.zeros(1, 2, 3, 3))


# -- probes


def test_probe_input_and_output(vgg):
    model, x = vgg
    probes = Probe(model[5], target="input"), Probe(model[5], target="output"), Probe(model[5])
    model(x)[0, 3].backward()
    assert torch.allclose(probes[0].data[0], load("vgg").model()[:5](x))
    assert torch.allclose(probes[1].data[0], load("vgg").model()[:6](x))
    assert probes[2].target == "input"
    assert torch.allclose(probes[2].data[0].grad, probes[0].data[0].grad)
    for probe in probes:
        probe.remove()
        probe.remove()
    assert not model[5]._forward_hooks
    assert not model[5]._forward_pre_hooks


def test_probe_takes_inplace_off_while_it_is_there(vgg):
    model, x = vgg
    probe = Probe(model[1], target="output")
    assert probe.inplace is True
    assert model[1].inplace is False
    probe.remove()
    assert model[1].inplace is True
    with pytest.raises(AssertionError, match="`target` must be"):
        Probe(model[1], target="sideways")
    assert model[1].inplace is True
    with pytest.raises(AssertionError, match="`module` must be"):
        Probe("1")  # pyright: ignore


def test_a_probe_that_nobody_holds_goes(vgg):
    model, x = vgg
    probe = Probe(model[1], target="output")
    known = weakref.ref(probe)
    model(x)
    del probe
    gc.collect()
    assert known() is None
    assert model[1].inplace is True
    assert not model[1]._forward_hooks


def test_contrast(vgg):
    model, x = vgg
    unprobed = copy.deepcopy(model)
    plain = Probe(model[5], target="output")
    model(x)[0, 3].backward()
    g = plain.data[0].grad
    below = Probe(model[2], target="output")
    other = torch.randn_like(g)
    plain.contrast = [other]
    for clamp in (False, True):
        plain.non_negative_contrast = clamp
        model(x)[0, 3].backward()
        passed = (g - other).clamp(min=0) if clamp else g - other
        h = unprobed[:3](x).detach().requires_grad_()
        (expected,) = torch.autograd.grad(unprobed[3:6](h * 1), h, passed)
        assert torch.allclose(below.data[0].grad, expected, atol=1e-7)
    plain.contrast = [other[:1]]
    with pytest.raises(ValueError, match="`contrast` must have the shape"):
        model(x)[0, 3].backward()


def test_probes_on_what_holds_no_floating_point():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.lstm, self.head = nn.Embedding(5, 4), nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 2)

        def forward(self, tokens, mask=None):
            h, _ = self.lstm(self.embedding(tokens))
            return {"logits": self.head(h[:, -1]), "mask": mask}

    model, tokens = Text(), torch.tensor([[1, 2, 3]])
    probes = attach_debug_probes(model, debug=True)
    assert attach_debug_probes(model) is None
    model(tokens)["logits"][0, 1].backward()
    assert torch.equal(probes[""].data[0], tokens)
    assert probes["embedding"].data[0].grad.abs().sum() > 0
    assert len(probes["lstm"].data) == 2
    probe = Probe(model, target="output")
    out = model(tokens)
    assert set(out) == {"logits", "mask"}
    out["logits"][0, 0].backward()
    assert probe.data[0].grad.tolist() == [[1, 0]]


@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict, namedtuple("Out", "a b"), list])
def test_probes_keep_what_kind_of_thing_a_module_gives(kind):
    class Two(nn.Module):
        def forward(self, x):
            pair = {"a": x * 2, "b": None}
            return kind(pair.values()) if kind is list else kind(**pair)

    model, x = Two(), torch.ones(2)
    probe = Probe(model, target="output")
    out = model(x)
    assert type(out) is kind
    first = out[0] if isinstance(out, tuple | list) else out["a"]
    first.sum().backward()
    assert probe.data[0].grad.tolist() == [1, 1]
    assert probe.data[1] is None


def test_probes_of_the_caller_work_inside_the_driver(vgg):
    model, x = vgg
    probe = Probe(model[8], target="output")
    saliency(model, x, 3, "5")
    assert type(probe.data[0].detach().numpy()).__name__ == "ndarray"
    assert probe.data[0].grad.abs().sum() > 0


# -- patches


def test_patches_are_undone_in_any_order():
    original = torch.tanh
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1)):
        functions = [lambda x, i=i: i for i in range(3)]
        patches = [Patch("torch.tanh", f) for f in functions]
        left = {0, 1, 2}
        assert patches[0].orig_callable is original
        for i in order:
            assert torch.tanh is functions[max(left)]
            patches[i].remove()
            patches[i].remove()
            left.remove(i)
        assert torch.tanh is original


def test_a_patch_of_what_is_not_there(recwarn):
    with pytest.raises(AttributeError):
        Patch("torch.no_such_name", print)
    with pytest.raises(ImportError):
        Patch("no_such_package.name", print)
    with pytest.raises(AssertionError, match="`target` must read"):
        Patch("torch", print)
    gc.collect()
    assert Patch.resolve("torch.nn.functional.relu") == (F, "relu")
    assert Patch.resolve("torch.Tensor.relu") == (torch.Tensor, "relu")


def test_a_forgotten_patch_goes():
    original = torch.tanh
    patch = Patch("torch.tanh", lambda x: 0)
    assert (patch.target, patch.attribute) == (torch, "tanh")
    del patch
    gc.collect()
    assert torch.tanh is original


def test_nothing_patches_torch(vgg):
    model, x = vgg
    originals = torch.relu, torch.relu_, F.relu, F.linear, F.conv2d
    for context in (NullContext(), GuidedBackpropContext(), ReLUContext(OldGuided)):
        with context:
            assert (torch.relu, torch.relu_, F.relu, F.linear, F.conv2d) == originals
    with pytest.raises(ZeroDivisionError), GuidedBackpropContext():
        raise ZeroDivisionError
    h = torch.tensor([0.0], requires_grad=True)
    assert torch.autograd.grad(torch.relu(h), h)[0].tolist() == [0]
    with pytest.raises(AssertionError, match=r"must be a torch\.autograd\.Function"):
        ReLUContext(torch.relu)


def test_public_names():
    assert sorted(common.__all__) == sorted(
        "attach_debug_probes get_backward_gradient get_module get_pointing_gradient gradient_to_saliency NullContext "
        "Patch Probe ReLUContext resize_saliency saliency".split()
    )


@pytest.mark.parametrize("builder", [NullContext, GuidedBackpropContext, lambda: ReLUContext(OldGuided)])
def test_a_layer_that_works_in_place(vgg, builder):
    model, x = vgg
    twin = copy.deepcopy(model)
    for module in twin:
        if isinstance(module, nn.ReLU):
            module.inplace = False
    expected = saliency(twin, x, 3, "1", context_builder=builder)
    assert torch.allclose(saliency(model, x, 3, "1", context_builder=builder), expected, atol=1e-9)
    probe = Probe(model[1], target="output")
    with builder():
        model(x)[:, 3].sum().backward()
    assert torch.allclose(gradient_to_saliency(probe.data[0]), expected, atol=1e-9)


class SharedInPlace(nn.Module):
    """A skip that shares the tensor which an in-place ReLU writes to: the skip carries the rectified tensor."""

    def __init__(self):
        super().__init__()
        self.stem, self.act, self.body = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        h = self.stem(x)
        b = self.body(self.act(h))
        return (h + b).mean((2, 3))


@pytest.mark.parametrize("builder", [NullContext, lambda: ReLUContext(OldGuided)], ids=["functional", "autograd"])
def test_an_in_place_layer_whose_tensor_is_shared(builder):
    model, x = SharedInPlace().eval(), torch.randn(2, 3, 6, 6)
    h = model.stem(x).relu().detach().requires_grad_()
    (h + model.body(h)).mean((2, 3))[:, 1].sum().backward()
    assert torch.allclose(saliency(model, x, 1, "act", context_builder=builder), gradient_to_saliency(h), atol=1e-7)
