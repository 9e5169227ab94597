"""Every public method at a budget that two cores can pay, with two controls that know nothing.

Budgets are small where a method is dear: a method may do better at its paper's. What each was called with stands in the
tidy table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import pullback
from pullback.evaluation.examples import Example
from pullback.evaluation.runner import Entry

LEFT_OUT = {
    "saliency": "the driver behind the others: on its own it gives the map of `gradient`",
    "integrated_hessians": "gives pairs of features, not a map",
    "discretised_integrated_gradients": "for words",
    "attention_relevance": "for attention, which neither network has",
    "attention_rollout": "for attention, which neither network has",
    "attention_weights": "for attention, which neither network has",
}


def centre(params: Any, model: Any, x: Tensor, target: Any, *, sigma: float = 0.25) -> Tensor:
    """Point at the middle of the image, a Gaussian `sigma` of its side wide: a control that sees nothing."""
    rows, columns = (torch.linspace(-0.5, 0.5, n, dtype=x.dtype, device=x.device) for n in x.shape[-2:])
    return torch.exp(-(rows[:, None] ** 2 + columns**2) / (2 * sigma**2)).expand(len(x), 1, -1, -1)


def random_map(params: Any, model: Any, x: Tensor, target: Any, *, seed: int = 0) -> Tensor:
    """Point anywhere, the same place for every target: a control that sees nothing."""
    noise = torch.rand(x.shape[-2:], generator=torch.Generator().manual_seed(seed + int(x.abs().sum() * 1000) % 9973))
    return noise.to(x).expand(len(x), 1, -1, -1)


def edges(params: Any, model: Any, x: Tensor, target: Any) -> Tensor:
    """Point at edges of the image, the size of its derivative: a control that sees no model."""
    across, down = (torch.diff(x, dim=axis, prepend=x.narrow(axis, 0, 1)) for axis in (-1, -2))
    return (across**2 + down**2).sum(1, keepdim=True).sqrt()


def xrai_of_its_segments(
    params: Any,
    model: Any,
    x: Tensor,
    target: Any,
    *,
    scales: tuple[float, ...],
    least_size: int,
    dilation: int,
    **options: Any,
) -> Tensor:
    """XRAI on Felzenszwalb's segments of the image."""
    how = {"least_size": least_size, "dilation": dilation}
    segments = pullback.felzenszwalb_segments(x[0].expand(3, -1, -1), scales, **how)
    return pullback.xrai(params, model, x, target, segments=segments, **options)


def cells(size: Sequence[int], count: int) -> Tensor:
    """Number the cells of a grid of `count` x `count` over an image, as features of an input of batch 1."""
    rows, columns = (torch.arange(n) * count // n for n in size)
    return (rows[:, None] * count + columns)[None]


@dataclass(frozen=True)
class Places:
    """Where in a network the methods that need a layer look."""

    last: str  # the last activation with positions, which the pooling reads
    narrow: str  # of few channels, for methods that run the model once a channel
    fine: str  # of more positions, for relevance
    layers: tuple[str, ...]
    head: str
    contrast: str


LITE0 = Places("_swish#1", "_blocks.15", "_blocks.10", ("_blocks.4", "_blocks.10", "_blocks.15"), "_fc", "_bn1")
SMALL = Places("relu3", "relu3", "relu2", ("relu1", "relu2", "relu3"), "head", "norm3")


def entries(examples: Sequence[Example], places: Places, *, steps: int, samples: int, side: int) -> dict[str, Entry]:
    """Every public method that gives a map of one image, and the controls.

    Args:
        examples: The last three are the backgrounds of methods that need data.
        places: The network's layers.
        steps: Of paths, and noisy copies.
        samples: Of methods that run the model on covered inputs.
        side: Cells along a side for methods over features.
    """
    x = examples[0].x
    size, at, chunk = x.shape[1:], {"layer": places.last}, {"chunk_size": 8}
    peak: dict[str, Any] = {"reduce": "peak"}
    path, scored = {"steps": steps, **chunk}, {"layer": places.narrow, **chunk}
    half = {"steps": max(steps // 2, 2), **chunk}
    others = torch.stack([e.x for e in examples[-3:]])
    relative = size[0] / 224  # what methods give in pixels is meant for images of this size
    segments = {
        "scales": tuple(round(scale * relative, 1) for scale in (150, 500, 1200)),
        "least_size": round(150 * relative**2),
        "dilation": round(5 * relative),
    }
    feature_mask = cells(size, side)
    coarse = cells(size, max(side // 2, 3))
    window = tuple(n // 4 for n in size)
    covered = {"window": window, "stride": tuple(n // 2 for n in window)}
    masked = {"samples": samples, **chunk}
    covers = max(size[0] // 16, 8)
    return {
        "centre (control)": Entry(centre),
        "random (control)": Entry(random_map),
        "edges (control)": Entry(edges),
        "gradient": Entry(pullback.gradient, **peak),
        "input_x_gradient": Entry(pullback.input_x_gradient),
        "guided_backprop": Entry(pullback.guided_backprop, **peak),
        "deconvnet": Entry(pullback.deconvnet, **peak),
        "smooth_grad": Entry(pullback.smooth_grad, {"samples": steps, "chunk_size": 4}, **peak),
        "integrated_gradients": Entry(pullback.integrated_gradients, path),
        "expected_gradients": Entry(pullback.expected_gradients, {"samples": steps, "baselines": others, **chunk}),
        "blur_integrated_gradients": Entry(pullback.blur_integrated_gradients, path),
        "guided_integrated_gradients": Entry(pullback.guided_integrated_gradients, {"steps": steps}),
        "idgi": Entry(pullback.idgi, path),
        "neuron_conductance": Entry(pullback.neuron_conductance, {**half, **at, "neuron": torch.ones(())}),
        "conductance": Entry(pullback.conductance, {**half, **at}),
        "internal_influence": Entry(pullback.internal_influence, {**half, **at}),
        "full_grad": Entry(pullback.full_grad),
        "xrai": Entry(xrai_of_its_segments, {**half, **segments}),
        "cam": Entry(pullback.cam, {**at, "head": places.head}),
        "grad_cam": Entry(pullback.grad_cam, at),
        "linear_approx": Entry(pullback.linear_approx, at),
        "grad_cam_plus_plus": Entry(pullback.grad_cam_plus_plus, at),
        "smooth_grad_cam_plus_plus": Entry(pullback.smooth_grad_cam_plus_plus, {**at, "samples": steps, **chunk}),
        "xgrad_cam": Entry(pullback.xgrad_cam, at),
        "hires_cam": Entry(pullback.hires_cam, at),
        "elementwise_grad_cam": Entry(pullback.elementwise_grad_cam, at),
        "layer_cam": Entry(pullback.layer_cam, at),
        "eigen_cam": Entry(pullback.eigen_cam, at),
        "eigen_grad_cam": Entry(pullback.eigen_grad_cam, at),
        "score_cam": Entry(pullback.score_cam, scored),
        "ss_cam": Entry(pullback.ss_cam, {**scored, "samples": 2}),
        "is_cam": Entry(pullback.is_cam, {**scored, "samples": 2}),
        "ablation_cam": Entry(pullback.ablation_cam, scored),
        "finer_cam": Entry(pullback.finer_cam, at),
        "fused_cam": Entry(pullback.fused_cam, {"layers": places.layers}),
        "refine_cam": Entry(pullback.refine_cam, {"layers": places.layers}),
        "guided_grad_cam": Entry(pullback.guided_grad_cam, at, **peak),
        "lrp": Entry(pullback.lrp),
        "excitation_backprop": Entry(pullback.excitation_backprop, {"layer": places.fine}),
        "contrastive_excitation_backprop": Entry(
            pullback.contrastive_excitation_backprop, {"layer": places.fine, "contrast_layer": places.contrast}
        ),
        "deep_lift": Entry(pullback.deep_lift),
        "deep_lift_shap": Entry(pullback.deep_lift_shap, {"baselines": others}),
        "occlusion": Entry(pullback.occlusion, {**covered, **chunk}),
        "rise": Entry(pullback.rise, {**masked, "link": "softmax"}),
        "sobol_attribution": Entry(pullback.sobol_attribution, {"samples": max(samples // 38, 2), "grid": 6, **chunk}),
        "hsic_attribution": Entry(pullback.hsic_attribution, masked),
        "feature_ablation": Entry(pullback.feature_ablation, {"feature_mask": feature_mask, **chunk}),
        "feature_permutation": Entry(
            pullback.feature_permutation,
            {"feature_mask": feature_mask, "background": others, "samples": 2, **chunk},
        ),
        "shapley_values": Entry(pullback.shapley_values, {"feature_mask": cells(size, 3), **chunk}),
        "shapley_sampling": Entry(
            pullback.shapley_sampling,
            {"feature_mask": coarse, "samples": max(samples // int(coarse.max() + 1), 2), **chunk},
        ),
        "kernel_shap": Entry(pullback.kernel_shap, {"feature_mask": coarse, **masked}),
        "lime": Entry(pullback.lime, {"feature_mask": coarse, **masked}),
        "extremal_perturbation": Entry(
            pullback.extremal_perturbation,
            {
                "areas": 0.2,
                "iterations": samples // 2,
                "learning_rate": 0.05,
                "step": size[0] // 32,
                "sigma": size[0] / 10,
            },
        ),
        "meaningful_perturbation": Entry(
            pullback.meaningful_perturbation,
            {
                "iterations": samples * 3 // 2,
                "grid": covers,
                "area": round(1e-4 * (28 / covers) ** 2, 6),  # the same weight in all as of the method's 28 x 28 cells
                "jitter": max(round(4 * relative), 1),
            },
        ),
    }


# how many examples a method is judged on, where not on all: of the mosaics, the digits, the single tiles
BUDGETS = {
    **dict.fromkeys(
        "smooth_grad integrated_gradients expected_gradients blur_integrated_gradients guided_integrated_gradients "
        "idgi neuron_conductance conductance internal_influence smooth_grad_cam_plus_plus xrai deep_lift_shap "
        "occlusion feature_ablation".split(),
        (3, 50, 2),
    ),
    **dict.fromkeys(
        "score_cam ss_cam is_cam ablation_cam rise sobol_attribution hsic_attribution feature_permutation "
        "shapley_sampling kernel_shap lime".split(),
        (1, 25, 1),
    ),
    **dict.fromkeys("extremal_perturbation meaningful_perturbation".split(), (1, 10, 1)),
    "shapley_values": (0, 25, 1),
}  # fmt: skip


def within_budget(table: Mapping[str, Entry], kind: int, most: int | None = None) -> dict[str, Entry]:
    """Limit how many examples a method is judged on, to its entry in `BUDGETS` at place `kind`, and to `most`."""
    found = {}
    for name, entry in table.items():
        limits = [n for n in (BUDGETS[name][kind] if name in BUDGETS else None, most) if n is not None]
        found[name] = replace(entry, examples=min(limits)) if limits else entry
    return {name: entry for name, entry in found.items() if entry.examples != 0}
