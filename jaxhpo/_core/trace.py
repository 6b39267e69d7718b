"""Traced programs: closures, equations, dependence of results on inputs, derivative rules and how to look past them."""

import functools
import inspect
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jax.extend.core import primitives as jex_primitives
from jax.interpreters.partial_eval import dce_jaxpr

from jaxhpo._core.processes import exchange
from jaxhpo._core.tree import is_inexact, partition
from jaxhpo._core.types import PyTree


def closure_convert(fn: Callable, *args) -> tuple[Callable, list]:
    """Returns `pure, consts` with `pure(consts, *args) == fn(*args)`, where `pure` closes over nothing.

    Every array that `fn` closes over becomes an explicit argument, whether it is a tracer or not, of any dtype.
    (`jax.closure_convert` converts floating-point tracers only. A perturbed value that stays closed over would get a
    silent zero from a custom derivative rule.)
    """
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    structure, jaxpr, consts = jax.tree.structure(shape), closed.jaxpr, list(closed.consts)
    del closed  # `pure` outlives this trace, and must not keep its values alive

    def pure(consts, *args):
        leaves = jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, consts))(*jax.tree.leaves(args))
        return jax.tree.unflatten(structure, leaves)

    return pure, consts


def hoisted(fn: Callable, *args) -> tuple[Any, tuple]:
    """Returns `jax.jit(fn), args`; with several processes, what `fn` closes over is among the arguments.

    JAX does not compile an array that is spread over several processes into a program as a constant.
    """
    if jax.process_count() == 1:
        return jax.jit(fn), args
    pure, consts = closure_convert(fn, *args)
    return jax.jit(pure), (consts, *args)


def compilable(fn: Callable, *args) -> tuple[Any, tuple]:
    """Returns what `hoisted` does; with several processes, after all of them have compiled it."""
    program, args = hoisted(fn, *args)
    if jax.process_count() > 1:  # one that cannot must not leave the others in it
        program.lower(*args).compile()
        exchange()
    return program, args


# --- equations -------------------------------------------------------------------------------------------------------


def subprograms(value: Any) -> list:
    """The jaxprs, open or closed, in a parameter of an equation."""
    if isinstance(value, (tuple, list)):
        return [sub for item in value for sub in subprograms(item)]
    return [value] if hasattr(value, "eqns") else []


def equations(program: Any) -> Iterator:
    """Iterates over the equations of a jaxpr and of all jaxprs that it calls."""
    for equation in program.eqns:
        yield equation
        for inner in subprograms(list(equation.params.values())):
            yield from equations(inner)


def named(variables: Sequence) -> list:
    """The variables that something may use; the type of the others, `DropVar`, is public since jax 0.10 only."""
    return [v for v in variables if type(v) is jex.Var]


def primitives(fn: Callable, *args) -> set[str]:
    """The names of all primitives in the jaxpr of `fn(*args)`."""
    return {equation.primitive.name for equation in equations(jax.make_jaxpr(fn)(*args).jaxpr)}


def scan_layout(eqn) -> tuple[int, int]:
    """The numbers of constants and of carried values, which are the first operands of a scan.

    An operand that is scanned over, or a result that is stacked, has one axis more outside the body than inside. (The
    names of the scan's parameters differ between versions of JAX.)
    """
    body = getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])
    stacked = [v.aval.ndim > w.aval.ndim for v, w in zip(eqn.outvars, body.outvars, strict=True)]
    scanned = [v.aval.ndim > w.aval.ndim for v, w in zip(eqn.invars, body.invars, strict=True)]
    num_carry = stacked.count(False)
    return scanned.count(False) - num_carry, num_carry


# --- dependence ------------------------------------------------------------------------------------------------------


def used_inputs(fn: Callable, *args) -> list[bool]:
    """For each leaf of `args`, whether any result of `fn(*args)` depends on it."""
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    return dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[1]


def dependent_results(fn: Callable, *args) -> list[bool]:
    """For each leaf of the result of `fn(*args)`, whether it depends on any leaf of `args`.

    One pass forward through the jaxpr. (Dead-code elimination for each result would be quadratic: 2 s instead of 0.02 s
    for the gradient in 200 leaves.)
    """
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    return _reached(jaxpr, [True] * len(jaxpr.invars))


def differentiable_inputs(fn: Callable, tree: PyTree) -> list[bool]:
    """For each leaf, all floating-point, whether the derivative of `fn(tree)` with respect to it can be non-zero.

    Structural: a leaf that `fn` ignores, or whose gradient `fn` stops, has a cotangent that is a constant zero. The
    cotangents of the results are scaled by a tracer; a leaf counts where its own cotangent depends on that tracer.
    """

    def backward(scale):
        out, pullback = jax.vjp(fn, tree)
        return pullback(jax.tree.map(lambda x: jnp.ones_like(x) * scale.astype(x.dtype), out))[0]

    return dependent_results(backward, jnp.ones(()))


def flat_by(fn: Callable, tree: PyTree) -> list[list[str]]:
    """For each leaf on which `fn(tree)` depends through piecewise constant operations alone, their names; else none."""
    jaxpr = jax.make_jaxpr(fn)(tree).jaxpr
    found = []
    for v in jaxpr.invars:
        marked, met = [v is other for other in jaxpr.invars], []
        cut = lambda name: name != STOP and not met.append(name)  # noqa: B023, E731
        is_flat = any(_reached(jaxpr, marked)) and not any(_reached(jaxpr, marked, cut))
        # Those that alone keep the leaf from the result; none where several lie in a row.
        names = sorted(set(met)) if is_flat else []
        alone = [name for name in names if any(_reached(jaxpr, marked, functools.partial(operator.ne, name)))]
        found.append(alone or names)
    return found


def rounding_to_integers(program: Any) -> list[str]:
    """The operations, with a derivative of zero, by which a jaxpr rounds what depends on its first argument."""
    met: list[str] = []
    marked = [i == 0 for i in range(len(program.invars))]
    _reached(program, marked, lambda name: bool(met.append(name)))  # cuts nothing
    return sorted(set(met) & {*FLAT, "convert_element_type", "bitcast_convert_type"} - {"sign"})


def flow_through_steps(step: Any, marked: list[bool], num_steps: int, *, past_stops: bool) -> list[bool]:
    """For each leaf of the state after some steps, whether it has a derivative with respect to a marked input.

    Args:
      step: the jaxpr of a step, from the leaves of the state and others to those of the next state.
      marked: for each input of the first step.
      num_steps: how many steps.
      past_stops: whether `stop_gradient` is passed as if it were not there.
    """
    cut: Callable[[str], bool] = functools.partial(operator.ne, STOP) if past_stops else lambda name: True
    out = marked[: len(step.outvars)]
    for _ in range(num_steps):
        out = _reached(step, marked, cut)
        after = [a or b for a, b in zip(marked, out, strict=False)] + marked[len(out) :]
        if after == marked:
            break
        marked = after
    return out


FLAT = {"floor", "ceil", "round", "sign"}  # piecewise constant operations whose result is floating-point
STOP = "stop_gradient"  # JAX's name of this primitive, an identity with the derivative zero


def _reached(jaxpr, marked: list[bool], cut: Callable[[str], bool] | None = None) -> list[bool]:
    """For each result of a jaxpr, whether it depends on a marked input.

    With `cut`, not through piecewise constant operations, or `stop_gradient`, for whose names it is true.
    """
    reached = {v for v, m in zip(jaxpr.invars, marked, strict=True) if m}
    for eqn in jaxpr.eqns:
        ins = [not isinstance(v, jex.Literal) and v in reached for v in eqn.invars]
        if any(ins):
            out = {v for v, m in zip(eqn.outvars, _reached_by(eqn, ins, cut), strict=True) if m}
            flat = {v for v in out if eqn.primitive.name in {STOP, *FLAT} or not is_inexact(v.aval)}
            if eqn.primitive.name == "sort":  # what is ordered by a marked key, which alone it depends on
                flat |= {v for v, m in zip(eqn.outvars, ins, strict=True) if not m}
            of_floats = any(m and is_inexact(v.aval) for v, m in zip(eqn.invars, ins, strict=True))
            is_call = bool(subprograms(list(eqn.params.values())))
            if cut and flat and of_floats and not is_call and cut(eqn.primitive.name):
                out -= flat
            reached |= out
    return [not isinstance(v, jex.Literal) and v in reached for v in jaxpr.outvars]


def _reached_by(eqn, marked: list[bool], cut: Callable[[str], bool] | None) -> list[bool]:
    """`_reached` for an equation: exact where it runs one jaxpr on its operands, else True for all its results."""
    bodies = [getattr(value, "jaxpr", value) for value in subprograms(list(eqn.params.values()))]
    if len(bodies) != 1 or (len(bodies[0].invars), len(bodies[0].outvars)) != (len(marked), len(eqn.outvars)):
        return [True] * len(eqn.outvars)
    if eqn.primitive.name != "scan":
        return _reached(bodies[0], marked, cut)
    start, num_carry = scan_layout(eqn)
    end = start + num_carry
    while True:  # a carried value that depends on a marked one after an iteration is marked in the next
        out = _reached(bodies[0], marked, cut)
        carried = [a or b for a, b in zip(marked[start:end], out, strict=False)]
        if carried == marked[start:end]:
            return out
        marked = [*marked[:start], *carried, *marked[end:]]


# --- trust of derivative rules ---------------------------------------------------------------------------------------

_TRUSTED: set[str] = set()  # the library's own functions, as the debug information of a jaxpr names them


def trust(function: Callable) -> Callable:
    """Decorator: declares that a derivative rule of the library is right, or raises where JAX takes it further."""
    plain = inspect.unwrap(function)
    _TRUSTED.add(f"{plain.__name__} at {plain.__code__.co_filename}:{plain.__code__.co_firstlineno}")
    return function


def untrusted_rule(fn: Callable, *args) -> str | None:
    """Returns the name and place of a function in `fn(*args)` whose derivative rule may be no derivative, or None.

    A `custom_vjp` is not trusted: it may reverse or clip a gradient, and then the Jacobian of the gradient is not
    symmetric. A `custom_jvp` is trusted, as JAX differentiates its rule like any other function, unless it is an
    identity that changes the tangent: such a function exists only to alter gradients.
    """
    for equation in equations(jax.make_jaxpr(fn)(*args).jaxpr):
        kind = equation.primitive.name
        if kind not in ("custom_vjp_call", "custom_jvp_call"):
            continue
        source = _source_of(equation)
        if source not in _TRUSTED and (kind == "custom_vjp_call" or _alters_tangents(equation)):
            name, _, place = source.partition(" at ")
            return f"`{name}` ({place or 'of an unknown file'})"
    return None


def _source_of(equation) -> str:
    """The name and place of the function that a call with a derivative rule of its own was made from."""
    call = equation.params["call_jaxpr"]
    return getattr(getattr(call, "jaxpr", call).debug_info, "func_src_info", None) or "a function"


def _alters_tangents(equation) -> bool:
    """Returns whether a `custom_jvp` call returns its inputs as they are, but not their tangents."""
    body = equation.params["call_jaxpr"]
    if _computes(body):
        return False
    variables: Any = list(dict.fromkeys(v for v in equation.invars if isinstance(v, jex.Var)))
    results = [v for v in named(equation.outvars) if is_inexact(v.aval)]
    alone = jex.Jaxpr((), variables, results, [equation], debug_info=body.jaxpr.debug_info)
    call = jex.jaxpr_as_fun(jex.ClosedJaxpr(alone, ()))

    def tangents(inputs, dots):
        perturbed, combine = partition(inputs, [is_inexact(x) for x in inputs])
        return jax.jvp(lambda perturbed: call(*combine(perturbed)), (perturbed,), (dots,))[1]

    inputs = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in variables]
    try:
        jaxpr = jax.make_jaxpr(tangents)(inputs, [x for x in inputs if is_inexact(x)]).jaxpr
    except Exception:  # the rule refuses to be differentiated, so it is never used
        return False
    return _computes(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def _computes(program) -> bool:
    """Returns whether a jaxpr holds any operation, apart from calls."""
    return any(not subprograms(list(equation.params.values())) for equation in equations(program))


# --- looking past derivative rules -----------------------------------------------------------------------------------

REVERSE_ONLY = "jaxhpo_reverse_only"  # the library's identity that refuses forward mode
_JAX = os.path.join(os.path.dirname(jax.__file__), "")  # with a separator at its end: "jaxopt" begins with "jax"


def past_rules(program: Any, stops: bool = True, roots: bool = True) -> Any:
    """A jaxpr that computes the same, and whose derivative is that of what it computes.

    A function with a derivative rule of its own is called as if it had none, but for JAX's `custom_jvp`s, which say
    what a derivative is where there are two, as of `relu` at zero; with `stops`, `stop_gradient` is passed too.
    With `roots`, the square root of a zero that does not change does not change; then there is no reverse mode.
    """
    cut = {REVERSE_ONLY, *([STOP] if stops else [])}
    made = []
    for equation in program.eqns:
        kind, params = equation.primitive.name, equation.params
        if kind in cut:
            pairs = zip(equation.invars, equation.outvars, strict=True)
            copy = {"primitive": jex_primitives.copy_p, "params": {}}
            made += [equation.replace(invars=[x], outvars=[y], **copy) for x, y in pairs]
        elif kind == "custom_vjp_call" or (kind == "custom_jvp_call" and _JAX not in _source_of(equation)):
            call = {"call_jaxpr": _past_rules_inside(params["call_jaxpr"], stops, roots)}
            made.append(equation.replace(primitive=jex_primitives.closed_call_p, params=call))
        elif kind == "custom_jvp_call":
            made.append(equation)
        elif kind == "sqrt" and roots:
            x = equation.invars[0].aval
            with jax.sharding.use_abstract_mesh(x.sharding.mesh):  # another one inside of `shard_map`
                call = {"call_jaxpr": jax.make_jaxpr(_root)(x)}
            made.append(equation.replace(primitive=jex_primitives.closed_call_p, params=call))
        else:
            inside = {name: _past_rules_inside(value, stops, roots) for name, value in params.items()}
            made.append(equation.replace(params=inside))
    return program.replace(eqns=made)


@jax.custom_jvp
def _root(x):
    return jnp.sqrt(x)


@_root.defjvp
def _root_jvp(primals, tangents):
    # √(g²) where g = ġ = 0, as of a parameter that gets no gradient under Adam, does not change: JAX has 0 · ∞ = NaN.
    (x,), (dot,) = primals, tangents
    root = jnp.sqrt(x)
    return root, jnp.where(dot == 0, 0, dot / (2 * jnp.where(dot == 0, 1, root)))


def _past_rules_inside(value: Any, stops: bool, roots: bool) -> Any:
    """A parameter of an equation, with `past_rules` of every jaxpr in it."""
    if isinstance(value, jex.ClosedJaxpr):
        return value.replace(jaxpr=past_rules(value.jaxpr, stops, roots))
    if isinstance(value, jex.Jaxpr):
        return past_rules(value, stops, roots)
    if isinstance(value, (tuple, list)):
        items = [_past_rules_inside(item, stops, roots) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def rules_in(program: Any) -> list[str]:
    """The functions with a derivative rule that is neither JAX's nor the library's, by name and place."""
    calls = [e for e in equations(program) if e.primitive.name in ("custom_vjp_call", "custom_jvp_call")]
    sources = dict.fromkeys(map(_source_of, calls))
    return [source for source in sources if _JAX not in source and source not in _TRUSTED]
