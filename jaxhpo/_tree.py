"""Pytree algebra, names of leaves, hoisting of closed-over values, and casts between varying-axes types."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend import core as jex

from jaxhpo._errors import ZeroHypergradientWarning
from jaxhpo._types import PyTree

# --- algebra -----------------------------------------------------------------------------------------------------


def vdot(a: PyTree, b: PyTree) -> jax.Array:
    """Sum of the products of all entries."""
    return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)))


def norm(a: PyTree) -> jax.Array:
    """Euclidean norm over all entries."""
    return jnp.sqrt(vdot(a, a))


def add_scaled(a: PyTree, scale, b: PyTree) -> PyTree:
    """a + scale · b."""
    return jax.tree.map(lambda x, y: x + scale * y, a, b)


def scaled(scale, a: PyTree) -> PyTree:
    """scale · a."""
    return jax.tree.map(lambda x: scale * x, a)


def zeros_like(a: PyTree) -> PyTree:
    """A tree of zeros of the same shapes and types."""
    return jax.tree.map(jnp.zeros_like, a)


def is_inexact(x) -> bool:
    """Whether a leaf is floating-point or complex, so that it can have a derivative."""
    return jnp.issubdtype(jnp.result_type(x) if not hasattr(x, "dtype") else x.dtype, jnp.inexact)


def all_finite(a: PyTree) -> jax.Array:
    """Whether every floating-point entry is finite."""
    checks = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(a) if is_inexact(x)]
    return functools.reduce(jnp.logical_and, checks, jnp.asarray(True))


def upcast(a: PyTree) -> PyTree:
    """float16 and bfloat16 leaves as float32; others unchanged."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if is_inexact(x) and x.dtype.itemsize < 4 else x, a)


def cast_like(a: PyTree, like: PyTree) -> PyTree:
    """Floating-point leaves of `a` in the types of `like`: optimiser states keep their types under traced settings."""

    def cast(x, y):
        both_float = is_inexact(x) and is_inexact(y) and not jnp.iscomplexobj(x)
        return x.astype(y.dtype) if both_float and x.dtype != y.dtype else x

    return jax.tree.map(cast, a, like)


def names(tree: PyTree, root: str) -> list[str]:
    """The path of every leaf, as a user would write it: `hparams['log_lr']`."""
    return [root + jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


# --- closures ----------------------------------------------------------------------------------------------------


def hoist(fn: Callable, *args) -> tuple[Callable, list]:
    """Returns `pure, consts` with `pure(consts, *args) == fn(*args)` and nothing closed over.

    Every array that `fn` closes over, tracer or not, of any type, becomes an explicit argument. (A loss that closes
    over a differentiated value would otherwise get a silent zero from a custom derivative rule;
    `jax.closure_convert` hoists only floating-point tracers.)
    """
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    structure = jax.tree.structure(shape)

    def pure(consts, *args):
        leaves = jex.jaxpr_as_fun(jex.ClosedJaxpr(closed.jaxpr, consts))(*jax.tree.leaves(args))
        return jax.tree.unflatten(structure, leaves)

    return pure, list(closed.consts)


def differentiable_inputs(fn: Callable, leaves: list) -> list[bool]:
    """For each floating-point leaf, whether the derivative of `fn(leaves)` with respect to it can be non-zero.

    Structural: the transposed derivative is traced, and a leaf counts when its cotangent depends on anything at all
    (a leaf that `fn` ignores, or stops the gradient of, gets a constant zero).
    """

    def backward(leaves, one):
        # `one` marks the cotangents: a result depends on it exactly when it is not a structural zero.
        out, pullback = jax.vjp(fn, leaves)
        return pullback(jax.tree.map(lambda x: jnp.ones_like(x) * one.astype(x.dtype), out))[0]

    closed = jax.make_jaxpr(backward)(leaves, jnp.ones(()))
    reached = set(closed.jaxpr.invars[-1:])
    for eqn in closed.jaxpr.eqns:
        if any(not isinstance(v, jex.Literal) and v in reached for v in eqn.invars):
            reached.update(eqn.outvars)
    return [not isinstance(v, jex.Literal) and v in reached for v in closed.jaxpr.outvars]


# --- inputs that a rule treats as constants ------------------------------------------------------------------------


def warn_zero(leaf: str, message: str, partial: bool = False) -> None:
    """Issues a `ZeroHypergradientWarning`."""
    warnings.warn(ZeroHypergradientWarning(f"{leaf} {message}", leaf, partial), stacklevel=2)


def constant(tree: PyTree, leaf_names: list[str], message: str, partial: bool = False) -> PyTree:
    """`stop_gradient` that says so: warns for each leaf that is being differentiated, and only then."""
    leaves, structure = jax.tree.flatten(tree)
    marked = [
        _constant(_Mark(name, message, partial), x) if is_inexact(x) else x
        for name, x in zip(leaf_names, leaves, strict=True)
    ]
    return jax.lax.stop_gradient(jax.tree.unflatten(structure, marked))


class _Mark:
    def __init__(self, *args):
        self.args = args


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _constant(mark, x):
    return x


def _constant_jvp(mark, primals, tangents):
    if not isinstance(tangents[0], SymbolicZero):
        warn_zero(*mark.args)
    return primals[0], jnp.zeros_like(primals[0])


_constant.defjvp(_constant_jvp, symbolic_zeros=True)


# --- varying axes (`shard_map`) --------------------------------------------------------------------------------------


def varying_axes(tree: PyTree) -> frozenset:
    """Mesh axes of an enclosing `shard_map` over which any leaf differs from device to device."""
    axes = frozenset()
    for leaf in jax.tree.leaves(tree):
        kind = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
        # The attribute is `manual_axis_type.varying` from jax 0.10 on; it was `vma` before.
        manual = getattr(kind, "manual_axis_type", None)
        axes |= frozenset(manual.varying if manual is not None else getattr(kind, "vma", None) or ())
    return axes


def cast_varying(tree: PyTree, axes: frozenset) -> PyTree:
    """Casts every leaf to vary over (at least) the given mesh axes; values are unchanged."""

    def cast(x):
        missing = tuple(sorted(axes - varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree) if axes else tree


def drop_varying(tree: PyTree, axes: frozenset) -> PyTree:
    """The inverse of `cast_varying` for leaves that hold equal values along the axes: their mean."""

    def drop(x):
        extra = tuple(sorted(axes & varying_axes(x)))
        return jax.lax.pmean(x, extra) if extra else x

    return jax.tree.map(drop, tree) if axes else tree
