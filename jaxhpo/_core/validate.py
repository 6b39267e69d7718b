"""Checks of arguments. Every message says what was given, why it cannot work, and what to write instead."""

import dataclasses
import inspect
import math
import numbers
import reprlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.tree import is_inexact, named_leaves
from jaxhpo._core.types import InnerState, PyTree, Solution


def check_count(what: str, value, minimum: int = 1) -> None:
    """Raises unless `value` is an integer ≥ `minimum` (and not a bool)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise JaxhpoError(f"`{what}` got {describe(value)}, but it is a count: write a Python integer such as 100.")
    if value < minimum:
        raise JaxhpoError(f"`{what}` got {value}, but it must be at least {minimum}: write {minimum} or more.")


def check_nonnegative(what: str, value, strict: bool = False) -> None:
    """Raises unless `value` is a finite Python number ≥ 0, or > 0 where `strict`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise JaxhpoError(
            f"`{what}` got {describe(value)}, but it is fixed while tracing and must be a plain number: write a Python "
            "float such as 0.1."
        )
    if not math.isfinite(value) or value < 0 or (strict and value == 0):
        bound = "above 0" if strict else "at least 0"
        raise JaxhpoError(f"`{what}` got {value}, but it must be finite and {bound}: write such a number.")


def check_positive(what: str, value) -> None:
    """Raises unless `value` is a finite Python number > 0."""
    check_nonnegative(what, value, strict=True)


def check_choice(what: str, value: Any, *choices: str) -> None:
    """Raises unless the value is one of some strings."""
    if not isinstance(value, str) or value not in choices:
        some = f"{', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}"
        raise JaxhpoError(f"`{what}` got {describe(value)}: write {some}.")


def check_switch(what: str, value) -> None:
    """Raise unless `value` is a bool."""
    if not isinstance(value, bool):
        raise JaxhpoError(f"`{what}` got {describe(value)}, but it is a switch: write True or False.")


_KINDS = {"count": check_count, "positive": check_positive, "nonnegative": check_nonnegative, "switch": check_switch}


def check_settings(config: Any, **kinds: str) -> None:
    """Check fields of a frozen dataclass, each of a kind in `_KINDS`, which may end with "or None".

    `check_settings(self, rank="count", tol="positive or None")` names a field in messages as `Nystrom(rank=...)`.
    NumPy's numbers become Python's, which take the types of the arrays that they meet.
    """
    for name, kind in kinds.items():
        value, (kind, *rest) = getattr(config, name), kind.split(" or ")
        if isinstance(value, np.generic):
            value = value.item()
            object.__setattr__(config, name, value)
        if value is not None or not rest:
            _KINDS[kind](f"{type(config).__name__}({name}=...)", value)


def check_traceable_number(what: str, value) -> None:
    """As `check_nonnegative`, but accepts a JAX scalar too: checks the value if it is concrete, else the type."""
    if isinstance(value, jax.Array):
        if value.shape != () or not jnp.issubdtype(value.dtype, np.number) or jnp.iscomplexobj(value):
            raise JaxhpoError(f"`{what}` is {describe(value)}, but one real number is needed: write 0.1, for example.")
        if isinstance(value, Tracer):
            return
        value = value.item()
    check_nonnegative(what, value)


def describe(leaf) -> str:
    """`float32[3]` for an array, the value and its type for anything else."""
    if hasattr(leaf, "dtype"):
        return f"{leaf.dtype}{list(getattr(leaf, 'shape', ()))}"  # a traced Python number has no shape
    return f"{reprlib.repr(leaf)} ({type(leaf).__name__})"


def is_array(leaf) -> bool:
    """Returns whether JAX can compute with the leaf: an array of numbers, booleans or keys, or a Python number."""
    if isinstance(leaf, (bool, int, float, complex, jax.Array)):
        return True
    if not isinstance(leaf, (np.ndarray, np.generic)):
        return False
    return leaf.dtype.kind in "biufc" or jnp.issubdtype(leaf.dtype, np.number)  # kind V: bfloat16 and similar dtypes


def is_real_float(leaf) -> bool:
    """Returns whether the leaf is a real floating-point array or number."""
    return is_array(leaf) and is_inexact(leaf) and not jnp.iscomplexobj(leaf)


def check_finite(tree: PyTree, what: str, allow_infinite: bool = False) -> None:
    """Raises where a concrete leaf holds NaN (or an infinity). Traced leaves pass: `info.finite` reports on them."""
    for name, leaf in named_leaves(tree, what):
        if isinstance(leaf, Tracer) or not is_inexact(leaf):
            continue
        xp, values = np, leaf
        if not isinstance(leaf, jax.Array):  # as JAX will hold it: 1e300 is infinite in float32
            with np.errstate(over="ignore"):
                values = np.asarray(leaf).astype(jnp.result_type(leaf))
        elif not leaf.is_fully_addressable or any(device.platform != "cpu" for device in leaf.devices()):
            xp = jnp  # where the array lies; on the host NumPy spares a compilation for each shape
        with jax.ensure_compile_time_eval():  # concrete even while an enclosing function is traced
            bad = xp.isnan(values) if allow_infinite else ~xp.isfinite(values)
            count = int(xp.sum(bad))
        if count:
            at = f", the first at index {np.argwhere(np.asarray(bad))[0].tolist()}" if bad.ndim else ""
            raise JaxhpoError(
                f"`{name}` is {describe(leaf)} with {count} entries that are NaN or infinite{at}, so every result "
                "would be NaN. Clean the values, or mask them inside the loss."
            )


def check_params(params: PyTree, what: str, may_be_empty: bool = False) -> PyTree:
    """Raises unless every leaf is a finite, real, floating-point array; returns the tree as JAX arrays."""
    if isinstance(params, InnerState | Solution):
        instead = "pass its `.params`" if what == "params" else "write `solve(solver, state, hparams, batches)`"
        raise JaxhpoError(f"`{what}` got a whole {type(params).__name__}, which holds more than that: {instead}.")
    if not jax.tree.leaves(params) and not may_be_empty:
        constant = " to differentiate by, as what a loss closes over is constant" * (what == "hparams")
        raise JaxhpoError(f"`{what}` got {params!r}, which has no leaves{constant}: give a pytree of floats.")
    for name, leaf in named_leaves(params, what):
        if not is_array(leaf):
            raise JaxhpoError(f"`{name}` is {describe(leaf)}, not an array: give floating-point arrays or floats.")
        if not is_real_float(leaf):
            close_over = "keep it out of the tree by closing over it (also under `jax.grad(..., allow_int=True)`)"
            instead = f"write a float (`1.0`, `.astype(float)`), or {close_over}"
            if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
                instead = close_over
            elif jnp.iscomplexobj(leaf):
                instead = "hold the real and the imaginary part as two leaves, and write `re + 1j * im` in the loss"
            raise JaxhpoError(
                f"`{name}` is {describe(leaf)}, but only real floating-point values have a gradient here: {instead}."
            )
    check_finite(params, what)  # before the conversion, which makes tracers of constants while tracing
    # With an explicit dtype nothing is weakly typed: a weak type would change after the first update, and trace again.
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), params)
    if not may_be_empty and not any(leaf.size for leaf in jax.tree.leaves(params)):
        raise JaxhpoError(f"`{what}` has no entries, only empty arrays: give arrays of at least one number.")
    return params


def check_hparams(hparams: PyTree) -> PyTree:
    """Raises unless these are finite hyperparameters, or none at all (None, `{}`); returns them as JAX arrays."""
    return check_params(hparams, "hparams", may_be_empty=True)


def check_arrays(tree: PyTree, what: str) -> PyTree:
    """Raises unless every leaf is an array of some kind; returns the tree unchanged."""
    for name, leaf in named_leaves(tree, what):
        if not is_array(leaf):
            raise JaxhpoError(
                f"`{name}` is {describe(leaf)}, not an array that JAX can compute with: convert it to numbers "
                "(`np.asarray(x, float)`), or leave it out of the tree."
            )
    return tree


def check_callable(what: str, fn, signature: str, num_args: int, or_else: str = "", keywords: tuple = ()) -> None:
    """Raises unless `fn` can be called with `num_args` positional arguments; `or_else` ends the advice."""
    if not callable(fn):
        raise JaxhpoError(f"`{what}` got {describe(fn)}, which cannot be called: give a function `{signature}`.")
    try:
        inspect.signature(fn).bind(*range(num_args), **dict.fromkeys(keywords))
    except TypeError:
        raise JaxhpoError(
            f"`{what}` got a function of signature `{inspect.signature(fn)}`, but it is called with {num_args} "
            f"positional arguments{''.join(f' and `{k}=`' for k in keywords)}: write it as `{signature}`{or_else}."
        ) from None
    except ValueError:
        pass  # a builtin without a signature


def check_scalar(value, what: str) -> jax.Array:
    """Raises unless the result of `what` is a real floating-point scalar; returns it as an array."""
    if isinstance(value, tuple):
        problem = f"a tuple of {len(value)}, but it must return a scalar: return the loss alone"
    elif not isinstance(value, jax.Array):
        problem = f"{describe(value)}, which JAX cannot differentiate: return a scalar array computed with `jax.numpy`"
    elif value.shape != ():
        problem = f"shape {value.shape}, but a gradient needs a scalar: take `.mean()` or `.sum()`"
    elif jnp.issubdtype(value.dtype, jnp.floating):
        return value
    elif jnp.iscomplexobj(value):
        problem = f"{describe(value)}, which has no least value: return a real floating-point scalar, `jnp.abs(x)`, say"
    else:
        problem = (
            f"{describe(value)}, which has no gradient: return a real floating-point scalar, such as a cross-entropy "
            "in place of a count of errors, or that count as a float for `EvolutionStrategies`"
        )
    raise JaxhpoError(f"`{what}` returned {problem}.")


def check_one_training(carry: Any) -> None:
    """Raises where a carry is that of a single-loop method: no derivative of one update is its hypergradient."""
    if getattr(type(carry), "single_loop", False) is True:  # not a field of that name
        raise JaxhpoError(
            f"`carry` got a {type(carry).__name__}, but the hypergradient of a single-loop method gathers over its "
            "updates: the outer loss that one of them reports is that of parameters which have not followed the "
            "hyperparameters yet, and has no derivative to hold it against. For `tune`, omit `on_error` and "
            "`record='error'`; to check the loss, take `Implicit()` or `Unroll()` in a `solve` of many steps."
        )


def check_key(key: Any) -> Any:
    """Raises unless `key` is one typed key, or None; returns it."""
    if key is None:
        return None
    if not hasattr(key, "dtype") or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        hint = "jax.random.wrap_key_data(key)" if getattr(key, "shape", None) == (2,) else "jax.random.key(0)"
        raise JaxhpoError(f"`key` got {describe(key)}, but a typed key is needed: write `{hint}`.")
    if key.shape != ():
        raise JaxhpoError(f"`key` got an array of keys of shape {key.shape}, but one key is needed: index it.")
    return key


def require_key(key: Any, who: Any) -> jax.Array:
    """Returns the key; raises where `who`, which draws random numbers, got none."""
    if check_key(key) is None:
        raise JaxhpoError(
            f"{who!r} draws random numbers, but got no key: write `solve(..., key=key)`, for a pair `update(..., "
            "key=key)`, with another key at every outer step (under `tune`, that of `outer_loss(hparams, carry, key)`)."
        )
    return key


def check_residual(out: PyTree, params: PyTree, what: str = "condition", root: str = "params") -> PyTree:
    """Raises unless the result of `what` is real, floating-point, and of the structure and shapes of `params`."""
    got, want = jax.tree.structure(out), jax.tree.structure(params)
    instead = f"return one array per leaf of `{root}`"
    if what == "condition" and is_array(out) and jnp.shape(out) == ():
        instead += " (for an objective, write its gradient, `jax.grad(objective)`)"
    if got != want:
        raise JaxhpoError(f"`{what}` returned the tree {got}, but `{root}` is {want}: {instead}.")
    for (name, p), o in zip(named_leaves(params, root), jax.tree.leaves(out), strict=True):
        if not is_real_float(o) or jnp.shape(o) != p.shape:
            raise JaxhpoError(
                f"`{what}` returned {describe(o)} for `{name}`, which is {describe(p)}: {instead}, of the same shape "
                "and floating-point."
            )
    return out


def count_examples(batch: PyTree, purpose: str) -> int:
    """Return the length of the leading axis that all leaves of a batch share; scalars have none.

    Args:
      batch: the batch.
      purpose: what the examples are counted for, as the beginning of a message.
    """
    lengths = {name: leaf.shape[0] for name, leaf in named_leaves(batch, "batch") if jnp.ndim(leaf)}
    if not lengths:
        raise JaxhpoError(
            f"{purpose}, but the batches hold no examples: pass the data as the batch, with a leading axis of examples "
            "in each leaf, and do not close over it."
        )
    first, *_ = lengths
    for other, length in lengths.items():
        if length != lengths[first]:
            raise JaxhpoError(
                f"{purpose}, but `{first}` has {lengths[first]} examples and `{other}` has {length}: their leading "
                "axes must be the examples. Pass data that belongs to no example as scalars, or close over it."
            )
    return lengths[first]


def short_name(value: Any) -> str:
    """The call that makes a dataclass: omits settings at their default, writes required ones by position."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return getattr(value, "__name__", None) or repr(value)
    parts, missing = [], dataclasses.MISSING
    for i, field in enumerate(dataclasses.fields(value)):
        setting = getattr(value, field.name)
        nested = dataclasses.is_dataclass(setting)
        required = field.default is missing and field.default_factory is missing
        if required or (nested and i == 0):
            parts.append(short_name(setting))
        elif nested or field.default is missing or setting != field.default:
            parts.append(f"{field.name}={short_name(setting)}")
    return f"{type(value).__name__}({', '.join(parts)})"
