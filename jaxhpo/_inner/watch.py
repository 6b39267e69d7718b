"""Instrumented inner problems: every step reports what is not finite, while a run is diagnosed."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxhpo._core.record import active
from jaxhpo._core.trace import trust
from jaxhpo._core.tree import all_finite, is_inexact, names
from jaxhpo._inner.gradient import train_loss_of


def instrumented(problem: Any, index: int | None = None) -> Any:
    """Returns the problem as it is, or, while steps are recorded, one whose steps report to the recorder.

    They report as inner problem `index`, the next one if that is None.
    """
    recorder = active().steps
    if recorder is None:
        return problem
    if index is None:
        index = recorder.num_problems
        recorder.num_problems += 1
    train_loss = _train_loss(problem)
    recorder.advance[index] = problem.advance

    def into(events: dict, leaf_names: list[str]) -> Callable:
        """Host callback that records the first time that each leaf is not finite, in order of arrival."""

        def record(step, finite):
            for name, ok in zip(leaf_names, finite, strict=True):
                if not ok:
                    events.setdefault((index, int(step), name), next(recorder.arrivals))

        return record

    start = jax.lax.stop_gradient((problem.state, problem.inputs[0]))
    _report(into(recorder.before, [*names(start[0], "state"), *names(start[1], "hparams")]), 0, start)

    def advance(state: Any, inputs, x):
        t, x = x
        state_names, hparam_names = names(state, "state"), names(inputs[0], "hparams")
        state = _tap(into(recorder.before, state_names), into(recorder.backward, state_names), state, t)
        hparams = _tap(into(recorder.before, hparam_names), into(recorder.backward, hparam_names), inputs[0], t)
        inputs = (hparams, *inputs[1:])
        after = problem.advance(state, inputs, x)
        given = jax.lax.stop_gradient((state, inputs, x))
        _report(into(recorder.before, names(x, "batches")), t, given[2])
        _report(into(recorder.forward, ["the train loss"]), t, train_loss(*given))
        broke = all_finite(given[0]) & ~all_finite(jax.lax.stop_gradient(after))
        # What the first step is given, with all data that it closes over, is copied to the host once.
        _keep_first(recorder.first, index, t == 0, given)
        _keep_first(recorder.broken, index, broke, (given[0], given[2]))
        return _tap(into(recorder.forward, state_names), into(recorder.arriving, state_names), after, t)

    def closure_convert(fn, *more):
        pure, consts = problem.closure_convert(fn, *more)
        return lambda consts, state, hparams, x, *more: pure(consts, state, hparams, x[1], *more), consts

    return problem._replace(
        advance=advance,
        xs=(jnp.arange(problem.num_steps), problem.xs),
        counts=(True, problem.counts),
        closure_convert=closure_convert,
        with_gradient=lambda gradient, keys=None: instrumented(problem.with_gradient(gradient, keys), index),
    )


def _keep_first(kept: dict, index, wanted, values: Any) -> None:
    """Sets `kept[index]` on the host to the first values for which `wanted` is true."""

    def keep(wanted, values):
        if wanted:  # under `vmap` both branches of the `cond` below may run
            kept.setdefault(index, values)

    jax.lax.cond(wanted, lambda values: jax.debug.callback(keep, wanted, values), lambda values: None, values)


def _train_loss(problem) -> Callable:
    """Returns `(state, inputs, x) -> train loss`, which closes over nothing; zero for a step without a loss."""
    if problem.solver.loss is not None:
        pure, consts = train_loss_of(problem)
        where = [next((i for i, c in enumerate(problem.inputs[1]) if c is const), None) for const in consts]
        if None not in where:
            return lambda state, inputs, x: pure([inputs[1][i] for i in where], state, inputs[0], x)
    return lambda state, inputs, x: jnp.zeros(())


def _report(record: Callable, step, tree: Any) -> None:
    """Calls `record(step, finite)` on the host, with one boolean for each leaf."""
    finite = [jnp.all(jnp.isfinite(x)) if is_inexact(x) else jnp.asarray(True) for x in jax.tree.leaves(tree)]
    jax.debug.callback(record, step, jnp.stack(finite) if finite else jnp.ones((0,), bool))


@trust
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tap(forward, backward, tree, step):
    """Identity that reports its values to `forward`, and their cotangents to `backward`."""
    _report(forward, step, tree)
    return tree


def _tap_fwd(forward, backward, tree, step):
    return _tap(forward, backward, tree, step), step


def _tap_bwd(forward, backward, step, cotangent):
    _report(backward, step, cotangent)
    return cotangent, None


_tap.defvjp(_tap_fwd, _tap_bwd)
