"""Conjugate gradients on the normal equations."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxhpo._core.types import LinearSolver, LinearStatus
from jaxhpo._core.validate import check_count, check_nonnegative, check_positive
from jaxhpo._linear.iteration import conjugate_gradients
from jaxhpo._linear.report import default_tolerance, residual_of, still_falls
from jaxhpo._linear.system import solve_system


@dataclasses.dataclass(frozen=True)
class NormalCG(LinearSolver):
    r"""Conjugate gradients on :math:`(A^\top A + \delta I) x = A^\top b`, for any matrix, also singular or indefinite.

    With δ = 0 the least-squares solution that is nearest to zero. The condition number is squared, so it needs many
    more iterations than `CG` where that applies: a fallback, not a default. The status is that of the normal equations,
    which always have a solution; the residual is that of A x = b, and large where b is not in the range of A (STALLED
    where no part of b is).

    **Cost and bias**: one product with A and one with its transpose an iteration; memory of five copies of the
    parameters. Exact at convergence with δ = 0 and A invertible.

    Args:
      maxiter: largest number of iterations.
      tol: relative residual of the normal equations; None as in `CG`.
      damping: δ above, ≥ 0.

    Raises:
      JaxhpoError: a setting out of its range.

    Example:
      >>> adjoint = jaxhpo.Implicit(jaxhpo.NormalCG(maxiter=200))

    References:
      Hestenes, Stiefel. Methods of Conjugate Gradients for Solving Linear Systems. 1952.
    """

    maxiter: int = 100
    tol: float | None = None
    damping: float = 0.0

    def __post_init__(self):
        check_count("NormalCG(maxiter=...)", self.maxiter)
        check_nonnegative("NormalCG(damping=...)", self.damping)
        if self.tol is not None:
            check_positive("NormalCG(tol=...)", self.tol)

    def __call__(self, matvec, b, x0=None):
        """Returns `(x, LinearInfo)`, starting from `x0` (zeros when None)."""

        def solve(operator, b, x0):
            def transposed(v):
                return jax.linear_transpose(operator, v)(v)[0]

            def normal(v):
                return transposed(operator(v)) + self.damping * v

            tol = default_tolerance(b.dtype, self.tol)
            x, info = conjugate_gradients(normal, transposed(b), x0, self.maxiter, tol)
            residual = residual_of(operator, x, b)
            status = jnp.where(residual <= float(jnp.finfo(b.dtype).eps) ** 0.5, LinearStatus.CONVERGED, info.status)
            nothing = (status == LinearStatus.CONVERGED) & ~still_falls(jnp.ones_like(residual), residual)
            # AᵀA has no negative curvature but by rounding.
            stalled = nothing | (status == LinearStatus.INDEFINITE)
            return x, info._replace(residual=residual, status=jnp.where(stalled, LinearStatus.STALLED, status))

        # Also the transposed system's: ((AᵀA + δ)⁻¹Aᵀ)ᵀ = A (AᵀA + δ)⁻¹ = (AAᵀ + δ)⁻¹A, solvable whatever b is.
        return solve_system(matvec, b, x0, solve)
