"""Conjugate gradients."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxhpo._tree import add_scaled, cast_varying, drop_varying, hoist, norm, varying_axes, vdot, zeros_like
from jaxhpo._types import LinearInfo, LinearStatus
from jaxhpo._validate import check_count, check_nonnegative, check_positive

_RUNNING = -1


@dataclasses.dataclass(frozen=True)
class CG:
    r"""Conjugate gradients on :math:`(H + \delta I) x = b`, for symmetric positive definite H.

    Stops at ‖b − (H + δI)x‖ ≤ `tol` ‖b‖, or after `maxiter` products, in which case the hypergradient is that of the
    iterate reached (K iterations and go on is a legal choice). On meeting a direction of non-positive curvature it
    stops there and reports INDEFINITE instead of returning NaN: raise `damping`, or train the inner problem further.

    **Cost and bias**: one Hessian product (two to three gradients) per iteration; memory of four copies of the
    parameters and one linearisation. Exact at convergence with δ = 0; error ∝ the residual otherwise.

    Args:
      maxiter: largest number of products with H.
      tol: relative residual to reach; None takes :math:`\epsilon^{3/4}` of the working precision (6e-6 in float32,
        2e-12 in float64).
      damping: δ above, ≥ 0.

    Raises:
      JaxhpoError: a setting out of its range.

    Example:
      >>> adjoint = jaxhpo.Implicit(jaxhpo.CG(maxiter=20, damping=1e-3))

    References:
      Pedregosa. Hyperparameter optimization with approximate gradient. 2016. arXiv:1602.02355
      Rajeswaran, Finn, Kakade, Levine. Meta-Learning with Implicit Gradients. 2019. arXiv:1909.04630
    """

    maxiter: int = 100
    tol: float | None = None
    damping: float = 0.0
    needs_symmetry: ClassVar[bool] = True

    def __post_init__(self):
        check_count("CG(maxiter=...)", self.maxiter)
        check_nonnegative("CG(damping=...)", self.damping)
        if self.tol is not None:
            check_positive("CG(tol=...)", self.tol)

    def __call__(self, matvec, b, x0=None):
        """Returns `(x, LinearInfo)`, starting from `x0` (zeros when None)."""
        # A plain loop has no transpose, and CG's iterates are not linear in b: `custom_linear_solve` differentiates
        # the equation A x = b instead of the iteration. Under `shard_map` it wants one varying-axes type for all that
        # it touches; a data-parallel A reads varying data, but takes and gives vectors that are equal on all devices.
        pure, consts = hoist(matvec, b)
        own = varying_axes(b)
        axes = own | varying_axes(consts)

        def operator(v):
            v = drop_varying(v, axes - own)
            return cast_varying(add_scaled(pure(consts, v), self.damping, v), axes)

        def solve(operator, b):
            return self._iterate(operator, b, x0, axes)

        x, info = jax.lax.custom_linear_solve(
            operator, cast_varying(b, axes), solve, solve, symmetric=True, has_aux=True
        )
        return drop_varying(x, axes - own), info

    def _iterate(self, operator, b, x0, axes):
        b_norm = norm(b)
        tol = self.tol if self.tol is not None else float(jnp.finfo(b_norm.dtype).eps) ** 0.75
        x = zeros_like(b) if x0 is None else x0
        r = b if x0 is None else add_scaled(b, -1.0, operator(x0))

        def status_of(rr):
            status = jnp.where(jnp.sqrt(rr) <= tol * b_norm, LinearStatus.CONVERGED, _RUNNING)
            return jnp.where(jnp.isfinite(rr), status, LinearStatus.NOT_FINITE).astype(jnp.int32)

        def unfinished(carry):
            return (carry[-1] == _RUNNING) & (carry[-2] < self.maxiter)

        def iterate(carry):
            x, r, p, rr, k, _ = carry
            ap = operator(p)
            curvature = vdot(p, ap)
            # pᵀAp ≤ 0 proves that A is not positive definite: keep the iterate from before this direction.
            ok = curvature > 0
            step = jnp.where(ok, rr / jnp.where(ok, curvature, 1), 0)
            x, r = add_scaled(x, step, p), add_scaled(r, -step, ap)
            rr_new = vdot(r, r)
            p = add_scaled(r, rr_new / rr, p)
            bad = jnp.where(jnp.isfinite(curvature), LinearStatus.INDEFINITE, LinearStatus.NOT_FINITE)
            status = jnp.where(ok, status_of(rr_new), bad).astype(jnp.int32)
            return x, r, p, rr_new, k + 1, status

        rr = vdot(r, r)
        start = cast_varying((x, r, r, rr, jnp.asarray(0, jnp.int32), status_of(rr)), axes)
        x, _, _, rr, k, status = jax.lax.while_loop(unfinished, iterate, start)
        status = jnp.where(status == _RUNNING, LinearStatus.MAX_ITERATIONS, status).astype(jnp.int32)
        residual = jnp.sqrt(rr) / jnp.where(b_norm > 0, b_norm, 1)
        return x, LinearInfo(residual, k, status)
