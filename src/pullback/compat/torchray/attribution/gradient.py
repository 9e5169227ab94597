"""The gradient method: the largest magnitude of the derivative over channels.

    map = gradient(model, x, target)

The pure functions are `pullback.gradient`, signed and per channel, and `pullback.saliency`, the same map.

Reference:
    Simonyan, Vedaldi & Zisserman, Deep Inside Convolutional Networks, 2014.
"""

from __future__ import annotations

from typing import Any

from pullback.compat.torchray._arguments import ArgumentError
from pullback.compat.torchray.attribution.common import NullContext, saliency

__all__ = ["gradient"]


def gradient(*args: Any, context_builder: None = None, **kwargs: Any) -> Any:
    """Give the gradient map. Takes what `common.saliency` takes, but for `context_builder`."""
    if context_builder is not None:
        raise ArgumentError("`context_builder` must be None: the gradient method changes nothing in the backward.")
    return saliency(*args, context_builder=NullContext, **kwargs)
