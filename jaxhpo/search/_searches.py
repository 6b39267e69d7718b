"""The searches: each is a sampler and a pruner of Optuna's kind."""

from collections.abc import Callable
from typing import Any

import optuna

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.types import PyTree
from jaxhpo._core.validate import check_choice, check_count
from jaxhpo._tune.tune import TuneResult
from jaxhpo.search import _samplers
from jaxhpo.search._space import Space
from jaxhpo.search._trials import Search

MOST_POINTS = 10**6  # of a grid


def random(
    outer_loss: Callable,
    hparams: PyTree,
    *,
    num_trials: int,
    low: PyTree,
    high: PyTree,
    transforms: PyTree = None,
    **trials: Any,
) -> TuneResult:
    r"""Random search, which every method must beat.

    A trial is the outer loss of `tune` at hyperparameters that stay the same. It is compiled once for all of them. What
    is said here of arguments and result holds for every search.

    **Cost and bias**: a training a trial, no derivative. The best of n trials is within about a part n^(−1/m) of the
    range, with m the hyperparameters that matter: the others cost nothing.

    Args:
      outer_loss: as for `tune`: `hparams -> scalar`, or `(hparams, carry, key) -> (scalar, carry, info)`.
      hparams: the start, in natural units; it is the first trial.
      num_trials: in all: of all processes, and of earlier calls on the same storage; those that fail count.
      low: the least hyperparameters, in natural units: a number for all, a tree like `hparams`, or a prefix of one.
      high: the largest ones.
      transforms: as for `tune`. The search is uniform in the logarithm under `positive`, in the hyperparameter where
        there is none, and in the unconstrained units of others.
      **trials: the rest.

        - `carry` (None): the carry of a trial's first call.
        - `max_calls` (1): calls of the outer loss in a trial, each with the carry of the one before, as of a training
          that each call continues. The last loss is the trial's.
        - `batch` (1): trials that are trained together by `vmap`. Where one ends, another takes its place.
        - `key` (`jax.random.key(0)`): call c of trial i gets `fold_in(fold_in(key, i), c)`.
        - `storage` (None, memory): an address as of `open_storage`, "sqlite:///study.db" on one machine,
          "postgresql+psycopg2://user@host/name" on several, or a storage of Optuna. Processes that make the same call
          share the trials, and Optuna's dashboard shows them. A trial whose process gives no sign of life for a minute
          is begun again by another one, up to five times. Each process returns when all trials have ended.
        - `name` (`"search"`): of the study in the storage. A study that another search began, or this one with another
          space, start, key, loss or data, is refused.
        - `run_dir` (None): a folder for the states of trials of several calls: one that is begun again goes on from
          there, with results equal to the bit. Where there is no `storage`, it holds that too (`study.db`), so that the
          same call goes on with a search.
        - `save_every` (10 seconds): calls, or a `datetime.timedelta`, between a trial's checkpoints.
        - `callbacks` (): each is called with a `TuneStep` when a trial has ended here; a true result ends the search.
        - `max_seconds` (None): the search ends after the calls in which they pass, one at least.
        - `progress` (True): as for `tune`.

    Returns:
      A `TuneResult`; Ctrl-C gives the one so far after the calls in progress, SIGTERM too where there is a storage.
      `best_hparams`, `best_value` and `best_step` are those of the best trial that is complete. `history` has one row a
      trial, in their order: `value` (NaN where the last loss is not finite: the trial failed), `score` (NaN also where
      it was stopped early), `calls`, `state` ("complete", "pruned", "fail"), `seconds` from the first start to its end,
      `hparams`, and the `info` of the last call. `message` counts trials, names those that failed, and says where the
      best lies at the edge of the space.

    Raises:
      JaxhpoError: an input that cannot work.

    Example:
      >>> def outer_loss(h): return (jnp.log10(h["penalty"]) + 3.0) ** 2 + (h["momentum"] - 0.5) ** 2
      >>> space = {
      ...     "low": {"penalty": 1e-6, "momentum": 0.0}, "high": {"penalty": 1.0, "momentum": 0.9},
      ...     "transforms": {"penalty": jaxhpo.positive, "momentum": None},
      ... }
      >>> start = {"penalty": 1e-2, "momentum": 0.0}
      >>> result = jaxhpo.search.random(outer_loss, start, num_trials=40, **space, batch=10, progress=False)
      >>> print(result.message, result.history["value"][0], result.best_value < 0.2)
      40 trials: 40 complete 1.25 True

    References:
      Bergstra, Bengio. Random Search for Hyper-Parameter Optimization. JMLR 13, 2012.
    """
    space = Space(hparams, low, high, transforms)
    make = _samplers.from_start(space, _samplers.random(space))
    return Search("random", outer_loss, space, make, num_trials=num_trials, **trials).run()


def grid(
    outer_loss: Callable,
    hparams: PyTree,
    *,
    resolution: int,
    low: PyTree,
    high: PyTree,
    transforms: PyTree = None,
    **trials: Any,
) -> TuneResult:
    """Grid search: all combinations of evenly spaced values, the last hyperparameter changing fastest.

    **Cost and bias**: a training a trial, of which there are `resolution` to the power of the number of
    hyperparameters, also of those that do not matter; no derivative.

    Args:
      outer_loss: as for `random`, as are the other arguments.
      hparams: of which the structure matters, the leaves in the order of `jax.tree.leaves`.
      resolution: values of each hyperparameter, of which `low` and `high` are the outermost.
      low: the least.
      high: the largest.
      transforms: the values are evenly spaced in the units of the search.
      **trials: as for `random`.

    Returns:
      As of `random`; `history["value"].reshape(2 * (resolution,))` is the plane of two hyperparameters.

    Raises:
      JaxhpoError: an input that cannot work.

    Example:
      >>> result = jaxhpo.search.grid(
      ...     lambda h: (jnp.log10(h) + 2.0) ** 2, 1.0, resolution=4, low=1e-3, high=1.0, transforms=jaxhpo.positive,
      ...     progress=False,
      ... )
      >>> print(result.history["hparams"].round(4), result.history["value"].round(2))
      [0.001 0.01  0.1   1.   ] [1. 0. 1. 4.]

    References:
      Bergstra, Bengio. Random Search for Hyper-Parameter Optimization. JMLR 13, 2012.
    """
    check_count("resolution", resolution, 2)
    space = Space(hparams, low, high, transforms)
    number = resolution ** len(space.distributions)
    if number > MOST_POINTS:
        raise JaxhpoError(
            f"`grid` of {resolution} values of each of {len(space.distributions)} hyperparameters has {number:.3g} "
            "trials: write a smaller `resolution`, or `random`, to which those that do not matter cost nothing."
        )
    return Search(
        f"grid(resolution={resolution})",
        outer_loss,
        space,
        _samplers.grid(space, resolution),
        num_trials=number,
        **trials,
    ).run()


def bayes(
    outer_loss: Callable,
    hparams: PyTree,
    *,
    num_trials: int,
    low: PyTree,
    high: PyTree,
    sampler: str = "tpe",
    transforms: PyTree = None,
    **trials: Any,
) -> TuneResult:
    """Bayesian optimisation: a model of the trials so far says where the next one lies, after ten random ones.

    **Cost and bias**: a training a trial, no derivative. To place one takes "tpe" milliseconds a hyperparameter, "gp",
    which is for few of them, some tenths of a second, and seconds of compilation where the number of trials passes 32,
    64, 128, ... Trials of one `batch` cannot learn from each other.

    Args:
      outer_loss: as for `random`, as are the other arguments.
      hparams: the start, which is the first trial.
      num_trials: in all.
      low: the least hyperparameters.
      high: the largest ones.
      sampler: "tpe", Optuna's tree-structured Parzen estimators, or "gp", a Gaussian process (tinygp) with a Matérn 5/2
        kernel, and the largest expected improvement.
      transforms: as for `random`.
      **trials: as for `random`.

    Returns:
      As of `random`.

    Raises:
      JaxhpoError: an input that cannot work, or tinygp is not installed.

    Example:
      >>> result = jaxhpo.search.bayes(
      ...     lambda h: jnp.sum((h - 0.3) ** 2), jnp.ones(2), num_trials=40, low=0.0, high=1.0, progress=False
      ... )
      >>> print(result.message, result.best_value < 0.1)
      40 trials: 40 complete True

    References:
      Bergstra, Bardenet, Bengio, Kégl. Algorithms for Hyper-Parameter Optimization. NeurIPS 2011.
      Snoek, Larochelle, Adams. Practical Bayesian Optimization of Machine Learning Algorithms. 2012. arXiv:1206.2944
    """
    check_choice("sampler", sampler, "tpe", "gp")
    space = Space(hparams, low, high, transforms)
    make = _samplers.from_start(space, {"tpe": _samplers.tpe, "gp": _samplers.gp}[sampler](space))
    return Search(f"bayes({sampler!r})", outer_loss, space, make, num_trials=num_trials, **trials).run()


def cmaes(
    outer_loss: Callable,
    hparams: PyTree,
    *,
    num_trials: int,
    low: PyTree,
    high: PyTree,
    transforms: PyTree = None,
    **trials: Any,
) -> TuneResult:
    """Covariance matrix adaptation: generations of trials, from a normal distribution that moves and learns its shape.

    **Cost and bias**: a training a trial, no derivative; hundreds of trials before the shape is known. Of more than a
    hundred hyperparameters only the variances are learned.

    Args:
      outer_loss: as for `random`, as are the other arguments.
      hparams: the start, which is the first trial; the distribution begins in the middle of the space.
      num_trials: in all.
      low: the least hyperparameters.
      high: the largest ones.
      transforms: as for `random`.
      **trials: as for `random`.

    Returns:
      As of `random`.

    Raises:
      JaxhpoError: an input that cannot work, or cmaes is not installed.

    Example:
      >>> result = jaxhpo.search.cmaes(
      ...     lambda h: jnp.sum((h - 0.3) ** 2), jnp.ones(4), num_trials=120, low=0.0, high=1.0, batch=8, progress=False
      ... )
      >>> print(result.message, result.best_value < 0.05)
      120 trials: 120 complete True

    References:
      Hansen. The CMA Evolution Strategy: A Tutorial. 2016. arXiv:1604.00772
    """
    space = Space(hparams, low, high, transforms)
    if len(space.distributions) < 2:
        raise JaxhpoError("`cmaes` adapts a covariance, but got one hyperparameter: write `bayes` or `random`.")
    make = _samplers.from_start(space, _samplers.cmaes(space))
    return Search("cmaes", outer_loss, space, make, num_trials=num_trials, **trials).run()


def hyperband(
    outer_loss: Callable,
    hparams: PyTree,
    *,
    num_trials: int,
    max_calls: int,
    low: PyTree,
    high: PyTree,
    reduction: int = 3,
    transforms: PyTree = None,
    **trials: Any,
) -> TuneResult:
    """Hyperband: random trials in brackets, each of which stops the worse ones earlier or later.

    In a bracket a trial goes on at 1, η, η², ... calls of the outer loss (the later brackets begin later) while it is
    among the best 1/η of those that came so far. What a call does is yours: usually to train on by some steps from its
    carry, and to return the validation loss.

    **Cost and bias**: for trials of R calls, log_η R + 1 brackets; most trials take few calls. A hyperparameter whose
    good values learn slowly is stopped wrongly, but in the last bracket, which stops none.

    Args:
      outer_loss: `(hparams, carry, key) -> (scalar, carry, info)`; as for `random`, as are the other arguments.
      hparams: the start, which is the first trial.
      num_trials: in all, of all brackets.
      max_calls: R, of a trial that is never stopped.
      low: the least hyperparameters.
      high: the largest ones.
      reduction: η.
      transforms: as for `random`.
      **trials: as for `random`; `carry` among them.

    Returns:
      As of `random`; `history["calls"]` are those that a trial took.

    Raises:
      JaxhpoError: an input that cannot work.

    Example:
      >>> def outer_loss(rate, w, key):  # one step of gradient descent more
      ...     w = w - rate * w
      ...     return w**2, w, None
      >>> result = jaxhpo.search.hyperband(
      ...     outer_loss, 0.1, carry=1.0, num_trials=30, max_calls=9, low=0.01, high=1.0, transforms=jaxhpo.positive,
      ...     batch=5, progress=False,
      ... )
      >>> print(sorted(set(result.history["calls"].tolist())), result.best_value < 1e-3)
      [1, 3, 9] True

    References:
      Li, Jamieson, DeSalvo, Rostamizadeh, Talwalkar. Hyperband. JMLR 18, 2018. arXiv:1603.06560
    """
    check_count("reduction", reduction, 2)
    pruner = optuna.pruners.HyperbandPruner(max_resource=max_calls, reduction_factor=reduction)
    return _stopped_early(
        f"hyperband(reduction={reduction})",
        pruner,
        outer_loss,
        hparams,
        low,
        high,
        transforms,
        max_calls=max_calls,
        num_trials=num_trials,
        **trials,
    )


def asha(
    outer_loss: Callable,
    hparams: PyTree,
    *,
    num_trials: int,
    max_calls: int,
    low: PyTree,
    high: PyTree,
    reduction: int = 3,
    transforms: PyTree = None,
    **trials: Any,
) -> TuneResult:
    """Asynchronous successive halving: the bracket of `hyperband` that stops earliest, and it alone.

    **Cost and bias**: of n trials about n / η go beyond the first call, n / η² beyond the η-th. Each is compared with
    those that came before, so that nobody waits; a hyperparameter whose good values learn slowly is stopped wrongly.

    Args:
      outer_loss: `(hparams, carry, key) -> (scalar, carry, info)`; as for `random`, as are the other arguments.
      hparams: the start, which is the first trial.
      num_trials: in all.
      max_calls: of a trial that is never stopped.
      low: the least hyperparameters.
      high: the largest ones.
      reduction: η.
      transforms: as for `random`.
      **trials: as for `random`; `carry` among them.

    Returns:
      As of `hyperband`.

    Raises:
      JaxhpoError: an input that cannot work.

    Example:
      >>> def outer_loss(rate, w, key):
      ...     w = w - rate * w
      ...     return w**2, w, None
      >>> result = jaxhpo.search.asha(
      ...     outer_loss, 0.1, carry=1.0, num_trials=30, max_calls=9, low=0.01, high=1.0, transforms=jaxhpo.positive,
      ...     progress=False,
      ... )
      >>> print(result.history["calls"].sum() < 30 * 9 / 2, result.best_value < 1e-3)
      True True

    References:
      Li, Jamieson, Rostamizadeh, Gonina, Hardt, Recht, Talwalkar. A System for Massively Parallel Hyperparameter
      Tuning. 2020. arXiv:1810.05934
    """
    check_count("reduction", reduction, 2)
    pruner = optuna.pruners.SuccessiveHalvingPruner(reduction_factor=reduction)
    return _stopped_early(
        f"asha(reduction={reduction})",
        pruner,
        outer_loss,
        hparams,
        low,
        high,
        transforms,
        max_calls=max_calls,
        num_trials=num_trials,
        **trials,
    )


def _stopped_early(kind, pruner, outer_loss, hparams, low, high, transforms, **trials) -> TuneResult:
    space = Space(hparams, low, high, transforms)
    make = _samplers.from_start(space, _samplers.random(space))
    return Search(kind, outer_loss, space, make, pruner=pruner, **trials).run()
