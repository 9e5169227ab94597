"""Integrated gradients: the gradient summed along a path from a baseline to the input."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch import Tensor

from pullback import maps
from pullback._core.call import Call, InputTree
from pullback._core.entry import method
from pullback._core.types import ChunkSize, Inputs, Layer, Model, Output, Params, Progress, Target
from pullback.attribution.paths._along import convergence_delta, ends_of, slope_along
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


@method("paths", small={"steps": 3}, forwards=lambda o: o["steps"], reads=1)
def integrated_gradients(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    baseline: Any = None,
    steps: int = 50,
    quadrature: Quadrature = "gauss_legendre",
    path: Path = straight,
    layer: str | Layer = "",
    chunk_size: ChunkSize = "auto",
    progress: Progress = None,
    rules: Rules = None,
    output: Output = None,
    return_info: bool = False,
) -> Any:
    r"""Integrate the gradient along a path from a baseline to the input, or to its activation at a layer.

    .. math:: a_i = \int_0^1 \partial_i f(\gamma(\alpha)) \, \dot\gamma_i(\alpha) \, d\alpha
              \overset{\text{straight}}{=} (x_i - b_i) \int_0^1 \partial_i f(b + \alpha (x - b)) \, d\alpha

    The integral is a Gauss-Legendre sum, exact for polynomials up to degree ``2 steps - 1``. Attributions add up to the
    difference in score between the path's ends, up to the error of that sum. Costs `steps` gradients; under `vmap`
    over targets the forwards are shared. Memory follows `chunk_size`, not `steps`.

    Args:
        params, model, x, target, layer, rules, output: See `gradient`. A cotangent as `target` is taken as
            it is at each point.
        baseline: Start of the path, with the structure of `x`, broadcast to it. Zeros if omitted. A list means several,
            and the mean over them. With `layer`, the path starts at the baseline's activation, and integer members of
            `x` may have a baseline too; where `x` holds nothing else and none is given, it starts at zero activation.
        steps: Points on the path.
        quadrature: ``"gauss_legendre"``, ``"riemann_left"``, ``"riemann_right"``, ``"riemann_middle"`` or
            ``"trapezoid"``.
        path: From baseline, input (or activations) and `alpha` in [0, 1] to a point, for each tensor; straight if
            omitted. Its velocity is taken by `torch.func.jvp`.
        chunk_size: Points evaluated together: ``"auto"`` for as many as run fast, and under `over_targets` as its
            memory allows; `None` for all.
        progress: Called with (points done, points in all).
        return_info: Return ``(attribution, info)``. ``info["convergence_delta"]``, ``[batch]``, is the sum of the
            attribution less the difference in score. Costs a forward for each end.

    Returns:
        Attribution, shaped like `x` or the activation, signed, in units of the score.

    Raises:
        ValueError: If `steps` is less than 1, or `baseline` does not broadcast to `x`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> params, x = params_of(model), torch.ones(4, 3)
        >>> a = integrated_gradients(params, model, x, target=0)
        >>> torch.allclose(a.sum(1), model(x)[:, 0] - model(0 * x)[:, 0], atol=1e-5)
        True

    Reference:
        Sundararajan, Taly & Yan, Axiomatic Attribution for Deep Networks, 2017, sec. 3.
    """
    call = Call.bind(params, model, x, layer, table_of(rules), output)
    nodes, weights = quadrature_of(quadrature, steps)
    starts, end = ends_of(call, baseline)

    def point(k: int) -> Point:
        return on_path(path, starts[k // steps], end, nodes[k % steps])

    a = integral(
        partial(slope_along, call, target),
        point,
        [w / len(starts) for w in weights] * len(starts),
        chunk_size,
        end,
        progress,
    )
    if not return_info:
        return call.like(a)
    first = [on_path(path, start, end, 0.0)[0] for start in starts]
    return call.like(a), {"convergence_delta": convergence_delta(call, target, a, first, end)}


@method(
    "paths",
    "attribution",
    "positions",
    small={"steps": 2, "sigma": 0.3},
    forwards=lambda o: o["steps"],
    mechanism="formula",
)
def blur_integrated_gradients(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    *,
    sigma: float = 0.2,
    steps: int = 50,
    quadrature: Quadrature = "gauss_legendre",
    padding: str = "replicate",
    chunk_size: ChunkSize = "auto",
    progress: Progress = None,
    rules: Rules = None,
    output: Output = None,
    return_info: bool = False,
) -> Any:
    r"""Integrate the gradient along the path from the blurred input to the input.

    .. math:: a = \int_0^1 \nabla f(\gamma(\alpha)) \odot \dot\gamma(\alpha) \, d\alpha, \quad
              \gamma(\alpha) = G_{(1 - \alpha) \sigma} * x

    The path adds detail without a baseline's colour. Attributions add up to the difference in score between the input
    and its blurred form. Costs `steps` gradients. The velocity of the path is exact; the reference implementation takes
    differences.

    Args:
        params, model, x, target, rules, output: See `gradient`; `x` is ``[batch channel ...]``.
        sigma: Standard deviation of the Gaussian at the start, as a fraction of the longer side.
        padding: What lies beyond the border: see `pullback.maps.smooth`.
        steps, quadrature, chunk_size, progress, return_info: See `integrated_gradients`.

    Returns:
        Attribution, shaped like `x`, signed, in units of the score.

    Raises:
        ValueError: If `sigma` is not positive.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
        >>> params, x = params_of(model), torch.ones(1, 1, 8, 8)
        >>> a = blur_integrated_gradients(params, model, x, 0)  # a flat image loses nothing by blur
        >>> torch.allclose(a, torch.zeros_like(a), atol=1e-5)
        True

    Reference:
        Xu, Venugopalan & Sundararajan, Attribution in Scale and Space, 2020, sec. 3.
    """
    if not sigma > 0:
        raise ValueError(f"`sigma` must be a positive fraction of the longer side, got {sigma}.")
    if any(t.ndim < 3 for t in InputTree(x).tensors):
        raise ValueError("`x` must have spatial axes, [batch channel ...], to be blurred.")

    def sharpen(start: Tensor, end: Tensor, alpha: Tensor) -> Tensor:
        widest = sigma * max(end.shape[2:])
        return maps.blurred(end, (1 - alpha) * widest, math.ceil(4 * widest), padding)

    sums: dict[str, Any] = {"steps": steps, "quadrature": quadrature, "path": sharpen}
    sums |= {"chunk_size": chunk_size, "progress": progress}
    where: dict[str, Any] = {"rules": rules, "output": output}
    return integrated_gradients(params, model, x, target, **sums, **where, return_info=return_info)
