"""Nyström's low-rank approximation, inverted by its eigenvalues."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxhpo._core.mesh import cast_varying, varying_axes
from jaxhpo._core.tree import all_finite, norm
from jaxhpo._core.types import LinearSolver, LinearStatus
from jaxhpo._core.validate import check_settings, require_key
from jaxhpo._linear.iteration import in_rounds
from jaxhpo._linear.report import epsilon, is_accurate, report, residual_of, series_status
from jaxhpo._linear.system import solve_system

_ROUNDS = 10  # of refinement, at most
_product = functools.partial(jnp.matmul, precision="highest")


@dataclasses.dataclass(frozen=True)
class Nystrom(LinearSolver):
    r"""Rank-k approximation of the matrix, inverted exactly, without iteration.

    With a random P×k matrix Ω of orthonormal columns and C = HΩ,
    :math:`H \approx C\,(\Omega^\top C)^{-1} C^\top = U \Lambda U^\top`, U of orthonormal columns, and

    .. math:: (H + \rho I)^{-1} b \approx U (\Lambda + \rho I)^{-1} U^\top b + \tfrac1\rho (b - U U^\top b).

    Woodbury's identity gives the same without eigenvalues, but cancels where ρ is small. At k = P the answer is refined
    as that of `Direct` is, and a residual above :math:`\sqrt\epsilon` is a failure. Below, the report's status is
    MAX_ITERATIONS where the residual is below that of x = 0, otherwise STALLED: ρ is far below the curvatures left out.

    **Cost and bias**: k Hessian products at once, by `vmap`, and :math:`k^2 P` multiplications; memory of k copies of
    the parameters. Exact for the damped matrix when k reaches its rank; the damping biases towards zero along flat
    directions.

    Args:
      rank: k above; cut to the number of parameters.
      damping: ρ above, positive.

    Raises:
      JaxhpoError: a setting out of its range; no `key` was given to `solve`, which draws Ω.

    Example:
      >>> adjoint = jaxhpo.Implicit(jaxhpo.Nystrom(rank=10, damping=0.01))

    References:
      Hataya, Yamada. Nyström Method for Accurate and Scalable Implicit Differentiation. 2023. arXiv:2302.09726
      Frangella, Tropp, Udell. Randomized Nyström Preconditioning. 2021. arXiv:2110.02820
    """

    rank: int
    damping: float
    needs_key: ClassVar[bool] = True
    needs_symmetry: ClassVar[bool] = True

    def __post_init__(self):
        check_settings(self, rank="count", damping="positive")

    def __call__(self, matvec, b, x0=None, key=None):
        """Return `(x, LinearInfo)`; `x0` is not used."""
        solve = functools.partial(_solve, self.rank, self.damping, require_key(key, self))
        return solve_system(matvec, b, None, solve, symmetric=True)


def _solve(rank, damping, key, operator, b, x0):
    eps, rank = epsilon(b.dtype), min(rank, b.size)
    basis = jnp.linalg.qr(jax.random.normal(key, (b.size, rank), b.dtype))[0]  # Ω
    basis = cast_varying(basis, varying_axes(b))
    image = jax.vmap(operator, in_axes=1, out_axes=1)(basis)  # C = HΩ
    U, eigenvalues, ritz = _eigenvectors(basis, image, eps)

    def inverse(r):
        along = _product(U.T, r)
        rest = r - _product(U, along)
        rest = rest - _product(U, _product(U.T, rest))  # again, as 1/ρ multiplies what rounding left of U
        return _product(U, along / (eigenvalues + damping)) + rest / damping

    whole = rank == b.size

    def system(v):
        return operator(v) + damping * v

    curvatures = jnp.abs(eigenvalues + damping)
    bounds = jnp.max(curvatures), 1 / (jnp.min(curvatures) if whole else damping)
    # The eigenvalues of M are Ritz values, which lie between those of H: one at or below −ρ proves that H + ρI is not
    # positive definite.
    indefinite = ritz[0] <= -damping
    if whole:  # an inverse, to be refined

        def correct(operator, r, most, threshold):
            return inverse(r), 0, 1, *bounds

        x, info = in_rounds(correct, system, b, None, _ROUNDS, None, refused=eps**0.5)
        return x, info._replace(num_iterations=jnp.asarray(rank, jnp.int32))
    x = inverse(b)
    residual = residual_of(system, x, b)
    ended = jnp.where(indefinite, LinearStatus.INDEFINITE, series_status(jnp.ones_like(residual), residual))
    limit = jnp.where(is_accurate(residual * norm(b), x, *bounds), eps**0.5, -1)
    return x, report(residual, rank, ended, limit, failed=indefinite | ~all_finite(x))


def _eigenvectors(basis, image, eps):
    """Return U and Λ with C M⁻¹ Cᵀ = U Λ Uᵀ for C = HΩ and M = ΩᵀC, and the eigenvalues of M in ascending order."""
    core = _product(basis.T, image)
    ritz, W = jnp.linalg.eigh((core + core.T) / 2)
    # In the basis Z = ΩW of Ritz vectors M is diagonal. Where a Ritz value is zero or nearly, its quotient is noise, so
    # H is shifted along each vector of Z by ν = ε ‖C‖, away from zero, and the eigenvalues are shifted back.
    size = jnp.linalg.norm(image)
    shift = eps * jnp.where(size > 0, size, 1) * jnp.where(ritz < 0, -1, 1)
    Q, R = jnp.linalg.qr(_product(image, W) + shift[None] * _product(basis, W))
    small = _product(R / (ritz + shift)[None], R.T)
    eigenvalues, V = jnp.linalg.eigh((small + small.T) / 2)
    eigenvalues = jnp.sign(eigenvalues) * jnp.maximum(jnp.abs(eigenvalues) - jnp.abs(shift), 0)
    return _product(Q, V), eigenvalues, ritz
