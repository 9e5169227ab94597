"""Tiny float64 models, each with one trap for a library that explains models it did not write.

A `Case` builds its model afresh at every call of `case.model()`, always with the same weights, so a test may change
what it likes. Weights are random (no trained kink sits at zero), running statistics too, and the model comes in eval
mode.

`case.twin(rectify)` is the same network, written by hand so that ordinary autograd is right on it: out of place, with
`rectify(h, high)` in place of every rectifier (`high` is infinite, or where the rectifier saturates), and with batch
norm spelled out where torch's own backward cannot be trusted. It shares the layer names and loads the same weights.
Where a model has no trap for autograd and no rectifier, its twin is another copy of it.
"""

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import relu as relu_imported_beforehand
from torch.utils.checkpoint import checkpoint

CLASSES = 5
INFINITE = math.inf

Rectify = Callable[[Tensor, float], Tensor]


def rectified(h: Tensor, high: float = INFINITE) -> Tensor:
    """The rectifier itself, the plain way."""
    return torch.where(h > 0, torch.where(h < high, h, torch.full_like(h, high)), torch.zeros_like(h))


class Rectifier(nn.Module):
    """A rectifier that goes by the name of the module whose place it takes."""

    def __init__(self, rectify: Rectify, high: float = INFINITE):
        super().__init__()
        self.rectify, self.high = rectify, high

    def forward(self, h: Tensor) -> Tensor:
        return self.rectify(h, self.high)


class Affine(nn.Module):
    """Eval batch norm, or instance norm with running statistics, as the affine map that it is."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, h: Tensor) -> Tensor:
        def shaped(v: Tensor) -> Tensor:
            return v.reshape(-1, *[1] * (h.ndim - 2))

        unit = (h - shaped(self.running_mean)) / (shaped(self.running_var) + 1e-5).sqrt()
        return unit * shaped(self.weight) + shaped(self.bias)


# ---- every spelling of a rectifier --------------------------------------------------------------------------------


def relu_statement(h: Tensor) -> Tensor:
    h.relu_()
    return h


def clamp_statement(h: Tensor) -> Tensor:
    h.clamp_(min=0)
    return h


def functional_statement(h: Tensor) -> Tensor:
    F.relu(h, inplace=True)
    return h


def threshold_statement(h: Tensor) -> Tensor:
    torch.threshold_(h, 0, 0)
    return h


SPELLINGS: dict[str, tuple[Callable[[], Callable[[Tensor], Tensor]], float]] = {
    "F.relu": (lambda: lambda h: F.relu(h), INFINITE),
    "F.relu inplace": (lambda: functional_statement, INFINITE),
    "F.relu_": (lambda: lambda h: F.relu_(h), INFINITE),
    "torch.relu": (lambda: lambda h: torch.relu(h), INFINITE),
    "torch.relu_": (lambda: lambda h: torch.relu_(h), INFINITE),
    "h.relu()": (lambda: lambda h: h.relu(), INFINITE),
    "h.relu_() statement": (lambda: relu_statement, INFINITE),
    "relu imported beforehand": (lambda: relu_imported_beforehand, INFINITE),
    "clamp(min=0)": (lambda: lambda h: h.clamp(min=0), INFINITE),
    "torch.clamp(h, 0)": (lambda: lambda h: torch.clamp(h, 0), INFINITE),
    "clamp_min(0)": (lambda: lambda h: h.clamp_min(0), INFINITE),
    "clamp_ statement": (lambda: clamp_statement, INFINITE),
    "clamp(0, 0.4)": (lambda: lambda h: h.clamp(0, 0.4), 0.4),
    "F.threshold(h, 0, 0)": (lambda: lambda h: F.threshold(h, 0, 0), INFINITE),
    "torch.threshold_ statement": (lambda: threshold_statement, INFINITE),
    "F.hardtanh(h, 0, 0.4)": (lambda: lambda h: F.hardtanh(h, 0.0, 0.4), 0.4),
    "F.relu6": (lambda: lambda h: F.relu6(15 * h) / 15, 6 / 15),
    "nn.ReLU": (lambda: nn.ReLU(), INFINITE),
    "nn.ReLU(inplace)": (lambda: nn.ReLU(inplace=True), INFINITE),
    "nn.Threshold": (lambda: nn.Threshold(0.0, 0.0), INFINITE),
    "nn.Hardtanh(inplace)": (lambda: nn.Hardtanh(0.0, 0.4, inplace=True), 0.4),
}


class Plain(nn.Module):
    """Two convolutions with one rectifier, used twice, however it is spelled."""

    def __init__(self, spelling: Callable[[Tensor], Tensor]):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 3, 2)
        self.head = nn.Linear(3, CLASSES)
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        h = self.spelling(self.conv1(x))
        h = F.max_pool2d(h, 2)
        h = self.spelling(self.conv2(h))
        return self.head(h.mean((2, 3)))


class ReLU6Twice(nn.Module):
    """One `nn.ReLU6` module, used twice; the gain sends some positions past 6."""

    def __init__(self, act: nn.Module):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 3, 3)
        self.act = act
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(12 * self.conv1(x))
        h = self.act(self.conv2(h))
        return self.head(h.mean((2, 3)))


class Features(nn.Module):
    """The VGG shape: `features` with in-place ReLU modules after every convolution, then a classifier."""

    def __init__(self, act: Callable[[], nn.Module]):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), act(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 3, padding=1), act()
        )
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(27, 6), act(), nn.Dropout(), nn.Linear(6, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


# ---- skips --------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two residual blocks with batch norm: the first adds with `+`, the second in place with `+=`."""

    def __init__(self, act: Callable[[], nn.Module], norm: Callable[[int], nn.Module] = nn.BatchNorm2d):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = norm(4)
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm1 = norm(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm2 = norm(4)
        self.act = act()
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.norm(self.stem(x)))
        h = self.act(self.norm1(self.conv1(h)) + h)
        out = self.norm2(self.conv2(h))
        out += h
        h = self.act(out)
        return self.head(h.mean((2, 3)))


class ResidualTwin(Residual):
    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.norm(self.stem(x)))
        h = self.act(self.norm1(self.conv1(h)) + h)
        h = self.act(self.norm2(self.conv2(h)) + h)
        return self.head(h.mean((2, 3)))


class Aliased(nn.Module):
    """A branch that starts with an in-place ReLU: the skip shares the tensor, so it carries the rectified value too."""

    def __init__(self, act: Callable[[], nn.Module]):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.act = act()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.last = act()
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        branch = self.conv(self.act(h))
        return self.head(self.last(h + branch).mean((2, 3)))


class AliasedTwin(Aliased):
    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.stem(x))
        return self.head(self.last(h + self.conv(h)).mean((2, 3)))


class FirstInPlace(nn.Module):
    """The first operation works in place on the input that the caller handed in."""

    def __init__(self, act: Callable[[], nn.Module]):
        super().__init__()
        self.act = act()
        self.conv = nn.Conv2d(2, 4, 3)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.act(x)).pow(2).mean((2, 3)))


class TappedThenInPlace(nn.Module):
    """The convolution's output is changed in place three times over before anyone reads it."""

    def __init__(self, act: Callable[[], nn.Module]):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.act = act()
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        h += 0.1
        h.mul_(2)
        self.act(h)
        return self.head(h.square().mean((2, 3)))


class TappedThenInPlaceTwin(TappedThenInPlace):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(2 * (self.conv(x) + 0.1)).square().mean((2, 3)))


# ---- sharing ------------------------------------------------------------------------------------------------------


class CalledTwice(nn.Module):
    """One convolution and one rectifier, each called twice, on different sizes."""

    def __init__(self, act: Callable[[], nn.Module]):
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 1)
        self.conv = nn.Conv2d(3, 3, 3)
        self.act = act()
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.conv(self.stem(x)))
        h = self.act(self.conv(h))
        return self.head(h.mean((2, 3)))


class SharedLinear(nn.Module):
    """Two names, one module."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class TiedWeights(nn.Module):
    """Two modules, one parameter: the decoder is the encoder's weight, transposed by `F.linear`'s convention."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(CLASSES, 6, bias=False)
        self.middle = nn.Linear(6, 6)
        self.back = nn.Linear(6, CLASSES, bias=False)
        self.last = nn.Linear(CLASSES, 6, bias=False)
        self.last.weight = self.embed.weight
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.middle(self.embed(x)))
        return self.head(self.last(F.softplus(self.back(h))))


class Normed(nn.Module):
    """Weights that are computed from other parameters, by hooks or by parametrizations."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module]):
        super().__init__()
        self.conv = wrap(nn.Conv2d(2, 4, 3))
        self.head = wrap(nn.Linear(4, CLASSES))
        self(torch.zeros(1, 2, 6, 6))  # a step of training, which spectral norm's power iteration needs

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.softplus(self.conv(x)).mean((2, 3)))


def hooked_weight_norm(module: nn.Module) -> nn.Module:
    """The old spelling, deprecated and still in most published checkpoints."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module)


def hooked_spectral_norm(module: nn.Module) -> nn.Module:
    """The old spelling; the more power iterations, the nearer its buffers are to singular vectors."""
    return nn.utils.spectral_norm(module, n_power_iterations=20)


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + weight.transpose(-1, -2)


def symmetric_conv(module: nn.Module) -> nn.Module:
    return nn.utils.parametrize.register_parametrization(module, "weight", Symmetric()) if square(module) else module


def square(module: nn.Module) -> bool:
    return module.weight.shape[-1] == module.weight.shape[-2]  # type: ignore[union-attr, index]


# ---- attention and recurrence -------------------------------------------------------------------------------------


class Attention(nn.Module):
    """`nn.MultiheadAttention` between tokens, as a vision transformer uses it."""

    def __init__(self, need_weights: bool):
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.Softplus(), nn.Linear(8, 8))
        self.head = nn.Linear(8, CLASSES)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        n = self.norm(h)
        h = h + self.attention(n, n, n, need_weights=self.need_weights)[0]
        h = h + self.mlp(h)
        return self.head(h.mean(1))


class Encoder(nn.Module):
    """`nn.TransformerEncoder` in eval mode: torch has a fused path that no rule and no layer hook can see."""

    def __init__(self, activation: Any):
        super().__init__()
        self.embed = nn.Linear(4, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, activation=activation, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


class ScaledDotProduct(nn.Module):
    """`F.scaled_dot_product_attention` by hand, causal and with another scale."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 24)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + F.scaled_dot_product_attention(q, k, v)
        return self.head(h.transpose(1, 2).flatten(2).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0].mean(1))


class TokenNorm(nn.Module):
    """Convolution, batch norm, tokens (LeViT, XCiT): the gradient comes back to batch norm in channels-last strides."""

    def __init__(self, norm2d: Callable[[int], nn.Module], norm1d: Callable[[int], nn.Module]):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = norm2d(4)
        self.mix = nn.Linear(4, 4)
        self.norm1 = norm1d(4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = F.softplus(self.norm(self.conv(x)))
        h = h.flatten(2).transpose(1, 2)
        h = h * self.mix(h)
        h = self.norm1(h.flatten(0, 1)).reshape_as(h)
        return self.head(F.softplus(h).mean(1))


# ---- shapes of input and output -----------------------------------------------------------------------------------


@dataclass
class Output:
    """What the models of a well-known hub return: a dataclass with names."""

    logits: Tensor
    hidden: Tensor


class Mlp(nn.Module):
    def __init__(self, act: Callable[[], nn.Module]):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), act(), nn.Linear(8, 8), act(), nn.Linear(8, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Returning(nn.Module):
    """A small network whose output is handed back in a wrapping."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]):
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, CLASSES)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        hidden = F.softplus(self.body(x))
        return self.wrap(self.head(hidden), hidden)


class Score(nn.Module):
    """One number per example, `[batch]` or `[batch 1]`."""

    def __init__(self, keep: bool):
        super().__init__()
        self.body, self.head, self.keep = nn.Linear(6, 8), nn.Linear(8, 1), keep

    def forward(self, x: Tensor) -> Tensor:
        score = self.head(F.softplus(self.body(x)))
        return score if self.keep else score[:, 0]


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.vector = nn.Conv2d(2, 4, 3), nn.Linear(6, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        return self.head(F.softplus(self.image(image)).mean((2, 3)) * self.vector(vector))


class Tokens(nn.Module):
    """Integer tokens and a mask, by keyword, with an optional input given as vectors instead."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, extra: Tensor | None = None) -> Tensor:
        h = self.embed(input_ids)
        if extra is not None:
            h = h + extra
        weight = attention_mask.to(h.dtype).unsqueeze(-1)
        h = F.softplus(self.mix(h)) * weight
        return self.head(h.sum(1) / weight.sum(1))


class Dense(nn.Module):
    """A class score at every position."""

    def __init__(self, act: Callable[[], nn.Module]):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.act = act()
        self.head = nn.Conv2d(4, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv(x)))


class Convolutional(nn.Module):
    """The same small network over one, two or three axes."""

    def __init__(self, axes: int, act: Callable[[], nn.Module]):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        norm = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[axes - 1]
        self.axes = tuple(range(2, 2 + axes))
        self.conv1, self.norm, self.act = conv(2, 4, 2), norm(4, affine=True), act()
        self.conv2, self.head = conv(4, 3, 2), nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.norm(self.conv1(x)))
        return self.head(self.act(self.conv2(h)).mean(self.axes))


class Depthwise(nn.Module):
    """An inverted residual: pointwise, depthwise, squeeze and excite, all that EfficientNet is made of."""

    def __init__(self):
        super().__init__()
        self.expand = nn.Conv2d(2, 6, 1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.depth = nn.Conv2d(6, 6, 3, padding=1, stride=2, groups=6)
        self.squeeze = nn.Conv2d(6, 6, 1)
        self.project = nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.depth(F.silu(self.norm(self.expand(x)))))
        h = h * torch.sigmoid(self.squeeze(h.mean((2, 3), keepdim=True)))
        return self.head(self.project(h).mean((2, 3)))


# ---- ways of writing a module -------------------------------------------------------------------------------------


class Containers(nn.Module):
    """Layers kept in a `ModuleList`, a `ModuleDict` and a `ParameterList`."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.heads = nn.ModuleDict({"coarse": nn.Linear(6, 2), "fine": nn.Linear(6, CLASSES)})
        self.gains = nn.ParameterList([nn.Parameter(torch.randn(6)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for block, gain in zip(self.blocks, self.gains, strict=True):
            x = torch.tanh(block(x)) * gain
        return self.heads["fine"](x)


class BoundMethod(nn.Module):
    """Holds a bound method of itself and one of a child: a copy must not lead back to the original."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.head = nn.Linear(4, CLASSES)
        self.body = self.pooled
        self.classify = self.head.forward

    def pooled(self, x: Tensor) -> Tensor:
        return F.softplus(self.conv(x)).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.body(x))


class OwnTrain(nn.Module):
    """Overrides `train`, which tells nobody that dropout and batch norm stay as they were, and returns nothing."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.head = nn.Linear(4, CLASSES)
        self.switched = 0

    def train(self, mode: bool = True):  # type: ignore[override]
        self.switched += 1

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(F.softplus(self.norm(self.conv(x)))).mean((2, 3)))


class Normalising(nn.Module):
    """Scales its input by buffers, then hands on a non-contiguous, permuted view."""

    mean: Tensor
    scale: Tensor
    order: Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.randn(2, 1, 1))
        self.register_buffer("scale", torch.rand(2, 1, 1) + 0.5)
        self.register_buffer("order", torch.tensor([1, 0]))
        self.conv, self.head = nn.Conv2d(2, 4, 3), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = ((x - self.mean) / self.scale)[:, self.order].transpose(2, 3)
        return self.head(torch.tanh(self.conv(x)).mean((2, 3)))


def with_hooks(model: nn.Module) -> nn.Module:
    """Hooks that the user registered are part of the model."""
    model.conv1.register_forward_hook(lambda module, args, out: 2 * out)  # type: ignore[union-attr]
    model.head.register_forward_pre_hook(lambda module, args: (args[0] + 1,))  # type: ignore[union-attr]
    return model


class AddsInPlace(nn.Module):
    """Adds a parameter in place to what no parameter has touched yet."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.randn(6))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = x.clone()
        h += self.offset
        return self.head(h.square())


class Checkpointed(nn.Module):
    """Recomputes its body in the backward pass."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(lambda x: F.softplus(self.body(x)), x, use_reentrant=False))


# ---- the list -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One network with one trap.

    Attributes:
        name, why: What it is, and what it catches.
        build: Makes the module; weights are drawn afterwards, by `model`.
        shapes: Shape of `x`, or a tuple or dict of shapes; an entry that is a tensor is taken as it stands.
        layers: Layers with a floating-point output; the first is a good one for a class activation map.
        smooth: No kink anywhere, so that second derivatives mean something.
        rewrite: Makes the twin from `rectify`. Without it the twin is the model itself.
        uncovered: Holds activations that a rule for rectifiers does not cover, and so must be told.
        options: What a call needs beside the first four arguments (`output`).
        targets: How many targets the output has.
        trains: Left in training mode.
    """

    name: str
    build: Callable[[], nn.Module]
    shapes: Any
    layers: tuple[str, ...]
    why: str
    smooth: bool = False
    rewrite: Callable[[Rectify], nn.Module] | None = None
    uncovered: bool = False
    image: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    targets: int = CLASSES
    trains: bool = False

    def model(self) -> nn.Module:
        """The model, always with the same weights."""
        model = seeded(self.build)
        return model if self.trains else evaluated(model)

    def twin(self, rectify: Rectify = rectified) -> nn.Module:
        """The same network as ordinary autograd can take it, rectified by `rectify`."""
        if self.rewrite is None:
            return evaluated(self.model())
        rewrite = self.rewrite
        twin = seeded(lambda: rewrite(rectify))
        twin.load_state_dict(self.model().state_dict())
        return evaluated(twin)

    @property
    def x(self) -> Any:
        """The input, always the same, two examples."""
        generator = torch.Generator().manual_seed(1)

        def made(shape: Any) -> Any:
            if isinstance(shape, dict):
                return {name: made(part) for name, part in shape.items()}
            if isinstance(shape, tuple) and not all(isinstance(n, int) for n in shape):
                return tuple(made(part) for part in shape)
            if isinstance(shape, Tensor):
                return shape.clone()
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        return made(self.shapes)

    @property
    def integer(self) -> bool:
        """No part of the input has a gradient, so a layer must be named."""
        return isinstance(self.shapes, dict) and all(isinstance(part, Tensor) for part in self.shapes.values())

    def call(self, model: nn.Module, x: Any) -> Tensor:
        """The output that is explained."""
        out = model(*x) if isinstance(x, tuple) else model(**x) if isinstance(x, dict) else model(x)
        selected: Any = self.options.get("output")
        if selected is None:
            return out
        if callable(selected):
            return torch.as_tensor(selected(out))
        if isinstance(selected, str) and not isinstance(out, dict):
            return getattr(out, selected)
        return out[selected]


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """Build in float64, with the same random weights each time, and random running statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().double()
        for module in model.modules():
            if isinstance(getattr(module, "running_mean", None), Tensor):
                nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
                nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
                nn.init.uniform_(module.weight, 0.5, 1.5)  # type: ignore[arg-type]
                nn.init.uniform_(module.bias, -0.5, 0.5)  # type: ignore[arg-type]
    return model


def evaluated(model: nn.Module) -> nn.Module:
    """Eval mode for a model that may override `train`."""
    for module in model.modules():
        module.training = False
    return model


IMAGE = (2, 2, 6, 6)
VECTOR = (2, 6)
SEQUENCE = (2, 5, 4)
IDS = torch.tensor([[1, 4, 9, 0], [3, 10, 2, 7]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])


def pair(act: Callable[[], nn.Module], model: Callable[..., nn.Module], twin: Callable[..., nn.Module] | None = None):
    """The model with its own rectifier module, and its twin with the reference in that place."""
    return {
        "build": functools.partial(model, act),
        "rewrite": lambda rectify: (twin or model)(lambda: Rectifier(rectify)),
    }


def inplace() -> nn.Module:
    return nn.ReLU(inplace=True)


def spelled(name: str) -> Case:
    make, high = SPELLINGS[name]
    return Case(
        name=name,
        build=lambda: Plain(make()),
        rewrite=lambda rectify: Plain(lambda h: rectify(h, high)),
        shapes=IMAGE,
        layers=("conv2", "conv1"),
        why=f"the rectifier is spelled {name}",
    )


CASES = [
    *(spelled(name) for name in SPELLINGS),
    Case(
        name="vgg",
        **pair(inplace, Features),
        shapes=IMAGE,
        layers=("features.3", "features.0", "features.2", "features"),
        why="in-place ReLU modules follow the layers that one taps",
    ),
    Case(
        name="relu6 used twice",
        build=lambda: ReLU6Twice(nn.ReLU6(inplace=True)),
        rewrite=lambda rectify: ReLU6Twice(Rectifier(rectify, 6.0)),
        shapes=IMAGE,
        layers=("conv2", "conv1"),
        why="saturates above as well, arrives as hardtanh, and one module stands for two places",
    ),
    Case(
        name="residual",
        **pair(inplace, Residual, lambda act: ResidualTwin(act, Affine)),
        shapes=IMAGE,
        layers=("norm2", "conv1", "norm1", "stem"),
        why="skips, eval batch norm, `+` and `+=`",
    ),
    Case(
        name="aliased skip",
        **pair(inplace, Aliased, AliasedTwin),
        shapes=IMAGE,
        layers=("conv", "act", "last"),
        why="a skip shares the tensor that the branch rectifies in place",
    ),
    Case(
        name="first in place",
        **pair(inplace, FirstInPlace),
        shapes=IMAGE,
        layers=("conv", "act"),
        why="the caller's own input would be overwritten",
    ),
    Case(
        name="tapped then in place",
        **pair(inplace, TappedThenInPlace, TappedThenInPlaceTwin),
        shapes=IMAGE,
        layers=("conv",),
        why="what was read at a layer is overwritten afterwards",
    ),
    Case(
        name="called twice",
        **pair(inplace, CalledTwice),
        shapes=IMAGE,
        layers=("stem",),
        why="a module has one activation per call",
    ),
    Case(
        name="shared linear",
        build=SharedLinear,
        shapes=VECTOR,
        layers=("head",),
        why="one module under two names",
        smooth=True,
        image=False,
        uncovered=True,
    ),
    Case(
        name="tied weights",
        build=TiedWeights,
        shapes=(2, CLASSES),
        layers=("middle", "back"),
        why="one parameter under two names",
        smooth=True,
        image=False,
        uncovered=True,
    ),
    Case(
        name="attention",
        build=lambda: Attention(False),
        shapes=SEQUENCE,
        layers=("embed", "norm", "attention", "mlp.0"),
        why="nn.MultiheadAttention calls the fused kernel and returns a tuple",
        smooth=True,
        image=False,
        uncovered=True,
    ),
    Case(
        name="attention with weights",
        build=lambda: Attention(True),
        shapes=SEQUENCE,
        layers=("embed", "attention"),
        why="nn.MultiheadAttention takes another path when weights are asked for",
        smooth=True,
        image=False,
        uncovered=True,
    ),
    Case(
        name="transformer encoder, gelu",
        build=lambda: Encoder("gelu"),
        shapes=SEQUENCE,
        layers=("embed", "encoder.layers.0", "encoder.layers.1.linear1"),
        why="the fused path of eval mode",
        smooth=True,
        image=False,
        uncovered=True,
    ),
    Case(
        name="transformer encoder, relu",
        build=lambda: Encoder("relu"),
        rewrite=lambda rectify: Encoder(lambda h: rectify(h, INFINITE)),
        shapes=SEQUENCE,
        layers=("embed", "encoder.layers.0"),
        why="the fused path of eval mode hides the rectifiers",
        image=False,
    ),
    Case(
        name="scaled dot product",
        build=ScaledDotProduct,
        shapes=SEQUENCE,
        layers=("qkv",),
        why="the fused kernel has neither a batching rule nor a second derivative",
        smooth=True,
        image=False,
    ),
    Case(
        name="lstm",
        build=Recurrent,
        shapes=SEQUENCE,
        layers=("lstm",),
        why="flat weights, a tuple output and a fused kernel",
        smooth=True,
        image=False,
    ),
    *(
        Case(
            name=f"{name} mlp",
            build=functools.partial(Mlp, act),
            shapes=VECTOR,
            layers=("net.0", "net.2"),
            why="an activation that the rules for rectifiers do not cover",
            smooth=True,
            image=False,
            uncovered=True,
        )
        for name, act in {"gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}.items()
    ),
    *(
        Case(
            name=f"output in a {name}",
            build=functools.partial(Returning, wrap),
            shapes=VECTOR,
            layers=("body", "head"),
            why="the output is not a tensor",
            smooth=True,
            image=False,
            uncovered=True,
            options={"output": output},
        )
        for name, wrap, output in [
            ("dict", lambda logits, hidden: {"logits": logits, "hidden": hidden}, "logits"),
            ("dataclass", Output, "logits"),
            ("tuple", lambda logits, hidden: (hidden, logits), 1),
            ("list, by function", lambda logits, hidden: [hidden, logits], lambda out: out[1]),
        ]
    ),
    *(
        Case(
            name=f"one score{' kept' if keep else ''}",
            build=functools.partial(Score, keep),
            shapes=VECTOR,
            layers=("body",),
            why="the output has no class axis",
            smooth=True,
            image=False,
            uncovered=True,
            targets=0,
        )
        for keep in (False, True)
    ),
    Case(
        name="two inputs",
        build=TwoInputs,
        shapes=(IMAGE, VECTOR),
        layers=("image",),
        why="a tuple of inputs gives a tuple of attributions",
        smooth=True,
        uncovered=True,
    ),
    Case(
        name="keyword inputs",
        build=TwoInputs,
        shapes={"vector": VECTOR, "image": IMAGE},
        layers=("image",),
        why="a dict of inputs gives a dict of attributions, in whatever order",
        smooth=True,
        uncovered=True,
    ),
    Case(
        name="tokens",
        build=Tokens,
        shapes={"input_ids": IDS, "attention_mask": MASK},
        layers=("embed", "mix"),
        why="no input has a gradient",
        smooth=True,
        image=False,
        uncovered=True,
    ),
    Case(
        name="tokens and vectors",
        build=Tokens,
        shapes={"input_ids": IDS, "attention_mask": MASK, "extra": (2, 4, 6)},
        layers=("mix", "embed"),
        why="only one of the inputs has a gradient",
        smooth=True,
        image=False,
        uncovered=True,
    ),
    Case(
        name="dense output",
        **pair(nn.ReLU, Dense),
        shapes=IMAGE,
        layers=("conv",),
        why="an index selects the class at every position",
    ),
    *(
        Case(
            name=f"cnn over {axes} axes",
            build=functools.partial(Convolutional, axes, nn.ReLU),
            rewrite=lambda rectify, axes=axes: Convolutional(axes, lambda: Rectifier(rectify)),
            shapes=(2, 2, *[5, 4, 6][:axes]),
            layers=("conv2", "conv1"),
            why="one to three spatial axes, instance norm over them",
            image=axes == 2,
        )
        for axes in (1, 2, 3)
    ),
    Case(
        name="batch norm before tokens",
        build=lambda: TokenNorm(nn.BatchNorm2d, nn.BatchNorm1d),
        rewrite=lambda rectify: TokenNorm(Affine, Affine),
        shapes=IMAGE,
        layers=("conv", "norm"),
        why="torch's backward of batch norm is wrong for such strides at batch size 1",
        smooth=True,
        uncovered=True,
    ),
    Case(
        name="instance norm before tokens",
        build=lambda: TokenNorm(
            functools.partial(nn.InstanceNorm2d, affine=True, track_running_stats=True), nn.BatchNorm1d
        ),
        rewrite=lambda rectify: TokenNorm(Affine, Affine),
        shapes=IMAGE,
        layers=("conv", "norm"),
        why="torch's backward of instance norm is wrong in the same way",
        smooth=True,
        uncovered=True,
    ),
    Case(
        name="depthwise",
        build=Depthwise,
        shapes=IMAGE,
        layers=("project", "depth", "expand"),
        why="grouped convolutions and a gate",
        smooth=True,
        uncovered=True,
    ),
    *(
        Case(
            name=name,
            build=functools.partial(Normed, wrap),
            shapes=IMAGE,
            layers=("conv",),
            why="weights that are computed from other parameters at every call",
            smooth=True,
            uncovered=True,
        )
        for name, wrap in {
            "weight norm": getattr(nn.utils.parametrizations, "weight_norm", None),  # torch 2.0 has it by hook alone
            "spectral norm": nn.utils.parametrizations.spectral_norm,
            "weight norm by hook": hooked_weight_norm,
            "spectral norm by hook": hooked_spectral_norm,
            "parametrized": symmetric_conv,
        }.items()
        if wrap is not None
    ),
    Case(
        name="containers",
        build=Containers,
        shapes=VECTOR,
        layers=("blocks.1", "blocks.0"),
        why="layers live in lists and dicts",
        smooth=True,
        image=False,
        uncovered=True,
    ),
    Case(
        name="bound method",
        build=BoundMethod,
        shapes=IMAGE,
        layers=("conv",),
        why="an attribute leads back to the original module",
        smooth=True,
        uncovered=True,
    ),
    Case(
        name="own train",
        build=OwnTrain,
        shapes=IMAGE,
        layers=("conv", "norm"),
        why="`model.eval()` does nothing, or something else",
        smooth=True,
        uncovered=True,
        trains=True,
    ),
    Case(
        name="buffers",
        build=Normalising,
        shapes=IMAGE,
        layers=("conv",),
        why="floating-point and integer buffers, permuted strides",
        smooth=True,
        uncovered=True,
    ),
    Case(
        name="hooks of the user",
        build=lambda: with_hooks(Plain(F.relu)),
        rewrite=lambda rectify: with_hooks(Plain(lambda h: rectify(h, INFINITE))),
        shapes=IMAGE,
        layers=("conv2",),
        why="hooks are part of the model",
    ),
    Case(
        name="adds a parameter in place",
        build=AddsInPlace,
        shapes=VECTOR,
        layers=("head",),
        why="under `vmap` over parameters one is batched and the other is not",
        smooth=True,
        image=False,
    ),
    Case(
        name="training mode",
        build=lambda: Features(inplace),
        rewrite=lambda rectify: Features(lambda: Rectifier(rectify)),
        shapes=IMAGE,
        layers=("features.3",),
        why="dropout must not act, and the mode must stay as it was",
        trains=True,
    ),
]

# What torch itself does not support; the laws hold every method to saying so.
UNSUPPORTED = [
    Case(
        name="checkpoint",
        build=Checkpointed,
        shapes=VECTOR,
        layers=("body",),
        why="the backward pass runs the model again",
        smooth=True,
        image=False,
        uncovered=True,
    ),
]

BY_NAME = {case.name: case for case in CASES}
