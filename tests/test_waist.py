"""A pull that is cut in two, so that more targets go together through late layers, gives what a loop gives."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pullback import Layer, grad_cam, gradient, guided_backprop, integrated_gradients, lrp, over_targets, params_of
from pullback._core.many.pulls import _between, _vectorised
from pullback._torch.internals import bare

CLASSES = 12
X = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Narrowing(nn.Module):
    """Early layers put out 16 times what late ones do."""

    def __init__(self, classes: int = CLASSES):
        super().__init__()
        torch.manual_seed(0)
        self.early, self.act = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(inplace=True)
        self.pool, self.late = nn.MaxPool2d(4), nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(256, classes)
        self.double().eval()

    def bottleneck(self, x: Tensor) -> Tensor:
        return self.pool(self.act(self.early(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.late(self.bottleneck(x)).flatten(1))


class Skips(Narrowing):
    """What comes early reaches the output another way too."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.early(x))
        return self.head(self.late(self.pool(h)).flatten(1)) + h.mean() * torch.arange(CLASSES)


class SkipsFromTheInput(Narrowing):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean((1, 2, 3))[:, None] * torch.arange(CLASSES)


class Splits(Narrowing):
    """Of two parts of one operation one goes round the other."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.bottleneck(x).split(8, 1)
        return self.head(self.late(torch.cat([a, a.sin()], 1)).flatten(1)) + b.mean((1, 2, 3))[:, None]


class Hooked(Narrowing):
    """A hook of the forward's own changes the derivative where the waist would be: everywhere that is small."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.bottleneck(x)
        if h.requires_grad:
            h.register_hook(lambda g: 2 * g)
        return self.head(self.late(h).flatten(1))


class Writes(Narrowing):
    """The waist is written to after it was made."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.bottleneck(x)
        h *= 2
        h[:, 3] = h[:, 4]
        return self.head(self.late(h + 1).flatten(1))


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Let the budget hold the cotangents of one target through early layers, and of 16 through late ones."""
    largest = 2 * 16 * 16 * 16 * 8
    for module in ("state", "shortcuts", "copies"):
        monkeypatch.setattr(f"pullback._core.many.{module}.COTANGENT_BYTES", (4 * largest, 4 * largest))


@pytest.fixture
def cuts(monkeypatch):
    """Tell the waist of each part of a pull."""
    met: list[Tensor] = []
    between = _between

    def noted(output: Tensor, tensor: Tensor, cotangent: Tensor):
        met.append(tensor)
        return between(output, tensor, cotangent)

    monkeypatch.setattr("pullback._core.many.pulls._between", noted)
    return met


METHODS = {
    "gradient": (gradient, {}),
    "guided_backprop": (guided_backprop, {}),
    "grad_cam": (grad_cam, {"layer": "early"}),
    "integrated_gradients": (integrated_gradients, {"steps": 3}),
    "lrp": (lrp, {}),
}
TARGETS = {
    "one": torch.arange(CLASSES),
    "one for each example": torch.stack([torch.arange(CLASSES), torch.arange(CLASSES).flip(0)], 1),
    "cotangents": torch.randn(7, 2, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(2)),
}


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("name", METHODS)
def test_cut_in_two_it_is_what_a_loop_gives(name, targets, cuts):
    method, options = METHODS[name]
    model = Narrowing()
    params = params_of(model)
    loop = torch.stack([method(params, model, X, target, **options) for target in targets])
    many = over_targets(method)(params, model, X, targets, **options)
    torch.testing.assert_close(many, loop)
    assert {tuple(bottleneck.shape[1:]) for bottleneck in cuts} == {(16, 4, 4)}


@pytest.mark.parametrize("kind", [Skips, SkipsFromTheInput, Splits, Hooked, Writes])
def test_no_way_goes_round_a_waist(kind, cuts):
    model, targets = kind(), torch.arange(CLASSES)
    params = params_of(model)
    loop = torch.stack([gradient(params, model, X, target) for target in targets])
    torch.testing.assert_close(over_targets(gradient)(params, model, X, targets), loop)
    if kind in (Skips, SkipsFromTheInput):
        assert not cuts


@pytest.mark.parametrize("layer", ["late", "late.0", "pool", "act"])
def test_neurons_of_a_layer(layer, cuts):
    model, output = Narrowing(), Layer(layer)
    params = params_of(model)

    def both(params, model, x, target):  # the second pull must know nothing of the first one's forward
        whole = gradient(params, model, x, target)
        return whole, gradient(params, model, x, target, output=output)

    loop = torch.stack([both(params, model, X, target)[1] for target in range(CLASSES)])
    many = over_targets(both)(params, model, X, torch.arange(CLASSES))
    torch.testing.assert_close(many[1], loop)


def test_from_the_rows_of_a_head(cuts, monkeypatch):
    monkeypatch.setattr("pullback._core.many.shortcuts.LARGE_HEAD_NUMEL", 1)
    model, targets = Narrowing(), torch.arange(CLASSES)
    params = params_of(model)
    loop = torch.stack([gradient(params, model, X, target) for target in targets])
    torch.testing.assert_close(over_targets(gradient)(params, model, X, targets), loop)
    assert cuts


def test_a_class_that_cannot_be_read_and_is_none_gives_nan(cuts):
    model, targets = Narrowing(), torch.tensor([3, 0, 1, 2, 5, 4])

    def other(params, model, x, target):
        return gradient(params, model, x, target + CLASSES - 5)

    many = over_targets(other)(params_of(model), model, X, targets)
    assert cuts
    assert many[4].isnan().all()
    assert not many[[0, 1, 2, 3, 5]].isnan().any()


def test_the_derivative_by_cotangents(cuts):
    model, params = Narrowing(), params_of(Narrowing())
    by = torch.randn(6, 2, CLASSES, dtype=torch.float64, requires_grad=True)

    def of(explained: Tensor) -> Tensor:
        return torch.autograd.grad(explained.pow(3).sum(), by)[0]

    loop = of(torch.stack([gradient(params, model, X, cotangent) for cotangent in by]))
    torch.testing.assert_close(of(over_targets(gradient)(params, model, X, by)), loop)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, None])
def test_a_chunk_is_no_larger_than_was_asked(chunk_size, cuts, monkeypatch):
    sizes = []
    vectorised = _vectorised

    def noted(one):
        many = vectorised(one)

        def counted(*stacked):
            sizes.append(len(stacked[0]))
            return many(*stacked)

        return counted

    monkeypatch.setattr("pullback._core.many.pulls._vectorised", noted)
    model, targets = Narrowing(), torch.arange(CLASSES)
    over_targets(gradient, chunk_size=chunk_size)(params_of(model), model, X, targets)
    assert max(sizes, default=0) <= (chunk_size or CLASSES)
    assert bool(cuts) == (chunk_size in (2, 3))


def test_memory_is_that_of_a_chunk():
    """The cotangents of early layers, 16 times those of late ones, are held one target at a time."""
    largest = 0

    class Watched(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, g):
            nonlocal largest
            largest = max(largest, bare(g).numel())
            return g

    class Observed(Narrowing):
        def bottleneck(self, x: Tensor) -> Tensor:
            return self.pool(Watched.apply(F.relu(self.early(x))))

    model = Observed()
    over_targets(gradient)(params_of(model), model, X, torch.arange(CLASSES))
    assert largest == 2 * 16 * 16 * 16
