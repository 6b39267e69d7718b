"""Checks of the arguments of `tune` and `outer_step`."""

import datetime
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.outer import WITH_CARRY
from jaxhpo._core.types import Solver
from jaxhpo._core.validate import (
    check_callable,
    check_choice,
    check_count,
    check_nonnegative,
    check_positive,
    check_switch,
    describe,
)
from jaxhpo._tune.history import EXTRAS
from jaxhpo._tune.remedies import Remedies


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


def check_policies(remedies, deterministic: bool, on_not_finite="stop", monitor=None) -> None:
    """Raises for a policy that is invalid, or that needs the key or the info of an outer loss that has none."""
    if not isinstance(remedies, Remedies):
        raise JaxhpoError(f"`remedies` got {describe(remedies)}: write `jaxhpo.Remedies(clip=0.5)`, say.")
    check_choice("on_not_finite", on_not_finite, "stop", "skip", "backtrack")
    if monitor is not None:
        check_callable("monitor", monitor, "monitor(info)", 1)
    if not deterministic:
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


def check_calls(steps_per_call, num_steps, on_not_finite, on_error, extras) -> None:
    """Raises where several steps a call cannot work with the other settings."""
    check_count("steps_per_call", steps_per_call)
    if steps_per_call == 1:
        return
    if num_steps % steps_per_call:
        more = num_steps + steps_per_call - num_steps % steps_per_call
        raise JaxhpoError(
            f"`num_steps={num_steps}` is not a multiple of `steps_per_call={steps_per_call}`: write {more}, say."
        )
    taken = [] if on_error is None else [f"on_error={on_error!r}"]
    taken += [f"record={name!r}" for name in extras if name in ("agreement", "error")]
    taken += [f"on_not_finite={on_not_finite!r}"] * (on_not_finite != "stop")
    if taken:
        raise JaxhpoError(
            f"`{taken[0]}` looks at every step, but between those of a call of {steps_per_call} nothing can: omit it, "
            "or `steps_per_call`."
        )


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
