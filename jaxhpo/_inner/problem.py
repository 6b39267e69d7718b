"""`Problem`: one validated inner solve, as a derivative rule receives it."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.mesh import cast_varying, sharded_like, varying_axes
from jaxhpo._core.record import report_random
from jaxhpo._core.trace import closure_convert
from jaxhpo._core.tree import all_finite, cast_like, mixed_types, norm, upcast
from jaxhpo._core.types import Info, InnerState, PyTree, Solver, StatefulMethod
from jaxhpo._core.validate import check_key, check_residual, check_traceable_number, require_key
from jaxhpo._inner.inputs import check_condition, check_same_state, check_start, check_steps, slices_of
from jaxhpo._inner.watch import instrumented


class Problem(NamedTuple):
    """One validated inner solve, as a derivative rule receives it: pure functions together with all their arguments.

    No function closes over a value that could be differentiated: values that a step closes over (through the train
    loss, the optimiser or a batch function) are in `inputs[1]`, those of the condition in `residual_inputs[2]`. A rule
    may run it with other `state`, `inputs`, `xs` and `num_steps`, but calls `with_gradient` and `in_residual` before:
    they are of the problem as it was made.

    Attributes:
      advance: `(state, inputs, x) -> state`, one inner step on one slice `x` of `xs`.
      inputs: `(hparams, closed-over values)` of `advance`.
      xs: pytree with leading axis `num_steps`: the batches, or the step indices of a batch function.
      counts: for each leaf of `xs`, True if it holds successive step indices, which a loop can count instead.
      state: the initial `InnerState`.
      num_steps: inner steps T; with `tol` the maximum.
      residual: `(params, model_state, residual_inputs) -> pytree like params`, the condition, zero at the solution.
      residual_inputs: `(hparams, condition batch, closed-over values)` of `residual`.
      tol: stop when the norm of the residual is below it; None for a fixed number of steps.
      solver: the `Solver`. Its functions may close over traced values: pass them through `closure_convert`.
      require_key: `rule -> key`, the key given to `solve`; raises `JaxhpoError` if there is none.
      closure_convert: `(fn, *more) -> (pure, consts)` with `pure(consts, state, hparams, x, *more)` equal to
        `fn(state, hparams, batch, *more)` and nothing closed over; `x` is a slice of `xs`.
      at_condition: `(fn, *more) -> (pure, consts)` with `pure(consts, params, hparams, x, *more)` equal to
        `fn(params, hparams, batch, *more)` at the condition's batch; `x` is `residual_inputs[1]`.
      with_gradient: `(gradient, keys=None) -> Problem` whose steps compute the gradient of the train loss by
        `gradient(loss, params, hparams, batch, model_state, key) -> ((value, model_state), grad)`, with `keys[t]` at
        step t. With None, or if a step is not a function of a gradient, the solver's own step is taken.

    Example:
      >>> class Plain:  # reverse mode through all steps
      ...     def run(self, problem):
      ...         print(problem.solver.name, problem.num_steps, problem.inputs[0])
      ...         def advance(state, x):
      ...             return problem.advance(state, problem.inputs, x), None
      ...         return jax.lax.scan(advance, problem.state, problem.xs)[0], problem.num_steps
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: (p - h) ** 2, optax.sgd(0.25))
      >>> print(jaxhpo.solve(solver, solver.init(0.0, 1.0), 1.0, num_steps=3, adjoint=Plain()).params)
      from_optax 3 1.0
      0.875
    """

    advance: Callable[[InnerState, PyTree, PyTree], InnerState]
    inputs: PyTree
    xs: PyTree
    counts: PyTree
    state: InnerState
    num_steps: int
    residual: Callable[[PyTree, PyTree, PyTree], PyTree]
    residual_inputs: PyTree
    tol: Any
    solver: Solver
    require_key: Callable[[Any], jax.Array]
    closure_convert: Callable[..., tuple[Callable, list]]
    at_condition: Callable[..., tuple[Callable, list]]
    with_gradient: Callable[..., Problem]

    def in_residual(self) -> list[bool]:
        """For each closed-over value of `inputs`, whether the residual closes over it too."""
        return [any(c is other for other in self.residual_inputs[2]) for c in self.inputs[1]]


@runtime_checkable
class Adjoint(Protocol):
    """A derivative rule: the value of `adjoint=`. Any object with this method is one; `_adjoint/` has a file for each.

    Example:
      >>> class LastStep:  # the derivative of the last inner step, as `Unroll(truncate=1)`
      ...     def run(self, problem):
      ...         before, last = (jax.tree.map(lambda x: x[i], problem.xs) for i in (slice(-1), -1))
      ...         state, inputs, before = jax.lax.stop_gradient((problem.state, problem.inputs, before))
      ...         state, _ = jax.lax.scan(lambda s, x: (problem.advance(s, inputs, x), None), state, before)
      ...         return problem.advance(state, problem.inputs, last), problem.num_steps
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: (p - h) ** 2, optax.sgd(0.25))
      >>> def outer_loss(h):
      ...     return jaxhpo.solve(solver, solver.init(0.0, h), h, num_steps=3, adjoint=LastStep()).params
      >>> print(jax.grad(outer_loss)(1.0))  # of p ← p − (p − h) / 2; that of all three steps is 0.875
      0.5
    """

    def run(self, problem: Problem) -> tuple[InnerState, Any]:
        """Runs the inner loop, to `problem.tol` if that is given; a rule that cannot stop there raises.

        Returns the final state, differentiable by this rule with respect to `problem.inputs`, `problem.state`,
        `problem.xs` and `problem.residual_inputs`, and the number of inner steps taken.
        """
        ...


def check_adjoint(adjoint):
    """Raises unless this is an instance of a derivative rule."""
    if isinstance(adjoint, type):
        name = adjoint.__name__
        hint = f"`{name}()`" if isinstance(adjoint, Adjoint) else f"`Implicit({name}(...))` if it is a linear solver"
        raise JaxhpoError(f"`adjoint` got the class {name}, not a derivative rule: write {hint}.")
    if not isinstance(adjoint, Adjoint):
        if isinstance(adjoint, StatefulMethod):
            hint = f"it keeps state between outer steps, so write `hypergradient({adjoint!r}, solver, outer_loss)`"
        elif callable(adjoint):
            hint = f"if it is a linear solver, write `Implicit({adjoint!r})`"
        else:
            hint = "write `Unroll()` or `Implicit(CG())`"
        raise JaxhpoError(f"`adjoint` got {adjoint!r}, which is not a derivative rule: {hint}.")


def make_problem(
    solver, state, hparams, batches, *, num_steps=None, tol=None, condition_batch=None, key=None
) -> Problem:
    """Checks the arguments of `solve` and makes its `Problem`, whose steps report while that is recorded."""
    hparams, state = check_start(solver, state, hparams)
    num_steps = check_steps(batches, num_steps)
    check_key(key)
    if tol is not None:
        check_traceable_number("tol", tol)
    slices, slice_counts, take = slices_of(batches, num_steps)

    def step_fields(gradient=None, keys=None) -> dict[str, Any]:
        """The fields of the problem that depend on how the inner gradient is computed."""
        xs, counts, split = slices, slice_counts, lambda x: (x, None)
        if keys is not None:
            xs, counts, split = (slices, keys), (slice_counts, False), lambda x: x
        first = jax.tree.map(lambda x: x[0], xs)

        def step(state, hparams, x):
            x, step_key = split(x)
            batch = take(x)
            if gradient is None or solver.apply is None:
                return solver.step(state, hparams, batch)
            out, grad = gradient(solver.loss, state.params, hparams, batch, state.model_state, step_key)
            return solver.apply(state, hparams, batch, out, grad)

        def at_step(fn, *more):
            def pure(s, h, x, *more):
                return fn(s, h, take(split(x)[0]), *more)

            return closure_convert(pure, state, hparams, first, *more)

        start, advance, closed_over = _closed_step(step, state, hparams, first)
        fields = dict(advance=advance, inputs=(hparams, closed_over), state=start, closure_convert=at_step)
        return fields | dict(xs=xs, counts=counts)

    plain = step_fields()
    state = plain["state"]
    at, batch_of = jax.tree.map(lambda x: x[-1], slices), take
    if condition_batch is not None:
        at, batch_of = check_condition(condition_batch, jax.eval_shape(lambda: take(at))), lambda x: x

    def condition(params, model_state, hparams, x):
        return check_residual(solver.condition(params, hparams, batch_of(x), model_state), params)

    pure, consts, types = _traced_high(condition, (state.params, state.model_state, hparams, at))

    def residual(params, model_state, inputs):
        hparams, x, consts = inputs
        return upcast(pure(consts, *cast_like((params, model_state, hparams, x), types)))

    def at_condition(fn, *more):
        args = upcast((state.params, hparams, at))
        with mixed_types():
            return closure_convert(lambda p, hparams, x, *more: fn(p, hparams, batch_of(x), *more), *args, *more)

    def require_key_of(rule):
        report_random(rule)
        return require_key(key, rule)

    problem = Problem(
        **plain,
        num_steps=num_steps,
        residual=residual,
        residual_inputs=(hparams, at, consts),
        tol=tol,
        solver=solver,
        require_key=require_key_of,
        at_condition=at_condition,
        with_gradient=lambda gradient, keys=None: problem._replace(**step_fields(gradient, keys)),
    )
    return instrumented(problem)


def _closed_step(step, state, hparams, x):
    """The initial state, in the type that the step preserves; the step, pure; and the values that it closed over."""
    axes, grown, types = varying_axes(state), set(), []

    def typed_step(state, hparams, x):
        after = step(state, hparams, x)
        check_same_state(state, after)
        after = cast_like(after, state)
        grown.update(varying_axes(after))
        types.append(jax.tree.map(jax.typeof, after))
        return after

    # A scan needs one type throughout, but a step may return another: under `shard_map` one that varies over more mesh
    # axes, on `Explicit` axes one that is sharded, as momenta are that were made of plain zeros. Casting is repeated,
    # because over one axis it can make the result vary over another; the sharding is that after the first step.
    while True:
        state = cast_varying(state, axes)
        pure, consts = closure_convert(typed_step, state, hparams, x)
        placed = jax.tree.map(sharded_like, state, types[0])
        if grown <= axes and all(map(operator.is_, *map(jax.tree.leaves, (placed, state)))):
            break
        state, axes = placed, axes | grown
    like = jax.tree.map(jax.typeof, state)

    def advance(state, inputs, x):
        after = pure(inputs[1], state, inputs[0], x)
        return cast_varying(jax.tree.map(sharded_like, after, like), axes)

    return state, advance, consts


def _traced_high(fn, args) -> tuple[Callable, list, PyTree]:
    """`closure_convert(fn, *args)` with 16-bit arguments in float32, and the types of the arguments used.

    If that raises a `TypeError`, as a convolution of float32 weights with closed-over bfloat16 data does, `fn` is
    traced in its own precision.
    """
    high = upcast(args)
    if jax.tree.map(jnp.result_type, high) != jax.tree.map(jnp.result_type, args):
        with contextlib.suppress(TypeError), mixed_types():
            return *closure_convert(fn, *high), jax.eval_shape(lambda: high)
    return *closure_convert(fn, *args), jax.eval_shape(lambda: args)


def info_of(problem: Problem, final: InnerState, steps: Any) -> Info:
    """The norm of the condition at the end of a run, the steps taken, whether all is finite and below a `tol`."""
    params, model_state, inputs = jax.lax.stop_gradient((final.params, final.model_state, problem.residual_inputs))
    optimality = norm(problem.residual(params, model_state, inputs))
    # Where the loop ended early it saw a norm below `tol`, which may differ from this one in the last digits.
    converged = None if problem.tol is None else (steps < problem.num_steps) | (optimality < problem.tol)
    return Info(optimality, steps, all_finite(params) & jnp.isfinite(optimality), converged)
