"""Any solver of the lineax library."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.types import LinearSolver, LinearStatus
from jaxhpo._linear.report import default_tolerance, report, residual_of
from jaxhpo._linear.system import solve_system


@dataclasses.dataclass(frozen=True)
class FromLineax(LinearSolver):
    """A lineax solver in the form of ours; made by `from_lineax`."""

    solver: Any

    @property
    def needs_symmetry(self) -> bool:
        """Whether the solver takes symmetric positive definite matrices only."""
        return type(self.solver).__name__ in ("CG", "Cholesky")

    def __call__(self, matvec, b, x0=None):
        """Returns `(x, LinearInfo)`; a failure is reported, not raised."""
        import lineax

        tags = lineax.positive_semidefinite_tag if self.needs_symmetry else ()

        def solve(operator, b, x0):
            wrapped = lineax.FunctionLinearOperator(operator, jax.eval_shape(lambda: b), tags)
            options = {} if x0 is None else {"y0": x0}
            solution = lineax.linear_solve(wrapped, b, self.solver, options=options, throw=False)
            x, result = solution.value, solution.result
            ended = jnp.where(
                result == lineax.RESULTS.max_steps_reached, LinearStatus.MAX_ITERATIONS, LinearStatus.STALLED
            )
            # A factorisation, which counts no steps, always thinks itself successful; an iteration has its tolerances.
            half = float(jnp.finfo(b.dtype).eps) ** 0.5
            well = 1 - half if "num_steps" in solution.stats else half
            limit = jnp.where(result == lineax.RESULTS.successful, well, 2 * default_tolerance(b.dtype))
            num_steps = solution.stats.get("num_steps", b.size)
            info = report(residual_of(operator, x, b), num_steps, ended, limit)
            # lineax's `CG` takes NaN products for convergence, at the zeros it started from.
            return jnp.where(info.status == LinearStatus.NOT_FINITE, jnp.nan, x), info

        return solve_system(matvec, b, x0, solve, symmetric=self.needs_symmetry)


def from_lineax(solver: Any) -> FromLineax:
    r"""Lets a lineax solver solve for the implicit derivative.

    Matrices are given by their products, so solvers that need entries (`LU`, `QR`) build them, P products. `CG` is told
    that the matrix is positive definite. The right-hand side is scaled to a largest entry of one, so `atol` is relative
    to that. Status CONVERGED where lineax says so and the residual is below that of x = 0 (for `LU` and other
    factorisations, below :math:`\sqrt\epsilon`); MAX_ITERATIONS where it used up its `max_steps`; NOT_FINITE where its
    answer is not; STALLED otherwise. Not for use inside `jax.shard_map`.

    **Cost and bias**: the solver's.

    Args:
      solver: a lineax solver such as `lineax.GMRES(rtol=1e-6, atol=1e-6)`.

    Returns:
      A linear solver for `Implicit`.

    Raises:
      JaxhpoError: this is no lineax solver.

    Example:
      >>> import lineax
      >>> adjoint = jaxhpo.Implicit(jaxhpo.from_lineax(lineax.GMRES(rtol=1e-6, atol=1e-6)))

    References:
      Rader, Lyons, Kidger. Lineax: unified linear solves and linear least-squares in JAX and Equinox. 2023.
      arXiv:2311.17283
    """
    if isinstance(solver, type) or not hasattr(solver, "compute"):
        raise JaxhpoError(
            f"`from_lineax` got {solver!r}, which is no lineax solver: write `from_lineax(lineax.CG(rtol=1e-6, "
            "atol=1e-6))`."
        )
    return FromLineax(solver)
