"""Adapter for solvers of the lineax library."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.tree import norm
from jaxhpo._core.types import LinearSolver, LinearStatus
from jaxhpo._linear.report import default_tolerance, epsilon, is_accurate, is_right, relative_norm, report
from jaxhpo._linear.system import solve_system


@dataclasses.dataclass(frozen=True)
class from_lineax(LinearSolver):  # noqa: N801  (reads, and prints, as the function that the user calls)
    r"""A lineax solver as the linear solver of `Implicit`.

    The matrix is given by its products, so solvers that need entries (`LU`, `QR`) build them with P products. For `CG`
    and `Cholesky` it is tagged as positive semi-definite. The right-hand side is scaled to a largest entry of one, so
    `atol` is relative to that. The status is CONVERGED where lineax reports success, the residual is below that of
    x = 0 (for `LU` and other factorisations, below :math:`\sqrt\epsilon`), and the error is estimated below 1 %;
    MAX_ITERATIONS where it reached its `max_steps`; NOT_FINITE where its answer is not finite; STALLED otherwise. Does
    not work inside `jax.shard_map`.

    **Cost and bias**: the solver's; and once more for the error where the status is read, as it is not under `jit` of
    plain `jax.grad`.

    Args:
      solver: a lineax solver such as `lineax.GMRES(rtol=1e-6, atol=1e-6)`.

    Raises:
      JaxhpoError: not a lineax solver.

    Example:
      >>> import lineax
      >>> adjoint = jaxhpo.Implicit(jaxhpo.from_lineax(lineax.GMRES(rtol=1e-6, atol=1e-6)))

    References:
      Rader, Lyons, Kidger. Lineax: unified linear solves and linear least-squares in JAX and Equinox. 2023.
      arXiv:2311.17283
    """

    solver: Any

    def __post_init__(self):
        if isinstance(self.solver, type) or not hasattr(self.solver, "compute"):
            raise JaxhpoError(
                f"`from_lineax` got {self.solver!r}, which is not a lineax solver: write "
                "`from_lineax(lineax.CG(rtol=1e-6, atol=1e-6))`."
            )

    @property
    def needs_symmetry(self) -> bool:
        """True where the solver takes symmetric positive definite matrices only."""
        return type(self.solver).__name__ in ("CG", "Cholesky")

    def __call__(self, matvec, b, x0=None):
        """Return `(x, LinearInfo)`; a failure is reported, not raised."""
        import lineax

        tags = lineax.positive_semidefinite_tag if self.needs_symmetry else ()

        def solve(operator, b, x0):
            wrapped = lineax.FunctionLinearOperator(operator, jax.eval_shape(lambda: b), tags)
            options = {} if x0 is None else {"y0": x0}
            state = self.solver.init(wrapped, options)
            run = functools.partial(lineax.linear_solve, wrapped, solver=self.solver, state=state, throw=False)
            solution = run(b, options=options)
            x, result = solution.value, solution.result
            exhausted = result == lineax.RESULTS.max_steps_reached
            ended = jnp.where(exhausted, LinearStatus.MAX_ITERATIONS, LinearStatus.STALLED)
            # A success of an iteration is one by its own tolerances, if the residual is below that of x = 0 and one
            # more solve, with the residual on the right, finds the error small. A factorisation, which counts no steps,
            # always reports success: the errors of b and of a second right-hand side without structure, by the residual
            # and by the growth from A to A⁻¹, tell if it was one.
            half, r = epsilon(b.dtype) ** 0.5, b - operator(x)
            residual = relative_norm(r, b)
            if "num_steps" in solution.stats:
                right, most = is_right(lambda r: run(r).value, b, r, residual, x), 1 - half
            else:
                u = jnp.cos(jnp.arange(b.size, dtype=b.dtype))
                size, inverse = norm(operator(u)) / norm(u), norm(run(u).value) / norm(u)
                right, most = is_accurate(residual * norm(b), x, size, inverse), half
            limit = jnp.where(result == lineax.RESULTS.successful, most, 2 * default_tolerance(b.dtype))
            limit = jnp.where(right, limit, -1)
            steps = solution.stats.get("num_steps", b.size)
            info = report(residual, steps, ended, limit, failed=~exhausted & ~(residual <= most))
            # lineax's `CG` reports success on NaN products, at the zeros it started from. Not by the status: the second
            # solve is free where that is unused.
            return jnp.where(jnp.isfinite(residual), x, jnp.nan), info

        return solve_system(matvec, b, x0, solve, symmetric=self.needs_symmetry)
