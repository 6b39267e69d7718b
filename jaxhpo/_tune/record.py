"""State and history of a run, in memory and in the run directory."""

import datetime
import functools
import hashlib
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.processes import on_any, whole
from jaxhpo._core.record import LinearSolve
from jaxhpo._core.tree import upcast, vdot
from jaxhpo._core.types import LinearStatus, PyTree
from jaxhpo._tune.checkpoint import is_spread
from jaxhpo._tune.error_bar import NONE, ErrorBar, Measured
from jaxhpo._tune.history import key_data, largest_whole, printable, summary
from jaxhpo._tune.inputs import convert
from jaxhpo._tune.population import Compiled, member
from jaxhpo._tune.program import changes, digests
from jaxhpo._tune.rules import Rules
from jaxhpo._tune.run_dir import RunDir
from jaxhpo._tune.settings import described, retaken
from jaxhpo._tune.step import OuterReport, OuterState

try:
    import resource
except ImportError:  # Windows
    resource = None


MOST_NOTES = 20  # resumptions whose changes a checkpoint keeps


class TuneStep(NamedTuple):
    """Argument of a callback, after each outer step.

    In a population, `value`, `hypergradient_norm` and `best_value` are arrays with one entry per member, and leaves of
    `hparams` and `info` have a leading axis of members.

    Attributes:
      step: 0, 1, …; the number of the call where `steps_per_call` is above 1.
      value: the outer loss at `hparams`.
      hparams: the hyperparameters at which it was evaluated.
      hypergradient_norm: Euclidean norm in unconstrained units.
      info: what the outer loss reported, or None.
      best_value: the lowest score so far, as in `TuneResult`; inf before the first one.
      seconds: since the start.

    Example:
      >>> def small(step):
      ...     return step.value < 0.1
      >>> result = jaxhpo.tune(
      ...     lambda h: (h - 3.0) ** 2, 0.0, optax.sgd(0.25), num_steps=100, callbacks=[small], progress=False
      ... )
      >>> result.status, result.history["value"].tolist()  # 9 · 0.25ⁱ
      ('callback', [9.0, 2.25, 0.5625, 0.140625, 0.03515625])
    """

    step: int
    value: Any
    hparams: PyTree
    hypergradient_norm: Any
    info: PyTree
    best_value: Any
    seconds: float


class LoopState(NamedTuple):
    """State of the loop on the host; it is replaced as a whole, so that an interruption leaves a consistent one.

    Arrays have the shape () or (members,).

    Attributes:
      state: of the next step.
      rows: history rows that belong to it.
      best: lowest score so far; inf before the first one.
      best_step: when that was; without a score the last finite step, and -1 before that.
      best_hparams: where that was.
      score_window: the last numbers of which a score is the mean: (window, *shape), NaN where there are fewer.
      waited: steps since an improvement.
      failures: consecutive steps that were not finite, and were skipped.
      steps: rows that each member took part in.
      failed: members that ended because they were not finite.
      pending: makes the last row, which `Record.flush` calls while the device takes the next step.
    """

    state: OuterState
    rows: int
    best: np.ndarray
    best_step: np.ndarray
    best_hparams: PyTree
    score_window: np.ndarray
    waited: np.ndarray
    failures: np.ndarray
    steps: np.ndarray
    failed: np.ndarray
    pending: Callable[[], dict[str, Any]] | None = None


class Record:
    """State and history of a run, in memory and in `run_dir`.

    Args:
      compiled: the compiled step.
      state: the first state.
      run_dir: the folder, or None.
      settings: of this call, to be compared with those of the call that resumes.
      monitor: `info -> number`, or None, for which the outer loss is that number.
      window: numbers of which the score is the mean.
      rules: those that solves take.
      extras: extra columns, some of `EXTRAS`, and "slope" where `on_error` decides.
      solves: the list to which linear solves report, where they are recorded.

    Attributes:
      past: what each earlier resumption changed, in words; `own` is that of this one, or empty.
      changed: what has changed since the run that is resumed was saved, in words.
      another_loss: whether that is surely another outer loss, whose scores do not compare.
    """

    def __init__(
        self,
        compiled: Compiled,
        state: OuterState,
        run_dir: RunDir | None,
        settings: dict[str, Any],
        monitor: Callable[[PyTree], Any] | None,
        window: int,
        rules: Rules,
        extras: tuple[str, ...] = (),
        solves: list[LinearSolve] | None = None,
    ):
        self.compiled, self.run_dir, self.settings, self.monitor = compiled, run_dir, settings, monitor
        self.extras, self.solves, self.shape, self.rules = extras, solves, compiled.shape, rules
        self.error_bar = ErrorBar(compiled.step, "slope" in extras) if "error" in extras else None
        zeros = np.zeros(self.shape, np.int64)
        scores = self._no_scores(state, window)
        self.now = LoopState(state, 0, **scores, failures=zeros, steps=zeros, failed=zeros > 0)
        # What must be the same when the run is resumed: the numbers on disk depend on it.
        text = described(compiled.step.transforms) or repr(None)
        transforms = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
        monitored = np.asarray(monitor is not None)  # otherwise the score is another number
        self.fixed = {"hparams": state.point, "key": state.key, "transforms": transforms, "monitor": monitored}
        self.per_call = compiled.step.steps_per_call
        if self.per_call > 1:
            self.fixed["steps_per_call"] = np.asarray(self.per_call)
        self.rows: list[dict[str, Any]] = []
        self.origin, self.notes = "started", list[str]()
        self.past, self.own = list[str](), list[str]()
        self.loss: dict[str, str] = {}  # digests; empty before the first trace
        self.changed, self.another_loss = "", False
        self.started = time.perf_counter()
        self.tried = 0, self.started  # rows and time of the last checkpoint, whether or not the disk took it

    @property
    def seconds(self) -> float:
        """Seconds since the start, without the time between a stop and its resumption."""
        return time.perf_counter() - self.started

    def identify(self, state: OuterState) -> None:
        """Notes digests of the step that was taken from the first state."""
        if self.run_dir is not None and not self.loss:
            if self.rules.chosen is None:
                traced = self.compiled.trace(state)
            else:  # `Auto` has chosen: another choice is the same loss
                with self.rules.as_asked():
                    traced = self.compiled.shapes(state)[2]
            self.loss = digests(*traced, state)

    def accept(self, after: OuterState, report: OuterReport, active, finite, halvings, min_delta: float) -> TuneStep:
        """Records a step: the next state, the best so far, and a history row; arrays are those of `_row`."""
        now, seconds, value = self.now, self.seconds, report.value
        hparams, info = jax.tree.map(lambda x: x, (report.hparams, report.info))  # containers that a callback may edit
        number = np.where(finite, value if self.monitor is None else self._scores(info, finite), np.nan).astype(float)
        window = np.concatenate([now.score_window[1:], number[None]])
        window = np.where(np.isnan(number), now.score_window, window)
        score = np.where(np.isnan(number), np.nan, _mean(window))
        improved = score < now.best
        best = np.where(improved, score, now.best)
        follow = improved | (finite & (best == np.inf))  # before there is any score
        best_step = np.where(follow, now.rows, now.best_step)
        best_hparams = self.compiled.select(follow, report.hparams, now.best_hparams)
        waited = np.where(active, np.where(score < now.best - min_delta, 0, now.waited + 1), now.waited)
        failures = np.where(active, np.where(finite, 0, now.failures + 1), now.failures)
        solves = None
        if self.solves is not None:  # to which the device reports
            jax.effects_barrier()
            solves, self.solves[:] = list(self.solves), []
        more = {}
        if "agreement" in self.extras:
            more["predicted"] = _predicted(report, after, bool(self.shape))
        if self.error_bar is not None and finite.all():
            more["measured"] = self.error_bar.measure(now.rows, now.state, after, report)
        row = functools.partial(self._row, report, active, finite, halvings, score, seconds, solves, **more)
        self.flush()
        steps = now.steps + active
        scores = {"best": best, "best_step": best_step, "best_hparams": best_hparams, "score_window": window}
        self.now = LoopState(
            after, now.rows + 1, **scores, waited=waited, failures=failures, steps=steps, failed=now.failed, pending=row
        )
        value, grad_norm, best = (_number(x) for x in (value, report.hypergradient_norm, best))
        return TuneStep(now.rows, value, hparams, grad_norm, info, best, seconds)

    def _scores(self, info, finite) -> np.ndarray:
        monitor: Any = self.monitor
        problem = "`monitor(info)` returned {}, but the lowest number marks the best step: return one number."
        scores = np.full(self.shape, np.nan)
        for index in np.argwhere(finite):
            own = member(info, index[0]) if self.shape else jax.tree.map(lambda x: x, info)
            scores[tuple(index)] = convert(float, monitor(own), problem)
        return scores

    def flush(self) -> None:
        """Converts the pending history row, overlapping host work with the device."""
        if self.now.pending is None or len(self.rows) == self.now.rows:
            return
        row = self.now.pending()
        if self.rows and jax.tree.structure(row) != jax.tree.structure(self.rows[0]):
            now, before = (jax.tree.structure(each["info"]) for each in (row, self.rows[0]))
            raise JaxhpoError(
                f"`outer_loss` returned an info of tree {now} at outer step {len(self.rows)}, {before} before: keep it."
            )
        self.rows.append(row)

    def _row(
        self,
        report: OuterReport,
        active,
        finite,
        halvings,
        score,
        seconds,
        solves,
        predicted=None,
        measured: Measured = NONE,
    ) -> dict[str, Any]:
        """Returns a history row of copies: a view would keep the device's array.

        Args:
          report: of the device.
          active: members that take the step; the others have ended, and are held. Arrays have the shape () or
            (members,).
          finite: active members whose step is finite; the other active ones skip it.
          halvings: of the last move, before the step was finite.
          score: of each member.
          seconds: since the start.
          solves: linear solves of the step; None where they are not recorded.
          predicted: change of the outer loss by the step, to first order; None where that is not recorded.
          measured: what `ErrorBar.measure` found.
        """
        counts = {**report.remedies, "halvings": halvings, "skipped_steps": active & ~finite}
        hypergradient = report.hypergradient if "hypergradient" in self.extras else None
        fetched = whole(jax.tree.map(key_data, (report.hparams, report.info, hypergradient)))
        hparams, info, hypergradient = fetched
        largest = largest_whole(math.prod(x.shape[len(self.shape) :]) for x in jax.tree.leaves(hparams))
        small = np.array if "hparams" in self.extras else functools.partial(summary, largest=largest)
        kept = (lambda x: jax.tree.map(lambda *own: np.stack(own), *map(small, x))) if self.shape else small
        row = {
            "score": np.asarray(score, float),
            "remedies": {name: np.array(x, np.int32) for name, x in counts.items()},
            "value": np.array(report.value),
            "hypergradient_norm": np.array(report.hypergradient_norm),
            "seconds": np.asarray(seconds),
            "peak_bytes": np.asarray(peak_bytes(), np.int64),
            "hparams": jax.tree.map(kept, hparams),
            "info": jax.tree.map(np.array, info),
        }
        if not active.all():  # members that have ended have no values and no counts
            blank = lambda x: np.where(active, x, 0 if x.dtype == np.int32 else np.nan).astype(x.dtype)  # noqa: E731
            row |= jax.tree.map(blank, {name: row[name] for name in ("value", "hypergradient_norm", "remedies")})
        if "hypergradient" in self.extras:
            row["hypergradient"] = jax.tree.map(np.array, hypergradient)
        if solves is not None:
            row["linear_solves"] = _summed_up(solves)
        if "agreement" in self.extras:
            row |= self._agreement(row, 0.0 * row["value"] if predicted is None else predicted)
        if "error" in self.extras:
            error = np.asarray(measured.off)
            another_rule = len(self.rows) in (self.rules.since, self.rules.probed)
            held = self.rows[-1]["error"] if measured is NONE and self.rows and not another_rule else error
            row |= {"measured_error": error, "error": held}
        if "slope" in self.extras:
            row |= {"measured_norm": np.asarray(measured.size), "measured_slope": np.asarray(measured.slope)}
        return row

    def _agreement(self, row, predicted) -> dict[str, np.ndarray]:
        """Returns the predicted change by this step, and of the step before the actual change for a predicted one."""
        agreement, before = np.full(self.shape, np.nan), self.rows[-1] if self.rows else None
        if before is not None:
            with np.errstate(divide="ignore", invalid="ignore"):
                agreement = (row["value"] - before["value"]).astype(float) / before["predicted_change"]
            taken = (before["remedies"]["skipped_steps"] == 0) & (row["remedies"]["halvings"] == 0)
            agreement = np.where(taken, agreement, np.nan)
        return {"predicted_change": np.asarray(whole(predicted), float), "agreement": np.asarray(agreement)}

    def history(self) -> dict[str, Any]:
        """Returns the rows so far, stacked."""
        self.flush()
        rows = self.rows
        if not rows:
            with self.rules.as_asked():
                rows = [self._row_of_zeros(self.compiled.shapes(self.now.state)[1])]
        return jax.tree.map(lambda *x: np.stack(x)[: len(self.rows)], *rows)

    def _row_of_zeros(self, report: OuterReport) -> dict[str, Any]:
        """Returns a row like those of the run, from the shapes of a report."""
        zeros, mask = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), report), self.now.failed
        return self._row(zeros, mask, mask, mask, self.now.best, 0.0, self.solves)

    def still_falls(self, steps: int) -> np.ndarray:
        """Returns, with a monitor, whether a member's lowest outer loss is that of one of its last steps."""
        if self.monitor is None:
            return np.zeros(self.shape, bool)
        self.flush()
        size = len(self.now.score_window)
        values = np.stack([np.full(self.shape, np.nan)] * (size - 1) + [row["value"] for row in self.rows]).astype(
            float
        )
        values = np.where(np.isfinite(values), values, np.nan)
        windows = np.lib.stride_tricks.sliding_window_view(values, size, axis=0)
        values = np.where(np.isnan(values[size - 1 :]), np.inf, _mean(np.moveaxis(windows, -1, 0)))
        return (values.argmin(0) >= self.now.steps - steps) & (values.min(0) < np.inf)

    def save(self, every: int | datetime.timedelta | None = None) -> None:
        """Writes the history, and a checkpoint: always, or if one is due."""
        self.flush()
        if self.run_dir is None:
            return
        for row in self.rows[self.run_dir.num_rows :]:
            self.run_dir.append(row)
        rows, saved = self.tried
        if every is None or _is_due(every, self.now.rows - rows, time.perf_counter() - saved):
            tree = self._tree(self.now, self.compiled.hparams(self.now.state))
            self.run_dir.save(tree, {**self._settings(), "seconds": self.seconds})
            self.tried = self.now.rows, time.perf_counter()

    def resume(self) -> None:
        """Continues from the checkpoint in `run_dir`, if there is one."""
        if self.run_dir is None or not self.run_dir.begun:
            return
        with self.rules.as_asked():
            after, report, traced = self.compiled.shapes(self.now.state, placed=jax.process_count() > 1)
        self.loss = digests(*traced, self.now.state)
        row = self._row_of_zeros(report)
        like = self.now._replace(state=after, best_hparams=report.hparams)
        tree, self.rows, before, notes = self.run_dir.resume(self._tree(like, like.best_hparams), row, "run['fixed']")
        tree |= {"state": _placed(tree["state"], self.now.state), "rows": len(self.rows)}
        self.tried = len(self.rows), self.started
        opt_state, held_back = retaken(tree["state"].opt_state, self.now.state.opt_state, before["optimizer"])
        tree["state"] = tree["state"]._replace(opt_state=opt_state)
        tree["best_hparams"] = jax.tree.map(jnp.asarray, tree["best_hparams"])
        self.now = LoopState(**{name: tree[name] for name in LoopState._fields})
        # Includes the time of callbacks after the last row: a run that had spent its seconds has spent them.
        self.started -= max(before.pop("seconds", 0.0), float(self.rows[-1]["seconds"]))
        if self.error_bar is not None:
            self.error_bar.resume(self.rows)
        if own := before.pop("rules", None):
            self.rules.restore(own, self.now.state)
        steps = self.per_call * len(self.rows)
        self.origin = f"resumed from {os.fspath(self.run_dir.folder)!r} after {steps} outer steps"
        self.past, here = before.pop("past", []), self._settings()
        here.pop("past")
        here.pop("rules")
        before["inner_steps"] = before["inner_steps"] or here["inner_steps"]  # 0: none was counted
        step = before["loss"]["step"], here["loss"]["step"]
        self.changed, self.another_loss = changes(before.pop("loss"), here.pop("loss"))
        unnamed = step[0] != step[1] and not self.changed
        unnamed &= all(before[name] == here[name] for name in ("optimizer", "remedies", "projections"))
        others = [*map(printable, [*_differences(before, here), *held_back])]
        if unnamed:
            others.append("the optimiser or a projection is another, in a number that its code holds")
        if self.changed:
            others.append(self.changed)
        if before["inner_steps"] != here["inner_steps"]:
            others.append("the best step so far is that of the earlier inner steps")
        self.notes = [*notes, *others]
        lasting = [note for note in others if not note.startswith("num_steps is ")]
        self.own = [f"since step {len(self.rows)}: {'; '.join(lasting)}"] if lasting else []

    def _settings(self) -> dict[str, Any]:
        past = [*self.past, *self.own][-MOST_NOTES:]
        return {
            **self.settings,
            "inner_steps": self.compiled.step.inner_steps,
            "loss": self.loss,
            "past": past,
            "rules": self.rules.saved(),
        }

    def begin_scores(self) -> None:
        """Forgets the best step, and who has ended: those scores are of another loss."""
        none, scores = np.zeros(self.shape, np.int64), self._no_scores(self.now.state, len(self.now.score_window))
        self.now = self.now._replace(**scores, failures=none, failed=none > 0)

    def _no_scores(self, state, window) -> dict[str, Any]:
        zeros, best = np.zeros(self.shape, np.int64), np.full(self.shape, np.inf)
        empty = np.full((window, *self.shape), np.nan)
        at = self.compiled.hparams(state)
        return {"best": best, "best_step": zeros - 1, "best_hparams": at, "score_window": empty, "waited": zeros}

    def write_status(self, status: str, message: str) -> None:
        """Writes the run's status to `run_dir`."""
        if self.run_dir is not None:
            more = {"steps_per_call": self.per_call} if self.per_call > 1 else {}
            self.run_dir.write_status(status=status, message=message, num_steps=self.settings["num_steps"], **more)

    def _tree(self, now: LoopState, hparams: PyTree):
        """Returns what a checkpoint holds; of the last hyperparameters in natural units `load` alone makes use."""
        return now._replace(rows=None, pending=None)._asdict() | {"fixed": self.fixed, "hparams": hparams}


@functools.partial(jax.jit, static_argnums=2)
def _predicted(report: OuterReport, after: OuterState, population: bool) -> jax.Array:
    """Returns ⟨g, Δu⟩ of the hypergradient g and the move Δu, of each member."""

    def product(grad, new, old):
        return jnp.asarray(vdot(upcast(grad), jax.tree.map(jnp.subtract, upcast(new), upcast(old))))

    fn = jax.vmap(product) if population else product
    return fn(report.hypergradient, after.point, after.before)


def _mean(window: np.ndarray) -> np.ndarray:
    """Returns the mean over the first axis of what is not NaN; NaN where there is nothing."""
    known = ~np.isnan(window)
    return np.where(known, window, 0.0).sum(0) / np.where(known.any(0), known.sum(0), np.nan)


def _number(x):
    return float(x) if x.shape == () else x.copy()


def peak_bytes() -> int:
    """Returns the peak of the accelerator's memory where it reports one, else of the process's resident set."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    if resource is None:
        return 0
    # In kibibytes, except on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _summed_up(solves) -> dict[str, np.ndarray]:
    """Returns the largest residual, all iterations, and the number of solves that did not converge."""
    return {
        "residual": np.asarray(max((s.residual for s in solves), default=np.nan)),
        "num_iterations": np.asarray(sum(s.num_iterations for s in solves), np.int32),
        "not_converged": np.asarray(sum(s.status != LinearStatus.CONVERGED for s in solves), np.int32),
    }


def _is_due(every, steps, seconds) -> bool:
    if not steps:
        return False
    if isinstance(every, datetime.timedelta):
        return on_any(seconds >= every.total_seconds())
    return steps >= every


def _placed(state, like):
    """Puts the state on the devices of the first one, except leaves that were restored with a sharding of their own."""
    if jax.tree.structure(state) != jax.tree.structure(like):
        return jax.tree.map(jnp.asarray, state)

    def put(x, first):
        spread = is_spread(first) and np.shape(x) == first.shape
        return x if is_spread(x) else jax.device_put(x, first.sharding) if spread else jnp.asarray(x)

    return jax.tree.map(put, state, like)


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Returns which settings differ from those of the call that saved, in words."""
    before, after = before | before.pop("optimizer"), after | after["optimizer"]
    return [
        f"{name} is {after.get(name, 'absent')}, was {before.get(name, 'absent')}"
        for name in sorted((before.keys() | after.keys()) - {"optimizer"})
        if before.get(name) != after.get(name)
    ]
