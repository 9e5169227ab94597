"""Does an explanation depend on what the model learnt, and on the class that it explains?

The functions take the method itself, ``method(params, model, x, target, **options)``. An explanation that stays like
itself when weights are drawn at random, or when another class is explained, does not tell of this model or this class:
it fails the test, however good it looks.

Likeness is Spearman's rank correlation unless told otherwise: in [-1, 1], 1 for the same order, 0 by chance. Where one
of the two explanations is constant there is nothing to compare, and it counts as 0; NaN in either gives NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pullback._core.batching import chunks, report, wide
from pullback._core.call import Call, InputTree
from pullback._core.entry import public
from pullback._core.many.over_targets import over_targets
from pullback._core.modules import named_layers, params_of
from pullback._core.types import Inputs, Model, Output, Params, Progress, Target
from pullback._torch.random import Seed, uniform

Method = Callable[..., Any]
Draw = Callable[[str, Tensor, Tensor], Tensor]
Similarity: TypeAlias = "Literal['spearman', 'pearson', 'cosine'] | Callable[[Tensor, Tensor], Tensor]"


# -- likeness of explanations


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    norms = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(norms == 0, 0, (a * b).sum(-1) / torch.where(norms == 0, 1, norms))


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    constant = (a.amax(-1) == a.amin(-1)) | (b.amax(-1) == b.amin(-1))
    return torch.where(constant, 0, _cosine(a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)))


def _spearman(a: Tensor, b: Tensor) -> Tensor:
    nothing = a.isnan().any(-1) | b.isnan().any(-1)
    return _pearson(_mean_ranks(a), _mean_ranks(b)).masked_fill(nothing, float("nan"))


def _mean_ranks(values: Tensor) -> Tensor:
    """Rank ``[... value]`` from 0 on; equal values share the mean of their ranks."""
    ordered, order = torch.sort(values, dim=-1)
    rises = torch.nn.functional.pad((ordered[..., 1:] != ordered[..., :-1]).long(), (1, 0))
    group = rises.cumsum(-1)
    place = torch.arange(values.shape[-1], device=values.device).expand_as(order)
    empty = torch.zeros_like(order)
    size = empty.scatter_add(-1, group, torch.ones_like(order))
    mean = empty.scatter_add(-1, group, place) / size.clamp(min=1)
    return torch.zeros_like(values).scatter(-1, order, mean.gather(-1, group).to(values.dtype))


_SIMILARITIES = {"spearman": _spearman, "pearson": _pearson, "cosine": _cosine}


def _likeness(similarity: Similarity) -> Callable[[Tensor, Tensor], Tensor]:
    """Give the function that compares ``[sample batch value]`` with ``[batch value]``, ``[sample batch]``."""
    if isinstance(similarity, str):
        if similarity not in _SIMILARITIES:
            raise ValueError(f"`similarity` must be one of {', '.join(_SIMILARITIES)}, or a function: {similarity!r}.")
        return _SIMILARITIES[similarity]

    def of_pairs(a: Tensor, b: Tensor) -> Tensor:
        return similarity(a.flatten(0, 1), b.expand_as(a).flatten(0, 1)).unflatten(0, a.shape[:2])

    return of_pairs


def _flat(explanation: Any, axes: int) -> Tensor:
    """Lay all values of an explanation out behind its first `axes` axes."""
    parts = [t.flatten(axes) for t in pytree.tree_flatten(explanation)[0] if t is not None]
    flat = torch.cat([part.unsqueeze(-1) if part.ndim == axes else part for part in parts], -1)
    return flat.to(wide(flat.dtype))


# -- weights


@public
def parameter_randomisation(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    method: Method,
    *,
    samples: int = 10,
    mode: Literal["cascading", "independent"] = "cascading",
    layers: Sequence[str] | None = None,
    draw: Draw | None = None,
    similarity: Similarity = "spearman",
    seed: Seed = 0,
    chunk_size: int | None = None,
    progress: Progress = None,
    return_info: bool = False,
    **options: Any,
) -> Any:
    r"""Draw weights at random, layer by layer from the top, and measure how like itself an explanation stays.

    .. math:: \frac{1}{L n} \sum_{l=1}^L \sum_{s=1}^n \rho\big(A(\theta), \, A(\theta^{(l, s)})\big)

    with the parameters of layer l, ``"independent"``, or of all layers from the top to l, ``"cascading"``, drawn
    afresh. In [-1, 1]; lower is better, 0 by chance. A method that stays near 1 shows the image, not the model.

    The new values are uniform, with mean and standard deviation of the parameter that they replace, so that activations
    keep their scale; the paper draws from the initialisation. Buffers, such as running statistics, stay. A parameter
    whose values are all equal stays too.

    The explanations of all draws are made in one call of the method under `vmap` over parameters, one call a layer;
    what lies below the drawn layers runs once for all draws. Costs ``layers * samples + 1`` times the method at most.

    Args:
        params, model, x, target: See `gradient`.
        method: ``method(params, model, x, target, **options)``, whose result has the batch first.
        samples: Draws of each layer.
        mode: ``"cascading"``, or ``"independent"``.
        layers: Names of layers, the top one first, each with all that is in it. If omitted every layer that has
            parameters, last registered first.
        draw: Other draws: a function of a parameter's name, the parameter, and sample indices that gives ``[sample
            *shape]``.
        similarity: ``"spearman"``, ``"pearson"``, ``"cosine"``, or a function of two explanations ``[pair value]`` that
            gives ``[pair]``.
        seed: Integer, or an integer tensor ``[]`` (for `vmap` over seeds).
        chunk_size: Draws evaluated together. All of them if omitted. At 1 no `vmap` is at work, and any method will do.
        progress: Called with (layers done, layers in all), over chunks of draws.
        return_info: Give also ``{"similarity": [layer sample batch], "layers": names}``.
        **options: Passed to `method`.

    Returns:
        ``[batch]``, the mean over layers and draws; NaN where an explanation holds NaN.

    Raises:
        ValueError: If `mode` or `similarity` is unknown, there are no parameters to draw, or less than 1 sample.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 2))
        >>> params, x = params_of(model), torch.randn(3, 6)
        >>> blind = lambda params, model, x, target: x  # an explanation that never saw the model
        >>> torch.allclose(parameter_randomisation(params, model, x, 0, blind), torch.ones(3))
        True

    Reference:
        Adebayo, Gilmer, Muelly, Goodfellow, Hardt & Kim, Sanity Checks for Saliency Maps, 2018, sec. 3.
    """
    if mode not in ("cascading", "independent"):
        raise ValueError(f"`mode` must be 'cascading' or 'independent', got {mode!r}.")
    if samples < 1:
        raise ValueError(f"`samples` must be at least 1, got {samples}.")
    alike, whole = _likeness(similarity), _all_params(params, model)
    stages = _stages(model, whole, layers)
    streams = {name: stream for stream, name in enumerate(whole)}

    def redrawn(name: str, index: Tensor) -> Tensor:
        old = whole[name]
        if draw is not None:
            return draw(name, old, index)
        mean, spread = old.mean(), old.std(correction=0)
        drawn = uniform(seed, index.to(old.device), old.shape, old.dtype, streams[name])
        return mean + spread * math.sqrt(12) * (drawn - 0.5)

    def explain(new: dict[str, Tensor]) -> Any:
        return method({**whole, **new}, model, x, target, **options)

    original = _flat(explain({}), 1)
    found: list[list[Tensor]] = [[] for _ in stages]
    for part in chunks(samples, chunk_size):
        index, new = torch.arange(part.start, part.stop, device=original.device), {}
        for stage, names in enumerate(stages.values()):
            new = {} if mode == "independent" else new
            new = {**new, **{name: redrawn(name, index) for name in names}}
            if len(part) == 1:
                changed = _flat(explain({name: tensor[0] for name, tensor in new.items()}), 1).unsqueeze(0)
            else:
                changed = _flat(torch.vmap(explain, randomness="same")(new), 2)
            found[stage].append(alike(changed, original))
            done = stage + 1 + len(stages) * (part.start // (chunk_size or samples))
            report(progress, done, len(stages) * -(-samples // (chunk_size or samples)))
    values = torch.stack([torch.cat(parts) for parts in found])  # [layer sample batch]
    result = values.mean((0, 1))
    return (result, {"similarity": values, "layers": list(stages)}) if return_info else result


def _all_params(params: Params, model: Model) -> dict[str, Tensor]:
    given = params if isinstance(params, tuple) else (params,)
    whole = dict(params_of(model)) if isinstance(model, nn.Module) else {}
    for part in given:
        whole.update(part)
    return whole


def _stages(model: Model, whole: dict[str, Tensor], layers: Sequence[str] | None) -> dict[str, list[str]]:
    """Give the names of the parameters to draw at each stage, the top layer first."""
    names = [name for name, value in whole.items() if value.is_floating_point()]
    if isinstance(model, nn.Module):
        buffers = {f"{prefix}.{name}".lstrip(".") for prefix, layer in named_layers(model) for name in layer._buffers}
        names = [name for name in names if name not in buffers]
    stages: dict[str, list[str]] = {}
    if layers is None:
        for name in names:
            stages.setdefault(name.rpartition(".")[0] or name, []).append(name)
        stages = dict(reversed(stages.items()))
    for layer in layers or ():
        stages[layer] = [name for name in names if name == layer or name.startswith(f"{layer}." if layer else "")]
        if not stages[layer]:
            raise ValueError(f"`layers` names `{layer}`, which has no parameters. Parameters: {', '.join(names[:10])}.")
    if not stages:
        raise ValueError("`params` and `model` hold no floating-point parameter to draw.")
    return stages


# -- classes


@public
def random_logit(
    params: Params,
    model: Model,
    x: Inputs,
    target: Target,
    method: Method,
    *,
    samples: int = 1,
    similarity: Similarity = "spearman",
    seed: Seed = 0,
    output: Output = None,
    chunk_size: int | Literal["auto"] | None = "auto",
    **options: Any,
) -> Tensor:
    r"""Explain other classes at random, and measure how like the target's explanation theirs are.

    .. math:: \frac{1}{n} \sum_{s=1}^n \rho\big(A_t(x), \, A_{t_s}(x)\big), \qquad t_s \ne t

    In [-1, 1]; lower is better, 0 by chance. A method near 1 does not tell classes apart. Costs one forward and
    ``samples + 1`` times the method, with one forward shared by all classes.

    Args:
        params, model, x, output: See `gradient`.
        target: A class index, or one for each example.
        method: ``method(params, model, x, target, **options)``, whose result has the batch first.
        samples: Number of other classes, drawn with replacement. The step from an example's target to the other class
            is the same for all examples.
        similarity: See `parameter_randomisation`; the paper takes the structural similarity of images.
        seed: Integer, or an integer tensor ``[]`` (for `vmap` over seeds).
        chunk_size: Classes evaluated together: see `over_targets`.
        **options: Passed to `method`.

    Returns:
        ``[batch]``; NaN where an explanation holds NaN.

    Raises:
        TypeError: If `target` is no class index.
        ValueError: If the model has less than 2 classes, or `samples` is less than 1.

    Example:
        >>> model = torch.nn.Linear(6, 2)
        >>> params, x = params_of(model), torch.randn(3, 6)
        >>> opposite = {**params, "weight": torch.stack((params["weight"][0], -params["weight"][0]))}
        >>> torch.allclose(random_logit(opposite, model, x, 0, gradient), -torch.ones(3))
        True

    Reference:
        Sixt, Granz & Landgraf, When Explanations Lie: Why Many Modified BP Attributions Fail, 2020, sec. 4.
    """
    if samples < 1:
        raise ValueError(f"`samples` must be at least 1, got {samples}.")
    if callable(target) or target is None or (isinstance(target, Tensor) and target.is_floating_point()):
        raise TypeError("`target` must be a class index, or one for each example: the other classes are drawn from it.")
    answer = Call.bind(params, model, x, output=output).forward()
    if answer.ndim < 2 or answer.shape[1] < 2:
        raise ValueError(f"`model` must put out at least 2 classes, [batch class], got {list(answer.shape)}.")
    alike, classes, batch = _likeness(similarity), answer.shape[1], InputTree(x).batch
    index = torch.arange(samples, device=answer.device)
    step = 1 + (uniform(seed, index, (1,), torch.float32) * (classes - 1)).long()
    own = torch.as_tensor(target, device=answer.device).long().expand(batch)
    targets = torch.cat((own[None], (own + step) % classes))  # [target batch]
    options = options if output is None else {**options, "output": output}
    explained = _flat(over_targets(method, chunk_size=chunk_size)(params, model, x, targets, **options), 2)
    return alike(explained[1:], explained[0]).mean(0)
