"""Outer objectives that select a model: each turns a training into a function of the hyperparameters.

Validation
    folds: masks of held-out examples, stratified if wished
    hold_out, cross_validation: the loss on examples that training did not see, all folds in one program
    leave_one_out, generalised_cross_validation: of ridge regression, in closed form

Evidence: no example is held out
    laplace_evidence: of any model with a prior, by Laplace's approximation; exact where the model is linear
    StochasticDeterminant: its log-determinant by products, for models too large for a matrix

Variational bounds
    Posterior: a diagonal Gaussian over the parameters; draw, kl
    negative_elbo: the bound, as train loss and criterion at once
    closest_prior: the prior's best hyperparameters, in closed form
    local_dense: a dense layer whose outputs are drawn, one noise for each example
    density_at_zero, pruned: what may be left out

Structure: discrete choices, relaxed
    concrete, concrete_log_density: relaxed one-hot samples, straight-through if wished
    width_mask: a number of units that has a derivative
    one_hot, discretisation_gap: back to the discrete choice, and what that costs

All are plain functions of JAX: `jax.grad`, `jit` and `jaxhpo.tune` take them, and the rule of the `solve` in `fit`
decides how they are differentiated.
"""

from jaxhpo.criteria._evidence import StochasticDeterminant, laplace_evidence
from jaxhpo.criteria._ridge import generalised_cross_validation, leave_one_out
from jaxhpo.criteria._structure import concrete, concrete_log_density, discretisation_gap, one_hot, width_mask
from jaxhpo.criteria._validation import CrossValidation, cross_validation, folds, hold_out
from jaxhpo.criteria._variational import (
    Posterior,
    closest_prior,
    density_at_zero,
    draw,
    kl,
    local_dense,
    negative_elbo,
    pruned,
)

__all__ = [
    "CrossValidation",
    "Posterior",
    "StochasticDeterminant",
    "closest_prior",
    "concrete",
    "concrete_log_density",
    "cross_validation",
    "density_at_zero",
    "discretisation_gap",
    "draw",
    "folds",
    "generalised_cross_validation",
    "hold_out",
    "kl",
    "laplace_evidence",
    "leave_one_out",
    "local_dense",
    "negative_elbo",
    "one_hot",
    "pruned",
    "width_mask",
]
