"""Quantus calls methods of this library: NumPy in, NumPy out.

    metric = quantus.FaithfulnessCorrelation(...)
    scores = metric(model, x, y, a_batch=None, explain_func=quantus_explain(pullback.gradient), device="cpu")

Quantus itself is not needed here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pullback import maps
from pullback._core.modules import params_of


def quantus_explain(
    method: Callable[..., Any], *, reduce: Callable[[torch.Tensor], torch.Tensor] | None = None, **options: Any
) -> Callable[..., np.ndarray]:
    """Make of a method an ``explain_func`` as Quantus calls it: ``explain_func(model, inputs, targets, **kwargs)``.

    Args:
        method: ``method(params, model, x, target, **options)``.
        reduce: From the attribution to a map, such as `pullback.maps.channel_sum`. Quantus sees what `method` gives if
            omitted, resized to the input where it is a map of another size.
        **options: Passed to `method`.

    Returns:
        A function of a model, inputs ``[batch ...]`` and targets ``[batch]``, arrays or tensors, which gives an array
        of the inputs' type ``[batch ...]``. Of what Quantus passes besides, ``device`` says where; the rest is left
        aside.

    Raises:
        TypeError: If `method` is not callable, or gives no single tensor.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> explain = quantus_explain(gradient)
        >>> a = explain(model=model, inputs=np.ones((4, 3), np.float32), targets=np.array([0, 1, 1, 0]))
        >>> bool(np.allclose(a[1], model.weight[1].detach().numpy()))
        True

    Reference:
        Hedström et al., Quantus: An Explainable AI Toolkit for Responsible Evaluation of Neural Network Explanations
        and Beyond, 2023.
    """
    if not callable(method):
        raise TypeError(f"`method` must be a function (params, model, x, target), got {type(method).__name__}.")

    def explain_func(model: Any, inputs: Any, targets: Any, **others: Any) -> np.ndarray:
        device = others.get("device") or next((p.device for p in model.parameters()), None)
        x = torch.as_tensor(np.asarray(inputs) if not isinstance(inputs, torch.Tensor) else inputs).to(device)
        kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        given, x = x.dtype, x.to(kind) if x.is_floating_point() else x
        target = torch.as_tensor(np.asarray(targets) if not isinstance(targets, torch.Tensor) else targets)
        attribution = method(params_of(model), model, x, target.long().reshape(-1).to(device), **options)
        if not isinstance(attribution, torch.Tensor):
            raise TypeError(f"`method` must give one tensor for Quantus, got {type(attribution).__name__}.")
        if reduce is not None:
            attribution = reduce(attribution)
        if attribution.ndim == x.ndim > 2 and attribution.shape[2:] != x.shape[2:]:
            attribution = maps.resize(attribution, x.shape[2:])
        found = attribution.detach().to(given if given.is_floating_point else kind)
        return found.cpu().numpy()

    return explain_func
