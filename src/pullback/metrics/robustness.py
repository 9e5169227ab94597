"""Does an explanation stay what it is when the input hardly changes?

The functions take the method itself, ``method(params, model, x, target, **options)``, and run it on copies of the
input with noise. A method that ignores model and input is perfectly robust: robustness says nothing of truth.

Noise depends on seed, sample and position within the example, so that all examples of a batch see the same one. Costs
are in calls of the method, `chunk_size` of them in one batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pullback._core.batching import chunks, wide
from pullback._core.call import InputTree
from pullback._core.entry import public
from pullback._core.inputs import each, folded, repeated, unfolded
from pullback._core.types import Inputs, Model, Params, Target
from pullback._torch.random import Seed, normal, uniform

Method = Callable[..., Any]


def _norm(tree: Any) -> Tensor:
    """Give the Euclidean norm of each example over all tensors, ``[batch]``."""
    squares = [t.flatten(1).to(wide(t.dtype)).square().sum(1) for t in pytree.tree_flatten(tree)[0] if t is not None]
    return torch.stack(squares).sum(0).sqrt()


def _changes(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    method: Method,
    options: dict[str, Any],
    samples: int,
    noise: Callable[[Tensor, Tensor, int], Tensor],
    chunk_size: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Give how far explanations and inputs move, ``[sample batch]``, and the norm of the explanation, ``[batch]``.

    `noise` is called with a tensor of the input, sample indices and the tensor's number.
    """
    if samples < 1:
        raise ValueError(f"`samples` must be at least 1, got {samples}.")
    tree = InputTree(x)
    if not tree.floating:
        raise TypeError("`x` holds no floating-point tensor to add noise to. Give the embedding as `x`.")
    batch = tree.batch
    explanation = method(params, model, x, target, **options)
    changes, distances = [], []
    for part in chunks(samples, chunk_size):
        count = len(part)
        index = torch.arange(part.start, part.stop, device=tree.tensors[0].device)
        noisy = [(t + noise(t, index, k).unsqueeze(1)) for k, t in enumerate(tree.tensors)]
        copies = tree.rebuild([folded(t) for t in noisy], lambda v: repeated(v, count, batch))  # noqa: B023
        moved = method(params, model, copies, repeated(target, count, batch), **options)
        change = each(lambda m, e: folded(unfolded(m, count) - e), moved, explanation)  # noqa: B023
        changes.append(unfolded(_norm(change), count))
        distance = tuple(folded(n - t) for n, t in zip(noisy, tree.tensors, strict=True))
        distances.append(unfolded(_norm(distance), count))
    return torch.cat(changes), torch.cat(distances), _norm(explanation)


def _sensitivity(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    method: Method,
    options: dict[str, Any],
    samples: int,
    radius: float,
    relative: bool,
    seed: Seed,
    chunk_size: int | None,
) -> Tensor:
    """Give the change of the explanation for each sample, ``[sample batch]``."""
    if not radius > 0:
        raise ValueError(f"`radius` must be positive, got {radius}.")

    def noise(t: Tensor, index: Tensor, stream: int) -> Tensor:
        return radius * (2 * uniform(seed, index, t.shape[1:], t.dtype, stream) - 1)

    changes, _, size = _changes(params, model, x, target, method, options, samples, noise, chunk_size)
    return changes / size if relative else changes


@public
def max_sensitivity(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    method: Method,
    *,
    samples: int = 20,
    radius: float = 0.02,
    relative: bool = True,
    seed: Seed = 0,
    chunk_size: int | None = None,
    **options: Any,
) -> Tensor:
    r"""Find the largest change of an explanation within a cube around the input.

    .. math:: \max_{\|\delta\|_\infty \le r} \frac{\|A(x + \delta) - A(x)\|_2}{\|A(x)\|_2}

    over uniform draws: a lower bound of the maximum. At least 0, lower is better; not bounded. No chance level: an
    explanation that never changes gets 0, one of values around 0 drawn anew for each input about the square root of 2.
    Costs ``samples + 1`` times the method.

    Args:
        params, model, x, target: See `gradient`.
        method: ``method(params, model, x, target, **options)``, whose result has the batch first.
        samples: Number of draws.
        radius: The r, in units of `x`.
        relative: Divide by the norm of the explanation, so that methods of any scale compare. The paper's formula has
            no division.
        seed: Integer, or an integer tensor ``[]`` (for `vmap` over seeds).
        chunk_size: Draws evaluated together. All of them if omitted.
        **options: Passed to `method`.

    Returns:
        ``[batch]``; NaN where the explanation is 0 or holds NaN.

    Raises:
        ValueError: If `samples` is less than 1, or `radius` not positive.

    Example:
        >>> model = torch.nn.Linear(6, 2)
        >>> params, x = params_of(model), torch.randn(4, 6)
        >>> max_sensitivity(params, model, x, 0, gradient)  # one gradient everywhere
        tensor([0., 0., 0., 0.])

    Reference:
        Yeh, Hsieh, Suggala, Inouye & Ravikumar, On the (In)fidelity and Sensitivity of Explanations, 2019, sec. 4.
    """
    how = (samples, radius, relative, seed, chunk_size)
    return _sensitivity(params, model, x, target, method, options, *how).amax(0)


@public
def average_sensitivity(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    method: Method,
    *,
    samples: int = 20,
    radius: float = 0.02,
    relative: bool = True,
    seed: Seed = 0,
    chunk_size: int | None = None,
    **options: Any,
) -> Tensor:
    r"""Average the change of an explanation over a cube around the input.

    .. math:: \mathbb{E}_{\|\delta\|_\infty \le r} \frac{\|A(x + \delta) - A(x)\|_2}{\|A(x)\|_2}

    At least 0, lower is better; not bounded, and never above `max_sensitivity`, with the same ends. No chance level.
    Costs ``samples + 1`` times the method.

    Args:
        params, model, x, target, method, samples, radius, relative, seed, chunk_size, **options: See
            `max_sensitivity`.

    Returns:
        ``[batch]``; NaN where the explanation is 0 or holds NaN.

    Raises:
        ValueError: If `samples` is less than 1, or `radius` not positive.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 2))
        >>> call = params_of(model), model, torch.randn(4, 6), 0, gradient
        >>> bool((average_sensitivity(*call) <= max_sensitivity(*call)).all())
        True

    Reference:
        Yeh, Hsieh, Suggala, Inouye & Ravikumar, On the (In)fidelity and Sensitivity of Explanations, 2019, sec. 4.
        Bhatt, Weller & Moura, Evaluating and Aggregating Feature-based Model Explanations, 2020, sec. 2.1.
    """
    how = (samples, radius, relative, seed, chunk_size)
    return _sensitivity(params, model, x, target, method, options, *how).mean(0)


@public
def local_lipschitz(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    method: Method,
    *,
    samples: int = 20,
    noise: float = 0.1,
    seed: Seed = 0,
    chunk_size: int | None = None,
    **options: Any,
) -> Tensor:
    r"""Find how fast an explanation changes near the input.

    .. math:: \max_{x'} \frac{\|A(x) - A(x')\|_2}{\|x - x'\|_2}

    over Gaussian draws around x: a lower bound of the local Lipschitz constant (the paper searches a ball). At least 0,
    lower is better; not bounded, in units of the explanation over those of `x`. No chance level: an explanation that
    never changes gets 0. Costs ``samples + 1`` times the method.

    Args:
        params, model, x, target, method, samples, seed, chunk_size, **options: See `max_sensitivity`.
        noise: Standard deviation of the draws, in units of `x`.

    Returns:
        ``[batch]``; NaN where the explanation holds NaN.

    Raises:
        ValueError: If `samples` is less than 1, or `noise` not positive.

    Example:
        >>> square = lambda params, x: x.square().sum(1) / 2  # its gradient is x
        >>> x = torch.randn(4, 6).double()
        >>> torch.allclose(local_lipschitz({}, square, x, None, gradient), torch.ones(4).double())
        True

    Reference:
        Alvarez-Melis & Jaakkola, On the Robustness of Interpretability Methods, 2018, sec. 3.
    """
    if not noise > 0:
        raise ValueError(f"`noise` must be a positive standard deviation, got {noise}.")

    def draw(t: Tensor, index: Tensor, stream: int) -> Tensor:
        return noise * normal(seed, index, t.shape[1:], t.dtype, stream)

    changes, distances, _ = _changes(params, model, x, target, method, options, samples, draw, chunk_size)
    return (changes / distances).amax(0)
