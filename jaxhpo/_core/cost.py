"""The cost of a program: its counted arithmetic, its predicted peak memory, and its measured time."""

import collections
import math
import os
import pathlib
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.extend import core as jex
from jax.interpreters.partial_eval import dce_jaxpr

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.trace import REVERSE_ONLY, scan_layout, subprograms
from jaxhpo._core.tree import is_inexact, partition

UNKNOWN_LENGTH = 100  # assumed passes of a loop to a tolerance
# Bytes that a cache holds, and the operations that a processor does while it writes and reads one byte beyond it.
CACHE, OPERATIONS_A_BYTE = 2**25, 64
SAFE_PART = 0.8  # of the memory that is free, since a prediction may be 20 % too low
# Operations that a compiler writes into their consumer: always, or where one operation alone uses the result.
_LAYOUT = {"reshape", "squeeze", "expand_dims", "broadcast_in_dim", "iota", "convert_element_type", "copy"}
_LAYOUT |= {REVERSE_ONLY}
_ELEMENTWISE = {
    *("add", "sub", "mul", "div", "neg", "max", "min", "select_n", "add_any", "integer_pow", "square", "sqrt", "rsqrt"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "sign", "abs", "exp", "log", "tanh", "logistic", "erf"),
    *("sin", "cos", "pow", "log1p", "expm1", "stop_gradient", "transpose", "slice", "dynamic_slice", "rev", "pad"),
    *("clamp", "floor", "ceil", "round", "is_finite", "erf_inv", "atan2", "rem", "name", "reduce_precision"),
}


def count_arithmetic(
    function: Callable, *args: Any, unknown_length: int | None = None, elementwise: bool = True
) -> float:
    """Floating-point operations of `function(*args)`: products and convolutions in full, one for each other number.

    The traced program is counted, less the equations that no result depends on; a loop counts as its length times its
    body. Nothing is run, and the same versions give the same number on every machine.

    Args:
      function: any function that JAX can trace, whose loops have fixed lengths.
      *args: its arguments; only shapes and dtypes matter.
      unknown_length: the number of passes assumed for a loop that ends at a condition; None refuses such loops.
      elementwise: False counts matrix products and convolutions alone.

    Returns:
      The number of operations.

    Raises:
      JaxhpoError: if a loop has no fixed length and `unknown_length` is None.

    Example:
      >>> import jax.numpy as jnp
      >>> count_arithmetic(jnp.dot, jnp.ones((2, 3)), jnp.ones((3, 4)))
      48.0
    """
    return _count(*_traced(function, args), unknown_length, elementwise)


def count_and_peak(function: Callable, *args: Any, unknown_length: int | None = None) -> tuple[float, int]:
    """`count_arithmetic`, and the peak temporary memory of the compiled `function(*args)`, predicted from one trace.

    Equations are taken in their order; a result is live from its own equation to its last use. A loop takes its carry,
    its stacked results and the peak of its body. A compiler fuses elementwise operations: if one operation alone uses
    such a result, it is taken to need no memory, but its operands stay live in its place. Arguments and results of the
    whole program are not counted, as in a compiled program's own analysis.

    Args:
      function: any function that JAX can trace.
      *args: its arguments; only shapes and dtypes matter.
      unknown_length: as for `count_arithmetic`.

    Returns:
      Operations and bytes.

    Example:
      >>> import jax.numpy as jnp
      >>> count_and_peak(lambda x: jnp.sum(x @ x), jnp.ones((10, 10), jnp.float32))
      (2001.0, 400)
    """
    program, known = _traced(function, args)
    return _count(program, known, unknown_length, True), _peak(program, count_results=False)


def with_memory(operations: float, peak: int) -> float:
    """A stand-in for time: operations + OPERATIONS_A_BYTE · max(0, bytes − CACHE)."""
    return operations + OPERATIONS_A_BYTE * max(0, peak - CACHE)


def bytes_between_passes(function: Callable, *args: Any) -> int:
    """Bytes that reverse mode keeps of `function(*args)` from the forward to the backward pass.

    Arguments and closed-over values are not counted: they stay in memory anyway.

    Args:
      function: any function that JAX can trace; only its floating-point arguments are differentiated.
      *args: its arguments, any pytrees.

    Returns:
      Bytes, from shapes alone.

    Example:
      >>> import jax.numpy as jnp
      >>> bytes_between_passes(lambda x: jnp.sum(jnp.sin(x)), jnp.ones(3, jnp.float32))  # cos(x)
      12
    """
    perturbed, combine = partition(args, jax.tree.map(is_inexact, args))

    def residuals(perturbed):
        def floats(perturbed):
            out = function(*combine(perturbed))
            return partition(out, jax.tree.map(is_inexact, out))[0]

        # The pullback is a pytree: its leaves, the results of this program, are the residuals.
        return jax.vjp(floats, perturbed)[1]

    jaxpr = jax.make_jaxpr(residuals)(perturbed).jaxpr
    given = {*jaxpr.invars, *jaxpr.constvars}
    return sum(_bytes(v) for v in set(_variables(jaxpr.outvars)) - given)


def _traced(function, args) -> tuple[Any, dict]:
    """The program without the equations that no result depends on, and the values of its constants."""
    closed = jax.make_jaxpr(function)(*args)
    needed, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    constants = zip(closed.jaxpr.constvars, closed.consts, strict=True)
    return needed, {v: x for v, x in constants if not isinstance(x, Tracer)}


# --- arithmetic ------------------------------------------------------------------------------------------------------


def _count(program, known, unknown_length, elementwise) -> float:
    """Operations of a program; `known` holds the values of those of its arguments that are constants.

    Of an argument that takes one slice of an array in every pass of a scan, `known` holds the whole array.
    """
    jaxpr = getattr(program, "jaxpr", program)
    known = known | dict(zip(jaxpr.constvars, getattr(program, "consts", ()), strict=False))
    total, read = 0.0, _read(jaxpr)
    for equation in jaxpr.eqns:
        parts = _executed(equation, read)
        inner = [_count(part, _known_inside(equation, part, known), unknown_length, elementwise) for part in parts]
        first = next(iter(equation.invars), None)
        value = known.get(first) if isinstance(first, jex.Var) else None
        name = equation.primitive.name
        if name == "convert_element_type" and value is not None:
            known[equation.outvars[0]] = value
        if name == "cond":
            # In a scan over a known table of branches k_1 … k_T: (1/T) Σ_t count(branch k_t); else the largest branch.
            taken = np.asarray(() if value is None else value, int)
            total += float(np.mean([inner[k] for k in taken])) if taken.ndim and taken.size else max(inner)
        elif inner:
            # length · body for a loop; a call runs its program once.
            times = {"scan": equation.params.get("length"), "while": unknown_length}.get(name, 1)
            if times is None:
                raise JaxhpoError(
                    "`function` holds a `while` loop, whose length is not known while tracing: write a scan, or pass "
                    "`unknown_length`."
                )
            total += times * sum(inner)
        elif name == "dot_general":
            # out_ij = Σ_k a_ik b_kj: one product and one sum for every k and every entry of the result.
            (contracted, _), _ = equation.params["dimension_numbers"]
            length = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2.0 * length * _size(equation.outvars[0])
        elif name == "conv_general_dilated":
            # One product and one sum for every entry of the result and of a filter: k₁ × k₂ × channels of a group.
            kernel, layout = equation.invars[1], equation.params["dimension_numbers"].rhs_spec
            total += 2.0 * _size(kernel) / _shape(kernel)[layout[0]] * _size(equation.outvars[0])
        elif elementwise and name != REVERSE_ONLY:
            total += sum(_size(out) for out in equation.outvars if hasattr(out.aval, "dtype") and is_inexact(out.aval))
    return total


def _known_inside(equation, part, known) -> dict:
    """The known values of the arguments of a program that an equation calls; of a scan, of those it steps through."""
    if equation.primitive.name not in ("scan", "jit", "pjit", "closed_call", "core_call"):
        return {}
    scanned = equation.primitive.name == "scan"
    return {
        argument: known[operand]
        for operand, argument in zip(equation.invars, getattr(part, "jaxpr", part).invars, strict=False)
        if isinstance(operand, jex.Var) and operand in known and scanned == (_shape(operand) != _shape(argument))
    }


# --- memory ----------------------------------------------------------------------------------------------------------


def _peak(jaxpr, count_results=True) -> int:
    """The most bytes live at once, by a liveness analysis over the equations i = 0 … n−1.

    Equation s(b) creates the buffer b, and e(b) is the last equation that uses a variable held in b (n for a result of
    the program). With |b| the bytes of b and inside(i) what equation i takes inside the programs that it calls,

        peak = max_i [ Σ { |b| : s(b) ≤ i ≤ e(b) } + inside(i) ].
    """
    results, count, read = set(_variables(jaxpr.outvars)), len(jaxpr.eqns), _read(jaxpr)
    # The last equation that mentions each variable, then each buffer: later equations overwrite earlier ones.
    last_use = {v: i for i, e in enumerate(jaxpr.eqns) for v in _variables([*e.invars, *e.outvars])}
    last_use |= dict.fromkeys(results, count)
    buffers = _buffers(jaxpr, results, {*jaxpr.invars} if count_results else set(), last_use)
    last = {b: i for v, i in sorted(last_use.items(), key=lambda item: item[1]) for b in buffers[v]}
    change = np.zeros(count + 2, np.int64)
    for i, equation in enumerate(jaxpr.eqns):
        for b in equation.outvars:
            if b in buffers[b] and (count_results or b not in results):
                change[i] += _bytes(b)  # live from s(b) = i …
                change[last[b] + 1] -= _bytes(b)  # … to e(b)
    live = np.cumsum(change)[:count]
    return int(max(live + [_inside(equation, read) for equation in jaxpr.eqns], default=0))


def _buffers(jaxpr, results, writable, last_use) -> dict[Any, frozenset]:
    """Maps each variable to the buffers that keep it alive, each named by the variable that it was made for.

    An argument has none, as its memory is its caller's. A fused result has those of its operands. A result written over
    an operand has that operand's. Every other result has one of its own.

    Args:
      jaxpr: the program.
      results: its results, which are never fused.
      writable: the arguments whose memory may be written over, as a loop's body may write over its carry.
      last_use: the last equation that mentions each variable.
    """
    uses = collections.Counter(v for equation in jaxpr.eqns for v in _variables(equation.invars))
    buffers: dict[Any, frozenset] = dict.fromkeys([*jaxpr.invars, *jaxpr.constvars], frozenset())
    owners = set(writable)  # variables that have a buffer to themselves
    for i, equation in enumerate(jaxpr.eqns):
        name = equation.primitive.name
        of_operands = frozenset().union(*(buffers[v] for v in _variables(equation.invars)))
        for out in equation.outvars:
            fused = name in _LAYOUT or (name in _ELEMENTWISE and uses[out] == 1)
            buffers[out] = of_operands if fused and out not in results else frozenset([out])
        for out, operand in _written_over(equation):
            if isinstance(operand, jex.Var) and last_use[operand] == i and operand in owners:
                buffers[out] = buffers[operand]
        if name not in _LAYOUT | _ELEMENTWISE:
            owners.update(out for out in equation.outvars if len(buffers[out]) <= 1)
    return buffers


def _written_over(equation) -> list:
    """The results that can take the memory of an operand, with that operand."""
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
    # The results of a call are those of the called program, whose peak holds them already.
    return max(0, most - sum(map(_bytes, equation.outvars)))


# --- equations and variables -----------------------------------------------------------------------------------------


def _read(jaxpr) -> set:
    """The variables that an equation or a result reads."""
    return {*_variables(jaxpr.outvars), *(v for equation in jaxpr.eqns for v in _variables(equation.invars))}


def _executed(equation, read: set) -> list:
    """The programs inside an equation that run when it does, given the variables that others read."""
    if equation.primitive.name == "custom_linear_solve":
        # The equation also holds its transpose and the products with either. JAX removes nothing from it, but a
        # compiler does: the product for a report that nobody reads.
        solve = equation.params["jaxprs"].solve.jaxpr
        return [dce_jaxpr(solve, [v in read for v in equation.outvars], instantiate=True)[0]]
    return [sub for value in equation.params.values() for sub in subprograms(value)]


def _variables(atoms) -> list:
    """Without the literals."""
    return [v for v in atoms if isinstance(v, jex.Var)]


def _shape(v) -> tuple:
    return getattr(v.aval, "shape", ())


def _size(v) -> int:
    return math.prod(_shape(v))


def _bytes(v) -> int:
    return _size(v) * getattr(getattr(v.aval, "dtype", None), "itemsize", 0)


# --- measured --------------------------------------------------------------------------------------------------------


def temporary_bytes(program: Any) -> int | None:
    """Peak temporary memory of a compiled program; None where the backend does not report it."""
    try:
        return program.memory_analysis().temp_size_in_bytes
    except (AttributeError, NotImplementedError, RuntimeError):
        return None


def available_bytes() -> float:
    """Bytes of memory that are free on the device, or on the machine."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    try:
        found = re.search(r"MemAvailable: *(\d+) kB", pathlib.Path("/proc/meminfo").read_text())
        return 1024.0 * int(found[1]) if found else math.inf
    except OSError:  # not Linux: all memory of the machine
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return math.inf


def human_bytes(value: float) -> str:
    """Bytes with three digits and a unit."""
    return _with_unit(value, {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "B": 1})


def human_seconds(value: float) -> str:
    """Seconds with three digits and a unit.

    Example:
      >>> human_seconds(3e-5)
      '30 µs'
    """
    return _with_unit(value, {"s": 1.0, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9})


def _with_unit(value, units) -> str:
    unit = next((unit for unit, size in units.items() if value >= size), list(units)[-1])
    return f"{value / units[unit]:.3g} {unit}"


def fastest(functions: Sequence[Callable], *args: Any, repeats: int = 10, seconds: float = 0.0) -> list[float]:
    """Seconds of each compiled function's fastest call; calls alternate, so that other load affects all alike.

    Args:
      functions: the compiled functions, each called as `function(*args)`.
      *args: their arguments.
      repeats: turns of each function.
      seconds: time shared out equally among the turns; each turn has at least one call.

    Returns:
      One number per function.

    Example:
      >>> len(fastest([jax.jit(jnp.sum), jax.jit(jnp.max)], jnp.ones(3)))
      2
    """
    found, share = [math.inf] * len(functions), seconds / repeats / len(functions)
    for _ in range(repeats):
        for i, function in enumerate(functions):
            stop, end = -math.inf, time.perf_counter() + share
            while stop < end:
                start = time.perf_counter()
                jax.block_until_ready(function(*args))
                stop = time.perf_counter()
                found[i] = min(found[i], stop - start)
    return found
