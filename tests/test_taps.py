"""Reading and perturbing layers: parts of outputs, calls of a reused layer, the shape probe and its cache."""

import warnings

import pytest
import slow
import torch
from cases import BY_NAME, CASES
from torch import Tensor, nn
from torch.nn import functional as F

from pullback import activation, grad_cam, gradient, input_x_gradient, layers, params_of

TARGET = [1, 3]


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_activation_is_what_the_layer_put_out_then(case):
    """Before anything downstream overwrote it."""
    model = case.model()
    target = TARGET if case.targets else None
    for layer in case.layers:
        [(expected, _)] = slow.at_layer(case.twin(), case.call, case.x, target, layer)
        close(activation(params_of(model), model, case.x, layer=layer), expected)


# ---- a layer that is called several times -------------------------------------------------------------------------


class Twice(nn.Module):
    """One convolution, called twice on one size."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.head = nn.Linear(2, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(torch.tanh(self.conv(x)))).mean((2, 3)))


def test_each_call_of_a_layer_can_be_chosen_and_together_they_add_up():
    model, x = Twice().double().eval(), BY_NAME["F.relu"].x
    params = params_of(model)
    pairs = slow.at_layer(model, lambda model, x: model(x), x, 1, "conv")
    for k, (seen, g) in enumerate(pairs):
        close(gradient(params, model, x, 1, layer=f"conv#{k}"), g)
        close(activation(params, model, x, layer=f"conv#{k}"), seen)
    close(gradient(params, model, x, 1, layer="conv"), pairs[0][1] + pairs[1][1])
    close(input_x_gradient(params, model, x, 1, layer="conv"), sum(seen * g for seen, g in pairs))  # type: ignore[arg-type]


def test_the_summed_gradient_is_that_of_a_shift_which_all_calls_share():
    model, x = Twice().double().eval(), BY_NAME["F.relu"].x
    way = torch.randn(2, 2, 6, 6, dtype=torch.float64)

    def shifted(t: Tensor) -> Tensor:
        with torch.no_grad():
            h = torch.tanh(model.conv(x) + t * way)
            return model.head(torch.tanh(model.conv(h) + t * way).mean((2, 3)))[:, 1].sum()

    numeric = slow.derivative(shifted, torch.zeros((), dtype=torch.float64))
    ours = (gradient(params_of(model), model, x, 1, layer="conv") * way).sum()
    torch.testing.assert_close(ours, numeric)


def test_calls_of_different_shapes_must_be_chosen():
    case = BY_NAME["called twice"]
    model = case.model()
    params = params_of(model)
    with pytest.raises(ValueError, match=r"`conv`.*`conv#0`"):
        gradient(params, model, case.x, 1, layer="conv")
    pairs = slow.at_layer(case.twin(), case.call, case.x, TARGET, "conv")
    for k, (seen, g) in enumerate(pairs):
        close(gradient(params, model, case.x, TARGET, layer=f"conv#{k}"), g)
        close(grad_cam(params, model, case.x, TARGET, layer=f"conv#{k}"), slow.grad_cam(seen, g))
    with pytest.raises(ValueError, match=r"`conv#2`.*2 times"):
        gradient(params, model, case.x, 1, layer="conv#2")


def test_the_two_names_of_a_shared_module_mean_all_its_calls():
    case = BY_NAME["shared linear"]
    model = case.model()
    params = params_of(model)
    pairs = slow.at_layer(case.twin(), case.call, case.x, TARGET, "first")
    assert len(pairs) == 2
    for name in ("first", "second"):
        close(gradient(params, model, case.x, TARGET, layer=name), pairs[0][1] + pairs[1][1])


# ---- layers that return more than a tensor ------------------------------------------------------------------------


class Several(nn.Module):
    """Its first child returns a tuple, its second a dict, its third a tuple in a tuple."""

    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.sin(), x.cos()

    class Named(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"sine": x.sin(), "cosine": x.cos()}

    class Nested(nn.Module):
        def forward(self, x: Tensor) -> tuple[None, tuple[Tensor, Tensor]]:
            return None, (x.sin(), x.cos())

    def __init__(self):
        super().__init__()
        self.pair, self.named, self.nested = self.Pair(), self.Named(), self.Nested()
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.pair(x)
        c = self.named(a * b)
        _, (d, e) = self.nested(c["sine"] * c["cosine"])
        return self.head(d * e)


@pytest.mark.parametrize("name", ["pair", "pair:0", "pair:1", "named", "named:cosine", "named:1"])
def test_a_part_of_what_a_layer_returns(name):
    model = Several().double().eval()
    x = torch.randn(2, 6, dtype=torch.float64)
    params = params_of(model)
    child, _, part = name.partition(":")
    second = part in ("1", "cosine")

    def score(value: Tensor) -> Tensor:
        if child == "pair":
            a, b = (x.sin(), value) if second else (value, x.cos())
            c, d = (a * b).sin(), (a * b).cos()
        else:
            h = x.sin() * x.cos()
            c, d = (h.sin(), value) if second else (value, h.cos())
        return model.head((c * d).sin() * (c * d).cos())

    inside = x if child == "pair" else x.sin() * x.cos()
    at = inside.cos() if second else inside.sin()
    close(activation(params, model, x, layer=name), at)
    close(gradient(params, model, x, 1, layer=name), slow.gradient(score, at, 1))


def test_parts_that_are_not_there():
    model = Several().double().eval()
    x = torch.randn(2, 6, dtype=torch.float64)
    for name, match in (("pair:2", "`pair`"), ("named:tangent", "tangent"), ("head:1", "`head`")):
        with pytest.raises(ValueError, match=match):
            gradient(params_of(model), model, x, 1, layer=name)


# ---- the probe ----------------------------------------------------------------------------------------------------


class OnTheCpu(nn.Module):
    """Builds a constant on a fixed device, which the meta device does not get along with."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 5)
        self.real = Real()

    def forward(self, x: Tensor) -> Tensor:
        self.real.note(x)
        h = self.body(x)
        return self.head(F.softplus(h) + torch.arange(6, device="cpu"))


class Branching(OnTheCpu):
    """Looks at a value, which no probe without compute can."""

    def forward(self, x: Tensor) -> Tensor:
        self.real.note(x)
        h = self.body(x)
        return self.head(h if h.sum() > 1e6 else F.softplus(h))


class Real:
    """Counts the forwards that compute."""

    def __init__(self):
        self.count = 0

    def note(self, x: Tensor) -> None:
        self.count += x.device.type != "meta" and not isinstance(x, torch._subclasses.FakeTensor)


@pytest.mark.parametrize("make", [OnTheCpu, Branching])
def test_where_the_meta_device_does_not_serve(make):
    model = make().double().eval()
    x = torch.randn(2, 6, dtype=torch.float64)
    expected = slow.gradient(lambda h: model.head(F.softplus(h)), model.body(x).detach(), 1)
    if make is OnTheCpu:
        expected = slow.gradient(lambda h: model.head(F.softplus(h) + torch.arange(6)), model.body(x).detach(), 1)
    params = params_of(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        close(gradient(params, model, x, 1, layer="body"), expected)
    first = model.real.count
    model.real.count = 0
    assert (first, len(told)) == ((1, 0) if make is OnTheCpu else (2, 1))
    if told:
        assert "one more forward" in str(told[0].message)
    close(gradient(params, model, x, 1, layer="body"), expected)
    assert model.real.count == 1  # remembered


def test_a_remembered_shape_is_checked_against_what_comes():
    """The layer's activation depends on more than the shape of the input."""

    class Cropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 3, 3), nn.Linear(3, 5)
            self.size = {"crop": 6}

        def forward(self, x: Tensor) -> Tensor:
            crop = self.size["crop"]
            return self.head(self.conv(x[..., :crop, :crop]).tanh().mean((2, 3)))

    model = Cropping().double().eval()
    x = BY_NAME["F.relu"].x
    params = params_of(model)
    for crop in (6, 4, 5):
        model.size["crop"] = crop
        [(_, expected)] = slow.at_layer(model, lambda model, x: model(x), x, 1, "conv")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            close(gradient(params, model, x, 1, layer="conv"), expected)


def test_one_model_at_several_sizes_and_dtypes():
    case = BY_NAME["residual"]
    model = case.model()
    for size in (6, 8, 6, 7):
        x = torch.randn(1, 2, size, size, dtype=torch.float64)
        [(_, expected)] = slow.at_layer(case.twin(), case.call, x, 1, "conv1")
        close(gradient(params_of(model), model, x, 1, layer="conv1"), expected)
    low = case.model().float()
    result = gradient(params_of(low), low, case.x.float(), 1, layer="conv1")
    assert result.dtype == torch.float32


def test_the_cache_keeps_no_model_alive():
    import gc
    import weakref

    case = BY_NAME["residual"]
    model = case.model()
    gradient(params_of(model), model, case.x, 1, layer="conv1")
    layers(params_of(model), model, case.x)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_a_tap_leaves_the_backward_pass_at_the_layer():
    """What lies before the layer may have no derivative at all."""

    class NoWayBack(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x.sign()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, *cotangents):
            raise AssertionError("the backward pass went past the layer")

    class Stopped(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.second(NoWayBack.apply(self.first(x)))))  # type: ignore[arg-type]

    model = Stopped().double().eval()
    x = torch.randn(2, 6, dtype=torch.float64)
    h = model.second(model.first(x).sign()).detach()
    expected = slow.gradient(lambda h: model.head(torch.tanh(h)), h, 1)
    close(gradient(params_of(model), model, x, 1, layer="second"), expected)
