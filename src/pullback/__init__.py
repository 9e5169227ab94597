"""Explain PyTorch models by pure functions on `torch.func`."""

from pullback._core.compiled import compiled
from pullback._core.inspection import activation, layers
from pullback._core.many.over_targets import over_targets
from pullback._core.modules import params_of
from pullback._core.types import Layer, PullbackWarning, Target
from pullback._torch.heap import keep_memory
from pullback.attribution.attention import attention_relevance, attention_rollout, attention_weights
from pullback.attribution.cam.by_classifier import cam
from pullback.attribution.cam.by_gradient import (
    elementwise_grad_cam,
    grad_cam,
    grad_cam_plus_plus,
    hires_cam,
    layer_cam,
    linear_approx,
    smooth_grad_cam_plus_plus,
    xgrad_cam,
)
from pullback.attribution.cam.by_score import ablation_cam, is_cam, score_cam, ss_cam
from pullback.attribution.cam.combined import finer_cam, fused_cam, guided_grad_cam, refine_cam
from pullback.attribution.cam.eigen import eigen_cam, eigen_grad_cam
from pullback.attribution.full_grad import full_grad
from pullback.attribution.gradients import deconvnet, gradient, guided_backprop, input_x_gradient, saliency
from pullback.attribution.paths.conductance import conductance, internal_influence, neuron_conductance
from pullback.attribution.paths.discretised import discretised_integrated_gradients
from pullback.attribution.paths.expected import expected_gradients
from pullback.attribution.paths.guided import guided_integrated_gradients
from pullback.attribution.paths.hessians import integrated_hessians
from pullback.attribution.paths.idgi import idgi
from pullback.attribution.paths.integrated import blur_integrated_gradients, integrated_gradients
from pullback.attribution.perturbation.ablation import feature_ablation, feature_permutation
from pullback.attribution.perturbation.detection import similar_detections
from pullback.attribution.perturbation.extremal import extremal_perturbation
from pullback.attribution.perturbation.lime import lime
from pullback.attribution.perturbation.meaningful import meaningful_perturbation
from pullback.attribution.perturbation.occlusion import occlusion
from pullback.attribution.perturbation.rise import rise
from pullback.attribution.perturbation.sensitivity import hsic_attribution, sobol_attribution
from pullback.attribution.perturbation.shapley import kernel_shap, shapley_sampling, shapley_values
from pullback.attribution.relevance.deep_lift import deep_lift, deep_lift_shap
from pullback.attribution.relevance.excitation import contrastive_excitation_backprop, excitation_backprop
from pullback.attribution.relevance.lrp import lrp
from pullback.attribution.smooth_grad import smooth_grad
from pullback.attribution.xrai import felzenszwalb_segments, xrai
from pullback.rules._table import Rules

__all__ = [
    # calling a model
    "PullbackWarning",
    "Layer",
    "Target",
    "Rules",
    "params_of",
    "layers",
    "activation",
    "over_targets",
    "compiled",
    "keep_memory",
    # one backward pass
    "gradient",
    "saliency",
    "input_x_gradient",
    "guided_backprop",
    "deconvnet",
    "smooth_grad",
    "full_grad",
    # paths from a baseline
    "integrated_gradients",
    "expected_gradients",
    "blur_integrated_gradients",
    "guided_integrated_gradients",
    "discretised_integrated_gradients",
    "idgi",
    "integrated_hessians",
    "conductance",
    "neuron_conductance",
    "internal_influence",
    # class activation maps
    "grad_cam",
    "linear_approx",
    "cam",
    "grad_cam_plus_plus",
    "smooth_grad_cam_plus_plus",
    "xgrad_cam",
    "hires_cam",
    "elementwise_grad_cam",
    "layer_cam",
    "eigen_cam",
    "eigen_grad_cam",
    "score_cam",
    "ss_cam",
    "is_cam",
    "ablation_cam",
    "finer_cam",
    "fused_cam",
    "refine_cam",
    "guided_grad_cam",
    # relevance
    "lrp",
    "excitation_backprop",
    "contrastive_excitation_backprop",
    "deep_lift",
    "deep_lift_shap",
    # attention
    "attention_weights",
    "attention_rollout",
    "attention_relevance",
    # perturbations
    "occlusion",
    "rise",
    "extremal_perturbation",
    "meaningful_perturbation",
    "sobol_attribution",
    "hsic_attribution",
    "similar_detections",
    # features and coalitions of them
    "feature_ablation",
    "feature_permutation",
    "shapley_values",
    "shapley_sampling",
    "kernel_shap",
    "lime",
    # regions
    "xrai",
    "felzenszwalb_segments",
]
