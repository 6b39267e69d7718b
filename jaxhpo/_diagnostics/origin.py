"""Search for the origin of a number that is not finite: the operation that made it of finite ones."""

import itertools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from jaxhpo._core.trace import STOP, equations, named, scan_layout
from jaxhpo._core.tree import all_finite, is_inexact

ARITHMETIC = {"add", "add_any", "sub", "mul", "dot_general", "conv_general_dilated", "reduce_sum", "cumsum", "square"}
ARITHMETIC |= {"integer_pow", "scatter-add", "convert_element_type"}
# Explanations of operations, with the least and largest entry of the first operand and the least of the last.
FINITE = "made it of numbers that are finite."
INSIDE = "a `where` around it does not change its derivative, so put one around its argument"
ADVICE = {
    "log": "took the logarithm of {least:.4g}: bound its argument, as in `log(maximum(x, 1e-12))`.",
    "log1p": "took the logarithm of 1 + {least:.4g}: bound its argument, as in `log(maximum(x, 1e-12))`.",
    "sqrt": "took the square root of {least:.4g}: write `sqrt(maximum(x, 0) + eps)`.",
    "rsqrt": "took the square root of {least:.4g}: write `sqrt(maximum(x, 0) + eps)`.",
    "derivative of sqrt": "took the derivative of a square root at zero, which is infinite (a norm, Adam, RMSProp, "
    "Adagrad): write `sqrt(x + eps)`, or `optax.adam(..., eps_root=1e-6)`.",
    "div by zero": f"divided by zero: bound the denominator. Where this is a logarithm's derivative, {INSIDE}.",
    "pow": f"raised {{least:.4g}} to the power {{power:.4g}}: bound the base away from zero; {INSIDE}.",
    "negative power of zero": f"raised zero to a negative power: bound the base away from zero; {INSIDE}.",
    "exp": "took the exponential of {most:.4g}: bound its argument, or subtract the largest.",
    "custom_linear_solve": "found no solution: the matrix is singular, or nearly so; raise the solver's `damping`.",
}
OURS, JAX = (os.path.join(os.path.dirname(file), "") for file in (os.path.dirname(__file__), jax.__file__))
NOT_THE_USERS = (OURS, JAX, os.path.join(os.path.dirname(os.path.dirname(jax.__file__)), "optax", ""))


class Origin(NamedTuple):
    """The operation at which finite numbers became one that is not.

    Attributes:
      operation: the name of its primitive; "" where the number is a constant of the program.
      operands: the operation's operands; or the constant.
      place: the user's line, "train.py:31, in train_loss", or "".
    """

    operation: str
    operands: list[np.ndarray]
    place: str

    @property
    def overflows(self) -> bool:
        """True for arithmetic whose result is too large."""
        return self.operation in ARITHMETIC and _largest(self.operands) > 0

    def __str__(self) -> str:
        """The origin and its cause in words: "where …"."""
        place = f" ({self.place})" if self.place else ""
        if not self.operation:
            return f"as a constant of the program{place}: in its data, or as a number written in the code."
        return f"where `{self.operation}`{place} {_explain(self.operation, self.operands)}"


class _Entry(NamedTuple):
    """The search leads to an operand that was not finite already.

    Attributes:
      operand: its number.
      hint: the innermost operation that received it, named if it made a NaN of infinities.
    """

    operand: int
    hint: Origin


# The search. Let y be a result that is not finite. Take the equation y = f(x_1, …, x_n) that computes it.
#   - f calls a program: search inside, from the same result. That yields the origin, or the number of an operand.
#   - some x_i is not finite where y is not (a NaN before an infinity): go on from x_i.
#   - all x_i are finite there: f is the origin.
# Within a scan the search begins at the first iteration whose result is not finite. If it leads to the carry, it goes
# on from that carry's component in earlier iterations.


def find_origin(fn: Callable, *args: Any) -> Origin | None:
    """Follows a result of `fn(*args)` that is not finite back to its origin.

    None if all results are finite, if the search fails, or if it ends at a NaN that a derivative rule gave on purpose.
    The program is run once more, with every intermediate result kept; of a loop, those of one iteration.
    """
    closed = jax.make_jaxpr(fn)(*args)
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(args)]
    results = jax.jit(jex.jaxpr_as_fun(closed))(*leaves)
    bad = next((i for i, x in enumerate(results) if not all_finite(x)), None)
    found = None if bad is None else _follow(closed, leaves, bad)
    return found if isinstance(found, Origin) and found.operands else None


def _follow(closed, operands, result) -> Origin | _Entry:
    """The origin of a result of a program, or the operand of the program from which it comes."""
    program, values = closed.jaxpr, _values(closed, operands)
    made = {v: (equation, i) for equation in program.eqns for i, v in enumerate(equation.outvars)}
    v, hint, equation = program.outvars[result], Origin("", [], ""), None
    while not isinstance(v, jex.Literal) and v in made:
        equation, which = made[v]
        given = [_read(values, x) for x in equation.invars]
        found = _follow_inside(equation, given, which) or _blame(equation, given, _read(values, v))
        if isinstance(found, Origin):
            return found
        v, hint = equation.invars[found.operand], found.hint if found.hint.operation else hint
        hint = hint if hint.place else found.hint
    if isinstance(v, jex.Literal):
        # A NaN that a derivative rule of this library writes is a report, with a message of its own.
        return Origin("", [], "") if equation is not None and is_ours(equation) else _constant(hint, v.val)
    return _Entry(program.invars.index(v), hint) if v in program.invars else _constant(hint, values[v])


def _constant(hint, value) -> Origin:
    return hint if hint.operation else Origin("", [_as_numpy(value)], hint.place)


def _blame(equation, given, result) -> Origin | _Entry:
    """The equation itself, or the operand that its result is due to: one with a NaN before one with an infinity."""
    wrong = np.isnan(result) if np.isnan(result).any() else ~np.isfinite(result)
    name, place = equation.primitive.name, place_of(equation)
    for test in (np.isnan, np.isinf):
        for i, x in enumerate(given):
            if not is_inexact(x) or not (test(x) & wrong if np.shape(x) == wrong.shape else test(x)).any():
                continue
            # An infinity may be intended, as in a mask; a NaN made of it is not.
            made_here = np.isnan(result).any() and not np.isnan(x).any()
            return _Entry(i, Origin(name if made_here else "", given, place))
    return Origin(name, given, place)


def _follow_inside(equation, given, which) -> Origin | _Entry | None:
    """The same within an equation that calls a program; None for all others."""
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return _follow_scan(equation, given, which)
    if name == "cond":
        found = _follow(params["branches"][int(given[0])], given[1:], which)
        return found._replace(operand=found.operand + 1) if isinstance(found, _Entry) else found
    bodies = [p for p in params.values() if hasattr(p, "eqns")]
    if len(bodies) != 1 or name == "shard_map":
        return None
    body = bodies[0] if hasattr(bodies[0], "jaxpr") else jex.ClosedJaxpr(bodies[0], ())
    # A call runs its program on the equation's operands.
    is_call = [v.aval.shape for v in body.jaxpr.invars] == [np.shape(x) for x in given]
    return _follow(body, given, which) if is_call else None


def _follow_scan(equation, given, which) -> Origin | _Entry | None:
    """The same within the iteration at which the result became not finite, and from there in earlier ones."""
    body, length = equation.params["jaxpr"], equation.params["length"]
    num_consts, num_carry = scan_layout(equation)
    start = num_consts + num_carry
    order = range(length)[:: -1 if equation.params["reverse"] else 1]
    run = jax.jit(jex.jaxpr_as_fun(body))
    end = length
    while True:
        carry = given[num_consts:start]
        for i in order[:end]:
            operands = [*given[:num_consts], *carry, *(x[i] for x in given[start:])]
            after = run(*operands)
            if not all_finite(after[which]):
                break
            carry = after[:num_carry]
        else:
            return None
        found = _follow(body, operands, which)
        end = order.index(i)
        if isinstance(found, Origin) or found.operand not in range(num_consts, start) or end == 0:
            return found
        which = found.operand - num_consts


def _values(closed, operands) -> dict:
    """The value of every variable of a program."""
    program = closed.jaxpr
    made = [v for e in program.eqns for v in named(e.outvars)]
    unnamed = program.debug_info._replace(result_paths=None)  # the results have other paths now
    every = jex.ClosedJaxpr(program.replace(outvars=made, debug_info=unnamed), closed.consts)
    found = jax.jit(jex.jaxpr_as_fun(every))(*operands)
    variables = [*program.constvars, *program.invars, *made]
    return dict(zip(variables, [*closed.consts, *operands, *found], strict=True))


def _read(values, v):
    return _as_numpy(v.val if isinstance(v, jex.Literal) else values[v])


def _as_numpy(x):
    if not is_inexact(x):
        return x
    return np.asarray(x, np.float32 if jnp.result_type(x).itemsize < 4 else None)  # NumPy has no bfloat16


def place_of(equation) -> str:
    """The innermost line that is neither ours nor JAX's."""
    frame = _frame(equation, NOT_THE_USERS)
    return f"{os.path.basename(frame.file_name)}:{frame.line_num}, in {frame.function_name}" if frame else ""


def stops_in(program: Any) -> list[str]:
    """The user's lines that stop a gradient in a jaxpr; JAX's own (of a softmax's largest logit) are harmless."""
    found = set()
    for equation in equations(program):
        if equation.primitive.name == STOP and not is_ours(equation):
            # Outermost, as its own derivative calls it again.
            pairs = itertools.pairwise(equation.source_info.traceback.frames)
            callers = [after for frame, after in pairs if frame.function_name == STOP]
            if callers and not callers[-1].file_name.startswith(JAX):
                found.add(place_of(equation))
    return sorted(found - {""})


def is_ours(equation) -> bool:
    """Returns whether the innermost line that is not JAX's is ours."""
    frame = _frame(equation, JAX)
    return frame is not None and frame.file_name.startswith(OURS)


def _frame(equation, folders):
    """The innermost frame whose file is in none of these folders, or None."""
    trace = getattr(equation.source_info, "traceback", None)
    frames = trace.frames if trace is not None else ()
    return next((frame for frame in frames if not frame.file_name.startswith(folders)), None)


def _largest(operands) -> float:
    """The largest magnitude; 0 where an operand is not finite."""
    floats = [np.abs(x) for x in operands if is_inexact(x) and x.size]
    return max((x.max() for x in floats), default=0.0) if all_finite(floats) else 0.0


def _explain(operation, operands) -> str:
    """The operation's mistake, and what to write instead."""
    floats = [x for x in operands if is_inexact(x) and x.size]
    if not floats or any(map(np.iscomplexobj, floats)):
        return FINITE
    first, last, largest = floats[0], floats[-1], _largest(operands)
    if operation == "div" and (last == 0).any():
        operation = "derivative of sqrt" if np.all(first == 0.5) else "div by zero"  # d√x/dx = 0.5 / √x
    if operation == "integer_pow" and (first == 0).any():
        operation = "negative power of zero"
    if operation in ADVICE:
        return ADVICE[operation].format(least=np.nanmin(first), most=first.max(), power=last.min())
    if operation in ARITHMETIC and largest:
        return f"overflowed: its largest operand is {largest:.3g}."
    if all_finite(floats):
        return FINITE
    return "met infinities that cancel or multiply zero: mask with a large finite number."
