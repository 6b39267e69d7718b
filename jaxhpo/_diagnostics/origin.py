"""Where a number that is not finite comes from: the operation that made it of finite ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from jaxhpo._core.trace import scan_layout
from jaxhpo._core.tree import is_inexact

ARITHMETIC = {"add", "add_any", "sub", "mul", "dot_general", "conv_general_dilated", "reduce_sum", "cumsum", "square"}
ARITHMETIC |= {"integer_pow", "scatter-add", "convert_element_type"}
INSIDE = "a `where` around it leaves its derivative as it is, so put one around its argument"
OURS, JAX = (os.path.join(os.path.dirname(file), "") for file in (__file__, jax.__file__))
NOT_THE_USERS = (OURS, JAX, os.path.join(os.path.dirname(os.path.dirname(jax.__file__)), "optax", ""))


class Origin(NamedTuple):
    """The operation at which finite numbers became one that is not.

    Attributes:
      operation: the name of its primitive; "" where the number is a constant of the program.
      operands: what it was given; or the constant.
      place: the user's line, "train.py:31, in train_loss", or "".
    """

    operation: str
    operands: list[np.ndarray]
    place: str

    @property
    def overflows(self) -> bool:
        """Whether it is arithmetic that grew too large."""
        return self.operation in ARITHMETIC and _largest(self.operands) > 0

    def __str__(self) -> str:
        """In words, with the cause: "where …"."""
        place = f" ({self.place})" if self.place else ""
        if not self.operation:
            return f"as a constant of the program{place}: data that holds it, or a number that is written there."
        return f"where `{self.operation}`{place} {_story(self.operation, self.operands)}"


class _Entry(NamedTuple):
    """What is not finite was an operand already.

    Attributes:
      operand: its number.
      hint: the innermost operation that was given it, named if it made a NaN of infinities.
    """

    operand: int
    hint: Origin


def find_origin(fn: Callable, *args: Any) -> Origin | None:
    """Follows a result of `fn(*args)` that is not finite back to where it began.

    None where there is none, or no way, or it ends at a NaN that a derivative rule gave on purpose. The program is run
    once more, with every intermediate result kept; of a loop, those of one iteration.
    """
    closed = jax.make_jaxpr(fn)(*args)
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(args)]
    results = jax.jit(jex.jaxpr_as_fun(closed))(*leaves)
    bad = next((i for i, x in enumerate(results) if not _finite(x)), None)
    found = None if bad is None else _follow(closed.jaxpr, closed.consts, leaves, bad)
    return found if isinstance(found, Origin) and found.operands else None


def _follow(program, consts, operands, result) -> Origin | _Entry:
    """The origin of a result of a program, or the operand from which it came."""
    values = _values(program, consts, operands)
    made = {v: (equation, i) for equation in program.eqns for i, v in enumerate(equation.outvars)}
    v, hint, equation = program.outvars[result], Origin("", [], ""), None
    while not isinstance(v, jex.Literal) and v in made:
        equation, which = made[v]
        given = [_read(values, x) for x in equation.invars]
        found = _follow_inside(equation, given, which)
        if isinstance(found, Origin):
            return found
        if found is None:
            found = _blame(equation, given, _read(values, v))
            if isinstance(found, Origin):
                return found
        v, hint = equation.invars[found.operand], found.hint if found.hint.operation else hint
        hint = hint if hint.place else found.hint
    if not isinstance(v, jex.Literal) and v in program.invars:
        return _Entry(program.invars.index(v), hint)
    if isinstance(v, jex.Literal) and equation is not None and _is_ours(equation):
        return Origin("", [], "")
    return hint if hint.operation else Origin("", [_read(values, v)], hint.place)


def _blame(equation, given, result) -> Origin | _Entry:
    """A plain equation itself, or its operand to which a broken result is due: one with a NaN before an infinity."""
    wrong = np.isnan(result) if np.isnan(result).any() else ~np.isfinite(result)

    def is_broken(x, test):
        if not is_inexact(x):
            return False
        return bool((test(x) & wrong).any() if np.shape(x) == wrong.shape else test(x).any())

    name, place = equation.primitive.name, _place(equation)
    for test in (np.isnan, np.isinf):
        for i, x in enumerate(given):
            if is_broken(x, test):
                # An infinity may be meant, as in a mask; a NaN made of it is not.
                made_here = np.isnan(result).any() and not np.isnan(x).any()
                return _Entry(i, Origin(name if made_here else "", given, place))
    return Origin(name, given, place)


def _follow_inside(equation, given, which) -> Origin | _Entry | None:
    """The same within an equation that runs a program; None for all others."""
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return _follow_scan(equation, given, which)
    if name == "cond":
        branch = params["branches"][int(given[0])]
        found = _follow(branch.jaxpr, branch.consts, given[1:], which)
        return found._replace(operand=found.operand + 1) if isinstance(found, _Entry) else found
    bodies = [p for p in params.values() if hasattr(p, "eqns")]
    if len(bodies) != 1 or name == "shard_map":
        return None
    program, consts = getattr(bodies[0], "jaxpr", bodies[0]), getattr(bodies[0], "consts", ())
    runs_it = [v.aval.shape for v in program.invars] == [np.shape(x) for x in given]  # on its operands, as a call does
    return _follow(program, consts, given, which) if runs_it else None


def _follow_scan(equation, given, which) -> Origin | _Entry | None:
    """To the iteration in which the result broke, and from there to earlier ones."""
    body, length = equation.params["jaxpr"], equation.params["length"]
    num_consts, num_carry = scan_layout(equation)
    start = num_consts + num_carry
    turns = range(length)[:: -1 if equation.params["reverse"] else 1]
    run = jax.jit(jex.jaxpr_as_fun(body))

    def operands(carry, turn):
        return [*given[:num_consts], *carry, *(x[turn] for x in given[start:])]

    end = length
    while True:
        carry = given[num_consts:start]
        for turn in turns[:end]:
            after = run(*operands(carry, turn))
            if not _finite(after[which]):
                break
            carry = after[:num_carry]
        else:
            return None
        found = _follow(body.jaxpr, body.consts, operands(carry, turn), which)
        end = turns.index(turn)
        if isinstance(found, Origin) or found.operand not in range(num_consts, start) or end == 0:
            return found
        which = found.operand - num_consts


def _values(program, consts, operands) -> dict:
    """What every variable of a program holds."""
    made = [v for e in program.eqns for v in e.outvars if not isinstance(v, jex.DropVar)]
    unnamed = program.debug_info._replace(result_paths=None)  # of other results
    every = jex.ClosedJaxpr(program.replace(outvars=made, debug_info=unnamed), consts)
    found = jax.jit(jex.jaxpr_as_fun(every))(*operands)
    return {
        **dict(zip(program.constvars, consts, strict=True)),
        **dict(zip(program.invars, operands, strict=True)),
        **dict(zip(made, found, strict=True)),
    }


def _read(values, v):
    x = v.val if isinstance(v, jex.Literal) else values[v]
    if not is_inexact(x):
        return x
    return np.asarray(x, np.float32 if jnp.result_type(x).itemsize < 4 else None)  # NumPy knows no bfloat16


def _finite(x) -> bool:
    return not is_inexact(x) or bool(jnp.all(jnp.isfinite(x)))


def _place(equation) -> str:
    """The innermost line that is neither ours nor JAX's."""
    for frame in _frames(equation):
        if not frame.file_name.startswith(NOT_THE_USERS):
            return f"{os.path.basename(frame.file_name)}:{frame.line_num}, in {frame.function_name}"
    return ""


def _is_ours(equation) -> bool:
    """Whether the innermost line that is not JAX's is ours."""
    outer = (frame.file_name for frame in _frames(equation) if not frame.file_name.startswith(JAX))
    return next(outer, "").startswith(OURS)


def _frames(equation):
    trace = getattr(equation.source_info, "traceback", None)
    return trace.frames if trace is not None else ()


def _largest(operands) -> float:
    """The largest finite magnitude; 0 where an operand is not finite."""
    floats = [np.abs(x) for x in operands if is_inexact(x) and x.size]
    return max((x.max() for x in floats), default=0.0) if all(np.isfinite(x).all() for x in floats) else 0.0


def _story(operation, operands) -> str:
    """What was wrong with the operands, and what to write."""
    floats = [x for x in operands if is_inexact(x) and x.size]
    if not floats or any(map(np.iscomplexobj, floats)):
        return "made it of numbers that are finite."
    first, last = floats[0], floats[-1]
    least = f"{np.nanmin(first):.4g}"
    if operation in ("log", "log1p"):
        of = least if operation == "log" else f"1 + {least}"
        return f"took the logarithm of {of}: bound its argument, as in `log(maximum(x, 1e-12))`."
    if operation in ("sqrt", "rsqrt"):
        return f"took the square root of {least}: write `sqrt(maximum(x, 0) + eps)`."
    if operation == "div" and (last == 0).any():
        if np.all(first == 0.5):
            return (
                "took the derivative of a square root at zero, which is infinite (a norm, Adam, RMSProp, Adagrad): "
                "write `sqrt(x + eps)`, or `optax.adam(..., eps_root=1e-8)`."
            )
        return f"divided by zero: bound the denominator. Where this is a logarithm's derivative, {INSIDE}."
    if operation == "pow":
        return f"raised {least} to the power {last.min():.4g}: bound the base away from zero; {INSIDE}."
    if operation == "integer_pow" and (first == 0).any():
        return f"raised zero to a negative power: bound the base away from zero; {INSIDE}."
    if operation == "exp":
        return f"took the exponential of {first.max():.4g}: bound its argument, or subtract the largest."
    if operation == "custom_linear_solve":
        return "found no solution: the matrix is singular, or nearly so; raise the solver's `damping`."
    if operation in ARITHMETIC and _largest(operands):
        return f"overflowed: its largest operand is {_largest(operands):.3g}."
    if all(np.isfinite(x).all() for x in floats):
        return "made it of numbers that are finite."
    return "met infinities that cancel or multiply zero: mask with a large finite number."
