"""Inner problems whose every step reports, while a run is diagnosed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxhpo._core.record import active
from jaxhpo._core.trace import trust
from jaxhpo._core.tree import all_finite, is_inexact, names
from jaxhpo._inner.problem import Problem


def instrumented(problem: Problem) -> Problem:
    """The problem itself, or, while recording, one whose steps report."""
    recorder = active().steps
    if recorder is None:
        return problem
    index = recorder.num_problems
    recorder.num_problems += 1
    return _reporting(problem, recorder, index)


def _reporting(problem, recorder, index) -> Problem:
    train_loss = _train_loss(problem)
    recorder.advance[index] = problem.advance
    given = jax.lax.stop_gradient((problem.state, problem.inputs[0]))
    leaf_names = [*names(given[0], "state"), *names(given[1], "hparams")]
    jax.debug.callback(_Tap(recorder, index, leaf_names, "before").forward, 0, _finite(given))

    def advance(state: Any, inputs, x):
        t, x = x
        tap = functools.partial(_Tap, recorder, index)
        state = _report(tap(names(state, "state"), forward="before"), state, t)
        hparams = _report(tap(names(inputs[0], "hparams"), forward="before"), inputs[0], t)
        inputs = (hparams, *inputs[1:])
        after = problem.advance(state, inputs, x)
        given = jax.lax.stop_gradient((state, inputs, x))
        jax.debug.callback(tap(names(x, "batches"), forward="before").forward, t, _finite(given[2]))
        jax.debug.callback(tap(["the train loss"]).forward, t, _finite(train_loss(*given)))
        broke = all_finite(given[0]) & ~all_finite(jax.lax.stop_gradient(after))
        # What a run is given, all data that it closes over too, comes to the host once.
        _keep_if(t == 0, recorder.first, index, given)
        _keep_if(broke, recorder.broken, index, (given[0], given[2]))
        return _report(tap(names(after, "state")), after, t)

    def closure_convert(fn, *more):
        pure, consts = problem.closure_convert(fn, *more)
        return lambda consts, state, hparams, x, *more: pure(consts, state, hparams, x[1], *more), consts

    def with_gradient(gradient, keys=None):
        return _reporting(problem.with_gradient(gradient, keys), recorder, index)

    return problem._replace(
        advance=advance,
        xs=(jnp.arange(problem.num_steps), problem.xs),
        closure_convert=closure_convert,
        with_gradient=with_gradient,
    )


def _keep_if(wanted, kept: dict, index: int, values: Any) -> None:
    """Has `kept[index]` hold the values, where `wanted`, the first that come."""

    def keep(wanted, values):
        if wanted:
            kept.setdefault(index, values)

    # Under `vmap` both branches may run, so it is asked twice.
    tell = lambda values: jax.debug.callback(keep, wanted, values)  # noqa: E731
    jax.lax.cond(wanted, tell, lambda values: None, values)


def _train_loss(problem) -> Callable:
    """`(state, inputs, x) -> loss`, with nothing closed over; of a step that has none, zero."""
    if problem.solver.loss is None:
        return lambda state, inputs, x: jnp.zeros(())
    pure, consts = problem.closure_convert(
        lambda s, h, batch: problem.solver.loss(s.params, h, batch, s.model_state)[0]
    )
    closed_over = problem.inputs[1]
    where = [next((i for i, c in enumerate(closed_over) if c is const), None) for const in consts]
    if None in where:
        return lambda state, inputs, x: jnp.zeros(())

    def loss(state, inputs, x):
        state, inputs, x = jax.lax.stop_gradient((state, inputs, x))
        return pure([inputs[1][i] for i in where], state, inputs[0], x)

    return loss


class _Tap:
    """Says to whom a leaf's state is reported, in each direction."""

    def __init__(self, recorder, index, leaf_names, forward="forward"):
        self.names = leaf_names
        self.arrivals = recorder.arrivals
        self.forward = functools.partial(self._record, getattr(recorder, forward), index)
        behind = recorder.arriving if forward == "forward" else recorder.backward
        self.backward = functools.partial(self._record, behind, index)

    def _record(self, events, index, step, finite):
        for name, ok in zip(self.names, finite, strict=True):
            if not ok:
                events.setdefault((index, int(step), name), next(self.arrivals))


@trust
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _report(tap, tree, step):
    jax.debug.callback(tap.forward, step, _finite(tree))
    return tree


def _report_fwd(tap, tree, step):
    return _report(tap, tree, step), step


def _report_bwd(tap, step, cotangent):
    jax.debug.callback(tap.backward, step, _finite(cotangent))
    return cotangent, None


_report.defvjp(_report_fwd, _report_bwd)


def _finite(tree):
    ok = [jnp.all(jnp.isfinite(x)) if is_inexact(x) else jnp.asarray(True) for x in jax.tree.leaves(tree)]
    return jnp.stack(ok) if ok else jnp.ones((0,), bool)
