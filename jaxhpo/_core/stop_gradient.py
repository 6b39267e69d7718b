"""Inputs that a rule treats as constants: `stop_gradient` with a warning, and an error for a second derivative."""

from __future__ import annotations

import functools
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from jaxhpo._core.errors import JaxhpoError, ZeroHypergradientWarning
from jaxhpo._core.tree import is_inexact
from jaxhpo._core.types import PyTree


def warn_zero(leaf: str, message: str, partial: bool = False) -> None:
    """Issues a `ZeroHypergradientWarning`, at the line of the caller's own code."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in ("jaxhpo", "jax", "contextlib"):
        level, frame = level + 1, frame.f_back
    warnings.warn(ZeroHypergradientWarning(f"{leaf} {message}", leaf, partial), stacklevel=level)


def constant(tree: PyTree, leaf_names: list[str], message: str, partial: bool = False) -> PyTree:
    """`stop_gradient` that says so: warns, once, of the leaves that are being differentiated, and only of them."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.lax.stop_gradient(jax.tree.unflatten(structure, _constant(_Mark(leaf_names, message, partial), leaves)))


class _Mark:
    def __init__(self, leaf_names, message, partial):
        self.names, self.message, self.partial = leaf_names, message, partial


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _constant(mark, leaves):
    return leaves


def _constant_jvp(mark, primals, tangents):
    (leaves,), (dots,) = primals, tangents
    perturbed = [
        name
        for name, x, d in zip(mark.names, leaves, dots, strict=True)
        if is_inexact(x) and not isinstance(d, SymbolicZero)
    ]
    if perturbed:
        more = f" (and {len(perturbed) - 1} more leaves)" if len(perturbed) > 1 else ""
        warn_zero(perturbed[0], more.lstrip() + " " * bool(more) + mark.message, mark.partial)
    return leaves, _zero_tangents(leaves)


def _zero_tangents(leaves):
    return [jnp.zeros_like(x) if is_inexact(x) else np.zeros(x.shape, jax.dtypes.float0) for x in leaves]


_constant.defjvp(_constant_jvp, symbolic_zeros=True)


def blind(tree: PyTree, inputs: PyTree, message: str) -> PyTree:
    """`stop_gradient` of a model state that depends on `inputs`: warns, once, where they are being differentiated."""
    leaves, structure = jax.tree.flatten(jax.lax.stop_gradient(tree))
    if not any(map(is_inexact, leaves)):
        return tree
    leaves = _blind(_Mark(["model_state"], message, False), leaves, jax.tree.leaves(inputs))
    return jax.lax.stop_gradient(jax.tree.unflatten(structure, leaves))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _blind(mark, leaves, inputs):
    return leaves


def _blind_jvp(mark, primals, tangents):
    if any(not isinstance(d, SymbolicZero) for d in tangents[1]):
        warn_zero(mark.names[0], mark.message)
    return primals[0], _zero_tangents(primals[0])


_blind.defjvp(_blind_jvp, symbolic_zeros=True)


def first_order(tree, rule):
    """The tree itself; raises where it is differentiated: for the backward pass of rules that go no further."""
    return _first_order(repr(rule), tree)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _first_order(rule, tree):
    return tree


def _first_order_jvp(rule, primals, tangents):
    if any(not isinstance(dot, SymbolicZero) for dot in jax.tree.leaves(tangents)):
        raise JaxhpoError(
            f"A second derivative was asked of `{rule}` (a Hessian, or a solve nested in another's train loss), but "
            f"its backward pass is not differentiable: use `Unroll()` or `Implicit(CG())` there."
        )
    raise AssertionError("a custom rule was asked for the derivative of constants")


_first_order.defjvp(_first_order_jvp, symbolic_zeros=True)
