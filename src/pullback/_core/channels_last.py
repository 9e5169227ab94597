"""Many forwards with constant parameters on a CPU: weights laid out channels last, and how many rows go together.

oneDNN runs convolutions faster on tensors that are laid out channels last, and it is the weights that decide: what a
convolution with such weights puts out, and all that follows, is laid out so. A model may depend on strides (``view``
where ``reshape`` would do). So it is tried on two rows, and keeps its own layout unless it gives the same.

The same forward tells the size of the largest activation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from pullback._core.modules import is_scripted, named_layers
from pullback._core.types import Params
from pullback._ops.accounting import Account
from pullback._torch.internals import compiling, readable

MIN_FORWARDS = 48  # from which a trial of the layout pays


def constant(*tensors: Tensor) -> bool:
    """Whether no transform, derivative or trace outside of this call depends on the tensors."""
    if compiling() or forward_ad._current_level >= 0:
        return False
    return all(readable(t) and not (t.requires_grad and torch.is_grad_enabled()) for t in tensors)


def channels_last(params: Params, model: nn.Module) -> Params | None:
    """Return `params` with the weights of 2-d convolutions laid out channels last; `None` where there are none."""
    given: dict[str, Tensor] = {}
    for part in params if isinstance(params, tuple) else (params,):
        given.update(part)
    laid: dict[str, Tensor] = {}
    for name, layer in named_layers(model):
        if not isinstance(layer, nn.Conv2d) or is_scripted(layer):
            continue
        key = f"{name}.weight" if name else "weight"
        weight = given.get(key, layer._parameters.get("weight"))
        if weight is not None and weight.ndim == 4 and weight.device.type == "cpu" and weight.is_floating_point():
            laid[key] = weight.detach().contiguous(memory_format=torch.channels_last)
    if not laid or not constant(*given.values()):
        return None
    return {**given, **laid}


def tried(params: Params, model: nn.Module, forward: Callable[[Params, Account | None], Tensor]) -> tuple[Params, int]:
    """Return the parameters in the better layout, and the bytes of the largest activation of a forward.

    Costs that forward and another one, or nothing, and 0 bytes, where there is no layout to try.
    """
    laid = channels_last(params, model)
    if laid is None:
        return params, 0
    with torch.no_grad():
        account = Account()
        own = forward(params, account)
        try:
            other = forward(laid, None)
        except Exception:  # a model that cannot take this layout keeps its own
            return params, account.largest
    close = 1e-4 if own.dtype in (torch.float32, torch.float64) else 3e-2
    alike = own.shape == other.shape and bool((own - other).abs().max() <= close * own.abs().max().clamp(min=1e-6))
    return (laid if alike else params), account.largest
