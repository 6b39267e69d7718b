"""A trial of Optuna in which `tune` chooses the continuous hyperparameters."""

import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import optax
import optuna

import jaxhpo
from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.types import PyTree
from jaxhpo._core.validate import describe
from jaxhpo.search._storage import first_attempt, put_back


def tune_trial(
    trial: optuna.Trial,
    outer_loss: Callable | None,
    hparams: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    run_dir: str | os.PathLike,
    callbacks: Iterable[Callable] = (),
    **run: Any,
) -> jaxhpo.TuneResult:
    """Tunes what is continuous within a trial of Optuna, which chooses the rest: widths, activations, optimisers.

    Optuna is told the best loss after every outer step, and where its pruner says so, the run ends, and the trial is
    pruned. Where the trial is the retry of one that was killed, the run goes on from its checkpoint, with results equal
    to the bit. Ctrl-C and SIGTERM save the run and end the study, so that the storage, if it retries, retries the
    trial.

    **Cost and bias**: those of `tune`.

    Args:
      trial: what Optuna calls the objective with.
      outer_loss: as for `tune`, with what the trial suggests.
      hparams: the start.
      optimizer: any optax transformation.
      run_dir: a folder, in which each trial has one for its run, whose path is the trial's user attribute `run_dir`.
      callbacks: as for `tune`.
      **run: other arguments of `tune`: `num_steps`, `transforms`, `carry`, ...

    Returns:
      The result of `tune`, whose `best_value` the objective may return (with `population=`, its least).

    Raises:
      JaxhpoError: the study maximises; a second call in the trial has the `run_dir` of the first.
      optuna.TrialPruned: the pruner ended the run.
      NonFiniteError: the first step is not finite; `study.optimize(..., catch=jaxhpo.NonFiniteError)` goes on.

    Example:
      >>> import tempfile, optuna
      >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
      >>> folder = tempfile.mkdtemp()
      >>> def objective(trial):
      ...     power = trial.suggest_categorical("power", [2, 4])
      ...     loss = lambda h: jnp.abs(h - 3.0) ** power + power
      ...     run = jaxhpo.search.tune_trial(
      ...         trial, loss, 2.0, optax.adam(0.2), num_steps=30, run_dir=folder, progress=False
      ...     )
      ...     return run.best_value
      >>> study = optuna.create_study(sampler=optuna.samplers.GridSampler({"power": [2, 4]}))
      >>> study.optimize(objective, n_trials=2)
      >>> print(study.best_params, round(study.best_value, 1))
      {'power': 2} 2.0
      >>> print(jaxhpo.load(study.best_trial.user_attrs["run_dir"]).best_hparams.round(1))
      3.0

    References:
      Akiba, Sano, Yanase, Ohta, Koyama. Optuna: A Next-generation Hyperparameter Optimization Framework. 2019.
      arXiv:1907.10902
    """
    if not isinstance(trial, optuna.Trial):
        raise JaxhpoError(f"`trial` got {describe(trial)}: pass what `study.optimize` or `study.ask` gives.")
    if trial.study.directions != [optuna.study.StudyDirection.MINIMIZE]:
        raise JaxhpoError(
            "`tune_trial` minimises, and so must the study: `create_study()`, or negate what it maximises."
        )
    frozen = trial.study.get_trials(deepcopy=False)[trial.number]
    first, known, pruned = first_attempt(frozen), set(frozen.intermediate_values), []
    folder = pathlib.Path(run_dir).expanduser().absolute() / trial.study.study_name / str(first)
    here = {"run_dir": str(folder), "attempt": trial.number}
    if here.items() <= frozen.user_attrs.items():
        raise JaxhpoError(
            f"`tune_trial` was called twice in trial {trial.number} with `run_dir={os.fspath(run_dir)!r}`, where the "
            "first run lies: give each call a `run_dir` of its own, such as `runs/fold0` and `runs/fold1`."
        )
    for name, value in here.items():
        trial.set_user_attr(name, value)

    def told(step):
        best = float(np.min(step.best_value))  # of a population, of its best member
        if step.step not in known and math.isfinite(best):
            trial.report(best, step.step)
        if trial.should_prune():
            pruned.append(step.step)
        return bool(pruned)

    resume = "warn" if first == trial.number else "continue"
    try:
        result = jaxhpo.tune(
            outer_loss, hparams, optimizer, callbacks=[*callbacks, told], run_dir=folder, **{"resume": resume, **run}
        )
        if result.status == "interrupted":
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        put_back(trial.storage, trial.study, trial.number)
        raise
    if result.status == "preempted":
        trial.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        put_back(trial.storage, trial.study, trial.number)
        sys.exit(result.exit_code)
    if pruned:
        raise optuna.TrialPruned(f"after outer step {pruned[0]}")
    return result
