"""`jaxhpo demo`: about 5000 hyperparameters tuned by their gradient, compared with a grid and random search.

It prints a table and sentences, and writes `report.json` and a picture of four panels.
"""

import dataclasses
import importlib.metadata
import itertools
import json
import math
import pathlib
import platform
import textwrap
import time
from typing import Any

import jax
import numpy as np

from jaxhpo import plot
from jaxhpo._cli import demo_experiment
from jaxhpo._cli.demo_experiment import BASELINES, OURS, TUNED, Settings

COLUMNS = {
    "test_loss": "loss as selected",
    "test_accuracy": "accuracy as selected",
    "refit_test_loss": "loss refitted",
    "refit_test_accuracy": "accuracy refitted",
}
NAMES = (*BASELINES, *TUNED)
COLORS = dict(zip(NAMES, ("0.45", "tab:green", "tab:orange", "tab:blue", "tab:purple", "tab:brown"), strict=True))


def run(settings: Settings, out: pathlib.Path) -> None:
    """Run every method, print the table, and write `report.json` and `demo.png`.

    Args:
      settings: of the demo.
      out: an existing folder.

    Raises:
      ImportError: without scikit-learn or matplotlib, before anything is trained.
    """
    began = time.perf_counter()
    plot.figure()  # raises now, not after the training, if matplotlib is missing
    tasks, test = demo_experiment.make_tasks(settings)
    results, cost = demo_experiment.search(tasks, settings)
    selected = {name: result.best_hparams for name, result in results.items()}
    scores = demo_experiment.score(selected, tasks, test, settings.momentum)
    report = _report(settings, results, scores, cost)
    print(render(report), flush=True)
    _draw(report, results, scores, tasks, out / "demo.png")
    report["seconds"] = round(time.perf_counter() - began, 1)
    (out / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(f"\nWritten: {out / 'report.json'}, {out / 'demo.png'}. Took {report['seconds']:.0f} s.")


# --- report.json ------------------------------------------------------------------------------------------------------


def _report(settings: Settings, results: dict, scores: dict, cost: dict) -> dict:
    """The report as plain numbers, lists and strings.

    Args:
      settings: of the demo.
      results: name -> `TuneResult`.
      scores: name -> column -> (seeds,) test figures.
      cost: the cost of one hypergradient.
    """
    rows = [_row(name, results[name], scores[name], settings, cost) for name in results]
    differences = [_difference(name, scores) for name in results if name != OURS]
    return {
        "settings": dataclasses.asdict(settings),
        "seeds": list(range(settings.seed, settings.seed + settings.seeds)),
        "versions": {name: importlib.metadata.version(name) for name in ("jaxhpo", "jax", "jaxlib", "optax", "numpy")}
        | {"python": platform.python_version(), "backend": jax.default_backend()},
        "num_hyperparameters": sum(leaf[0].size for leaf in jax.tree.leaves(results[OURS].best_hparams)),
        "cost": cost,
        "methods": rows,
        "paired_differences": differences,
        "conclusions": conclusions(rows, differences) + _outliers(rows) + _edges(rows),
    }


def _row(name, result, scores, settings, cost) -> dict:
    values = result.history["value"]
    best = demo_experiment.best_steps(values)
    per_seed = {"validation_loss": values[best, np.arange(settings.seeds)]} | {c: scores[c] for c in COLUMNS}
    row = {"name": name}
    for column, figures in per_seed.items():
        row |= _summary(column, figures)
    row["validation_loss"] = row.pop("validation_loss_mean")
    trainings = len(values) * (1 if name in BASELINES else cost["hypergradient_in_trainings"])
    row |= {
        "inner_steps": round(trainings * settings.num_steps),
        "evaluations": len(values),
        "seconds": round(demo_experiment.time_of(result)[0], 3),
        "per_seed": {column: _plain(figures) for column, figures in per_seed.items()},
        "best_evaluation": (best + 1).tolist(),
    }
    if name in BASELINES:  # all penalties of a seed are equal, and all knots
        hparams = result.best_hparams
        row["penalty"] = _plain(np.exp(hparams["log_penalty"]["Dense_0"][:, 0, 0]))
        row["rate"] = _plain(np.exp(hparams["log_rate"][:, 0]))
    return row


def _summary(column: str, values) -> dict[str, Any]:
    mean, sem = _mean_and_sem(values)
    return {f"{column}_mean": _plain(mean), f"{column}_sem": _plain(sem)}


def _mean_and_sem(values, axis: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Mean over an axis of seeds, and its standard error."""
    values = np.asarray(values, np.float64)
    return values.mean(axis), values.std(axis, ddof=1) / math.sqrt(values.shape[axis])


def _plain(value):
    """Python numbers; None for those that are not finite, as JSON has no NaN."""
    if np.ndim(value):
        return [_plain(item) for item in value]
    return round(float(value), 6) if np.isfinite(value) else None


def _difference(name: str, scores: dict) -> dict:
    """The hypergradient's scores minus those of `name`, seed by seed.

    Splits, initial weights and minibatches are shared, so their noise cancels.
    """
    difference: dict[str, Any] = {"method": OURS, "against": name, "seeds": len(scores[OURS]["test_loss"])}
    for column in COLUMNS:
        each = scores[OURS][column] - scores[name][column]
        difference |= _summary(column, each)
        difference[f"{column}_seeds_better"] = int(np.sum(each < 0 if column.endswith("loss") else each > 0))
    return difference


# --- sentences --------------------------------------------------------------------------------------------------------


def verdict(column: str, mean: float | None, sem: float | None) -> str:
    """`better`, `worse`, or `no clear difference` within two standard errors."""
    if mean is None or sem is None or abs(mean) <= 2 * sem:
        return "no clear difference"
    return "better" if (mean < 0) == column.endswith("loss") else "worse"


def conclusions(rows: list[dict], differences: list[dict]) -> list[str]:
    """Sentences on the comparisons that the hypergradient does not win, from the paired differences.

    Args:
      rows: the report's methods.
      differences: the report's paired differences.

    Returns:
      One sentence per list item.
    """
    sentences = []
    for found, text in (("worse", "is worse than"), ("no clear difference", "does not clearly differ from")):
        for column in COLUMNS:
            others = [
                f"{d['against']} ({_mean_in_words(d, column, '+')}, "
                f"better in {d[f'{column}_seeds_better']} of {d['seeds']} seeds)"
                for d in differences
                if verdict(column, d[f"{column}_mean"], d[f"{column}_sem"]) == found
            ]
            if others:
                sentences.append(f"In test {COLUMNS[column]} the hypergradient {text} {', '.join(others)}.")
    if not sentences:
        sentences.append("The hypergradient is better, by more than two standard errors, in every comparison.")
    ours = next(row for row in rows if row["name"] == OURS)
    reached = f"{_number(ours['validation_loss'])} there, and {_number(ours['test_loss_mean'])} on the test part"
    return [*sentences, f"A minimised validation loss is not an estimate: the hypergradient reaches {reached}."]


def _outliers(rows: list[dict]) -> list[str]:
    """Sentences on means that are dominated by one seed."""
    losses = {row["name"]: [v for v in row["per_seed"]["refit_test_loss"] if v is not None] for row in rows}
    sentences = []
    for name, values in losses.items():
        if values and max(values) > 2 * np.median(values):
            worst, usual, ours = map(_number, (max(values), np.median(values), np.median(losses[OURS])))
            text = f"its worst seed has test loss {worst}, its median seed {usual} (the hypergradient's: {ours})"
            sentences.append(f"Refitted, {name} is unstable: {text}.")
    return sentences


def _edges(rows: list[dict]) -> list[str]:
    """Sentences on best points at the edge of a search's range, where a wider range might help it."""
    sentences, searches = [], [row for row in rows if row["name"] in ("grid", "random")]
    for row, (what, limits) in itertools.product(searches, demo_experiment.RANGES.items()):
        low, high = np.log(limits)
        # within a fortieth of the range, in logarithms
        edge = np.abs(np.log(row[what]) - (low + high) / 2) > (high - low) * (1 / 2 - 1 / 40)
        if edge.any():
            text = f"{row['name']} chose a {what} at the edge of its range, {limits[0]:g} to {limits[1]:g}"
            sentences.append(f"In {edge.sum()} of {len(edge)} seeds {text}.")
    return sentences


# --- text -------------------------------------------------------------------------------------------------------------


def _number(value, sign: str = "") -> str:
    return "n/a" if value is None else f"{value:{sign}.3f}"


def _mean_in_words(row: dict, column: str, sign: str = "") -> str:
    return f"{_number(row[f'{column}_mean'], sign)} ± {_number(row[f'{column}_sem'])}"


def render(report: dict) -> str:
    """The table and the sentences, as text of at most 120 columns."""
    settings, cost = report["settings"], report["cost"]
    ratio, by_time = cost["hypergradient_in_trainings"], cost["hypergradient_in_trainings_by_time"]
    lines = [
        f"\nDigits: {settings['train']} training and {settings['validation']} validation images, the rest test. "
        f"Mean ± standard error of {settings['seeds']} seeds.",
        f"{report['num_hyperparameters']} hyperparameters by gradient; grid and random have one penalty and one rate.",
        *_table(report["methods"]),
        f"\nOne hypergradient counts as {ratio:.2f} trainings, by the arithmetic of the two programs ({by_time:.1f} by "
        "this machine's clock).",
        f"Seconds: all seeds together, without {cost['compile_seconds']:.1f} s of compilation.\n",
        f"{'Hypergradient minus':20}" + "".join(f"{words:>24}" for words in COLUMNS.values()),
    ]
    for row in report["paired_differences"]:
        lines.append(f"{row['against']:20}" + "".join(f"{_mean_in_words(row, c, '+'):>24}" for c in COLUMNS))
    lines.append("")
    for sentence in report["conclusions"]:
        lines += textwrap.wrap(f"- {sentence}", 112, subsequent_indent="  ")
    return "\n".join(lines)


def _table(rows: list[dict]) -> list[str]:
    rule = f"{'─' * 28}┼{'─' * 31}┼{'─' * 38}┼{'─' * 15}"
    lines = [
        f"\n{'':17}validation │{'test, as selected':^31}│{'test, refitted on train + validation':^38}│  inner",
        f"{'method':23}loss │{'loss':^15} {'accuracy':^15}│{'loss':^18} {'accuracy':^19}│  steps seconds",
        rule,
    ]
    for row in rows:
        if row["name"] == "penalties-only":
            lines.append(rule)
        loss, accuracy, refit_loss, refit_accuracy = (_mean_in_words(row, column) for column in COLUMNS)
        lines.append(
            f"{row['name']:16}{_number(row['validation_loss']):>11} │{loss:^15} {accuracy:^15}│"
            f"{refit_loss:^18} {refit_accuracy:^19}│{row['inner_steps']:>7}{row['seconds']:>8.1f}"
        )
    return lines


# --- the picture ------------------------------------------------------------------------------------------------------


def _draw(report: dict, results: dict, scores: dict, tasks, path: pathlib.Path) -> None:
    """Draw the four panels into a file."""
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


def _progress(axis, results, ratio) -> None:
    untuned = lowest = results["untuned"].history["value"].mean()
    axis.axhline(untuned, color=COLORS["untuned"], linestyle=":", label="untuned")
    for name in NAMES[1:]:
        values = results[name].history["value"]
        best = np.minimum.accumulate(np.where(np.isfinite(values), values, np.inf), axis=0)
        each = 1.0 if name in BASELINES else ratio
        mean, sem = _mean_and_sem(best, axis=1)
        style = {"color": COLORS[name], "linestyle": "-" if name in (*BASELINES, OURS) else "--"}
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
