"""Restarted GMRES."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxhpo._core.mesh import cast_varying, varying_axes
from jaxhpo._core.tree import norm
from jaxhpo._core.types import LinearSolver
from jaxhpo._core.validate import check_count, check_positive
from jaxhpo._linear.iteration import in_rounds
from jaxhpo._linear.system import solve_system


@dataclasses.dataclass(frozen=True)
class GMRES(LinearSolver):
    r"""Restarted GMRES, for matrices that need be neither symmetric nor definite.

    Serves `fixed_point` solvers and saddle points, where `CG` cannot. The residual never rises; a round between two
    restarts in which it falls by less than a fraction :math:`\sqrt\epsilon` would be repeated for ever, and ends the
    solve with status STALLED: the matrix is singular, `restart` too small, or the residual at its rounding error.

    **Cost and bias**: up to `maxiter * (restart + 1)` products with the matrix; memory of `restart` copies of the
    parameters. Exact at convergence.

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

        def solve(operator, b, x0):
            correct = functools.partial(_minimal_residual, operator, min(self.restart, b.size))
            return in_rounds(correct, operator, b, x0, self.maxiter, self.tol)

        return solve_system(matvec, b, x0, solve)


def _minimal_residual(operator, restart, r, most, threshold):
    r"""Minimises ‖r − A Qy‖ over y, Q an orthonormal basis of span(r, Ar, A²r, …), by Arnoldi's process.

    With A Q = Q₊ H, H of one row more than columns, the residual is the distance of ‖r‖e₁ from H's range, which is the
    complement of the one vector w with wᵀH = 0, w₁ = 1: ‖r‖/‖w‖.

    Returns:
      The change of x, the number of products, and one round taken.
    """
    del most
    eps, beta, product = float(jnp.finfo(r.dtype).eps), norm(r), functools.partial(jnp.matmul, precision="highest")

    def unfinished(carry):
        _, _, w, j, broken = carry
        return (j < restart) & ~broken & (beta > threshold * norm(w))

    def extend(carry):
        Q, H, w, j, _ = carry
        v = operator(Q[j])
        least = eps * norm(v)
        h = product(Q, v)
        v = v - product(h, Q)
        again = product(Q, v)  # Gram and Schmidt, twice: once is not orthogonal to rounding
        v, h = v - product(again, Q), h + again
        rest = norm(v)
        broken = ~(rest > 10 * least)  # the space is invariant (or not finite): x is as good as it gets
        rest = jnp.maximum(rest, jnp.where(least > 0, least, 1))
        return (
            Q.at[j + 1].set(v / rest),
            H.at[:, j].set(h.at[j + 1].set(rest)),
            w.at[j + 1].set(-product(w, h) / rest),
            j + 1,
            broken,
        )

    Q = jnp.zeros((restart + 1, r.size), r.dtype).at[0].set(r / beta)
    H, w = jnp.zeros((restart + 1, restart), r.dtype), jnp.zeros(restart + 1, r.dtype).at[0].set(1)
    start = (Q, H, w, jnp.asarray(0, jnp.int32), jnp.asarray(False))
    Q, H, w, j, _ = jax.lax.while_loop(unfinished, extend, cast_varying(start, varying_axes(r)))
    # By singular values, since H is singular where A is; columns that were not reached are zero, and so is their y.
    y = jnp.linalg.lstsq(H, jnp.zeros_like(w).at[0].set(beta))[0]
    return product(y, Q[:-1]), j, 1
