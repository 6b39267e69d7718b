"""Pytree algebra, names of leaves, hoisting of closed-over values, and casts between varying-axes types."""

from __future__ import annotations

import dataclasses
import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
    """a + scale · b, in the types of a."""
    return jax.tree.map(lambda x, y: x + _in_type(scale, x) * y, a, b)


def scaled(scale, a: PyTree) -> PyTree:
    """scale · a, in the types of a."""
    return jax.tree.map(lambda x: _in_type(scale, x) * x, a)


def _in_type(scale, x):
    return scale.astype(x.dtype) if hasattr(scale, "astype") else scale


def zeros_like(a: PyTree) -> PyTree:
    """A tree of zeros of the same shapes and types."""
    return jax.tree.map(jnp.zeros_like, a)


def is_inexact(x) -> bool:
    """Whether a leaf is floating-point or complex, so that it can have a derivative."""
    return jnp.issubdtype(jnp.result_type(x) if not hasattr(x, "dtype") else x.dtype, jnp.inexact)


def num_bytes(a: PyTree) -> int:
    """Bytes of all leaves, arrays or their shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(a))


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


def partition(tree: PyTree, moving: PyTree) -> tuple[list, Callable[[list], PyTree]]:
    """The leaves that `moving`, a tree of booleans, marks, and the function that puts others in their place."""
    leaves, structure = jax.tree.flatten(tree)
    where = [i for i, m in enumerate(jax.tree.leaves(moving)) if m]

    def fill(moved):
        every = list(leaves)
        for i, leaf in zip(where, moved, strict=True):
            every[i] = leaf
        return jax.tree.unflatten(structure, every)

    return [leaves[i] for i in where], fill


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Flags:
    """Booleans that are part of a pytree's structure: a derivative rule may keep them among its residuals."""

    values: tuple[bool, ...]


# --- closures ----------------------------------------------------------------------------------------------------


def hoist(fn: Callable, *args) -> tuple[Callable, list]:
    """Returns `pure, consts` with `pure(consts, *args) == fn(*args)` and nothing closed over.

    Every array that `fn` closes over, tracer or not, of any type, becomes an explicit argument. (A loss that closes
    over a differentiated value would otherwise get a silent zero from a custom derivative rule;
    `jax.closure_convert` hoists only floating-point tracers.)
    """
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    structure, jaxpr, consts = jax.tree.structure(shape), closed.jaxpr, list(closed.consts)
    del closed  # `pure` outlives this trace, and must not keep its values alive

    def pure(consts, *args):
        leaves = jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, consts))(*jax.tree.leaves(args))
        return jax.tree.unflatten(structure, leaves)

    return pure, consts


def subprograms(value: Any) -> list:
    """The programs in an equation's parameter, open or closed: both list their equations."""
    if isinstance(value, (tuple, list)):
        return [sub for item in value for sub in subprograms(item)]
    return [value] if hasattr(value, "eqns") else []


def equations(program: Any) -> Iterator:
    """Those of a traced program, and of all that it calls."""
    for equation in program.eqns:
        yield equation
        for value in equation.params.values():
            for inner in subprograms(value):
                yield from equations(inner)


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
    marked = [False] * (len(closed.jaxpr.invars) - 1) + [True]
    return _reached(closed.jaxpr, marked)


def _reached(jaxpr, marked: list[bool]) -> list[bool]:
    """For each result of a program, whether anything in it depends on a marked input."""
    reached = {v for v, m in zip(jaxpr.invars, marked, strict=True) if m}
    for eqn in jaxpr.eqns:
        ins = [not isinstance(v, jex.Literal) and v in reached for v in eqn.invars]
        if any(ins):
            reached.update(v for v, m in zip(eqn.outvars, _reached_by(eqn, ins), strict=True) if m)
    return [not isinstance(v, jex.Literal) and v in reached for v in jaxpr.outvars]


def _reached_by(eqn, marked: list[bool]) -> list[bool]:
    """The same for an equation: looked into where it runs one program on its inputs, else all its results."""
    bodies = [getattr(value, "jaxpr", value) for value in eqn.params.values() if hasattr(value, "eqns")]
    same = [b for b in bodies if len(b.invars) == len(marked) and len(b.outvars) == len(eqn.outvars)]
    if len(bodies) != 1 or not same:
        return [True] * len(eqn.outvars)
    if eqn.primitive.name != "scan":
        return _reached(same[0], marked)
    start, num_carry = scan_layout(eqn)
    end = start + num_carry
    while True:  # what a carry depends on after one iteration, it brings into the next
        out = _reached(same[0], marked)
        carried = [a or b for a, b in zip(marked[start:end], out, strict=False)]
        if carried == marked[start:end]:
            return out
        marked = [*marked[:start], *carried, *marked[end:]]


def scan_layout(eqn) -> tuple[int, int]:
    """How many constants, and how many carried values, are the first operands of a scan.

    What a scan steps through, or stacks up, has an axis more outside than inside; the names of its parameters differ
    from version to version.
    """
    body = getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])
    stacked = [v.aval.ndim > w.aval.ndim for v, w in zip(eqn.outvars, body.outvars, strict=True)]
    stepped = [v.aval.ndim > w.aval.ndim for v, w in zip(eqn.invars, body.invars, strict=True)]
    num_carry = stacked.count(False)
    return stepped.count(False) - num_carry, num_carry


# --- inputs that a rule treats as constants ------------------------------------------------------------------------


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
    moving = [
        name
        for name, x, d in zip(mark.names, leaves, dots, strict=True)
        if is_inexact(x) and not isinstance(d, SymbolicZero)
    ]
    if moving:
        more = f" (and {len(moving) - 1} more leaves)" if len(moving) > 1 else ""
        warn_zero(moving[0], more.lstrip() + " " * bool(more) + mark.message, mark.partial)
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
