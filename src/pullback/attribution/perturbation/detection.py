"""A target for detectors: detections similar to a given one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# -- detections


def similar_detections(box: Tensor, probabilities: Tensor, *, objectness: bool = True) -> Callable[[Tensor], Tensor]:
    r"""Make a target of one detection: how well the best of the model's proposals matches it.

    .. math:: s = \max_j \, \mathrm{IoU}(b, b_j) \cdot \cos(p, p_j) \cdot o_j

    With `rise` this is D-RISE.

    Args:
        box: ``[4]``: left, top, right, bottom; or ``[batch 4]``.
        probabilities: Of the classes, ``[class]`` or ``[batch class]``.
        objectness: The proposals have it.

    Returns:
        A function from proposals ``[batch proposal 4 + 1 + class]`` (without the 1 if not `objectness`) to scores
        ``[batch]`` in [0, 1], to be given as `target`. Where the batch is repeated, so are the detections.

    Example:
        >>> proposals = torch.tensor([[[0.0, 0, 2, 2, 1, 0, 1], [1.0, 0, 3, 2, 1, 0, 1]]])
        >>> score = similar_detections(torch.tensor([0.0, 0, 2, 2]), torch.tensor([0.0, 1.0]))
        >>> score(proposals).tolist()
        [1.0]

    Reference:
        Petsiuk et al., Black-box Explanation of Object Detectors via Saliency Maps, 2021, sec. 3.2.
    """
    if box.shape[-1:] != (4,):
        raise ValueError(f"`box` must be [4] or [batch 4], got {list(box.shape)}.")

    def best_match(proposals: Tensor) -> Tensor:
        def rows(v: Tensor) -> Tensor:
            v = v.to(proposals).reshape(-1, 1, v.shape[-1])
            return v.repeat(len(proposals) // len(v), 1, 1)

        wanted, classes = rows(box), rows(probabilities)
        boxes, found = proposals[..., :4], proposals[..., 4 + objectness :]
        low, high = torch.maximum(boxes[..., :2], wanted[..., :2]), torch.minimum(boxes[..., 2:], wanted[..., 2:])
        common = (high - low).clamp(min=0).prod(-1)
        areas = [(b[..., 2:] - b[..., :2]).clamp(min=0).prod(-1) for b in (boxes, wanted)]
        overlap = common / (areas[0] + areas[1] - common).clamp(min=1e-12)
        likeness = torch.cosine_similarity(found, classes, dim=-1)
        certainty = proposals[..., 4] if objectness else torch.ones_like(overlap)
        return (overlap * likeness * certainty).amax(1)

    return best_match
