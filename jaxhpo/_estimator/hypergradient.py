"""Hypergradient methods as pairs of pure functions that carry state between outer steps."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxhpo._adjoint.implicit import Implicit
from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.mesh import varying_axes
from jaxhpo._core.tree import upcast, zeros_like
from jaxhpo._core.types import Hypergradient, HypergradientInfo, InnerState, PyTree, Solver, StatefulMethod, declared
from jaxhpo._core.validate import check_callable, check_count, check_hparams, check_key, check_scalar, describe
from jaxhpo._estimator.implicit_product import implicit_product
from jaxhpo._estimator.pair import check_pair_state, drawn, inner_start
from jaxhpo._inner.inputs import check_solver
from jaxhpo._inner.loop import run
from jaxhpo._inner.problem import Adjoint, check_adjoint, make_problem
from jaxhpo._solve import solve


def hypergradient(
    method: Adjoint | StatefulMethod,
    solver: Solver,
    outer_loss: Callable,
    *,
    num_steps: int | None = None,
    warm_start: bool = True,
    condition_batch: Any = None,
) -> Hypergradient:
    r"""A hypergradient method as two pure functions, as in optax.

    For methods that carry state between outer steps (a warm start of the linear solve, a running Jacobian, perturbed
    copies, a hypernetwork) or need no derivative of the trained parameters. Every derivative rule is a method too, so
    methods are compared by changing one argument:

    .. code-block:: python

        pair = hypergradient(HOAG(), solver, outer_loss, num_steps=100)
        state = pair.init(params0, h)
        hypergrad, state, info = pair.update(h, state, batches, outer_batch, key)

    Some combinations have a name in the literature:

    - T1-T2 (Luketina): `Implicit(Identity(learning_rate))` with `num_steps=1`, one step of training and one of the
      hyperparameters in turn.
    - Lorraine: `Implicit(Neumann(K, learning_rate))` with a few steps an update.
    - Greedy, or one-step unrolling: `Unroll()` with `num_steps=1`.
    - `HOAG()`: `Implicit(CG())` with tolerances that tighten from update to update.
    - `RealTime()`: `Forward()` that continues from update to update.

    The pair of an `Implicit` rule reports the linear solve in `info.linear`, and with `warm_start` starts it from the
    last solution, unless that solve failed or the linear solver uses no start (`Neumann`, `Identity`, `Direct`,
    `Nystrom`). It does neither for a data-parallel loss inside `jax.shard_map`, with a `pmean`: there it is `jax.grad`.

    **Cost and bias**: those of the method.

    Args:
      method: a stateful method (`HOAG()`, `RealTime()`, ...) or a derivative rule (`Implicit(CG())`, ...).
      solver: the inner problem.
      outer_loss: `(solution, hparams, outer_batch) -> scalar`, or `-> (scalar, metrics)`.
      num_steps: inner steps per update; may be omitted if `batches` is a pytree with a leading axis of steps. `batches`
        given as a function of the step index counts from 0 in every update: draw new data in each, as
        `from_pair(pair, data)` does.
      warm_start: True to start each update from the last state; False to start from the parameters given to `init`.
      condition_batch: the batch on which the linear system of `Implicit` and `HOAG` stands: a pytree, or a function
        `key -> batch` that draws one in each update, from its key. None takes the last inner step's, so that the step
        and the system share one minibatch. Large ones, all data at best, lower the noise of the hypergradient.

    Returns:
      A `Hypergradient(init, update)`. Only the `hparams` argument of the losses is differentiated.

    Raises:
      JaxhpoError: an argument that cannot work.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: jnp.sum((p - h) ** 2), optax.sgd(0.1))
      >>> pair = jaxhpo.hypergradient(
      ...     jaxhpo.Implicit(), solver, lambda solution, h, batch: jnp.sum((solution.params - 3.0) ** 2), num_steps=50
      ... )
      >>> h = jnp.ones(2)
      >>> hypergrad, state, info = pair.update(h, pair.init(jnp.zeros(2), h))
      >>> print(hypergrad.round(3))
      [-4. -4.]

    References:
      Luketina, Berglund, Greff, Raiko. Scalable Gradient-Based Tuning of Continuous Regularization Hyperparameters.
      2016. arXiv:1511.06727
      Franceschi, Donini, Frasconi, Pontil. Forward and Reverse Gradient-Based Hyperparameter Optimization. 2017.
      arXiv:1703.01785
    """
    check_solver(solver)
    check_callable("outer_loss", outer_loss, "outer_loss(solution, hparams, outer_batch)", 3)
    if num_steps is not None:
        check_count("num_steps", num_steps)
    if not isinstance(warm_start, bool):
        raise JaxhpoError(f"`warm_start` got {describe(warm_start)}, but it is a switch: write True or False.")
    if isinstance(method, type):
        raise JaxhpoError(f"`method` got the class {method.__name__}: write `{method.__name__}(...)`.")
    checked = _checked_outer_loss(outer_loss)
    if condition_batch is not None and not (isinstance(method, Implicit) or _takes_condition_batch(method)):
        raise JaxhpoError(
            f"`condition_batch` got {describe(condition_batch)}, but {method!r} solves no linear system that stands on "
            "a batch of its own: omit it, or write `Implicit(...)` or `HOAG()`."
        )
    if callable(condition_batch):
        check_callable("condition_batch", condition_batch, "condition_batch(key)", 1)
    if isinstance(method, StatefulMethod) and not isinstance(method, Adjoint):
        system = {} if condition_batch is None else {"condition_batch": condition_batch}
        pair: Any = method.pair(solver, checked, num_steps, warm_start, **system)
    else:
        check_adjoint(method)
        make: Any = _of_rule
        if isinstance(method, Implicit):
            make = functools.partial(_of_implicit, condition_batch=condition_batch)
        pair = make(method, solver, checked, num_steps, warm_start)

    if not isinstance(pair, Hypergradient):
        raise JaxhpoError(f"`pair` of {method!r} returned {describe(pair)}: return a `Hypergradient(init, update)`.")

    def update(hparams, state, batches=None, outer_batch=None, key=None):
        out = pair.update(check_hparams(hparams), state, batches, outer_batch, check_key(key))
        if not (isinstance(out, tuple) and len(out) == 3):
            instead = "`(hypergradient, state, HypergradientInfo(...))`"
            raise JaxhpoError(f"`update` of {method!r} returned {describe(out)}: return {instead}.")
        return out

    return Hypergradient(pair.init, update)


def _takes_condition_batch(method: Any) -> bool:
    pair = getattr(method, "pair", None)
    return pair is not None and "condition_batch" in inspect.signature(pair).parameters


class RuleState(NamedTuple):
    """State of the pair of a derivative rule.

    Attributes:
      inner: the state from which the next inner run starts.
    """

    inner: InnerState


def _of_rule(adjoint: Adjoint, solver, outer_loss, num_steps, warm_start, condition_batch=None) -> Hypergradient:
    def init(params, hparams, model_state=None):
        return RuleState(solver.init(params, hparams, model_state))

    def update(hparams, state, batches, outer_batch, key):
        check_pair_state(state, RuleState, adjoint)

        def loss(hparams):
            start = inner_start(solver, state.inner, hparams, warm_start)
            at = drawn(condition_batch, key)
            solution = solve(
                solver, start, hparams, batches, num_steps=num_steps, condition_batch=at, key=key, adjoint=adjoint
            )
            value, metrics = outer_loss(solution, hparams, outer_batch)
            return value, (metrics, solution)

        (value, (metrics, solution)), grad = jax.value_and_grad(loss, has_aux=True)(hparams)
        after = RuleState(solution.state) if warm_start else state
        return grad, after, HypergradientInfo(value, metrics, solution.info)

    return Hypergradient(init, update)


class ImplicitState(NamedTuple):
    """State of the pair of an `Implicit` rule.

    Attributes:
      inner: the state from which the next inner run starts.
      linear_solution: the start of the next linear solve, like the parameters; None without warm start.
    """

    inner: InnerState
    linear_solution: PyTree


def _of_implicit(rule: Implicit, solver, outer_loss, num_steps, warm_start, condition_batch) -> Hypergradient:
    by_grad = _of_rule(rule, solver, outer_loss, num_steps, warm_start, condition_batch)

    def init(params, hparams, model_state=None):
        inner = solver.init(params, hparams, model_state)
        return ImplicitState(inner, zeros_like(upcast(inner.params)) if warm_start else None)

    def update(hparams, state, batches, outer_batch, key):
        check_pair_state(state, ImplicitState, rule)
        start = inner_start(solver, state.inner, hparams, warm_start)
        at = drawn(condition_batch, key)
        problem = make_problem(solver, start, hparams, batches, num_steps=num_steps, condition_batch=at, key=key)
        if varying_axes(problem.residual_inputs) - varying_axes(problem.state.params):
            # Data-parallel inside `shard_map`: there JAX runs a `custom_linear_solve` only transposed, as `grad` does.
            grad, after, info = by_grad.update(hparams, RuleState(state.inner), batches, outer_batch, key)
            return grad, state._replace(inner=after.inner), info
        keyed: Any = rule
        if declared(rule.linear_solver).needs_key:
            linear_solver = functools.partial(rule.linear_solver, key=problem.require_key(rule))
            keyed = dataclasses.replace(rule, linear_solver=linear_solver)
        rule.check(problem)
        ended = run(problem)
        grad, q, info = implicit_product(keyed, rule, problem, ended, outer_loss, outer_batch, state.linear_solution)
        return grad, ImplicitState(ended[0], q) if warm_start else state, info

    return Hypergradient(init, update)


def _checked_outer_loss(outer_loss):
    """`outer_loss` as `(solution, hparams, outer_batch) -> (value, metrics)`."""

    def checked(solution, hparams, outer_batch):
        out = outer_loss(solution, hparams, outer_batch)
        if not isinstance(out, tuple):
            return check_scalar(out, "outer_loss"), None
        if len(out) != 2:
            raise JaxhpoError(f"`outer_loss` returned {describe(out)}: return a scalar, or `(scalar, metrics)`.")
        return check_scalar(out[0], "outer_loss"), out[1]

    return checked


def from_pair(pair: Hypergradient, data: Any = None) -> Callable[[PyTree, PyTree, jax.Array], tuple]:
    """Makes the `gradient=` argument of `tune` from a pair, whose state is the carry.

    **Cost and bias**: those of the pair.

    Args:
      pair: from `hypergradient`.
      data: a function `key -> (batches, outer_batch)` that draws new data at every outer step, or one `(batches,
        outer_batch)` for all (a function of the inner step counts from 0 each time); None if the losses close over
        their data.

    Returns:
      `(hparams, carry, key) -> (value, hypergradient, carry, info)`.

    Raises:
      JaxhpoError: `pair` is not a pair, or `data` is neither.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: jnp.sum((p - h) ** 2), optax.sgd(0.1))
      >>> pair = jaxhpo.hypergradient(
      ...     jaxhpo.Implicit(), solver, lambda solution, h, batch: jnp.sum((solution.params - 3.0) ** 2), num_steps=20
      ... )
      >>> h = jnp.ones(2)
      >>> result = jaxhpo.tune(
      ...     None, h, optax.sgd(0.2), num_steps=30, gradient=jaxhpo.from_pair(pair), carry=pair.init(jnp.zeros(2), h),
      ...     progress=False,
      ... )
      >>> print(result.hparams.round(2))
      [3. 3.]

    References:
      Bradbury et al. JAX: composable transformations of Python+NumPy programs. 2018.
    """
    if not isinstance(pair, Hypergradient):
        raise JaxhpoError(f"`pair` got {describe(pair)}: make one with `hypergradient(method, solver, outer_loss)`.")
    if not callable(data) and data is not None and not (isinstance(data, tuple) and len(data) == 2):
        raise JaxhpoError(f"`data` got {describe(data)}: write `(batches, outer_batch)`, or a function of a key to it.")

    def gradient(hparams, carry, key):
        data_key, method_key = jax.random.split(key)
        drawn: Any = data(data_key) if callable(data) else data
        batches, outer_batch = (None, None) if drawn is None else drawn
        hypergrad, carry, info = pair.update(hparams, carry, batches, outer_batch, method_key)
        return info.value, hypergrad, carry, info

    return gradient
