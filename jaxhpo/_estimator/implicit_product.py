"""The implicit hypergradient for the pairs that keep its linear solve from one outer step to the next."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxhpo._adjoint.implicit import Implicit, is_symmetric, trained_state_is_constant
from jaxhpo._adjoint.implicit_function import pull_back
from jaxhpo._core.stop_gradient import warn_perturbed
from jaxhpo._core.trace import differentiable_inputs
from jaxhpo._core.tree import all_finite, is_inexact, names, partition
from jaxhpo._core.types import HypergradientInfo, LinearInfo, LinearStatus, PyTree, Solution
from jaxhpo._inner.problem import Problem, info_of


def implicit_product(
    rule: Implicit, method: Any, problem: Problem, ended: tuple, outer_loss: Callable, outer_batch: Any, start: PyTree
) -> tuple[PyTree, PyTree, HypergradientInfo]:
    """The hypergradient at the end of an inner run.

    With F the outer loss, g the condition and θ the parameters at the end,

        Hᵀ q = ∂F/∂θ,  H = ∂g/∂θ,      dF/dh = ∂F/∂h − (∂g/∂h)ᵀ q.

    Args:
      rule: the linear solver, for Hᵀ, and the curvature.
      method: the method, for messages.
      problem: the inner problem.
      ended: the final state, and the number of steps taken.
      outer_loss: `(solution, hparams, outer_batch) -> (value, metrics)`.
      outer_batch: its data.
      start: where the linear solve starts; None for zeros.

    Returns:
      The hypergradient; q, or zeros, where the next linear solve may start; and the report.
    """
    final, steps = ended
    hparams, info = problem.residual_inputs[0], info_of(problem, final, steps)

    def outer(params, hparams, others):
        return outer_loss(Solution(params, others[0], others[1], info), hparams, outer_batch)

    _warn_of_trained_state(method, final, lambda others: outer(final.params, hparams, others)[0])
    gradient = jax.value_and_grad(outer, (0, 1), has_aux=True)
    (value, metrics), (by_params, direct) = gradient(final.params, hparams, final[1:])
    root, leaves = rule.root(problem, final, method)
    before, size = len(jax.tree.leaves(final.model_state)), len(jax.tree.leaves(hparams))
    perturbed = [before <= i < before + size for i in range(len(leaves))]
    symmetric = is_symmetric(problem, rule.linear_solver, rule.curvature)
    pulled, q, linear = pull_back(root, final.params, leaves, perturbed, by_params, start, symmetric)
    hypergrad = jax.tree.map(jnp.add, direct, jax.tree.unflatten(jax.tree.structure(hparams), pulled))
    return hypergrad, _next_start(q, linear), HypergradientInfo(value, metrics, info, linear)


def _next_start(q, linear: LinearInfo | None):
    """q, or zeros where q is a bad start: NaN would stay for ever, and under an indefinite H iterates drift apart."""
    good = all_finite(q)
    if linear is not None:
        good &= (linear.status != LinearStatus.INDEFINITE) & (linear.status != LinearStatus.NOT_FINITE)
    return jax.tree.map(lambda x: jnp.where(good, x, 0), q)


def _warn_of_trained_state(method, final, outer_of_others):
    """Warns where the outer loss reads the optimiser's or the model's state, which the rule treats as constant."""
    leaf_names = [*names(final.opt_state, "opt_state"), *names(final.model_state, "model_state")]
    inexact = jax.tree.map(is_inexact, final[1:])
    values, combine = partition(final[1:], inexact)
    read = differentiable_inputs(lambda values: outer_of_others(combine(values)), values) if values else []
    candidates = [name for name, x in zip(leaf_names, jax.tree.leaves(inexact), strict=True) if x]
    warn_perturbed(candidates, read, trained_state_is_constant(method))
