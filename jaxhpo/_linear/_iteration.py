"""The iteration of conjugate gradients, which `CG` and `NormalCG` share."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxhpo._tree import add_scaled, cast_varying, norm, scaled, varying_axes, vdot, zeros_like
from jaxhpo._types import LinearInfo, LinearStatus, PyTree

_RUNNING = -1


def conjugate_gradients(
    operator: Callable, b: PyTree, x0: PyTree, maxiter: int, tol: float | None
) -> tuple[PyTree, LinearInfo]:
    """The iteration itself, not differentiable: from x0 (zeros when None) to ‖b − A x‖ ≤ tol ‖b‖ (ε^¾ when None)."""
    axes = varying_axes(b)
    # Solved for b scaled to a largest entry of one: squares of very small or large entries would leave the range.
    size = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(leaf), initial=0) for leaf in jax.tree.leaves(b)])
    size = jnp.where(size > 0, size, 1)
    b = scaled(1 / size, b)
    b_norm = norm(b)
    threshold = (float(jnp.finfo(b_norm.dtype).eps) ** 0.75 if tol is None else tol) * b_norm
    x = zeros_like(b) if x0 is None else scaled(1 / size, x0)
    r = b if x0 is None else add_scaled(b, -1.0, operator(x))

    def status_of(rr):
        status = jnp.where(jnp.sqrt(rr) <= threshold, LinearStatus.CONVERGED, _RUNNING)
        return jnp.where(jnp.isfinite(rr), status, LinearStatus.NOT_FINITE).astype(jnp.int32)

    def unfinished(carry):
        return (carry[-1] == _RUNNING) & (carry[-2] < maxiter)

    def iterate(carry):
        x, r, p, rr, k, _ = carry
        ap = operator(p)
        curvature = vdot(p, ap)
        # pᵀAp ≤ 0 proves that A is not positive definite: keep the iterate from before this direction, or, where
        # there is none, go along b as steepest descent does. Never zero, which would pass for a hypergradient.
        ok = curvature > 0
        step = jnp.where(ok, rr / jnp.where(ok, curvature, 1), jnp.where((k == 0) & (curvature <= 0), 1, 0))
        x, r = add_scaled(x, step, p), add_scaled(r, -step, ap)
        rr_new = vdot(r, r)
        bad = jnp.where(jnp.isfinite(curvature), LinearStatus.INDEFINITE, LinearStatus.NOT_FINITE)
        status = jnp.where(ok, status_of(rr_new), bad).astype(jnp.int32)
        return x, r, add_scaled(r, rr_new / rr, p), rr_new, k + 1, status

    rr = vdot(r, r)
    start = cast_varying((x, r, r, rr, jnp.asarray(0, jnp.int32), status_of(rr)), axes)
    x, _, _, rr, k, status = jax.lax.while_loop(unfinished, iterate, start)
    status = jnp.where(status == _RUNNING, LinearStatus.MAX_ITERATIONS, status).astype(jnp.int32)
    # What is not finite must not come back as the zeros it started from.
    size = jnp.where(status == LinearStatus.NOT_FINITE, jnp.nan, size)
    return scaled(size, x), LinearInfo(jnp.sqrt(rr) / jnp.where(b_norm > 0, b_norm, 1), k, status)
