"""Explain PyTorch models by pure functions on `torch.func`."""

from pullback._call import PullbackWarning as PullbackWarning
from pullback._call import activation as activation
from pullback._call import layers as layers
from pullback._call import params_of as params_of
from pullback._taps import Layer as Layer
from pullback._targets import over_targets as over_targets
from pullback.cam import grad_cam as grad_cam
from pullback.cam import linear_approx as linear_approx
from pullback.conductance import conductance as conductance
from pullback.conductance import internal_influence as internal_influence
from pullback.conductance import neuron_conductance as neuron_conductance
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

__all__ = [
    "PullbackWarning",
    "activation",
    "Layer",
    "layers",
    "params_of",
    "over_targets",
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
]
