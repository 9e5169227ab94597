"""Judge explanations: is the map where the object is, does the model agree with it, does it last?

    localisation         maps against masks of objects
    pixel_removal        the score as pixels are removed or inserted in the order of the map
    masking              the score where only what the map points to is shown
    prediction           the change in score that an attribution predicts
    information_curves   the score against the information in view
    robustness           methods on inputs that hardly differ
    randomisation        methods on random weights, and on other classes
    sparsity             how few values carry a map

All give one number, or yes or no, for each example, ``[batch]``; papers report their mean. All are pure, run on the
device of what they are given, and under `vmap` over maps and seeds. Metrics with a model are called like a method,
``metric(params, model, x, target, judged)``.

Metrics that read a score turn the output into a probability first, by `link`, as in the papers. They depend on the
image and the model, so that there is no chance level in closed form: judge a random map, ``torch.rand_like(map)``,
beside yours.

`METRICS` tells of each what it judges, what it needs, its direction, range and chance level: by its name a
`Metric` ``(function, judges, model, masks, higher, range, chance)``.

    >>> [name for name, metric in METRICS.items() if metric.masks and metric.chance != "share"]
    ['iou_at_area']
"""

from pullback.metrics._registry import METRICS as METRICS
from pullback.metrics._registry import Metric as Metric
from pullback.metrics.information_curves import accuracy_information as accuracy_information
from pullback.metrics.information_curves import residual_entropy as residual_entropy
from pullback.metrics.information_curves import softmax_information as softmax_information
from pullback.metrics.localisation import energy_pointing_game as energy_pointing_game
from pullback.metrics.localisation import iou_at_area as iou_at_area
from pullback.metrics.localisation import peak as peak
from pullback.metrics.localisation import pointing_game as pointing_game
from pullback.metrics.localisation import pointing_hits as pointing_hits
from pullback.metrics.localisation import relevance_mass as relevance_mass
from pullback.metrics.localisation import relevance_rank as relevance_rank
from pullback.metrics.localisation import top_k_intersection as top_k_intersection
from pullback.metrics.masking import average_drop as average_drop
from pullback.metrics.masking import average_increase as average_increase
from pullback.metrics.pixel_removal import deletion as deletion
from pullback.metrics.pixel_removal import insertion as insertion
from pullback.metrics.pixel_removal import irof as irof
from pullback.metrics.pixel_removal import road as road
from pullback.metrics.prediction import completeness as completeness
from pullback.metrics.prediction import infidelity as infidelity
from pullback.metrics.randomisation import parameter_randomisation as parameter_randomisation
from pullback.metrics.randomisation import random_logit as random_logit
from pullback.metrics.robustness import average_sensitivity as average_sensitivity
from pullback.metrics.robustness import local_lipschitz as local_lipschitz
from pullback.metrics.robustness import max_sensitivity as max_sensitivity
from pullback.metrics.sparsity import complexity as complexity
from pullback.metrics.sparsity import sparseness as sparseness

__all__ = [
    "METRICS",
    "Metric",
    "peak",
    "pointing_hits",
    "pointing_game",
    "energy_pointing_game",
    "relevance_mass",
    "relevance_rank",
    "top_k_intersection",
    "iou_at_area",
    "insertion",
    "deletion",
    "road",
    "irof",
    "softmax_information",
    "accuracy_information",
    "residual_entropy",
    "average_drop",
    "average_increase",
    "infidelity",
    "completeness",
    "max_sensitivity",
    "average_sensitivity",
    "local_lipschitz",
    "parameter_randomisation",
    "random_logit",
    "sparseness",
    "complexity",
]
