"""`jaxhpo demo`: about 5000 hyperparameters tuned by their gradient, compared with a grid and random search.

It prints a table and sentences, and writes `report.json` and a picture of two panels.
"""

import dataclasses
import importlib.metadata
import itertools
import json
import math
import pathlib
import platform
import sys
import textwrap
import time
from typing import Any

import jax
import numpy as np

import jaxhpo
from jaxhpo import plot
from jaxhpo._cli import demo_experiment
from jaxhpo._cli.demo_experiment import BASELINES, OURS, TUNED, Settings
from jaxhpo._core.progress import text_table, write

COLUMNS = {
    "test_loss": "loss as selected",
    "test_accuracy": "accuracy as selected",
    "refit_test_loss": "loss refitted",
    "refit_test_accuracy": "accuracy refitted",
}
HEADS = ("test loss", "test accuracy", "refitted loss", "refitted accuracy")  # of the same, in tables
COLORS = dict(
    zip(
        (*BASELINES, *TUNED),
        ("0.45", plot.GREEN, plot.VERMILION, plot.BLUE, plot.PURPLE, plot.SKY),
        strict=True,
    )
)


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
    _draw(report, results, scores, out / "demo.png")
    report["seconds"] = round(time.perf_counter() - began, 1)
    (out / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    write(render(report), sys.stdout)
    write(f"\nWritten: {out / 'report.json'}, {out / 'demo.png'}. Took {report['seconds']:.0f} s.", sys.stdout)


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
        "versions": {"jaxhpo": jaxhpo.__version__}
        | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax", "numpy")}
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
        "",
        *text_table("method", ["validation loss", *HEADS, "inner steps", "seconds"], map(_figures, report["methods"])),
        "refitted: after training on training and validation images together, with the same hyperparameters.",
        f"\nOne hypergradient counts as {ratio:.2f} trainings, by the arithmetic of the two programs ({by_time:.1f} by "
        "this machine's clock).",
        f"Seconds: all seeds together, without {cost['compile_seconds']:.1f} s of compilation.\n",
        *text_table(
            "hypergradient minus",
            HEADS,
            ((row["against"], [_mean_in_words(row, c, "+") for c in COLUMNS]) for row in report["paired_differences"]),
        ),
        "",
    ]
    for sentence in report["conclusions"]:
        lines += textwrap.wrap(f"- {sentence}", 112, subsequent_indent="  ")
    return "\n".join(lines)


def _figures(row: dict) -> tuple[str, list[str]]:
    """A line of the table of methods."""
    tested = [_mean_in_words(row, column) for column in COLUMNS]
    return row["name"], [_number(row["validation_loss"]), *tested, str(row["inner_steps"]), f"{row['seconds']:.1f}"]


# --- the picture ------------------------------------------------------------------------------------------------------


def _draw(report: dict, results: dict, scores: dict, path: pathlib.Path) -> None:
    """Draw the two panels into a file."""
    figure, ((left, right),) = plot.figure(1, 2, width=10.0, height=4.6)
    _accuracy(left, scores)
    _schedule(right, results, report["settings"])
    found = {row["name"]: row["test_accuracy_mean"] for row in report["methods"]}
    figure.suptitle(
        f"{report['num_hyperparameters']} hyperparameters by gradient: test accuracy {_number(found[OURS])}; "
        f"grid {_number(found['grid'])}, random {_number(found['random'])}\n"
        f"The searches take at least as many training steps. Mean and standard error of {len(report['seeds'])} seeds"
    )
    plot.save(figure, path)


def _accuracy(axis, scores) -> None:
    columns = {"as selected": "test_accuracy", "refitted on train + validation": "refit_test_accuracy"}
    series = {
        label: _mean_and_sem(np.stack([score[column] for score in scores.values()]), axis=1)
        for label, column in columns.items()
    }
    plot.dots(axis, list(scores), series, colors=[COLORS[name] for name in scores])
    axis.set(xlabel="test accuracy")
    axis.legend(**plot.LEGEND, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2)


def _schedule(axis, results, settings) -> None:
    steps = np.arange(settings["num_steps"])
    rates = jax.vmap(lambda knots: demo_experiment.learning_rate(knots, steps, settings["num_steps"]))
    for name in ("untuned", "grid", "random", OURS):
        mean, sem = _mean_and_sem(np.asarray(rates(results[name].best_hparams["log_rate"])), axis=0)
        plot.band(axis, steps + 1, mean, sem, label=name, color=COLORS[name])
        if name == OURS:
            ends = (f"{rate:.2g}" for rate in (mean[0], mean.max(), mean[-1]))
            axis.set_title("Rate found: {}, at most {}, {} at the end".format(*ends), fontsize=plot.TITLE)
    axis.set_ylim(0, 1.3 * axis.get_ylim()[1])  # room for the legend
    axis.set(xlabel="training step", ylabel="learning rate")
    axis.legend(**plot.LEGEND, loc="upper center", ncols=2)
