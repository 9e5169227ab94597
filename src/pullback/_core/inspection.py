"""Look into a model without explaining it: which layers it has, and what they return."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pullback._core.call import Call, InputTree
from pullback._core.shapes import all_shapes
from pullback._core.types import Inputs, Layer, Model, Params


def activation(params: Params, model: Model, x: Inputs, *, layer: str | Layer) -> Tensor:
    """Read a layer's activation, ``[batch ...]``. Costs 1 forward.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(inplace=True))
        >>> params, x = params_of(model), torch.randn(2, 3)
        >>> torch.equal(activation(params, model, x, layer="0"), model[0](x))
        True
    """
    return Call.bind(params, model, x, output=Layer.of(layer)).forward()


def layers(params: Params, model: nn.Module, x: Inputs) -> dict[str, tuple[torch.Size, ...]]:
    """List the layers that a forward calls: name -> shape of what it returns, one a call, in the order they finish.

    Costs no compute where the model runs on the meta device. Layers that return no tensor are left out.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
        >>> layers(params_of(model), model, torch.zeros(2, 3))
        {'0': (torch.Size([2, 4]),), '1': (torch.Size([2, 4]),)}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module to have layers, got {type(model).__name__}.")
    InputTree(x)
    return all_shapes(params, model, x)
