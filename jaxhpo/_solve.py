"""`solve`: an inner optimisation whose result is differentiable by the rule of your choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxhpo._adjoint._unroll import Unroll
from jaxhpo._diagnose import watched
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
from jaxhpo._solves import report_random, report_solve
from jaxhpo._tree import (
    all_finite,
    cast_like,
    cast_varying,
    hoist,
    norm,
    upcast,
    varying_axes,
)
from jaxhpo._types import Adjoint, Info, InnerState, Problem, PyTree, Solution, Solver
from jaxhpo._validate import check_hparams, check_key, check_residual, check_traceable_number, require_key


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
    check_adjoint(adjoint)
    given = {"num_steps": num_steps, "tol": tol, "condition_batch": condition_batch, "key": key}
    problem = watched(make_problem(solver, state, hparams, batches, **given))
    final, steps = adjoint.run(problem)
    info = info_of(problem, final, steps)
    report_solve(problem, adjoint, info)
    return Solution(*final, info)


def make_problem(
    solver, state, hparams, batches, *, num_steps=None, tol=None, condition_batch=None, key=None
) -> Problem:
    """The inner solve that `solve`'s arguments describe, checked, with nothing closed over."""
    check_solver(solver)
    check_is_state(state)
    hparams = check_hparams(hparams)
    state = check_state(state, solver, hparams)
    num_steps = check_steps(batches, num_steps)
    check_key(key)
    if tol is not None:
        check_traceable_number("tol", tol, 0, strict=False)
    slices, take = _slices(batches, num_steps)
    first = jax.tree.map(lambda x: x[0], slices)

    def steps(gradient=None, keys=None) -> dict[str, Any]:
        """The fields of the problem that depend on how the inner gradient is taken."""
        xs, split = (slices, lambda x: (x, None)) if keys is None else ((slices, keys), lambda x: x)
        one = jax.tree.map(lambda x: x[0], xs)

        def step(state, hparams, x):
            x, step_key = split(x)
            batch = take(x)
            if gradient is None or solver.apply is None:
                return solver.step(state, hparams, batch)
            out, grad = gradient(solver.loss, state.params, hparams, batch, state.model_state, step_key)
            return solver.apply(state, hparams, batch, out, grad)

        def hoist_own(fn, *more):
            return hoist(lambda s, h, x, *more: fn(s, h, take(split(x)[0]), *more), state, hparams, one, *more)

        start, advance, closed_over = _closed_step(step, state, hparams, one)
        return {"advance": advance, "inputs": (hparams, closed_over), "xs": xs, "state": start, "hoist": hoist_own}

    plain = steps()
    state = plain["state"]
    if condition_batch is None:
        last, batch_of = jax.tree.map(lambda x: x[-1], slices), take
    else:
        last, batch_of = check_condition_batch(condition_batch, jax.eval_shape(lambda: take(first))), lambda x: x

    def condition(params, model_state, hparams, x):
        return check_residual(solver.condition(params, hparams, batch_of(x), model_state), params)

    pure, consts, types = _traced_high(condition, (state.params, state.model_state, hparams, last))

    def residual(params, model_state, inputs):
        hparams, x, consts = inputs
        return upcast(pure(consts, *cast_like((params, model_state, hparams, x), types)))

    def at_condition(fn, *more):
        args = upcast((state.params, hparams, last))
        return hoist(lambda params, hparams, x, *more: fn(params, hparams, batch_of(x), *more), *args, *more)

    def require_key_of(rule):
        report_random(rule)
        return require_key(key, rule)

    problem = Problem(
        **plain,
        num_steps=num_steps,
        residual=residual,
        residual_inputs=(hparams, last, consts),
        tol=tol,
        solver=solver,
        require_key=require_key_of,
        at_condition=at_condition,
        with_gradient=lambda gradient, keys=None: problem._replace(**steps(gradient, keys)),
    )
    return problem


def _traced_high(fn, args) -> tuple[Callable, list, PyTree]:
    """`hoist(fn, *args)` in the precision of the linear solves, and the types of the arguments that it was traced with.

    A bfloat16 model's condition is traced in float32, unless the model insists on its own type, as a convolution of
    16-bit data does with 16-bit weights: JAX then raises a `TypeError`.
    """
    high = upcast(args)
    if any(a.dtype != b.dtype for a, b in zip(*map(jax.tree.leaves, (args, high)), strict=True)):
        try:
            return *hoist(fn, *high), jax.eval_shape(lambda: high)
        except TypeError:
            high = args
    return *hoist(fn, *high), jax.eval_shape(lambda: high)


def _closed_step(step, state, hparams, x):
    """The step with nothing closed over, and the initial state in the types that the step keeps."""
    axes, grown = varying_axes(state), set()

    def typed_step(state, hparams, x):
        after = step(state, hparams, x)
        check_same_state(state, after)
        after = cast_like(after, state)
        grown.update(varying_axes(after))
        return after

    # Under `shard_map` a step may make the state vary over mesh axes on which it started out equal; a scan needs one
    # type throughout, so the start is cast until the type no longer changes (one axis may bring in another).
    while True:
        state = cast_varying(state, axes)
        pure, consts = hoist(typed_step, state, hparams, x)
        if grown <= axes:
            break
        axes |= grown
    return state, lambda state, inputs, x: cast_varying(pure(inputs[1], state, inputs[0], x), axes), consts


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
