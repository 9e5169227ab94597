"""Is an explanation short? How few values carry an attribution or a map.

The functions take attributions or maps of any shape ``[batch ...]``, look at magnitudes only, and know no model. They
say nothing of whether the explanation is right: a single bright pixel anywhere is the simplest of all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pullback._core.batching import wide


def _magnitudes(attribution: Tensor) -> Tensor:
    if not isinstance(attribution, Tensor) or not attribution.is_floating_point() or attribution.ndim < 2:
        got = list(attribution.shape) if isinstance(attribution, Tensor) else type(attribution).__name__
        raise TypeError(f"`attribution` must be a floating-point tensor [batch ...], got {got}.")
    return attribution.flatten(1).abs().to(wide(attribution.dtype))


def sparseness(attribution: Tensor) -> Tensor:
    r"""Measure how unequally an attribution is spread over its values: the Gini index of the magnitudes.

    .. math:: G = \frac{\sum_{i=1}^n (2 i - n - 1) \, |a|_{(i)}}{n \sum_i |a|_{(i)}}

    with the magnitudes in rising order. In [0, 1 - 1/n]: 0 where all are equal, highest where one value carries all;
    higher is better. Does not depend on the scale. No chance level; independent uniform values
    have about 1/3.

    Args:
        attribution: ``[batch ...]``, an attribution or a map.

    Returns:
        ``[batch]``; NaN where all values are 0, or one is NaN.

    Raises:
        TypeError: If `attribution` is no floating-point tensor with a batch axis.

    Example:
        >>> sparseness(torch.tensor([[3.0, 3.0, 3.0, 3.0], [0.0, 0.0, -7.0, 0.0]]))
        tensor([0.0000, 0.7500])

    Reference:
        Chalasani, Chen, Chowdhury, Jha & Wu, Concise Explanations of Neural Networks using Adversarial Training, 2020,
        sec. 2.5.
    """
    magnitudes = torch.sort(_magnitudes(attribution), dim=1).values
    count = magnitudes.shape[1]
    weight = 2 * torch.arange(1, count + 1, device=magnitudes.device, dtype=magnitudes.dtype) - count - 1
    return (weight * magnitudes).sum(1) / (count * magnitudes.sum(1))


def complexity(attribution: Tensor) -> Tensor:
    r"""Measure how many values an attribution is spread over: the entropy of the magnitudes' shares.

    .. math:: H = -\sum_i p_i \ln p_i, \qquad p_i = |a_i| / \textstyle\sum_j |a_j|

    In [0, ln n] for n values: 0 where one carries all, highest where all are equal; lower is better. Does not depend on
    the scale. No chance level; independent uniform values have about ln n - 0.19.

    Args:
        attribution: ``[batch ...]``, an attribution or a map.

    Returns:
        ``[batch]``, in nats; NaN where all values are 0, or one is NaN.

    Raises:
        TypeError: If `attribution` is no floating-point tensor with a batch axis.

    Example:
        >>> h = complexity(torch.tensor([[3.0, 3.0, 3.0, 3.0], [0.0, 0.0, -7.0, 0.0]]))
        >>> torch.allclose(h.exp(), torch.tensor([4.0, 1.0]))  # as if over so many equal values
        True

    Reference:
        Bhatt, Weller & Moura, Evaluating and Aggregating Feature-based Model Explanations, 2020, sec. 2.3.
    """
    magnitudes = _magnitudes(attribution)
    shares = magnitudes / magnitudes.sum(1, keepdim=True)
    return -torch.special.xlogy(shares, shares).sum(1)
