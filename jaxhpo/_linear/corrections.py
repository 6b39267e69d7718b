"""Corrections for iterative refinement: what d, with A d ≈ r, is added to x in one round of `in_rounds`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import lu_factor, lu_solve

from jaxhpo._core.mesh import cast_varying, varying_axes
from jaxhpo._core.tree import map_in_chunks, norm
from jaxhpo._core.types import LinearStatus
from jaxhpo._linear.iteration import RUNNING, Best, descend, loop
from jaxhpo._linear.report import dot, epsilon, first_of

_PATIENCE = 100  # iterations without a new best


def minimal_residual(restart, operator, r, most, threshold):
    """Minimise ‖r − A Q y‖ over y, for Q an orthonormal basis of span(r, A r, A² r, …).

    Returns:
      The change of x, the number of products, one round taken, and the bounds of ‖A‖ and ‖A⁻¹‖.
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
    y, _, _, values = jnp.linalg.lstsq(H, jnp.zeros_like(w).at[0].set(beta), rcond=eps)
    # ‖A Q y‖ = ‖H y‖ for all y, and ‖Q y‖ = ‖y‖: the singular values of H are between those of A.
    return product(y, Q[:-1]), j, 1, values[0], jnp.where(j > 0, 1 / values[j - 1], 0)


def stabilised(operator, r, most, threshold):
    """Run the recurrence of BiCGStab from residual r."""
    shadow = r  # r̂: any vector with r̂ᵀr ≠ 0

    def iterate(carry):
        x, r, p, best, since, k, _ = carry
        v = operator(p)
        rho = dot(shadow, r)
        alpha = _ratio(rho, dot(shadow, v))  # makes s = r − α A p orthogonal to r̂
        s = r - alpha * v
        t = operator(s)
        omega = _ratio(dot(t, s), dot(t, t))  # minimises ‖s − ω A s‖
        x, r = x + alpha * p + omega * s, s - omega * t
        residual, rho_new = norm(r), dot(shadow, r)
        inverse = jnp.maximum(_ratio(norm(p), norm(v)), _ratio(norm(s), norm(t)))
        better = best.update(x, residual, norm(v) / norm(p), inverse)  # ‖A‖ ≥ ‖A p‖ / ‖p‖ ≥ 1 / ‖A⁻¹‖
        since = jnp.where(better.bound < best.bound, 0, since + 1)
        # At its goal or its rounding error, without progress, or at a breakdown, where no next direction exists.
        done = (residual <= jnp.maximum(better.rounding, threshold)) | (since >= _PATIENCE)
        done |= (alpha == 0) | (omega == 0) | (rho_new == 0) | ~jnp.isfinite(residual)
        # The next direction is p₊ = r + β (p − ω A p), where β = (ρ₊/ρ) (α/ω) is that of BiCG in terms of ρ = r̂ᵀr.
        p = r + _ratio(rho_new * alpha, rho * omega) * (p - omega * v)
        return x, r, p, better, since, k + 1, first_of((done, LinearStatus.STALLED), otherwise=RUNNING)

    x, zero = jnp.zeros_like(r), jnp.zeros_like(norm(r))
    start = (x, r, r, Best(x, norm(r), zero, zero, zero), jnp.asarray(0, jnp.int32))
    _, r_last, _, best, _, k, _ = loop(iterate, start, r, threshold, most)
    sound = jnp.isfinite(norm(r_last)) | (best.bound < norm(r))  # otherwise NaN, not the zeros it started from
    return jnp.where(sound, best.x, jnp.nan), 2 * k, k, best.size, best.inverse


def _ratio(a, b):
    """Return a / b, or 0 where b = 0."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


def normal_equations(operator: Callable, r: jax.Array, most: Any, threshold: jax.Array):
    """Run conjugate gradients on AᵀA d = Aᵀ r."""
    transpose = jax.linear_transpose(operator, r)
    x, _, best, _, k, _ = descend(lambda v: transpose(operator(v))[0], transpose(r)[0], None, most, None)
    return x, 2 * k, k, best.size**0.5, best.inverse**0.5


def factorised(operator: Callable, b: jax.Array, chunk: int | None = None) -> Callable:
    """Factorise A once, its columns made `chunk` at a time, and return the correction by its triangular factors."""
    basis = cast_varying(jnp.eye(b.size, dtype=b.dtype), varying_axes(b))
    matrix = map_in_chunks(operator, basis, chunk).T  # column i is A eᵢ
    factors = lu_factor(matrix)
    # ‖A⁻¹ u‖ for a u without structure, and from there one step of the power iteration for the largest ‖A⁻ᵀ v‖.
    u = cast_varying(jnp.cos(jnp.arange(b.size, dtype=b.dtype)), varying_axes(b))
    v = lu_solve(factors, u / norm(u))
    bounds = jnp.max(jnp.linalg.norm(matrix, axis=0)), norm(lu_solve(factors, v / norm(v), trans=1))

    def correct(operator, r, most, threshold):
        return lu_solve(factors, r), 0, 1, *bounds

    return correct
