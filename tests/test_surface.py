"""The public names: whoever changes one changes this list, and says so in the changelog."""

import inspect

import pullback
from pullback import metrics

PUBLIC = """
PullbackWarning
Layer
Target
Rules
params_of
layers
activation
over_targets
compiled
keep_memory
gradient
saliency
input_x_gradient
guided_backprop
deconvnet
smooth_grad
full_grad
integrated_gradients
expected_gradients
blur_integrated_gradients
guided_integrated_gradients
discretised_integrated_gradients
idgi
integrated_hessians
conductance
neuron_conductance
internal_influence
grad_cam
linear_approx
cam
grad_cam_plus_plus
smooth_grad_cam_plus_plus
xgrad_cam
hires_cam
elementwise_grad_cam
layer_cam
eigen_cam
eigen_grad_cam
score_cam
ss_cam
is_cam
ablation_cam
finer_cam
fused_cam
refine_cam
guided_grad_cam
lrp
excitation_backprop
contrastive_excitation_backprop
deep_lift
deep_lift_shap
attention_weights
attention_rollout
attention_relevance
occlusion
rise
extremal_perturbation
meaningful_perturbation
sobol_attribution
hsic_attribution
similar_detections
feature_ablation
feature_permutation
shapley_values
shapley_sampling
kernel_shap
lime
xrai
felzenszwalb_segments
""".split()

METRICS = """
METRICS
Metric
peak
pointing_hits
pointing_game
energy_pointing_game
relevance_mass
relevance_rank
top_k_intersection
iou_at_area
insertion
deletion
road
irof
softmax_information
accuracy_information
residual_entropy
average_drop
average_increase
infidelity
completeness
max_sensitivity
average_sensitivity
local_lipschitz
parameter_randomisation
random_logit
sparseness
complexity
""".split()


def test_public_names():
    assert list(pullback.__all__) == PUBLIC
    assert list(metrics.__all__) == METRICS


def test_every_public_name_is_there_and_says_what_it_is():
    for name in PUBLIC:
        value = getattr(pullback, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert inspect.getdoc(value), name


def test_nothing_else_is_public():
    stray = {
        name
        for name, value in vars(pullback).items()
        if not name.startswith("_") and name not in PUBLIC and not inspect.ismodule(value)
    }
    assert stray == set()
