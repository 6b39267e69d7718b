"""Stabilised bi-conjugate gradients."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxhpo._core.mesh import cast_varying, varying_axes
from jaxhpo._core.tree import norm, vdot
from jaxhpo._core.types import LinearSolver
from jaxhpo._core.validate import check_count, check_positive
from jaxhpo._linear.iteration import in_rounds
from jaxhpo._linear.system import solve_system

_PATIENCE = 100  # iterations without a new best


@dataclasses.dataclass(frozen=True)
class BiCGStab(LinearSolver):
    r"""Stabilised bi-conjugate gradients: for matrices that are not symmetric, in constant memory.

    Its residual may rise on the way: what it returns is the best iterate met. Where it breaks down (a division by
    zero), reaches its rounding error, or finds no better iterate for 100 iterations, it begins anew from the residual
    measured there; where that does not help either, it ends with status STALLED. `GMRES` does not break down.

    **Cost and bias**: two products with the matrix an iteration; memory of eight copies of the parameters. Exact at
    convergence.

    Args:
      maxiter: largest number of iterations.
      tol: relative residual to reach; None takes :math:`\epsilon^{3/4}` of the working precision.

    Raises:
      JaxhpoError: a setting out of its range.

    Example:
      >>> adjoint = jaxhpo.Implicit(jaxhpo.BiCGStab())

    References:
      van der Vorst. Bi-CGSTAB: A Fast and Smoothly Converging Variant of Bi-CG. 1992.
    """

    maxiter: int = 100
    tol: float | None = None

    def __post_init__(self):
        check_count("BiCGStab(maxiter=...)", self.maxiter)
        if self.tol is not None:
            check_positive("BiCGStab(tol=...)", self.tol)

    def __call__(self, matvec, b, x0=None):
        """Returns `(x, LinearInfo)`, starting from `x0` (zeros when None)."""

        def solve(operator, b, x0):
            return in_rounds(functools.partial(_stabilised, operator), operator, b, x0, self.maxiter, self.tol)

        return solve_system(matvec, b, x0, solve)


def _stabilised(operator, r, most, threshold):
    """The iteration from residual r: `(best change of x met, products, iterations)`."""
    eps, shadow = float(jnp.finfo(r.dtype).eps), r

    def unfinished(carry):
        return carry[-1] & (carry[-2] < most)

    def iterate(carry):
        x, r, p, best, least, since, size, rounding, k, _ = carry
        v = operator(p)
        rho = vdot(shadow, r)
        alpha = _ratio(rho, vdot(shadow, v))
        s = r - alpha * v
        t = operator(s)
        omega = _ratio(vdot(t, s), vdot(t, t))
        x, r = x + alpha * p + omega * s, s - omega * t
        after, rho_new = norm(r), vdot(shadow, r)
        # Rounding sets the true residual apart from r, by about 4 ε ‖A‖ max ‖x‖; ‖A‖ is at least ‖Ap‖ / ‖p‖.
        size = jnp.maximum(size, norm(v) / norm(p))
        rounding = jnp.maximum(rounding, 4 * eps * size * norm(x))
        better = after + rounding < least
        best, since = jnp.where(better, x, best), jnp.where(better, 0, since + 1)
        least = jnp.minimum(after + rounding, least)
        # Done, at its rounding error, going nowhere, or where no next direction can be had.
        done = (after <= jnp.maximum(rounding, threshold)) | (since >= _PATIENCE)
        done |= (alpha == 0) | (omega == 0) | (rho_new == 0)
        p = r + _ratio(rho_new * alpha, rho * omega) * (p - omega * v)
        return x, r, p, best, least, since, size, rounding, k + 1, ~done & jnp.isfinite(after)

    x, zero, none = jnp.zeros_like(r), jnp.zeros_like(norm(r)), jnp.asarray(0, jnp.int32)
    start = (x, r, r, x, norm(r), none, zero, zero, none, jnp.asarray(True))
    _, r_last, _, best, least, _, _, _, k, _ = jax.lax.while_loop(
        unfinished, iterate, cast_varying(start, varying_axes(r))
    )
    # What is not finite must not come back as the zeros it started from.
    sound = jnp.isfinite(norm(r_last)) | (least < norm(r))
    return jnp.where(sound, best, jnp.nan), 2 * k, k


def _ratio(a, b):
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))
