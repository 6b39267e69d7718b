"""`solve`: an inner optimisation whose result is differentiable by the rule of your choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxhpo._adjoint._unroll import Unroll
from jaxhpo._diagnose import watched
from jaxhpo._errors import JaxhpoError
from jaxhpo._tree import all_finite, cast_like, cast_varying, hoist, names, norm, upcast, varying_axes
from jaxhpo._types import Adjoint, Info, InnerState, Problem, PyTree, Solution, Solver
from jaxhpo._validate import (
    check_arrays,
    check_count,
    check_finite,
    check_key,
    check_nonnegative,
    check_params,
    check_residual,
    describe,
)


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

    Runs :math:`\theta_{t+1} = \Phi_t(\theta_t, h)` for `num_steps` steps from `state`. `jax.grad` of any function of the
    result is a hypergradient, by the rule that `adjoint` names; swap the rule and nothing else changes. `jit`, `vmap`,
    `grad` of `grad`, `scan`, sharding and nesting work as for any JAX function. (For `jax.jvp` alone, differentiate in
    reverse first: `jacfwd(grad(f))`.)

    **Cost and bias**: T gradients forward; backward as the rule says.

    Args:
      solver: the inner problem, from `from_optax`, `momentum_sgd` or `fixed_point`.
      state: where to start: `solver.init(params, hparams)`, or an earlier solution's `.state` (warm start).
      hparams: pytree of floating-point hyperparameters, passed to the loss and to `tx`; None if everything is closed over.
      batches: a pytree whose leaves have a leading axis of length `num_steps`, or a pure function of the step index
        (`lambda t: data[jax.random.randint(jax.random.fold_in(key, t), ...)]`), which keeps memory independent of T; with
        None the loss gets `batch=None`.
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
      Franceschi, Frasconi, Salzo, Grazzi, Pontil. Bilevel Programming for Hyperparameter Optimization and Meta-Learning.
      2018. arXiv:1806.04910
    """
    problem = watched(
        _make_problem(solver, state, hparams, batches, num_steps, tol, condition_batch, key, adjoint)
    )
    final, steps = adjoint.run(problem)
    return Solution(*final, _info(problem, final, steps))


def _make_problem(solver, state, hparams, batches, num_steps, tol, condition_batch, key, adjoint) -> Problem:
    _check_solver(solver)
    _check_adjoint(adjoint)
    state = _check_state(state)
    hparams = _check_hparams(hparams)
    num_steps = _check_steps(batches, num_steps)
    if tol is not None and not isinstance(tol, jax.Array):
        check_nonnegative("tol", tol)
    xs, take = _slices(batches, num_steps)

    def step(state, hparams, x):
        return solver.step(state, hparams, take(x))

    state, advance, closed_over = _closed_step(step, state, hparams, jax.tree.map(lambda x: x[0], xs))

    if condition_batch is None:
        last, batch_of = jax.tree.map(lambda x: x[-1], xs), take
    else:
        last, batch_of = jax.tree.map(jnp.asarray, check_arrays(condition_batch, "condition_batch")), lambda x: x

    def condition(params, model_state, hparams, x):
        out = solver.condition(params, hparams, batch_of(x), model_state)
        check_residual(out, params)
        return out

    # In the precision of the linear solves: a bfloat16 model's condition is traced in float32.
    pure, consts = hoist(condition, *upcast((state.params, state.model_state, hparams, last)))

    def residual(params, model_state, inputs):
        hparams, x, consts = inputs
        return pure(consts, *upcast((params, model_state, hparams, x)))

    inputs = (hparams, closed_over)
    return Problem(
        advance, inputs, xs, state, num_steps, residual, (hparams, last, consts), tol, check_key(key), solver
    )


def _closed_step(step, state, hparams, x):
    """The step with nothing closed over, and the initial state in the types that the step keeps."""

    def typed_step(state, hparams, x):
        after = step(state, hparams, x)
        _check_same_state(state, after)
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
        return jnp.arange(num_steps), batches
    return jax.tree.map(jnp.asarray, batches), lambda x: x


def _info(problem, final, steps) -> Info:
    params, model_state, inputs = jax.lax.stop_gradient((final.params, final.model_state, problem.residual_inputs))
    optimality = norm(problem.residual(params, model_state, inputs))
    return Info(optimality, steps, all_finite(params) & jnp.isfinite(optimality))


# --- validation ------------------------------------------------------------------------------------------------------


def _check_solver(solver):
    if not isinstance(solver, Solver):
        hint = "write `jaxhpo.from_optax(train_loss, tx)`" if hasattr(solver, "update") else "make one with `from_optax`"
        raise JaxhpoError(f"`solver` got {type(solver).__name__}, not a `jaxhpo.Solver`: {hint}.")


def _check_adjoint(adjoint):
    if isinstance(adjoint, type):
        raise JaxhpoError(f"`adjoint` got the class {adjoint.__name__}, not an instance: write `{adjoint.__name__}()`.")
    if not isinstance(adjoint, Adjoint):
        if hasattr(adjoint, "__call__") and not isinstance(adjoint, str):
            hint = f"if it is a linear solver, write `Implicit({adjoint!r})`"
        else:
            hint = "write `Unroll()` or `Implicit(CG())`"
        raise JaxhpoError(f"`adjoint` got {adjoint!r}, which is no derivative rule: {hint}.")


def _check_state(state):
    if not isinstance(state, InnerState):
        hint = "its `.state`" if isinstance(state, Solution) else "`solver.init(params, hparams)`"
        raise JaxhpoError(f"`state` got {type(state).__name__}, not an `InnerState`: pass {hint}.")
    params = check_params(state.params, "params")
    check_finite(params, "params")
    rest = jax.tree.map(jnp.asarray, (state.opt_state, check_arrays(state.model_state, "model_state")))
    return InnerState(params, *rest)


def _check_hparams(hparams):
    if hparams is None:
        return None
    hparams = check_params(hparams, "hparams")
    check_finite(hparams, "hparams")
    return hparams


def _check_steps(batches, num_steps):
    if num_steps is not None:
        if isinstance(num_steps, jax.core.Tracer):
            raise JaxhpoError("`num_steps` is traced, but the loop's length must be known while tracing: pass an integer.")
        check_count("num_steps", num_steps)
        num_steps = int(num_steps)
    if batches is None or callable(batches):
        if num_steps is None:
            what = "`batches=None`" if batches is None else "`batches` a function of the step"
            raise JaxhpoError(f"With {what}, nothing says how many inner steps to take: pass `num_steps=`.")
        return num_steps
    return _check_batches(batches, num_steps)


def _check_batches(batches, num_steps):
    leaves = jax.tree.leaves(batches)
    if not leaves:
        raise JaxhpoError(f"`batches` got {batches!r}, which has no leaves: pass arrays, a function of the step, or None.")
    if any(callable(leaf) for leaf in leaves) or hasattr(batches, "__next__"):
        raise JaxhpoError(
            "`batches` got an iterator or a tree of functions, which cannot be traced: stack the batches along a leading "
            "axis (`jax.tree.map(lambda *b: jnp.stack(b), *batches)`), or pass one function `lambda t: batch`."
        )
    check_arrays(batches, "batches")
    lengths = {}
    for name, leaf in zip(names(batches, "batches"), leaves, strict=True):
        if jnp.ndim(leaf) == 0:
            raise JaxhpoError(
                f"`{name}` is {describe(leaf)}, but every leaf needs a leading axis of length num_steps: add it "
                f"(`jnp.broadcast_to(x, (num_steps,))`), or close over the value in the loss."
            )
        lengths[name] = jnp.shape(leaf)[0]
    if len(set(lengths.values())) > 1:
        raise JaxhpoError(
            f"`batches` has leading axes of different lengths, {lengths}: each leaf needs one slice per inner step."
        )
    length = next(iter(lengths.values()))
    if length == 0:
        raise JaxhpoError("`batches` has a leading axis of length 0, so there is no step to take: pass at least one batch.")
    if num_steps is not None and num_steps != length:
        raise JaxhpoError(
            f"`num_steps={num_steps}`, but `batches` holds {length} steps: drop `num_steps`, or cut the batches "
            f"(`jax.tree.map(lambda x: x[:{num_steps}], batches)`); for one batch at every step, pass `lambda t: batch`."
        )
    check_finite(batches, "batches", allow_infinite=True)
    return length


def _check_same_state(before, after):
    if jax.tree.structure(before) != jax.tree.structure(after):
        raise JaxhpoError(
            f"The inner step changed the tree of the state from {jax.tree.structure(before)} to "
            f"{jax.tree.structure(after)}: a loop needs the same tree at every step (return the whole model state, and make "
            f"the state with `solver.init`)."
        )
    for name, b, a in zip(names(before, "state"), jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        same_kind = jnp.issubdtype(b.dtype, jnp.inexact) == jnp.issubdtype(a.dtype, jnp.inexact)
        if b.shape != a.shape or not same_kind:
            raise JaxhpoError(
                f"The inner step changed `{name}` from {describe(b)} to {describe(a)}: a loop needs the same shape and kind "
                f"at every step."
            )
