"""`solve`: an inner optimisation whose result is differentiable by the rule of your choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo._adjoint._unroll import Unroll
from jaxhpo._diagnose import watched
from jaxhpo._errors import JaxhpoError
from jaxhpo._tree import all_finite, cast_like, cast_varying, hoist, names, norm, upcast, varying_axes
from jaxhpo._types import Adjoint, Info, InnerState, Problem, PyTree, Solution, Solver
from jaxhpo._validate import (
    check_arrays,
    check_callable,
    check_count,
    check_finite,
    check_hparams,
    check_key,
    check_params,
    check_residual,
    check_traceable_number,
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
    _check_is_state(state)
    hparams = check_hparams(hparams)
    state = _check_state(state, solver, hparams)
    num_steps = _check_steps(batches, num_steps)
    if tol is not None:
        check_traceable_number("tol", tol, 0, strict=False)
    xs, take = _slices(batches, num_steps)

    def step(state, hparams, x):
        return solver.step(state, hparams, take(x))

    state, advance, closed_over = _closed_step(step, state, hparams, jax.tree.map(lambda x: x[0], xs))

    if condition_batch is None:
        last, batch_of = jax.tree.map(lambda x: x[-1], xs), take
    else:
        batch = jax.eval_shape(lambda: take(jax.tree.map(lambda x: x[0], xs)))
        last, batch_of = _check_condition_batch(condition_batch, batch), lambda x: x

    def condition(params, model_state, hparams, x):
        return check_residual(solver.condition(params, hparams, batch_of(x), model_state), params)

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
        return jnp.arange(num_steps), _checked_batches_function(batches)
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
        name = adjoint.__name__
        hint = f"`{name}()`" if hasattr(adjoint, "run") else f"`Implicit({name}(...))` if it is a linear solver"
        raise JaxhpoError(f"`adjoint` got the class {name}, not a derivative rule: write {hint}.")
    if not isinstance(adjoint, Adjoint):
        if hasattr(adjoint, "__call__") and not isinstance(adjoint, str):
            hint = f"if it is a linear solver, write `Implicit({adjoint!r})`"
        else:
            hint = "write `Unroll()` or `Implicit(CG())`"
        raise JaxhpoError(f"`adjoint` got {adjoint!r}, which is no derivative rule: {hint}.")


def _check_is_state(state):
    if not isinstance(state, InnerState):
        hint = "its `.state`" if isinstance(state, Solution) else "`solver.init(params, hparams)`"
        raise JaxhpoError(f"`state` got {type(state).__name__}, not an `InnerState`: pass {hint}.")


def _check_state(state, solver, hparams):
    params = check_params(state.params, "params")
    check_finite(params, "params")
    check_arrays(state.model_state, "model_state")
    fresh = jax.eval_shape(solver.init, params, hparams, state.model_state)
    _check_opt_state(state.opt_state, fresh.opt_state, solver)
    return InnerState(params, *jax.tree.map(jnp.asarray, (state.opt_state, state.model_state)))


def _check_opt_state(opt_state, fresh, solver):
    instead = "pass `solver.init(params, hparams)`, or the `.state` of a solution of the same solver and model"
    got, want = jax.tree.structure(opt_state), jax.tree.structure(fresh)
    if got != want:
        raise JaxhpoError(
            f"`state.opt_state` has the tree {got}, but this `{solver.name}` solver keeps {want}, so it was made by another: "
            f"{instead}."
        )
    check_arrays(opt_state, "state.opt_state")
    for name, a, b in zip(names(fresh, "state.opt_state"), jax.tree.leaves(opt_state), jax.tree.leaves(fresh), strict=True):
        if jnp.shape(a) != b.shape:
            raise JaxhpoError(f"`{name}` is {describe(a)}, but these parameters need {describe(b)}: {instead}.")


def _check_steps(batches, num_steps):
    if num_steps is not None:
        if isinstance(num_steps, jax.core.Tracer):
            raise JaxhpoError("`num_steps` is traced, but the loop's length must be known while tracing: pass an integer.")
        check_count("num_steps", num_steps)
        num_steps = int(num_steps)
    if batches is None or callable(batches):
        if num_steps is None:
            what = "`batches=None`" if batches is None else "`batches` a function of the step"
            raise JaxhpoError(f"With {what}, nothing says how many inner steps to take: pass `num_steps=100`, say.")
        return num_steps
    return _check_batches(batches, num_steps)


def _check_batches(batches, num_steps):
    leaves = jax.tree.leaves(batches)
    if not leaves:
        raise JaxhpoError(f"`batches` got {batches!r}, which has no leaves: pass arrays, a function of the step, or None.")
    if isinstance(batches, int):
        raise JaxhpoError(
            f"`batches` got the integer {batches}, which is no data: for a number of steps write `num_steps={batches}`."
        )
    if _is_list_of_batches(batches) or any(map(_is_function_or_iterable, leaves)):
        what = f"a list of {len(batches)} batches" if _is_list_of_batches(batches) else describe(batches)
        raise JaxhpoError(
            f"`batches` got {what}, but the loop over steps is compiled and slices arrays: stack equal batches along a "
            f"leading axis (`jax.tree.map(lambda *b: jnp.stack(b), *batches)`), or pass one function `lambda t: batch`. "
            f"(Where one batch consists of several arrays, write them as a tuple.)"
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
            f"`batches` has leading axes of different lengths, {lengths}, but each leaf needs one slice per inner step: cut "
            f"them to the same length, or close over what does not change from step to step."
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


def _is_list_of_batches(batches) -> bool:
    """A list whose parts look alike: a pytree too, but one whose leading axes are those of the examples."""
    if not isinstance(batches, list) or len(batches) < 2:
        return False
    structures = {jax.tree.structure(b) for b in batches}
    shapes = {tuple(np.shape(x) for x in jax.tree.leaves(b)) for b in batches}
    return len(structures) == 1 and (len(shapes) == 1 or not jax.tree_util.treedef_is_leaf(*structures))


def _is_function_or_iterable(leaf) -> bool:
    return callable(leaf) or (hasattr(leaf, "__iter__") and not hasattr(leaf, "dtype") and not isinstance(leaf, str))


def _checked_batches_function(batches):
    check_callable("batches", batches, "batches(step)", 1)

    def take(step):
        batch = batches(step)
        if batch is None:
            raise JaxhpoError("`batches(step)` returned None, so every batch is empty: end the function with `return batch`.")
        return check_arrays(batch, "batches(step)")

    return take


def _check_condition_batch(condition_batch, batch):
    got, want = jax.tree.structure(check_arrays(condition_batch, "condition_batch")), jax.tree.structure(batch)
    if got != want:
        raise JaxhpoError(
            f"`condition_batch` has the tree {got}, but the batch of a step has {want}, and the same loss gets both: give it "
            f"the tree of a step's batch."
        )
    check_finite(condition_batch, "condition_batch", allow_infinite=True)
    return jax.tree.map(jnp.asarray, condition_batch)


def _check_same_state(before, after):
    check_arrays(after, "state")
    if jax.tree.structure(before) != jax.tree.structure(after):
        raise JaxhpoError(
            f"The inner step changed the tree of the state from {jax.tree.structure(before)} to "
            f"{jax.tree.structure(after)}: a loop needs the same tree at every step (return the whole model state, and make "
            f"the state with `solver.init`)."
        )
    for name, b, a in zip(names(before, "state"), jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        same_kind = all(jnp.issubdtype(b.dtype, k) == jnp.issubdtype(a.dtype, k) for k in (jnp.inexact, jnp.floating))
        if b.shape != a.shape or not same_kind:
            raise JaxhpoError(
                f"The inner step changed `{name}` from {describe(b)} to {describe(a)}, but a loop needs the same shape and "
                f"kind at every step: return it as it came in (reshape it, or `.astype({b.dtype})`)."
            )
