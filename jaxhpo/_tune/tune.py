"""The outer loop, for those who do not want to write it."""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxhpo._core.errors import JaxhpoError, NonFiniteError, ZeroHypergradientWarning
from jaxhpo._core.progress import Progress
from jaxhpo._core.record import recording
from jaxhpo._core.transforms import to_natural, to_unconstrained
from jaxhpo._core.tree import names
from jaxhpo._core.types import PyTree
from jaxhpo._core.validate import check_arrays, check_key, check_params, describe
from jaxhpo._diagnostics.health import raise_if_zero, what_is_not_finite
from jaxhpo._tune.inputs import check_callbacks, check_policies, check_settings, check_wanted, make_evaluator
from jaxhpo._tune.processes import on_any
from jaxhpo._tune.record import Record, TuneStep
from jaxhpo._tune.remedies import Remedies, check_projections
from jaxhpo._tune.settings import described, fingerprint
from jaxhpo._tune.sharded_dir import open_run_dir
from jaxhpo._tune.step import Search

TEN_SECONDS = datetime.timedelta(seconds=10)
NO_REMEDIES = Remedies()
MOST_FAILURES = 10  # in a row: 2**-10 of a move is as good as none


class TuneResult(NamedTuple):
    """What `tune` found. Everything is in natural units.

    Attributes:
      hparams: the last hyperparameters, after the last update.
      carry: the last carry.
      best_hparams: the hyperparameters of lowest score: the outer loss, or what `monitor` makes of the info. (Where
        that is random, the luckiest step.)
      best_value: that score, a float.
      history: a dict of NumPy arrays with one row per outer step: `value`, `score`, `hypergradient_norm` (in
        unconstrained units, those of the search, before any remedy), `seconds`, `peak_bytes` (so far: of the
        accelerator, or of the process's resident set), `hparams` (a tree; leaves of more than 1024 entries are kept as
        minimum, quartiles, of every k-th entry, maximum and Euclidean norm), `info`, `remedies`, counts of what each
        did, and what `record` asks for.
      status: "finished", "patience", "overfitting", "budget", "callback", "interrupted", "preempted" or "not_finite".
      message: why it stopped, in words.
    """

    hparams: PyTree
    carry: PyTree
    best_hparams: PyTree
    best_value: float
    history: dict[str, Any]
    status: str
    message: str

    @property
    def exit_code(self) -> int:
        """For `sys.exit(result.exit_code)`: 143 if preempted, as shells and schedulers expect, 130 if interrupted."""
        return {"preempted": 143, "interrupted": 130, "not_finite": 1}.get(self.status, 0)

    def __repr__(self) -> str:
        steps = len(self.history["value"])
        return f"TuneResult(best_value={self.best_value:.6g}, steps={steps}, status={self.status!r}: {self.message})"


def tune(
    outer_loss: Callable | None,
    hparams: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    num_steps: int,
    transforms: PyTree = None,
    projections: PyTree = None,
    remedies: Remedies = NO_REMEDIES,
    on_not_finite: str = "stop",
    gradient: Callable | None = None,
    key: jax.Array | None = None,
    carry: PyTree = None,
    run_dir: str | os.PathLike | None = None,
    save_every: int | datetime.timedelta = TEN_SECONDS,
    callbacks: Iterable[Callable[[TuneStep], Any]] = (),
    patience: int | None = None,
    min_delta: float = 0.0,
    monitor: Callable[[PyTree], Any] | None = None,
    max_seconds: float | None = None,
    max_inner_steps: int | None = None,
    record: str | tuple[str, ...] = (),
    progress: bool = True,
) -> TuneResult:
    r"""Moves hyperparameters down their hypergradient with an optax optimiser.

    With h = forward(u), each outer step is
    :math:`u \leftarrow u + \mathrm{optimizer}(\nabla_u F(\mathrm{forward}(u)))`.
    The step is compiled once. Ctrl-C returns what there is, after the first step.

    **Cost and bias**: one hypergradient a step, and whatever bias its rule has; memory of the hyperparameters, the
    optimiser's state and one row of history a step.

    Args:
      outer_loss: `hparams -> scalar`, or `(hparams, carry, key) -> (scalar, carry, info)`: `carry` is handed from step
        to step (a solution's `.state`, for a warm start), `key` is new at every step, and `info` (any pytree, such as a
        solution's `.info`) is recorded. None where `gradient` is given.
      hparams: the start, in natural units.
      optimizer: any optax transformation, `optax.lbfgs()` too.
      num_steps: outer steps, in all (with those of earlier calls on the same `run_dir`).
      transforms: a prefix tree of transforms such as `{"penalty": positive, "momentum": unit_interval}`; None where a
        hyperparameter is unconstrained.
      projections: a prefix tree of functions, such as `optax.projections.projection_simplex`, that bring the
        hyperparameters back onto their set after each step; they act in natural units, on leaves without a transform.
      remedies: `Remedies(...)`, for hypergradients that explode, vanish or are noise.
      on_not_finite: what to do where the outer loss, its hypergradient, the carry or an inner solve in the info is not
        finite. "stop" ends the run with the last finite state; "skip" takes the step again with the next key,
        "backtrack" from half of the last move back (both at most ten times in a row).
      gradient: `(hparams, carry, key) -> (value, hypergradient, carry, info)`, in natural units, in place of
        differentiating `outer_loss`.
      key: `jax.random.key(0)` when None.
      carry: the first carry.
      run_dir: a folder that keeps the run: the state in its two newest checkpoints, each checked when it is read, and
        the history as `history.jsonl`, a line a step. The same call with the same folder goes on to the bit where the
        last checkpoint stood, or returns at once if it had finished. More steps or another setting of the optimiser are
        taken as given, and the difference printed (losses and data are not compared); another start, key, transform or
        tree, other columns of history (`record`, `accumulate`), or a `monitor` where there was none, are refused, and
        so is a folder in use. A full disk is warned of, and does not end the run. SIGTERM ends it after the step in
        hand, with status "preempted"; `sys.exit(result.exit_code)` tells the scheduler. Several JAX
        processes, each with the same call on a folder that all of them see, keep their arrays there with Orbax
        (`jaxhpo[orbax]`); what that cannot write, or an exception in one of them, ends the run. None keeps nothing.
      save_every: outer steps, or a `datetime.timedelta`, between checkpoints; the last state is always saved.
      callbacks: each is called with a `TuneStep` after every step; a true result stops the run.
      patience: stop after this many steps without an improvement of more than `min_delta`; None never stops early.
      min_delta: the least improvement that counts for `patience`.
      monitor: `info -> number`, of which the lowest is the best step, and by which `patience` goes: the loss on a part
        of the validation set that the outer loss does not see, say. A run out of patience while the outer loss still
        fell has the status "overfitting". None takes the outer loss.
      max_seconds: stop after the first step that ends so late, compilation and earlier calls on the same `run_dir`
        included; None never does.
      max_inner_steps: stop before the inner steps of all outer steps (those of `solve`, the most that a `tol` allows)
        would exceed this number; None never does.
      record: what is to be recorded beside: "hparams", large leaves whole; "hypergradient", its leaves, in the units of
        the search; "linear_solves", which tells by a callback from the device of those of implicit rules the largest
        `residual`, the `num_iterations`, and how many were `not_converged`. (An inner solve's optimality is recorded
        where the info holds its `sol.info`.)
      progress: a tqdm bar where tqdm is installed and the output is a terminal or a notebook, else a line every 5 s.

    Returns:
      A `TuneResult`.

    Raises:
      ZeroHypergradientError: at the first step a leaf's hypergradient is exactly zero, or the rule cuts entries off.
      NonFiniteError: the first step is not finite; says where that began. (Later on, the run ends with a warning that
        says so, status "not_finite", and the last finite state.)
      JaxhpoError: an input that cannot work.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: jnp.sum((p - 2.0) ** 2) + h * jnp.sum(p**2), optax.sgd(0.05))
      >>> def outer_loss(h):
      ...     sol = jaxhpo.solve(solver, solver.init(jnp.zeros(2), h), h, num_steps=100)
      ...     return jnp.sum((sol.params - 1.0) ** 2)
      >>> result = jaxhpo.tune(
      ...     outer_loss, jnp.array(0.1), optax.adam(0.2), num_steps=100, transforms=jaxhpo.positive, progress=False
      ... )
      >>> print(round(float(result.best_hparams), 2))  # the minimiser of the penalised loss is 2 / (1 + h)
      1.0

    References:
      Pedregosa. Hyperparameter optimization with approximate gradient. 2016. arXiv:1602.02355
    """
    hparams = check_params(hparams, "hparams")
    callbacks, wanted = check_callbacks(callbacks), check_wanted(record)
    check_settings(optimizer, num_steps, transforms, patience, min_delta, save_every, max_seconds, progress)
    check_policies(remedies, on_not_finite, monitor, max_inner_steps, outer_loss, gradient)
    first_key = jax.random.key(0) if key is None else check_key(key)
    carry = jax.tree.map(jnp.asarray, check_arrays(carry, "carry"))
    point = to_unconstrained(transforms, hparams)
    remedies.check(transforms, point)
    check_projections(projections, transforms, point)
    search = Search(make_evaluator(outer_loss, gradient), optimizer, transforms, projections, remedies)
    limits = _Limits(num_steps, patience, min_delta, max_seconds, max_inner_steps)
    settings = {
        **limits._asdict(),
        "remedies": repr(remedies),
        "projections": described(projections),
        "on_not_finite": on_not_finite,
        "monitor": described(monitor),
        "optimizer": fingerprint(optimizer),
    }
    with contextlib.ExitStack() as stack:
        folder = None if run_dir is None else stack.enter_context(open_run_dir(run_dir))
        preempted = stack.enter_context(noting_sigterm(folder is not None))
        solves = [] if "linear_solves" in wanted else None
        if solves is not None:
            stack.enter_context(recording(linear_solves=solves))
        run = Record(search, search.start(point, carry, first_key), folder, settings, monitor, wanted, solves)
        run.resume()
        run.tell("running", "")
        if max_inner_steps is not None:
            _check_budget(run, max_inner_steps)
        if progress and run.rows:
            print("; ".join([run.origin, *run.notes, "another folder starts anew"]), file=sys.stderr)
        bar = stack.enter_context(Progress(num_steps, "step", progress, done=run.now.rows))
        status, message, alone = "", "", jax.process_count() == 1
        try:
            status, message = _advance(run, limits, on_not_finite, callbacks, save_every, preempted, bar)
        except KeyboardInterrupt:
            if not run.now.rows or not alone:
                raise
            status, message = "interrupted", f"interrupted after {run.now.rows} outer steps"
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            raise
        finally:
            if status or alone:  # saving takes all processes, and where one raised the others may not come
                run.save()
            run.tell(status or "raised", message)
    return _result(run, status, message)


class _Limits(NamedTuple):
    """When to stop."""

    num_steps: int
    patience: int | None
    min_delta: float
    max_seconds: float | None
    max_inner_steps: int | None

    def reached(self, record) -> tuple[str, str] | None:
        """Status and message of a run that is to go no further."""
        if record.now.rows >= self.num_steps:
            return "finished", f"{record.now.rows} outer steps were taken, of {self.num_steps} asked for"
        if self.patience is not None and record.now.waited >= self.patience:
            status = "overfitting" if record.still_falls(self.patience) else "patience"
            more = ", while the outer loss still fell" if status == "overfitting" else ""
            return status, f"no improvement of more than {self.min_delta} in {self.patience} outer steps{more}"
        if self.max_seconds is not None and record.now.rows and on_any(record.seconds >= self.max_seconds):
            return "budget", f"{record.seconds:.3g} of {self.max_seconds} seconds are spent"
        steps = record.search.inner_steps
        if self.max_inner_steps is not None and (record.now.rows + 1) * steps > self.max_inner_steps:
            taken = record.now.rows * steps
            return "budget", f"{taken} of {self.max_inner_steps} inner steps are taken, and an outer step takes {steps}"
        return None


def _check_budget(record, max_inner_steps):
    """Raises where inner steps cannot be counted, or do not suffice for one outer step."""
    record.search.shapes(record.now.state)
    steps = record.search.inner_steps
    if not steps:
        raise JaxhpoError(
            f"`max_inner_steps={max_inner_steps}` counts the steps of `solve`, and none was called: write `num_steps` "
            "or `max_seconds`."
        )
    if steps > max_inner_steps:
        raise JaxhpoError(f"`max_inner_steps={max_inner_steps}` is too few, as an outer step takes {steps}.")


def _advance(record, limits, on_not_finite, callbacks, save_every, preempted, bar) -> tuple[str, str]:
    """Takes the outer steps; returns why it stopped."""
    while (reached := limits.reached(record)) is None:
        step = record.now.rows
        if step and on_any(preempted()):
            return "preempted", f"SIGTERM came; stopped after {step} outer steps"
        begun = record.now.failures < step
        take = record.search.step if begun else functools.partial(_first_step, record.search)
        after, report = take(record.now.state)
        record.save(save_every)  # of the step before, while the device takes this one
        if not np.asarray(report.finite):
            if on_not_finite == "skip" and record.now.failures < MOST_FAILURES:
                record.skip(report)
                bar.update("skipped")
                continue
            if on_not_finite == "backtrack" and step and record.now.halvings < MOST_FAILURES:
                record.retreat()
                continue
            return "not_finite", _not_finite(record, report, after)
        told = record.accept(after, report, limits.min_delta)
        bar.update(f"loss {told.value:.4g}, best {told.best_value:.4g}, |hypergradient| {told.hypergradient_norm:.2g}")
        if callbacks and on_any(any([_says_stop(callback, told) for callback in callbacks])):
            return "callback", f"a callback stopped the run after outer step {step}"
    return reached


def _says_stop(callback, told) -> bool:
    answer = callback(told)
    try:
        return bool(answer)
    except (TypeError, ValueError):
        raise JaxhpoError(
            f"`callbacks`: one returned {describe(answer)}, but a true answer stops the run: return True, or nothing."
        ) from None


def _result(record, status, message) -> TuneResult:
    hparams = jax.jit(lambda u: to_natural(record.search.transforms, u))(record.now.state.point)
    message = "; ".join([*([] if record.origin == "started" else [record.origin, *record.notes]), message])
    now = record.now
    return TuneResult(hparams, now.state.carry, now.best_hparams, now.best, record.history(), status, message)


def _first_step(search, state):
    """The step that traces: what the rules warned of while tracing is held against the hypergradient."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        after, report = search.step(state)
    leaf_names = names(report.hparams, "hparams")
    for w in caught:
        # Of a leaf that is judged below by its value, nothing need be said twice.
        if not (isinstance(w.message, ZeroHypergradientWarning) and w.message.leaf in leaf_names):
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
    if bool(report.finite):
        messages = [w.message for w in caught]
        raise_if_zero(report.hypergradient, messages, leaf_names, search.structure(state))
    return after, report


def _not_finite(record, report, after) -> str:
    now = record.now
    what = what_is_not_finite(report.value, report.hypergradient, after.point, after.carry)
    message = f"Outer step {now.rows}: {what} {record.search.diagnosis(now.state)}"
    if now.failures:
        message += f" So were the {now.failures} steps before, which were skipped: other keys make no difference."
    if now.halvings:
        message += f" Going back by half of the last move, {now.halvings} times, did not help."
    if now.rows == 0:
        raise NonFiniteError(message)
    told = "The run ends; `hparams` are those of this step, `best_hparams` the best before."
    warnings.warn(f"{message} {told}", RuntimeWarning, stacklevel=4)
    return message


@contextlib.contextmanager
def noting_sigterm(enabled: bool) -> Iterator[Callable[[], bool]]:
    """While active, SIGTERM is noted and does nothing else; gives a function that tells whether it came.

    The handler that was there is restored. Only the main thread of Python may set one: in another, and where what is
    there was not set by Python, nothing is noted.
    """
    noted: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    if not enabled or before is None or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    signal.signal(signal.SIGTERM, lambda number, frame: noted.append(number))
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGTERM, before)
