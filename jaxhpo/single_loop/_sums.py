"""Finite sums of minibatches, and the directions of a stochastic bilevel method that they give."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.trace import untrusted_rule
from jaxhpo._core.tree import add_scaled, cast_like, scaled, upcast
from jaxhpo._core.types import Info, InnerState, PyTree, Solution, Solver
from jaxhpo._core.validate import (
    check_callable,
    check_count,
    check_traceable_number,
    count_examples,
    describe,
    require_key,
)
from jaxhpo._inner.gradient import value_and_grad

TRIED = 32  # entries of an order, from its beginning and from N on


@dataclasses.dataclass(frozen=True)
class FiniteSum:
    r"""A mean over minibatches, each of which is known by its number: :math:`\frac1N \sum_{i<N} \ell(\cdot, b_i)`.

    Methods that reduce the variance of minibatches must know which one they see, and how many there are. All weigh the
    same, so they should be of one size.

    Args:
      num_batches: N.
      batch: `i -> b_i`, the minibatch as a pytree; traceable, i is an int32 scalar. It may close over arrays.
      order: `n -> i`, the minibatch that is drawn n-th, n = 0, 1, ..., without end, such as `shuffled[n % N]`. None
        draws with replacement, by the key of each update.

    Raises:
      JaxhpoError: N is not a positive integer, `batch` or `order` no function of one argument, or the order ends after
        N, or gives what is no number of a minibatch; the first few are tried.

    Example:
      >>> x, y = jnp.arange(12.0).reshape(6, 2), jnp.arange(6.0)
      >>> rows = jaxhpo.single_loop.FiniteSum.of((x, y), batch_size=2)
      >>> rows.num_batches, rows.batch(1)[1].tolist()
      (3, [2.0, 3.0])
    """

    num_batches: int
    batch: Callable[[Any], PyTree]
    order: Callable[[Any], Any] | None = None

    def __post_init__(self):
        check_count("FiniteSum(num_batches=...)", self.num_batches)
        check_callable("FiniteSum(batch=...)", self.batch, "batch(i)", 1)
        if self.order is not None:
            check_callable("FiniteSum(order=...)", self.order, "order(n)", 1)
            self._check_order(self.order)

    def _check_order(self, order: Callable[[Any], Any]) -> None:
        # JAX's lookups take the last entry for any index beyond it: an order that ends would go on with one minibatch.
        num = self.num_batches
        begin = min(num, TRIED)
        tried = jax.vmap(order)(jnp.concatenate([jnp.arange(begin), jnp.arange(num - 1, num + TRIED)]))
        if isinstance(tried, Tracer):
            return
        found = np.asarray(tried)
        if found.ndim != 1 or found.dtype.kind not in "iu" or found.min() < 0 or found.max() >= num:
            raise JaxhpoError(
                f"`FiniteSum(order=...)` gives {describe(tried[0])} at first, and numbers from {found.min()} to "
                f"{found.max()}: return one integer, from 0 to {num - 1}."
            )
        if (found[:begin] != found[0]).any() and (found[begin:] == found[-1]).all():
            raise JaxhpoError(
                f"`FiniteSum(order=...)` gives minibatch {found[-1]} for every n from {num - 1} on: an order must not "
                f"end, and a lookup takes the last entry for any n beyond it: write `shuffled[n % {num}]`."
            )

    @classmethod
    def of(cls, arrays: PyTree, batch_size: int, order: Callable[[Any], Any] | None = None) -> FiniteSum:
        """A finite sum over rows of arrays: minibatch i is rows i·batch_size to (i + 1)·batch_size − 1.

        Args:
          arrays: a pytree whose leaves share their leading axis, in random order (minibatches are not drawn anew).
          batch_size: rows of a minibatch, of which the number of rows is a multiple.
          order: as above.

        Returns:
          A `FiniteSum`.

        Raises:
          JaxhpoError: the number of rows is not a multiple of `batch_size`.
        """
        check_count("FiniteSum.of(batch_size=...)", batch_size)
        arrays = jax.tree.map(jnp.asarray, arrays)
        rows = count_examples(arrays, "`FiniteSum.of`")
        if rows % batch_size:
            if batch_size > rows:
                raise JaxhpoError(f"`FiniteSum.of` got {rows} rows, fewer than batch_size={batch_size}: write {rows}.")
            fits = [size for size in range(1, rows + 1) if rows % size == 0]
            below, above = max(s for s in fits if s < batch_size), min(s for s in fits if s > batch_size)
            raise JaxhpoError(
                f"`FiniteSum.of` got {rows} rows, which are not a multiple of batch_size={batch_size}, so that the "
                f"last minibatch would weigh too much: leave out {rows % batch_size} rows, or write {below} or {above}."
            )

        def batch(i):
            return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * batch_size, batch_size), arrays)

        return cls(rows // batch_size, batch, order)

    def draw(self, key: Any, count: jax.Array, num: int, who: Any) -> jax.Array:
        """The numbers of the next `num` minibatches, of which `count` were drawn before."""
        if self.order is None:
            return jax.random.randint(require_key(key, who), (num,), 0, self.num_batches)
        return jax.vmap(self.order)(count + jnp.arange(num)).astype(jnp.int32)


class Point(NamedTuple):
    """The three unknowns of a stochastic bilevel method, or a direction of each; None where a sum has no part of it.

    Attributes:
      params: θ, the inner parameters.
      auxiliary: v, like θ: the solution of the linear system, or second parameters.
      hparams: h.

    Example:
      >>> jaxhpo.single_loop.Point(jnp.zeros(2), jnp.zeros(2), jnp.array(1.0)).hparams
      Array(1., dtype=float32)
    """

    params: PyTree
    auxiliary: PyTree
    hparams: PyTree


def add(a: Point, b: Point) -> Point:
    """The sum of two directions."""
    return Point(*(y if x is None else x if y is None else add_scaled(x, 1.0, y) for x, y in zip(a, b, strict=True)))


class Term(NamedTuple):
    """One of the finite sums that make a direction.

    Attributes:
      at: `(point, train indices, validation indices) -> Point`, the direction by one draw of minibatches; where the
        term is `random`, a fourth argument is a key, the same at all points of an update.
      train: minibatches of the train loss in a draw.
      validation: minibatches of the outer loss in a draw.
      random: whether a draw has a key.
      whole: `point -> Point`, the direction of all minibatches; None takes the mean of `at`, if a draw is one
        minibatch.
      weights: `count -> Point` of numbers, by which the estimates of the three directions are multiplied in the update
        of that number; what an estimator remembers is without them. None are ones.

    Example:
      >>> halves = jaxhpo.single_loop.Term(lambda point, i, j: point._replace(hparams=None), train=1, validation=0)
    """

    at: Callable[..., Point]
    train: int
    validation: int
    random: bool = False
    whole: Callable[[Point], Point] | None = None
    weights: Callable[[jax.Array], Point] | None = None

    def mean(self, point: Point, problem: Problem) -> Point:
        """The direction of all minibatches, in float32 or wider; raises for terms of several that do not say it."""
        if self.whole is not None:
            return upcast(self.whole(point))
        if self.train + self.validation != 1:
            raise JaxhpoError(
                f"{problem.method!r} takes means over all minibatches, but a draw of these sums is "
                f"{self.train + self.validation} minibatches: write `sums=implicit_sums`, or another estimator."
            )
        none = jnp.zeros((0,), jnp.int32)

        def at(i):
            one = jnp.reshape(i, (1,))
            return self.at(point, *((one, none) if self.train else (none, one)))

        return mean_over(self.num_batches(problem), at)

    def num_batches(self, problem: Problem) -> int:
        """The number of minibatches in the sum."""
        return problem.train.num_batches if self.train else problem.validation.num_batches

    def kinds(self, point: Point) -> Point:
        """Shapes and dtypes of the direction."""
        draw = jnp.zeros((self.train,), jnp.int32), jnp.zeros((self.validation,), jnp.int32)
        return jax.eval_shape(self.at, point, *draw, *((jax.random.key(0),) if self.random else ()))

    def part(self, k: int) -> Term:
        """The term whose direction is that of one of the three unknowns alone."""

        def only(direction):
            return Point(*(x if own == k else None for own, x in enumerate(direction)))

        whole = self.whole
        return self._replace(
            at=lambda point, *draw: only(self.at(point, *draw)),
            whole=None if whole is None else lambda point: only(whole(point)),
        )

    def weighted(self, direction: Point, count: jax.Array) -> Point:
        """The estimate of the direction, times its weights."""
        if self.weights is None:
            return direction
        weights = zip(self.weights(count), direction, strict=True)
        return Point(*(x if x is None else scaled(weight, x) for weight, x in weights))


def mean_over(num: int, at: Callable) -> PyTree:
    """The mean of `at(i)`, i < num, in float32 or wider."""

    def body(total, i):
        return add_scaled(total, 1 / num, upcast(at(i))), None

    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(at, jnp.zeros((), jnp.int32)))
    return jax.lax.scan(body, upcast(zero), jnp.arange(num, dtype=jnp.int32))[0]


def draws_of(terms: list[Term], i: jax.Array, j: jax.Array, key: Any, who: Any) -> list[tuple]:
    """The draw of each term out of the minibatches of an update, and for random ones a key."""
    found, first = [], (0, 0)
    for number, term in enumerate(terms):
        end = first[0] + term.train, first[1] + term.validation
        own = (jax.random.fold_in(require_key(key, who), 4 + number),) if term.random else ()
        found.append((i[first[0] : end[0]], j[first[1] : end[1]], *own))
        first = end
    return found


class Problem(NamedTuple):
    """A bilevel problem of two finite sums, of which a method asks gradients and products minibatch by minibatch.

    Attributes:
      method: for messages.
      solver: the inner problem.
      outer_loss: `(solution, hparams, outer_batch) -> (value, metrics)`.
      train: the sum of the train loss.
      validation: the sum of the outer loss.
      model_state: of the present update, constant in products.

    Example:
      >>> def flipped(problem):  # sums of a method of one's own: the outer loss's direct term alone
      ...     def direct(point, i, j):
      ...         return problem.outer(point, j[0])._replace(params=None, auxiliary=None)
      ...     return [jaxhpo.single_loop.Term(direct, 0, 1)]
    """

    method: Any
    solver: Solver
    outer_loss: Callable
    train: FiniteSum
    validation: FiniteSum
    model_state: PyTree = None

    def train_gradient(self, params, hparams, i):
        """`((value, model_state), gradient in the parameters)` of the train loss on minibatch i.

        Where the loss is not finite, no gradient is.
        """
        loss: Any = self.solver.loss
        return value_and_grad(loss, params, hparams, self.train.batch(i), self.model_state)

    def by_hparams(self, params, hparams, i) -> PyTree:
        """∂_h L on minibatch i."""
        return self._by_both(params, hparams, self.train.batch(i))[1]

    def _by_both(self, params, hparams, batch) -> tuple[PyTree, PyTree]:
        """(∇_θ L, ∇_h L) on a minibatch."""
        loss: Any = self.solver.loss
        of_both = lambda z, _, batch, model_state: loss(*z, batch, model_state)  # noqa: E731
        return value_and_grad(of_both, (params, hparams), None, batch, self.model_state)[1]

    def inner(self, point: Point, i) -> Point:
        r"""The train loss's part on minibatch i: :math:`(\nabla_\theta L, H v, (\partial_h \nabla_\theta L)^\top v)`.

        Second derivatives are symmetric: both products are the derivative of (∇_θ L, ∇_h L) along v in θ, one pass of
        forward over reverse mode. They need not be where the loss has a derivative rule of the user's: then it is
        reverse over reverse mode.
        """
        loss: Any = self.solver.loss
        params, v, hparams = point
        batch = self.train.batch(i)
        if untrusted_rule(loss, params, hparams, batch, self.model_state) is not None:
            gradient = lambda p, h: value_and_grad(loss, p, h, batch, self.model_state)[1]  # noqa: E731
            by_params, pullback = jax.vjp(gradient, params, hparams)
            return Point(by_params, *pullback(v))
        (by_params, _), products = jax.jvp(lambda p: self._by_both(p, hparams, batch), (params,), (v,))
        return Point(by_params, *products)

    def product(self, point: Point, v: PyTree, i) -> tuple[PyTree, PyTree]:
        """`(H v, (∂_h ∇_θ L)ᵀ v)` on minibatch i."""
        return tuple(self.inner(point._replace(auxiliary=v), i)[1:])

    def evaluate(self, point: Point, j) -> tuple[tuple, tuple[PyTree, PyTree]]:
        """`((value, metrics), (∂_θ F, ∂_h F))` of the outer loss on minibatch j."""
        info = Info(jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.asarray(True))
        batch = self.validation.batch(j)

        def outer(params, hparams):
            return self.outer_loss(Solution(params, None, self.model_state, info), hparams, batch)

        return jax.value_and_grad(outer, (0, 1), has_aux=True)(point.params, point.hparams)

    def outer(self, point: Point, j) -> Point:
        """The outer loss's part on minibatch j: (none, ∂_θ F, ∂_h F)."""
        _, (by_params, by_hparams) = self.evaluate(point, j)
        return Point(None, by_params, by_hparams)

    def step(self, state: InnerState, hparams, i, direction=None) -> InnerState:
        """One step of the solver, along its gradient on minibatch i or the given direction."""
        problem = self._replace(model_state=state.model_state)
        out, grad = problem.train_gradient(state.params, hparams, i)
        apply: Any = self.solver.apply
        after = apply(state, hparams, self.train.batch(i), out, grad if direction is None else direction)
        return cast_like(after, state)  # a model's state may be of another type than its statistics

    def step_auxiliary(self, state: InnerState, hparams, i, direction: PyTree, linear: Any) -> InnerState:
        """One step of v along the direction, if there is one, by `linear` or the solver's optimiser."""
        if direction is None:
            return state
        if linear is None:
            apply: Any = self.solver.apply
            return apply(state, hparams, self.train.batch(i), (jnp.zeros(()), None), direction)
        updates, opt_state = linear.update(direction, state.opt_state, state.params)
        return InnerState(optax.apply_updates(state.params, updates), opt_state)

    def train_on(self, state: InnerState, hparams, indices) -> InnerState:
        """Steps of the solver, one for each minibatch."""
        return jax.lax.scan(lambda state, i: (self.step(state, hparams, i), None), state, indices)[0]


def series(product: Callable[[PyTree, Any], PyTree], b: PyTree, indices, step_size) -> PyTree:
    r"""The truncated Neumann series :math:`\alpha \sum_{k=0}^{K} \prod_{l<k} (I - \alpha H_{i_l}) b`, K minibatches.

    `product(v, i)` is H_i v.
    """

    def add_term(carry, i):
        term, total = carry
        term = add_scaled(term, -step_size, product(term, i))
        return (term, add_scaled(total, 1.0, term)), None

    (_, total), _ = jax.lax.scan(add_term, (b, b), indices)
    return scaled(step_size, total)


def random_term(product: Callable[[PyTree, Any], PyTree], b: PyTree, indices, step_size, key) -> PyTree:
    r"""One term of the Neumann series, :math:`\alpha K \prod_{l<k} (I - \alpha H_{i_l}) b`, k uniform below K.

    K is one more than the number of minibatches; the mean over k is that of the series' first K terms.
    """
    num_terms = len(indices) + 1
    length = jax.random.randint(key, (), 0, num_terms)
    term = jax.lax.fori_loop(0, length, lambda k, v: add_scaled(v, -step_size, product(v, indices[k])), b)
    return scaled(num_terms * step_size, term)


def implicit_sums(problem: Problem) -> list[Term]:
    r"""The sums of SOBA: at a fixed point, v solves the linear system of the implicit hypergradient.

    .. math:: D_\theta = \nabla_\theta L_i, \quad D_v = H_i v + \partial_\theta F_j, \quad
              D_h = (\partial_h \nabla_\theta L_i)^\top v + \partial_h F_j,

    so that :math:`v^* = -H^{-1} \partial_\theta F`, and :math:`D_h` is there the hypergradient. Each is a sum over the
    minibatches of either loss: any estimator of a mean applies.

    Args:
      problem: gradients and products by minibatch.

    Returns:
      The terms of the train loss and of the outer loss.

    Example:
      >>> method = jaxhpo.single_loop.SingleLoop(None, None, sums=jaxhpo.single_loop.implicit_sums)

    References:
      Dagréou, Ablin, Vaiter, Moreau. A framework for bilevel optimization that enables stochastic and global variance
      reduction algorithms. 2022. arXiv:2201.13409
    """
    return [
        Term(lambda point, i, j: problem.inner(point, i[0]), 1, 0),
        Term(lambda point, i, j: problem.outer(point, j[0]), 0, 1),
    ]


def series_sums(num_terms: int, step_size: float, random_length: bool = False) -> Callable[[Problem], list[Term]]:
    r"""Sums without a v of their own: it is a Neumann series of fresh minibatches in each draw.

    .. math:: D_\theta = \nabla_\theta L_i, \quad D_h = \partial_h F_j - (\partial_h \nabla_\theta L_i)^\top v, \quad
              v = \alpha \sum_{k=0}^{K} \prod_{l<k} (I - \alpha H_{i_l})\, \partial_\theta F_j,

    those of MRBO and VRBO; or, with a random length, one term of it instead of a sum, those of SUSTAIN:

    .. math:: v = \alpha K \prod_{l<k} (I - \alpha H_{i_l})\, \partial_\theta F_j, \qquad k
              \text{ uniform in } 0, \dots, K - 1,

    whose mean is the series of K terms, for half of the products, and with more noise. A draw is K + 1 minibatches of
    the train loss (K with a random length) and one of the outer loss. A mean over all minibatches is the series of
    means; of a random length there is none, and estimators that need one refuse it.

    Args:
      num_terms: K.
      step_size: α.
      random_length: whether one term of the series, by chance, stands for its sum.

    Returns:
      A function for the argument `sums` of `SingleLoop`.

    Raises:
      JaxhpoError: K is not a positive integer, α not a number, or `random_length` no bool.

    Example:
      >>> from jaxhpo.single_loop import STORM, SingleLoop, series_sums
      >>> mrbo = SingleLoop(None, None, STORM(0.5), sums=series_sums(10, 0.1))
      >>> sustain = SingleLoop(None, None, STORM(0.5), sums=series_sums(10, 0.1, random_length=True))

    References:
      Yang, Ji, Liang. Provably Faster Algorithms for Bilevel Optimization. 2021. arXiv:2106.04692
      Ghadimi, Wang. Approximation Methods for Bilevel Programming. 2018. arXiv:1802.02246
    """
    check_count("series_sums(num_terms=...)", num_terms)
    check_traceable_number("series_sums(step_size=...)", step_size)
    check_random_length("series_sums", random_length)

    def sums(problem: Problem) -> list[Term]:
        def at(point, i, j, key=None):
            _, grad = problem.train_gradient(point.params, point.hparams, i[0])
            _, (by_params, direct) = problem.evaluate(point, j[0])
            v = series_of(problem, point, by_params, i[1:], step_size, key)
            return Point(grad, None, add_scaled(direct, -1.0, problem.product(point, v, i[0])[1]))

        def whole(point):
            train, validation = problem.train.num_batches, problem.validation.num_batches
            grad = mean_over(train, lambda i: problem.train_gradient(point.params, point.hparams, i)[1])
            by_params, direct = mean_over(validation, lambda j: problem.evaluate(point, j)[1])

            def product(v, i):
                return cast_like(mean_over(train, lambda i: problem.product(point, v, i)[0]), v)

            v = series(product, cast_like(by_params, point.params), jnp.arange(num_terms), step_size)
            mixed = mean_over(train, lambda i: problem.product(point, v, i)[1])
            return Point(grad, None, add_scaled(direct, -1.0, mixed))

        return [Term(at, num_terms, 1, True) if random_length else Term(at, 1 + num_terms, 1, whole=whole)]

    return sums


def series_of(problem: Problem, point: Point, b: PyTree, indices, step_size, key) -> PyTree:
    """The series of products on these minibatches, or with a key a term of it by chance."""

    def product(v, i):
        return problem.product(point, v, i)[0]

    if key is None:
        return series(product, b, indices, step_size)
    return random_term(product, b, indices, step_size, key)


def check_random_length(who: str, given: Any) -> None:
    """Raises for what is no bool."""
    if not isinstance(given, bool):
        raise JaxhpoError(f"`{who}(random_length=...)` got {describe(given)}: write True or False.")


def penalty_sums(multiplier: Any) -> Callable[[Problem], list[Term]]:
    r"""Sums of first derivatives alone: second parameters y, which the outer loss pulls, in the place of v.

    .. math:: D_\theta = \nabla_\theta L_i(\theta), \quad D_y = \lambda \nabla_\theta L_i(y) + \partial_\theta F_j(y),
              \quad D_h = \lambda (\partial_h L_i(y) - \partial_h L_i(\theta)) + \partial_h F_j(y),

    so that :math:`D_h` is at a fixed point the implicit hypergradient up to an error of order 1/λ. Each is a sum over
    the minibatches of either loss, and λ is outside of what an estimator remembers: any estimator of a mean applies,
    while λ grows. F3SA is `STORM` on these. The difference is of one minibatch at both, so that its noise falls with
    the distance of y and θ.

    y should begin where θ does: `SingleLoop(..., begin=lambda params: params)`. It takes λ ∇L along, so `linear` must
    have a rate below that of θ by λ, or one that falls.

    Args:
      multiplier: λ, a number, or a function of the count of updates, which should grow.

    Returns:
      A function for the argument `sums` of `SingleLoop`.

    Raises:
      JaxhpoError: λ is neither a positive number nor a function.

    Example:
      >>> import optax
      >>> from jaxhpo.single_loop import STORM, SingleLoop, penalty_sums
      >>> rows = jaxhpo.single_loop.FiniteSum.of(jnp.zeros(4), 2)
      >>> f3sa = SingleLoop(
      ...     rows, rows, STORM(lambda count: (count + 1.0) ** (-4 / 5)), linear=optax.sgd(0.01),
      ...     sums=penalty_sums(lambda count: 10 * (count + 1.0) ** (1 / 5)), begin=lambda params: params,
      ... )

    References:
      Kwon, Kwon, Wright, Nowak. A Fully First-Order Method for Stochastic Bilevel Optimization. 2023. arXiv:2301.10945
    """
    if not callable(multiplier):
        check_traceable_number("penalty_sums(multiplier=...)", multiplier)
        if isinstance(multiplier, int | float) and not multiplier > 0:
            raise JaxhpoError(f"`penalty_sums(multiplier=...)` got {multiplier}: write a number above 0.")

    def weights(count):
        value: Any = multiplier(count) if callable(multiplier) else multiplier
        check_traceable_number("multiplier(count)", value)
        return Point(1.0, value, value)

    def sums(problem: Problem) -> list[Term]:
        def inner(point, i, j):
            batch = problem.train.batch(i[0])
            grad, by_hparams = problem._by_both(point.params, point.hparams, batch)
            grad_y, by_hparams_y = problem._by_both(point.auxiliary, point.hparams, batch)
            return Point(grad, grad_y, add_scaled(by_hparams_y, -1.0, by_hparams))

        def outer(point, i, j):
            return problem.outer(point._replace(params=point.auxiliary), j[0])

        return [Term(inner, 1, 0, weights=weights), Term(outer, 0, 1)]

    return sums


def problem_of(method: Any, solver: Solver, outer_loss: Callable, linear: Any = None) -> Problem:
    """The problem; raises where the solver has no train loss, a sum is no `FiniteSum`, or `linear` not of optax."""
    train, validation = method.train, method.validation
    if solver.loss is None or solver.apply is None:
        raise JaxhpoError(
            f"{method!r} takes gradients and Hessian products of a train loss, which `{solver.name}` has none of: make "
            "the solver with `from_optax` or `momentum_sgd`."
        )
    for name, given in (("train", train), ("validation", validation)):
        if not isinstance(given, FiniteSum):
            raise JaxhpoError(
                f"`{type(method).__name__}({name}=...)` got {type(given).__name__}, but the method must know which "
                "minibatch it sees: write `FiniteSum.of(arrays, batch_size)` or `FiniteSum(num_batches, batch)`."
            )
    if linear is not None and not (callable(getattr(linear, "init", None)) and hasattr(linear, "update")):
        raise JaxhpoError(
            f"`{type(method).__name__}(linear=...)` got {describe(linear)}: write an optax transformation such as "
            "`optax.sgd(0.1)`."
        )
    return Problem(method, solver, outer_loss, train, validation)


class Draws(NamedTuple):
    """Minibatches drawn so far.

    Attributes:
      train: of the train loss, int32.
      validation: of the outer loss, int32.

    Example:
      >>> print(jaxhpo.single_loop.Draws(jnp.array(3), jnp.array(1)).train)
      3
    """

    train: jax.Array
    validation: jax.Array

    def take(self, problem: Problem, key: Any, train: int, validation: int) -> tuple[jax.Array, jax.Array]:
        """The numbers of the next minibatches of each sum."""
        keys = (None, None) if key is None else jax.random.split(key)
        return (
            problem.train.draw(keys[0], self.train, train, problem.method),
            problem.validation.draw(keys[1], self.validation, validation, problem.method),
        )
