"""Iterations shared by solvers: conjugate gradients, and iterative refinement of a solver's corrections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxhpo._core.mesh import cast_varying, varying_axes
from jaxhpo._core.tree import norm
from jaxhpo._core.types import LinearInfo, LinearStatus
from jaxhpo._linear.report import (
    default_tolerance,
    dot,
    epsilon,
    first_of,
    is_accurate,
    is_confirmed,
    relative_norm,
    report,
    still_falls,
)

RUNNING = -1  # the status inside a loop
_ROUGH = 1e-2  # relative residual of the solve that confirms another


class Best(NamedTuple):
    """The best iterate of a recurrence that updates x and r together.

    Attributes:
      x: the iterate.
      bound: an upper bound of its residual ‖b − A x‖.
      size: a lower bound of ‖A‖.
      inverse: a lower bound of ‖A⁻¹‖.
      rounding: a bound of the distance between r and b − A x.
    """

    x: jax.Array
    bound: jax.Array
    size: jax.Array
    inverse: jax.Array
    rounding: jax.Array

    def update(self, x: jax.Array, residual: jax.Array, size: jax.Array, inverse: jax.Array) -> Best:
        """Return the better of this iterate and `x`, at which ‖r‖ is `residual`."""
        # x and A p are rounded in every step, so r = r₀ − Σ α A p departs from b − A x by about 4 ε ‖A‖ max ‖x‖.
        size, inverse = jnp.maximum(self.size, size), jnp.maximum(self.inverse, inverse)
        rounding = jnp.maximum(self.rounding, 4 * epsilon(x.dtype) * size * norm(x))
        bound = residual + rounding  # ‖b − A x‖ ≤ ‖r‖ + ‖(b − A x) − r‖
        x, least = jnp.where(bound <= self.bound, x, self.x), jnp.minimum(bound, self.bound)
        return Best(x, least, size, inverse, rounding)


def loop(step: Callable, start: tuple, r: jax.Array, threshold: jax.Array, maxiter: Any) -> tuple:
    """Repeat `step` on the carry (*start, iterations, status) while RUNNING, at most to `maxiter` iterations.

    No step is made where the residual r is within the threshold (CONVERGED), or not finite.
    """
    size = norm(r)
    cases = (~jnp.isfinite(size), LinearStatus.NOT_FINITE), (size <= threshold, LinearStatus.CONVERGED)
    start = cast_varying((*start, jnp.asarray(0, jnp.int32), first_of(*cases, otherwise=RUNNING)), varying_axes(start))
    return jax.lax.while_loop(lambda carry: (carry[-1] == RUNNING) & (carry[-2] < maxiter), step, start)


def _report(residual, num_iterations, status, tol, accurate, failed) -> LinearInfo:
    """Return the diagnostics of an iteration that left its loop with `status`; `tol` is None or the caller's.

    The loop may end CONVERGED by its recurrence while the measured residual is above the limit: rounding separated the
    two, and the status is STALLED. Where the caller gave no tolerance, a residual up to √ε then passes for convergence,
    and none does where the answer is not accurate.
    """
    status = first_of(
        (status == LinearStatus.CONVERGED, LinearStatus.STALLED),
        (status == RUNNING, LinearStatus.MAX_ITERATIONS),
        otherwise=status,
    )
    limit = 2 * default_tolerance(residual.dtype, tol)
    if tol is None:
        limit = jnp.where(status == LinearStatus.STALLED, epsilon(residual.dtype) ** 0.5, limit)
        limit = jnp.where(accurate, limit, -1)
    return report(residual, num_iterations, status, limit, failed=failed)


def descend(
    operator: Callable, b: jax.Array, x0: jax.Array | None, maxiter: Any, tol: float | jax.Array | None
) -> tuple[jax.Array, jax.Array, Best, jax.Array, jax.Array, jax.Array]:
    """Conjugate gradients: x, r, the best iterate, whether A is not symmetric, iterations, status inside the loop."""
    eps, threshold = epsilon(b.dtype), default_tolerance(b.dtype, tol) * norm(b)
    x, r0 = (jnp.zeros_like(b), b) if x0 is None else (x0, b - operator(x0))

    def iterate(carry):
        x, r, rr, p, best, skew, k, _ = carry
        ap = operator(p)
        curvature, pp, apap = dot(p, ap), dot(p, p), dot(ap, ap)
        size = jnp.maximum(best.size, jnp.sqrt(apap / pp))  # ‖A‖ ≥ ‖A p‖ / ‖p‖
        # Rounding makes pᵀAp uncertain by about ε ‖A‖ ‖p‖². A matrix without negative eigenvalues has
        # ‖A p‖² ≤ ‖A‖ pᵀAp. So where pᵀAp is within this noise, p is a direction of no curvature if ‖A p‖² is within
        # ‖A‖ times the noise (flat), and otherwise A has a negative eigenvalue.
        noise = 16 * eps * size * pp
        flat = (curvature >= -noise) & (apap <= noise * size)
        ok = curvature > jnp.where(flat, 0, noise)
        # x + α p minimises ½ xᵀA x − bᵀx along p at α = rᵀr / pᵀA p. Without positive curvature there is no minimum:
        # keep the iterate (α = 0), or take α = 1 if this is the first direction, p = r₀, as steepest descent does. The
        # answer is then not zero, which would pass for a hypergradient.
        first = (k == 0) & jnp.isfinite(curvature)
        alpha = jnp.where(ok, rr / jnp.where(ok, curvature, 1), jnp.where(first, 1, 0))
        x, r, old = x + alpha * p, r - alpha * ap, r
        rr_new = dot(r, r)
        residual = jnp.sqrt(rr_new)
        best = best.update(x, residual, size, jnp.where(ok, pp / curvature, 0))  # ‖A⁻¹‖ = 1/λ₁ ≥ pᵀp / pᵀA p
        if tol is not None:
            accurate = True
        else:  # in low precision by the curvature along the residual, too: it may lie where none was met before
            seen = (jnp.sqrt(rr) <= threshold) | (residual == 0) | (eps < 1e-10)
            accurate = is_accurate(residual, x, size, best.inverse) & seen
        # Residuals that follow each other are orthogonal where A is symmetric, as pᵀA p₋ = p₋ᵀA p is zero then.
        skew |= ok & (jnp.abs(dot(r, old)) > 1e-2 * jnp.abs(alpha) * jnp.sqrt(apap) * (jnp.sqrt(rr) + jnp.sqrt(pp)))
        # Below the rounding bound r goes on falling, but b − A x does not. A singular A ends here too, since x grows
        # without bound; or by ‖r‖ > ‖r₀‖ / √ε, for ‖r‖ ≤ √κ ‖r₀‖ where A is positive definite of condition κ ≤ 1/ε.
        stalled = (residual <= best.rounding) | (eps**0.5 * residual > norm(r0))
        status = first_of(
            (~jnp.isfinite(curvature) | ~jnp.isfinite(rr_new), LinearStatus.NOT_FINITE),
            (~ok & flat, LinearStatus.STALLED),
            (~ok, LinearStatus.INDEFINITE),
            ((residual <= threshold) & accurate, LinearStatus.CONVERGED),
            (stalled, LinearStatus.STALLED),
            otherwise=RUNNING,
        )
        # The next direction is r made conjugate to p: pᵀA p₊ = 0 for p₊ = r + (rᵀr / r₋ᵀr₋) p.
        return x, r, rr_new, r + rr_new / rr * p, best, skew, k + 1, status

    zero = jnp.zeros_like(norm(r0))
    best = Best(x, zero + jnp.inf if x0 is None else norm(r0), zero, zero, zero)  # zeros, without an x0, are no answer
    start = (x, r0, dot(r0, r0), r0, best, jnp.asarray(False))
    x, r, _, _, best, skew, k, status = loop(iterate, start, r0, threshold, maxiter)
    # After `maxiter` iterations, or where A is indefinite, the answer is the last iterate, unless its rounding exceeds
    # the residual of another.
    x = jnp.where((status == LinearStatus.STALLED) | (best.rounding > best.bound), best.x, x)
    x = jnp.where(status == LinearStatus.NOT_FINITE, jnp.nan, x)  # not the zeros it started from
    return x, r, best, skew, k, status


def conjugate_gradients(
    operator: Callable, b: jax.Array, x0: jax.Array | None, maxiter: int, tol: float | jax.Array | None
) -> tuple[jax.Array, LinearInfo]:
    """Conjugate gradients from x0 (zeros when None) to ‖b − A x‖ ≤ tol ‖b‖ (ε^¾ when None). Not differentiable.

    b is a vector with a largest entry of one. Where no tolerance is given, the iteration goes on below the default one
    until the answer is accurate too, as far as rounding allows.
    """
    x, r, best, skew, k, status = descend(operator, b, x0, maxiter, tol)
    left, size = b - operator(x), norm(b)
    residual = relative_norm(left, b)
    accurate = is_accurate(residual * size, x, best.size, best.inverse)
    if tol is None and epsilon(b.dtype) > 1e-10:

        def rough(r):
            return descend(operator, r, None, maxiter, _ROUGH)[0], True  # it may end early, where A is singular

        accurate &= is_confirmed(operator, rough, left, x, best.size)
    # By the recurrence, so that it takes no product. The residual of a good iterate may be above that of x = 0.
    unsolved = norm(r) > 2 * default_tolerance(b.dtype, tol) * size
    skew &= norm(r) > epsilon(b.dtype) ** 0.5 * size  # at their rounding error residuals are not orthogonal
    useless = (status == LinearStatus.STALLED) & ~still_falls(size, best.bound)
    failed = (unsolved & (status == LinearStatus.INDEFINITE)) | skew | useless | (status == LinearStatus.NOT_FINITE)
    return x, _report(residual, k, status, tol, accurate, failed)


def in_rounds(
    correct: Callable,
    operator: Callable,
    b: jax.Array,
    x0: jax.Array | None,
    maxiter: int,
    tol: float | None,
    refused: float | None = None,
) -> tuple[jax.Array, LinearInfo]:
    """Iterative refinement: add corrections to x0 (zeros when None) until ‖b − A x‖ ≤ tol ‖b‖.

    A round that does not lower the residual is undone and ends the solve with status STALLED. Where no tolerance is
    given, rounds follow below the default one until the answer is accurate too.

    Args:
      correct: `(operator, r, most, threshold) -> (change of x, products, iterations, size, inverse)` from a residual r,
        in at most `most` iterations; the last two are lower bounds of ‖A‖ and ‖A⁻¹‖.
      operator: products with A.
      b: the right-hand side, with a largest entry of one.
      x0: where to start, or None.
      maxiter: iterations in all.
      tol: relative residual to reach; ε^¾ when None.
      refused: relative residual above which the solve has failed; that of x = 0 when None.
    """
    threshold = default_tolerance(b.dtype, tol) * norm(b)

    def one_round(carry):
        # With r = b − A x and A d ≈ r, x + d has the residual r − A d. It is computed as b − A (x + d), so that the
        # rounding of the recurrence that gave d ends with its round.
        x, r, size, inverse, num_products, k, _ = carry
        before = norm(r)
        goal = jnp.where(before <= threshold, 1e-3 * before, threshold)
        change, products, iterations, *bounds = correct(operator, r, maxiter - k, goal)
        size, inverse = jnp.maximum(size, bounds[0]), jnp.maximum(inverse, bounds[1])
        r_new = b - operator(x + change)
        after = norm(r_new)
        accurate = True if tol is not None else is_accurate(after, x + change, size, inverse)
        status = first_of(
            (~jnp.isfinite(after), LinearStatus.NOT_FINITE),
            ((after <= threshold) & accurate, LinearStatus.CONVERGED),
            (still_falls(before, after) & (after > 0), RUNNING),
            otherwise=LinearStatus.STALLED,
        )
        x, r = (jnp.where(after < before, new, old) for new, old in ((x + change, x), (r_new, r)))
        return x, r, size, inverse, num_products + products, k + iterations, status

    x, r = (jnp.zeros_like(b), b) if x0 is None else (x0, b - operator(x0))
    zero = jnp.zeros_like(norm(r))
    start = (x, r, zero, zero, jnp.asarray(0, jnp.int32))
    x, r, size, inverse, num_products, _, status = loop(one_round, start, r, threshold, maxiter)
    x, r = (jnp.where(status == LinearStatus.NOT_FINITE, jnp.nan, v) for v in (x, r))
    residual, accurate = relative_norm(r, b), is_accurate(norm(r), x, size, inverse)
    if tol is None and epsilon(b.dtype) > 1e-10:

        def rough(r):
            e, info = in_rounds(correct, operator, r, None, maxiter, _ROUGH)
            return e, info.residual <= 0.5  # above, A is singular, or e knows little of A⁻¹

        accurate &= is_confirmed(operator, rough, r, x, size)
    most = 1 - epsilon(b.dtype) ** 0.5 if refused is None else refused
    return x, _report(residual, num_products, status, tol, accurate, ~(residual <= most))


def in_turn(first: Callable, then: Callable, goes_on: Callable[[LinearInfo], jax.Array]) -> Callable:
    """The solver of vectors that calls `then` where `goes_on` of the report of `first`."""

    def solve(operator, b, x0):
        def second(carry):
            _, before, again = carry
            # Products depend on the carry. What does not, as a factorised matrix, XLA moves to before the loop, where
            # it is made in any case.
            x, info = then(lambda v: operator(jnp.where(again, v, 0)), b, None)
            info = info._replace(num_iterations=info.num_iterations + before.num_iterations)
            return cast_varying((x, info, jnp.asarray(False)), axes)

        # A loop of at most one pass: under `vmap` a `cond` would always run both branches.
        x, info = first(operator, b, x0)
        axes = varying_axes((x, info))
        start = cast_varying((x, info, goes_on(info)), axes)
        x, info, _ = jax.lax.while_loop(lambda carry: carry[-1], second, start)
        return x, info

    return solve
