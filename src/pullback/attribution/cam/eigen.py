"""Maps from principal components."""

from __future__ import annotations

import torch
from torch import Tensor

from pullback._core.call import Call
from pullback._core.entry import method
from pullback._core.targets import score
from pullback._core.types import Inputs, Layer, Model, Output, Params, Target
from pullback._torch.internals import eye
from pullback.attribution.cam._channels import Tokens, gridded
from pullback.attribution.cam.by_gradient import pulled_map
from pullback.rules._table import Rules


@method("cam", "map", "positions at the layer", mechanism="formula")
def eigen_cam(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str | Layer,
    tokens: Tokens = None,
    output: Output = None,
) -> Tensor:
    r"""Project a layer's activation onto its first principal component.

    .. math:: m_p = \sum_c V_{c 1} (A_{c p} - \bar A_c)

    It shows what stands out in the image, whatever the target, which is checked and otherwise without effect. The sign,
    which a principal component has not, is such that the entry with the largest absolute value is positive. The paper
    does not say whether means over positions are taken off; they are. Costs 1 forward.

    Args:
        params, model, x, target, layer, tokens, output: See `grad_cam`.

    Returns:
        Map ``[batch 1 ...]`` at the layer's resolution, signed, with mean 0.

    Example:
        >>> model, x = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten()), torch.randn(2, 3, 6, 6)
        >>> m = eigen_cam(params_of(model), model, x, 0, layer="0")
        >>> s = torch.linalg.svdvals((model[0](x) - model[0](x).mean((2, 3), keepdim=True)).flatten(2))
        >>> torch.allclose(m.flatten(1).norm(dim=1), s[:, 0], atol=1e-4)
        True

    Reference:
        Muhammad & Yeasin, Eigen-CAM: Class Activation Map Using Principal Components, 2020, sec. III.
    """
    call = Call.bind(params, model, x, layer, None, output)
    pulled = call.pullback()
    whole = call.like([principal(gridded(a, x, tokens)) for a in pulled.activations])
    nothing = 0 * score(pulled.output, target)  # NaN for a target that is no class
    return whole + nothing.reshape(-1, *[1] * (whole.ndim - 1))


@method("cam", "map", "positions at the layer", mechanism="formula")
def eigen_grad_cam(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str | Layer,
    tokens: Tokens = None,
    rules: Rules = None,
    output: Output = None,
) -> Tensor:
    r"""Project activation times gradient onto its first principal component.

    .. math:: m_p = \sum_c V_{c 1} (B_{c p} - \bar B_c), \quad B = A \odot \partial f_t

    As `eigen_cam`, with the target's say. Costs 1 gradient at most.

    Args:
        params, model, x, target, layer, tokens, rules, output: See `grad_cam`.

    Returns:
        Map ``[batch 1 ...]`` at the layer's resolution, signed, with mean 0.

    Example:
        >>> model, x = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten()), torch.randn(2, 3, 6, 6)
        >>> m = eigen_grad_cam(params_of(model), model, x, 0, layer="0")
        >>> torch.allclose(m.mean(), torch.zeros(()), atol=1e-5)
        True

    Reference:
        Gildenblat et al., PyTorch library for CAM methods, 2021 (EigenGradCAM).
    """

    def weigh(activation: Tensor, gradient: Tensor) -> Tensor:
        return principal(activation * gradient)

    return pulled_map(params, model, x, target, layer, tokens, rules, output, weigh)


def principal(features: Tensor) -> Tensor:
    """Project ``[batch channel ...]`` onto its first principal component over positions, ``[batch 1 ...]``."""
    centred = features.flatten(2) - features.flatten(2).mean(2, keepdim=True)
    wide = centred.to(torch.promote_types(centred.dtype, torch.float32))
    transposed = wide.shape[1] > wide.shape[2]  # the smaller of the two matrices has the same eigenvalues
    with torch.autocast(wide.device.type, enabled=False):  # which multiplies in half the precision
        gram = wide.mT @ wide if transposed else wide @ wide.mT
        axis = _leading(gram)
        line = axis.unsqueeze(1)
        map = line * (wide @ axis.unsqueeze(2)).norm(dim=1, keepdim=True) if transposed else line @ wide
    peak = map.gather(2, map.abs().argmax(2, keepdim=True))
    return (map * peak.detach().sign()).to(features.dtype).unflatten(2, features.shape[2:])


def _leading(symmetric: Tensor) -> Tensor:
    """Give the unit eigenvector of the largest eigenvalue, ``[batch n n]`` to ``[batch n]``.

    Torch's derivative of eigenvectors needs all eigenvalues apart. Two of Newton's steps on ``S v = l v, v.v = 1``,
    from the solution itself, change nothing but carry the derivatives up to the third order.
    """
    values, vectors = torch.linalg.eigh(symmetric.detach().nan_to_num())  # NaN comes back in by the products
    value, vector = values[:, -1:], vectors[:, :, -1]
    size = eye(symmetric.shape[-1], symmetric)
    flat = (value <= 0).unsqueeze(2)  # no variance at all
    symmetric = torch.where(flat, size * torch.arange(len(size), device=size.device), symmetric)
    value, vector = torch.where(flat[:, 0], value + len(size) - 1, value), torch.where(flat[:, 0], size[-1], vector)
    for _ in range(2):
        residue = (symmetric @ vector.unsqueeze(2)).squeeze(2) - value * vector
        length = (1 - vector.square().sum(1, keepdim=True)) / 2
        top = torch.cat([symmetric - value.unsqueeze(2) * size, -vector.unsqueeze(2)], 2)
        bottom = torch.cat([vector.unsqueeze(1), torch.zeros_like(value).unsqueeze(2)], 2)
        step = torch.linalg.solve(torch.cat([top, bottom], 1), torch.cat([-residue, length], 1))
        vector, value = vector + step[:, :-1], value + step[:, -1:]
    return vector
