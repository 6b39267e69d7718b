"""What a program costs: its arithmetic, counted so that every machine agrees, and its time on this one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr

from jaxhpo._errors import JaxhpoError


def count_arithmetic(function: Callable, *args: Any, unknown_length: int | None = None) -> float:
    """Floating-point operations of `function(*args)`: matrix products in full, one for each other number computed.

    Counted on the traced program, less what no result depends on, with every loop's body times its length: nothing is
    run, and the same versions give the same number on every machine.

    Args:
      function: any function that JAX can trace, whose loops have fixed lengths.
      *args: its arguments; only shapes and dtypes matter.
      unknown_length: how often a loop is taken to run that ends at a condition; None refuses such loops.

    Returns:
      The number of operations.

    Raises:
      JaxhpoError: if a loop has no fixed length, and none is given.

    Example:
      >>> import jax.numpy as jnp
      >>> count_arithmetic(jnp.dot, jnp.ones((2, 3)), jnp.ones((3, 4)))
      48.0
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    needed, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    return _count(needed, unknown_length)


def _count(jaxpr, unknown_length) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        inner = [_count(sub, unknown_length) for sub in _executed(equation)]
        if equation.primitive.name == "scan":
            total += equation.params["length"] * sum(inner)
        elif equation.primitive.name == "cond":
            total += max(inner)
        elif equation.primitive.name == "while":
            if unknown_length is None:
                raise JaxhpoError(
                    "`function` holds a `while` loop, whose length is not known while tracing: write a scan, or pass "
                    "`unknown_length`."
                )
            total += unknown_length * sum(inner)
        elif inner:
            total += sum(inner)
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2.0 * math.prod(shape[axis] for axis in contracted) * math.prod(equation.outvars[0].aval.shape)
        else:
            total += sum(math.prod(out.aval.shape) for out in equation.outvars if _is_real(out.aval))
    return total


def _is_real(aval) -> bool:
    return jnp.issubdtype(getattr(aval, "dtype", jnp.int32), jnp.inexact)


def _executed(equation) -> list:
    """The programs inside an equation that run when it does."""
    if equation.primitive.name == "custom_linear_solve":
        return [equation.params["jaxprs"].solve]  # beside it, its transpose and the products with either
    return [sub for value in equation.params.values() for sub in _subprograms(value)]


def _subprograms(value) -> list:
    if isinstance(value, (tuple, list)):
        return [sub for item in value for sub in _subprograms(item)]
    return [value] if hasattr(value, "eqns") else []  # open or closed: both list their equations


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
