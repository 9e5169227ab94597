"""Weights laid out for many forwards: the same values, and nothing of the caller's changed."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap

from pullback import extremal_perturbation, integrated_gradients, over_targets, params_of, rise, smooth_grad
from pullback._core.batching import ACTIVATION_PER_INPUT, FORWARD_BYTES, MAX_ROWS, rows_together

STRIDES: list[tuple[int, ...]] = []  # of what the convolutions of `Net` gave, forward by forward


class Net(nn.Module):
    """Convolutions, and an end that may depend on strides."""

    def __init__(self, end: str = "flatten"):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU()
        )
        self.head, self.end = nn.Linear(8 * 25, 4), end

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        STRIDES.append(h.stride())
        if self.end == "view":
            return self.head(h.view(len(h), -1))
        if self.end == "view of rows":  # passes with one example, in any layout
            return self.head(h.view(len(h) * 8, 5, 5).reshape(len(h), -1))
        if self.end == "memory":
            return self.head(h.as_strided((len(h), 200), (200, 1)))
        if self.end == "aliased":
            h.flatten(1).mul_(2)
            return self.head(h.flatten(1))
        return self.head(h.flatten(1))


def masks_of(net: nn.Module, x: Tensor, **options) -> Tensor:
    return rise(params_of(net), net, x, 1, samples=96, grid=3, link=None, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("end", ["flatten", "view", "view of rows", "memory", "aliased"])
@pytest.mark.parametrize("batch", [1, 2])
def test_values_are_those_of_the_own_layout(end, batch, dtype, monkeypatch):
    net = Net(end).eval().to(dtype)
    x = torch.rand(batch, 3, 15, 15, generator=torch.Generator().manual_seed(1), dtype=dtype)
    found = masks_of(net, x)
    last = STRIDES[-1]
    assert (last[1] == 1) == (end == "flatten")  # laid out channels last where the model takes it
    monkeypatch.setattr("pullback._core.masked.MIN_FORWARDS", 10**9)
    torch.testing.assert_close(found, masks_of(net, x), rtol=1e-4, atol=1e-5)
    assert STRIDES[-1][1] != 1


def test_convolutions_of_a_class_of_their_own():
    """As networks have them that pad as TensorFlow does."""

    class Padded(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(nn.functional.pad(input, (0, 1, 0, 1)))

    net, x = Net().eval(), torch.rand(2, 3, 14, 14)
    own = net.body[0]
    net.body[0] = Padded(3, 8, 3, stride=2).eval()
    net.body[0].load_state_dict(own.state_dict())
    net.body[3] = nn.Identity()
    net.head = nn.Linear(8 * 49, 4)
    masks_of(net, x)
    assert STRIDES[-1][1] == 1


def test_nothing_of_the_callers_changes():
    net, x = Net().eval(), torch.rand(1, 3, 15, 15)
    params = params_of(net)
    before = {name: (id(t), t.stride(), t.clone()) for name, t in params.items()}
    rise(params, net, x, 1, samples=96, grid=3)
    assert all(id(t) == before[n][0] and t.stride() == before[n][1] for n, t in params.items())
    assert all(torch.equal(t, before[n][2]) for n, t in params.items())
    assert net.body[0].weight.is_contiguous()


def test_no_layout_is_tried_where_a_derivative_or_a_transform_looks_on():
    net, x = Net().eval(), torch.rand(2, 3, 15, 15)
    params = params_of(net)
    loop = torch.stack([masks_of(net, one[None]) for one in x])
    mapped = vmap(lambda one: masks_of(net, one[None]))(x)
    torch.testing.assert_close(mapped, loop, rtol=1e-4, atol=1e-5)
    wanted = {name: t.clone().requires_grad_(t.ndim > 1) for name, t in params.items()}
    rise(wanted, net, x, 1, samples=96, grid=3).sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in wanted.values() if t.requires_grad)


def test_targets_and_optimised_masks_on_the_layout(monkeypatch):
    net, x = Net().eval().requires_grad_(False), torch.rand(2, 3, 15, 15)
    how = {"areas": [0.2, 0.5], "iterations": 30, "step": 3, "sigma": 4.0, "levels": 3}

    def both() -> tuple[Tensor, Tensor]:
        one = extremal_perturbation(params_of(net), net, x, 1, **how)
        return one, over_targets(rise)(params_of(net), net, x, range(4), samples=64, grid=3)

    found = both()
    assert STRIDES[-1][1] == 1
    monkeypatch.setattr("pullback._core.masked.MIN_FORWARDS", 10**9)
    for a, b in zip(found, both()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_as_many_rows_as_the_budget_holds():
    cpu = torch.device("cpu")
    assert rows_together(FORWARD_BYTES[0] // 4, cpu) == 4
    assert rows_together(10 * FORWARD_BYTES[0], cpu) == 1
    assert rows_together(1, cpu) == MAX_ROWS
    assert rows_together(2**20, torch.device("cuda"), (0, 2**23)) == 8


@pytest.mark.parametrize("method", [integrated_gradients, smooth_grad])
def test_points_go_together_as_the_budget_holds_unless_asked_otherwise(method, monkeypatch):
    net, x, rows = Net().eval(), torch.rand(2, 3, 15, 15), []
    net.register_forward_pre_hook(lambda net, args: rows.append(len(args[0])))
    count = {"steps" if method is integrated_gradients else "samples": 10}

    def run(**how) -> tuple[Tensor, list[int]]:
        rows.clear()
        a = method(params_of(net), net, x, 1, **count, **how)
        return a, list(rows)

    whole, at_once = run(chunk_size=None)
    assert at_once == [20]
    assert run()[1] == [20]  # this small, all of them
    monkeypatch.setattr(
        "pullback._core.many.copies.GRADIENT_BYTES", (4 * ACTIVATION_PER_INPUT * x.numel() * x.element_size(), 0)
    )
    parts, in_parts = run()
    assert in_parts == [8, 8, 4]
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
    assert torch.vmap(lambda t: method(params_of(net), net, x, t, **count))(torch.arange(2)).shape == (2, *x.shape)
    with pytest.raises(ValueError, match="`chunk_size` must be a number, 'auto' or None, got 'some'"):
        run(chunk_size="some")


def test_masks_are_summed_many_at_once(monkeypatch):
    net, x = Net().eval(), torch.rand(2, 3, 15, 15)
    whole = over_targets(rise)(params_of(net), net, x, range(4), samples=20, grid=3, chunk_size=3)
    monkeypatch.setattr(
        "pullback.attribution.perturbation.rise.HELD_MASK_BYTES", 7 * 15 * 15 * 4
    )  # 7 masks: after chunks of 3, 9 at a time
    parts = over_targets(rise)(params_of(net), net, x, range(4), samples=20, grid=3, chunk_size=3)
    torch.testing.assert_close(parts, whole)


def test_a_word_that_is_no_chunk_size():
    with pytest.raises(ValueError, match="`chunk_size` must be a number, 'auto' or None, got 'many'"):
        masks_of(Net().eval(), torch.rand(1, 3, 15, 15), chunk_size="many")
