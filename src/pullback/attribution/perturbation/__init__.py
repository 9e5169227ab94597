"""Explain by perturbing: run the model on many changed inputs, and account for the change of its score.

Costs are quoted in forwards. The perturbations do not depend on the target, so that under `vmap` over targets one
forward of each perturbed input serves all of them.
"""
