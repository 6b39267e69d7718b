"""What a program costs: its arithmetic, counted so that every machine agrees, and its time on this one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxhpo._errors import JaxhpoError


def count_arithmetic(function: Callable, *args: Any) -> float:
    """Floating-point operations of `function(*args)`: matrix products in full, one for each other number computed.

    Counted on the traced program, with every loop's body times its length, so nothing is run, and the same versions
    give the same number on every machine.

    Args:
      function: any function that JAX can trace, whose loops have fixed lengths.
      *args: its arguments; only shapes and dtypes matter.

    Returns:
      The number of operations.

    Raises:
      JaxhpoError: if a loop has no fixed length.

    Example:
      >>> import jax.numpy as jnp
      >>> count_arithmetic(jnp.dot, jnp.ones((2, 3)), jnp.ones((3, 4)))
      48.0
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        inner = [_count(sub) for value in equation.params.values() for sub in _subprograms(value)]
        if equation.primitive.name == "scan":
            total += equation.params["length"] * sum(inner)
        elif equation.primitive.name == "cond":
            total += max(inner)
        elif equation.primitive.name == "while":
            raise JaxhpoError("`function` holds a `while` loop, whose length is not known while tracing: write a scan.")
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


def _subprograms(value) -> list:
    if isinstance(value, (tuple, list)):
        return [sub for item in value for sub in _subprograms(item)]
    return [value] if hasattr(value, "eqns") else []  # open or closed: both list their equations


def fastest(functions: Sequence[Callable], *args: Any, repeats: int = 10) -> list[float]:
    """Seconds of each compiled function's fastest call; calls take turns, so that a busy spell hits all alike.

    Example:
      >>> len(fastest([jax.jit(jnp.sum), jax.jit(jnp.max)], jnp.ones(3)))
      2
    """
    seconds = [math.inf] * len(functions)
    for _ in range(repeats):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            jax.block_until_ready(function(*args))
            seconds[i] = min(seconds[i], time.perf_counter() - start)
    return seconds
