"""Nyström's low-rank approximation, inverted by Woodbury's identity."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxhpo._core.mesh import cast_varying, varying_axes
from jaxhpo._core.types import LinearSolver, LinearStatus
from jaxhpo._core.validate import check_settings, require_key
from jaxhpo._linear.report import epsilon, report, residual_of, series_status
from jaxhpo._linear.system import damped


@dataclasses.dataclass(frozen=True)
class Nystrom(LinearSolver):
    r"""Rank-k approximation of the matrix, inverted exactly, without iteration.

    With a random P×k matrix Ω of orthonormal columns and C = HΩ, :math:`H \approx C\,(\Omega^\top C)^{-1} C^\top`, and
    by Woodbury's identity

    .. math:: (H + \rho I)^{-1} b \approx \tfrac1\rho\big(b - C(\rho\,\Omega^\top C + C^\top C)^{-1} C^\top b\big).

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
    """

    rank: int
    damping: float
    needs_key: ClassVar[bool] = True
    needs_symmetry: ClassVar[bool] = True

    def __post_init__(self):
        check_settings(self, rank="count", damping="positive")

    def __call__(self, matvec, b, x0=None, key=None):
        """Return `(x, LinearInfo)`; `x0` is not used."""
        flat, unravel = ravel_pytree(b)
        rank, product = min(self.rank, flat.size), functools.partial(jnp.matmul, precision="highest")
        basis = jnp.linalg.qr(jax.random.normal(require_key(key, self), (flat.size, rank), flat.dtype))[0]  # Ω
        basis = cast_varying(basis, varying_axes(b))
        image = jax.vmap(lambda v: ravel_pytree(matvec(unravel(v)))[0], in_axes=1, out_axes=1)(basis)  # C = HΩ
        # With M = ΩᵀC = ΩᵀHΩ, H ≈ C M⁻¹ Cᵀ, and Woodbury's identity gives
        #     (ρI + C M⁻¹ Cᵀ)⁻¹ = (I − C (ρM + CᵀC)⁻¹ Cᵀ) / ρ.
        core = product(basis.T, image)
        small = self.damping * core + product(image.T, image)
        # The pseudo-inverse, since ρM + CᵀC is singular where the rank of H is below k. Symmetrised against rounding.
        inverse = jnp.linalg.pinv((small + small.T) / 2, hermitian=True)
        x = unravel((flat - product(image, product(inverse, product(image.T, flat)))) / self.damping)
        # The eigenvalues of M are Ritz values, which lie between those of H: one at or below −ρ proves that H + ρI is
        # not positive definite.
        indefinite = jnp.linalg.eigvalsh(jax.lax.stop_gradient(core + core.T) / 2)[0] <= -self.damping
        residual = residual_of(damped(matvec, self.damping), x, b)
        ended = jnp.where(indefinite, LinearStatus.INDEFINITE, series_status(jnp.ones_like(residual), residual))
        return x, report(residual, rank, ended, threshold=epsilon(flat.dtype) ** 0.5)
