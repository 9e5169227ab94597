"""FullGrad against plain autograd on a network whose biases are leaves at every position."""

import pytest
import slow
import torch
from cases import BY_NAME, CASES
from torch.nn import functional as F

from pullback import full_grad, params_of

PRODUCTS = {"batch norm before tokens", "instance norm before tokens", "depthwise"}
CONSTANTS = {"buffers", "tapped then in place", "hooks of the user", "two inputs", "keyword inputs"}
SINGLE = [case for case in CASES if case.image and case.name not in PRODUCTS | CONSTANTS]


@pytest.mark.parametrize("case", SINGLE, ids=lambda case: case.name)
def test_input_and_biases_make_up_the_score(case):
    model = case.model()
    _, info = full_grad(params_of(model), model, case.x, torch.tensor([1, 3]), return_info=True, **case.options)
    same = torch.zeros(2, dtype=torch.float64)
    torch.testing.assert_close(info["convergence_delta"], same, rtol=0, atol=1e-12)
    assert len(info["biases"]) > 0


def test_shares_and_map_are_the_definition():
    """Convolution, batch norm, ReLU6 and classifier, each with its bias written as a tensor of its own."""
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU6(), torch.nn.Flatten())
    model = torch.nn.Sequential(net, torch.nn.Linear(64, 5)).double().eval()
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    torch.nn.init.normal_(net[1].bias)
    x = 9 * torch.randn(2, 2, 6, 6, dtype=torch.float64)
    _, info = full_grad(params_of(model), model, x, 3, return_info=True)
    conv, norm, head = net[0], net[1], model[1]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias - norm.running_mean * scale
    h = F.conv2d(x, conv.weight)
    conv_bias = conv.bias.detach().reshape(1, 4, 1, 1).expand_as(h).clone().requires_grad_()
    norm_bias = shift.detach().reshape(1, 4, 1, 1).expand_as(h).clone().requires_grad_()
    y = (h + conv_bias) * scale.reshape(1, 4, 1, 1) + norm_bias
    cut = 6.0 * (y > 6).double()
    cut.requires_grad_()
    y = torch.where((y > 0) & (y < 6), y, 0) + cut
    out = head(y.flatten(1))[:, 3].sum()
    tree = [conv_bias, norm_bias, cut]
    expected = [b.detach() * g for b, g in zip(tree, torch.autograd.grad(out, tree), strict=True)]
    assert float(cut.detach().sum()) > 0
    for ours, theirs in zip(info["biases"], expected, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(info["biases"][3].sum(1), head.bias[3].detach().expand(2))
    torch.testing.assert_close(info["input"], slow.input_x_gradient(model, x, 3), rtol=1e-9, atol=1e-12)
    map = full_grad(params_of(model), model, x, 3)
    parts = []
    for share in (info["input"], *expected):
        low, high = (f(share.abs(), (1, 2, 3), keepdim=True) for f in (torch.amin, torch.amax))
        scaled = ((share.abs() - low) / (high - low)).sum(1, keepdim=True)
        parts.append(torch.stack([slow.resize(m, (6, 6)) for m in scaled]))
    torch.testing.assert_close(map, sum(parts), rtol=1e-9, atol=1e-12)


def test_errors():
    model = BY_NAME["gelu mlp"].model()
    with pytest.raises(TypeError, match="`x` must be one tensor with spatial axes"):
        full_grad({}, model, BY_NAME["gelu mlp"].x, 1)
