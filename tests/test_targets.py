"""Many targets of a model with a head that is worth going round: each way gives what a loop over targets gives."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pullback import Layer, grad_cam, gradient, guided_backprop, over_targets, params_of
from pullback._core.many.state import LARGE_HEAD_NUMEL

WIDTH, CLASSES = 40, 450
X = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Headed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, WIDTH, 3, padding=1), nn.ReLU()
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.act(self.conv(x))).flatten(1))


class OwnWeight(Headed):
    """The weight of its head depends on the input: the head's input is not all that the output depends on."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.pool(self.act(self.conv(x))).flatten(1)
        return F.linear(h, self.head.weight * (1 + h.sum()), self.head.bias)


METHODS = {
    "gradient": (gradient, {}),
    "guided_backprop": (guided_backprop, {}),
    "gradient at a layer": (gradient, {"layer": "conv"}),
    "gradient at the head's input": (gradient, {"layer": Layer("head", at="input")}),
    "gradient at the head's output": (gradient, {"layer": "head"}),
    "grad_cam": (grad_cam, {"layer": "act"}),
}
TARGETS = {
    "a few": torch.tensor([3, 0, 449, 3]),
    "more than the head is wide": torch.arange(CLASSES),
    "one for each example": torch.stack([torch.arange(60), torch.arange(60).flip(0)], 1),
    "cotangents": torch.randn(5, 2, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(2)),
    "many cotangents": torch.randn(90, 2, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(3)),
}


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, Headed) for name in METHODS] + [(name, OwnWeight) for name in METHODS if "head's" not in name],
)
def test_many_targets_give_what_a_loop_gives(name, kind, targets):
    method, options = METHODS[name]
    model = kind().double()
    assert model.head.weight.numel() >= LARGE_HEAD_NUMEL
    params = params_of(model)
    loop = torch.stack([method(params, model, X, target, **options) for target in targets])
    for chunk_size in ("auto", 7):
        many = over_targets(method, chunk_size=chunk_size)(params, model, X, targets, **options)
        torch.testing.assert_close(many, loop)


def test_a_class_out_of_range_among_many_is_an_error():
    model = Headed().double()
    with pytest.raises(ValueError, match="449"):
        over_targets(gradient)(params_of(model), model, X, [0, CLASSES])


def test_the_derivative_of_many_explanations():
    model = Headed().double()
    params = params_of(model)
    targets = torch.arange(60)

    def total(weight: Tensor, explain) -> Tensor:
        return explain({**params, "head.weight": weight}).square().sum()

    def loop(p) -> Tensor:
        return torch.stack([gradient(p, model, X, target) for target in targets])

    weight = params["head.weight"]
    ours = torch.func.grad(total)(weight, lambda p: over_targets(gradient)(p, model, X, targets))
    torch.testing.assert_close(ours, torch.func.grad(total)(weight, loop))


@pytest.mark.parametrize("chunk_size", ["auto", 2, None])
def test_the_derivative_by_cotangents(chunk_size):
    model = Headed().double()
    params = params_of(model)
    by = torch.randn(6, 2, CLASSES, dtype=torch.float64, requires_grad=True)

    def derivative(explained: Tensor) -> Tensor:
        return torch.autograd.grad(explained.pow(3).sum(), by)[0]

    loop = derivative(torch.stack([gradient(params, model, X, cotangent) for cotangent in by]))
    many = over_targets(gradient, chunk_size=chunk_size)(params, model, X, by)
    torch.testing.assert_close(derivative(many), loop)


@pytest.mark.parametrize("count", [5, CLASSES])
def test_autocast_leaves_the_precision_of_a_loop(count):
    model, x, targets = Headed(), X.float(), torch.arange(count)
    params = params_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        loop = torch.stack([gradient(params, model, x, target) for target in targets])
        many = over_targets(gradient)(params, model, x, targets)
    assert many.dtype == loop.dtype == torch.float32
    torch.testing.assert_close(many, loop, rtol=0, atol=0.02 * float(loop.abs().max()))
