"""Stabilised bi-conjugate gradients."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxhpo._linear._report import report
from jaxhpo._linear._system import solve_system
from jaxhpo._tree import norm
from jaxhpo._validate import check_count, check_positive


@dataclasses.dataclass(frozen=True)
class BiCGStab:
    r"""Stabilised bi-conjugate gradients: for matrices that are not symmetric, in constant memory.

    It is JAX's own implementation (`jax.scipy.sparse.linalg.bicgstab`) with a report. It may break down, which the
    report then says (NOT_FINITE, or MAX_ITERATIONS with a large residual): `GMRES` does not. Not for use inside
    `jax.shard_map`.

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
        tol = self.tol if self.tol is not None else float(jnp.finfo(norm(b).dtype).eps) ** 0.75

        def solve(operator, b, x0):
            x, _ = jax.scipy.sparse.linalg.bicgstab(operator, b, x0, tol=tol, maxiter=self.maxiter)
            # JAX does not count; this is the most it can have taken.
            return x, report(operator, x, b, 2 * self.maxiter, threshold=2 * tol)

        return solve_system(matvec, b, x0, solve)
