"""`error_bar`: a hypergradient together with an estimate of its own error.

A rule with an error bar of its own is run at several *levels*: level 0 is the rule itself, the others take something
away or go on. `vmap` over the levels shares what does not depend on them, the training above all.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo._adjoint.implicit import Implicit
from jaxhpo._adjoint.implicit_function import attach
from jaxhpo._adjoint.last_step import SAMA, FiniteDifference
from jaxhpo._adjoint.pushforward import ForwardGradient, Smoothing
from jaxhpo._adjoint.unroll import Unroll
from jaxhpo._core.mesh import ravel
from jaxhpo._core.outer import in_one_form
from jaxhpo._core.record import SolveLog, recording
from jaxhpo._core.trace import trust
from jaxhpo._core.tree import cast_like, is_inexact, norm, upcast, where
from jaxhpo._core.types import InnerState, PyTree
from jaxhpo._core.validate import check_arrays, check_count, check_key, check_params
from jaxhpo._diagnostics.tangents import Tangents, if_defined, length_factor, orthogonal
from jaxhpo._inner.loop import scan_steps
from jaxhpo._inner.problem import Adjoint, Problem
from jaxhpo._linear.bicgstab import BiCGStab
from jaxhpo._linear.cg import CG

STEPS = "the derivative of the inner steps that were run"
SMOOTHED = "the derivative of the smoothed training"
OPTIMUM = "the derivative at the converged inner optimum"
RIGHT = 1e-4  # of a hypergradient: an error up to which it is right, and need not be told within a factor of two
FEWEST = 4  # last steps, one in each part, from which a tail can be told
DECAYS = 0.4  # ratio of contributions of a part and the one after it, at most
MOST_LEFT = 16  # parts that are left out, K ≥ T / 5: a mode that is slower than the parts may not show in them
BENDS = 4  # by how much two such ratios may differ
INDEPENDENT = 8  # directions of a random error from which its length is known
STEADY = 0.3  # of an error bar: a change by the last doubling of the work up to which it is known


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ErrorBar:
    """A hypergradient with its error bar; prints as one sentence.

    Attributes:
      value: the outer loss.
      hypergradient: ĝ, like the hyperparameters.
      error: the estimate of ‖ĝ − g‖, shape ().
      known: whether that is meant to be right within a factor of two; where it is False, `error` is the best guess, and
        may be NaN.
      norm: ‖ĝ‖.
      reference: what g is, in words.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: (p - h) ** 2, optax.sgd(0.1))
      >>> def outer_loss(h):
      ...     adjoint = jaxhpo.Unroll(truncate=20)
      ...     return jaxhpo.solve(solver, solver.init(0.0, h), h, num_steps=50, adjoint=adjoint).params
      >>> bar = jax.jit(jaxhpo.error_bar(outer_loss))(1.0)
      >>> print(bar.hypergradient.round(4), bar.error.round(4), bar.known)  # 1 − 0.8²⁰, and 0.8²⁰ of all other steps
      0.9885 0.0115 True
    """

    value: jax.Array
    hypergradient: PyTree
    error: jax.Array
    known: jax.Array
    norm: jax.Array
    reference: str = dataclasses.field(metadata={"static": True})

    def __str__(self) -> str:
        if jnp.ndim(self.norm):  # of a `vmap`
            return "\n".join(str(jax.tree.map(lambda x, i=i: x[i], self)) for i in range(len(self.norm)))
        if self.known:
            part = f" ({float(self.error) / float(self.norm):.1%})" if self.norm else ""
            return f"hypergradient of length {self.norm:.3g} ± {self.error:.2g}{part}, against {self.reference}"
        more = ""
        if not jnp.isfinite(self.value):
            more = f": the outer loss is {self.value:g}"
        elif self.reference == OPTIMUM and jnp.isnan(self.error):
            more = ": Newton's steps do not come nearer to it, as where the train loss is not convex"
        elif self.reference == OPTIMUM:
            more = "; more inner steps, or `products`, may tell"
        return f"hypergradient of length {self.norm:.3g}; cannot tell how far it is from {self.reference}{more}"


def error_bar(outer_loss: Callable, *, directions: int = 6, products: int | None = None) -> Callable[..., ErrorBar]:
    r"""Transforms an outer loss into a function that returns a hypergradient with its error bar.

    How :math:`\|\hat g - g\|` is estimated depends on the rule of each `solve` in the outer loss, as does what g is:

    - `Implicit`, `SAMA`, `FiniteDifference`: g is the derivative at the converged inner optimum. Two Newton steps, by
      conjugate gradients of `products` / 2 iterations each, bring the parameters nearer to it, and `products`
      iterations solve the linear system there. Known where half of all that gives the same up to 30 % of the error
      (or all of it the rule's own result up to 1e-4), and the Hessian that is met is positive definite.
    - `Unroll(truncate=K)`: g is the derivative of all T steps. The contributions of the last K steps, in four parts,
      are extrapolated as a geometric series. Known where each part has at most 40 % of the one after it,
      evenly, and K is a fifth of the steps or more: a slow mode may not show in fewer.
    - `ForwardGradient`, `Smoothing`, 8 samples or more of as many hyperparameters: the jackknife over up to 16 groups
      of their directions or pairs. Known where the error has 8 directions or more: a draw of fewer may be much smaller
      than their root mean square.
    - every other rule, and several rules at once: g is the derivative of the steps that were run, by exact derivatives
      along random orthogonal directions u, since :math:`\langle \hat g - g, u \rangle^2` has the mean
      :math:`\|\hat g - g\|^2`; exact where there are no more hyperparameters than `directions`. Not known where there
      is no forward mode (callbacks, `implicit` around another solver) or something rounds.

    **Cost and bias**: beside the hypergradient, nothing but a few copies of the hyperparameters for the truncated sum
    and the jackknife; at most 2.5 `products` Hessian products for `Implicit` and the like; 1 + 1.3 to 2 `directions`
    trainings for all others.

    Args:
      outer_loss: as for `tune`, `hparams -> scalar` or `(hparams, carry, key) -> (scalar, carry, info)`.
      directions: random directions, where they are taken.
      products: of the longer of two linear solves, where the hypergradient is continued. None takes a sixth of the
        inner steps, so that the error bar costs about a quarter of `Unroll()`'s hypergradient, and 20 at least: with
        fewer, one of a system that is not well-conditioned is off by more than a factor of two in one case of five.
        Where the error is not known, more products may tell it, or more inner steps.

    Returns:
      `(hparams, carry=None, key=None) -> ErrorBar`, a pure function, for `jit` and for callbacks of `tune`.

    Raises:
      JaxhpoError: an invalid input.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: jnp.sum((p - h) ** 2), optax.sgd(0.1))
      >>> def outer_loss(h):
      ...     adjoint = jaxhpo.Unroll(truncate=20)
      ...     sol = jaxhpo.solve(solver, solver.init(jnp.zeros(2), h), h, num_steps=50, adjoint=adjoint)
      ...     return jnp.sum((sol.params - 3.0) ** 2)
      >>> bar = jax.jit(jaxhpo.error_bar(outer_loss))(jnp.ones(2))
      >>> print(bar)  # exactly: 5.66 · 0.8²⁰
      hypergradient of length 5.59 ± 0.065 (1.2%), against the derivative of the inner steps that were run

    References:
      Strakoš, Tichý. On Error Estimation in the Conjugate Gradient Method and why it Works in Finite Precision. 2002.
      Efron, Stein. The Jackknife Estimate of Variance. 1981.
    """
    loss, _ = in_one_form(outer_loss, None)
    check_count("directions", directions)
    if products is not None:
        check_count("products", products)

    def measured(hparams: PyTree, carry: PyTree = None, key: jax.Array | None = None) -> ErrorBar:
        hparams = check_params(hparams, "hparams")
        carry = jax.tree.map(jnp.asarray, check_arrays(carry, "carry"))
        key = jax.random.key(0) if key is None else check_key(key)
        flat, unravel = ravel(hparams)

        def value(flat):
            return loss(unravel(flat), carry, key)[0]

        log = SolveLog(schedules=False)
        with warnings.catch_warnings(action="ignore"), recording(solves=log):
            jax.eval_shape(value, flat)
        own = _levels(log, flat.size, products or max(20, log.longest // 6))
        if own is None:  # exact tangents
            result, grad = jax.value_and_grad(value)(flat)
            error, known = _by_tangents(value, flat, grad, directions, key, roots=log.roots)
        else:

            def at(level):
                with recording(rule=lambda rule: own.at(rule, level)):
                    return jax.value_and_grad(value)(flat)

            with warnings.catch_warnings(action="ignore"):
                results, rows = jax.vmap(at)(jnp.arange(own.number))
            result, grad = results[0], rows[0]
            error, known = own.judge(rows)
        reference = STEPS if own is None else own.reference
        return ErrorBar(result, unravel(grad), error, known & jnp.isfinite(result), jnp.linalg.norm(grad), reference)

    return measured


def _by_tangents(value, flat, grad, number, key, roots) -> tuple[jax.Array, jax.Array]:
    if roots:  # a forward tangent under `implicit` is its rule
        return jnp.full((), jnp.nan, flat.dtype), jnp.asarray(False)
    number = min(number, flat.size)
    rows = orthogonal(jax.random.fold_in(key, 1), number, flat.size).astype(flat.dtype)

    def derivatives():
        tangents = Tangents(value, flat)
        return None if tangents.rounded else tangents.derivatives(rows)

    found = if_defined(derivatives)
    if found is None:
        return jnp.full((), jnp.nan, flat.dtype), jnp.asarray(False)
    error = length_factor(number, flat.size) * jnp.sqrt(jnp.mean((rows @ grad - found) ** 2))
    return error, jnp.isfinite(error)


# --- levels -----------------------------------------------------------------------------------------------------------


def _levels(log: SolveLog, size: int, products: int) -> Any:
    """The levels that estimate the error of some solves' rules; None where they are not of one kind that has some."""
    rules = list(log.adjoints)
    if not rules or log.roots:
        return None
    if all(isinstance(rule, Implicit | SAMA | FiniteDifference) for rule in rules):
        return _Continued(products, log.symmetric)
    if all(isinstance(rule, Unroll) and rule.truncate and rule.hvp_fraction in (None, 1) for rule in rules):
        return _Tail()
    sampled = size >= INDEPENDENT and all(isinstance(rule, ForwardGradient | Smoothing) for rule in rules)
    if sampled and min(map(_samples, rules)) >= INDEPENDENT:
        return _Jackknife(min(map(_samples, rules)), any(isinstance(rule, Smoothing) for rule in rules))
    return None


class _Tail:
    """The contributions of the last K steps in four parts, and the tail that they leave.

    Level l differentiates all but the first l of the parts. With cⱼ the contribution of part j, counted from the end,
    and r² = ‖c₄‖ / ‖c₂‖, the tail is ‖c₄‖ (r + r² + … + rⁿ), where n parts are left out.
    """

    number: ClassVar[int] = 4
    reference: ClassVar[str] = STEPS

    def __init__(self):
        self.left: list[tuple[int, float]] = []  # K, and the parts that are left out, of every solve

    def at(self, rule: Any, level: jax.Array) -> Adjoint:
        """The rule in the place of `rule`."""
        return _Gated(rule, level, self.left)

    def judge(self, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Error, and whether it is known, of the (levels, m) hypergradients."""
        c4, c3, c2 = jnp.linalg.norm(rows[:-1] - rows[1:], axis=1)
        any_left = (c4 > 0) & (c3 > 0) & (c2 > 0)
        c2, c3 = (jnp.where(any_left, c, 1.0) for c in (c2, c3))
        ratio, bend = jnp.sqrt(c4 / c2), c4 * c2 / c3**2
        parts = max(left for _, left in self.left)
        if not parts:
            return jnp.zeros_like(c4), jnp.asarray(True)
        safe = jnp.minimum(ratio, 0.99)
        error = c4 * safe * (1 - safe**parts) / (1 - safe)
        enough = min(number for number, left in self.left if left) >= FEWEST
        even = (ratio <= DECAYS) & (bend <= BENDS) & (BENDS * bend >= 1) & (parts <= MOST_LEFT)
        return error, enough & any_left & (even | (parts * c4 <= RIGHT * jnp.linalg.norm(rows[0])))


@dataclasses.dataclass(frozen=True, eq=False)
class _Gated:
    """`Unroll(truncate=K)` whose parts of the steps contribute as a level says."""

    rule: Unroll
    level: jax.Array
    left: list[tuple[int, float]]

    def run(self, problem: Problem) -> tuple[InnerState, jax.Array]:
        """Takes the steps."""
        total, number = problem.num_steps, min(problem.num_steps, self.rule.truncate or 0)
        part = max(1, number // 4)
        self.left.append((number, (total - number) / part))
        early, whole = total - number, dataclasses.replace(self.rule, truncate=None)
        # The start is that of the first part which contributes; the plain steps before it are constant.
        given = jax.lax.stop_gradient((problem.state, problem.inputs, problem.xs))
        state = problem.state
        if early:
            head = jax.tree.map(lambda x: x[:early], given[2])
            state = scan_steps(problem._replace(state=given[0], inputs=given[1], xs=head, num_steps=early))
            state = jax.lax.stop_gradient(state)
        ends = [early, *(early + i * part for i in range(1, 4) if i * part < number), total]
        for i, (begin, end) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
            state, _ = whole.run(_stretch(problem, state, slice(begin, end), (i >= self.level).astype(float)))
        return state, jnp.asarray(total, jnp.int32)


def _stretch(problem, state, part, weight) -> Problem:
    """Some of the steps of a problem, with the cotangents of their inputs and data weighted."""
    xs = jax.tree.map(lambda x: _gate(x[part], weight), problem.xs)
    again = problem.with_gradient

    def with_gradient(*args):
        return _stretch(again(*args), state, part, weight)

    inputs, number = jax.tree.map(lambda x: _gate(x, weight), problem.inputs), part.stop - part.start
    return problem._replace(state=state, inputs=inputs, xs=xs, num_steps=number, with_gradient=with_gradient)


class _Jackknife:
    """The spread of a mean over random directions, by leaving out a group at a time."""

    def __init__(self, samples: int, smoothed: bool):
        self.groups = min(16, samples)
        self.number, self.reference = self.groups + 1, SMOOTHED if smoothed else STEPS

    def at(self, rule: Any, level: jax.Array) -> Adjoint:
        """The rule in the place of `rule`."""
        group = 1 + np.arange(_samples(rule)) * self.groups // _samples(rule)
        stays = (group != level).astype(float)
        return _Weighted(rule, stays / jnp.sum(stays))

    def judge(self, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Error, and whether it is known, of the (levels, m) hypergradients."""
        off, most = rows[1:] - jnp.mean(rows[1:], axis=0, keepdims=True), self.groups - 1
        products = off @ off.T
        error = jnp.sqrt(jnp.trace(products) * most / self.groups)
        # One draw of an error that is normal in d directions is within a factor of two of its root mean square in 95 %
        # of cases where d ≥ 8. Of n + 1 groups, (tr P)² / tr P² is d n / (d + n).
        spread = jnp.trace(products) ** 2 / jnp.sum(products**2)
        return error, spread >= INDEPENDENT * most / (INDEPENDENT + most)


@dataclasses.dataclass(frozen=True, eq=False)
class _Weighted:
    """`ForwardGradient` or `Smoothing` with weighted samples."""

    rule: Any
    weights: jax.Array

    def run(self, problem: Problem) -> tuple[InnerState, jax.Array]:
        """Takes the steps."""
        return self.rule.run_weighted(problem, self.weights)


def _samples(rule) -> int:
    return rule.num_pairs if isinstance(rule, Smoothing) else rule.num_directions


class _Continued:
    """An implicit derivative, from parameters nearer to the optimum and by a better linear solve.

    Level 0 is the rule itself; level 2 takes all of the work, and level 1 half of it.
    """

    number: ClassVar[int] = 3
    reference: ClassVar[str] = OPTIMUM

    def __init__(self, products: int, symmetric: bool):
        self.products, self.symmetric = products, symmetric

    def at(self, rule: Any, level: jax.Array) -> Adjoint:
        """The rule in the place of `rule`."""
        return _Further(rule, level, self.products, self.symmetric)

    def judge(self, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Error, and whether it is known, of the (levels, m) hypergradients."""
        error, change = jnp.linalg.norm(rows[0] - rows[2]), jnp.linalg.norm(rows[1] - rows[2])
        same = error <= RIGHT * jnp.linalg.norm(rows[2])
        known = same | (change <= STEADY * error)
        return jnp.where(known, error, jnp.maximum(error, change)), known


@dataclasses.dataclass(frozen=True, eq=False)
class _Further:
    """A rule at level 0; above, implicit derivatives after Newton steps, NaN where these do not come nearer.

    All of them are computed once, and each is pulled back by the cotangents of its own level alone.
    """

    rule: Any
    level: jax.Array
    products: int
    symmetric: bool

    def run(self, problem: Problem) -> tuple[InnerState, jax.Array]:
        """Takes the steps."""
        here = [(self.level == i).astype(float) for i in range(3)]
        names = "state", "inputs", "xs", "residual_inputs"
        gated = {name: jax.tree.map(lambda x: _gate(x, here[0]), getattr(problem, name)) for name in names}
        state, steps = self.rule.run(problem._replace(**gated))
        first, second = self._further(problem, jax.lax.stop_gradient(state), here[1:])
        params = jax.tree.map(lambda *x: _choose(here, list(x)), state.params, first, second)
        return state._replace(params=params), steps

    def _further(self, problem, state, weights) -> Iterator[PyTree]:
        """The parameters after one Newton step, and after two, with their implicit derivatives."""
        exact = dataclasses.replace(self.rule, curvature="hessian") if isinstance(self.rule, Implicit) else Implicit()
        root, leaves = exact.root(problem, state, self.rule)
        constants, point = jax.lax.stop_gradient(leaves), upcast(state.params)
        start = norm(root.condition(point, constants))
        solver = self._solver(self.products // 2)
        for weight, twice in zip(weights, (solver, self._solver(self.products)), strict=True):
            value, times = jax.linearize(lambda p: root.condition(p, constants), point)
            step, _ = solver(times, value)
            there = jax.tree.map(jnp.subtract, point, step)
            falls = norm(root.condition(there, constants)) < norm(value)
            point = where(falls, there, point)
            tiny = norm(step) <= 10 * jnp.finfo(start.dtype).eps ** 0.5 * norm(point)
            near = (norm(root.condition(point, constants)) <= 0.5 * start) | tiny
            known = cast_like(jax.tree.map(lambda p, near=near: jnp.where(near, p, jnp.nan), point), state.params)
            solved = dataclasses.replace(root, linear_solver=twice, on_failure="nan")
            yield attach(solved, known, [_gate(leaf, weight) for leaf in leaves], None)

    def _solver(self, number: int) -> Callable:
        """Conjugate gradients, or their like for a matrix that is not symmetric, with a number of products."""
        return CG(maxiter=number) if self.symmetric else BiCGStab(maxiter=max(1, number // 2))


# --- gates: the identity on values, with weights on cotangents --------------------------------------------------------


def _gate(x: Any, weight: jax.Array) -> Any:
    """x, whose cotangent is multiplied by a weight: so values do not depend on the level, and are computed once."""
    return _weighted(x, weight) if is_inexact(x) else x


@trust
@jax.custom_vjp
def _weighted(x, weight):
    return x


def _weighted_bwd(weight, ct):
    return jnp.where(weight != 0, ct * weight.astype(ct.dtype), 0), jnp.zeros_like(weight)  # not 0 · NaN


_weighted.defvjp(lambda x, weight: (x, weight), _weighted_bwd)


@trust
@jax.custom_vjp
def _choose(here, values):
    """The value whose flag in `here` is 1. The cotangent of each is that of its own level, at all levels."""
    out = values[0]
    for flag, value in zip(here[1:], values[1:], strict=True):
        out = jnp.where(flag > 0, value, out)
    return out


def _choose_bwd(here, ct):
    return jax.tree.map(jnp.zeros_like, here), [_at_its_level(ct, flag) for flag in here]


_choose.defvjp(lambda here, values: (_choose(here, values), here), _choose_bwd)


@jax.custom_batching.custom_vmap
def _at_its_level(ct, flag):
    return jnp.where(flag > 0, ct, 0)


@_at_its_level.def_vmap
def _over_levels(size, batched, ct, flag):
    # Over the levels there is one cotangent for all, so that what pulls it back is computed once.
    if not batched[1]:
        return _at_its_level(ct, flag), batched[0]
    ct = ct if batched[0] else ct[None]
    flag = flag.reshape(-1, *[1] * (ct.ndim - 1))
    return jnp.sum(jnp.where(flag > 0, ct, 0), axis=0), False
