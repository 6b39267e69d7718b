"""`solve`: an inner optimisation whose result is differentiable by the rule of your choice."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxhpo._adjoint._unroll import Unroll
from jaxhpo._cost import bytes_between_passes, peak_bytes
from jaxhpo._diagnose import watched
from jaxhpo._fraction import check_fraction, thinned
from jaxhpo._gradient import mixed_value_and_grad
from jaxhpo._inputs import (
    check_adjoint,
    check_condition_batch,
    check_is_state,
    check_same_state,
    check_solver,
    check_state,
    check_steps,
    checked_batches_function,
)
from jaxhpo._schedule import EVERYTHING, Sizes
from jaxhpo._solves import UnrolledSolve, report_schedule, report_solve
from jaxhpo._tree import (
    all_finite,
    cast_like,
    cast_varying,
    hoist,
    is_inexact,
    norm,
    num_bytes,
    partition,
    upcast,
    varying_axes,
)
from jaxhpo._types import Adjoint, Info, InnerState, Problem, PyTree, Schedule, Solution, Solver
from jaxhpo._validate import check_hparams, check_key, check_residual, check_traceable_number


def solve(
    solver: Solver,
    state: InnerState,
    hparams: PyTree,
    batches: Any = None,
    *,
    num_steps: int | None = None,
    tol: float | None = None,
    condition_batch: PyTree = None,
    key: jax.Array | None = None,
    adjoint: Adjoint = Unroll(),  # noqa: B008 (frozen)
) -> Solution:
    r"""Trains the inner parameters; the result is differentiable with respect to the hyperparameters.

    Runs :math:`\theta_{t+1} = \Phi_t(\theta_t, h)` for `num_steps` steps from `state`. `jax.grad` of any function of
    the result is a hypergradient, by the rule that `adjoint` names; swap the rule and nothing else changes. `jit`,
    `vmap`, `grad` of `grad`, `scan`, sharding and nesting work as for any JAX function. (For `jax.jvp` alone,
    differentiate in reverse first: `jacfwd(grad(f))`.)

    **Cost and bias**: T gradients forward; backward as the rule says.

    Args:
      solver: the inner problem, from `from_optax`, `momentum_sgd` or `fixed_point`.
      state: where to start: `solver.init(params, hparams)`, or an earlier solution's `.state` (warm start).
      hparams: pytree of floating-point hyperparameters, passed to the loss and to `tx`; None if all are closed over.
      batches: a pytree whose leaves have a leading axis of length `num_steps`, or a pure function of the step index
        (`lambda t: data[jax.random.randint(jax.random.fold_in(key, t), ...)]`), which keeps memory independent of T;
        with None the loss gets `batch=None`.
      num_steps: inner steps T; may be omitted when `batches` is a pytree.
      tol: under `Implicit`, stop when the norm of the condition is below this; `num_steps` is then the maximum. Costs
        one more gradient a step.
      condition_batch: where the condition is evaluated, for `tol`, `info` and the implicit derivative; the last batch
        when None.
      key: feeds the randomised rules.
      adjoint: the derivative rule: `Unroll(...)`, `Implicit(...)`.

    Returns:
      A `Solution`: `params`, `opt_state`, `model_state`, `info`; `.state` to warm-start from.

    Raises:
      JaxhpoError: any input that cannot work, named, with what to write instead.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: jnp.sum((p - h) ** 2), optax.sgd(0.1))
      >>> def outer_loss(h):
      ...     sol = jaxhpo.solve(solver, solver.init(jnp.zeros(2), h), h, num_steps=50)
      ...     return jnp.sum((sol.params - 3.0) ** 2)
      >>> print(jax.grad(outer_loss)(jnp.ones(2)).round(3))
      [-4. -4.]

    References:
      Franceschi, Frasconi, Salzo, Grazzi, Pontil. Bilevel Programming for Hyperparameter Optimization and
      Meta-Learning. 2018. arXiv:1806.04910
    """
    problem = watched(make_problem(solver, state, hparams, batches, num_steps, tol, condition_batch, key, adjoint))
    final, steps = adjoint.run(problem)
    info = info_of(problem, final, steps)
    report_solve(problem, adjoint, info)
    return Solution(*final, info)


def make_problem(
    solver, state, hparams, batches, num_steps, tol, condition_batch, key, adjoint, schedule=None
) -> Problem:
    """The inner solve that `solve`'s arguments describe, checked, with nothing closed over."""
    check_solver(solver)
    check_adjoint(adjoint)
    check_is_state(state)
    hparams = check_hparams(hparams)
    state = check_state(state, solver, hparams)
    num_steps = check_steps(batches, num_steps)
    if tol is not None:
        check_traceable_number("tol", tol, 0, strict=False)
    xs, take = _slices(batches, num_steps)

    first = jax.tree.map(lambda x: x[0], xs)
    if schedule is None:
        rest = (batches, num_steps, tol, condition_batch, key, adjoint)
        peak = _peak_of(adjoint, state, hparams, lambda s, h, schedule: make_problem(solver, s, h, *rest, schedule))
        schedule = _schedule(adjoint, num_steps, solver, state, hparams, lambda: take(first), peak)

    if getattr(adjoint, "thins", False):
        xs, take, first, thin = _with_keys(adjoint, solver, xs, take, key)
    else:
        thin = lambda x: None  # noqa: E731

    def step(state, hparams, x):
        batch = take(x)
        if not schedule.mixed or solver.apply is None:
            return solver.step(state, hparams, batch)
        out, grad = mixed_value_and_grad(solver.loss, state.params, hparams, batch, state.model_state, thin(x))
        return solver.apply(state, hparams, batch, out, grad)

    state, advance, closed_over = _closed_step(step, state, hparams, first)

    def hoist_own(fn, *more):
        return hoist(lambda s, h, x, *more: fn(s, h, take(x), *more), state, hparams, first, *more)

    if condition_batch is None:
        last, batch_of = jax.tree.map(lambda x: x[-1], xs), take
    else:
        batch = jax.eval_shape(lambda: take(first))
        last, batch_of = check_condition_batch(condition_batch, batch), lambda x: x

    def condition(params, model_state, hparams, x):
        return check_residual(solver.condition(params, hparams, batch_of(x), model_state), params)

    own = (state.params, state.model_state, hparams, last)
    try:
        # In the precision of the linear solves: a bfloat16 model's condition is traced in float32 ...
        types = jax.eval_shape(upcast, own)
        pure, consts = hoist(condition, *upcast(own))
    except TypeError:
        # ... unless the model insists on its own type, as a convolution with 16-bit data does.
        types = jax.eval_shape(lambda x: x, own)
        pure, consts = hoist(condition, *own)

    def residual(params, model_state, inputs):
        hparams, x, consts = inputs
        return upcast(pure(consts, *cast_like((params, model_state, hparams, x), types)))

    return Problem(
        advance=advance,
        inputs=(hparams, closed_over),
        xs=xs,
        state=state,
        num_steps=num_steps,
        residual=residual,
        residual_inputs=(hparams, last, consts),
        curvature=_curvature(adjoint, state.params, hparams, last, batch_of),
        tol=tol,
        key=check_key(key),
        schedule=schedule,
        solver=solver,
        hoist=hoist_own,
    )


def _schedule(adjoint, num_steps, solver, state, hparams, first_batch, peak) -> Schedule:
    """What the rule keeps of the steps, chosen by the sizes of what there is to keep."""
    if not hasattr(adjoint, "schedule"):
        return EVERYTHING

    def activations():
        def loss(params):
            return solver.loss(params, hparams, first_batch(), state.model_state)[0]

        return bytes_between_passes(loss, state.params)

    def residuals():
        try:
            return bytes_between_passes(lambda s, h: solver.step(s, h, first_batch()), state, hparams)
        except (TypeError, ValueError, NotImplementedError):  # a step that has no derivative can be taken all the same
            return math.inf

    gradient = 0 if solver.apply is None else num_bytes(state.params)
    sizes = Sizes(num_bytes(state), gradient, activations if gradient else lambda: 0, residuals, peak)
    schedule = adjoint.schedule(num_steps, sizes)
    schedule = schedule._replace(gradients=schedule.gradients and gradient > 0)
    report_schedule(
        lambda: UnrolledSolve(
            adjoint, num_steps, schedule, sizes.state, gradient, sizes.activations(), sizes.residuals()
        )
    )
    return schedule


def _with_keys(adjoint, solver, xs, take, key):
    """Slices that hold a key each, how to take a batch and its random part from them, and the first of them."""
    check_fraction(adjoint, solver, key)
    xs = xs, jax.random.split(key, jax.tree.leaves(xs)[0].shape[0])

    def thin(x):
        return lambda batch: thinned(batch, x[1], adjoint.hvp_fraction)

    return xs, lambda x: take(x[0]), jax.tree.map(lambda x: x[0], xs), thin


def _peak_of(adjoint, state, hparams, make):
    """What run and backward pass would take, by schedule; `make(state, hparams, schedule)` is the problem."""

    def peak(schedule):
        def pulled(state, hparams):
            moved, fill = partition((state, hparams), jax.tree.map(is_inexact, (state, hparams)))
            run = lambda moved: adjoint.run(make(*fill(moved), schedule))[0].params  # noqa: E731
            params, pullback = jax.vjp(run, moved)
            return pullback(params)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the real run will warn
            return peak_bytes(pulled, state, hparams)

    return peak


def _curvature(adjoint, params, hparams, last, batch_of):
    """The products of a rule's own curvature, with nothing closed over."""
    curvature: Any = getattr(adjoint, "curvature", "hessian")
    if curvature == "hessian":
        return None

    def product(params, hparams, x, v):
        return curvature.linearise(params, hparams, batch_of(x))(v)

    params, hparams, last = upcast((params, hparams, last))
    pure, consts = hoist(product, params, hparams, last, params)

    def apply(params, residual_inputs, consts, v):
        hparams, x, _ = upcast(residual_inputs)
        return pure(consts, params, hparams, x, v)

    return apply, consts


def _closed_step(step, state, hparams, x):
    """The step with nothing closed over, and the initial state in the types that the step keeps."""

    def typed_step(state, hparams, x):
        after = step(state, hparams, x)
        check_same_state(state, after)
        return cast_like(after, state)

    # Under `shard_map` a step may make the state vary over mesh axes on which it started out equal; a scan needs one
    # type throughout, so the start is cast until the type no longer changes (one axis may bring in another).
    axes = varying_axes(state)
    while True:
        state = cast_varying(state, axes)
        grown = axes | varying_axes(jax.eval_shape(typed_step, state, hparams, x))
        if grown == axes:
            break
        axes = grown
    pure, consts = hoist(lambda s, h, x: cast_varying(typed_step(s, h, x), axes), state, hparams, x)
    return state, lambda state, inputs, x: pure(inputs[1], state, inputs[0], x), consts


def _slices(batches, num_steps) -> tuple[PyTree, Callable]:
    """Pytree `xs` with leading axis T, and the function from a slice of it to the step's batch."""
    if batches is None:
        return jnp.arange(num_steps), lambda x: None
    if callable(batches):
        return jnp.arange(num_steps), checked_batches_function(batches)
    return jax.tree.map(jnp.asarray, batches), lambda x: x


def info_of(problem: Problem, final: InnerState, steps: Any) -> Info:
    """How the run of a problem ended."""
    params, model_state, inputs = jax.lax.stop_gradient((final.params, final.model_state, problem.residual_inputs))
    optimality = norm(problem.residual(params, model_state, inputs))
    return Info(optimality, steps, all_finite(params) & jnp.isfinite(optimality))
