"""Stabilised bi-conjugate gradients."""

import dataclasses
import functools

import jax.numpy as jnp

from jaxhpo._core.tree import norm
from jaxhpo._core.types import LinearSolver, LinearStatus
from jaxhpo._core.validate import check_settings
from jaxhpo._linear.iteration import RUNNING, Best, in_rounds, loop
from jaxhpo._linear.report import dot, first_of
from jaxhpo._linear.system import solve_system

_PATIENCE = 100  # iterations without a new best


@dataclasses.dataclass(frozen=True)
class BiCGStab(LinearSolver):
    r"""Stabilised bi-conjugate gradients, for matrices that are not symmetric, in constant memory.

    The residual may rise on the way; the answer is the best iterate. Where the recurrence breaks down (a division by
    zero), reaches its rounding error, or finds no better iterate for 100 iterations, it restarts from the residual
    measured there. If a restart does not lower the residual, the solve ends with status STALLED. `GMRES` does not break
    down.

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
        check_settings(self, maxiter="count", tol="positive or None")

    def __call__(self, matvec, b, x0=None):
        """Return `(x, LinearInfo)`, starting from `x0` (zeros when None)."""
        solve = functools.partial(in_rounds, _stabilised, maxiter=self.maxiter, tol=self.tol)
        return solve_system(matvec, b, x0, solve)


def _stabilised(operator, r, most, threshold):
    """Run the recurrence from residual r; return `(best change of x, products, iterations)`."""
    shadow = r  # r̂: any vector with r̂ᵀr ≠ 0

    def iterate(carry):
        x, r, p, best, since, k, _ = carry
        v = operator(p)
        rho = dot(shadow, r)
        alpha = _ratio(rho, dot(shadow, v))  # makes s = r − α A p orthogonal to r̂
        s = r - alpha * v
        t = operator(s)
        omega = _ratio(dot(t, s), dot(t, t))  # minimises ‖s − ω A s‖
        x, r = x + alpha * p + omega * s, s - omega * t
        residual, rho_new = norm(r), dot(shadow, r)
        better = best.update(x, residual, jnp.maximum(best.size, norm(v) / norm(p)))  # ‖A‖ ≥ ‖A p‖ / ‖p‖
        since = jnp.where(better.bound < best.bound, 0, since + 1)
        # At its goal or its rounding error, without progress, or at a breakdown, where no next direction exists.
        done = (residual <= jnp.maximum(better.rounding, threshold)) | (since >= _PATIENCE)
        done |= (alpha == 0) | (omega == 0) | (rho_new == 0) | ~jnp.isfinite(residual)
        # The next direction is p₊ = r + β (p − ω A p), where β = (ρ₊/ρ) (α/ω) is that of BiCG in terms of ρ = r̂ᵀr.
        p = r + _ratio(rho_new * alpha, rho * omega) * (p - omega * v)
        return x, r, p, better, since, k + 1, first_of((done, LinearStatus.STALLED), otherwise=RUNNING)

    x, zero = jnp.zeros_like(r), jnp.zeros_like(norm(r))
    start = (x, r, r, Best(x, norm(r), zero, zero), jnp.asarray(0, jnp.int32))
    _, r_last, _, best, _, k, _ = loop(iterate, start, r, threshold, most)
    sound = jnp.isfinite(norm(r_last)) | (best.bound < norm(r))  # otherwise NaN, not the zeros it started from
    return jnp.where(sound, best.x, jnp.nan), 2 * k, k


def _ratio(a, b):
    """Return a / b, or 0 where b = 0."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))
