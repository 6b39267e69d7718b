"""Checks of the arguments of `tune` and `outer_step`, and one form for the outer loss."""

import datetime
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.types import Hypergradient, Solver
from jaxhpo._core.validate import (
    check_arrays,
    check_callable,
    check_count,
    check_nonnegative,
    check_positive,
    check_residual,
    check_scalar,
    check_switch,
    describe,
)
from jaxhpo._tune.history import EXTRAS
from jaxhpo._tune.remedies import Remedies

WITH_CARRY = "outer_loss(hparams, carry, key) -> (value, carry, info)"


def in_one_form(outer_loss, gradient) -> tuple[Any, Callable | None]:
    """Converts both forms of the outer loss into one; raises for anything else.

    Returns:
      `(hparams, carry, key) -> (value, carry, info)`, or None, and in place of its differentiation
      `(hparams, carry, key) -> (value, hypergradient, carry, info)`, or None.
    """
    gradient = None if gradient is None else _checked_gradient(gradient)
    if outer_loss is None:
        if gradient is None:
            raise JaxhpoError("`outer_loss` got None without a `gradient`: pass a function `outer_loss(hparams)`.")
        return None, gradient
    if takes_carry(outer_loss):

        def loss(hparams, carry, key):
            value, carry, info = _outputs(outer_loss(hparams, carry, key), "outer_loss", "value, carry, info")
            return check_scalar(value, "outer_loss"), carry, info

        return loss, gradient
    check_callable("outer_loss", outer_loss, "outer_loss(hparams)", 1, " or `outer_loss(hparams, carry, key)`")
    return lambda h, carry, key: (check_scalar(outer_loss(h), "outer_loss"), carry, None), gradient


def _checked_gradient(gradient):
    if isinstance(gradient, Hypergradient):
        raise JaxhpoError(
            "`gradient` got a pair: write `gradient=from_pair(pair)` and `carry=pair.init(params, hparams)`."
        )
    check_callable("gradient", gradient, "gradient(hparams, carry, key)", 3)

    def checked(hparams, carry, key):
        out = gradient(hparams, carry, key)
        value, hypergrad, carry, info = _outputs(out, "gradient", "value, hypergradient, carry, info")
        check_residual(hypergrad, hparams, "gradient", "hparams")
        hypergrad = jax.tree.map(lambda g, h: jnp.asarray(g, h.dtype), hypergrad, hparams)
        return check_scalar(value, "gradient"), hypergrad, carry, info

    return checked


def _outputs(out, what, wanted) -> tuple:
    if not isinstance(out, tuple) or len(out) != len(wanted.split()):
        raise JaxhpoError(
            f"`{what}(hparams, carry, key)` returned {describe(out)}: return `({wanted})`; carry and info may be None."
        )
    check_arrays(out[-2], "carry")
    check_arrays(out[-1], "info")
    return out


def takes_carry(outer_loss) -> bool:
    """Returns whether exactly three positional arguments are required: defaults do not make a carry."""
    try:
        parameters = inspect.signature(outer_loss).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters) == 3


def check_optimizer(optimizer, transforms) -> None:
    """Raises unless these are an optax transformation and instances of transforms."""
    has_both = hasattr(optimizer, "init") and hasattr(optimizer, "update")
    if not has_both or isinstance(optimizer, (type, Solver)):
        raise JaxhpoError(
            f"`optimizer` got {describe(optimizer)}, not an optax transformation: write `optax.adam(0.1)`, say."
        )
    for transform in jax.tree.leaves(transforms):
        if isinstance(transform, type):
            name = transform.__name__
            raise JaxhpoError(
                f"`transforms` got the class {name}, not an instance: write `{name}(...)`, as `box(0.0, 1.0)`."
            )


def check_policies(remedies, outer_loss, gradient, on_not_finite="stop", monitor=None) -> None:
    """Raises for a policy that is invalid, or that needs the key or the info of an outer loss that has none."""
    if not isinstance(remedies, Remedies):
        raise JaxhpoError(f"`remedies` got {describe(remedies)}: write `jaxhpo.Remedies(clip=0.5)`, say.")
    check_choice("on_not_finite", on_not_finite, "stop", "skip", "backtrack")
    if monitor is not None:
        check_callable("monitor", monitor, "monitor(info)", 1)
    if outer_loss is None or not is_deterministic(outer_loss, gradient):
        return
    for is_wanted, problem, instead in (
        (remedies.accumulate > 1, f"`{remedies!r}` averages over keys, and all outer losses would be equal", ""),
        (on_not_finite == "skip", "`on_not_finite='skip'` takes the next key, and would fail again", " or 'backtrack'"),
        (monitor is not None, "`monitor(info)` needs an info", ""),
    ):
        if is_wanted:
            raise JaxhpoError(
                f"{problem}, since `outer_loss(hparams)` has neither key nor info: write `{WITH_CARRY}`{instead}."
            )


def check_choice(what: str, value: Any, *choices: str) -> None:
    """Raises unless the value is one of some strings."""
    if not isinstance(value, str) or value not in choices:
        some = f"{', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}"
        raise JaxhpoError(f"`{what}` got {describe(value)}: write {some}.")


def is_deterministic(outer_loss, gradient) -> bool:
    """Returns whether the outer loss has no key, so that it has one value."""
    return gradient is None and not takes_carry(outer_loss)


def check_settings(num_steps, progress, min_delta, save_every, max_seconds, **counts):
    """Raises for a setting of `tune` that is not valid."""
    check_count("num_steps", num_steps)
    check_nonnegative("min_delta", min_delta)
    check_switch("progress", progress)
    for what, value in counts.items():
        if value is not None:
            check_count(what, value)
    if max_seconds is not None:
        check_positive("max_seconds", max_seconds)
    if isinstance(save_every, float):
        raise JaxhpoError(
            f"`save_every` got {save_every!r}, which may be steps or seconds: write an integer for outer steps, "
            f"`datetime.timedelta(seconds={save_every!r})` for time."
        )
    if not isinstance(save_every, datetime.timedelta):
        check_count("save_every", save_every)
    elif save_every < datetime.timedelta(0):
        raise JaxhpoError(f"`save_every` got {save_every!r}, a negative time: write a positive one, or zero.")


def check_record(record) -> tuple[str, ...]:
    """Returns the names of extra columns as a tuple; raises for an unknown one."""
    wanted = tuple(record) if isinstance(record, (tuple, list, set)) else (record,)
    for name in wanted:
        if not isinstance(name, str) or name not in EXTRAS:
            raise JaxhpoError(f"`record` got {describe(name)}, an unknown name: write some of {EXTRAS}.")
    return wanted


def check_callbacks(callbacks) -> tuple:
    """Returns the callbacks as a tuple; raises unless they are functions of one argument."""
    if callable(callbacks) or not np.iterable(callbacks):
        raise JaxhpoError(
            f"`callbacks` got {describe(callbacks)}, but it is a sequence of functions: write `callbacks=[callback]`."
        )
    listed = tuple(callbacks)
    for callback in listed:
        check_callable("callbacks", callback, "callback(tune_step)", 1)
    return listed


def convert(kind: Callable[[Any], Any], value: Any, problem: str) -> Any:
    """Returns `kind(value)`, a float or a bool; raises where a user's function returned something else."""
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise JaxhpoError(problem.format(describe(value))) from None
