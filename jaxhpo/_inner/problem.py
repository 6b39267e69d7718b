"""`Problem`: one validated inner solve, as a derivative rule receives it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.mesh import cast_varying, varying_axes
from jaxhpo._core.record import report_random
from jaxhpo._core.trace import closure_convert
from jaxhpo._core.tree import all_finite, cast_like, norm, upcast
from jaxhpo._core.types import Info, InnerState, PyTree, Solver, StatefulMethod
from jaxhpo._core.validate import check_hparams, check_key, check_residual, check_traceable_number, require_key
from jaxhpo._inner.inputs import (
    check_condition_batch,
    check_is_state,
    check_same_state,
    check_solver,
    check_state,
    check_steps,
    checked_batches_function,
)


class Problem(NamedTuple):
    """One validated inner solve, as a derivative rule receives it: pure functions, and all that they depend on.

    No function closes over a value that could be differentiated: what the train loss, the optimiser or a batch function
    closes over is part of `inputs` and of `residual_inputs`. A rule may replace `state`, `inputs` and `xs`.

    Attributes:
      advance: `(state, inputs, x) -> state`, one inner step on one slice `x` of `xs`.
      inputs: `(hparams, closed-over values)` of `advance`.
      xs: pytree with leading axis `num_steps`: the batches, or the step indices of a batch function.
      state: the initial `InnerState`.
      num_steps: inner steps T; with `tol` the maximum.
      residual: `(params, model_state, residual_inputs) -> pytree like params`, the condition, zero at the solution.
      residual_inputs: `(hparams, condition batch, closed-over values)` of `residual`.
      tol: stop when the norm of the residual is below it; None for a fixed number of steps.
      solver: the `Solver`: its name and symmetry, and its own functions, to be passed to `closure_convert`.
      require_key: `rule -> key`, the key given to `solve`; raises `JaxhpoError` if there is none.
      closure_convert: `(fn, *more) -> (pure, consts)` with `pure(consts, state, hparams, x, *more)` equal to
        `fn(state, hparams, batch, *more)` and nothing closed over; `x` is a slice of `xs`.
      at_condition: `(fn, *more) -> (pure, consts)` with `pure(consts, params, hparams, x, *more)` equal to
        `fn(params, hparams, batch, *more)` at the condition's batch; `x` is `residual_inputs[1]`.
      with_gradient: `(gradient, keys=None) -> Problem` whose steps take `gradient(loss, params, hparams, batch,
        model_state, key) -> ((value, model_state), grad)` for the gradient of the train loss, with `keys[t]` at step t;
        None takes the optimiser's own step. Steps that are not a function of a gradient do not change.
    """

    advance: Callable[[InnerState, PyTree, PyTree], InnerState]
    inputs: PyTree
    xs: PyTree
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
    """A derivative rule: the value of `adjoint=`. Any object with this one method is a rule.

    Example:
      >>> class LastStep:  # the derivative of the last inner step, as `Unroll(truncate=1)`
      ...     def run(self, problem):
      ...         before, last = (jax.tree.map(lambda x: x[i], problem.xs) for i in (slice(-1), -1))
      ...         state, constants = jax.lax.stop_gradient((problem.state, problem.inputs))
      ...         state, _ = jax.lax.scan(lambda s, x: (problem.advance(s, constants, x), None), state, before)
      ...         return problem.advance(state, problem.inputs, last), problem.num_steps
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: (p - h) ** 2, optax.sgd(0.5))
      >>> def outer_loss(h):
      ...     return jaxhpo.solve(solver, solver.init(0.0, h), h, num_steps=3, adjoint=LastStep()).params
      >>> print(jax.grad(outer_loss)(1.0))
      1.0
    """

    def run(self, problem: Problem) -> tuple[InnerState, Any]:
        """Runs the inner loop.

        Args:
          problem: the inner solve.

        Returns:
          The final state, whose derivative with respect to `problem.inputs`, `problem.state`, `problem.xs` and
          `problem.residual_inputs` is the rule's, and the number of inner steps taken.
        """
        ...


def check_adjoint(adjoint):
    """Raises unless this is a derivative rule, and not its class."""
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
    """Checks the arguments of `solve` and makes its `Problem`."""
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

        def closure_convert_own(fn, *more):
            return closure_convert(
                lambda s, h, x, *more: fn(s, h, take(split(x)[0]), *more), state, hparams, one, *more
            )

        start, advance, closed_over = _closed_step(step, state, hparams, one)
        return {
            "advance": advance,
            "inputs": (hparams, closed_over),
            "xs": xs,
            "state": start,
            "closure_convert": closure_convert_own,
        }

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
        return closure_convert(lambda params, hparams, x, *more: fn(params, hparams, batch_of(x), *more), *args, *more)

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


def _slices(batches, num_steps) -> tuple[PyTree, Callable]:
    """The pytree `xs` with leading axis T, and the function from a slice of it to the step's batch."""
    if batches is None:
        return jnp.arange(num_steps), lambda x: None
    if callable(batches):
        return jnp.arange(num_steps), checked_batches_function(batches)
    return jax.tree.map(jnp.asarray, batches), lambda x: x


def _closed_step(step, state, hparams, x):
    """The initial state with the varying axes that the step preserves, the step, and the values that it closes over."""
    axes, grown = varying_axes(state), set()

    def typed_step(state, hparams, x):
        after = step(state, hparams, x)
        check_same_state(state, after)
        after = cast_like(after, state)
        grown.update(varying_axes(after))
        return after

    # Under `shard_map` a step may make the state vary over mesh axes over which the initial state does not. A scan
    # needs one type throughout, so the initial state is cast until its type is preserved (one axis may bring another).
    while True:
        state = cast_varying(state, axes)
        pure, consts = closure_convert(typed_step, state, hparams, x)
        if grown <= axes:
            break
        axes |= grown
    return state, lambda state, inputs, x: cast_varying(pure(inputs[1], state, inputs[0], x), axes), consts


def _traced_high(fn, args) -> tuple[Callable, list, PyTree]:
    """`closure_convert(fn, *args)` in the precision of the linear solves, and the types of the traced arguments.

    A bfloat16 model's condition is traced in float32, unless the model insists on its own type, as a convolution of
    16-bit data does with 16-bit weights: JAX then raises a `TypeError`.
    """
    high = upcast(args)
    if any(a.dtype != b.dtype for a, b in zip(*map(jax.tree.leaves, (args, high)), strict=True)):
        try:
            return *closure_convert(fn, *high), jax.eval_shape(lambda: high)
        except TypeError:
            high = args
    return *closure_convert(fn, *high), jax.eval_shape(lambda: high)


def info_of(problem: Problem, final: InnerState, steps: Any) -> Info:
    """The `Info` of a problem's run."""
    params, model_state, inputs = jax.lax.stop_gradient((final.params, final.model_state, problem.residual_inputs))
    optimality = norm(problem.residual(params, model_state, inputs))
    return Info(optimality, steps, all_finite(params) & jnp.isfinite(optimality))
