"""Differentiate the equation that the solution satisfies, not the path to it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxhpo._errors import JaxhpoError
from jaxhpo._implicit import Rule, attach
from jaxhpo._linear._cg import CG
from jaxhpo._loop import run_until, scan_steps
from jaxhpo._tree import constant, names, upcast
from jaxhpo._types import InnerState, LinearSolver, Problem
from jaxhpo._validate import check_linear_solver, describe


@dataclasses.dataclass(frozen=True)
class Implicit:
    r"""Implicit differentiation at the solution.

    With g the condition (:math:`\nabla_\theta L` for `from_optax`) and H its Jacobian in θ,
    :math:`(d\theta/dh)^\top v = -(\partial_h g)^\top H^{-1} v`, with :math:`H^{-1} v` from a linear solver.
    The initial state, the optimiser's state and the model state are constants of the differentiation, and so is every
    setting of the optimiser: a `ZeroHypergradientWarning` says so where one is being differentiated.

    **Cost and bias**: T gradients forward, then one linear solve (see the solver) and one mixed product; memory
    independent of T. Exact where the inner problem has converged (`info.optimality` → 0) and the linear solve is.

    Args:
      linear_solver: `CG()`, `Neumann(num_terms, step_size)`, `Identity(scale)`, `Direct()`, or any function
        `(matvec, b, x0=None) -> (x, LinearInfo)`.

    Raises:
      JaxhpoError: no linear solver, or one that the solver's condition does not suit.

    Example:
      >>> adjoint = jaxhpo.Implicit(jaxhpo.CG(maxiter=20))

    References:
      Larsen, Svarer, Andersen, Hansen. Adaptive Regularization in Neural Network Modeling. 1998.
      Bengio. Gradient-Based Optimization of Hyperparameters. 2000.
      Lorraine, Vicol, Duvenaud. Optimizing Millions of Hyperparameters by Implicit Differentiation. 2020.
      arXiv:1911.02590
    """

    linear_solver: LinearSolver = CG()

    def __post_init__(self):
        check_linear_solver(self.linear_solver)

    def run(self, problem: Problem) -> tuple[InnerState, jax.Array]:
        """Runs the inner loop, undifferentiated, and attaches the implicit derivative to the parameters it ends at."""
        if getattr(self.linear_solver, "needs_symmetry", False) and not problem.solver.symmetric:
            raise JaxhpoError(
                f"{self!r} needs a symmetric matrix, but the Jacobian of `{problem.solver.name}`'s condition θ − Φ(θ) "
                "is not symmetric in general: use `Neumann(num_terms, 1.0)` or `Direct()`, or give `fixed_point` a "
                f"`condition` that is the gradient of an objective."
            )
        state, steps = self._run_undifferentiated(problem)
        return self._attach(problem, state), steps

    def _run_undifferentiated(self, problem):
        state = constant(
            problem.state,
            names(problem.state, "state"),
            f"is part of the initial state, and {self!r} differentiates the solution's equation, in which no initial "
            f"value appears, so its hypergradient through this solve is exactly zero. `Unroll()` sees it.",
        )
        hparams, closed_over = jax.lax.stop_gradient(problem.inputs)
        xs = jax.lax.stop_gradient(problem.xs)

        def advance(state, x):
            return problem.advance(state, (hparams, closed_over), x)

        if problem.tol is None:
            return scan_steps(advance, state, xs, problem.num_steps, None), jnp.asarray(problem.num_steps, jnp.int32)
        inputs = jax.lax.stop_gradient(problem.residual_inputs)
        return run_until(
            advance, lambda p, m: problem.residual(p, m, inputs), state, xs, problem.num_steps, problem.tol
        )

    def _attach(self, problem, state):
        state = jax.lax.stop_gradient(state)
        args = (state.model_state, problem.residual_inputs)
        leaves, structure = jax.tree.flatten(args)

        def residual(params, leaves):
            return problem.residual(params, *upcast(jax.tree.unflatten(structure, leaves)))

        hparams, batch, closed_over = problem.residual_inputs
        leaf_names = [
            *names(state.model_state, "model_state"),
            *names(hparams, "hparams"),
            *names(batch, "batch"),
            *(f"a {describe(c)} that the loss closes over" for c in closed_over),
        ]
        remedy = (
            f"does not enter the condition of `{problem.solver.name}`, so under {self!r} its hypergradient through "
            "this solve is exactly zero. If it is a setting of the optimiser (a learning rate, a momentum), "
            "`Unroll()` sees it; if nothing uses it, remove it; if it enters the outer loss directly, that part is "
            "still right."
        )
        params = attach(Rule(residual, self.linear_solver, tuple(leaf_names), remedy), state.params, leaves)
        return state._replace(params=params)
