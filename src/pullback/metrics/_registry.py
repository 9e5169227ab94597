"""What each metric judges, needs and gives, as data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from pullback.metrics import (
    information_curves,
    localisation,
    masking,
    pixel_removal,
    prediction,
    randomisation,
    robustness,
    sparsity,
)


class Metric(NamedTuple):
    """A metric and how to read it.

    function: The metric.
    judges: What is given to it last: a ``"map"`` ``[batch 1 ...]``, a signed ``"attribution"`` shaped like the input,
        or the ``"method"`` itself.
    model: Called as ``function(params, model, x, target, judged)``; where False, without the first four.
    masks: Called as ``function(map, masks)``.
    higher: Higher is better; where False, lower is.
    range: The least and greatest value it can have. Where `link` is "softmax", of probabilities.
    chance: What an explanation that knows nothing gets: a number; ``"share"``, the object's share of the image;
        ``"random map"``, what a random map gets on the same images; `None` where the question makes no sense.
    """

    function: Callable[..., Any]
    judges: Literal["map", "attribution", "method"]
    model: bool
    masks: bool
    higher: bool
    range: tuple[float, float]
    chance: float | Literal["share", "random map"] | None


def _localisation(function: Callable[..., Any]) -> Metric:
    return Metric(function, "map", False, True, True, (0, 1), "share")


def _faithfulness(function: Callable[..., Any], higher: bool, low: float = 0) -> Metric:
    return Metric(function, "map", True, False, higher, (low, 1), "random map")


METRICS: dict[str, Metric] = {
    "pointing_game": _localisation(localisation.pointing_game),
    "energy_pointing_game": _localisation(localisation.energy_pointing_game),
    "relevance_mass": _localisation(localisation.relevance_mass),
    "relevance_rank": _localisation(localisation.relevance_rank),
    "top_k_intersection": _localisation(localisation.top_k_intersection),
    "iou_at_area": _localisation(localisation.iou_at_area)._replace(chance="random map"),
    "insertion": _faithfulness(pixel_removal.insertion, higher=True),
    "deletion": _faithfulness(pixel_removal.deletion, higher=False),
    "road": _faithfulness(pixel_removal.road, higher=False),
    "irof": _faithfulness(pixel_removal.irof, higher=True, low=-math.inf),
    "softmax_information": _faithfulness(information_curves.softmax_information, higher=True),
    "accuracy_information": _faithfulness(information_curves.accuracy_information, higher=True),
    "average_drop": _faithfulness(masking.average_drop, higher=False),
    "average_increase": _faithfulness(masking.average_increase, higher=True),
    "infidelity": Metric(prediction.infidelity, "attribution", True, False, False, (0, math.inf), None),
    "completeness": Metric(prediction.completeness, "attribution", True, False, False, (0, math.inf), None),
    "max_sensitivity": Metric(robustness.max_sensitivity, "method", True, False, False, (0, math.inf), None),
    "average_sensitivity": Metric(robustness.average_sensitivity, "method", True, False, False, (0, math.inf), None),
    "local_lipschitz": Metric(robustness.local_lipschitz, "method", True, False, False, (0, math.inf), None),
    "parameter_randomisation": Metric(
        randomisation.parameter_randomisation, "method", True, False, False, (-1, 1), 0.0
    ),
    "random_logit": Metric(randomisation.random_logit, "method", True, False, False, (-1, 1), 0.0),
    "sparseness": Metric(sparsity.sparseness, "map", False, False, True, (0, 1), None),
    "complexity": Metric(sparsity.complexity, "map", False, False, False, (0, math.inf), None),
}
