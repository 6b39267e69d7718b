"""Iterations shared by solvers: conjugate gradients, and iterative refinement of a solver's corrections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxhpo._core.mesh import cast_varying, varying_axes
from jaxhpo._core.tree import norm
from jaxhpo._core.types import LinearInfo, LinearStatus
from jaxhpo._linear.report import default_tolerance, dot, epsilon, first_of, relative_norm, report, still_falls

RUNNING = -1  # the status inside a loop


class Best(NamedTuple):
    """The best iterate of a recurrence that updates x and r together.

    Attributes:
      x: the iterate.
      bound: an upper bound of its residual ‖b − A x‖.
      size: a lower bound of ‖A‖.
      rounding: a bound of the distance between r and b − A x.
    """

    x: jax.Array
    bound: jax.Array
    size: jax.Array
    rounding: jax.Array

    def update(self, x: jax.Array, residual: jax.Array, size: jax.Array) -> Best:
        """Return the better of this iterate and `x`, at which ‖r‖ is `residual`."""
        # x and A p are rounded in every step, so r = r₀ − Σ α A p departs from b − A x by about 4 ε ‖A‖ max ‖x‖.
        rounding = jnp.maximum(self.rounding, 4 * epsilon(x.dtype) * size * norm(x))
        bound = residual + rounding  # ‖b − A x‖ ≤ ‖r‖ + ‖(b − A x) − r‖
        return Best(jnp.where(bound <= self.bound, x, self.x), jnp.minimum(bound, self.bound), size, rounding)


def loop(step: Callable, start: tuple, r: jax.Array, threshold: jax.Array, maxiter: Any) -> tuple:
    """Repeat `step` on the carry (*start, iterations, status) while RUNNING, at most to `maxiter` iterations.

    No step is made where the residual r is within the threshold (CONVERGED), or not finite.
    """
    size = norm(r)
    cases = (~jnp.isfinite(size), LinearStatus.NOT_FINITE), (size <= threshold, LinearStatus.CONVERGED)
    start = cast_varying((*start, jnp.asarray(0, jnp.int32), first_of(*cases, otherwise=RUNNING)), varying_axes(start))
    return jax.lax.while_loop(lambda carry: (carry[-1] == RUNNING) & (carry[-2] < maxiter), step, start)


def _report(residual, num_iterations, status, tol) -> LinearInfo:
    """Return the diagnostics of an iteration that left its loop with `status`; `tol` is None or the caller's.

    The loop may end CONVERGED by its recurrence while the measured residual is above the limit: rounding separated the
    two, and the status is STALLED. Where the caller gave no tolerance, a residual up to √ε then passes for convergence.
    """
    status = first_of(
        (status == LinearStatus.CONVERGED, LinearStatus.STALLED),
        (status == RUNNING, LinearStatus.MAX_ITERATIONS),
        otherwise=status,
    )
    limit = 2 * default_tolerance(residual.dtype, tol)
    if tol is None:
        limit = jnp.where(status == LinearStatus.STALLED, epsilon(residual.dtype) ** 0.5, limit)
    return report(residual, num_iterations, status, limit)


def conjugate_gradients(
    operator: Callable, b: jax.Array, x0: jax.Array | None, maxiter: int, tol: float | jax.Array | None
) -> tuple[jax.Array, LinearInfo]:
    """Conjugate gradients from x0 (zeros when None) to ‖b − A x‖ ≤ tol ‖b‖ (ε^¾ when None). Not differentiable.

    b is a vector with a largest entry of one.
    """
    eps, threshold = epsilon(b.dtype), default_tolerance(b.dtype, tol) * norm(b)
    x, r0 = (jnp.zeros_like(b), b) if x0 is None else (x0, b - operator(x0))

    def iterate(carry):
        x, r, rr, p, best, k, _ = carry
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
        x, r = x + alpha * p, r - alpha * ap
        rr_new = dot(r, r)
        residual = jnp.sqrt(rr_new)
        best = best.update(x, residual, size)
        # Below the rounding bound r goes on falling, but b − A x does not. A singular A ends here too, since x grows
        # without bound; or by ‖r‖ > ‖r₀‖ / √ε, for ‖r‖ ≤ √κ ‖r₀‖ where A is positive definite of condition κ ≤ 1/ε.
        stalled = (residual <= best.rounding) | (eps**0.5 * residual > norm(r0))
        status = first_of(
            (~jnp.isfinite(curvature) | ~jnp.isfinite(rr_new), LinearStatus.NOT_FINITE),
            (~ok & flat, LinearStatus.STALLED),
            (~ok, LinearStatus.INDEFINITE),
            (residual <= threshold, LinearStatus.CONVERGED),
            (stalled, LinearStatus.STALLED),
            otherwise=RUNNING,
        )
        # The next direction is r made conjugate to p: pᵀA p₊ = 0 for p₊ = r + (rᵀr / r₋ᵀr₋) p.
        return x, r, rr_new, r + rr_new / rr * p, best, k + 1, status

    zero = jnp.zeros_like(norm(r0))
    best = Best(x, zero + jnp.inf if x0 is None else norm(r0), zero, zero)  # zeros, without a given x0, are no answer
    x, _, _, _, best, k, status = loop(iterate, (x, r0, dot(r0, r0), r0, best), r0, threshold, maxiter)
    # After `maxiter` iterations, or where A is indefinite, the answer is the last iterate, unless its rounding exceeds
    # the residual of another.
    x = jnp.where((status == LinearStatus.STALLED) | (best.rounding > best.bound), best.x, x)
    x = jnp.where(status == LinearStatus.NOT_FINITE, jnp.nan, x)  # not the zeros it started from
    return x, _report(relative_norm(b - operator(x), b), k, status, tol)


def in_rounds(
    correct: Callable, operator: Callable, b: jax.Array, x0: jax.Array | None, maxiter: int, tol: float | None
) -> tuple[jax.Array, LinearInfo]:
    """Iterative refinement: add corrections to x0 (zeros when None) until ‖b − A x‖ ≤ tol ‖b‖.

    A round that does not lower the residual is undone and ends the solve with status STALLED.

    Args:
      correct: `(operator, r, most, threshold) -> (change of x, products, iterations)` from a residual r, in at most
        `most` iterations.
      operator: products with A.
      b: the right-hand side, with a largest entry of one.
      x0: where to start, or None.
      maxiter: iterations in all.
      tol: relative residual to reach; ε^¾ when None.
    """
    threshold = default_tolerance(b.dtype, tol) * norm(b)

    def one_round(carry):
        # With r = b − A x and A d ≈ r, x + d has the residual r − A d. It is computed as b − A (x + d), so that the
        # rounding of the recurrence that gave d ends with its round.
        x, r, num_products, k, _ = carry
        change, products, iterations = correct(operator, r, maxiter - k, threshold)
        r_new = b - operator(x + change)
        before, after = norm(r), norm(r_new)
        status = first_of(
            (~jnp.isfinite(after), LinearStatus.NOT_FINITE),
            (after <= threshold, LinearStatus.CONVERGED),
            (still_falls(before, after), RUNNING),
            otherwise=LinearStatus.STALLED,
        )
        x, r = (jnp.where(after < before, new, old) for new, old in ((x + change, x), (r_new, r)))
        return x, r, num_products + products, k + iterations, status

    x, r = (jnp.zeros_like(b), b) if x0 is None else (x0, b - operator(x0))
    x, r, num_products, _, status = loop(one_round, (x, r, jnp.asarray(0, jnp.int32)), r, threshold, maxiter)
    x, r = (jnp.where(status == LinearStatus.NOT_FINITE, jnp.nan, v) for v in (x, r))
    return x, _report(relative_norm(r, b), num_products, status, tol)
