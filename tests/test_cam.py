"""Class activation maps against loops over channels and positions."""

import pytest
import slow
import slow_cam
import torch
from cases import BY_NAME, CASES
from torch.func import vmap

from pullback import (
    ablation_cam,
    cam,
    eigen_cam,
    eigen_grad_cam,
    elementwise_grad_cam,
    finer_cam,
    fused_cam,
    grad_cam,
    grad_cam_plus_plus,
    gradient,
    guided_backprop,
    guided_grad_cam,
    hires_cam,
    input_x_gradient,
    is_cam,
    layer_cam,
    linear_approx,
    maps,
    params_of,
    refine_cam,
    score_cam,
    smooth_grad_cam_plus_plus,
    ss_cam,
    xgrad_cam,
)
from pullback._torch.random import normal

METHODS = {"grad_cam": (grad_cam, slow.grad_cam), "linear_approx": (linear_approx, slow.linear_approx)}
SPATIAL = [
    (case, layer)
    for case in CASES
    for layer in case.layers
    if case.image or case.name.startswith("cnn over")
    if len(slow.layer_shapes(case.twin(), case.call, case.x)[layer][0]) > 2
]
both = pytest.mark.parametrize("method", METHODS)


def target_of(case):
    return torch.tensor([1, 3]) if case.targets else None


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12 + 1e-9 * float(theirs.abs().max()))


@both
@pytest.mark.parametrize(("case", "layer"), SPATIAL, ids=lambda part: getattr(part, "name", part))
def test_maps_are_the_definition(case, layer, method):
    ours, definition = METHODS[method]
    model = case.model()
    [(activation, g)] = slow.at_layer(case.twin(), case.call, case.x, target_of(case), layer)
    result = ours(params_of(model), model, case.x, target_of(case), layer=layer, **case.options)
    assert result.shape == (2, 1, *activation.shape[2:])
    same(result, definition(activation, g))


@both
def test_a_layer_called_twice_on_one_size_gives_the_sum_of_its_calls(method):
    """Sum over calls of activation times gradient, never the last activation times the summed gradient."""
    ours, definition = METHODS[method]
    conv = torch.nn.Conv2d(2, 2, 3, padding=1)

    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv
            self.head = torch.nn.Linear(2, 5)

        def forward(self, x):
            return self.head(torch.tanh(self.conv(torch.relu(self.conv(x)))).mean((2, 3)))

    model = Twice().double().eval()
    x = BY_NAME["F.relu"].x
    pairs = slow.at_layer(model, lambda model, x: model(x), x, 1, "conv")
    assert len(pairs) == 2
    if method == "linear_approx":
        expected = sum(definition(activation, g) for activation, g in pairs)
    else:
        weighted = [(g.mean((2, 3), keepdim=True) * activation).sum(1, keepdim=True) for activation, g in pairs]
        expected = sum(weighted).clamp(min=0)
    same(ours(params_of(model), model, x, 1, layer="conv"), expected)


@both
def test_many_targets_at_the_last_layer(method):
    ours, definition = METHODS[method]
    case = BY_NAME["vgg"]
    model, x = case.model(), case.x
    maps = vmap(lambda target: ours(params_of(model), model, x, target, layer="features.3"))(torch.arange(5))
    for target in range(5):
        [(activation, g)] = slow.at_layer(case.twin(), case.call, case.x, target, "features.3")
        same(maps[target], definition(activation, g))


def test_grad_cam_of_a_network_that_ends_in_pooling_is_cam():
    """Zhou et al. 2016: with global pooling before the last linear layer, channels are weighed by the class weights."""
    case = BY_NAME["depthwise"]
    model = case.model()
    out = grad_cam(params_of(model), model, case.x, 2, layer="project")
    [(activation, _)] = slow.at_layer(case.twin(), case.call, case.x, 2, "project")
    weights = model.head.weight[2].detach() / activation[0, 0].numel()  # type: ignore[union-attr, index, operator]
    same(out, torch.einsum("bchw,c->bhw", activation, weights).unsqueeze(1).clamp(min=0))


def test_linear_approx_sums_to_the_score_on_a_network_without_biases():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(48, 5, bias=False)
    )
    model = model.double().eval()
    x = BY_NAME["F.relu"].x
    approximation = linear_approx(params_of(model), model, x, 1, layer="0")
    torch.testing.assert_close(approximation.flatten(1).sum(1), model(x)[:, 1].detach())


@both
def test_errors(method):
    ours, _ = METHODS[method]
    case = BY_NAME["vgg"]
    model = case.model()
    with pytest.raises(TypeError, match="layer"):
        ours(params_of(model), model, case.x, 1)
    with pytest.raises(ValueError, match=r"`layer`.*spatial.*\[2, 6\]"):
        ours(params_of(model), model, case.x, 1, layer="classifier.1")
    with pytest.raises(ValueError, match=r"`features\.7`"):
        ours(params_of(model), model, case.x, 1, layer="features.7")


def test_maps_carry_no_graph_that_nobody_asked_for():
    case = BY_NAME["vgg"]
    model = case.model()
    assert not grad_cam(params_of(model), model, case.x, 1, layer="features.3").requires_grad
    assert not gradient(params_of(model), model, case.x, 1).requires_grad


# ---- the other weights --------------------------------------------------------------------------------------------

BY_GRADIENT = {
    "hires_cam": (hires_cam, slow_cam.hires_cam),
    "elementwise_grad_cam": (elementwise_grad_cam, slow_cam.elementwise_grad_cam),
    "layer_cam": (layer_cam, slow_cam.layer_cam),
    "xgrad_cam": (xgrad_cam, slow_cam.xgrad_cam),
    "grad_cam_plus_plus": (grad_cam_plus_plus, slow_cam.grad_cam_plus_plus),
    "eigen_cam": (eigen_cam, lambda a, g: slow_cam.eigen(a)),
    "eigen_grad_cam": (eigen_grad_cam, lambda a, g: slow_cam.eigen(a * g)),
}
FEW = [(case, layer) for case, layer in SPATIAL if case.name in (
    "residual", "vgg", "cnn over 1 axes", "cnn over 3 axes", "depthwise", "batch norm before tokens", "aliased skip"
)]  # fmt: skip


@pytest.mark.parametrize("method", BY_GRADIENT)
@pytest.mark.parametrize(("case", "layer"), FEW, ids=lambda part: getattr(part, "name", part))
def test_weights_are_the_definition(case, layer, method):
    ours, definition = BY_GRADIENT[method]
    model = case.model()
    [(activation, g)] = slow.at_layer(case.twin(), case.call, case.x, target_of(case), layer)
    result = ours(params_of(model), model, case.x, target_of(case), layer=layer)
    expected = torch.stack([definition(a, b) for a, b in zip(activation, g, strict=True)]).unsqueeze(1)
    torch.testing.assert_close(result, expected, rtol=1e-7, atol=1e-9 * float(expected.abs().max()) + 1e-14)


def test_smooth_grad_cam_plus_plus_averages_the_derivatives():
    case = BY_NAME["residual"]
    model, x = case.model(), case.x
    noise = [0.2 * float(part.max() - part.min()) for part in x]
    unit = normal(6, torch.arange(3), x.shape[1:], x.dtype)
    [(activation, _)] = slow.at_layer(case.twin(), case.call, x, 1, "norm2")
    noisy = [x + torch.stack([s * e for s in noise]) for e in unit]
    slopes = [slow.at_layer(case.twin(), case.call, place, 1, "norm2")[0][1] for place in noisy]
    powers = [sum(g**k for g in slopes) / 3 for k in (1, 2, 3)]
    expected = []
    for i in range(2):
        weights = [
            slow_cam.plus_plus_weight(activation[i, c], *(p[i, c] for p in powers))  # type: ignore[index]
            for c in range(activation.shape[1])
        ]
        expected.append(torch.einsum("c,chw->hw", torch.tensor(weights).double(), activation[i]).clamp(min=0))
    ours = smooth_grad_cam_plus_plus(params_of(model), model, x, 1, layer="norm2", samples=3, noise=0.2, seed=6)
    torch.testing.assert_close(ours[:, 0], torch.stack(expected), rtol=1e-6, atol=1e-12)


def test_cam_is_the_weights_of_the_head():
    case = BY_NAME["depthwise"]
    model = case.model()
    [(activation, _)] = slow.at_layer(case.twin(), case.call, case.x, 2, "project")
    expected = torch.einsum("bchw,c->bhw", activation, model.head.weight[2].detach())  # type: ignore[union-attr, index]
    for params in (params_of(model), {}, (params_of(model), {})):
        same(cam(params, model, case.x, 2, layer="project", head="head")[:, 0], expected)
    with pytest.raises(ValueError, match="has no weight"):
        cam({}, model, case.x, 2, layer="project", head="tail")
    with pytest.raises(ValueError, match="`head` names `head`, whose weight"):
        cam({}, model, case.x, 2, layer="depth", head="head")


# ---- by forwards alone --------------------------------------------------------------------------------------------


def masked(x, mask):
    return x * mask


@pytest.mark.parametrize(
    ("name", "layer"), [("residual", "norm2"), ("vgg", "features.3"), ("batch norm before tokens", "conv")]
)
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_score_ss_and_is_cam(name, layer, chunk_size):
    case = BY_NAME[name]
    model, x = case.model(), case.x
    params, chosen = params_of(model), {"layer": layer, "chunk_size": chunk_size}
    [(activation, _)] = slow.at_layer(case.twin(), case.call, x, 1, layer)
    call = case.twin()
    noise = normal(3, torch.arange(2), x.shape[2:], x.dtype)
    thick = normal(3, torch.arange(2), x.shape[1:], x.dtype)
    variations = {
        score_cam: ({}, [masked]),
        ss_cam: ({"samples": 2, "noise": 0.5, "seed": 3}, [lambda x, m, e=e: x * (m + 0.5 * e) for e in noise]),
        is_cam: ({"samples": 3}, [lambda x, m, s=s: s * x * m for s in (1 / 3, 3 / 3, 6 / 3)]),
    }
    for method, (options, varied) in variations.items():
        expected = torch.stack([slow_cam.masked_scores(call, x[i], activation[i], 1, varied) for i in range(2)])
        torch.testing.assert_close(
            method(params, model, x, 1, **chosen, **options)[:, 0], expected, rtol=1e-8, atol=1e-12
        )
    covered = ss_cam(params, model, x, 1, **chosen, samples=2, noise=0.5, seed=3, place="input")
    varied = [lambda x, m, e=e: x * m + 0.5 * e for e in thick]
    expected = torch.stack([slow_cam.masked_scores(call, x[i], activation[i], 1, varied) for i in range(2)])
    torch.testing.assert_close(covered[:, 0], expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("name", "layer"), [("residual", "norm2"), ("vgg", "features.2"), ("depthwise", "depth")])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_ablation_cam(name, layer, chunk_size):
    case = BY_NAME[name]
    model, x = case.model(), case.x
    [(activation, _)] = slow.at_layer(case.twin(), case.call, x, 1, layer)
    expected = [slow_cam.ablation_cam(case.twin(), case.call, x[i], activation[i], 1, layer) for i in range(2)]
    ours = ablation_cam(params_of(model), model, x, 1, layer=layer, chunk_size=chunk_size)
    torch.testing.assert_close(ours[:, 0], torch.stack(expected), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("method", [score_cam, ablation_cam])
def test_forwards_come_in_chunks_and_are_shared_by_targets(method):
    case = BY_NAME["residual"]
    model, x = case.model(), case.x
    seen = []
    model.stem.register_forward_pre_hook(
        lambda module, args: seen.append(len(args[0]) if args[0].device.type != "meta" else 0)
    )
    many = vmap(lambda target: method({}, model, x, target, layer="norm2", chunk_size=3))(torch.arange(5))
    assert max(seen) == 3 * len(x)
    assert sum(seen) == (4 + 1) * len(x)  # the input as it is, and four channels
    for target in range(5):
        same(many[target], method({}, model, x, target, layer="norm2"))


# ---- methods over methods -----------------------------------------------------------------------------------------


def test_finer_cam_compares_with_the_nearest_classes():
    case = BY_NAME["residual"]
    model, x = case.model(), case.x
    out = model(x).detach()
    for target in range(5):
        cotangent = torch.zeros_like(out)
        for i in range(2):
            near = sorted((c for c in range(5) if c != target), key=lambda c: float((out[i, c] - out[i, target]).abs()))
            cotangent[i, target] = 1
            cotangent[i, near[:2]] = -0.7 / 2
        expected = grad_cam({}, model, x, cotangent, layer="norm2")
        same(finer_cam({}, model, x, target, others=2, strength=0.7, layer="norm2"), expected)
    ours = finer_cam({}, model, x, 1, method=input_x_gradient)
    assert ours.shape == x.shape
    with pytest.raises(ValueError, match="`others` must lie in 1"):
        finer_cam({}, model, x, 1, others=5, layer="norm2")


def test_layers_are_fused_and_refined():
    case = BY_NAME["vgg"]
    model, x = case.model(), case.x
    params, names = params_of(model), ["features.0", "features.3"]
    found = [layer_cam(params, model, x, 1, layer=name) for name in names]
    found[1] = torch.stack([slow.resize(m, (6, 6)) for m in found[1]])
    parts = [torch.tanh(2 * m / m.amax((1, 2, 3), keepdim=True)) for m in found]
    same(fused_cam(params, model, x, 1, layers=names), torch.maximum(*parts))
    scaled = [(m - m.amin((1, 2, 3), keepdim=True)) for m in found]
    scaled = [m / m.amax((1, 2, 3), keepdim=True) for m in scaled]
    same(refine_cam(params, model, x, 1, layers=names), scaled[0] * scaled[1])
    same(refine_cam(params, model, x, 1, layers=names[:1], method=grad_cam),
         maps.normalise(grad_cam(params, model, x, 1, layer=names[0])))  # fmt: skip
    with pytest.raises(ValueError, match="`layers` must be a list"):
        fused_cam(params, model, x, 1, layers="features.0")


def test_guided_grad_cam_is_the_product():
    case = BY_NAME["vgg"]
    model, x = case.model(), case.x
    map = grad_cam({}, model, x, 1, layer="features.3")
    fine = guided_backprop({}, model, x, 1)
    for mode in ("bilinear", "nearest"):
        expected = fine * torch.stack([slow.resize(m, (6, 6), mode) for m in map])
        same(guided_grad_cam({}, model, x, 1, layer="features.3", resize_mode=mode), expected)
    own = guided_grad_cam({}, model, x, 1, layer="features.0", method=gradient, map_method=layer_cam)
    same(own, gradient({}, model, x, 1) * layer_cam({}, model, x, 1, layer="features.0"))


# ---- tokens -------------------------------------------------------------------------------------------------------


class Patches(torch.nn.Module):
    """A vision transformer without attention: patches, a class token before or after them, or channels last."""

    def __init__(self, order):
        super().__init__()
        self.patch = torch.nn.Conv2d(3, 10, 2, 2)
        self.token = torch.nn.Parameter(torch.randn(1, 1, 10))
        self.body, self.head = torch.nn.Linear(10, 10), torch.nn.Linear(10, 5)
        self.order = order

    def forward(self, x):
        h = self.patch(x)
        if self.order == "last":
            return self.head(torch.tanh(self.body(h.movedim(1, 3))).mean((1, 2)))
        h = h.flatten(2).transpose(1, 2)
        if self.order == "class":
            h = torch.cat([self.token.expand(len(h), -1, -1), h], 1)
        return self.head(torch.tanh(self.body(h)).mean(1))


@pytest.mark.parametrize(("order", "given"), [("plain", (3, 4)), ("class", (3, 4)), ("last", "channels_last")])
def test_tokens_are_laid_out(order, given):
    model = Patches(order).double().eval()
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    [(activation, g)] = slow.at_layer(model, lambda model, x: model(x), x, 1, "body")

    def grid(tokens):
        if order == "last":
            return tokens.permute(0, 3, 1, 2)
        return tokens[:, -12:].reshape(2, 3, 4, 10).permute(0, 3, 1, 2)

    expected = slow.grad_cam(grid(activation), grid(g))
    for tokens in (None, given, grid):
        same(grad_cam({}, model, x, 1, layer="body", tokens=tokens), expected)
        for method, options in ((score_cam, {}), (ablation_cam, {}), (eigen_cam, {}), (layer_cam, {})):
            assert method({}, model, x, 1, layer="body", tokens=tokens, **options).shape == (2, 1, 3, 4)
    with pytest.raises(ValueError, match="`tokens` must be None"):
        grad_cam({}, model, x, 1, layer="body", tokens="rows")


def test_ablation_of_tokens_leaves_channels_out():
    model = Patches("class").double().eval()
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    [(activation, _)] = slow.at_layer(model, lambda model, x: model(x), x, 1, "body")
    whole = model(x)[:, 1]
    weights = []
    for c in range(10):
        kept = activation.clone()
        kept[..., c] = 0
        weights.append((whole - model.head(torch.tanh(kept).mean(1))[:, 1]) / whole)
    grid = activation[:, 1:].reshape(2, 3, 4, 10)
    expected = torch.einsum("cb,bhwc->bhw", torch.stack(weights), grid).clamp(min=0).detach()
    same(ablation_cam({}, model, x, 1, layer="body")[:, 0], expected)


def test_autocast_leaves_the_precision_of_components():
    """The layer is in float32 there too: products of its activation are not rounded to half of that."""
    model = torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(45, 3)).eval()
    x = torch.randn(2, 5, 3, 3)
    expected = eigen_cam(params_of(model), model, x, 1, layer="0")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(eigen_cam(params_of(model), model, x, 1, layer="0"), expected)
