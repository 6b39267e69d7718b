"""HOAG: implicit differentiation with tolerances that tighten from update to update, and its adaptive step size."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxhpo._adjoint.implicit import Implicit, check_symmetric, warn_of_untrusted_rule
from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.mesh import cast_varying, varying_axes
from jaxhpo._core.tree import add_scaled, norm, upcast, where, zeros_like
from jaxhpo._core.types import Hypergradient, InnerState, PyTree, StatefulMethod
from jaxhpo._core.validate import check_callable, check_positive, check_settings, check_traceable_number, describe
from jaxhpo._estimator.implicit_product import implicit_product
from jaxhpo._estimator.pair import check_pair_state, drawn, inner_start
from jaxhpo._inner.loop import run
from jaxhpo._inner.problem import make_problem
from jaxhpo._linear.iteration import conjugate_gradients
from jaxhpo._linear.report import default_tolerance
from jaxhpo._linear.system import solve_system

_SCHEDULES = ("quadratic", "cubic", "exponential", "exact")


class HOAGState(NamedTuple):
    """The state of `HOAG`.

    Attributes:
      inner: where the next inner run starts.
      linear_solution: where the next linear solve starts, like the parameters; None without warm start.
      count: updates made, int32.
      scale: the norm of the condition where the first inner run started.
    """

    inner: InnerState
    linear_solution: PyTree
    count: jax.Array
    scale: jax.Array


@dataclasses.dataclass(frozen=True)
class HOAG(StatefulMethod):
    r"""Implicit differentiation with an inexact inner run and linear solve, more exact in every update (HOAG).

    In the k-th update, k = 1, 2, ..., with g the condition (the gradient of the train loss) and H its Jacobian in θ:

    1. inner steps, from where the last update ended, until :math:`\|g\| \le \epsilon_k \|g_0\|`, where :math:`g_0` is g
       where the first update started. The tolerance is relative, so that the scale of the loss does not matter, but it
       cannot be reached if the first update starts from trained parameters;
    2. conjugate gradients on :math:`H q = \partial_\theta F`, from the last q, to the relative residual
       :math:`\epsilon_k`;
    3. :math:`dF/dh \approx \partial_h F - (\partial_h g)^\top q`.

    The outer loop converges to a stationary point if :math:`\sum_k \epsilon_k < \infty`, with fixed steps small enough,
    or `hoag_step`. `num_steps` is the largest number of steps of an inner run. The condition is that of the last batch:
    pass the whole data at every step (`lambda t: data`, or a loss that closes over it), for which the method is made,
    or at least for the system (`hypergradient(..., condition_batch=data)`).
    No tolerance is below :math:`\varepsilon^{3/4}` of the working precision (2e-12 in float64, 6e-6 in float32).

    **Cost and bias**: two gradients per inner step (one is the stopping test), one Hessian product (two to three
    gradients) per iteration of conjugate gradients; few of each, since both start near their ends. Memory of five
    copies of the parameters. The error is of order :math:`\epsilon_k`.

    Args:
      tolerance: "quadratic", :math:`\epsilon_k = \epsilon_0 / k^2`; "cubic", :math:`\epsilon_0 / k^3`; "exponential",
        :math:`\epsilon_0 d^k`; "exact", :math:`\varepsilon^{3/4}` throughout; or a function of k (a floating-point JAX
        scalar) whose values have a finite sum.
      initial_tolerance: ε₀ above.
      decay: d above, in (0, 1), for "exponential" only.
      maxiter: largest number of Hessian products per update.
      damping: δ ≥ 0, for conjugate gradients on H + δI where H is not positive definite.

    Raises:
      JaxhpoError: a setting out of its range; a solver whose condition is not a gradient.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: jnp.sum((p - h) ** 2), optax.sgd(0.1))
      >>> pair = jaxhpo.hypergradient(
      ...     jaxhpo.HOAG(), solver, lambda solution, h, batch: jnp.sum((solution.params - 3.0) ** 2), num_steps=100
      ... )
      >>> h = jnp.ones(2)
      >>> result = jaxhpo.tune(
      ...     None, h, jaxhpo.hoag_step(), num_steps=30, gradient=jaxhpo.from_pair(pair),
      ...     carry=pair.init(jnp.zeros(2), h), progress=False,
      ... )
      >>> print(result.hparams.round(2))
      [3. 3.]

    References:
      Pedregosa. Hyperparameter optimization with approximate gradient. 2016. arXiv:1602.02355
    """

    tolerance: str | Callable[[jax.Array], Any] = "quadratic"
    initial_tolerance: float = 0.1
    decay: float = 0.9
    maxiter: int = 100
    damping: float = 0.0

    def __post_init__(self):
        _check_schedule("HOAG", self.tolerance, self.initial_tolerance, self.decay)
        check_settings(self, maxiter="count", damping="nonnegative")

    def pair(self, solver, outer_loss, num_steps, warm_start, condition_batch=None) -> Hypergradient:
        """Return the pair of `init` and `update`."""
        check_symmetric(self, solver)

        def init(params, hparams, model_state=None):
            inner = solver.init(params, hparams, model_state)
            q = zeros_like(upcast(inner.params))
            count, scale = jnp.zeros((), jnp.int32), jnp.zeros_like(norm(q))
            return HOAGState(inner, q if warm_start else None, count, scale)

        def update(hparams, state, batches, outer_batch, key):
            check_pair_state(state, HOAGState, self)
            start = inner_start(solver, state.inner, hparams, warm_start)
            at = drawn(condition_batch, key)
            problem = make_problem(solver, start, hparams, batches, num_steps=num_steps, condition_batch=at, key=key)
            warn_of_untrusted_rule(self, problem)
            scale = _scale(problem, state)
            tolerance = _tolerance(self.tolerance, self.initial_tolerance, self.decay, state.count, scale.dtype)
            ended = run(problem._replace(tol=tolerance * scale))  # until ‖g‖ ≤ ε_k ‖g_0‖
            # until ‖∂_θ F − H q‖ ≤ ε_k ‖∂_θ F‖
            rule = Implicit(functools.partial(self._conjugate_gradients, tolerance=tolerance), on_failure="keep")
            grad, q, info = implicit_product(rule, self, problem, ended, outer_loss, outer_batch, state.linear_solution)
            inner, q = (ended[0], q) if warm_start else (state.inner, None)
            return grad, HOAGState(inner, q, state.count + 1, scale), info._replace(tolerance=tolerance)

        return Hypergradient(init, update)

    def _conjugate_gradients(self, matvec, b, x0=None, *, tolerance):
        """`CG` to a traced tolerance. It is not differentiable, and the hypergradient is not differentiated."""

        def solve(operator, b, x0):
            return conjugate_gradients(operator, b, x0, self.maxiter, tolerance)

        return solve_system(matvec, b, x0, solve, symmetric=True, damping=self.damping)


def _scale(problem, state):
    """Return ‖g_0‖, the norm of the condition where the first update started, computed in that update."""

    def first():
        residual = problem.residual(problem.state.params, problem.state.model_state, problem.residual_inputs)
        return norm(residual).astype(state.scale.dtype)

    axes = varying_axes(jax.eval_shape(first)) | varying_axes(state.scale)
    known = cast_varying(state.scale, axes)
    return jax.lax.cond(state.count == 0, lambda: cast_varying(first(), axes), lambda: known)


def _check_schedule(who, tolerance, initial_tolerance, decay):
    if callable(tolerance):
        check_callable(f"{who}(tolerance=...)", tolerance, "tolerance(k)", 1)
    elif tolerance not in _SCHEDULES:
        raise JaxhpoError(
            f"`{who}(tolerance=...)` got {describe(tolerance)}, which is not a schedule: write one of "
            f"{', '.join(map(repr, _SCHEDULES))}, or a function of the update's number k = 1, 2, ..."
        )
    check_positive(f"{who}(initial_tolerance=...)", initial_tolerance)
    check_positive(f"{who}(decay=...)", decay)
    if decay >= 1:
        raise JaxhpoError(f"`{who}(decay=...)` got {decay}, but tolerances must decrease: write a number below 1.")


def _tolerance(schedule, initial, decay, count, dtype) -> jax.Array:
    """Return ε_k for k = count + 1."""
    k = (count + 1).astype(dtype)
    if callable(schedule):
        eps: Any = schedule(k)
        check_traceable_number("tolerance(k)", eps)
    else:
        decrease = {"quadratic": k**-2, "cubic": k**-3, "exponential": decay**k, "exact": 0 * k}
        eps = initial * decrease[schedule]
    return jnp.maximum(jnp.asarray(eps, dtype), default_tolerance(dtype))


class HOAGStepState(NamedTuple):
    """The state of `hoag_step`.

    Attributes:
      count: updates made, int32.
      curvature: L, the inverse of the step size.
      unit: |V₁|, in which tolerances are measured.
      value: V at the last point that was not rejected.
      hparams: that point.
      gradient: the hypergradient there.
    """

    count: jax.Array
    curvature: jax.Array
    unit: jax.Array
    value: jax.Array
    hparams: PyTree
    gradient: PyTree


def hoag_step(
    tolerance: str | Callable[[jax.Array], Any] = "quadratic", initial_tolerance: float = 0.1, decay: float = 0.9
) -> optax.GradientTransformationExtraArgs:
    r"""The adaptive step size of HOAG as an optax transformation: gradient descent without a learning rate.

    With V_k and p_k the outer loss and its hypergradient, Δ the last step and ε_k the tolerances of `HOAG`,

    .. math:: h \leftarrow h - p_k / L, \qquad L_1 = \|p_1\| / \sqrt m,

    so that the first step has a root mean square of one (in the logarithm of a penalty, a factor of e); then

    - if :math:`V_k \le V_{k-1} + \tfrac14 \epsilon_k + \tfrac54 \epsilon_{k-1} \|\Delta\| - L \|\Delta\|^2`, first
      :math:`L \leftarrow 0.95 L`;
    - else, if V has risen by 20 % or is not finite, the step is rejected: :math:`L \leftarrow 2 L`, and the step is
      repeated from the previous point with this L;
    - else, if V has risen by more than the tolerances explain, first :math:`L \leftarrow L / 0.95`.

    The steps are in the unconstrained units of `tune`'s `transforms`. Where :math:`\|p_1\| \le 10^{-3} |V_1|`,
    :math:`L_1 = |V_1|`, which prevents a large first step from a flat point. It differs from the reference code in four
    ways: the step is applied once; tolerances are in units of :math:`|V_1|` (they are relative in `HOAG` too), so that
    the scale of the outer loss does not matter; the rise is 20 % of :math:`|V|`, so that the loss may be negative; and
    the last rule is new: without it V could rise by a little less than 20 % at every step.

    **Cost and bias**: no evaluation beyond the loop's own; a rejected step costs one update. Memory of two copies of
    the hyperparameters.

    Args:
      tolerance: as in `HOAG`, best with the same value.
      initial_tolerance: as in `HOAG`.
      decay: as in `HOAG`.

    Returns:
      An `optax.GradientTransformationExtraArgs`; `tune` passes what `update` needs, and your own loop writes
      `update(hypergrad, state, hparams, value=value)`.

    Raises:
      JaxhpoError: a setting out of its range; `update` without the hyperparameters or the value.

    Example:
      >>> result = jaxhpo.tune(
      ...     lambda h: 1e6 * jnp.sum((h - 3.0) ** 2), jnp.zeros(2), jaxhpo.hoag_step(), num_steps=40, progress=False
      ... )
      >>> print(result.hparams.round(2))
      [3. 3.]

    References:
      Pedregosa. Hyperparameter optimization with approximate gradient. 2016. arXiv:1602.02355
    """
    _check_schedule("hoag_step", tolerance, initial_tolerance, decay)

    def init(params):
        zero = jnp.zeros_like(norm(upcast(params)))
        return HOAGStepState(jnp.zeros((), jnp.int32), zero, zero, zero, zeros_like(params), zeros_like(params))

    def update(updates, state, params=None, *, value=None, **extra):
        if params is None or value is None:
            raise JaxhpoError(
                f"`hoag_step` got `{'params' if params is None else 'value'}=None`, but it compares the outer loss "
                "from step to step: write `update(hypergrad, state, hparams, value=value)`, or leave it to `tune`."
            )
        dtype = state.value.dtype
        value, first = jnp.asarray(value).astype(dtype), state.count == 0
        unit = jnp.where(first, jnp.where(value != 0, jnp.abs(value), 1), state.unit)

        def eps(count):
            return unit * _tolerance(tolerance, initial_tolerance, decay, count, dtype)

        # Along Δ = −p / L a linear V falls by ‖p‖² / L = L ‖Δ‖². Where V fell by that much, up to the slack for the
        # errors ε_k and ε_{k−1} of V and p, a longer step is safe.
        step = norm(upcast(add_scaled(params, -1.0, state.hparams)))
        slack = 0.25 * eps(state.count) + 1.25 * eps(jnp.maximum(state.count - 1, 0)) * step
        good = ~first & (value <= state.value + slack - state.curvature * step**2)
        bad = ~first & ~good & ~(value < state.value + 0.2 * jnp.abs(state.value))  # NaN too
        # Without a correction, V could rise by less than 20 % at every step: a quadratic V of curvature M changes by
        # the factor (M/L − 1)², which is in (1, 1.2) where L is up to 5 % below M/2. One correction by 5 % ends this.
        risen = jnp.where(value > state.value + slack, 1 / 0.95, 1.0)
        factor = jnp.where(good, 0.95, jnp.where(bad, 2.0, risen)).astype(dtype)
        p = norm(upcast(updates))
        curvature_1 = jnp.where(p > 1e-3 * unit, p / optax.tree.size(updates) ** 0.5, unit).astype(dtype)
        curvature = jnp.where(first, curvature_1, factor * state.curvature)
        # h ← h₀ − p₀ / L, from the last point that was not rejected: as an update to the present point, h₀ − h − p₀/L.
        kept = (state.value, state.hparams, state.gradient)
        value, point, gradient = where(bad, kept, (value, params, updates))
        updates = add_scaled(add_scaled(point, -1.0, params), -1 / curvature, gradient)
        return updates, HOAGStepState(state.count + 1, curvature, unit, value, point, gradient)

    return optax.GradientTransformationExtraArgs(init, update)
