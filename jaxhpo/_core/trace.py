"""Traced programs: closed-over values made arguments, equations, which results depend on which inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex


def closure_convert(fn: Callable, *args) -> tuple[Callable, list]:
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
