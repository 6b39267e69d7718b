"""What the rules share that push directions through the whole inner run, instead of a cotangent back through it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.flatten_util import ravel_pytree

from jaxhpo._core.mesh import cast_varying, varying_axes
from jaxhpo._core.tree import is_inexact
from jaxhpo._core.types import InnerState
from jaxhpo._inner.loop import map_in_chunks, run
from jaxhpo._inner.problem import Problem


@dataclasses.dataclass(frozen=True, eq=False)
class _Rule:
    final: Callable[[list], tuple[InnerState, jax.Array]]
    tangent: Callable[[Callable, jax.Array, jax.Array, Any], list]


def run_with_tangent(problem: Problem, tangent: Callable, key: Any = None) -> tuple[InnerState, jax.Array]:
    """Runs the inner problem; its derivative is made from directional derivatives of the whole run.

    Args:
      problem: the inner problem.
      tangent: `(fn, z, dz, key) -> tangent of fn(z) along dz`, linear in dz, so that reverse mode can transpose it. z
        is the vector of all inputs that are being differentiated (initial state, hyperparameters, closed-over values,
        data), and of nothing else: other inputs cost nothing. fn returns the floating-point leaves of the final state.
      key: what `tangent` draws from.

    Returns:
      The final state, and the number of steps taken.
    """
    leaves, structure = jax.tree.flatten((problem.state, problem.inputs, problem.xs))

    def final(leaves):
        state, inputs, xs = jax.tree.unflatten(structure, leaves)
        return run(problem._replace(state=state, inputs=inputs, xs=xs))

    return _attach(_Rule(final, tangent), leaves, key)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attach(rule, leaves, key):
    del key
    return rule.final(leaves)


def _attach_jvp(rule, primals, tangents):
    (leaves, key), (dots, _) = primals, tangents
    # Called through the rule again, so that second derivatives see it too.
    out, structure = jax.tree.flatten(_attach(rule, leaves, key))
    perturbed = [i for i, d in enumerate(dots) if not isinstance(d, SymbolicZero) and is_inexact(leaves[i])]
    z, unravel = ravel_pytree([leaves[i] for i in perturbed])
    dz, _ = ravel_pytree([dots[i] for i in perturbed])

    def final(z):
        every = list(leaves)
        for i, leaf in zip(perturbed, unravel(z), strict=True):
            every[i] = leaf
        return [x for x in jax.tree.leaves(rule.final(every)) if is_inexact(x)]

    moved = iter(rule.tangent(final, z, dz, key))
    out_dots = [next(moved) if is_inexact(x) else np.zeros(x.shape, jax.dtypes.float0) for x in out]
    return jax.tree.unflatten(structure, out), jax.tree.unflatten(structure, out_dots)


_attach.defjvp(_attach_jvp, symbolic_zeros=True)


def push(fn: Callable, z: jax.Array, directions: jax.Array, chunk_size: int | None) -> list:
    """Directional derivatives of `fn` at `z` along each row of `directions`, `chunk_size` of them at a time."""
    directions = cast_varying(directions, varying_axes(z))

    def along(v):
        return jax.jvp(fn, (z,), (v,))[1]

    return map_in_chunks(along, directions, chunk_size)


def weighted_sum(weights: jax.Array, columns: list) -> list:
    """Σ_k weights[k] columns[k]: linear in the weights."""
    return [jnp.tensordot(weights.astype(c.dtype), c, axes=1) for c in columns]
