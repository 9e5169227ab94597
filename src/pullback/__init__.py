"""Explain PyTorch models by pure functions on `torch.func`."""

from pullback._core.compiled import compiled as compiled
from pullback._core.forward import activation as activation
from pullback._core.layers import Layer as Layer
from pullback._core.many.over_targets import over_targets as over_targets
from pullback._core.modules import params_of as params_of
from pullback._core.shapes import layers as layers
from pullback._core.types import PullbackWarning as PullbackWarning
from pullback._torch.heap import keep_memory as keep_memory
from pullback.attribution.attention import attention_relevance as attention_relevance
from pullback.attribution.attention import attention_rollout as attention_rollout
from pullback.attribution.attention import attention_weights as attention_weights
from pullback.attribution.cam.by_classifier import cam as cam
from pullback.attribution.cam.by_gradient import elementwise_grad_cam as elementwise_grad_cam
from pullback.attribution.cam.by_gradient import grad_cam as grad_cam
from pullback.attribution.cam.by_gradient import grad_cam_plus_plus as grad_cam_plus_plus
from pullback.attribution.cam.by_gradient import hires_cam as hires_cam
from pullback.attribution.cam.by_gradient import layer_cam as layer_cam
from pullback.attribution.cam.by_gradient import linear_approx as linear_approx
from pullback.attribution.cam.by_gradient import smooth_grad_cam_plus_plus as smooth_grad_cam_plus_plus
from pullback.attribution.cam.by_gradient import xgrad_cam as xgrad_cam
from pullback.attribution.cam.by_score import ablation_cam as ablation_cam
from pullback.attribution.cam.by_score import is_cam as is_cam
from pullback.attribution.cam.by_score import score_cam as score_cam
from pullback.attribution.cam.by_score import ss_cam as ss_cam
from pullback.attribution.cam.combined import finer_cam as finer_cam
from pullback.attribution.cam.combined import fused_cam as fused_cam
from pullback.attribution.cam.combined import guided_grad_cam as guided_grad_cam
from pullback.attribution.cam.combined import refine_cam as refine_cam
from pullback.attribution.cam.eigen import eigen_cam as eigen_cam
from pullback.attribution.cam.eigen import eigen_grad_cam as eigen_grad_cam
from pullback.attribution.full_grad import full_grad as full_grad
from pullback.attribution.gradients import deconvnet as deconvnet
from pullback.attribution.gradients import gradient as gradient
from pullback.attribution.gradients import guided_backprop as guided_backprop
from pullback.attribution.gradients import input_x_gradient as input_x_gradient
from pullback.attribution.gradients import saliency as saliency
from pullback.attribution.paths.conductance import conductance as conductance
from pullback.attribution.paths.conductance import internal_influence as internal_influence
from pullback.attribution.paths.conductance import neuron_conductance as neuron_conductance
from pullback.attribution.paths.discretised import discretised_integrated_gradients as discretised_integrated_gradients
from pullback.attribution.paths.expected import expected_gradients as expected_gradients
from pullback.attribution.paths.guided import guided_integrated_gradients as guided_integrated_gradients
from pullback.attribution.paths.hessians import integrated_hessians as integrated_hessians
from pullback.attribution.paths.idgi import idgi as idgi
from pullback.attribution.paths.integrated import blur_integrated_gradients as blur_integrated_gradients
from pullback.attribution.paths.integrated import integrated_gradients as integrated_gradients
from pullback.attribution.perturbation.ablation import feature_ablation as feature_ablation
from pullback.attribution.perturbation.ablation import feature_permutation as feature_permutation
from pullback.attribution.perturbation.detection import similar_detections as similar_detections
from pullback.attribution.perturbation.extremal import extremal_perturbation as extremal_perturbation
from pullback.attribution.perturbation.lime import lime as lime
from pullback.attribution.perturbation.meaningful import meaningful_perturbation as meaningful_perturbation
from pullback.attribution.perturbation.occlusion import occlusion as occlusion
from pullback.attribution.perturbation.rise import rise as rise
from pullback.attribution.perturbation.sensitivity import hsic_attribution as hsic_attribution
from pullback.attribution.perturbation.sensitivity import sobol_attribution as sobol_attribution
from pullback.attribution.perturbation.shapley import kernel_shap as kernel_shap
from pullback.attribution.perturbation.shapley import shapley_sampling as shapley_sampling
from pullback.attribution.perturbation.shapley import shapley_values as shapley_values
from pullback.attribution.relevance.deep_lift import deep_lift as deep_lift
from pullback.attribution.relevance.deep_lift import deep_lift_shap as deep_lift_shap
from pullback.attribution.relevance.excitation import contrastive_excitation_backprop as contrastive_excitation_backprop
from pullback.attribution.relevance.excitation import excitation_backprop as excitation_backprop
from pullback.attribution.relevance.lrp import lrp as lrp
from pullback.attribution.smooth_grad import smooth_grad as smooth_grad
from pullback.attribution.xrai import felzenszwalb_segments as felzenszwalb_segments
from pullback.attribution.xrai import xrai as xrai
from pullback.rules._table import Rules as Rules

__all__ = [
    "PullbackWarning",
    "activation",
    "Layer",
    "layers",
    "params_of",
    "over_targets",
    "compiled",
    "keep_memory",
    "Rules",
    "grad_cam",
    "linear_approx",
    "deconvnet",
    "gradient",
    "guided_backprop",
    "input_x_gradient",
    "saliency",
    "smooth_grad",
    "integrated_gradients",
    "blur_integrated_gradients",
    "conductance",
    "discretised_integrated_gradients",
    "expected_gradients",
    "guided_integrated_gradients",
    "idgi",
    "integrated_hessians",
    "internal_influence",
    "neuron_conductance",
    "ablation_cam",
    "cam",
    "eigen_cam",
    "eigen_grad_cam",
    "elementwise_grad_cam",
    "finer_cam",
    "fused_cam",
    "grad_cam_plus_plus",
    "guided_grad_cam",
    "hires_cam",
    "is_cam",
    "layer_cam",
    "refine_cam",
    "score_cam",
    "smooth_grad_cam_plus_plus",
    "ss_cam",
    "xgrad_cam",
    "contrastive_excitation_backprop",
    "deep_lift",
    "deep_lift_shap",
    "excitation_backprop",
    "lrp",
    "attention_relevance",
    "attention_rollout",
    "attention_weights",
    "full_grad",
    "felzenszwalb_segments",
    "xrai",
    "occlusion",
    "rise",
    "extremal_perturbation",
    "meaningful_perturbation",
    "feature_ablation",
    "feature_permutation",
    "shapley_values",
    "shapley_sampling",
    "kernel_shap",
    "lime",
    "sobol_attribution",
    "hsic_attribution",
    "similar_detections",
]
