"""Explain PyTorch models by pure functions on `torch.func`."""

from pullback._call import PullbackWarning as PullbackWarning
from pullback._call import activation as activation
from pullback._call import layers as layers
from pullback._call import params_of as params_of
from pullback._compiled import compiled as compiled
from pullback._memory import keep_memory as keep_memory
from pullback._taps import Layer as Layer
from pullback._targets import over_targets as over_targets
from pullback.attention import attention_relevance as attention_relevance
from pullback.attention import attention_rollout as attention_rollout
from pullback.attention import attention_weights as attention_weights
from pullback.cam import ablation_cam as ablation_cam
from pullback.cam import cam as cam
from pullback.cam import eigen_cam as eigen_cam
from pullback.cam import eigen_grad_cam as eigen_grad_cam
from pullback.cam import elementwise_grad_cam as elementwise_grad_cam
from pullback.cam import finer_cam as finer_cam
from pullback.cam import fused_cam as fused_cam
from pullback.cam import grad_cam as grad_cam
from pullback.cam import grad_cam_plus_plus as grad_cam_plus_plus
from pullback.cam import guided_grad_cam as guided_grad_cam
from pullback.cam import hires_cam as hires_cam
from pullback.cam import is_cam as is_cam
from pullback.cam import layer_cam as layer_cam
from pullback.cam import linear_approx as linear_approx
from pullback.cam import refine_cam as refine_cam
from pullback.cam import score_cam as score_cam
from pullback.cam import smooth_grad_cam_plus_plus as smooth_grad_cam_plus_plus
from pullback.cam import ss_cam as ss_cam
from pullback.cam import xgrad_cam as xgrad_cam
from pullback.conductance import conductance as conductance
from pullback.conductance import internal_influence as internal_influence
from pullback.conductance import neuron_conductance as neuron_conductance
from pullback.extremal import extremal_perturbation as extremal_perturbation
from pullback.extremal import meaningful_perturbation as meaningful_perturbation
from pullback.fullgrad import full_grad as full_grad
from pullback.gradients import deconvnet as deconvnet
from pullback.gradients import gradient as gradient
from pullback.gradients import guided_backprop as guided_backprop
from pullback.gradients import input_x_gradient as input_x_gradient
from pullback.gradients import saliency as saliency
from pullback.noise import smooth_grad as smooth_grad
from pullback.paths import blur_integrated_gradients as blur_integrated_gradients
from pullback.paths import discretised_integrated_gradients as discretised_integrated_gradients
from pullback.paths import expected_gradients as expected_gradients
from pullback.paths import guided_integrated_gradients as guided_integrated_gradients
from pullback.paths import idgi as idgi
from pullback.paths import integrated_gradients as integrated_gradients
from pullback.paths import integrated_hessians as integrated_hessians
from pullback.perturbations import feature_ablation as feature_ablation
from pullback.perturbations import feature_permutation as feature_permutation
from pullback.perturbations import hsic_attribution as hsic_attribution
from pullback.perturbations import kernel_shap as kernel_shap
from pullback.perturbations import lime as lime
from pullback.perturbations import occlusion as occlusion
from pullback.perturbations import rise as rise
from pullback.perturbations import shapley_sampling as shapley_sampling
from pullback.perturbations import shapley_values as shapley_values
from pullback.perturbations import similar_detections as similar_detections
from pullback.perturbations import sobol_attribution as sobol_attribution
from pullback.regions import felzenszwalb_segments as felzenszwalb_segments
from pullback.regions import xrai as xrai
from pullback.relevance import contrastive_excitation_backprop as contrastive_excitation_backprop
from pullback.relevance import deep_lift as deep_lift
from pullback.relevance import deep_lift_shap as deep_lift_shap
from pullback.relevance import excitation_backprop as excitation_backprop
from pullback.relevance import lrp as lrp
from pullback.rules import Rules as Rules

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
