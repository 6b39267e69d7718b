"""What `tune` accepts: its arguments checked, and the outer loss brought into one form."""

from __future__ import annotations

import datetime
import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

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
    describe,
)
from jaxhpo._tune.history import EXTRAS
from jaxhpo._tune.remedies import Remedies


class Evaluator(NamedTuple):
    """The outer loss in one form, and what may stand in for its differentiation."""

    loss: Callable | None  # (hparams, carry, key) -> (value, carry, info)
    gradient: Callable | None  # (hparams, carry, key) -> (value, hypergradient, carry, info)


def make_evaluator(outer_loss, gradient) -> Evaluator:
    """Brings both forms of the outer loss into one; raises for anything else."""
    if gradient is not None:
        gradient = _checked_gradient(gradient)
        if outer_loss is None:
            return Evaluator(None, gradient)
    if outer_loss is None:
        raise JaxhpoError("`outer_loss` got None without a `gradient`: pass a function `outer_loss(hparams)`.")
    if _accepts(outer_loss, 3):

        def loss(hparams, carry, key):
            out = outer_loss(hparams, carry, key)
            if not (isinstance(out, tuple) and len(out) == 3):
                raise JaxhpoError(
                    f"`outer_loss(hparams, carry, key)` returned {describe(out)}, but what it carries is expected too: "
                    f"return `(value, carry, info)`; info may be None."
                )
            return check_scalar(out[0], "outer_loss"), check_arrays(out[1], "carry"), check_arrays(out[2], "info")

        return Evaluator(loss, gradient)
    check_callable("outer_loss", outer_loss, "outer_loss(hparams)", 1, " or `outer_loss(hparams, carry, key)`")
    return Evaluator(lambda h, carry, key: (check_scalar(outer_loss(h), "outer_loss"), carry, None), gradient)


def _checked_gradient(gradient):
    if isinstance(gradient, Hypergradient):
        raise JaxhpoError(
            "`gradient` got a pair: write `gradient=from_pair(pair)` and `carry=pair.init(params, hparams)`."
        )
    check_callable("gradient", gradient, "gradient(hparams, carry, key)", 3)

    def checked(hparams, carry, key):
        out = gradient(hparams, carry, key)
        if not (isinstance(out, tuple) and len(out) == 4):
            raise JaxhpoError(
                f"`gradient(hparams, carry, key)` returned {describe(out)}, but more is expected: return "
                f"`(value, hypergradient, carry, info)`; carry and info may be None."
            )
        value, hypergrad, carry, info = out
        check_residual(hypergrad, hparams, "gradient", "hparams")
        hypergrad = jax.tree.map(lambda g, h: jnp.asarray(g, h.dtype), hypergrad, hparams)
        return check_scalar(value, "gradient"), hypergrad, check_arrays(carry, "carry"), check_arrays(info, "info")

    return checked


def _accepts(fn, num_args) -> bool:
    """Whether exactly this many positional arguments are required: defaults do not make a carry."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters) == num_args


def check_settings(optimizer, num_steps, transforms, patience, min_delta, save_every, max_seconds, progress):
    """Raises for a setting that cannot work."""
    has_both = hasattr(optimizer, "init") and hasattr(optimizer, "update")
    if not has_both or isinstance(optimizer, (type, Solver)):
        raise JaxhpoError(
            f"`optimizer` got {describe(optimizer)}, which is no optax transformation: write `optax.adam(0.1)`, say."
        )
    check_count("num_steps", num_steps)
    check_nonnegative("min_delta", min_delta)
    if patience is not None:
        check_count("patience", patience)
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
    if not isinstance(progress, bool):
        raise JaxhpoError(f"`progress` got {describe(progress)}: write True or False.")
    for transform in jax.tree.leaves(transforms):
        if isinstance(transform, type):
            name = transform.__name__
            raise JaxhpoError(
                f"`transforms` got the class {name}, not an instance: write `{name}(...)`, as `box(0.0, 1.0)`."
            )


def check_policies(remedies, on_not_finite, monitor, max_inner_steps, outer_loss, gradient):
    """Raises for a policy that cannot work."""
    if not isinstance(remedies, Remedies):
        raise JaxhpoError(f"`remedies` got {describe(remedies)}: write `jaxhpo.Remedies(clip=0.5)`, say.")
    if not isinstance(on_not_finite, str) or on_not_finite not in ("stop", "skip", "backtrack"):
        raise JaxhpoError(f"`on_not_finite` got {describe(on_not_finite)}: write 'stop', 'skip' or 'backtrack'.")
    if monitor is not None:
        check_callable("monitor", monitor, "monitor(info)", 1)
    if max_inner_steps is not None:
        check_count("max_inner_steps", max_inner_steps)
    if gradient is None and outer_loss is not None and not _accepts(outer_loss, 3):
        if remedies.accumulate > 1:
            raise JaxhpoError(
                f"`{remedies!r}` takes the mean over outer losses of different keys, but `outer_loss(hparams)` takes "
                "none, and all would be the same: write `outer_loss(hparams, carry, key) -> (value, carry, info)`."
            )
        if on_not_finite == "skip":
            raise JaxhpoError(
                "`on_not_finite='skip'` takes the step again with another key, but `outer_loss(hparams)` takes none, "
                "and it would be what it was: write 'backtrack', or `outer_loss(hparams, carry, key)`."
            )
        if monitor is not None:
            raise JaxhpoError(
                "`monitor(info)` needs an info, but `outer_loss(hparams)` returns none: write `outer_loss(hparams, "
                "carry, key) -> (value, carry, info)`, with what is monitored in info."
            )


def check_wanted(record) -> tuple[str, ...]:
    """What is recorded beside, as a tuple; raises for another name."""
    wanted = (record,) if isinstance(record, str) or not isinstance(record, (tuple, list, set)) else tuple(record)
    unknown = [name for name in wanted if not isinstance(name, str) or name not in EXTRAS]
    if unknown:
        raise JaxhpoError(f"`record` got {describe(unknown[0])}, of which nothing is known: write some of {EXTRAS}.")
    return wanted


def check_callbacks(callbacks) -> tuple:
    """The callbacks as a tuple; raises unless they are functions of one argument."""
    try:
        listed = None if callable(callbacks) else tuple(callbacks)
    except TypeError:  # nothing to iterate over, as in an array without axes
        listed = None
    if listed is None:
        raise JaxhpoError(
            f"`callbacks` got {describe(callbacks)}, but it is a sequence of functions: write `callbacks=[callback]`."
        )
    for callback in listed:
        check_callable("callbacks", callback, "callback(tune_step)", 1)
    return listed
