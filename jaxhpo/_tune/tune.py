"""The outer loop."""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxhpo._core.errors import JaxhpoError, NonFiniteError, warn
from jaxhpo._core.outer import is_deterministic
from jaxhpo._core.processes import check_same, check_same_value, on_any, together, whole
from jaxhpo._core.progress import Progress, say
from jaxhpo._core.record import recording
from jaxhpo._core.types import PyTree
from jaxhpo._core.validate import check_choice, check_one_training
from jaxhpo._diagnostics.health import named_members, raise_if_zero, warn_again, what_is_not_finite
from jaxhpo._tune.diagnosis import diagnosis, program, unconverged
from jaxhpo._tune.inputs import (
    check_callbacks,
    check_calls,
    check_policies,
    check_record,
    check_settings,
    convert,
)
from jaxhpo._tune.population import Compiled, fetched, member
from jaxhpo._tune.record import LoopState, Record, TuneStep
from jaxhpo._tune.remedies import NO_REMEDIES, Remedies
from jaxhpo._tune.rules import Rules, Unchosen
from jaxhpo._tune.run_dir import RunDir
from jaxhpo._tune.settings import described, fingerprint, held
from jaxhpo._tune.sharded_dir import ShardedDir
from jaxhpo._tune.step import Step, backtracked

TEN_SECONDS = datetime.timedelta(seconds=10)
WINDOW = 10  # steps over which the score of a random outer loss is a mean
MOST_FAILURES = 10  # consecutive ones: 2**-10 of a move is as good as none


class Member(NamedTuple):
    """End of one member of a population.

    Attributes:
      status: one of those of a `TuneResult`.
      num_steps: rows of the history in which the member took part.

    Example:
      >>> starts = jnp.array([0.0, 2.9])
      >>> result = jaxhpo.tune(
      ...     lambda h: (h - 3.0) ** 2, starts, optax.sgd(0.25), num_steps=5, population=2, patience=1, min_delta=0.1,
      ...     progress=False,
      ... )
      >>> result.members
      (Member(status='finished', num_steps=5), Member(status='patience', num_steps=2))
    """

    status: str
    num_steps: int


class TuneResult(NamedTuple):
    """Result of `tune`, in natural units. In a population, arrays have a leading axis of members.

    Attributes:
      hparams: the last hyperparameters, after the last update.
      carry: the last carry.
      best_hparams: the hyperparameters of the step of lowest score: the last of those over which the score is a mean.
      best_value: that score, a float. A score is the outer loss, or what `monitor` makes of the info; where that may be
        random, the mean over the last `score_window` steps, or over those so far.
      best_step: that step, from 0. Where `monitor` gave NaN at every step, the last one, and `best_value` is nan; where
        no step was finite, -1, and `best_value` is inf.
      history: a dict of NumPy arrays with one row per outer step: `value`, `score`, `hypergradient_norm` (in
        unconstrained units, those of the search, before any remedy), `seconds`, `peak_bytes` (so far: of the
        accelerator, or of the process's resident set), `hparams` (a tree; in place of a leaf of more than L entries
        stands a tuple of its `minimum`, `lower_quartile`, `median`, `upper_quartile`, `maximum` and Euclidean `norm`,
        the quartiles of every k-th entry, where L is as large as 4096 numbers in all allow, from 6 to 1024), `info`,
        `remedies`, counts of what each did, and what `record` asks for. In a population all but `seconds`, `peak_bytes`
        and `linear_solves` have a second axis of members; `value`, `score` and `hypergradient_norm` of a member that
        has ended are NaN.
      status: "finished", "patience", "overfitting", "budget", "callback", "misled", "interrupted", "preempted" or
        "not_finite";
        "mixed" where all members of a population have ended, for different reasons.
      message: why it stopped, in words.
      members: of a population, a `Member(status, num_steps)` each; else empty.

    Example:
      >>> result = jaxhpo.tune(lambda h: (h - 3.0) ** 2, 0.0, optax.sgd(0.25), num_steps=3, progress=False)
      >>> result
      TuneResult(best_value=0.5625, steps=3, status='finished': 3 outer steps were taken, of 3 asked for)
      >>> print(result.best_hparams, result.hparams, result.history["value"])  # h ← (h + 3) / 2
      2.25 2.625 [9.     2.25   0.5625]
    """

    hparams: PyTree
    carry: PyTree
    best_hparams: PyTree
    best_value: Any
    best_step: Any
    history: dict[str, Any]
    status: str
    message: str
    members: tuple[Member, ...] = ()

    @property
    def exit_code(self) -> int:
        """For `sys.exit(result.exit_code)`: 143 if preempted and 130 if interrupted, as shells and schedulers expect.

        1 if not finite or, of what `load` found, raised; 0 otherwise.
        """
        return {"preempted": 143, "interrupted": 130, "not_finite": 1, "raised": 1}.get(self.status, 0)

    def member(self, index: int) -> TuneResult:
        """Returns the result of one member of a population, as if it had been tuned alone.

        Args:
          index: of the member, from 0.

        Raises:
          JaxhpoError: the result is not of a population.
        """
        if not self.members:
            raise JaxhpoError("`member` needs the result of a population: write `tune(..., population=N)`.")
        status, num_steps = self.members[index]
        hparams, carry, best_hparams, best_value, best_step = member(self[:5], index)
        rows = {
            name: column if name in SHARED else jax.tree.map(lambda x: x[:, index], column)
            for name, column in self.history.items()
        }
        # A member that ended, and continued on a later call, has rows of NaN between.
        held = np.isnan(rows["value"]) & np.isnan(rows["score"]) & (rows["remedies"]["skipped_steps"] == 0)
        rows = jax.tree.map(lambda x: x[~held][:num_steps], rows)
        best_step = int(best_step) - int(held[: max(best_step, 0)].sum())
        message = f"member {index} of {len(self.members)} took {num_steps} outer steps: {status}; {self.message}"
        return TuneResult(hparams, carry, best_hparams, float(best_value), best_step, rows, status, message)

    def __repr__(self) -> str:
        steps, best = len(self.history["value"]), np.fmin.reduce(np.ravel(self.best_value))
        population = f", population={len(self.members)}" * bool(self.members)
        return f"TuneResult(best_value={best:.6g}, steps={steps}{population}, status={self.status!r}: {self.message})"


SHARED = ("seconds", "peak_bytes", "linear_solves")  # columns without an axis of members
CAME = {"preempted": "SIGTERM came", "interrupted": "Ctrl-C came"}


@together()
def tune(
    outer_loss: Callable | None,
    hparams: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    num_steps: int,
    population: int | None = None,
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
    score_window: int | None = None,
    max_seconds: float | None = None,
    max_inner_steps: int | None = None,
    steps_per_call: int = 1,
    record: str | tuple[str, ...] = (),
    on_error: str | None = None,
    resume: str = "warn",
    progress: bool = True,
) -> TuneResult:
    r"""Moves hyperparameters down their hypergradient with an optax optimiser.

    With h = forward(u), each outer step is
    :math:`u \leftarrow u + \mathrm{optimizer}(\nabla_u F(\mathrm{forward}(u)))`, the `update` of `outer_step`.
    The step is compiled once. Ctrl-C returns the result so far, after the first step.

    With `population=N`, N runs are tuned together, as one `vmap` of the step. Starts, seeds and settings differ from
    member to member as entries of the leading axis of `hparams`, `carry` and `key`, and each member ends as a run of
    its own would:

    .. code-block:: python

        starts = {"rate": jnp.geomspace(1e-3, 1e-1, 8), "penalty": jnp.full(8, 1e-4)}
        result = tune(outer_loss, starts, optax.adam(0.1), num_steps=100, population=8)
        result.best_value                  # of each member
        result.member(3)                   # a `TuneResult`, as of a run of its own
        result.members[3].status           # "finished", "patience", "not_finite", ...

    **Cost and bias**: one hypergradient a step, and whatever bias its rule has; memory of the hyperparameters, the
    optimiser's state and one row of history a step. A population takes all of this N times, in one program, until its
    last member ends.

    Args:
      outer_loss: `hparams -> scalar`, or `(hparams, carry, key) -> (scalar, carry, info)`: `carry` is handed from step
        to step (a solution's `.state`, for a warm start), `key` is new at every step, and `info` (any pytree, such as a
        solution's `.info`) is recorded. In a population it is written for one member. None where `gradient` is given.
      hparams: the start, in natural units. Without leaves (`{}`) nothing is tuned: the run of a baseline is recorded.
      optimizer: any optax transformation, `optax.lbfgs()` too.
      num_steps: outer steps, in all (with those of earlier calls on the same `run_dir`).
      population: N runs at once: each leaf of `hparams` and `carry` has a leading axis of N. What is the same for all
        members belongs in `outer_loss`; a setting that differs, or a part of the data, into `carry`. Remedies,
        `on_not_finite`, the best step, `patience`, `monitor` (called with the info of each member) and
        `max_inner_steps` apply to each member; a member that has ended is held while others go on, and is never the
        reason for an exception unless it is the last. `num_steps`, `max_seconds`, `callbacks`, `progress` and `run_dir`
        apply to all of them together. None tunes one run, without the axis.
      transforms: a prefix tree of transforms such as `{"penalty": positive, "momentum": unit_interval}`; None where a
        hyperparameter is unconstrained. In a population, of one member.
      projections: a prefix tree of functions, such as `optax.projections.projection_simplex`, that bring the
        hyperparameters back onto their set after each step; they act in natural units, on leaves without a transform.
        In a population, of one member.
      remedies: `Remedies(...)`, for hypergradients that explode, vanish or are noise.
      on_not_finite: the policy where the outer loss, its hypergradient, the carry or an inner solve in the info is not
        finite. "stop" ends the run with the last finite state; "skip" takes the step again with the next key,
        "backtrack" from half of the last move back (both at most ten times in a row).
      gradient: `(hparams, carry, key) -> (value, hypergradient, carry, info)`, in natural units, in place of
        differentiating `outer_loss`.
      key: `jax.random.key(0)` when None. In a population, a key for each member, or one that is split into them.
      carry: the first carry.
      run_dir: a folder that keeps the run: the state in its two newest checkpoints, each checked when it is read, and
        the history as `history.jsonl`, one line per step, which is mended from the checkpoint (rows that are lost are
        NaN, in integer columns 0). Files of other names stay as they are, and links are not followed. The path is
        that of the moment of the call, and `~` the user's home. The same call with the same folder continues from the
        last checkpoint, with results equal to the bit, or, with a warning, returns at once if the run had ended. More
        steps or another setting of the optimiser are accepted, and the difference is printed (of one in its state, as
        those of `optax.inject_hyperparams`, the new value is taken unless the run has changed the old one); another
        start, key, transform, population, tree or `score_window`, other columns of history (`record`, `accumulate`), or
        a `monitor` where there was none, are refused, and so is a folder in use. A full disk causes a warning, and does
        not end the run. SIGTERM, unless the program ignores it, reaches the handler that was set before, and ends the
        run after the step in progress, also the last, with status "preempted". A script then ends with
        `sys.exit(result.exit_code)`, which informs the scheduler; in a loop over several runs, after each that is
        preempted, as the next would begin.
        Of several JAX processes each makes the same call, on a folder that all of them see, and writes the pieces of
        the arrays that it holds; the run may be continued by another number of processes. An exception in one of them
        ends all. None keeps nothing.
      save_every: outer steps, or a `datetime.timedelta`, between checkpoints; the last state is always saved.
      callbacks: each is called with a `TuneStep` after every step; a true result stops the run. Steps since the last
        checkpoint of a run that was killed are taken, and reported, again.
      patience: stop after this many steps without an improvement of the score of more than `min_delta`; None never
        stops early.
      min_delta: the least improvement that counts for `patience`.
      monitor: `info -> number`, from which the score is made: the loss on a part of the validation set that the outer
        loss does not see, say. NaN leaves the step without a score. A run out of patience while the outer loss still
        fell has the status "overfitting". None takes the outer loss.
      score_window: the score, whose lowest is the best and which `patience` follows, is the mean over so many of the
        last steps that are finite, or all so far: of a random loss the lowest single value would be the luckiest. None
        takes 1 for `outer_loss(hparams)`, which has one value, and 10 where there is a key, or `gradient`: write 1 for
        a loss of three arguments that does not use the key, and takes them for the sake of the carry.
      max_seconds: stop after the first step that ends so late, compilation and earlier calls on the same `run_dir`
        included; None never does.
      max_inner_steps: stop before the inner steps of all outer steps (those of `solve`, the most that a `tol` allows)
        would exceed this number; None never does.
      steps_per_call: K outer steps in one compiled loop, of which `num_steps` is a multiple, for steps of microseconds:
        the host sees the last step of each call, and makes a row of history of it. What counts steps then counts calls,
        all but `num_steps`: rows, `best_step`, `patience`, `score_window`, `save_every`, callbacks. A step that is not
        finite ends its call, and the run (K = 1 alone allows "skip", "backtrack", "agreement", "error" and `on_error`).
        The hyperparameters are those of K = 1.
      record: extra columns: "hparams", all leaves whole; "hypergradient", its leaves, in the units of the search;
        "agreement": the `predicted_change` of the outer loss by each step, hypergradient times move, and in the row
        after it the `agreement`, actual for predicted change: 1 on a straight line, about 1/2 at the best step of a
        parabola, below 0 where the loss rose instead (of a random loss, also by chance), far above 1 where the
        hypergradient is much too short;
        "error": the `error` bar ‖ĝ − g‖ of the hypergradient, in the units of its norm, against the exact derivative g
        of the steps that were run, past `stop_gradient` and derivative rules of your own. It is taken at every fourth
        step that is not skipped (`measured_error`), at a quarter of the cost of `Unroll()`, and held until the next, or
        until another rule is taken; where it does not fit into memory, or a run ends at a `tol`, by exact tangents
        along six random directions (9 to 13 trainings), within a factor of two in 97 % of cases. Not of single-loop
        methods, whose updates report no outer loss of trained parameters;
        "linear_solves", for which the device calls back: of the linear solves of implicit rules (of all members) the
        largest `residual`, the `num_iterations`, and how many were `not_converged`. (An inner solve's optimality is
        recorded where the info holds its `sol.info`.) What is recorded is judged at the end: where linear solves, or
        inner runs with a `tol`, ended before their tolerance, the message and a warning say in how many steps.
      on_error: what to do where hypergradients no longer lead down. The exact hypergradient is taken at every second
        step (of `optax.MultiSteps`, where there is a move; "error" is recorded, at half of the cost of `Unroll()`), and
        with it the cosine of the move with the exact descent direction: `measured_slope` is the derivative of the outer
        loss along a move of length one, and `measured_norm` the norm. Where the mean cosine of the last six measured
        moves is below .05, and the hypergradient off by over 30 % of its length, "tighten" puts stronger rules in place
        of the present ones: ten times the products or last steps (eight times the directions), then (of a series at
        once) the best linear solver, then `Unroll()`. With each the optimiser begins anew, but for its schedules, and
        each is kept for six measured moves at least. "stop" ends the run with the status "misled", as "tighten" does
        where nothing stronger is possible for all solves. A large error alone is no reason: many runs descend in a poor
        direction.
      resume: what to do where `run_dir` holds a run that was last saved with another outer loss: its traced program,
        the arrays that it closes over (of those above 4096 entries so many, evenly spaced, are compared; code and data
        of Python functions that it calls back are not), the first carry, or jax's version. "warn" says so in a warning,
        and goes on; the best step may still be one of before. "continue" goes on without a warning; if loss or data are
        surely others, the best step and `patience` begin anew. Every later message of the run names the change. To undo
        it, delete the newest `state-*.npz`: the run goes on from the one before, if that is from before.
      progress: a tqdm bar where tqdm is installed and the output is a terminal or a notebook, else a line every 5 s.

    Returns:
      A `TuneResult`.

    Raises:
      ZeroHypergradientError: at the first step a leaf's hypergradient is exactly zero, or the rule cuts entries off.
      NonFiniteError: the first step is not finite (of every member); says where that began. (Later on, the run ends
        with a warning that says so, status "not_finite", and the last finite state.)
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
    alone = jax.process_count() == 1
    callbacks, extras = check_callbacks(callbacks), check_record(record)
    counts = {"population": population, "patience": patience, "max_inner_steps": max_inner_steps}
    check_settings(num_steps, progress, min_delta, save_every, max_seconds, **counts, score_window=score_window)
    deterministic = is_deterministic(outer_loss, gradient)
    check_policies(remedies, deterministic, on_not_finite, monitor)
    if on_error is not None:
        check_choice("on_error", on_error, "tighten", "stop")
        extras = tuple(dict.fromkeys([*extras, "error", "slope"]))
    if "error" in extras and population is not None:
        what = "record='error'" if on_error is None else f"on_error={on_error!r}"
        raise JaxhpoError(f"`{what}` takes tangents of one run: tune a member alone, without `population=`.")
    if "error" in extras:
        check_one_training(carry)
    check_choice("resume", resume, "warn", "continue")
    check_calls(steps_per_call, num_steps, on_not_finite, on_error, extras)
    steps_per_call = int(steps_per_call)  # the run folder holds JSON
    step = Step(outer_loss, optimizer, transforms, projections, remedies, gradient, steps_per_call)
    compiled = Compiled(step, population)
    check_same(
        {
            "hparams": hparams,
            "carry": carry,
            "key": key,
            "optimizer": fingerprint(optimizer),
            "transforms": described(transforms),
            "projections": described(projections),
            "remedies": repr(remedies),
            "monitor": described(monitor),
            "num_steps": (num_steps, steps_per_call),
            "population": population,
            "on_not_finite": on_not_finite,
            "patience": (patience, min_delta),
            "max_inner_steps": max_inner_steps,
            "max_seconds": max_seconds is None,  # clocks may differ
            "save_every": save_every if isinstance(save_every, int) else None,
            "record": extras,
            "on_error": on_error,
            "run_dir": run_dir is None,
        }
    )
    called = on_any(bool(callbacks))  # perhaps a logger of one process alone
    state = compiled.init(hparams, carry, key)
    given: Any = (num_steps, patience, min_delta, max_seconds, max_inner_steps)
    limits = _Limits(*(x.item() if isinstance(x, np.generic) else x for x in given))  # the run folder holds JSON
    settings = {
        **limits._asdict(),
        "remedies": repr(remedies),
        "projections": described(projections),
        "on_not_finite": on_not_finite,
        "monitor": described(monitor),
        "on_error": on_error,
        "optimizer": {} if run_dir is None else fingerprint(optimizer) | held(state.opt_state),
    }
    with contextlib.ExitStack() as stack:
        folder = None if run_dir is None else stack.enter_context((RunDir if alone else ShardedDir)(run_dir))
        preempted = stack.enter_context(noting(signal.SIGTERM, folder is not None))
        # Alone, Ctrl-C raises wherever it comes; of several, no process may leave the others between two steps.
        interrupted = stack.enter_context(noting(signal.SIGINT, not alone))
        solves = [] if "linear_solves" in extras else None
        if solves is not None:
            stack.enter_context(recording(linear_solves=solves))
        window = score_window or (1 if deterministic else WINDOW)
        rules = Rules(compiled, on_error)
        run = Record(compiled, state, folder, settings, monitor, window, rules, extras, solves)
        run.resume()
        if max_inner_steps is not None:
            _check_budget(run, max_inner_steps)
        goes_on = _check_resumption(run, limits, resume)
        if progress and run.rows:
            say("; ".join([run.origin, *run.notes, "to start anew, name another folder"]))
        signalled = functools.partial(_signalled, preempted, interrupted)
        early = preempted()  # where a run around this one was
        bar = stack.enter_context(Progress(num_steps, "step", progress and goes_on, done=run.per_call * run.now.rows))
        bar.note("compiling ...")
        stopped = on_any(early)
        run.write_status("running", "")
        status, message = "raised", ""
        try:
            try:
                if stopped:
                    status, message = _stopped("preempted", run)
                else:
                    status, message = _loop(run, limits, on_not_finite, callbacks, called, save_every, signalled, bar)
            except KeyboardInterrupt:
                if not run.now.rows or not alone:
                    raise
                status, message = _stopped("interrupted", run)
            finally:
                if status != "raised" or alone:  # saving takes all processes
                    run.save()
            # In the last step, or while it was saved: what comes after this run is not to begin.
            late = signalled() if folder is not None or not alone else ""
            if late and status not in (*CAME, "not_finite"):
                status, message = late, f"{CAME[late]}; {message}"
        except BaseException as error:
            status, message = "raised", f"{type(error).__name__}: {error}"
            raise
        finally:
            run.write_status(status, message)
    return _result(run, limits, status, message)


class _Limits(NamedTuple):
    """Limits of a run."""

    num_steps: int
    patience: int | None
    min_delta: float
    max_seconds: float | None
    max_inner_steps: int | None

    def active(self, now: LoopState) -> np.ndarray:
        """Returns the members that go on: shape () or (members,)."""
        return ~now.failed & (True if self.patience is None else now.waited < self.patience)

    def ended(self, record: Record) -> np.ndarray:
        """Returns the status of each member; an empty string while it goes on."""
        active, failed = self.active(record.now), record.now.failed
        if (active | failed).all():
            return np.where(failed, "not_finite", "")
        patience = np.where(record.still_falls(self.patience or 0), "overfitting", "patience")
        return np.where(failed, "not_finite", np.where(active, "", patience))

    def reached(self, record: Record) -> tuple[str, str] | None:
        """Returns status and message of a run that has ended, or None."""
        rows, steps = record.now.rows, record.per_call * record.compiled.step.inner_steps
        if rows * record.per_call >= self.num_steps:
            return "finished", f"{rows * record.per_call} outer steps were taken, of {self.num_steps} asked for"
        if not self.active(record.now).any():
            ended = self.ended(record)
            status = str(ended.flat[0]) if (ended == ended.flat[0]).all() else "mixed"
            if ended.shape:
                return status, f"every member has ended: {_counted(ended)}"
            more = ", while the outer loss still fell" if status == "overfitting" else ""
            calls = f"calls of {record.per_call} " if record.per_call > 1 else ""
            return status, f"no improvement of more than {self.min_delta} in {self.patience} {calls}outer steps{more}"
        max_seconds = self.max_seconds
        if max_seconds is not None and rows and on_any(record.seconds >= max_seconds):
            return "budget", f"{record.seconds:.3g} of {self.max_seconds} seconds are spent"
        if self.max_inner_steps is not None and (rows + 1) * steps > self.max_inner_steps:
            taken = rows * steps
            what = "an outer step" if record.per_call == 1 else f"a call of {record.per_call} outer steps"
            return "budget", f"{taken} of {self.max_inner_steps} inner steps are taken, and {what} takes {steps}"
        return None


def _counted(ends: np.ndarray) -> str:
    return ", ".join(f"{count} {end}" for end, count in zip(*np.unique(ends, return_counts=True), strict=True))


def _check_budget(record, max_inner_steps):
    """Raises where inner steps cannot be counted, or do not suffice for one outer step."""
    with record.rules.as_asked():
        record.compiled.shapes(record.now.state)
    steps = record.per_call * record.compiled.step.inner_steps
    problem = f"is too few, as {'an outer step takes' if record.per_call == 1 else 'the steps of a call take'} {steps}"
    if not steps:
        problem = "counts the steps of `solve`, and none was called: write `num_steps` or `max_seconds`"
    if not 0 < steps <= max_inner_steps:
        raise JaxhpoError(f"`max_inner_steps={max_inner_steps}` {problem}.")


def _check_resumption(record, limits, resume) -> bool:
    """Warns where the loss is another since the run was saved, or no step is left; scores of another begin anew.

    Returns whether steps are left.
    """
    if not record.rows:
        return True
    before, folder, silent = record.now, os.fspath(record.run_dir.folder), resume == "continue"
    if silent and record.another_loss:
        record.begin_scores()
    reached = limits.reached(record)
    if reached:
        record.now = before
    if record.changed and (reached or not silent):
        then = "the run goes on, and its best step is one of before. Name a new `run_dir` to start anew, or write"
        if reached:
            then = f"no step is taken ({reached[1]}). Name a new `run_dir` to start anew, or write a larger limit, and"
        message = f"since the run in {folder!r} was saved, {record.changed}; {then} `resume='continue'` to go on."
    elif reached and not silent:
        message = (
            f"the run in {folder!r} had ended before ({reached[1]}): no step is taken, and the result is that of the "
            "folder. Write a larger limit to go on, another `run_dir` to start anew; `resume='continue'` silences this."
        )
    else:
        return not reached
    warn(f"`run_dir`: {message}")
    return not reached


def _signalled(preempted, interrupted) -> str:
    """Returns the status of a run that a signal to any process ends; an empty string where none came."""
    if not on_any(preempted() or interrupted()):
        return ""
    return "preempted" if on_any(preempted()) else "interrupted"


def _stopped(status, record) -> tuple[str, str]:
    return status, f"{CAME[status]}; stopped after {record.now.rows * record.per_call} outer steps"


def _loop(record, limits, on_not_finite, callbacks, called, save_every, signalled, bar) -> tuple[str, str]:
    """Takes the outer steps; returns status and message of the end."""
    problem = "`callbacks`: one returned {}, but a true value stops the run: return True, or nothing."
    begun, seen, judged = record.now.rows, 0, False

    def stops(step_info):
        return any([convert(bool, callback(step_info), problem) for callback in callbacks])

    while (reached := limits.reached(record)) is None:
        step, now = record.now.rows, record.now
        if step and (status := signalled()):
            return _stopped(status, record)
        compiled, state, active = record.compiled, now.state, limits.active(now)
        traced = (now.failures < step).any()  # a step has been finite: the traced program has been checked
        catching = contextlib.nullcontext([]) if traced else warnings.catch_warnings(record=True, action="always")
        if record.rules.chosen is not None:
            record.flush()
        if record.rules.has_stalled(record.rows) and (text := record.rules.choose(state, step)):
            bar.note(text)
        with catching as caught:
            try:
                after, report = compiled.update(state)
            except Unchosen:
                bar.note("`Auto` tries rules ...")
                bar.note(record.rules.choose(state, step))
                after, report = compiled.update(state)
        record.identify(state)
        record.save(save_every)  # of the step before, while the device takes this one
        report = fetched(report)
        if step == begun:
            check_same_value(report.value)
        carries = compiled.step.gradient is not None and bool(jax.tree.leaves(state.carry))
        # Of a method with a state, judged where that has had time to leave zero: in the third step.
        due = seen + record.per_call > 2 or (step + 1) * record.per_call >= limits.num_steps
        if not traced:
            _check_zeros(compiled, state, report, caught, may_begin=carries and not due)
        elif carries and due and not judged:
            _check_zeros(compiled, state, report, [])
        seen, judged = seen + record.per_call * report.finite.any(), judged or (due and report.finite.any())
        if not report.finite.all() and record.rules.chosen is not None and record.rules.probed < step:
            if text := record.rules.choose(state, step):  # the rule fails here: perhaps another does not
                bar.note(text)
                after, report = compiled.update(state)
                report = fetched(report)
        bad, halvings = active & ~report.finite, np.zeros(compiled.shape, np.int32)
        if record.per_call > 1:  # the call ended before the step that is not finite
            state = compiled.select(bad, after, state)
        while on_not_finite == "backtrack" and step and (again := bad & (halvings < MOST_FAILURES)).any():
            state = compiled.select(again, backtracked(state), state)
            after, report = compiled.select(again, compiled.update(state), (after, report))
            report = fetched(report)
            bad, halvings = active & ~report.finite, halvings + again
        skips = bad & (on_not_finite == "skip") & (now.failures < MOST_FAILURES)
        ends, active = bad & ~skips, active & ~(bad & ~skips)
        if ends.any():
            message = _not_finite(record, state, report, after, ends, halvings, alive=active.any())
            if not active.any():
                record.now = now._replace(state=state, failed=now.failed | ends if compiled.shape else now.failed)
                return ("not_finite", message) if not compiled.shape else limits.reached(record)
            now = record.now = now._replace(failed=now.failed | ends)
        # A member that skips the step keeps its state, but for the number of the step, which gives another key.
        taken, held = active & ~bad, state._replace(step=state.step + skips) if bad.any() else state
        after = compiled.select(taken, after, held)
        step_info = record.accept(after, report, active, taken, halvings, limits.min_delta)
        bar.update(_progress_line(step_info, active) if taken.any() else "skipped", record.per_call)
        if record.rules.on_error is not None:
            record.flush()
            if why := record.rules.misleads(record.rows):
                now = record.now._replace(state=compiled.step.restarted(record.now.state))
                text = record.rules.tighten(now.state, now.rows, why)
                if not text:
                    return "misled", f"after outer step {step} {why}, and {_no_remedy(record)}"
                record.now = now
                bar.note(text)
        if called and taken.any() and on_any(stops(step_info)):
            what = f"call {step} of {record.per_call} outer steps" if record.per_call > 1 else f"outer step {step}"
            return "callback", f"a callback stopped the run after {what}"
    return reached


def _no_remedy(record) -> str:
    if record.rules.on_error == "stop":
        return "`on_error='stop'`"
    if record.compiled.step.gradient is not None:
        return "`gradient` has no derivative rule to be replaced: improve its method"
    return "no stronger rule is left"


def _progress_line(step: TuneStep, active) -> str:
    if not active.shape:
        return f"loss {step.value:.4g}, best {step.best_value:.4g}, |hypergradient| {step.hypergradient_norm:.2g}"
    value, grad_norm = (np.nanmedian(np.where(active, x, np.nan)) for x in (step.value, step.hypergradient_norm))
    best = f"best {step.best_value.min():.4g} (member {step.best_value.argmin()})"
    return f"{active.sum()} of {active.size} members: median loss {value:.4g}, {best}, |hypergradient| {grad_norm:.2g}"


def _result(record, limits, status, message) -> TuneResult:
    now, history = record.now, record.history()
    if record.origin != "started":
        message = "; ".join([record.origin, *record.notes, message, *record.past])
    if record.rules.said:
        message = "; ".join([*record.rules.said, message])
    members = ()
    if record.compiled.shape:
        ended = limits.ended(record)
        members = tuple(Member(str(own) or status, int(n)) for own, n in zip(ended, now.steps, strict=True))
        early = ended[ended != ""]
        if 0 < early.size < ended.size:
            message += f"; {early.size} of {ended.size} members ended before: {_counted(early)}"
    best = now.best if members else float(now.best)
    hparams = record.compiled.hparams(now.state)
    unscored = np.isposinf(now.best) & (now.best_step >= 0)  # finite steps, of which none has a score
    if unscored.any():
        who = f" for {named_members(np.flatnonzero(unscored))}" * bool(members)
        warn(
            f"`monitor(info)` gave NaN or infinity at every outer step{who}, so that none is the best: `best_value` is "
            "nan, and `best_hparams` are those of the last step. Return a number from it, at one step in `patience` or "
            "more often; or omit `monitor`, for the outer loss.",
        )
        best = np.where(unscored, np.nan, best) if members else float("nan")
    if text := unconverged(history, record.compiled.step):
        message += f"; {text}"
        warn(f"`tune`: {text}.")
    step = now.best_step if members else int(now.best_step)
    return TuneResult(hparams, now.state.carry, now.best_hparams, best, step, history, status, message, members)


def _check_zeros(compiled, state, report, caught, may_begin=False):
    """Compares the hypergradient of the step that was traced with what the rules warned of."""
    if not report.finite.any():
        warn_again(caught)
        return
    hypergrad, members = report.hypergradient, None
    if compiled.shape:
        state, hypergrad, members = member(state, 0), whole(hypergrad), np.flatnonzero(report.finite)
    raise_if_zero(hypergrad, caught, program(compiled.step, state), members, may_begin=may_begin)


def _not_finite(record, state, report, after, ends, halvings, alive) -> str:
    now, who = record.now, ""
    if ends.shape:  # the first of them is explained
        indices = np.flatnonzero(ends)
        state, report, after, ends, halvings = member((state, report, after, ends, halvings), indices[0])
        now = now._replace(failures=now.failures[indices[0]])
        who = f", {named_members(indices)}{' (explained for the first)' * (len(indices) > 1)}"
    what = what_is_not_finite(report.value, report.hypergradient, after.point, after.carry)
    with recording(linear_solves=None):
        number = now.rows if record.per_call == 1 else int(whole(state.step))
        message = f"Outer step {number}{who}: {what} {diagnosis(record.compiled.step, state)}"
    if now.failures:
        message += f" So were the {now.failures} steps before, which were skipped: other keys make no difference."
    if halvings:
        message += f" Going back by half of the last move, {halvings} times, did not help."
    if number == 0 and not alive:
        raise NonFiniteError(message)
    end = "The run ends; `hparams` are those of this step, `best_hparams` the best before."
    if who:
        end = "These members end, and keep their hyperparameters; the others go on."
    warn(f"{message} {end}")
    return message


class Noted:
    """Handler that notes the first signal: what it asks for is done after the step in progress.

    The second is left to the handler that was set before. That of SIGTERM is called at the first, too, so that a run
    inside of another stops both.
    """

    def __init__(self, before: Any):
        self.before, self.count = before, 0

    @property
    def came(self) -> bool:
        """True once the signal has come, to this run or, before it began, to one around it."""
        return self.count > 0 or (isinstance(self.before, Noted) and self.before.came)

    def __call__(self, number, frame):
        self.count += 1
        if self.count > 1:
            signal.signal(number, self.before)
            signal.raise_signal(number)
        elif number == signal.SIGTERM and callable(self.before):
            self.before(number, frame)


@contextlib.contextmanager
def noting(number: int, enabled: bool) -> Iterator[Callable[[], bool]]:
    """While active, the first signal is noted. Yields a function that says whether it came.

    The handler that was set before is restored, unless there is another by then. Only the main thread of Python may set
    one: in another thread, where the handler was not set by Python, and where the program ignores the signal, nothing
    is noted but by a run around this one, as where that alone has a folder.
    """
    before, main = signal.getsignal(number), threading.current_thread() is threading.main_thread()
    if not enabled or before in (None, signal.SIG_IGN) or not main:
        yield lambda: isinstance(before, Noted) and before.came
        return
    note = Noted(before)
    signal.signal(number, note)
    try:
        yield lambda: note.came
    finally:
        if signal.getsignal(number) is note:
            signal.signal(number, before)
