"""`DrMAD`: reverse mode along the straight line from the first to the last inner state."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo._adjoint.model_state import warn_of_stopped
from jaxhpo._adjoint.pullback import Pullback, in_condition, pull_step, varying_zeros, warn_of_schedules
from jaxhpo._core.record import report_fault
from jaxhpo._core.stop_gradient import warn_perturbed
from jaxhpo._core.tree import all_finite, is_inexact, mixed_types, names, norm, partition, upcast
from jaxhpo._core.types import InnerState, PyTree
from jaxhpo._core.validate import check_settings
from jaxhpo._inner.loop import run, scan_slices, step_slice
from jaxhpo._inner.problem import Problem


@dataclasses.dataclass(frozen=True)
class DrMAD:
    r"""Reverse mode that keeps only the first and the last inner state, and goes back along the line between them.

    Let :math:`\Phi_t` be the inner step, v the cotangent of the final state, and N = `num_points` the number of steps t
    visited of T (all when None). From the last of these steps to the first, beginning with :math:`a = v`:

    .. math:: g \mathrel{+}= \frac TN (\partial_h \Phi_t)^\top a, \qquad a \leftarrow (\partial_\theta \Phi_t)^\top a,
        \qquad \text{both at } \tilde\theta_t = (1 - \beta_t)\, \theta_0 + \beta_t\, \theta_T

    The optimiser's state and the model's state are interpolated too. :math:`\beta_t = t/T` is the position of the state
    before step t if all steps were equal (the paper takes N numbers from 0.001 to 0.999). With `momentum_sgd`, whose
    rates α are known, :math:`\beta_t = \sum_{s<t} \alpha_s / \sum_s \alpha_s`, and the velocity is that of the line,
    :math:`(\theta_T - \theta_0) / \sum_s \alpha_s`: the paper's at a constant rate, but finite where a schedule ends in
    zero. `DrMAD()` sees what `Unroll()` sees; with fewer points, only the schedule entries and batches of the steps
    visited (it warns). The initial state gets the last a. Reverse mode and first order only.

    On the line, the loss may have another curvature than where the training went; then a grows with every step. Once
    the weights' part of a has grown `max_growth`-fold, the hypergradient is noise and is set to NaN; `tune` and
    `check_hypergradient` report it.

    **Cost and bias**: 1 + 1.95 N/T trainings (operations counted on an MLP 784-256-256-10); memory of four inner
    states, for any T. Exact for a straight trajectory with equal steps. Cosine with the exact hypergradient of one
    penalty per weight, for a network 64-32-10 on 200 digits, momentum 0.9, rate 0.1: 1.00, 0.99 and 0.49 after T = 20,
    100 and 500 steps, where a grew 1-, 1.2- and 20-fold; at rate 0.5 and T = 500 it grew 4e10-fold. With 50 points of
    500, a did not grow, and the cosine was 0.87 at rate 0.1 and 0.79 at rate 0.5, at 1.3 and 1.7 times the norm: the
    factor T/N is right for directions in which training has not converged, and up to T/N too large for others.

    Args:
      num_points: N above, at most T; None visits all steps. About 50 is a good choice for long runs.
      max_growth: the growth of the weights' cotangent from which on the hypergradient is NaN. At a growth of 20 the
        cosine was 0.5, at 100 below 0.2.

    Raises:
      JaxhpoError: if a setting is out of its range, `tol` is given, or a second derivative is asked for.

    Example:
      >>> solver = jaxhpo.momentum_sgd(lambda p, h, batch: jnp.sum(p * h), learning_rate=0.1, momentum=0.0)
      >>> def outer_loss(h):
      ...     start = solver.init(jnp.zeros(2), h)
      ...     sol = jaxhpo.solve(solver, start, h, num_steps=20, adjoint=jaxhpo.DrMAD())
      ...     return jnp.sum((sol.params - 3.0) ** 2)
      >>> print(jax.grad(outer_loss)(jnp.ones(2)).round(2))
      [20. 20.]

    References:
      Fu, Luo, Feng, Low, Chua. DrMAD: Distilling Reverse-Mode Automatic Differentiation for Optimizing Hyperparameters
      of Deep Neural Networks. 2016. arXiv:1601.00917
    """

    num_points: int | None = None
    max_growth: float = 100.0

    def __post_init__(self):
        check_settings(self, num_points="count or None", max_growth="positive")

    def run(self, problem: Problem) -> tuple[InnerState, jax.Array]:
        """Runs the inner loop; the backward pass follows the line between its first and last state."""
        length = problem.num_steps
        points = min(length, self.num_points or length)
        # The middles of `points` equal parts of the run; with one part per step, the first state of each step.
        steps = (2 * np.arange(points) + 1) * length // (2 * points)
        line, consts = _line(problem)

        def forward(at):
            final, _ = run(problem._replace(state=at.state, inputs=at.inputs, xs=at.xs))
            return final, final

        def pull(at, perturbed, final, cotangent):
            pulled, growth = _pull_back(problem, line(at, final), steps, at, perturbed, cotangent)
            exploded = ~(growth <= self.max_growth)
            report_fault(exploded & all_finite((at, final, cotangent)), f"`{self!r}`: {_EXPLODED}", growth=growth)
            return [jnp.where(exploded, jnp.nan, c) for c in pulled]

        own = Pullback(self, forward, pull)
        if points < length:
            check = functools.partial(self._check, problem, points, in_condition(problem))
            own = dataclasses.replace(own, check=check)
        final, taken = own.run(problem, consts)
        return warn_of_stopped(problem, final), taken

    def _check(self, problem, points, seen, at, perturbed):
        """Warns of perturbed leaves that act in steps that are not visited; `seen` marks those in the condition."""
        visits = f"and {self!r} visits only {points} inner steps: "
        zero = f"the hypergradient of the others is exactly zero. `DrMAD()` visits all {problem.num_steps} steps."
        data = f"is being differentiated, {visits}{zero}"
        warn_perturbed(names(at.xs, "batches"), perturbed.xs, data, partial=True)
        schedule = f"acts through the optimiser alone, {visits}if its entries are those of a schedule, {zero}"
        warn_of_schedules(problem, at, perturbed, seen, schedule)


_EXPLODED = (
    "on the way back along the straight line from the first to the last weights, the cotangent of the weights grew "
    "{growth:.3g}-fold, since the loss has another curvature there than along the training: the hypergradient would be "
    "noise, and was set to NaN. Visit fewer points (`DrMAD(num_points=50)`), take fewer steps, or use `Unroll()`."
)


def _pull_back(problem, state_at, steps, at, perturbed, cotangent) -> tuple[list, jax.Array]:
    """The cotangents of the perturbed leaves, and the largest growth of the parameters' cotangent."""
    length, points = problem.num_steps, len(steps)
    a_T, combine_a = partition(cotangent, jax.tree.map(is_inexact, at.state))
    sums = varying_zeros(upcast(partition(at.inputs, perturbed.inputs)[0]))

    def body(carry, t):
        a, sums, largest = carry
        state, x = state_at(t), step_slice(at.xs, problem.counts, t)
        # At θ̃_t: a ← (∂_θ Φ_t)ᵀ a and g += T/N (∂_h Φ_t)ᵀ a; a batch gets its own T/N (∂_x Φ_t)ᵀ a.
        a, d_shared, d_data = pull_step(problem, at, perturbed, state, x, a)
        sums = [s + length / points * upcast(d) for s, d in zip(sums, d_shared, strict=True)]
        return (a, sums, jnp.maximum(largest, norm(upcast(combine_a(a).params)))), [length / points * d for d in d_data]

    start = (a_T, sums, norm(upcast(cotangent.params)))
    in_turn = points == length  # then `steps` are 0, 1, …, T − 1
    (a, sums, largest), d_data = scan_slices(body, start, jnp.asarray(steps), in_turn, points, reverse=True)
    if points < length:
        whole, _ = partition(at.xs, perturbed.xs)
        d_data = [jnp.zeros_like(x).at[steps].set(d) for x, d in zip(whole, d_data, strict=True)]
    d_state, _ = partition(combine_a(a), perturbed.state)
    d_consts = [jnp.zeros_like(c) for c in partition(at.consts, perturbed.consts)[0]]
    scale = norm(upcast(a_T))
    return [*d_state, *sums, *d_data, *d_consts], largest / jnp.where(scale > 0, scale, 1)


def _line(problem: Problem) -> tuple[Callable, list]:
    """`line(inputs, final)(t)`, the state θ̃_t before step t on the line, and the values that `line` closes over."""
    length = problem.num_steps

    def between(first, final, t):
        return jax.tree.map(lambda a, b: _mix(a, b, t / length), first, final)

    own_rates = problem.solver.rates
    if own_rates is None:
        return lambda at, final: lambda t: between(at.state, final, t), []

    def rates(state, hparams, batch, t):
        return own_rates(state.params, hparams, state.opt_state.count + t)[0]

    pure, consts = problem.closure_convert(rates, jnp.zeros((), jnp.int32))

    @mixed_types()  # rates may be wider than the parameters
    def line(at, final):
        x = jax.tree.map(lambda x: x[0], at.xs)
        total, share = _travel(lambda t: pure(at.consts, at.state, at.inputs[0], x, t), length)
        first, last = at.state.params, final.params
        # θ_T − θ_0 = Σ_t α_t v, with v the velocity on the whole line.
        velocity = jax.tree.map(lambda a, b, s: ((b - a) / _or_one(s)).astype(a.dtype), first, last, total)

        def state_at(t):
            state = between(at.state, final, t)
            # θ̃_t = (1 − β_t) θ_0 + β_t θ_T
            params = jax.tree.map(lambda a, b, s: _mix(a, b, s[t]), first, last, share)
            return state._replace(params=params, opt_state=state.opt_state._replace(velocity=velocity))

        return state_at

    return line, consts


def _travel(rates: Callable, length: int) -> tuple[PyTree, PyTree]:
    """Σ_s α_s, and β_t = Σ_{s<t} α_s / Σ_s α_s for each step and leaf, with α the mean over the leaf."""

    def body(total, t):
        return jax.tree.map(jnp.add, total, rates(t)), jax.tree.map(jnp.mean, total)

    start = varying_zeros(rates(jnp.zeros((), jnp.int32)))
    total, before = scan_slices(body, start, jnp.arange(length, dtype=jnp.int32), True, length)
    return total, jax.tree.map(lambda b, s: b / _or_one(jnp.mean(s)), before, total)


def _or_one(x):
    """Replaces 0 by 1 in a divisor: where all rates are zero, the dividend is zero too."""
    return jnp.where(x == 0, 1, x)


@mixed_types()  # for floats of two widths, and counters
def _mix(a, b, share):
    """(1 − s) a + s b for floats, the same rounded for signed integers (counters), else the nearer of a and b."""
    if is_inexact(a):
        return ((1 - share) * a + share * b).astype(a.dtype)
    if jnp.issubdtype(a.dtype, jnp.signedinteger):
        return a + jnp.round(share * (b - a)).astype(a.dtype)
    return jnp.where(2 * share < 1, a, b)
