"""Class activation maps against loops over channels and positions."""

import pytest
import slow
import torch
from cases import BY_NAME, CASES
from torch.func import vmap

from pullback import grad_cam, gradient, linear_approx, params_of

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
