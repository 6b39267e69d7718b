"""One step of parameters, linear system and hyperparameters in turn, each on minibatches of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.tree import all_finite, norm
from jaxhpo._core.types import Hypergradient, HypergradientInfo, Info, PyTree, StatefulMethod
from jaxhpo._core.validate import describe
from jaxhpo.single_loop._loop import check_begin, check_one_step, check_update, start
from jaxhpo.single_loop._sums import FiniteSum, Point, Problem, Term, add, draws_of, implicit_sums, problem_of
from jaxhpo.single_loop._variance import Estimator, PerVariable


@dataclasses.dataclass(frozen=True)
class InTurn(StatefulMethod):
    r"""`SingleLoop` in turn: v moves at the new θ, and h by the direction at the new θ and v; each draws anew.

    .. math:: \theta^+ = \theta - \rho D_\theta(\theta, v, h), \qquad v^+ = v - \rho_v D_v(\theta^+, v, h), \qquad
              h^+ = h - \gamma D_h(\theta^+, v^+, h).

    The draws of the three are independent, so that no product of two of them is biased. FSLA is that with
    `PerVariable(hparams=STORM(η))`.

    **Cost and bias**: by `implicit_sums` a gradient, a Hessian product and the mixed product, each on a minibatch of
    its own of the train loss, and two gradients of the outer loss; memory of θ, v and their optimisers' states, and of
    what the estimators keep: for `STORM` a direction and a point of its own. Hypergradients are biased while θ and v
    are on their way.

    Args:
      train: the minibatches of the train loss.
      validation: those of the outer loss.
      estimators: of the directions of θ, v and h.
      sums: `problem -> [Term, ...]`, what is summed.
      linear: optax transformation for v; None takes another copy of the solver's, which must not decay v.
      begin: `params -> v` at the start, like the parameters; None takes zeros.

    Raises:
      JaxhpoError: data that is no `FiniteSum`; a solver without a train loss; estimators that are not `PerVariable`;
        `num_steps` above 1 or `warm_start=False`, which it has no use for.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (60, 3))
      >>> y = x @ jnp.array([1.0, -1.0, 0.5])
      >>> def train_loss(w, h, batch):
      ...     return jnp.mean((batch[0] @ w - batch[1]) ** 2) + jnp.exp(h) * jnp.sum(w**2)
      >>> solver = jaxhpo.from_optax(train_loss, optax.sgd(0.1))
      >>> from jaxhpo.single_loop import STORM, FiniteSum, InTurn, PerVariable
      >>> train, validation = FiniteSum.of((x[:40], y[:40]), 10), FiniteSum.of((x[40:], y[40:]), 10)
      >>> pair = jaxhpo.hypergradient(
      ...     InTurn(train, validation, PerVariable(hparams=STORM(0.5))), solver,
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
      Li, Gu, Huang. A Fully Single Loop Algorithm for Bilevel Optimization without Hessian Inverse. 2022.
      arXiv:2112.04660
    """

    train: FiniteSum
    validation: FiniteSum
    estimators: PerVariable = PerVariable()
    sums: Callable[[Problem], list[Term]] = implicit_sums
    linear: optax.GradientTransformation | None = None
    begin: Callable[[PyTree], PyTree] | None = None

    def __post_init__(self):
        check_begin(self)
        if not isinstance(self.estimators, PerVariable):
            raise JaxhpoError(
                f"`InTurn(estimators=...)` got {describe(self.estimators)}: write `PerVariable(hparams=STORM(0.5))`, "
                "for example, as each of the three has minibatches of its own."
            )

    def pair(self, solver, outer_loss, num_steps, warm_start) -> Hypergradient:
        """Return the pair of `init` and `update`."""
        check_one_step(self, num_steps, warm_start)
        problem = problem_of(self, solver, outer_loss, self.linear)

        def init(params, hparams, model_state=None):
            state = start(problem, self.linear, self.begin)(params, hparams, model_state)
            point = Point(state.inner.params, state.auxiliary.params, jax.tree.map(jnp.asarray, hparams))
            own = problem._replace(model_state=state.inner.model_state)
            memories = tuple(
                tuple(estimator.init(term, point, own) for term in self._terms(own, point, k))
                for k, estimator in enumerate(self._estimators)
            )
            before = tuple(point if estimator.recursive else None for estimator in self._estimators)
            return state._replace(memories=memories, before=before)

        def update(hparams, state, batches, outer_batch, key):
            check_update(state, self, batches, outer_batch)
            own = problem._replace(model_state=state.inner.model_state)
            point = Point(state.inner.params, state.auxiliary.params, hparams)
            # A minibatch for each step of an optimiser at least, and one on which the outer loss is reported.
            train, validation = zip(*(sizes(self._terms(own, point, k)) for k in range(3)), strict=True)
            i, j = state.draws.take(own, key, sum(train), max(1, sum(validation)))
            (value, metrics), _ = own.evaluate(point, j[0])
            i, j = jnp.split(i, np.cumsum(train)[:-1]), jnp.split(j, np.cumsum(validation)[:-1])

            by_params, first = self._direction(0, own, point, state, i, j, key)
            finite = all_finite((point.params, by_params))
            inner = own.step(state.inner, hparams, i[0][0], by_params)
            own, point = problem._replace(model_state=inner.model_state), point._replace(params=inner.params)
            by_auxiliary, second = self._direction(1, own, point, state, i, j, key)
            auxiliary = own.step_auxiliary(state.auxiliary, hparams, i[1][0], by_auxiliary, self.linear)
            point = point._replace(auxiliary=auxiliary.params)
            grad, third = self._direction(2, own, point, state, i, j, key)

            memories, before = zip(first, second, third, strict=True)
            after = state.after(inner, auxiliary, sum(train), max(1, sum(validation)))
            after = after._replace(memories=memories, before=before)
            info = Info(norm(by_params), jnp.ones((), jnp.int32), finite)
            return grad, after, HypergradientInfo(value, metrics, info)

        return Hypergradient(init, update)

    @property
    def _estimators(self) -> tuple[Estimator, ...]:
        return self.estimators.params, self.estimators.auxiliary, self.estimators.hparams

    def _terms(self, problem: Problem, point: Point, k: int) -> list[Term]:
        """The terms with a direction of the k-th unknown."""
        parts = [term.part(k) for term in self.sums(problem)]
        return [part for part in parts if jax.tree.leaves(part.kinds(point))]

    def _direction(self, k, problem, point, state, i, j, key):
        """The direction of the k-th unknown at the point; its memories, and the point where its estimator needs it."""
        estimator, chance = self._estimators[k], None if key is None else jax.random.fold_in(key, 8 + k)
        direction, memories, terms = Point(None, None, None), [], self._terms(problem, point, k)
        draws = draws_of(terms, i[k], j[k], chance, self)
        for term, draw, memory in zip(terms, draws, state.memories[k], strict=True):
            given = point, state.before[k], memory, state.count, None, problem
            part, memory = estimator.estimate(term, draw, *given)
            direction, memories = add(direction, term.weighted(part, state.count)), [*memories, memory]
        return direction[k], (tuple(memories), point if estimator.recursive else None)


def sizes(terms: list[Term]) -> tuple[int, int]:
    """The minibatches of each loss in a draw of these terms, one of the train loss at least."""
    return max(1, sum(term.train for term in terms)), sum(term.validation for term in terms)
