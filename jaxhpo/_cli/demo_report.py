"""The demo's figures: `report.json`, the printed table, and the sentences below it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import platform
import textwrap
from typing import Any

import jax
import numpy as np

from jaxhpo._cli import demo_experiment

OURS = "hypergradient"
BASELINES = ("untuned", "grid", "random")
ABLATIONS = ("penalties-only", "schedule-only")
COLUMNS = {
    "test_loss": "loss as selected",
    "test_accuracy": "accuracy as selected",
    "refit_test_loss": "loss refitted",
    "refit_test_accuracy": "accuracy refitted",
}


def make(settings, results: dict, scores: dict, cost: dict, num_hyperparameters: int) -> dict:
    """The report as plain numbers, lists and strings.

    Args:
      settings: the demo's `Settings`.
      results: name -> `TuneResult`.
      scores: name -> column -> (seeds,) test figures.
      cost: the cost of one hypergradient.
      num_hyperparameters: of one seed.

    Returns:
      The contents of `report.json`.
    """
    rows = [_row(name, results[name], scores[name], settings, cost) for name in results]
    differences = [_difference(name, scores) for name in results if name != OURS]
    return {
        "settings": dataclasses.asdict(settings),
        "seeds": list(range(settings.seed, settings.seed + settings.seeds)),
        "versions": {name: importlib.metadata.version(name) for name in ("jaxhpo", "jax", "jaxlib", "optax", "numpy")}
        | {"python": platform.python_version(), "backend": jax.default_backend()},
        "num_hyperparameters": num_hyperparameters,
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
        row |= _mean_and_sem(column, figures)
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


def _mean_and_sem(name: str, values) -> dict[str, Any]:
    values = np.asarray(values, np.float64)
    sem = np.std(values, ddof=1) / math.sqrt(len(values))
    return {f"{name}_mean": _plain(values.mean()), f"{name}_sem": _plain(sem)}


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
        difference |= _mean_and_sem(column, each)
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
                f"{d['against']} ({_difference_in_words(d, column)})"
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


def _difference_in_words(difference: dict, column: str) -> str:
    better = difference[f"{column}_seeds_better"]
    return f"{_mean_in_words(difference, column, '+')}, better in {better} of {difference['seeds']} seeds"


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
    sentences = []
    for row in rows:
        if row["name"] not in ("grid", "random"):
            continue
        for what, limits in (("penalty", demo_experiment.PENALTY_RANGE), ("rate", demo_experiment.RATE_RANGE)):
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
        "",
        f"Digits: {settings['train']} training and {settings['validation']} validation images, the rest test. "
        f"Mean ± standard error of {settings['seeds']} seeds.",
        f"{report['num_hyperparameters']} hyperparameters by gradient; grid and random have one penalty and one rate.",
        "",
        *_table(report["methods"]),
        "",
        f"One hypergradient counts as {ratio:.2f} trainings, by the arithmetic of the two programs ({by_time:.1f} by "
        "this machine's clock).",
        f"Seconds: all seeds together, without {cost['compile_seconds']:.1f} s of compilation.",
        "",
        *_comparison(report["paired_differences"]),
        "",
    ]
    for sentence in report["conclusions"]:
        lines += textwrap.wrap(f"- {sentence}", 112, subsequent_indent="  ")
    return "\n".join(lines)


def _table(rows: list[dict]) -> list[str]:
    rule = f"{'─' * 28}┼{'─' * 31}┼{'─' * 38}┼{'─' * 15}"
    lines = [
        f"{'':17}validation │{'test, as selected':^31}│{'test, refitted on train + validation':^38}│  inner",
        f"{'method':23}loss │{'loss':^15} {'accuracy':^15}│{'loss':^18} {'accuracy':^19}│  steps seconds",
        rule,
    ]
    for row in rows:
        if row["name"] == ABLATIONS[0]:
            lines.append(rule)
        loss, accuracy, refit_loss, refit_accuracy = (_mean_in_words(row, column) for column in COLUMNS)
        lines.append(
            f"{row['name']:16}{_number(row['validation_loss']):>11} │{loss:^15} {accuracy:^15}│"
            f"{refit_loss:^18} {refit_accuracy:^19}│{row['inner_steps']:>7}{row['seconds']:>8.1f}"
        )
    return lines


def _comparison(differences: list[dict]) -> list[str]:
    lines = [f"{'Hypergradient minus':20}" + "".join(f"{words:>24}" for words in COLUMNS.values())]
    for row in differences:
        lines.append(f"{row['against']:20}" + "".join(f"{_mean_in_words(row, c, '+'):>24}" for c in COLUMNS))
    return lines
