"""Limits of a derivative rule: inputs and results that are constants to it, second derivatives, forward mode."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.extend import core as jex
from jax.interpreters import ad, batching, mlir

from jaxhpo._core.errors import JaxhpoError, ZeroHypergradientWarning, warn
from jaxhpo._core.trace import REVERSE_ONLY, trust
from jaxhpo._core.tree import has_derivative, is_inexact, partition
from jaxhpo._core.types import PyTree


def warn_zero(leaf: str, message: str, partial: bool = False) -> None:
    """Issues a `ZeroHypergradientWarning`."""
    warn(ZeroHypergradientWarning(f"{leaf} {message}", leaf, partial))


def warn_perturbed(leaf_names: list[str], perturbed: PyTree, message: str, partial: bool = False) -> None:
    """Issues one `ZeroHypergradientWarning` for all leaves that are perturbed; it names the first."""
    found = [name for name, m in zip(leaf_names, jax.tree.leaves(perturbed), strict=True) if m]
    if found:
        more = f"(and {len(found) - 1} more leaves) " if len(found) > 1 else ""
        warn_zero(found[0], more + message, partial)


def stop_gradient_with_warning(
    tree: PyTree, leaf_names: list[str], message: str, partial: bool = False, inputs: PyTree = None
) -> PyTree:
    """`stop_gradient(tree)`, with one `ZeroHypergradientWarning` where the tree is perturbed.

    Args:
      tree: any pytree of arrays.
      leaf_names: the name of every leaf of the tree; with `inputs`, one name for the tree as a whole.
      message: the rest of the warning, after the name of the first perturbed leaf.
      partial: as in `ZeroHypergradientWarning`.
      inputs: what the tree was computed from, where its gradient has been stopped before: the warning is issued where
        any of these is perturbed.
    """
    leaves, structure = jax.tree.flatten(jax.lax.stop_gradient(tree))
    if not any(map(is_inexact, leaves)):
        return tree

    def warn(perturbed):
        warn_perturbed(leaf_names, perturbed if inputs is None else [any(perturbed)], message, partial)

    leaves = _stopped(warn, leaves, jax.tree.leaves(tree if inputs is None else inputs))
    # The rule returns arrays of zeros as tangents; this `stop_gradient` makes them symbolic.
    return jax.lax.stop_gradient(jax.tree.unflatten(structure, leaves))


@trust
@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _stopped(warn, leaves, inputs):
    return leaves


def _stopped_jvp(warn, primals, tangents):
    leaves, inputs = primals
    warn([has_derivative(x) and not isinstance(dot, SymbolicZero) for x, dot in zip(inputs, tangents[1], strict=True)])
    zeros = [jnp.zeros_like(x) if is_inexact(x) else np.zeros(x.shape, jax.dtypes.float0) for x in leaves]
    return leaves, zeros


_stopped.defjvp(_stopped_jvp, symbolic_zeros=True)


# --- constant results -------------------------------------------------------------------------------------------------

_blind = jex.Primitive("jaxhpo_blind")  # the tangents, zero, of results that are constants; tells which are read


@trust
@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def watch_constants(warn: Callable, leaves: list, inputs: list) -> list:
    """Identity on floating-point leaves that may be constants to a derivative; tells where one is taken.

    Args:
      warn: called with one flag for each of the inputs, whether it is perturbed. Returns one for each leaf, whether it
        is then a constant, and a function that is called with one for each of these constants, whether something that
        is being differentiated reads it. Forward mode cannot tell, and says yes.
      leaves: what is read.
      inputs: what the leaves were computed from.
    """
    return leaves


def _watch_jvp(warn, primals, tangents):
    leaves, inputs = primals
    pairs = zip(inputs, tangents[1], strict=True)
    perturbed = [has_derivative(x) and not isinstance(dot, SymbolicZero) for x, dot in pairs]
    dots = [jnp.zeros_like(x) if isinstance(d, SymbolicZero) else d for x, d in zip(leaves, tangents[0], strict=True)]
    constant, warn_of_read = warn(perturbed)
    if any(constant):
        # One tangent ties the constants to what is perturbed, so that reverse mode comes by.
        tie, where = tangents[1][perturbed.index(True)], [i for i, m in enumerate(constant) if m]
        types = tuple(jax.typeof(leaves[i]) for i in where)
        for i, dot in zip(where, _blind.bind(tie, types=types, warn=warn_of_read), strict=True):
            dots[i] = dot
    return leaves, dots


def _blind_zeros(dot, types, warn):
    warn([True] * len(types))
    return [jnp.zeros(t.shape, t.dtype) for t in types]


def _blind_jvp(primals, tangents, **params):
    out = _blind.bind(*primals, **params)
    return out, [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in out]


def _blind_transpose(cotangents, dot, types, warn):
    warn([not isinstance(c, ad.Zero) for c in cotangents])
    return [None]  # a symbolic zero: nothing is added


watch_constants.defjvp(_watch_jvp, symbolic_zeros=True)
_blind.multiple_results = True
_blind.def_impl(_blind_zeros)
_blind.def_abstract_eval(lambda dot, types, warn: types)
ad.primitive_jvps[_blind] = _blind_jvp
ad.primitive_transposes[_blind] = _blind_transpose
batching.primitive_batchers[_blind] = lambda x, axes, types, **params: (
    _blind.bind(*x, types=types, **params),
    [None] * len(types),
)
mlir.register_lowering(_blind, mlir.lower_fun(_blind_zeros, multiple_results=True))


@trust
@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def first_order(tree: PyTree, rule: Any) -> PyTree:
    """Identity that raises when differentiated; marks the derivative rules of first order."""
    return tree


@first_order.defjvp
def _first_order_jvp(rule, primals, tangents):
    raise JaxhpoError(
        f"A second derivative was asked of `{rule!r}` (a Hessian, or a solve nested in another's train loss), but its "
        "backward pass is not differentiable: use `Unroll()` or `Implicit(CG())` there."
    )


# --- forward mode -----------------------------------------------------------------------------------------------------
#
# A `custom_vjp` hands its tangents to a linear operation that JAX transposes in reverse mode and evaluates in forward
# mode, where it raises an error of its own. An operation of ours before it is transposed, or evaluated first, alike.

_identity, _tangent = jex.Primitive(REVERSE_ONLY), jex.Primitive("jaxhpo_reverse_only_tangent")


def reverse_only(tree: PyTree, what: str) -> PyTree:
    """Identity that raises in forward mode, for the arguments of a `custom_vjp`; `what` is named in the message."""
    leaves, combine = partition(tree, jax.tree.map(is_inexact, tree))
    return combine(_identity.bind(*leaves, what=what))


def _identity_jvp(primals, tangents, what):
    # The values are not guarded again: forward over reverse mode, as in a Hessian, is right.
    dots = [dot if isinstance(dot, ad.Zero) else _tangent.bind(dot, what=what) for dot in tangents]
    return list(primals), dots


def _refuse(*_, what: str):
    raise JaxhpoError(
        f"Forward mode (`jax.jvp`, `jax.linearize`, `jax.jacfwd`) was asked of {what}, which has reverse mode alone: "
        "write `adjoint=Forward()`, or `jax.grad`. (`jax.jacfwd(jax.grad(f))` takes reverse mode first.)"
    )


_identity.multiple_results = True
_identity.def_impl(lambda *xs, what: xs)
_identity.def_abstract_eval(lambda *xs, what: xs)
ad.primitive_jvps[_identity] = _identity_jvp
batching.primitive_batchers[_identity] = lambda xs, axes, what: (_identity.bind(*xs, what=what), axes)
mlir.register_lowering(_identity, lambda context, *xs, what: xs)

_tangent.def_impl(_refuse)
_tangent.def_abstract_eval(lambda x, what: x)
ad.deflinear2(_tangent, lambda cotangent, x, what: [cotangent])
batching.primitive_batchers[_tangent] = _refuse
mlir.register_lowering(_tangent, _refuse)
