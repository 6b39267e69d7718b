"""Differentiate the equation that the solution satisfies, not the path to it."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any

import jax

from jaxhpo._adjoint.implicit_function import Rule, attach, check_linear_solver, declared
from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.stop_gradient import blind, constant
from jaxhpo._core.tree import names, upcast
from jaxhpo._core.types import InnerState, LinearSolver
from jaxhpo._core.validate import describe
from jaxhpo._inner.gradient import own_rule
from jaxhpo._inner.loop import run
from jaxhpo._inner.problem import Problem
from jaxhpo._linear.cg import CG
from jaxhpo._linear.curvature import GaussNewton


@dataclasses.dataclass(frozen=True)
class Implicit:
    r"""Implicit differentiation at the solution.

    With g the condition (:math:`\nabla_\theta L` for `from_optax`) and H its Jacobian in θ,
    :math:`(d\theta/dh)^\top v = -(\partial_h g)^\top H^{-1} v`, with :math:`H^{-1} v` from a linear solver.
    The initial state, the optimiser's state and the model state are constants of the differentiation, and so is every
    setting of the optimiser: a `ZeroHypergradientWarning` says so where one is being differentiated.

    Several outer losses share one training and one linearisation: `jax.jacrev` of a vector of them solves for all
    right-hand sides at once.

    **Cost and bias**: T gradients forward, then one linear solve (see the solver) and one mixed product; memory
    independent of T. Exact where the inner problem has converged (`info.optimality` → 0) and the linear solve is.

    Args:
      linear_solver: `CG()`, `Neumann(num_terms, step_size)`, `Identity(scale)`, `Direct()`, or any function
        `(matvec, b, x0=None) -> (x, LinearInfo)`.

      curvature: `"hessian"`, the Jacobian of the condition itself, or a positive semi-definite stand-in:
        `gauss_newton(...)`, `outer_product(...)`.

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
    curvature: str | GaussNewton = "hessian"

    def __post_init__(self):
        check_linear_solver(self.linear_solver)
        if self.curvature != "hessian" and not isinstance(self.curvature, GaussNewton):
            raise JaxhpoError(
                f"`Implicit(curvature=...)` got {describe(self.curvature)}, which is no curvature: write 'hessian', "
                f"`gauss_newton(predict, output_loss)` or `outer_product(example_loss)`."
            )

    def run(self, problem: Problem) -> tuple[InnerState, jax.Array]:
        """Runs the inner loop, undifferentiated, and attaches the implicit derivative to the parameters it ends at."""
        self.check(problem)
        state, steps = run(self._as_constants(problem))
        return self._attach(problem, state), steps

    def check(self, problem: Problem) -> None:
        """Raises where the linear solver does not suit the problem's condition."""
        needs_symmetry = declared(self.linear_solver).needs_symmetry
        if needs_symmetry and self.curvature == "hessian":
            _warn_of_own_rule(self, problem)
        symmetric = problem.solver.symmetric or self.curvature != "hessian"
        if needs_symmetry and not symmetric:
            raise JaxhpoError(
                f"{self!r} needs a symmetric matrix, but the Jacobian of `{problem.solver.name}`'s condition θ − Φ(θ) "
                "is not symmetric in general: use `Neumann(num_terms, 1.0)` or `Direct()`, or give `fixed_point` a "
                f"`condition` that is the gradient of an objective."
            )

    def _as_constants(self, problem):
        """The problem with nothing to differentiate, and a warning for each input that this cuts off altogether."""
        why = f"{self!r} differentiates the equation that the solution satisfies, in which"
        state = constant(
            problem.state,
            names(problem.state, "state"),
            f"is part of the initial state, and {why} no initial value appears, so its hypergradient through this "
            f"solve is exactly zero. `Unroll()` sees it.",
        )
        hparams, closed_over = problem.inputs
        unseen = (
            f"does not appear in the train loss, and {why} only that appears, so its hypergradient through this solve "
            f"is exactly zero. `Unroll()` sees it."
        )
        closed_over = [
            jax.lax.stop_gradient(c) if seen else constant(c, [_closed_over(c)], unseen)
            for c, seen in zip(closed_over, problem.in_residual(), strict=True)
        ]
        xs = problem.xs
        if problem.num_steps > 1:
            xs = constant(
                xs,
                names(xs, "batches"),
                f"is being differentiated, and {why} only the condition's batch appears (the last, unless "
                f"`condition_batch` is given): all others have a hypergradient of exactly zero. `Unroll()` sees them.",
                partial=True,
            )
        return problem._replace(
            state=state,
            inputs=(jax.lax.stop_gradient(hparams), closed_over),
            xs=jax.lax.stop_gradient(xs),
            residual_inputs=jax.lax.stop_gradient(problem.residual_inputs),
        )

    def _attach(self, problem, state):
        state = jax.lax.stop_gradient(state)
        condition, hparams = problem.residual, problem.residual_inputs[0]
        model_state = blind(state.model_state, hparams, trained_state_is_constant(self))
        args = (state.model_state, problem.residual_inputs)
        leaves, structure = jax.tree.flatten(args)

        def residual(params, leaves):
            leaves = leaves[: structure.num_leaves]  # less what the curvature closes over
            return condition(params, *upcast(jax.tree.unflatten(structure, leaves)))

        hparams, batch, closed_over = problem.residual_inputs
        leaf_names = [
            *names(state.model_state, "model_state"),
            *names(hparams, "hparams"),
            *names(batch, "batch"),
            *map(_closed_over, closed_over),
        ]
        curvature = None
        if self.curvature != "hessian":
            apply, consts = curvature_product(self.curvature, problem)
            # A stand-in for the Jacobian: what it closes over is not differentiated a second time.
            leaves, leaf_names = [*leaves, *jax.lax.stop_gradient(consts)], [*leaf_names, *map(_closed_over, consts)]
            curvature = functools.partial(_curvature_product, apply, structure)

        remedy = not_in_condition(self, problem.solver.name)
        rule = Rule(residual, self.linear_solver, curvature, tuple(leaf_names), remedy)
        key = problem.require_key(self) if declared(self.linear_solver).needs_key else None
        return state._replace(params=attach(rule, state.params, leaves, key), model_state=model_state)


def curvature_product(curvature, problem) -> tuple:
    """`(params, residual inputs, consts, v) -> v times the curvature`, and `consts`."""
    pure, consts = problem.at_condition(
        lambda params, hparams, batch, v: curvature.linearise(params, hparams, batch)(v), upcast(problem.state.params)
    )

    def apply(params, residual_inputs, consts, v):
        hparams, x, _ = upcast(residual_inputs)
        return pure(consts, params, hparams, x, v)

    return apply, consts


def _warn_of_own_rule(rule, problem):
    loss = problem.solver.loss
    if loss is None:
        return
    pure, consts = problem.closure_convert(lambda state, h, batch: loss(state.params, h, batch, state.model_state)[0])
    own = own_rule(pure, consts, problem.state, problem.inputs[0], jax.tree.map(lambda x: x[-1], problem.xs))
    if own is not None:
        warnings.warn(
            f"The train loss holds {own}, with a derivative rule of its own, and {rule!r} takes the Hessian to be "
            "symmetric. Where that rule is not the derivative (where it reverses or clips a gradient, say) it is not, "
            "and the hypergradient is wrong: take `Implicit(GMRES())`, `Implicit(Direct())` or `Unroll()`.",
            RuntimeWarning,
            stacklevel=5,
        )


def not_in_condition(rule: Any, solver: str) -> str:
    """What is said of a leaf that the condition cannot see."""
    return (
        f"does not enter the condition of `{solver}`, so under {rule!r} its hypergradient through "
        "this solve is exactly zero. If it is a setting of the optimiser (a learning rate, a momentum), "
        "`Unroll()` sees it; if nothing uses it, remove it; if it enters the outer loss directly, that part is "
        "still right."
    )


def trained_state_is_constant(rule: Any) -> str:
    """What is said of what training leaves behind beside the parameters."""
    return (
        f"was trained with hyperparameters that are being differentiated, and {rule!r} takes it for a constant: "
        f"what the outer loss reads of it (batch statistics) has a hypergradient of exactly zero. `Unroll()` sees "
        "it."
    )


def _curvature_product(apply, structure, params, leaves, v):
    _, residual_inputs = jax.tree.unflatten(structure, leaves[: structure.num_leaves])
    return apply(params, residual_inputs, leaves[structure.num_leaves :], v)


def _closed_over(value) -> str:
    return f"a {describe(value)} that is closed over"
