"""What a program costs: its arithmetic, counted so that every machine agrees, and its time on this one."""

from __future__ import annotations

import collections
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core as jex
from jax.interpreters.partial_eval import dce_jaxpr

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.trace import scan_layout, subprograms
from jaxhpo._core.tree import is_inexact, partition


def count_arithmetic(
    function: Callable, *args: Any, unknown_length: int | None = None, elementwise: bool = True
) -> float:
    """Floating-point operations of `function(*args)`: matrix products in full, one for each other number computed.

    Counted on the traced program, less what no result depends on, with every loop's body times its length: nothing is
    run, and the same versions give the same number on every machine.

    Args:
      function: any function that JAX can trace, whose loops have fixed lengths.
      *args: its arguments; only shapes and dtypes matter.
      unknown_length: how often a loop is taken to run that ends at a condition; None refuses such loops.
      elementwise: whether other numbers than those of matrix products count.

    Returns:
      The number of operations.

    Raises:
      JaxhpoError: if a loop has no fixed length, and none is given.

    Example:
      >>> import jax.numpy as jnp
      >>> count_arithmetic(jnp.dot, jnp.ones((2, 3)), jnp.ones((3, 4)))
      48.0
    """
    needed, known = _traced(function, args)
    return _count(needed, known, unknown_length, elementwise)


def count_and_peak(function: Callable, *args: Any, unknown_length: int | None = None) -> tuple[float, int]:
    """`count_arithmetic` and `peak_bytes` from one trace."""
    needed, known = _traced(function, args)
    return _count(needed, known, unknown_length, True), _peak(needed, own_results=False)


def _traced(function, args) -> tuple[Any, dict]:
    """The program less what no result depends on, and the values of its constants."""
    closed = jax.make_jaxpr(function)(*args)
    needed, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    constants = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    return needed, {v: x for v, x in constants.items() if not isinstance(x, Tracer)}


def bytes_between_passes(function: Callable, *args: Any) -> int:
    """Bytes that reverse mode keeps of `function(*args)` between its two passes, less what it was given.

    Neither arguments nor values that the function closes over are counted, as they are there anyway.

    Args:
      function: any function that JAX can trace; what is not floating point is not differentiated.
      *args: its arguments, any pytrees.

    Returns:
      Bytes, from shapes alone.

    Example:
      >>> import jax.numpy as jnp
      >>> bytes_between_passes(lambda x: jnp.sum(jnp.sin(x)), jnp.ones(3, jnp.float32))  # cos(x)
      12
    """
    moved, combine = partition(args, jax.tree.map(is_inexact, args))

    def pullback(moved):
        def floats(moved):
            out = function(*combine(moved))
            return partition(out, jax.tree.map(is_inexact, out))[0]

        return jax.vjp(floats, moved)[1]

    jaxpr = jax.make_jaxpr(pullback)(moved).jaxpr
    given = {*jaxpr.invars, *jaxpr.constvars}
    kept = {out for out in jaxpr.outvars if isinstance(out, jex.Var) and out not in given}
    return sum(map(_bytes, kept))


def peak_bytes(function: Callable, *args: Any) -> int:
    """Temporary memory that `function(*args)` takes at its peak when it is compiled, estimated on the traced program.

    Equations are taken in their order; a result is live from its own to its last use. A loop takes its carry, its
    stacked results and the peak of its body. A compiler fuses elementwise operations: such a result is taken to need no
    memory if one operation uses it, but what it is computed from stays live that long. Arguments and results of the
    whole are not counted, as a compiled program's own analysis does not.

    Args:
      function: any function that JAX can trace.
      *args: its arguments; only shapes and dtypes matter.

    Returns:
      Bytes.

    Example:
      >>> import jax.numpy as jnp
      >>> peak_bytes(lambda x: jnp.sum(x @ x), jnp.ones((10, 10), jnp.float32))
      400
    """
    return _peak(_traced(function, args)[0], own_results=False)


def _peak(jaxpr, own_results=True) -> int:
    results = {v for v in jaxpr.outvars if isinstance(v, jex.Var)}
    stands = _stand_ins(jaxpr, results, {*jaxpr.invars} if own_results else set())
    ends = {v: i for i, equation in enumerate(jaxpr.eqns) for var in _variables(equation) for v in stands[var]}
    ends |= {v: len(jaxpr.eqns) for result in results for v in stands[result]}
    begin = [{v for out in equation.outvars for v in stands[out] if v == out} for equation in jaxpr.eqns]
    end: dict[int, list] = {}
    for v in set().union(*begin):
        end.setdefault(ends[v], []).append(v)
    free = set() if own_results else results
    live, peak, read = 0, 0, _read(jaxpr)
    for i, equation in enumerate(jaxpr.eqns):
        live += sum(_bytes(v) for v in begin[i] - free)
        peak = max(peak, live + _inside(equation, read))
        live -= sum(_bytes(v) for v in end.get(i, ()) if v not in free)
    return peak


def _stand_ins(jaxpr, results, ours) -> dict[Any, frozenset]:
    """What of a value is in memory: itself; what it is computed from, where it is fused; what it is written into.

    `ours` are the arguments that may be written into, as a loop's body may into its carry.
    """
    count = collections.Counter(v for equation in jaxpr.eqns for v in _variables(equation) if v not in equation.outvars)
    last = {v: i for i, equation in enumerate(jaxpr.eqns) for v in _variables(equation)}
    last |= dict.fromkeys(results, len(jaxpr.eqns))
    given, owners = [*jaxpr.invars, *jaxpr.constvars], set(ours)
    stands: dict[Any, frozenset] = dict.fromkeys(given, frozenset())
    for i, equation in enumerate(jaxpr.eqns):
        sources = frozenset().union(*(stands[v] for v in _variables(equation) if v not in equation.outvars))
        name = equation.primitive.name
        for out in equation.outvars:
            fused = name in _LAYOUT or (name in _FUSED and count[out] == 1)
            stands[out] = sources if fused and out not in results else frozenset([out])
        for out, operand in _written_into(equation):
            if isinstance(operand, jex.Var) and last[operand] == i and operand in owners:
                stands[out] = stands[operand]
        owners.update(out for out in equation.outvars if len(stands[out]) <= 1 and name not in _LAYOUT | _FUSED)
    return stands


def _variables(equation):
    return [v for v in [*equation.invars, *equation.outvars] if isinstance(v, jex.Var)]


def _written_into(equation) -> list:
    """Results that take the place of an operand, if that is not used again."""
    if equation.primitive.name in ("scatter", "scatter-add", "dynamic_update_slice"):
        return [(equation.outvars[0], equation.invars[0])]
    if equation.primitive.name != "scan":
        return []
    start, num_carry = scan_layout(equation)
    return list(zip(equation.outvars[:num_carry], equation.invars[start : start + num_carry], strict=True))


def _inside(equation, read) -> int:
    """Bytes that an equation takes besides its results: the peak of one pass through a loop, or of what it calls."""
    most = max(map(_peak, _executed(equation, read)), default=0)
    if equation.primitive.name in ("scan", "while"):
        return most
    return max(0, most - sum(map(_bytes, equation.outvars)))


def _bytes(v) -> int:
    return math.prod(_shape(v)) * getattr(getattr(v.aval, "dtype", None), "itemsize", 0)


def _shape(v) -> tuple:
    return getattr(v.aval, "shape", ())


_LAYOUT = {"reshape", "squeeze", "expand_dims", "broadcast_in_dim", "iota", "convert_element_type", "copy"}
_FUSED = {
    *("add", "sub", "mul", "div", "neg", "max", "min", "select_n", "add_any", "integer_pow", "square", "sqrt", "rsqrt"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "sign", "abs", "exp", "log", "tanh", "logistic", "erf"),
    *("sin", "cos", "pow", "log1p", "expm1", "stop_gradient", "transpose", "slice", "dynamic_slice", "rev", "pad"),
    *("clamp", "floor", "ceil", "round", "is_finite", "erf_inv", "atan2", "rem", "name", "reduce_precision"),
}


def _count(program, values, unknown_length, elementwise) -> float:
    """`values`: of what is known of the program's arguments; inside a scan, one a turn."""
    jaxpr = getattr(program, "jaxpr", program)
    values = values | dict(zip(jaxpr.constvars, getattr(program, "consts", ()), strict=False))
    total, read = 0.0, _read(jaxpr)
    for equation in jaxpr.eqns:
        name, parts = equation.primitive.name, _executed(equation, read)
        inner = [_count(p, _values_inside(equation, p, values), unknown_length, elementwise) for p in parts]
        first = next(iter(equation.invars), None)
        if name == "convert_element_type" and isinstance(first, jex.Var) and first in values:
            values[equation.outvars[0]] = values[first]
        if name == "scan":
            total += equation.params["length"] * sum(inner)
        elif name == "cond":
            taken = np.asarray(values.get(first, ()) if isinstance(first, jex.Var) else (), int)
            total += float(np.mean([inner[i] for i in taken])) if taken.ndim and taken.size else max(inner)
        elif name == "while":
            if unknown_length is None:
                raise JaxhpoError(
                    "`function` holds a `while` loop, whose length is not known while tracing: write a scan, or pass "
                    "`unknown_length`."
                )
            total += unknown_length * sum(inner)
        elif inner:
            total += sum(inner)
        elif name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2.0 * math.prod(shape[axis] for axis in contracted) * math.prod(equation.outvars[0].aval.shape)
        elif elementwise:
            total += sum(math.prod(out.aval.shape) for out in equation.outvars if _is_real(out.aval))
    return total


def _values_inside(equation, part, values) -> dict:
    """What is known of the arguments of what an equation calls: of a scan, those that it scans over, one a turn."""
    if equation.primitive.name not in ("scan", "jit", "pjit", "closed_call", "core_call"):
        return {}
    pairs = zip(equation.invars, getattr(part, "jaxpr", part).invars, strict=False)
    scanned = equation.primitive.name == "scan"
    return {
        var: values[operand]
        for operand, var in pairs
        if isinstance(operand, jex.Var) and operand in values and scanned == (_shape(operand) != _shape(var))
    }


def _is_real(aval) -> bool:
    return jnp.issubdtype(getattr(aval, "dtype", jnp.int32), jnp.inexact)


def _read(jaxpr) -> set[int]:
    return {id(v) for equation in jaxpr.eqns for v in equation.invars} | {id(v) for v in jaxpr.outvars}


def _executed(equation, read: set[int]) -> list:
    """The programs inside an equation that run when it does, given the variables that others read."""
    if equation.primitive.name == "custom_linear_solve":
        # Beside it, its transpose and the products with either. JAX removes nothing from it, but a compiler does: the
        # product for a report that nobody reads.
        solve = equation.params["jaxprs"].solve.jaxpr
        return [dce_jaxpr(solve, [id(v) in read for v in equation.outvars], instantiate=True)[0]]
    return [sub for value in equation.params.values() for sub in subprograms(value)]


def temporary_bytes(program: Any) -> int | None:
    """Peak temporary memory of a compiled program; None where the backend does not tell."""
    try:
        return program.memory_analysis().temp_size_in_bytes
    except (AttributeError, NotImplementedError, RuntimeError):
        return None


def available_bytes() -> float:
    """Bytes of memory of the device, or of the machine."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return float("inf")


def fastest(functions: Sequence[Callable], *args: Any, repeats: int = 10, seconds: float = 0.0) -> list[float]:
    """Seconds of each compiled function's fastest call; calls take turns, so that a busy spell hits all alike.

    Args:
      functions: what to time, each called as `function(*args)`.
      *args: their arguments.
      repeats: turns that each function takes.
      seconds: shared out equally, where short calls want many; each turn holds one call at least.

    Returns:
      One number a function.

    Example:
      >>> len(fastest([jax.jit(jnp.sum), jax.jit(jnp.max)], jnp.ones(3)))
      2
    """
    found, share = [math.inf] * len(functions), seconds / repeats / len(functions)
    for _ in range(repeats):
        for i, function in enumerate(functions):
            spent = 0.0
            while True:
                start = time.perf_counter()
                jax.block_until_ready(function(*args))
                took = time.perf_counter() - start
                found[i], spent = min(found[i], took), spent + took
                if spent >= share:
                    break
    return found
