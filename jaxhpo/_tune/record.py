"""The record of a run: where it stands, and how it came there. What an interruption must not lose."""

from __future__ import annotations

import datetime
import functools
import hashlib
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.record import LinearSolve
from jaxhpo._core.transforms import to_natural
from jaxhpo._core.types import LinearStatus, PyTree
from jaxhpo._core.validate import describe
from jaxhpo._tune.history import summary, to_numpy
from jaxhpo._tune.processes import on_any
from jaxhpo._tune.run_dir import RunDir
from jaxhpo._tune.settings import described
from jaxhpo._tune.sharded_dir import ShardedDir
from jaxhpo._tune.step import Report, Search, State

try:
    import resource
except ImportError:  # Windows
    resource = None


class TuneStep(NamedTuple):
    """What a callback is given after each outer step.

    Attributes:
      step: 0, 1, …
      value: the outer loss at `hparams`.
      hparams: the hyperparameters at which it was evaluated.
      hypergradient_norm: Euclidean norm in unconstrained units.
      info: what the outer loss reported, or None.
      best_value: the lowest outer loss so far; with a `monitor`, the lowest of its numbers.
      seconds: since the start.
    """

    step: int
    value: float
    hparams: PyTree
    hypergradient_norm: float
    info: PyTree
    best_value: float
    seconds: float


class Standing(NamedTuple):
    """Where a run stands: replaced whole, so that an interruption finds the one before or the one after.

    Attributes:
      state: what the next step depends on.
      rows: of history that belong to it.
      best: lowest score so far.
      best_hparams: where that was.
      waited: steps since an improvement.
      halvings: of the last move, since the last step.
      failures: steps in a row that were not finite, and skipped.
      row: makes the last row of history, once the next step is under way.
    """

    state: State
    rows: int
    best: float
    best_hparams: PyTree
    waited: int
    halvings: int = 0
    failures: int = 0
    row: Callable[[], dict[str, Any]] | None = None


class Record:
    """A run's standing and history, in memory and in `run_dir`.

    Args:
      search: the compiled step.
      state: the first.
      run_dir: the folder, or None.
      settings: of this call, to be compared with those of the call that goes on.
      monitor: `info -> score`, or None, for which the outer loss is the score.
      wanted: what is recorded beside, some of `EXTRAS`.
      solves: to which linear solves report, where they are wanted.
    """

    def __init__(
        self,
        search: Search,
        state: State,
        run_dir: RunDir | ShardedDir | None,
        settings: dict[str, Any],
        monitor: Callable[[PyTree], Any] | None,
        wanted: tuple[str, ...] = (),
        solves: list[LinearSolve] | None = None,
    ):
        self.search, self.run_dir, self.settings, self.monitor = search, run_dir, settings, monitor
        self.wanted, self.solves = wanted, solves
        self.now = Standing(state, 0, np.inf, to_natural(search.transforms, state.point), 0)
        # What must be the same when the run goes on: the numbers on disk mean nothing else.
        text = described(search.transforms) or repr(None)
        transforms = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
        self.fixed = {"hparams": state.point, "key": state.key, "transforms": transforms}
        self.rows: list[dict[str, Any]] = []
        self.origin, self.notes = "started", list[str]()
        self.started = self.saved = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the start, without the time between a stop and its resumption."""
        return time.perf_counter() - self.started

    def accept(self, after: State, report: Report, min_delta: float) -> TuneStep:
        """Takes a step into the record."""
        step, seconds = self.now.rows, self.seconds
        # By way of NumPy, as `float` of a JAX array takes three times as long.
        value, grad_norm = float(np.asarray(report.value)), float(np.asarray(report.hypergradient_norm))
        hparams, info = _own((report.hparams, report.info))
        score = value if self.monitor is None else _score(self.monitor, _own(info))
        best, best_hparams, waited = self.now.best, self.now.best_hparams, self.now.waited
        waited = 0 if score < best - min_delta else waited + 1
        best, best_hparams = (score, report.hparams) if score < best else (best, best_hparams)
        now = Standing(after, step + 1, best, best_hparams, waited)
        self._go_on(now, report, seconds, score)
        return TuneStep(step, value, hparams, grad_norm, info, best, seconds)

    def _go_on(self, now, report, seconds, score, skipped=0):
        self.settle()
        self.now = now._replace(row=self._row_maker(report, seconds, score, skipped))

    def _row_maker(self, report, seconds, score, skipped=0) -> Callable[[], dict[str, Any]]:
        """What is known of a row only now, and a function that makes the row of it."""
        counts = {
            "halvings": np.asarray(self.now.halvings, np.int32),
            "skipped_steps": np.asarray(skipped, np.int32),
        }
        solved = None if self.solves is None else _summed_up(self.solves)
        return functools.partial(self._row, report, seconds, score, counts, solved)

    def _row(self, report, seconds, score, counts, solved) -> dict[str, Any]:
        """One row of history. Copies: a view would keep the device's array, and kilobytes with it."""
        row = {
            "score": np.asarray(score, float),
            "remedies": {**jax.tree.map(np.array, report.remedies), **counts},
            "value": np.array(report.value),
            "hypergradient_norm": np.array(report.hypergradient_norm),
            "seconds": np.asarray(seconds),
            "peak_bytes": np.asarray(peak_bytes(), np.int64),
            "hparams": jax.tree.map(to_numpy if "hparams" in self.wanted else summary, report.hparams),
            "info": jax.tree.map(to_numpy, report.info),
        }
        if "hypergradient" in self.wanted:
            row["hypergradient"] = jax.tree.map(to_numpy, report.hypergradient)
        if solved is not None:
            row["linear_solves"] = solved
        return row

    def settle(self) -> None:
        """Makes the last row of history, if that is still to be done: best while the device takes the next step."""
        if self.now.row is None or len(self.rows) == self.now.rows:
            return
        row = self.now.row()
        if self.rows and jax.tree.structure(row) != jax.tree.structure(self.rows[0]):
            raise JaxhpoError(
                f"`outer_loss` returned an info of tree {jax.tree.structure(row['info'])} at outer step "
                f"{len(self.rows)}, but {jax.tree.structure(self.rows[0]['info'])} before: return the same tree at "
                "every step."
            )
        self.rows.append(row)

    def skip(self, report: Report) -> None:
        """Takes a step that was not finite into the record, and stays where it was taken, with another key."""
        now = self.now
        state = now.state._replace(step=now.state.step + 1)
        standing = now._replace(state=state, rows=now.rows + 1, waited=now.waited + 1, failures=now.failures + 1)
        self._go_on(standing, report, self.seconds, np.nan, skipped=1)

    def retreat(self) -> None:
        """Goes half of the last move back, to take the step from there."""
        self.now = self.now._replace(state=self.search.retreat(self.now.state), halvings=self.now.halvings + 1)

    def history(self) -> dict[str, Any]:
        """The rows so far, stacked."""
        self.settle()
        return jax.tree.map(lambda *x: np.stack(x), *self.rows)

    def still_falls(self, steps: int) -> bool:
        """Whether, with a monitor, the least outer loss is that of one of the last steps."""
        self.settle()
        values = [float(row["value"]) for row in self.rows]
        values = [value if np.isfinite(value) else np.inf for value in values]
        return self.monitor is not None and min(values[-steps:]) < min(values[:-steps], default=np.inf)

    def save(self, every: int | datetime.timedelta | None = None) -> None:
        """Writes the history, and a checkpoint: always, or if one is due."""
        self.settle()
        if self.run_dir is None:
            return
        for row in self.rows[self.run_dir.num_rows :]:
            self.run_dir.append(row)
        if every is None or _is_due(every, self.now.rows - self.run_dir.saved_rows, time.perf_counter() - self.saved):
            settings = {**self.settings, "inner_steps": self.search.inner_steps, "seconds": self.seconds}
            self.run_dir.save(self._tree(self.now), settings)
            self.saved = time.perf_counter()

    def resume(self) -> None:
        """Goes on from what is in `run_dir`, if there is something."""
        if self.run_dir is None or not self.run_dir.begun:
            return
        after, report = self.search.shapes(self.now.state, placed=isinstance(self.run_dir, ShardedDir))
        zeros = jax.tree.map(_zeros, report)
        row = self._row_maker(zeros, 0.0, 0.0)()
        like = self._tree(Standing(after, 0, 0.0, report.hparams, 0))
        found = self.run_dir.resume(like, row, "run['fixed']")
        tree = found.tree
        best_hparams = jax.tree.map(jnp.asarray, tree["best_hparams"])
        state = _placed(tree["state"], self.now.state)
        waited, halvings, failures = (int(tree[name]) for name in ("waited", "halvings", "failures"))
        self.now = Standing(state, len(found.rows), float(tree["best"]), best_hparams, waited, halvings, failures)
        self.rows = found.rows
        self._check_monitor(found.settings, self.run_dir.folder)
        # What callbacks took after the last row, too: a run that had spent its seconds has spent them.
        self.started -= max(float(self.rows[-1]["seconds"]), found.settings.pop("seconds", 0.0))
        self.origin = f"resumed from {os.fspath(self.run_dir.folder)!r} after {len(self.rows)} outer steps"
        here = {**self.settings, "inner_steps": self.search.inner_steps}
        found.settings["inner_steps"] = found.settings["inner_steps"] or here["inner_steps"]  # 0 where none was seen
        self.notes = [*found.notes, *_differences(found.settings, here)]
        if found.settings["inner_steps"] != here["inner_steps"]:
            self.notes.append("the best step so far is that of the earlier inner steps")

    def _check_monitor(self, before, folder):
        """Raises where the scores so far are of another kind: no best step could be told by both."""
        if (before.get("monitor") is None) == (self.monitor is None):
            return
        here, there = ("no `monitor`", "one") if self.monitor is None else ("a `monitor`", "none")
        raise JaxhpoError(
            f"`run_dir`: this call has {here}, the run in {folder} had {there}, and the best step so far "
            "would be judged by another number than those to come: use another folder, or what that run had."
        )

    def tell(self, status: str, message: str) -> None:
        """Leaves word in `run_dir` of how the run stands."""
        if self.run_dir is not None:
            self.run_dir.tell(status=status, message=message, num_steps=self.settings["num_steps"])

    def _tree(self, now: Standing):
        best = {"best": np.asarray(now.best), "best_hparams": now.best_hparams}
        counts = {name: np.asarray(getattr(now, name)) for name in ("waited", "halvings", "failures")}
        return {"state": now.state, "fixed": self.fixed, **best, **counts}


def _own(tree):
    """The same arrays in containers of one's own: whoever is given them may write into those."""
    return jax.tree.map(lambda x: x, tree)


def _zeros(struct):
    """In the place of a number, or of a key's data."""
    if jnp.issubdtype(struct.dtype, jax.dtypes.prng_key):
        return jnp.zeros(struct.shape, struct.dtype)
    return np.zeros(struct.shape, struct.dtype)


def peak_bytes() -> int:
    """The most that has been in use: on the accelerator where it tells, else the process's resident set."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    if resource is None:
        return 0
    # Kibibytes, but for macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _summed_up(solves) -> dict[str, np.ndarray]:
    """Of an outer step's linear solves the largest residual, all iterations, and the number that did not converge."""
    jax.effects_barrier()
    reported, solves[:] = list(solves), []
    return {
        "residual": np.asarray(max((s.residual for s in reported), default=0.0)),
        "num_iterations": np.asarray(sum(s.num_iterations for s in reported), np.int32),
        "not_converged": np.asarray(sum(s.status != LinearStatus.CONVERGED for s in reported), np.int32),
    }


def _is_due(every, steps, seconds) -> bool:
    if not steps:
        return False
    return on_any(seconds >= every.total_seconds()) if isinstance(every, datetime.timedelta) else steps >= every


def _placed(state, like):
    """On the devices on which the first state lies, but for what has come back with a place of its own."""
    if jax.tree.structure(state) != jax.tree.structure(like):
        return jax.tree.map(jnp.asarray, state)

    def put(x, first):
        if isinstance(x, jax.Array) and len(x.sharding.device_set) > 1:
            return x
        sharding = getattr(first, "sharding", None)
        spread = sharding is not None and len(sharding.device_set) > 1 and np.shape(x) == first.shape
        return jax.device_put(x, sharding) if spread else jnp.asarray(x)

    return jax.tree.map(put, state, like)


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """In words, which settings are others than those of the call that saved."""
    before, after = before | before.pop("optimizer"), after | after["optimizer"]
    return [
        f"{name} is {after.get(name, 'absent')}, was {before.get(name, 'absent')}"
        for name in sorted((before.keys() | after.keys()) - {"optimizer"})
        if before.get(name) != after.get(name)
    ]


def _score(monitor, info) -> float:
    score = monitor(info)
    try:
        return float(score)
    except (TypeError, ValueError):
        raise JaxhpoError(
            f"`monitor(info)` returned {describe(score)}, but the best step is that of its lowest number: return one."
        ) from None
