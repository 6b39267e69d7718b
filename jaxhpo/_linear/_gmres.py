"""Restarted GMRES."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxhpo._linear._report import report
from jaxhpo._linear._system import solve_system
from jaxhpo._tree import norm
from jaxhpo._validate import check_count, check_positive


@dataclasses.dataclass(frozen=True)
class GMRES:
    r"""Restarted GMRES, for matrices that need be neither symmetric nor definite.

    Serves `fixed_point` solvers and saddle points, where `CG` cannot. It is JAX's own implementation
    (`jax.scipy.sparse.linalg.gmres`) with a report, and, as it stands there, not for use inside `jax.shard_map`.

    **Cost and bias**: up to `maxiter * restart` products with the matrix, and as many again in the transposed solve of
    a reverse-mode derivative; memory of `restart` copies of the parameters. Exact at convergence.

    Args:
      maxiter: restarts.
      restart: dimension of the Krylov space between restarts.
      tol: relative residual to reach; None takes :math:`\epsilon^{3/4}` of the working precision.

    Raises:
      JaxhpoError: a setting out of its range.

    Example:
      >>> adjoint = jaxhpo.Implicit(jaxhpo.GMRES(restart=10))

    References:
      Saad, Schultz. GMRES: A Generalized Minimal Residual Algorithm for Solving Nonsymmetric Linear Systems. 1986.
    """

    maxiter: int = 10
    restart: int = 20
    tol: float | None = None

    def __post_init__(self):
        check_count("GMRES(maxiter=...)", self.maxiter)
        check_count("GMRES(restart=...)", self.restart)
        if self.tol is not None:
            check_positive("GMRES(tol=...)", self.tol)

    def __call__(self, matvec, b, x0=None):
        """Returns `(x, LinearInfo)`, starting from `x0` (zeros when None)."""
        tol = self.tol if self.tol is not None else float(jnp.finfo(norm(b).dtype).eps) ** 0.75

        def solve(operator, b, x0):
            x, _ = jax.scipy.sparse.linalg.gmres(
                operator, b, x0, tol=tol, restart=self.restart, maxiter=self.maxiter, solve_method="batched"
            )
            # JAX does not count; this is the most it can have taken.
            return x, report(operator, x, b, self.maxiter * self.restart, threshold=2 * tol)

        return solve_system(matvec, b, x0, solve)
