"""The report of a linear solve: its residual, and the status that follows from it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.mesh import cast_varying, varying_axes
from jaxhpo._core.record import report_truncated
from jaxhpo._core.tree import cast_like, norm
from jaxhpo._core.types import LinearInfo, LinearStatus, PyTree
from jaxhpo._core.validate import check_residual, describe, is_array


def epsilon(dtype) -> float:
    """Return the distance from 1 to the next number: ε of the working precision."""
    return float(jnp.finfo(dtype).eps)


def default_tolerance(dtype, tol=None) -> float:
    """Return `tol`, or ε^¾ of the working precision: 6e-6 in float32, 2e-12 in float64."""
    return epsilon(dtype) ** 0.75 if tol is None else tol


def largest(b) -> jax.Array:
    """Return the largest entry of b in absolute value, or 1 where all are zero or one is NaN."""
    size = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf), initial=0) for leaf in jax.tree.leaves(b)]))
    return jnp.where(size > 0, size, 1)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """aᵀ b of two vectors, elementwise: a `dot_general` would count as a product of matrices."""
    return jnp.sum(a * b)


def relative_norm(a, b) -> jax.Array:
    """Return ‖a‖ / ‖b‖, or ‖a‖ where b = 0.

    Both are divided by the largest entry of b first: squares of very small or large entries would underflow or
    overflow.
    """
    size = largest(b)
    a_norm, b_norm = (norm(jax.tree.map(lambda x: x / size.astype(x.dtype), tree)) for tree in (a, b))
    return a_norm / jnp.where(b_norm > 0, b_norm, 1)


def residual_of(matvec, x, b) -> jax.Array:
    """Return ‖b − A x‖ / ‖b‖. Costs one product with A; free under `jit` when the result is unused."""
    return relative_norm(jax.tree.map(jnp.subtract, b, matvec(x)), b)


def is_accurate(residual, x, size, inverse) -> jax.Array:
    """Return whether the relative error of x is below 1 %, as far as can be told.

    The error is A⁻¹ r, and r itself is known up to the rounding of A x only: ‖e‖ ≤ ‖A⁻¹‖ (‖r‖ + ε ‖A‖ ‖x‖). As the
    norms are bounds from below, this estimate must be below half of that.

    Args:
      residual: ‖r‖ = ‖b − A x‖.
      x: the answer.
      size: a lower bound of ‖A‖.
      inverse: a lower bound of ‖A⁻¹‖; 0 where nothing is known of it.
    """
    length, eps = norm(x), epsilon(jnp.result_type(*jax.tree.leaves(x)))
    return inverse * (residual + eps * size * length) <= 0.005 * length


def first_of(*cases, otherwise) -> jax.Array:
    """Return the status of the first `(condition, status)` whose condition holds, as int32."""
    status = otherwise
    for condition, case in reversed(cases):
        status = jnp.where(condition, case, status)
    return status.astype(jnp.int32)


def report(residual, num_iterations, ended, threshold=None, *, failed) -> LinearInfo:
    """Return the diagnostics of a solve.

    Args:
      residual: ‖b − A x‖ / ‖b‖.
      num_iterations: products taken to get `x`.
      ended: the status where the residual is finite and above the threshold.
      threshold: residual up to which the status is CONVERGED; twice `default_tolerance` when None.
      failed: whether the answer is no solution.
    """
    limit = 2 * default_tolerance(residual.dtype) if threshold is None else threshold
    cases = (~jnp.isfinite(residual), LinearStatus.NOT_FINITE), (residual <= limit, LinearStatus.CONVERGED)
    status = first_of(*cases, otherwise=ended)
    return LinearInfo(residual, jnp.asarray(num_iterations, jnp.int32), status, failed)


def is_right(solve: Callable, b, r, residual, x) -> jax.Array:
    """Return whether the relative error of x is below 1 %, by one more solve: it is A⁻¹ r with r = b − A x.

    For solvers that tell nothing of A⁻¹. Products alone do not: where conjugate gradients to 1e-6 or 1e-5 are wrong in
    float32, the bounds from sixteen more of them see it in 22 of 25 cases, and this in all. Only a status depends on
    it: free under `jit` where that is unused.

    Args:
      solve: right-hand side -> solution.
      b: the right-hand side.
      r: the residual.
      residual: ‖r‖ / ‖b‖.
      x: the answer.
    """
    scale = jnp.where(residual > 0, residual, 1)  # r / scale is as large as b, as tolerances may be absolute
    error = scale * norm(solve(jax.tree.map(lambda leaf: leaf / scale.astype(leaf.dtype), r)))
    length, size = norm(r), norm(jax.tree.map(jnp.subtract, b, r)) / norm(x)
    right = is_accurate(length, x, size, error / jnp.where(length > 0, length, 1))
    return (residual == 0) | ((residual < 1) & right)


def is_confirmed(operator: Callable, solve: Callable, r, x, size) -> jax.Array:
    """Return whether a rough solve for the residual, A e = r, meets no direction in which x may be wrong by 1 %.

    A direction that A nearly maps to zero may leave so small a part in b that no iteration for b meets it; but of what
    is left in r it is a large part, and e then shows the norm of A⁻¹. A direction that A maps to zero within rounding
    says nothing: x is free there, and right wherever b has no part in it, as with the sum of a softmax's intercepts.
    Only a status depends on it: free under `jit` where that is unused.

    Args:
      operator: products with A.
      solve: `r -> (e, whether e tells enough of A⁻¹)`.
      r: the residual.
      x: the answer.
      size: a lower bound of ‖A‖.
    """
    length = norm(r)
    unit = r / jnp.where(length > 0, length, 1)
    e, enough = solve(unit)
    product = operator(e)
    left = unit - product
    zero = epsilon(r.dtype) * size
    null = (norm(product) < zero * norm(e)) | (norm(operator(left)) < zero * norm(left))
    inverse = norm(e) / jnp.where(norm(product) > 0, norm(product), 1)
    return null | (enough & is_accurate(length, x, size, inverse))


def judged(solve: Callable, what: str = "linear_solver") -> Callable:
    """Return `solve(matvec, b, x0) -> (x, report)`, named `what`, with a report in any case, of arrays.

    A report that says whether the solve `failed` is believed, as are those of the library's own solvers; what it leaves
    out is filled in. In another, CONVERGED becomes STALLED where the answer may be wrong by more than 1 %, and where
    there is no status the answer is all there is to judge by.
    """

    def run(matvec, b, x0):
        axes = varying_axes(b)
        # Under `shard_map` what depends on nothing is of another type, and lowering retraces, without such types, what
        # is not in a call.
        call = jax.jit if axes else lambda fn: fn
        cast: Any = jax.jit(functools.partial(cast_varying, axes=axes)) if axes else lambda x: x

        def checked(b, x0):
            x, info = _checked(solve(lambda v: matvec(cast(v)), b, x0), b, what)
            return cast(x), info

        try:
            return call(checked)(b, x0)
        except (TypeError, ValueError) as error:
            if not axes or isinstance(error, JaxhpoError):
                raise
            raise JaxhpoError(
                f"`{what}` raised {type(error).__name__} under `shard_map`, where b varies over the mesh axes "
                f"{sorted(axes)}, as all that its loops carry must: begin with `jnp.zeros_like(b)`, not with "
                "`jnp.zeros(...)`. (`jax.scipy.sparse.linalg.gmres` and `bicgstab`, and lineax's solvers, do not: take "
                "`GMRES()` or `BiCGStab()`.)"
            ) from error

    def judging(matvec, b, x0):
        x, info = run(matvec, b, x0)
        if all(field is not None for field in info):
            return x, _as_arrays(info, b)
        r = jax.tree.map(jnp.subtract, b, matvec(x))
        residual = relative_norm(r, b)
        right = is_right(lambda r: run(matvec, r, None)[0], b, r, residual, x)
        if info.status is None:
            small = residual <= epsilon(residual.dtype) ** 0.5
            ended = first_of((small, LinearStatus.STALLED), otherwise=series_status(jnp.ones_like(residual), residual))
            found = report(residual, 0, ended, jnp.where(right, 1, -1), failed=~(residual < 1))
        else:
            claimed = info.status == LinearStatus.CONVERGED
            failed = (info.status == LinearStatus.INDEFINITE) | (info.status == LinearStatus.NOT_FINITE)
            failed |= claimed & ~(residual < 1)
            found = LinearInfo(residual, 0, jnp.where(claimed & ~right, LinearStatus.STALLED, info.status), failed)
        believed = info if info.failed is not None else LinearInfo(num_iterations=info.num_iterations)
        return x, _as_arrays(LinearInfo(*(f if b is None else b for b, f in zip(believed, found, strict=True))), b)

    return judging


_FIELDS = {"residual": "fiu", "num_iterations": "fiu", "status": "iu", "failed": "biu"}  # kinds of their dtypes


def _checked(out: Any, b: PyTree, what: str) -> tuple[PyTree, LinearInfo]:
    """Return the answer, in the dtypes of b, and the report, whose fields may be None, of a solver named `what`."""
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], LinearInfo | jax.Array | None)):
        raise JaxhpoError(f"`{what}` returned {describe(out)}: write `return x, info`, a `LinearInfo` or None.")
    info = out[1] if isinstance(out[1], LinearInfo) else LinearInfo()
    for (name, kinds), field in zip(_FIELDS.items(), info, strict=True):
        if field is None:
            continue
        if not is_array(field) or jnp.shape(field) or jnp.result_type(field).kind not in kinds:
            raise JaxhpoError(
                f"`{what}` returned a report whose `{name}` is {describe(field)}, but each field is one number: write "
                "`LinearInfo(residual, num_iterations, LinearStatus.CONVERGED)`, with None for what is not known."
            )
    return cast_like(check_residual(out[0], b, what, "b"), b), info


def _as_arrays(info, b):
    dtypes = jnp.result_type(*jax.tree.leaves(b)), jnp.int32, jnp.int32, bool
    return LinearInfo(*map(jnp.asarray, info, dtypes))


def still_falls(before, after) -> jax.Array:
    """Return whether a norm fell by more than a fraction √ε; an iteration that is slower makes no progress."""
    return after < (1 - jnp.finfo(before.dtype).eps ** 0.5) * before


def series_status(last, following) -> jax.Array:
    """Report a truncated series, and return its status, from the norms of its last term and of the first omitted."""
    report_truncated()
    return jnp.where(still_falls(last, following), LinearStatus.MAX_ITERATIONS, LinearStatus.STALLED)
