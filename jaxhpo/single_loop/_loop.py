"""One step of parameters, linear system and hyperparameters together, by any estimator of the directions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.tree import all_finite, norm, zeros_like
from jaxhpo._core.types import Hypergradient, HypergradientInfo, Info, InnerState, PyTree, StatefulMethod
from jaxhpo._core.validate import check_callable
from jaxhpo._estimator.pair import check_pair_state, check_warm_start
from jaxhpo.single_loop._sums import (
    Draws,
    FiniteSum,
    Point,
    Problem,
    Term,
    add,
    draws_of,
    implicit_sums,
    problem_of,
)
from jaxhpo.single_loop._variance import Estimator, Plain, check_estimator


class SingleLoopState(NamedTuple):
    """State of `SingleLoop` and of the methods that are cases of it.

    Attributes:
      inner: θ and its optimiser's state.
      auxiliary: v and its optimiser's state.
      memories: of the estimator, one for each sum.
      before: the point of the last update, or of `InTurn` those of the three directions; None for estimators without
        need of it.
      draws: minibatches drawn so far of the train loss and of the outer loss, int32.
      count: updates made, int32.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: jnp.mean((p - h - batch) ** 2), optax.sgd(0.1))
      >>> rows = jaxhpo.single_loop.FiniteSum.of(jnp.zeros(4), 2)
      >>> pair = jaxhpo.hypergradient(
      ...     jaxhpo.single_loop.SABA(rows, rows), solver, lambda solution, h, b: jnp.mean((solution.params - b) ** 2)
      ... )
      >>> state = pair.init(jnp.array(0.0), jnp.array(1.0))
      >>> print(state.auxiliary.params, state.count)
      0.0 0
    """

    inner: InnerState
    auxiliary: InnerState
    memories: tuple
    before: Any
    draws: Draws
    count: jax.Array

    single_loop = True  # for `check_one_training`

    def after(self, inner: InnerState, auxiliary: InnerState, train: int, validation: int) -> SingleLoopState:
        """The state after an update that drew so many minibatches of each loss."""
        draws = Draws(self.draws.train + train, self.draws.validation + validation)
        return self._replace(inner=inner, auxiliary=auxiliary, draws=draws, count=self.count + 1)


@dataclasses.dataclass(frozen=True)
class SingleLoop(StatefulMethod):
    r"""Parameters, linear system and hyperparameters moved together, one step each an update, on minibatches.

    All three directions are sums over minibatches, at the same point :math:`p = (\theta, v, h)`, of which an estimator
    takes the mean:

    .. math:: \theta \leftarrow \theta - \rho D_\theta, \qquad v \leftarrow v - \rho_v D_v, \qquad
              h \leftarrow h - \gamma D_h.

    The first step is the solver's optimiser, the second `linear`, and the third the optimiser of `tune`, to which
    :math:`D_h` is the hypergradient. So a training and a search are one: `SOBA` is `SingleLoop` with `Plain()`, `SABA`
    with `SAGA()`, SRBA with `SARAH(q)`, `SPABA` with `PAGE(q)`, MRBO with `STORM(η)` and `series_sums`, SUSTAIN with
    these of a random length, F3SA with `STORM(η)` and `penalty_sums`. Step sizes are those of the optimisers, so
    schedules of optax: VRBO, `SARAH(q)` on `series_sums`, holds h by a rate of zero in all but every T-th update.

    **Cost and bias**: by `implicit_sums` and `Plain()` an update takes a gradient, a Hessian product and the mixed
    product on one minibatch of the train loss (one forward-over-reverse pass: three to four gradients) and a gradient
    of the outer loss on another. Memory of θ, v and their optimisers' states, and of what the estimator keeps.
    Hypergradients are biased while θ and v are on their way, and go to the true one with them.

    Args:
      train: the minibatches of the train loss.
      validation: those of the outer loss.
      estimator: of the mean of the directions; `PerVariable` takes one for each.
      sums: `problem -> [Term, ...]`, what is summed.
      linear: optax transformation for v; None takes another copy of the solver's. Give one, `optax.sgd(rate)`, where
        the solver's decays weights, clips or looks at the loss.
      begin: `params -> v` at the start, like the parameters; None takes zeros.

    Raises:
      JaxhpoError: data that is no `FiniteSum`; a solver without a train loss; what is no estimator; `num_steps` above
        1 or `warm_start=False`, which it has no use for.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (60, 3))
      >>> y = x @ jnp.array([1.0, -1.0, 0.5])
      >>> def train_loss(w, h, batch):
      ...     return jnp.mean((batch[0] @ w - batch[1]) ** 2) + jnp.exp(h) * jnp.sum(w**2)
      >>> solver = jaxhpo.from_optax(train_loss, optax.sgd(0.1))
      >>> from jaxhpo.single_loop import SARAH, FiniteSum, SingleLoop
      >>> train, validation = FiniteSum.of((x[:40], y[:40]), 10), FiniteSum.of((x[40:], y[40:]), 10)
      >>> pair = jaxhpo.hypergradient(
      ...     SingleLoop(train, validation, SARAH(period=8)), solver,
      ...     lambda solution, h, batch: jnp.mean((batch[0] @ solution.params - batch[1]) ** 2),
      ... )
      >>> h = jnp.array(0.0)
      >>> result = jaxhpo.tune(
      ...     None, h, optax.sgd(0.3), num_steps=100, gradient=jaxhpo.from_pair(pair),
      ...     carry=pair.init(jnp.zeros(3), h), progress=False,
      ... )
      >>> bool(result.hparams < -1.0)  # the data have no noise: the best penalty is none, h = -∞
      True

    References:
      Dagréou, Ablin, Vaiter, Moreau. A framework for bilevel optimization that enables stochastic and global variance
      reduction algorithms. 2022. arXiv:2201.13409
    """

    train: FiniteSum
    validation: FiniteSum
    estimator: Estimator = Plain()
    sums: Callable[[Problem], list[Term]] = implicit_sums
    linear: optax.GradientTransformation | None = None
    begin: Callable[[PyTree], PyTree] | None = None

    def __post_init__(self):
        check_begin(self)

    def pair(self, solver, outer_loss, num_steps, warm_start) -> Hypergradient:
        """Return the pair of `init` and `update`."""
        check_one_step(self, num_steps, warm_start)
        problem = problem_of(self, solver, outer_loss, self.linear)
        check_estimator("SingleLoop(estimator=...)", estimator := self.estimator)

        def init(params, hparams, model_state=None):
            state = start(problem, self.linear, self.begin)(params, hparams, model_state)
            point = Point(state.inner.params, state.auxiliary.params, jax.tree.map(jnp.asarray, hparams))
            own = problem._replace(model_state=state.inner.model_state)
            memories = tuple(estimator.init(term, point, own) for term in self.sums(own))
            return state._replace(memories=memories, before=point if estimator.recursive else None)

        def update(hparams, state, batches, outer_batch, key):
            check_update(state, self, batches, outer_batch)
            own = problem._replace(model_state=state.inner.model_state)
            point, terms = Point(state.inner.params, state.auxiliary.params, hparams), self.sums(own)
            restart = estimator.restarts(state.count, key)
            # One of each at least: the solver's step sees a minibatch, and so does the outer loss that is reported.
            size = max(1, sum(term.train for term in terms)), max(1, sum(term.validation for term in terms))
            i, j = state.draws.take(own, key, *size)
            direction, memories = Point(None, None, None), []
            draws = draws_of(terms, i, j, key, self)
            for term, draw, memory in zip(terms, draws, state.memories, strict=True):
                given = point, state.before, memory, state.count, restart, own
                part, memory = estimator.estimate(term, draw, *given)
                direction, memories = add(direction, term.weighted(part, state.count)), [*memories, memory]
            (value, metrics), _ = own.evaluate(point, j[0])
            finite = all_finite((state.inner.params, direction.params))
            info = Info(norm(direction.params), jnp.ones((), jnp.int32), finite)
            inner = problem.step(state.inner, hparams, i[0], direction.params)
            auxiliary = problem.step_auxiliary(state.auxiliary, hparams, i[0], direction.auxiliary, self.linear)
            drawn = 1 if restart is None else jnp.where(restart, 0, 1)
            after = state.after(inner, auxiliary, *(drawn * num for num in size))
            after = after._replace(memories=tuple(memories), before=point if estimator.recursive else None)
            return direction.hparams, after, HypergradientInfo(value, metrics, info)

        return Hypergradient(init, update)


def start(problem: Problem, linear: Any, begin: Callable | None = None) -> Callable:
    """The `init` of a method: θ as given, v = 0 or what `begin` gives, the state of its optimiser, nothing drawn."""

    def init(params, hparams, model_state=None):
        inner, zero = problem.solver.init(params, hparams, model_state), jnp.zeros((), jnp.int32)
        v = zeros_like(inner.params) if begin is None else begun(begin, inner.params)
        if linear is None:
            auxiliary = problem.solver.init(v, hparams, inner.model_state)._replace(model_state=None)
        else:
            auxiliary = InnerState(v, linear.init(v))
        return SingleLoopState(inner, auxiliary, (), None, Draws(zero, zero), zero)

    return init


def begun(begin: Callable, params: PyTree) -> PyTree:
    """The first v; raises where it is not like the parameters."""
    v = jax.tree.map(jnp.asarray, begin(params))
    kinds = jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), (v, params))
    if kinds[0] != kinds[1]:
        raise JaxhpoError("`begin(params)` returned what is not like the parameters: write `lambda params: params`.")
    return v


def check_begin(method: Any) -> None:
    """Raises where `begin` is no function of the parameters."""
    if method.begin is not None:
        check_callable(f"{type(method).__name__}(begin=...)", method.begin, "begin(params)", 1)


def check_update(state: Any, method: Any, batches: Any, outer_batch: Any) -> None:
    """Raises where `update` is given another's state, or data that the method has already."""
    check_pair_state(state, SingleLoopState, method)
    if batches is not None or outer_batch is not None:
        raise JaxhpoError(
            f"`update` of {type(method).__name__} got batches, but draws its own from `train` and `validation`: omit "
            "them (and `data` of `from_pair`)."
        )


def report(problem: Problem, inner: InnerState, hparams, i, num_steps: int, value, metrics) -> HypergradientInfo:
    """The report of an update: the optimality is that on minibatch i."""
    optimality = norm(problem.train_gradient(inner.params, hparams, i)[1])
    steps, finite = jnp.asarray(num_steps, jnp.int32), all_finite(inner.params) & jnp.isfinite(optimality)
    return HypergradientInfo(value, metrics, Info(optimality, steps, finite))


def check_several_steps(method: Any, num_steps: int | None, warm_start: bool) -> int:
    """Returns the inner steps of an update; raises where `hypergradient` does not say, or starts anew in each."""
    if num_steps is None:
        raise JaxhpoError(
            f"{type(method).__name__} takes some inner steps an update: write `hypergradient(..., num_steps=10)`."
        )
    check_warm_start(warm_start, method, "Implicit()")
    return num_steps


def check_one_step(method: Any, num_steps: int | None, warm_start: bool) -> None:
    """Raises where `hypergradient` asks for what a method of one step an update does not have."""
    if num_steps not in (None, 1):
        raise JaxhpoError(
            f"`num_steps={num_steps}` with {type(method).__name__}, which takes one inner step an update: omit it, or "
            "write `AmIGO`, `StocBiO` or `F2SA`, which take several."
        )
    check_warm_start(warm_start, method, "Implicit()")
