"""Derivatives of the inner run along directions of its inputs, shared by `Forward`, `ForwardGradient`, `Smoothing`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.flatten_util import ravel_pytree

from jaxhpo._core.mesh import cast_varying, varying_axes
from jaxhpo._core.tree import is_inexact, map_in_chunks, partition
from jaxhpo._core.types import InnerState
from jaxhpo._inner.inputs import refuse_tol
from jaxhpo._inner.loop import run
from jaxhpo._inner.problem import Problem


def run_with_tangent(
    problem: Problem, adjoint: Any, tangent: Callable, *, random: bool = False
) -> tuple[InnerState, jax.Array]:
    """Runs the inner problem, with a tangent that is computed from runs of the whole inner problem.

    Args:
      problem: the inner problem, without `tol`.
      adjoint: the rule, for messages.
      tangent: `(fn, z, dz, key) -> tangent of fn(z) along dz`, linear in dz, so that reverse mode can transpose it. z
        is the vector of all perturbed inputs (initial state, hyperparameters, closed-over values, data); inputs that
        are not perturbed cost nothing. fn returns the floating-point leaves of the final state.
      random: whether `tangent` needs the key that was given to `solve`; otherwise it gets None.

    Returns:
      The final state, and the number of steps taken.
    """
    refuse_tol(problem, adjoint)
    key = problem.require_key(adjoint) if random else None

    def final(inputs):
        state, own, xs = inputs
        return run(problem._replace(state=state, inputs=own, xs=xs))

    return _with_tangent(final, tangent, (problem.state, problem.inputs, problem.xs), key)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _with_tangent(final, tangent, inputs, _key):
    return final(inputs)


def _with_tangent_jvp(final, tangent, primals, tangents):
    # θ_T = Θ(z) with z the perturbed leaves as one vector; the tangent is θ̇_T = Θ'(z) ż, or an estimate of it.
    (inputs, key), (dots, _) = primals, tangents
    # θ_T itself is computed by this same rule, so that second derivatives use the rule too.
    out = _with_tangent(final, tangent, inputs, key)
    perturbed = jax.tree.map(lambda x, d: is_inexact(x) and not isinstance(d, SymbolicZero), inputs, dots)
    leaves, combine = partition(inputs, perturbed)
    z, unravel = ravel_pytree(leaves)
    dz, _ = ravel_pytree(partition(dots, perturbed)[0])
    floats = jax.tree.map(is_inexact, out)

    def fn(z):  # Θ
        return partition(final(combine(unravel(z))), floats)[0]

    # Integer leaves of the result have tangents of type float0.
    _, combine_dots = partition(jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), out), floats)
    return out, combine_dots(tangent(fn, z, dz, key))


_with_tangent.defjvp(_with_tangent_jvp, symbolic_zeros=True)


def push(fn: Callable, z: jax.Array, directions: jax.Array, chunk_size: int | None) -> list:
    """Directional derivatives Θ'(z) v_k of `fn` at `z`, one per row v_k of `directions`, `chunk_size` at a time."""
    return map_in_chunks(lambda v: jax.jvp(fn, (z,), (v,))[1], cast_varying(directions, varying_axes(z)), chunk_size)


def weighted_sum(weights: jax.Array, columns: list) -> list:
    """Σ_k weights[k] columns[k], which is linear in the weights."""
    return [jnp.tensordot(weights.astype(c.dtype), c, axes=1) for c in columns]
