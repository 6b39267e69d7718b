"""The trials of a search: asked of Optuna, trained together, saved, and told."""

import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from jaxhpo._core.errors import JaxhpoError, warn
from jaxhpo._core.outer import WITH_CARRY, in_one_form, takes_carry
from jaxhpo._core.progress import Progress
from jaxhpo._core.tree import without_weak_types
from jaxhpo._core.types import PyTree
from jaxhpo._core.validate import check_arrays, check_count, check_key
from jaxhpo._tune.checkpoint import absolute
from jaxhpo._tune.history import decode, encode
from jaxhpo._tune.inputs import check_callbacks, check_settings
from jaxhpo._tune.program import changes, digest, loss_digests
from jaxhpo._tune.record import TuneStep
from jaxhpo._tune.run_dir import RunDir, in_use
from jaxhpo._tune.step import check_carry
from jaxhpo._tune.tune import CAME, TEN_SECONDS, TuneResult, noting
from jaxhpo.search._samplers import Make, Sampler
from jaxhpo.search._space import Space
from jaxhpo.search._storage import (
    EXCESS,
    PROBLEM,
    Others,
    any_waits,
    attempts,
    beating,
    beats,
    close,
    first_attempt,
    open_storage,
    put_back,
    quiet,
)

PAUSE = 1.0  # seconds between looks at the trials of other processes
HEADER = {"optimizer": {}, "loss": {}, "seconds": 0.0, "inner_steps": 0}  # what a checkpoint of `tune` says of itself


@dataclasses.dataclass
class Slot:
    """A trial that is being trained.

    Attributes:
      trial: Optuna's.
      index: among the trials, whatever the attempt.
      key: of the trial.
      hparams: its hyperparameters.
      carry: after the last call.
      reported: calls of whose value an earlier attempt has told Optuna.
      calls: of the outer loss so far.
      row: value and info of the last one.
      path: of the folder where its state is kept; None where it is not.
      folder: that one, once it is open.
      saved: calls and time of the last checkpoint.
    """

    trial: optuna.Trial
    index: int
    key: jax.Array
    hparams: PyTree
    carry: PyTree
    reported: frozenset[int]
    path: pathlib.Path | None = None
    calls: int = 0
    row: dict[str, Any] = dataclasses.field(default_factory=dict)
    folder: RunDir | None = None
    saved: tuple[int, float] = (0, 0.0)

    def save(self, every: int | datetime.timedelta = 0) -> None:
        """Writes a checkpoint if one is due."""
        calls, seconds = self.calls - self.saved[0], time.perf_counter() - self.saved[1]
        if self.folder is None or not calls:
            return
        if calls >= every if isinstance(every, int) else seconds >= every.total_seconds():
            self.folder.save(self.tree(), HEADER)
            self.saved = self.calls, time.perf_counter()

    def tree(self) -> dict[str, Any]:
        """The contents of a checkpoint."""
        return {"fixed": {"hparams": self.hparams, "key": self.key}, "carry": self.carry}


class Search:
    """A search; see `random` for the arguments that are not here.

    Args:
      kind: its name, with what makes it another.
      outer_loss: as for `tune`.
      space: its space.
      make: of its sampler.
      pruner: Optuna's.
    """

    def __init__(
        self,
        kind: str,
        outer_loss: Callable,
        space: Space,
        make: Make,
        *,
        num_trials: int,
        pruner: optuna.pruners.BasePruner | None = None,
        carry: PyTree = None,
        max_calls: int = 1,
        batch: int = 1,
        key: jax.Array | None = None,
        storage: Any = None,
        name: str = "search",
        run_dir: str | os.PathLike | None = None,
        save_every: int | datetime.timedelta = TEN_SECONDS,
        callbacks: Iterable[Callable[[TuneStep], Any]] = (),
        max_seconds: float | None = None,
        progress: bool = True,
        **unknown: Any,
    ):
        if unknown:
            raise TypeError(f"`{kind}` got unexpected arguments: {', '.join(unknown)}.")
        check_count("num_trials", num_trials)
        check_settings(num_trials, progress, 0.0, save_every, max_seconds, max_calls=max_calls, batch=batch)
        self.loss, _ = in_one_form(outer_loss, None)
        if (max_calls > 1 or carry is not None) and not takes_carry(outer_loss):
            given = f"`max_calls={max_calls}`" if max_calls > 1 else "a `carry`"
            raise JaxhpoError(
                f"`{kind}` got {given}, but every call of `outer_loss(hparams)` is the same: write {WITH_CARRY}, "
                "which trains on from the carry."
            )
        self.space, self.num_trials, self.max_calls, self.batch = space, num_trials, max_calls, batch
        self.key = jax.random.key(0) if key is None else check_key(key)
        self.carry = without_weak_types(jax.tree.map(jnp.asarray, check_arrays(carry, "carry")))
        self.save_every, self.callbacks, self.max_seconds = save_every, check_callbacks(callbacks), max_seconds
        self.progress, self.begun = progress, time.perf_counter()
        self.program, self.slots, self.called = jax.jit(self._together), list[Slot](), False
        traced, (value, _, info) = jax.make_jaxpr(self._one, return_shape=True)(
            space.hparams, self.carry, self.key, np.int32(0)
        )
        if any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(info)):
            raise JaxhpoError("`info` has a key, which a storage does not take: return `jax.random.key_data(key)`.")
        self.blank = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), {"value": value, "info": info})
        self.folder = None if run_dir is None else absolute(run_dir)
        self.sampler = Sampler(space, make, int(jax.random.bits(self.key, (), jnp.uint32)))
        if storage is None and self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise JaxhpoError(f"`run_dir` is no folder, nor can one be made: {error}.") from None
            storage = f"sqlite:///{self.folder / 'study.db'}"
        self.opened = storage is not None and not hasattr(storage, "create_new_study")
        self.storage: Any = open_storage(cast(str, storage)) if self.opened else storage
        with quiet():
            self.study = optuna.create_study(
                storage=self.storage,
                study_name=name,
                sampler=self.sampler,
                pruner=pruner or optuna.pruners.NopPruner(),
                load_if_exists=True,
            )
        self.identity = {
            "search": kind,
            "space": {name: str(d) for name, d in space.distributions.items()},
            "start": [digest(x) for x in jax.tree.leaves(space.hparams)],
            "key": digest(self.key),
            "max_calls": max_calls,
            "loss": loss_digests(traced) | {"carry": str([digest(x) for x in jax.tree.leaves(self.carry)])},
        }

    def _check_study(self) -> None:
        """Raises where the study is not one that this search began: its trials would be compared with others."""
        here, there = self.identity, self.study.user_attrs.get("jaxhpo")
        study = f"`storage` has a study {self.study.study_name!r}"
        if self.study.directions != [optuna.study.StudyDirection.MINIMIZE]:
            raise JaxhpoError(f"{study} that does not minimise one value: write another `name`.")
        if there is None:
            foreign = {name for t in self.study.get_trials(deepcopy=False) for name in t.params} - {
                *self.space.distributions
            }
            if foreign:
                raise JaxhpoError(
                    f"{study} of another program, with parameters {sorted(foreign)}: write another `name`."
                )
            self.study.set_user_attr("jaxhpo", here)
            return
        before, loss = there.get("loss", {}), here["loss"]
        words = {
            "search": f"of `{there['search']}`, where this is `{here['search']}`",
            "space": "with another space",
            "start": "with another start (`hparams`)",
            "key": "with another `key`",
            "max_calls": f"with max_calls={there.get('max_calls')}, where this has {here['max_calls']}",
        }
        other = [text for part, text in words.items() if there.get(part) != here[part]]
        if before.keys() == loss.keys() and before != loss:
            what, surely = changes(before, loss)
            what = what.replace(" (that of the checkpoint is taken)", "")
            if surely or before["carry"] != loss["carry"]:
                other.append(f"of which {what}")
            else:
                warn(f"{study} of which {what}.")
        if other:
            raise JaxhpoError(
                f"{study} {', '.join(other)}: their losses cannot be compared. Write another `name` (or `run_dir`), or "
                "what it began with."
            )

    # --- the program ---

    def _one(self, hparams, carry, key, call):
        value, after, info = self.loss(hparams, carry, jax.random.fold_in(key, call))
        check_carry(carry, after)
        return value, without_weak_types(after), info

    def _together(self, trials: list) -> list:
        if len(trials) == 1:
            return [self._one(*trials[0])]
        out = jax.vmap(self._one)(*jax.tree.map(lambda *x: jnp.stack(x), *trials))
        return [jax.tree.map(lambda x, i=i: x[i], out) for i in range(len(trials))]

    def _call(self) -> None:
        """Calls the outer loss once for each trial in hand; the program always has the same number of them."""
        # A process may have been killed between the last call and telling of it.
        slots = [slot for slot in self._ready() if slot.calls < self.max_calls]
        trials = [(slot.hparams, slot.carry, slot.key, np.int32(slot.calls)) for slot in slots]
        results = self.program(trials + trials[:1] * (self.batch - len(trials))) if trials else []
        self.called |= bool(trials)
        for slot, (value, carry, info) in zip(slots, results, strict=False):
            slot.carry, slot.calls = carry, slot.calls + 1
            slot.row = jax.device_get({"value": value, "info": info})
            if slot.folder is not None:
                slot.folder.append(slot.row)
                slot.save(self.save_every)

    # --- the loop ---

    def run(self) -> TuneResult:
        """Runs trials until all have ended."""
        try:
            self._check_study()
            return self._run()
        finally:
            if self.opened:
                close(self.storage)

    def _run(self) -> TuneResult:
        with contextlib.ExitStack() as stack:
            stack.enter_context(quiet())
            stack.enter_context(beating(self.storage, lambda: [slot.trial._trial_id for slot in self.slots]))
            preempted = stack.enter_context(noting(signal.SIGTERM, self.storage is not None))
            interrupted = stack.enter_context(noting(signal.SIGINT, True))
            bar = stack.enter_context(Progress(self.num_trials, "trial", self.progress))
            stack.callback(self._release)
            signalled = lambda: "preempted" if preempted() else "interrupted" if interrupted() else ""  # noqa: E731
            status, message = self._loop(signalled, bar)
            for slot in self.slots:
                slot.save()
        return self._result(status, message)

    def _loop(self, signalled, bar) -> tuple[str, str]:
        others, waits = Others(self.storage, self.study), False
        while not (status := signalled()):
            while len(self.slots) < self.batch and self._ask():
                pass
            spent = self.max_seconds is not None and time.perf_counter() - self.begun > self.max_seconds
            if spent and (self.called or not self.slots):  # the first call is made in any case, where there is one
                return "budget", f"{self.max_seconds} seconds are spent"
            for slot in self.slots:
                if slot.path is not None and slot.folder is None and not in_use(slot.path):
                    self._take_up(slot, slot.path)
            if ready := self._ready():
                self._call()
                if any([self._ended(slot, bar) for slot in ready]):
                    return "callback", "a callback stopped the search"
                waits = False
            elif self.slots or others.go_on():
                if not waits:
                    bar.note("waiting for trials of other processes; one that has died is given up after a minute")
                waits = True
                time.sleep(PAUSE)
            else:
                return "finished", ""
        return status, CAME[status]

    def _ask(self) -> bool:
        """Takes the next trial in hand; returns False where there is none at present."""
        optuna.storages.fail_stale_trials(self.study)
        if len(attempts(self.study)) >= self.num_trials and not any_waits(self.study):
            return False
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):  # took too long, and counts as dead
            return self._begun(self.study.ask())
        return True

    def _begun(self, trial: optuna.Trial) -> bool:
        """Takes a trial in hand; returns False where it is one too many."""
        if beats(self.storage):
            self.storage.record_heartbeat(trial._trial_id)
        frozen = self.study.get_trials(deepcopy=False)[trial.number]
        every, first = attempts(self.study), first_attempt(frozen)
        index = [*every].index(first)
        if index >= self.num_trials or every[first].number != trial.number:  # another process was faster
            trial.set_user_attr(EXCESS, True)
            self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            return False
        self.sampler.index = index
        distributions = self.space.distributions.items()
        params = {name: trial.suggest_float(name, d.low, d.high, log=d.log) for name, d in distributions}
        slot = Slot(
            trial=trial,
            index=index,
            key=jax.random.fold_in(self.key, index),
            hparams=self.space.tree(params),
            carry=self.carry,
            reported=frozenset(frozen.intermediate_values),
            path=None if self.folder is None or self.max_calls == 1 else self.folder / "trials" / str(index),
        )
        self.slots.append(slot)
        return True

    def _ready(self) -> list[Slot]:
        """The trials in hand but those whose folder is still held: by who was taken for dead, until he finds out."""
        return [slot for slot in self.slots if slot.path is None or slot.folder is not None]

    def _take_up(self, slot: Slot, path: pathlib.Path) -> None:
        """Opens the folder of a trial, and continues from what it holds."""
        if not any(path.glob("state-*")):  # of a process that was killed before its first checkpoint
            shutil.rmtree(path, ignore_errors=True)
        slot.folder = folder = RunDir(path)
        if folder.begun:
            tree, rows, _, _ = folder.resume(slot.tree(), self.blank, "run['fixed']")
            slot.carry, slot.calls, slot.row = jax.tree.map(jnp.asarray, tree["carry"]), len(rows), rows[-1]
        slot.saved = slot.calls, time.perf_counter()

    def _ended(self, slot: Slot, bar) -> bool:
        """Tells Optuna of the last call; lets a trial that has ended go. Returns whether a callback says stop."""
        state, value = self._told(slot)
        if state == TrialState.RUNNING:
            return False
        self.slots.remove(slot)
        if slot.folder is not None:
            slot.folder.close()
            if state is not None:
                shutil.rmtree(slot.folder.folder, ignore_errors=True)
        if state is None:
            return False
        complete = self.study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        best = min((t.value for t in complete if t.value is not None), default=np.inf)
        bar.update(f"loss {value:.4g}, best {best:.4g}")
        seconds = time.perf_counter() - self.begun
        step = TuneStep(slot.index, value, slot.hparams, np.nan, slot.row["info"], best, seconds)
        return any([callback(step) for callback in self.callbacks])

    def _told(self, slot: Slot) -> tuple[TrialState | None, float]:
        """Returns the state of a trial, of which Optuna is told, and its value; None where it is another process's."""
        trial, value, state = slot.trial, float(slot.row["value"]), TrialState.RUNNING
        try:
            if not np.isfinite(value):
                state = TrialState.FAIL
                trial.set_user_attr(PROBLEM, f"{value} at call {slot.calls}")
            elif slot.calls >= self.max_calls:
                state = TrialState.COMPLETE
            if self.max_calls > 1 and state != TrialState.FAIL:
                if slot.calls not in slot.reported:
                    trial.report(value, slot.calls)
                if state == TrialState.RUNNING and trial.should_prune():
                    state = TrialState.PRUNED
            if state != TrialState.RUNNING:
                trial.set_user_attr("last", json.loads(encode(slot.calls, slot.row)))
                self.study.tell(trial, value if state == TrialState.COMPLETE else None, state, skip_if_finished=True)
        except optuna.exceptions.UpdateFinishedTrialError:
            warn(f"trial {slot.index} gave no sign of life for too long, and another process has begun it again.")
            return None, value
        return state, value

    def _release(self) -> None:
        """Gives back the trials in hand, for whoever goes on."""
        for slot in self.slots:
            if slot.folder is not None:
                slot.folder.close()
            if self.storage is not None:
                self.study.tell(slot.trial, state=TrialState.FAIL, skip_if_finished=True)
                put_back(self.storage, self.study, slot.trial.number)

    # --- the result ---

    def _result(self, status: str, message: str) -> TuneResult:
        every = dict(enumerate(attempts(self.study).values()))
        trials = {i: t for i, t in every.items() if t.state.is_finished() and "last" in t.user_attrs}
        trees = [self.space.tree(t.params) for t in trials.values()]
        last = [t.user_attrs["last"] for t in trials.values()]
        rows = [decode(json.dumps(x), self.blank) for x in last]
        states = np.array([t.state.name.lower() for t in trials.values()], "<U8")
        values = np.array([row["value"] if np.isfinite(row["value"]) else np.nan for row in rows], float)
        spans = [(t.datetime_start, t.datetime_complete) for t in trials.values()]
        times = np.array(spans, "datetime64[us]").reshape(-1, 2).astype(np.int64) / 1e6
        history = {
            "value": values,
            "score": np.where(states == "complete", values, np.nan),
            "calls": np.array([x["step"] for x in last], int),
            "state": states,
            "seconds": times[:, 1] - times[:, 0].min(initial=np.inf),
            "hparams": _stacked(trees, self.space.hparams),
            "info": _stacked([row["info"] for row in rows], self.blank["info"]),
        }
        message = "; ".join(filter(None, [message, _counted(every, trials)]))
        scores = history["score"] if np.isfinite(history["score"]).any() else values
        final = trees[-1] if trees else self.space.hparams
        if not np.isfinite(scores).any():
            if trials:
                status = "not_finite"
                warn(f"no trial has a finite outer loss, so that none is the best: {message}.")
            return TuneResult(final, None, self.space.hparams, float("inf"), -1, history, status, message)
        best = int(np.nanargmin(scores))
        message = "; ".join(filter(None, [message, self.space.edges([*trials.values()][best].params)]))
        return TuneResult(final, None, trees[best], float(scores[best]), best, history, status, message)


def _counted(every: dict[int, FrozenTrial], ended: dict[int, FrozenTrial]) -> str:
    """Trials in words."""
    states = [t.state for t in ended.values()]
    text = f"{len(ended)} trials: {states.count(TrialState.COMPLETE)} complete"
    if TrialState.PRUNED in states:
        text += f", {states.count(TrialState.PRUNED)} stopped early"
    failed = [
        f"{i} ({t.user_attrs.get(PROBLEM, 'it did not end')})" for i, t in every.items() if t.state == TrialState.FAIL
    ]
    more = f" and {len(failed) - 3} more" * (len(failed) > 3)
    return text + f", {len(failed)} failed: {', '.join(failed[:3])}{more}" * bool(failed)


def _stacked(trees: list[PyTree], like: PyTree) -> PyTree:
    """Trees as one, with a leading axis."""
    if not trees:
        return jax.tree.map(lambda x: np.zeros((0, *x.shape), x.dtype), like)
    return jax.tree.map(lambda *x: np.stack(x), *trees)
