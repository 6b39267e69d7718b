"""Conjugate gradients on the normal equations."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxhpo._core.tree import all_finite, norm
from jaxhpo._core.types import LinearInfo, LinearSolver, LinearStatus
from jaxhpo._core.validate import check_settings
from jaxhpo._linear.iteration import conjugate_gradients
from jaxhpo._linear.report import first_of, is_accurate, relative_norm, still_falls
from jaxhpo._linear.system import solve_system


@dataclasses.dataclass(frozen=True)
class NormalCG(LinearSolver):
    r"""Conjugate gradients on :math:`(A^\top A + \delta I) x = A^\top b`, for any matrix, also singular or indefinite.

    With δ = 0 this is the least-squares solution nearest to zero. The condition number is squared, so it needs many
    more iterations than `CG` where that applies: a fallback, not a default. The status is that of the normal equations,
    which always have a solution. The residual is that of A x = b, and large where b is not in the range of A (STALLED
    where no part of b is). STALLED also, if no `tol` was given, where a small residual hides an error above 1 %.

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
        check_settings(self, maxiter="count", damping="nonnegative", tol="positive or None")

    def __call__(self, matvec, b, x0=None):
        """Return `(x, LinearInfo)`, starting from `x0` (zeros when None)."""

        def solve(operator, b, x0):
            def transposed(v):
                return jax.linear_transpose(operator, v)(v)[0]

            def normal(v):
                return transposed(operator(v)) + self.damping * v

            x, info = conjugate_gradients(normal, transposed(b), x0, self.maxiter, self.tol)
            r = b - operator(x)
            residual, growth = relative_norm(r, b), norm(transposed(r)) / norm(r)  # ‖Aᵀ r‖ ≥ ‖r‖ / ‖A⁻¹‖
            unreached = ~still_falls(jnp.ones_like(residual), residual)  # no part of b is in the range of A
            size = norm(transposed(b)) / norm(b)
            accurate = is_accurate(norm(r), x, size, jnp.where(growth > 0, 1 / growth, 0)) | (residual == 0)
            wrong = unreached if self.tol is not None else unreached | ((residual <= 1e-2) & ~accurate)
            status = first_of(
                (info.status == LinearStatus.INDEFINITE, LinearStatus.STALLED),  # of AᵀA: an effect of rounding
                ((info.status == LinearStatus.CONVERGED) & wrong, LinearStatus.STALLED),
                otherwise=info.status,
            )
            return x, LinearInfo(residual, info.num_iterations, status, ~all_finite(x))

        # The same function solves the transposed system, whatever its b, since
        #     ((AᵀA + δI)⁻¹ Aᵀ)ᵀ = A (AᵀA + δI)⁻¹ = (AAᵀ + δI)⁻¹ A.
        return solve_system(matvec, b, x0, solve)
