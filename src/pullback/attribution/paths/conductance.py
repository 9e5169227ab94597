"""What flows through a layer, or through one neuron of it, along a path from a baseline to the input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from pullback._core.call import Call
from pullback._core.entry import method
from pullback._core.inputs import folded, unfolded
from pullback._core.types import ChunkSize, Inputs, Layer, Model, Output, Params, Progress, Target, Tensors
from pullback._torch.levels import jvp
from pullback.attribution.paths._along import ends_of
from pullback.attribution.paths._quadrature import (
    Path,
    Point,
    Quadrature,
    integral,
    on_path,
    quadrature_of,
    straight,
)
from pullback.rules._table import Rules, table_of


@method(
    "paths", "attribution", "floating input", small={"steps": 2}, forwards=lambda o: o["steps"], mechanism="formula"
)
def internal_influence(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str | Layer,
    baseline: Any = None,
    steps: int = 50,
    quadrature: Quadrature = "gauss_legendre",
    path: Path = straight,
    chunk_size: ChunkSize = "auto",
    progress: Progress = None,
    rules: Rules = None,
    output: Output = None,
) -> Any:
    r"""Average the gradient at a layer along the path of inputs from a baseline.

    .. math:: a = \int_0^1 \frac{\partial f}{\partial y}\big(b + \alpha (x - b)\big) \, d\alpha

    Costs `steps` gradients.

    Args:
        params, model, x, target, layer, rules, output: See `gradient`.
        baseline, steps, quadrature, path, chunk_size, progress: See `integrated_gradients`; the mean over several
            baselines.

    Returns:
        Shaped like the layer's activation, signed, in units of the score per unit of activation.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        >>> params, x = params_of(model), torch.randn(5, 3)
        >>> a = internal_influence(params, model, x, 1, layer="0")
        >>> torch.allclose(a, model[1].weight[1].expand(5, 4), atol=1e-6)  # linear above: the same gradient everywhere
        True

    Reference:
        Leino et al., Influence-Directed Explanations for Deep Convolutional Networks, 2018, def. 1.
    """
    call = Call.bind(params, model, x, "", table_of(rules), output)
    place = Layer.of(layer)

    def term(points: Sequence[Tensor], velocities: Sequence[Tensor]) -> Sequence[Tensor]:
        return call.at(points).to(place).gradients(target)

    along = _along(call, baseline, steps, quadrature, path)
    return call.to(place).like(integral(term, *along, chunk_size, call.x.tensors, progress))


@method(
    "paths", "attribution", "floating input", small={"steps": 2}, forwards=lambda o: 2 * o["steps"], mechanism="formula"
)
def conductance(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str | Layer,
    baseline: Any = None,
    steps: int = 50,
    quadrature: Quadrature = "gauss_legendre",
    path: Path = straight,
    chunk_size: ChunkSize = "auto",
    progress: Progress = None,
    rules: Rules = None,
    output: Output = None,
) -> Any:
    r"""Give each neuron of a layer the share of the integrated gradients that flows through it.

    .. math:: a_j = \int_0^1 \frac{\partial f}{\partial y_j} \, \frac{d y_j}{d \alpha} \, d\alpha
              = \sum_i (x_i - b_i) \int_0^1 \frac{\partial f}{\partial y_j} \frac{\partial y_j}{\partial x_i} \, d\alpha

    Adds up to the difference in score between `x` and `baseline` over any layer that all of the score flows through, up
    to the error of the sum. The activation's derivative along the path is exact, by `torch.func.jvp`; other libraries
    take differences of activations between points. Costs `steps` gradients and as many forwards with tangents.

    Args:
        params, model, x, target, layer, rules, output: See `gradient`.
        baseline, steps, quadrature, path, chunk_size, progress: See `integrated_gradients`; the mean over several
            baselines.

    Returns:
        Shaped like the layer's activation, signed, in units of the score.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> params, x = params_of(model), torch.randn(5, 3)
        >>> a = conductance(params, model, x, 1, layer="1")
        >>> torch.allclose(a.sum(1), (model(x) - model(0 * x))[:, 1], atol=1e-5)
        True

    References:
        Dhamdhere, Sundararajan & Yan, How Important Is a Neuron?, 2019, eq. 3. Shrikumar, Su & Kundaje, Computationally
        Efficient Measures of Internal Neuron Importance, 2018 (the first form).
    """
    call = Call.bind(params, model, x, "", table_of(rules), output)
    place = Layer.of(layer)

    def term(points: Sequence[Tensor], velocities: Sequence[Tensor]) -> Sequence[Tensor]:
        there = call.at(points).to(place)
        velocities_there = _pushed(there, velocities)
        return [v * g for v, g in zip(velocities_there, there.gradients(target), strict=True)]

    along = _along(call, baseline, steps, quadrature, path)
    return call.to(place).like(integral(term, *along, chunk_size, call.x.tensors, progress))


@method(
    "paths", "attribution", "floating input", small={"steps": 2}, forwards=lambda o: 2 * o["steps"], mechanism="formula"
)
def neuron_conductance(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    layer: str | Layer,
    neuron: tuple[int, ...] | Tensor,
    baseline: Any = None,
    steps: int = 50,
    quadrature: Quadrature = "gauss_legendre",
    path: Path = straight,
    chunk_size: ChunkSize = "auto",
    progress: Progress = None,
    rules: Rules = None,
    output: Output = None,
) -> Any:
    r"""Share one neuron's conductance out over the input.

    .. math:: a_i = (x_i - b_i) \int_0^1 \frac{\partial f}{\partial y_j} \frac{\partial y_j}{\partial x_i} \, d\alpha

    Adds up to the neuron's entry of `conductance`, exactly point by point; over all neurons to integrated gradients.
    Costs `steps` gradients and as many again from the layer down.

    Args:
        params, model, x, target, layer, rules, output: See `gradient`.
        neuron: Place in the activation of one example, such as (channel, row, column); or weights that broadcast to the
            activation, for several neurons at once and for `vmap` over neurons.
        baseline, steps, quadrature, path, chunk_size, progress: See `integrated_gradients`; the mean over several
            baselines.

    Returns:
        Attribution, shaped like `x`, signed, in units of the score.

    Raises:
        ValueError: If `neuron` is no place in the activation, or the layer is called several times.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> params, x = params_of(model), torch.randn(5, 3)
        >>> a = neuron_conductance(params, model, x, 1, layer="1", neuron=(2,))
        >>> torch.allclose(a.sum(1), conductance(params, model, x, 1, layer="1")[:, 2], atol=1e-6)
        True

    Reference:
        Dhamdhere, Sundararajan & Yan, How Important Is a Neuron?, 2019, eq. 2.
    """
    call = Call.bind(params, model, x, "", table_of(rules), output)
    place = Layer.of(layer)

    def term(points: Sequence[Tensor], velocities: Sequence[Tensor]) -> Sequence[Tensor]:
        there = call.at(points).to(place)
        slopes = [folded(g) for g in there.gradients(target)]
        if len(slopes) > 1:
            raise ValueError(
                f"`layer` names `{layer}`, called {len(slopes)} times: choose a call, such as `{layer}#0`."
            )
        chosen = slopes[0] * _weights_of(neuron, slopes[0])
        pull = vjp(lambda *tensors: _activations(there, tensors)[0], *there.x.tensors)[1]
        down = [unfolded(g, there.copies) for g in pull(chosen)]
        return [v * g for v, g in zip(velocities, down, strict=True)]

    along = _along(call, baseline, steps, quadrature, path)
    return call.like(integral(term, *along, chunk_size, call.x.tensors, progress))


def _weights_of(neuron: tuple[int, ...] | Tensor, activation: Tensor) -> Tensor:
    if isinstance(neuron, Tensor):
        return neuron.to(activation)
    shape = activation.shape[1:]
    fits = len(neuron) == len(shape) and all(0 <= i < n for i, n in zip(neuron, shape, strict=True))
    if not fits:
        raise ValueError(f"`neuron` must be a place in an activation {list(shape)}, got {tuple(neuron)}.")
    hot = torch.zeros(shape, dtype=activation.dtype, device=activation.device)
    hot[neuron] = 1
    return hot


def _activations(call: Call, tensors: Sequence[Tensor]) -> Tensors:
    """Return the activations of the call's layer for other floating-point members of its input."""
    return call.on(call.x.rebuild(tensors, lambda v: v)).activations()


def _pushed(call: Call, velocities: Sequence[Tensor]) -> list[Tensor]:
    """Return the derivative of the layer's activations, ``[copy batch ...]``, as the input moves.

    Where torch has no forward mode (an LSTM on a CPU in float32), it is the transpose of the pull.
    """
    primals, tangents = call.x.tensors, tuple(folded(v) for v in velocities)

    def function(*tensors: Tensor) -> Tensors:
        return _activations(call, tensors)

    try:
        moved = jvp(function, primals, tangents)[1]
    except NotImplementedError:
        outputs, pull = vjp(function, *primals)  # pyright: ignore[reportAssignmentType]
        zeros = tuple(torch.zeros_like(output) for output in outputs)
        moved = vjp(lambda *cotangents: pull(cotangents), *zeros)[1](tangents)
    return [unfolded(m, call.copies) for m in moved]


def _along(call: Call, baseline: Any, steps: int, quadrature: str, path: Path) -> tuple[Any, list[float]]:
    """Return the points of the paths from the baselines to `x`, and their weights."""
    nodes, weights = quadrature_of(quadrature, steps)
    starts, end = ends_of(call, baseline)

    def point(k: int) -> Point:
        return on_path(path, starts[k // steps], end, nodes[k % steps])

    return point, [w / len(starts) for w in weights] * len(starts)
