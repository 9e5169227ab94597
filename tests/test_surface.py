"""The public names: whoever changes one changes this list, and says so in the changelog."""

import inspect

import pullback
from pullback import metrics

PUBLIC = """
PullbackWarning
activation
Layer
layers
params_of
over_targets
compiled
keep_memory
Rules
grad_cam
linear_approx
deconvnet
gradient
guided_backprop
input_x_gradient
saliency
smooth_grad
integrated_gradients
blur_integrated_gradients
conductance
discretised_integrated_gradients
expected_gradients
guided_integrated_gradients
idgi
integrated_hessians
internal_influence
neuron_conductance
ablation_cam
cam
eigen_cam
eigen_grad_cam
elementwise_grad_cam
finer_cam
fused_cam
grad_cam_plus_plus
guided_grad_cam
hires_cam
is_cam
layer_cam
refine_cam
score_cam
smooth_grad_cam_plus_plus
ss_cam
xgrad_cam
contrastive_excitation_backprop
deep_lift
deep_lift_shap
excitation_backprop
lrp
attention_relevance
attention_rollout
attention_weights
full_grad
felzenszwalb_segments
xrai
occlusion
rise
extremal_perturbation
meaningful_perturbation
feature_ablation
feature_permutation
shapley_values
shapley_sampling
kernel_shap
lime
sobol_attribution
hsic_attribution
similar_detections
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
