"""The iterations that solvers share: conjugate gradients, and rounds from a measured residual."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxhpo._core.mesh import cast_varying, varying_axes
from jaxhpo._core.tree import norm, vdot
from jaxhpo._core.types import LinearInfo, LinearStatus
from jaxhpo._linear.report import (
    RUNNING,
    default_tolerance,
    initial_status,
    relative_norm,
    report_iteration,
    residual_of,
    still_falls,
)


class _Best(NamedTuple):
    x: jax.Array
    bound: jax.Array  # of its residual


def conjugate_gradients(
    operator: Callable, b: jax.Array, x0: jax.Array | None, maxiter: int, tol: float | None
) -> tuple[jax.Array, LinearInfo]:
    """The iteration itself, not differentiable: from x0 (zeros when None) to ‖b − A x‖ ≤ tol ‖b‖ (ε^¾ when None).

    b is a vector with a largest entry of one.
    """
    eps, threshold = float(jnp.finfo(b.dtype).eps), default_tolerance(b.dtype, tol) * norm(b)
    r0 = b if x0 is None else b - operator(x0)

    def unfinished(carry):
        return (carry[-1] == RUNNING) & (carry[-2] < maxiter)

    def iterate(carry):
        x, r, rr, p, best, size, rounding, k, _ = carry
        ap = operator(p)
        curvature, pp, apap = vdot(p, ap), vdot(p, p), vdot(ap, ap)
        size = jnp.maximum(size, jnp.sqrt(apap / pp))  # a lower bound of ‖A‖
        # Without negative eigenvalues ‖Ap‖² ≤ ‖A‖ pᵀAp, and rounding makes pᵀAp uncertain by ε ‖A‖ ‖p‖².
        noise = 16 * eps * size * pp
        flat = (curvature >= -noise) & (apap <= noise * size)
        # pᵀAp ≤ 0 proves that A is not positive definite: keep the iterate from before this direction, or, where
        # there is none, go along b as steepest descent does. Never zero, which would pass for a hypergradient.
        ok = curvature > jnp.where(flat, 0, noise)
        step = jnp.where(ok, rr / jnp.where(ok, curvature, 1), jnp.where((k == 0) & jnp.isfinite(curvature), 1, 0))
        x, r = x + step * p, r - step * ap
        rr_new = vdot(r, r)
        residual = jnp.sqrt(rr_new)
        # Rounding of x and of products sets the true residual apart from r, by about 4 ε ‖A‖ max ‖x‖.
        rounding = jnp.maximum(rounding, 4 * eps * size * norm(x))
        better = residual + rounding <= best.bound
        best = _Best(jnp.where(better, x, best.x), jnp.where(better, residual + rounding, best.bound))
        # Below it r goes on falling, but not the true residual. A singular A ends here too, by an x that grows without
        # bound; and ‖r‖ ≤ √κ ‖r₀‖ wherever A is positive definite.
        stalled = (residual <= rounding) | (eps**0.5 * residual > norm(r0))
        status = jnp.where(stalled, LinearStatus.STALLED, RUNNING)
        status = jnp.where(residual <= threshold, LinearStatus.CONVERGED, status)
        status = jnp.where(ok, status, jnp.where(flat, LinearStatus.STALLED, LinearStatus.INDEFINITE))
        finite = jnp.isfinite(curvature) & jnp.isfinite(rr_new)
        status = jnp.where(finite, status, LinearStatus.NOT_FINITE).astype(jnp.int32)
        return x, r, rr_new, r + rr_new / rr * p, best, size, rounding, k + 1, status

    x, zero = jnp.zeros_like(b) if x0 is None else x0, jnp.zeros_like(norm(r0))
    best = _Best(x, zero + jnp.inf if x0 is None else norm(r0))  # zeros are no answer
    start = (x, r0, vdot(r0, r0), r0, best, zero, zero, jnp.asarray(0, jnp.int32), initial_status(r0, threshold))
    out = jax.lax.while_loop(unfinished, iterate, cast_varying(start, varying_axes(b)))
    x, _, _, _, best, _, rounding, k, status = out
    # K iterations and an indefinite matrix give the last iterate, unless rounding has made it worse than another.
    x = jnp.where((status == LinearStatus.STALLED) | (rounding > best.bound), best.x, x)
    # What is not finite must not come back as the zeros it started from.
    x = jnp.where(status == LinearStatus.NOT_FINITE, jnp.nan, x)
    return x, report_iteration(residual_of(operator, x, b), k, status, tol)


def in_rounds(
    correct: Callable, operator: Callable, b: jax.Array, x0: jax.Array | None, maxiter: int, tol: float | None
) -> tuple[jax.Array, LinearInfo]:
    """Adds corrections to x0 (zeros when None) until the residual, measured after each, is at most tol ‖b‖.

    A round that does not lower it is taken back and ends the solve with status STALLED.

    Args:
      correct: `(r, most, threshold) -> (change of x, products, iterations)` from a residual r, in at most `most`
        iterations.
      operator: products with A.
      b: the right-hand side, with a largest entry of one.
      x0: where to start, or None.
      maxiter: iterations in all.
      tol: relative residual to reach; ε^¾ when None.
    """
    threshold = default_tolerance(b.dtype, tol) * norm(b)

    def unfinished(carry):
        return (carry[-1] == RUNNING) & (carry[-2] < maxiter)

    def round_(carry):
        x, r, num_products, k, _ = carry
        change, products, iterations = correct(r, maxiter - k, threshold)
        r_new = b - operator(x + change)
        before, after = norm(r), norm(r_new)
        status = jnp.where(still_falls(before, after), RUNNING, LinearStatus.STALLED)
        status = jnp.where(after <= threshold, LinearStatus.CONVERGED, status)
        status = jnp.where(jnp.isfinite(after), status, LinearStatus.NOT_FINITE).astype(jnp.int32)
        x, r = (jnp.where(after < before, new, old) for new, old in ((x + change, x), (r_new, r)))
        return x, r, num_products + products, k + iterations, status

    x, r = (jnp.zeros_like(b), b) if x0 is None else (x0, b - operator(x0))
    zero = jnp.asarray(0, jnp.int32)
    start = cast_varying((x, r, zero, zero, initial_status(r, threshold)), varying_axes(b))
    x, r, num_products, _, status = jax.lax.while_loop(unfinished, round_, start)
    x, r = (jnp.where(status == LinearStatus.NOT_FINITE, jnp.nan, v) for v in (x, r))
    return x, report_iteration(relative_norm(r, b), num_products, status, tol)
