"""Relevance by explicit matrices, as the papers define it; no code shared with `src`."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

Linear = Callable[[Tensor], Tensor]


def matrix(function: Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix `[out in]` and the constant `[out]` of an affine function, one basis vector at a time."""
    zero = torch.zeros_like(x)
    constant = function(zero).flatten()
    columns = []
    for i in range(x.numel()):
        unit = zero.clone()
        unit.view(-1)[i] = 1
        columns.append(function(unit).flatten() - constant)
    return torch.stack(columns, 1), constant


def away(z: float, epsilon: float) -> float:
    return z + epsilon if z >= 0 else z - epsilon


def shared(contributions: Tensor, extra: Tensor, relevance: Tensor, epsilon: float) -> Tensor:
    """R_i = sum_j q_ji / (sum_k q_jk + extra_j) R_j, by loops."""
    result = torch.zeros(contributions.shape[1], dtype=contributions.dtype)
    for j in range(contributions.shape[0]):
        total = away(float(contributions[j].sum() + extra[j]), epsilon)
        for i in range(contributions.shape[1]):
            result[i] += contributions[j, i] / total * relevance[j]
    return result


def up(t: Tensor) -> Tensor:
    return t.clamp(min=0)


def down(t: Tensor) -> Tensor:
    return t.clamp(max=0)


def epsilon(w: Tensor, b: Tensor, x: Tensor, r: Tensor, eps: float = 1e-6) -> Tensor:
    return shared(w * x, b, r, eps)


def z_plus(w: Tensor, b: Tensor, x: Tensor, r: Tensor, eps: float = 1e-6) -> Tensor:
    return shared(up(w * x), up(b), r, eps)


def alpha_beta(w: Tensor, b: Tensor, x: Tensor, r: Tensor, eps: float = 1e-6) -> Tensor:
    return 2 * shared(up(w * x), up(b), r, eps) - shared(down(w * x), down(b), r, eps)


def gamma(w: Tensor, b: Tensor, x: Tensor, r: Tensor, eps: float = 1e-6) -> Tensor:
    """What agrees with the sign of the output counts 1.25 times."""
    result = torch.zeros_like(x)
    for j in range(len(w)):
        q, y = w[j] * x, float((w[j] * x).sum() + b[j])
        agreeing = up if y > 0 else down
        one, extra = q + 0.25 * agreeing(q), b[j] + 0.25 * agreeing(b[j])
        if y != 0:
            result += shared(one[None], extra[None], r[j : j + 1], eps)
    return result


def z_box(w: Tensor, b: Tensor, x: Tensor, r: Tensor, eps: float = 1e-6) -> Tensor:
    """Between -3 and 3."""
    return shared(w * x + 3 * up(w) - 3 * down(w), torch.zeros_like(b), r, eps)


def w_square(w: Tensor, b: Tensor, x: Tensor, r: Tensor, eps: float = 1e-6) -> Tensor:
    return shared(w**2, b**2, r, eps)


def flat(w: Tensor, b: Tensor, x: Tensor, r: Tensor, eps: float = 1e-6) -> Tensor:
    """All inputs that a unit looks at, equally: those with a weight, which here is never 0 by chance."""
    return shared((w != 0).to(w.dtype), torch.zeros_like(b), r, eps)


def excitation(w: Tensor, b: Tensor, x: Tensor, r: Tensor) -> Tensor:
    return shared(up(w * x), torch.zeros_like(b), r, 1e-20)


def through(layers: list[nn.Module], x: Tensor, relevance: Tensor, rule: Callable[..., Tensor]) -> list[Tensor]:
    """Relevance of one example at the input of every layer of a sequence; what has no weight keeps or moves it."""
    inputs = [x]
    for layer in layers:
        inputs.append(layer(inputs[-1]).detach())
    found = [relevance]
    for layer, h in zip(reversed(layers), reversed(inputs[:-1])):
        if isinstance(layer, nn.ReLU | nn.GELU | nn.Tanh | nn.Flatten | nn.Identity):
            relevance = relevance.reshape(h.shape)
        elif isinstance(layer, nn.MaxPool2d):
            jacobian = torch.autograd.functional.jacobian(layer, h).reshape(-1, h.numel())  # type: ignore[arg-type]
            relevance = (relevance.flatten() @ jacobian).reshape(h.shape)
        else:
            w, b = matrix(layer, h)
            pooled = isinstance(layer, nn.AvgPool2d)  # no parameters: in proportion, whatever the rule
            way = functools.partial(epsilon, eps=0.0) if pooled else rule
            relevance = way(w.detach(), b.detach(), h.flatten(), relevance.flatten()).reshape(h.shape)
        found.append(relevance)
    return found[::-1]
