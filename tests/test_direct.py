"""Layers that run out of the sight of the mode give what they give in its sight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pullback import grad_cam, gradient, over_targets, params_of
from pullback._core.call import Call
from pullback._core.forward import _BATCH_NORMS
from pullback._core.module_copy import DIRECT
from pullback._ops.accounting import Account
from pullback._ops.replacements import REPLACEMENTS

# an input of each layer that runs directly
LAYERS: dict[type[nn.Module], tuple[nn.Module, tuple[int, ...]]] = {
    nn.Linear: (nn.Linear(4, 3), (2, 4)),
    nn.Conv1d: (nn.Conv1d(4, 3, 2), (2, 4, 6)),
    nn.Conv2d: (nn.Conv2d(4, 3, 2, padding=1, padding_mode="reflect"), (2, 4, 6, 6)),
    nn.Conv3d: (nn.Conv3d(4, 3, 2), (2, 4, 6, 6, 6)),
    nn.MaxPool1d: (nn.MaxPool1d(2), (2, 4, 6)),
    nn.MaxPool2d: (nn.MaxPool2d(2), (2, 4, 6, 6)),
    nn.MaxPool3d: (nn.MaxPool3d(2), (2, 4, 6, 6, 6)),
    nn.AvgPool1d: (nn.AvgPool1d(2), (2, 4, 6)),
    nn.AvgPool2d: (nn.AvgPool2d(2), (2, 4, 6, 6)),
    nn.AvgPool3d: (nn.AvgPool3d(2), (2, 4, 6, 6, 6)),
    nn.LayerNorm: (nn.LayerNorm(4), (2, 4)),
    nn.GroupNorm: (nn.GroupNorm(2, 4), (2, 4, 6)),
    nn.BatchNorm1d: (nn.BatchNorm1d(4), (2, 4, 6)),
    nn.BatchNorm2d: (nn.BatchNorm2d(4), (2, 4, 6, 6)),
    nn.BatchNorm3d: (nn.BatchNorm3d(4, affine=False), (2, 4, 6, 6, 6)),
}
for name in nn.modules.padding.__all__:
    pad = getattr(nn, name)(*(1, 0.5)[: 2 if name.startswith("Constant") else 1])
    LAYERS[type(pad)] = pad, (2, 4, *[6] * int(name[-2]))
KINDS = sorted(DIRECT, key=lambda kind: kind.__name__)


def run(params, model, x):
    return Call.bind(params, model, x).forward()


class Watching(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.met: list[object] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.met.append(func)
        return func(*args, **(kwargs or {}))


class Own(Tensor):
    """A subclass that doubles what a rectifier gives."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return 2 * result if func is F.relu else result


def of_kind(kind: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer, shape = LAYERS[kind] if kind in LAYERS else (kind(), (2, 4, 6, 6))
    for _, buffer in layer.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2)
    return layer.eval(), torch.randn(shape)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_layer_gives_the_same_and_calls_nothing_that_would_be_traded(kind):
    layer, x = of_kind(kind)
    assert torch.allclose(run({}, layer, x), layer(x), atol=1e-6)
    with Watching() as watching:
        layer(x)
    assert kind in _BATCH_NORMS or not REPLACEMENTS.keys() & set(watching.met)


def test_wrong_shapes_of_batch_norm_are_refused():
    with pytest.raises(ValueError, match="4D"):
        run({}, nn.BatchNorm2d(4), torch.randn(2, 4, 6))


def test_batch_norm_without_statistics():
    layer = nn.BatchNorm2d(4, track_running_stats=False)
    x = torch.randn(3, 4, 5, 5)
    assert torch.allclose(run({}, layer, x), layer(x), atol=1e-5)


def test_a_mode_of_the_caller_sees_every_operation():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    with Watching() as watching:
        run({}, model, torch.randn(1, 1, 5, 5))
    assert {torch.conv2d, F.relu} <= set(watching.met)


def test_a_subclass_of_tensor_keeps_its_own_way():
    class Wraps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x):
            return self.relu(x.as_subclass(Own)).as_subclass(Tensor)

    x = torch.rand(2, 3)
    assert torch.equal(run({}, Wraps(), x), 2 * x)


def test_hooks_of_layers_run():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    model[1].register_forward_hook(lambda layer, args, result: result + 1)
    x = torch.randn(4, 3)
    assert torch.equal(run({}, model, x), model(x))


def test_an_account_of_sizes_is_the_same(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5)).eval()
    x, found = torch.randn(1, 3, 5, 5), []
    note = Account.note

    def noted(account, func, args, result):
        note(account, func, args, result)
        found.append((account.largest, account.products, account.linear is not None and account.linear[2] is result))

    monkeypatch.setattr(Account, "note", noted)
    maps = over_targets(gradient)({}, model, x, range(5))
    directly, found[:] = found[-1], []
    with Watching():
        seen = over_targets(gradient)({}, model, x, range(5))
    assert found[-1] == directly
    assert torch.allclose(maps, seen, atol=1e-6)


def test_layers_are_edited_and_left_as_they_were():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    x = torch.randn(2, 3, 6, 6)
    a = grad_cam(params_of(model), model, x, 1, layer="1")
    cam = torch.einsum("c,bchw->bhw", model[4].weight[1], model[:2](x)) / 16
    assert torch.allclose(a[:, 0], cam.clamp(min=0), atol=1e-6)
    assert not any("forward" in layer.__dict__ for layer in model.modules())
