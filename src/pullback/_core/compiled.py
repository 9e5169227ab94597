"""Whole methods through `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import FunctionType
from typing import Any

import numpy as np
import torch


def compiled(
    method: Callable[..., Any], *, fullgraph: bool = True, dynamic: bool = False, **how: Any
) -> Callable[..., Any]:
    """Compile a method as one graph: forward, backward and reduction.

    ``compiled(method)(params, model, x, target, **options)`` gives what ``method(params, model, x, target, **options)``
    gives, to the dtype's tolerance. The first call with a model takes seconds to minutes. Later ones run what was
    compiled, for any parameters, any class index, and any `x` of the same shape; another shape or other options compile
    once more, up to eight times a model. What was compiled, and the models, live as long as the function does.

    A compiled call does not check what it cannot read: an index that is no class gives NaN, and a change to the model's
    structure after the first call goes unseen. Parameters are given by `params`, and may change.

    ``torch.compile(method)`` alone works too, but compiles each integer target anew, and stops at eight graphs for all
    methods and models together. Here an index becomes a tensor, and each model has its own eight.

    Args:
        method: Any method ``method(params, model, x, target, **options)``, or a `torch.vmap` of one over targets.
        fullgraph: Raise where there is something that cannot be compiled, instead of leaving it out of the graph.
        dynamic: Let one graph serve all shapes; not with `layer`, whose shape is found before the graph is made.
        how: More options of `torch.compile`: `backend`, `mode`.

    Returns:
        A function with the arguments of `method`.

    Raises:
        TypeError: If `method` is no function.

    Example:
        >>> model = torch.nn.Linear(3, 5)
        >>> params, x = params_of(model), torch.randn(2, 3)
        >>> fast = compiled(gradient, backend="eager")
        >>> all(torch.equal(fast(params, model, x, k), gradient(params, model, x, k)) for k in range(5))
        True
    """
    if not callable(method):
        raise TypeError(f"`method` must be a method of pullback, or a function like one, got {type(method).__name__}.")
    graphs: dict[Any, Callable[..., Any]] = {}

    def whole(params: Any, model: Any, x: Any, target: Any, options: dict[str, Any]) -> Any:
        return method(params, model, x, target, **options)

    @wraps(method)
    def called(params: Any, model: Any, x: Any, target: Any, **options: Any) -> Any:
        if model not in graphs:
            own = FunctionType(whole.__code__.replace(), globals(), closure=whole.__closure__)  # torch counts by code
            graphs[model] = torch.compile(own, fullgraph=fullgraph, dynamic=dynamic, **how)
        if isinstance(target, int | np.integer | np.ndarray | list | range):
            target = torch.as_tensor(np.asarray(target))
        return graphs[model](params, model, x, target, options)

    return called
