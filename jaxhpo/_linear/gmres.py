"""Restarted GMRES."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxhpo._core.mesh import cast_varying, varying_axes
from jaxhpo._core.tree import norm
from jaxhpo._core.types import LinearSolver
from jaxhpo._core.validate import check_settings
from jaxhpo._linear.iteration import in_rounds
from jaxhpo._linear.report import epsilon
from jaxhpo._linear.system import solve_system


@dataclasses.dataclass(frozen=True)
class GMRES(LinearSolver):
    r"""Restarted GMRES, for matrices that need be neither symmetric nor definite.

    Serves `fixed_point` solvers and saddle points, where `CG` cannot. The residual never rises. If it falls by less
    than a fraction :math:`\sqrt\epsilon` between two restarts, the solve ends with status STALLED: the matrix is
    singular, `restart` is too small, or the residual is at its rounding error.

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
        check_settings(self, maxiter="count", restart="count", tol="positive or None")

    def __call__(self, matvec, b, x0=None):
        """Return `(x, LinearInfo)`, starting from `x0` (zeros when None)."""
        correct = functools.partial(_minimal_residual, self.restart)
        solve = functools.partial(in_rounds, correct, maxiter=self.maxiter, tol=self.tol)
        return solve_system(matvec, b, x0, solve)


def _minimal_residual(restart, operator, r, most, threshold):
    """Minimise ‖r − A Q y‖ over y, for Q an orthonormal basis of span(r, A r, A² r, …); `most` is not used.

    Returns:
      The change of x, the number of products, and one round taken.
    """
    eps, beta, restart = epsilon(r.dtype), norm(r), min(restart, r.size)
    product = functools.partial(jnp.matmul, precision="highest")

    # Arnoldi's process extends Q by one vector a product, with A Q = Q₊ H, where Q₊ is Q and the next vector, and H is
    # upper Hessenberg, of one row more than columns. As r = β q₁, ‖r − A Q y‖ = ‖β e₁ − H y‖. Its minimum is the
    # distance of β e₁ from the range of H, whose complement is spanned by the w with wᵀH = 0, w₁ = 1: it is β / ‖w‖.
    # (The rows of the arrays `Q` and the columns of `H` are the vectors.)
    def unfinished(carry):
        _, _, w, j, broken = carry
        return (j < restart) & ~broken & (beta > threshold * norm(w))

    def extend(carry):
        Q, H, w, j, _ = carry
        v = operator(Q[j])
        least = eps * norm(v)
        h = product(Q, v)
        v = v - product(h, Q)
        again = product(Q, v)  # Gram-Schmidt twice: once leaves v orthogonal only up to cancellation
        v, h = v - product(again, Q), h + again
        rest = norm(v)
        broken = ~(rest > 10 * least)  # the Krylov space is invariant, so y is exact there; or v is not finite
        rest = jnp.maximum(rest, jnp.where(least > 0, least, 1))
        Q, H = Q.at[j + 1].set(v / rest), H.at[:, j].set(h.at[j + 1].set(rest))
        w = w.at[j + 1].set(-product(w, h) / rest)  # column j of wᵀH = 0: Σ_{i ≤ j} w_i h_i + w_{j+1} ‖v‖ = 0
        return Q, H, w, j + 1, broken

    Q = jnp.zeros((restart + 1, r.size), r.dtype).at[0].set(r / beta)
    H, w = jnp.zeros((restart + 1, restart), r.dtype), jnp.zeros(restart + 1, r.dtype).at[0].set(1)
    start = (Q, H, w, jnp.asarray(0, jnp.int32), jnp.asarray(False))
    Q, H, w, j, _ = jax.lax.while_loop(unfinished, extend, cast_varying(start, varying_axes(r)))
    # By singular values, since H is singular where A is. Columns that were not reached are zero, and so is their y.
    y = jnp.linalg.lstsq(H, jnp.zeros_like(w).at[0].set(beta))[0]
    return product(y, Q[:-1]), j, 1
