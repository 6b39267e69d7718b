"""Estimators of the mean of a finite sum from one draw of minibatches at a time.

`init(term, point, problem)` makes the memory of a sum; `estimate(term, draw, point, before, memory, count, restart,
problem)` gives the direction and the new memory. `before` is the point of the last update, kept where `recursive`.
`restarts(count, key)` says whether this update takes the mean over all minibatches, so that nothing is drawn; None
where an estimator never does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.tree import add_scaled, cast_like, scaled, upcast
from jaxhpo._core.types import PyTree
from jaxhpo._core.validate import check_settings, check_traceable_number, describe, require_key
from jaxhpo.single_loop._sums import Point, Problem, Term


class Estimator:
    """Base class of estimators of the mean of a finite sum; one of your own has `estimate`, and what else it needs.

    Attributes:
      recursive: whether it needs the point of the last update.

    Example:
      >>> class Halved(jaxhpo.single_loop.Estimator):
      ...     def estimate(self, term, draw, point, before, memory, count, restart, problem):
      ...         return jax.tree.map(lambda x: x / 2, term.at(point, *draw)), memory
      >>> rows = jaxhpo.single_loop.FiniteSum.of(jnp.zeros(4), 2)
      >>> method = jaxhpo.single_loop.SingleLoop(rows, rows, Halved())
    """

    recursive: ClassVar[bool] = False

    def init(self, term: Term, point: Point, problem: Problem) -> PyTree:
        """The memory before the first update."""
        return ()

    def restarts(self, count: jax.Array, key: Any) -> jax.Array | None:
        """True where this update takes the mean over all minibatches."""
        return None

    def estimate(self, term, draw, point, before, memory, count, restart, problem) -> tuple[Point, PyTree]:
        """The direction, and the new memory."""
        raise JaxhpoError(f"`{type(self).__name__}` inherits from `Estimator`, but has no `estimate`: write it.")


@dataclasses.dataclass(frozen=True)
class Plain(Estimator):
    """The direction of the minibatches drawn: unbiased, with their whole variance.

    **Cost and bias**: one direction an update; no memory; unbiased.

    Example:
      >>> jaxhpo.single_loop.Plain()
      Plain()

    References:
      Robbins, Monro. A Stochastic Approximation Method. 1951.
    """

    def estimate(self, term, draw, point, before, memory, count, restart, problem):
        """The direction, and no memory."""
        return term.at(point, *draw), memory


@dataclasses.dataclass(frozen=True)
class Momentum(Estimator):
    r"""A moving average of directions, :math:`d \leftarrow (1 - \beta) d + \beta\, d_i(p)`.

    **Cost and bias**: one direction an update; memory of one direction; biased towards earlier points.

    Args:
      weight: β in (0, 1], a number or a function of the count of updates.

    Raises:
      JaxhpoError: β is neither, or out of its range.

    Example:
      >>> estimator = jaxhpo.single_loop.Momentum(0.1)

    References:
      Chen, Xiao, Balasubramanian. Optimal Algorithms for Stochastic Bilevel Optimization under Relaxed Smoothness
      Conditions. 2023. arXiv:2306.12067
    """

    weight: float | Callable[[jax.Array], Any]

    def __post_init__(self):
        _check_weight(self)

    def init(self, term, point, problem):
        """No direction yet."""
        return _zero(term, point), jnp.asarray(False)

    def estimate(self, term, draw, point, before, memory, count, restart, problem):
        """The average; the first direction begins it."""
        (last, begun), new = memory, term.at(point, *draw)
        weight = jnp.where(begun, _weight(self.weight, count), 1.0)
        direction = add_scaled(scaled(weight, upcast(new)), 1.0 - weight, last)
        return cast_like(direction, new), (direction, jnp.asarray(True))


@dataclasses.dataclass(frozen=True)
class STORM(Estimator):
    r"""Recursive momentum, :math:`d \leftarrow d_i(p) + (1 - \eta)(d - d_i(p^-))`, with p⁻ the point before.

    **Cost and bias**: two directions an update, on the same minibatches; memory of one direction and of one point; its
    error is smaller than one draw's, and does not vanish.

    Args:
      decay: η in (0, 1], a number or a function of the count of updates, of which :math:`t^{-2/3}` is usual.

    Raises:
      JaxhpoError: η is neither, or out of its range.

    Example:
      >>> estimator = jaxhpo.single_loop.STORM(lambda count: 0.5 * (count + 1.0) ** (-2 / 3))

    References:
      Cutkosky, Orabona. Momentum-Based Variance Reduction in Non-Convex SGD. 2019. arXiv:1905.10018
    """

    decay: float | Callable[[jax.Array], Any]
    recursive: ClassVar[bool] = True

    def __post_init__(self):
        _check_weight(self)

    def init(self, term, point, problem):
        """No direction yet."""
        return _zero(term, point), jnp.asarray(False)

    def estimate(self, term, draw, point, before, memory, count, restart, problem):
        """The direction; the first one is that of the minibatches drawn."""
        (last, begun), new = memory, term.at(point, *draw)
        kept = jnp.where(begun, 1.0 - _weight(self.decay, count), 0.0)
        direction = add_scaled(upcast(new), kept, add_scaled(last, -1.0, term.at(before, *draw)))
        return cast_like(direction, new), (direction, jnp.asarray(True))


@dataclasses.dataclass(frozen=True)
class SAGA(Estimator):
    r"""A table of every minibatch's last direction, :math:`d = d_i(p) - m_i + \bar m`.

    Then :math:`m_i \leftarrow d_i(p)`. The table begins with zeros.

    **Cost and bias**: one direction an update; memory of N directions (each a copy of θ, of v and of h); unbiased once
    every minibatch was seen, with a variance that vanishes at a fixed point.

    Raises:
      JaxhpoError: at the first update, for sums whose draws are several minibatches.

    Example:
      >>> estimator = jaxhpo.single_loop.SAGA()

    References:
      Defazio, Bach, Lacoste-Julien. SAGA: A Fast Incremental Gradient Method With Support for Non-Strongly Convex
      Composite Objectives. 2014. arXiv:1407.0202
    """

    def init(self, term, point, problem):
        """A table of zeros, and its mean."""
        if term.train + term.validation != 1:
            raise JaxhpoError(
                f"{self} keeps a direction of each minibatch, but a draw of these sums is "
                f"{term.train + term.validation} of them: write `sums=implicit_sums`, or `STORM` for the estimator."
            )
        num, kinds = term.num_batches(problem), term.kinds(point)
        entry = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), kinds)
        table = jax.tree.map(lambda x: jnp.zeros((num, *x.shape), x.dtype), kinds)
        return table, _zero(term, point), (jnp.zeros((), jnp.int32), entry)

    def estimate(self, term, draw, point, before, memory, count, restart, problem):
        """The direction, and the new entry, which the next update writes into the table.

        Where a loop reads an entry and then writes one, XLA copies the whole table; written first, it is in place.
        """
        (table, mean, last), (index,) = memory, draw[0] if term.train else draw[1]
        table, new = written(table, *last), term.at(point, *draw)
        change = add_scaled(upcast(new), -1.0, jax.tree.map(lambda m: m[index], table))
        after = add_scaled(mean, 1.0 / term.num_batches(problem), change)
        return cast_like(add_scaled(mean, 1.0, change), new), (table, after, (index.astype(jnp.int32), new))


def written(table: PyTree, index: jax.Array, entry: PyTree) -> PyTree:
    """The table with the entry."""
    return jax.tree.map(lambda m, x: jax.lax.dynamic_update_index_in_dim(m, x, index, 0), table, entry)


class _Restarted(Estimator):
    """The mean over all minibatches now and then, in between corrected by differences."""

    recursive: ClassVar[bool] = True

    def init(self, term, point, problem):
        """No direction yet: the first update restarts."""
        return _zero(term, point)

    def estimate(self, term, draw, point, before, memory, count, restart, problem):
        """The mean over all minibatches, or the last direction corrected on the minibatches drawn."""

        def corrected():
            return add_scaled(memory, 1.0, add_scaled(upcast(term.at(point, *draw)), -1.0, term.at(before, *draw)))

        direction = jax.lax.cond(restart, lambda: term.mean(point, problem), corrected)
        return cast_like(direction, term.kinds(point)), direction


@dataclasses.dataclass(frozen=True)
class SARAH(_Restarted):
    r"""Recursive differences, :math:`d \leftarrow d + d_i(p) - d_i(p^-)`, begun anew every q updates.

    It begins with the mean over all minibatches.

    **Cost and bias**: two directions an update, and N every q updates; memory of one direction and one point; its error
    grows until the next restart. Under `vmap`, as in a population, every update computes the N, too.

    Args:
      period: q.

    Raises:
      JaxhpoError: q is not a positive integer.

    Example:
      >>> estimator = jaxhpo.single_loop.SARAH(period=30)

    References:
      Nguyen, Liu, Scheinberg, Takáč. SARAH: A Novel Method for Machine Learning Problems Using Stochastic Recursive
      Gradient. 2017. arXiv:1703.00102
    """

    period: int

    def __post_init__(self):
        check_settings(self, period="count")

    def restarts(self, count, key):
        """Every q-th update, the first one included."""
        return count % self.period == 0


@dataclasses.dataclass(frozen=True)
class PAGE(_Restarted):
    """`SARAH`, restarted with probability 1/q at each update.

    **Cost and bias**: as `SARAH`, on average; under `vmap`, as in a population, every update computes the N, too.

    Args:
      period: q.

    Raises:
      JaxhpoError: q is not a positive integer.

    Example:
      >>> estimator = jaxhpo.single_loop.PAGE(period=30)

    References:
      Li, Bao, Zhang, Richtárik. PAGE: A Simple and Optimal Probabilistic Gradient Estimator for Nonconvex Optimization.
      2021. arXiv:2008.10898
    """

    period: int

    def __post_init__(self):
        check_settings(self, period="count")

    def restarts(self, count, key):
        """At the first update, and then by chance."""
        return (count == 0) | jax.random.bernoulli(jax.random.fold_in(require_key(key, self), 3), 1 / self.period)


@dataclasses.dataclass(frozen=True)
class PerVariable(Estimator):
    """Another estimator for each of θ, v and h; none that restarts.

    **Cost and bias**: those of the three, each with memory of its own variable alone; under `jit` what they compute
    alike is computed once.

    Args:
      params: of the direction of θ.
      auxiliary: of the direction of v.
      hparams: of the direction of h.

    Raises:
      JaxhpoError: one of them restarts, as its minibatches would be another's; or is no estimator.

    Example:
      >>> averaged = jaxhpo.single_loop.PerVariable(hparams=jaxhpo.single_loop.Momentum(0.1))

    References:
      Li, Gu, Huang. A Fully Single Loop Algorithm for Bilevel Optimization without Hessian Inverse. 2022.
      arXiv:2112.04660
    """

    params: Estimator = Plain()
    auxiliary: Estimator = Plain()
    hparams: Estimator = Plain()

    def __post_init__(self):
        for estimator in self._all:
            check_estimator("PerVariable", estimator)
            if type(estimator).restarts is not Estimator.restarts:
                raise JaxhpoError(f"`PerVariable` got {estimator}, which restarts all three at once: use it alone.")

    @property
    def _all(self) -> tuple[Estimator, ...]:
        return self.params, self.auxiliary, self.hparams

    @property
    def recursive(self) -> bool:
        """True where one of them is."""
        return any(estimator.recursive for estimator in self._all)

    def init(self, term, point, problem):
        """The memories of all three."""
        return tuple(own.init(term.part(k), point, problem) for k, own in enumerate(self._all))

    def estimate(self, term, draw, point, before, memory, count, restart, problem):
        """Each one's part of its own direction."""
        found = [
            estimator.estimate(term.part(k), draw, point, before, own, count, restart, problem)
            for k, (estimator, own) in enumerate(zip(self._all, memory, strict=True))
        ]
        return Point(*(direction[k] for k, (direction, _) in enumerate(found))), tuple(own for _, own in found)


def check_estimator(where: str, given: Any) -> None:
    """Raises for what is no estimator."""
    if not isinstance(given, Estimator):
        raise JaxhpoError(
            f"`{where}` got {describe(given)}, which is no estimator: write one such as `SAGA()`, or an instance of a "
            "class of yours that inherits from `Estimator`."
        )


def _zero(term: Term, point: Point) -> Point:
    """No direction yet. A sum of many in bfloat16 would cease to grow at a few hundred times its parts."""
    return upcast(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), term.kinds(point)))


def _weight(weight, count):
    value: Any = weight(count) if callable(weight) else weight
    check_traceable_number("weight(count)", value)
    return value


def _check_weight(estimator) -> None:
    (field,) = dataclasses.fields(estimator)
    value = getattr(estimator, field.name)
    if callable(value):
        return
    check_settings(estimator, **{field.name: "positive"})
    if value > 1:
        raise JaxhpoError(f"`{type(estimator).__name__}({field.name}=...)` got {value}: write a number in (0, 1].")
