"""The demo's picture of four panels, drawn with `jaxhpo.plot`."""

from __future__ import annotations

import pathlib

import jax
import numpy as np

from jaxhpo import plot
from jaxhpo._cli import demo_experiment
from jaxhpo._cli.demo_report import ABLATIONS, BASELINES, OURS

NAMES = (*BASELINES, OURS, *ABLATIONS)
COLORS = dict(zip(NAMES, ("0.45", "tab:green", "tab:orange", "tab:blue", "tab:purple", "tab:brown"), strict=True))


def draw(report: dict, results: dict, scores: dict, tasks, path: pathlib.Path) -> None:
    """Draw the four panels into a file.

    Args:
      report: from `demo_report.make`.
      results: name -> `TuneResult`.
      scores: name -> column -> (seeds,) test figures.
      tasks: all repetitions, for the pixels that never vary.
      path: of the picture.
    """
    figure, axes = plot.figure(2, 2, width=12.5, height=9.5)
    _progress(axes[0, 0], results, report["cost"]["hypergradient_in_trainings"])
    _penalties(axes[0, 1], results[OURS], tasks, report["settings"])
    _schedule(axes[1, 0], results, report["settings"])
    _accuracy(axes[1, 1], scores)
    figure.suptitle(
        f"Digits: {report['num_hyperparameters']} hyperparameters by gradient, {len(report['seeds'])} seeds "
        "(bands and bars: ± 1 standard error)"
    )
    plot.save(figure, path)


def _mean_and_sem(values, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean over an axis of seeds, and its standard error."""
    return values.mean(axis=axis), values.std(axis=axis, ddof=1) / np.sqrt(values.shape[axis])


def _progress(axis, results, ratio) -> None:
    untuned = lowest = results["untuned"].history["value"].mean()
    axis.axhline(untuned, color=COLORS["untuned"], linestyle=":", label="untuned")
    for name in NAMES[1:]:
        values = results[name].history["value"]
        best = np.minimum.accumulate(np.where(np.isfinite(values), values, np.inf), axis=0)
        each = 1.0 if name in BASELINES else ratio
        mean, sem = _mean_and_sem(best, axis=1)
        style = {"color": COLORS[name], "linestyle": "--" if name in ABLATIONS else "-"}
        plot.band(axis, each * np.arange(1, len(best) + 1), mean, sem, label=name, **style)
        lowest = min(lowest, (mean - sem).min())
    axis.set_yscale("log")
    axis.set_ylim(0.85 * lowest, 1.5 * untuned)  # the first trials of a search can be far above
    plot.plain_log_ticks(axis.yaxis)
    axis.set(xlabel="cost, in trainings", ylabel="validation loss, best so far", title="Validation loss against cost")
    axis.legend(frameon=False, fontsize=9)


def _penalties(axis, result, tasks, settings) -> None:
    images = np.asarray(tasks.train.inputs)
    constant = images.std(axis=1) == 0
    weights = np.asarray(result.best_hparams["log_penalty"]["Dense_0"])
    factor = ((weights - np.log(settings["penalty"])) / np.log(2)).mean(axis=-1)
    varying = np.maximum((~constant).sum(axis=0), 1)
    mean = np.where(constant, 0.0, factor).sum(axis=0) / varying
    label = "log2 (learned / initial penalty)"
    plot.image(axis, mean.reshape(8, 8), mask=constant.all(axis=0).reshape(8, 8), center=0.0, label=label)
    axis.set_title("Learned penalties, first layer: mean of each pixel's weights")
    low, high = np.exp([weights.min(), weights.max()]) / settings["penalty"]
    axis.set_xlabel(f"single weights: from ×{low:.2f} to ×{high:.1f}; grey: pixels that never vary")


def _schedule(axis, results, settings) -> None:
    steps = np.arange(settings["num_steps"])
    rates = jax.vmap(lambda knots: demo_experiment.learning_rate(knots, steps, settings["num_steps"]))
    for name in (OURS, "random"):
        mean, sem = _mean_and_sem(np.asarray(rates(results[name].best_hparams["log_rate"])), axis=0)
        plot.band(axis, steps + 1, mean, sem, label=name, color=COLORS[name])
    axis.axhline(settings["rate"], color=COLORS["untuned"], linestyle=":", label="untuned")
    axis.set_ylim(0, 1.25 * axis.get_ylim()[1])  # room for the legend
    axis.set(xlabel="inner step", ylabel="learning rate", title="Learned schedule")
    axis.legend(frameon=False, fontsize=9, loc="upper center", ncols=3)


def _accuracy(axis, scores) -> None:
    columns = {"as selected": "test_accuracy", "refitted": "refit_test_accuracy"}
    series = {
        label: _mean_and_sem(np.stack([score[column] for score in scores.values()]), axis=1)
        for label, column in columns.items()
    }
    plot.bars(axis, list(scores), series)
    axis.set(xlabel="test accuracy (the axis does not start at zero)", title="Test accuracy")
    axis.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, -0.28), ncols=2)
