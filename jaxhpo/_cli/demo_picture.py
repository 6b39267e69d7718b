"""The demo's picture, four panels made of the pieces in `jaxhpo.plot`."""

from __future__ import annotations

import pathlib

import jax
import numpy as np

from jaxhpo import plot
from jaxhpo._cli import demo_experiment

COLORS = {
    "untuned": "0.45",
    "grid": "tab:green",
    "random": "tab:orange",
    "hypergradient": "tab:blue",
    "penalties-only": "tab:purple",
    "schedule-only": "tab:brown",
}


def draw(report: dict, searches: dict, scores: dict, problems, path: pathlib.Path) -> None:
    """Draws the four panels into `path`.

    Args:
      report: from `_report.make`.
      searches: name -> `Search`.
      scores: name -> `Scores`.
      problems: all repetitions, for the pixels that never vary.
      path: the picture.
    """
    figure, axes = plot.figure(2, 2, width=12.5, height=9.5)
    _progress(axes[0, 0], searches, report["cost"]["hypergradient_in_trainings"])
    _penalties(axes[0, 1], searches["hypergradient"], problems, report["settings"])
    _schedule(axes[1, 0], searches, report["settings"])
    _accuracy(axes[1, 1], scores)
    figure.suptitle(
        f"Digits: {report['num_hyperparameters']} hyperparameters by gradient, {len(report['seeds'])} seeds "
        "(bands and bars: ± 1 standard error)"
    )
    plot.save(figure, path)


def _progress(axis, searches, ratio) -> None:
    untuned = lowest = searches["untuned"].values[0].mean()
    for name, search in searches.items():
        each = ratio if search.best_point is None else 1.0
        best = np.minimum.accumulate(np.where(np.isfinite(search.values), search.values, np.inf), axis=0)
        cost = each * np.arange(1, len(best) + 1)
        if name == "untuned":
            axis.axhline(untuned, color=COLORS[name], linestyle=":", label=name)
            continue
        sem = best.std(axis=1, ddof=1) / np.sqrt(best.shape[1])
        dashed = "--" if name.endswith("-only") else "-"
        plot.band(axis, cost, best.mean(axis=1), sem, label=name, color=COLORS[name], linestyle=dashed)
        lowest = min(lowest, (best.mean(axis=1) - sem).min())
    axis.set_yscale("log")
    axis.set_ylim(0.85 * lowest, 1.5 * untuned)  # the first trials of a search can be far above
    plot.plain_log_ticks(axis.yaxis)
    axis.set_xlabel("cost, in trainings")
    axis.set_ylabel("validation loss, best so far")
    axis.set_title("Validation loss against cost")
    axis.legend(frameon=False, fontsize=9)


def _penalties(axis, search, problems, settings) -> None:
    images = np.asarray(problems.train.inputs)
    constant = images.std(axis=1) == 0
    weights = np.asarray(search.hparams["log_penalty"]["Dense_0"])
    factor = ((weights - np.log(settings["penalty"])) / np.log(2)).mean(axis=-1)
    seen = np.maximum((~constant).sum(axis=0), 1)
    mean = np.where(constant, 0.0, factor).sum(axis=0) / seen
    label = "log2 (learned / initial penalty)"
    plot.image(axis, mean.reshape(8, 8), mask=constant.all(axis=0).reshape(8, 8), center=0.0, label=label)
    axis.set_title("Learned penalties, first layer: mean of each pixel's weights")
    low, high = np.exp([weights.min(), weights.max()]) / settings["penalty"]
    axis.set_xlabel(f"single weights: from ×{low:.2f} to ×{high:.1f}; grey: pixels that never vary")


def _schedule(axis, searches, settings) -> None:
    steps = np.arange(settings["num_steps"])
    rates = jax.vmap(lambda knots: demo_experiment.learning_rate(knots, steps, settings["num_steps"]))
    for name in ("hypergradient", "random"):
        learned = np.asarray(rates(searches[name].hparams["log_rate"]))
        sem = learned.std(axis=0, ddof=1) / np.sqrt(len(learned))
        plot.band(axis, steps + 1, learned.mean(axis=0), sem, label=name, color=COLORS[name])
    axis.axhline(settings["rate"], color=COLORS["untuned"], linestyle=":", label="untuned")
    axis.set_ylim(0, 1.25 * axis.get_ylim()[1])  # room for the legend
    axis.set_xlabel("inner step")
    axis.set_ylabel("learning rate")
    axis.set_title("Learned schedule")
    axis.legend(frameon=False, fontsize=9, loc="upper center", ncols=3)


def _accuracy(axis, scores) -> None:
    series = {}
    for label, column in (("as selected", "test_accuracy"), ("refitted", "refit_test_accuracy")):
        values = np.stack([getattr(score, column) for score in scores.values()])
        series[label] = values.mean(axis=1), values.std(axis=1, ddof=1) / np.sqrt(values.shape[1])
    plot.bars(axis, list(scores), series)
    axis.set_xlabel("test accuracy (the axis does not start at zero)")
    axis.set_title("Test accuracy")
    axis.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, -0.28), ncols=2)
