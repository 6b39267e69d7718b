"""Tests of scores by retraining: `lds`, over random parts left out, and `drop_curves`, over the highest ones."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.progress import EVERY, Progress, text_table
from jaxhpo._core.validate import check_count, check_switch, describe
from jaxhpo._diagnostics.attribution.attribution import Attribution
from jaxhpo._diagnostics.attribution.measured import DROPS, Measured


@dataclasses.dataclass(frozen=True)
class LDS:
    """Linear datamodeling scores of one or several attributions; prints as a table.

    Attributes:
      drops: (F,) the parts of the examples that were left out.
      correlations: by name, (F, m) the rank correlations of foretold and real measurements over retrainings.
      ceiling: (F, m) those of the retrainings with others of the same examples and other seeds; None without seeds.

    Example:
      >>> print(jaxhpo.LDS((0.1,), {"scores": np.array([[0.9, 1.0]])}))
      dropped           10 %
      ----------------------
      scores   0.950 ± 0.050
    """

    drops: tuple[float, ...]
    correlations: dict[str, np.ndarray]
    ceiling: np.ndarray | None = None

    def mean(self, name: str = "scores") -> np.ndarray:
        """The mean over measurements for each part left out, (F,); `name` is that of an attribution, or "ceiling"."""
        return self._rows()[name].mean(axis=1)

    def error(self, name: str = "scores") -> np.ndarray:
        """The standard error of that mean over measurements, (F,); NaN of a single one."""
        return _error(self._rows()[name])

    def _rows(self) -> dict[str, np.ndarray]:
        return self.correlations | ({} if self.ceiling is None else {"ceiling": self.ceiling})

    def __str__(self) -> str:
        """Means over measurements with their standard errors."""
        heads = [f"{100 * drop:.3g} %" for drop in self.drops]
        rows = [(name.replace("ceiling", "other seeds"), _with_errors(rows)) for name, rows in self._rows().items()]
        return "\n".join(text_table("dropped", heads, rows))


@dataclasses.dataclass(frozen=True)
class DropCurves:
    """Measurements after retraining without the examples of the highest or lowest scores; prints as a table.

    Attributes:
      drops: (F,) the parts of the examples that were left out.
      base: (m,) the measurements with all examples.
      highest: (F, m) each measurement, without the examples that score highest for it.
      lowest: (F, m) without those that score lowest for it.
      random: (F, m) without random ones, the mean over draws.

    Example:
      >>> curves = jaxhpo.DropCurves((0.1,), np.zeros(1), *np.array([[[-0.3]], [[0.2]], [[0.0]]]))
      >>> print(curves)
      changes without    10 %
      -----------------------
      highest scores   -0.300
      random           +0.000
      lowest scores    +0.200
    """

    drops: tuple[float, ...]
    base: np.ndarray
    highest: np.ndarray
    lowest: np.ndarray
    random: np.ndarray

    def __str__(self) -> str:
        """Mean changes over measurements, with their standard errors."""
        heads = [f"{100 * drop:.3g} %" for drop in self.drops]
        rows = (("highest scores", self.highest), ("random", self.random), ("lowest scores", self.lowest))
        lines = [(name, _with_errors(values - self.base, "+.3f")) for name, values in rows]
        return "\n".join(text_table("changes without", heads, lines))


def lds(
    train: Callable,
    measure: Callable,
    scores: Any,
    *,
    drops: Sequence[float] = (0.01, 0.05, 0.2),
    draws: int = 20,
    seeds: int = 1,
    ceiling: bool = True,
    key: jax.Array | None = None,
    batch_size: int | None = 8,
    progress: bool = True,
) -> LDS:
    """The linear datamodeling score: how well scores rank what retraining without random examples does.

    For each part it leaves out random examples, trains anew, and takes Spearman's correlation, over the draws, of each
    measurement with what `Attribution.predict` foretells. Its mean over measurements is the score. Several
    attributions, or those of other methods, are compared on the same retrainings.

    **Cost and bias**: draws · len(drops) · seeds trainings, twice as many with the ceiling. Over a fixed number of
    draws a correlation has a standard deviation of about (1 − ρ²)/√draws.

    Args:
      train: as for `attribution`.
      measure: as for `attribution`.
      scores: an `Attribution`, an array (m, n) of scores by any method, or a dict of such by name.
      drops: the parts of the examples that are left out, each in retrainings of its own.
      draws: random subsets for each part.
      seeds: trainings with keys of their own for each subset, of which the mean is taken; 1 takes `key` itself alone.
      ceiling: where `train` takes a key, also correlates these means with those of as many other keys: what a perfect
        foreteller of the effect that seeds share would reach, were it as noisy. The scores of one seed's own training
        can exceed it for that seed.
      key: as for `attribution`: the same key tests the scores of the training with that key, another one what other
        seeds share.
      batch_size: retrainings under one `vmap`; None takes all draws.
      progress: shows progress on stderr, where it takes longer than 5 s.

    Returns:
      An `LDS`; `print` it.

    Raises:
      NonFiniteError: a retraining is not finite.
      JaxhpoError: an invalid input.

    Example:
      >>> x, y = jax.random.normal(jax.random.key(0), (2, 50))
      >>> solver = jaxhpo.from_optax(lambda p, w, batch: jnp.mean(w * (p * x - y) ** 2), optax.sgd(0.1))
      >>> def train(w):
      ...     return jaxhpo.solve(solver, solver.init(0.0, w), w, num_steps=50, adjoint=jaxhpo.Unroll()).params
      >>> found = jaxhpo.attribution(train, lambda slope: slope, 50)
      >>> bool(jaxhpo.lds(train, lambda slope: slope, found, drops=[0.1]).mean() > 0.95)
      True

    References:
      Park, Georgiev, Ilyas, Leclerc, Madry. TRAK: Attributing Model Behavior at Scale. 2023. arXiv:2303.14186
    """
    given = {str(name): s for name, s in scores.items()} if isinstance(scores, Mapping) else {"scores": scores}
    named = {name: _checked(s, name) for name, s in given.items()}
    sizes = {s.scores.shape for s in named.values()}
    if len(sizes) != 1 or "ceiling" in named:
        raise JaxhpoError(
            f"`scores` got {sorted(named)} of shapes {sorted(sizes)}: give one shape, none named 'ceiling'."
        )
    measured = Measured(train, measure, next(iter(sizes))[1], key, batch_size)
    check_count("draws", draws, 3)
    check_count("seeds", seeds)
    check_switch("ceiling", ceiling)
    if seeds > 1 and not measured.takes_key:
        raise JaxhpoError(f"`seeds={seeds}` needs a training that takes a key: write it as `train(weights, key)`.")
    found, top = {name: [] for name in named}, []
    drops, ceiling = _parts(drops), ceiling and measured.takes_key
    with Progress(len(drops) * seeds * (1 + ceiling), "retraining", progress, delay=EVERY) as bar:
        for drop in drops:
            kept = measured.without(drop, draws, DROPS)
            trained = []
            for seed in range(seeds * (1 + ceiling)):
                trained.append(measured.retrain(kept, measured.seed(seed)))
                bar.update(f"{drop:.2g} dropped")
            _check_size(next(iter(named.values())), trained[0])
            real = np.mean(trained[:seeds], axis=0)
            for name, attributed in named.items():
                found[name].append(_rank_correlations(attributed.predict(kept), real))
            if ceiling:
                top.append(_rank_correlations(np.mean(trained[seeds:], axis=0), real))
    return LDS(drops, {name: np.array(rows) for name, rows in found.items()}, np.array(top) if ceiling else None)


def drop_curves(
    train: Callable,
    measure: Callable,
    scores: Any,
    *,
    drops: Sequence[float] = (0.02, 0.05, 0.1, 0.2, 0.4),
    draws: int = 8,
    key: jax.Array | None = None,
    batch_size: int | None = 8,
    progress: bool = True,
) -> DropCurves:
    """Retrains without the examples that score highest, or lowest, for each measurement, beside random ones.

    Without the highest a measurement should fall, without the lowest rise. Dropping the lowest 80 % is keeping the
    highest 20 %.

    **Cost and bias**: 1 + (2 m + draws) · len(drops) trainings. The sum of the largest scores is the prediction that
    leans on the largest errors: expect less than it foretells.

    Args:
      train: as for `attribution`.
      measure: as for `attribution`.
      scores: an `Attribution`, or an array (m, n) of scores by any method.
      drops: the parts of the examples that are left out.
      draws: random subsets for each part.
      key: as for `attribution`.
      batch_size: retrainings under one `vmap`; None takes all.
      progress: shows progress on stderr, where it takes longer than 5 s.

    Returns:
      A `DropCurves`; `print` it.

    Raises:
      NonFiniteError: a retraining is not finite.
      JaxhpoError: an invalid input.

    Example:
      >>> x, y = jax.random.normal(jax.random.key(0), (2, 50))
      >>> solver = jaxhpo.from_optax(lambda p, w, batch: jnp.mean(w * (p * x - y) ** 2), optax.sgd(0.1))
      >>> def train(w):
      ...     return jaxhpo.solve(solver, solver.init(0.0, w), w, num_steps=50, adjoint=jaxhpo.Unroll()).params
      >>> found = jaxhpo.attribution(train, lambda slope: slope, 50)
      >>> curves = jaxhpo.drop_curves(train, lambda slope: slope, found, drops=[0.1])
      >>> bool(curves.highest[0, 0] < curves.random[0, 0] < curves.lowest[0, 0])
      True
    """
    attributed = _checked(scores, "scores")
    measured = Measured(train, measure, attributed.scores.shape[1], key, batch_size)
    check_count("draws", draws)
    drops = _parts(drops)
    base = measured.retrain(np.asarray(measured.ones)[None], measured.key)[0]
    _check_size(attributed, base)
    ways = {"highest": [], "lowest": [], "random": []}
    with Progress(len(drops), "drop_curves", progress, delay=EVERY) as bar:
        for drop in drops:
            for way, rows in ways.items():
                if way == "random":
                    rows.append(measured.retrain(measured.without(drop, draws, DROPS), measured.key).mean(axis=0))
                    continue
                kept = np.ones_like(attributed.scores, measured.ones.dtype)
                np.put_along_axis(kept, attributed.top(measured.dropped(drop), lowest=way == "lowest"), 0, axis=1)
                rows.append(np.diagonal(measured.retrain(kept, measured.key)))
            bar.update(f"{drop:.2g} dropped")
    return DropCurves(drops, base, **{way: np.array(rows) for way, rows in ways.items()})


def _checked(scores: Any, name: str) -> Attribution:
    """Scores as an `Attribution`, if they are an array of numbers (m, n)."""
    if isinstance(scores, Attribution):
        return scores
    try:
        array = np.asarray(scores, float)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.ndim != 2 or not np.isfinite(array).all():
        raise JaxhpoError(
            f"`{name}` got {describe(scores)}: give an `Attribution`, or an array of finite numbers of shape (m, n), a "
            "row for each measurement and a column for each example."
        )
    return Attribution(array, np.zeros(len(array)))


def _check_size(attributed: Attribution, measurements: np.ndarray) -> None:
    if (m := len(attributed.scores)) != measurements.shape[-1]:
        raise JaxhpoError(
            f"`scores` has {m} rows, but `measure` returns {measurements.shape[-1]} numbers: give a row to each."
        )


def _parts(drops: Any) -> tuple[float, ...]:
    if isinstance(drops, str) or not isinstance(drops, Sequence | np.ndarray) or not len(drops):
        raise JaxhpoError(f"`drops` got {describe(drops)}: write a list of parts of the examples, such as [0.01, 0.2].")
    return tuple(map(float, drops))


def _rank_correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's correlation of each column of a with that of b; 0 where one of them is constant."""
    a, b = (np.apply_along_axis(_ranks, 0, x) - (len(x) - 1) / 2 for x in (a, b))
    scale = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return (a * b).sum(0) / np.where(scale, scale, 1)


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 0 on; of equal numbers the mean of theirs."""
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[place]


def _error(rows: np.ndarray) -> np.ndarray:
    m = rows.shape[1]
    return rows.std(axis=1, ddof=1) / m**0.5 if m > 1 else np.full(len(rows), np.nan)


def _with_errors(rows: np.ndarray, form: str = ".3f") -> list[str]:
    pairs = zip(rows.mean(axis=1), _error(rows), strict=True)
    return [f"{mean:{form}}" + f" ± {error:.3f}" * bool(np.isfinite(error)) for mean, error in pairs]
