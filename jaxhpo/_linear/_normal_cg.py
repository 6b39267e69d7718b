"""Conjugate gradients on the normal equations."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxhpo._linear._iteration import conjugate_gradients
from jaxhpo._linear._report import report
from jaxhpo._linear._system import solve_system
from jaxhpo._validate import check_count, check_nonnegative, check_positive


@dataclasses.dataclass(frozen=True)
class NormalCG:
    r"""Conjugate gradients on :math:`(A^\top A + \delta I) x = A^\top b`, for any matrix, also singular or indefinite.

    With δ = 0 the least-squares solution that is nearest to zero. The condition number is squared, so it needs many
    more iterations than `CG` where that applies: a fallback, not a default. Not for data-parallel losses inside
    `jax.shard_map`.

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
        iterate = functools.partial(conjugate_gradients, maxiter=self.maxiter, tol=self.tol)

        def damped(product, v):
            return product + self.damping * v

        def transposed(operator, v):
            return jax.linear_transpose(operator, v)(v)[0]

        def solve(operator, b, x0):
            x, info = iterate(lambda v: damped(transposed(operator, operator(v)), v), transposed(operator, b), x0)
            measured = report(operator, x, b, info.num_iterations)
            return x, measured._replace(status=jnp.maximum(info.status, measured.status))

        def transpose_solve(operator, b, x0):
            # ((AᵀA + δ)⁻¹Aᵀ)ᵀ = A (AᵀA + δ)⁻¹; this operator is Aᵀ.
            y, info = iterate(lambda v: damped(operator(transposed(operator, v)), v), b, x0)
            x = transposed(operator, y)
            measured = report(operator, x, b, info.num_iterations)
            return x, measured._replace(status=jnp.maximum(info.status, measured.status))

        return solve_system(matvec, b, x0, solve, transpose_solve)
