"""The demo's figures: `report.json`, the printed table, and the sentences under it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import pathlib
import platform
import textwrap
from typing import Any

import jax
import numpy as np
import optax

import jaxhpo
from jaxhpo._cli import demo_experiment

OURS = "hypergradient"
ABLATIONS = ("penalties-only", "schedule-only")
COLUMNS = ("test_loss", "test_accuracy", "refit_test_loss", "refit_test_accuracy")
IN_WORDS = {
    "test_loss": "test loss as selected",
    "test_accuracy": "test accuracy as selected",
    "refit_test_loss": "test loss refitted",
    "refit_test_accuracy": "test accuracy refitted",
}


def make(settings, searches: dict, scores: dict, cost: dict, trials: int, num_hyperparameters: int) -> dict:
    """The report as plain numbers, lists and strings.

    Args:
      settings: the demo's `Settings`.
      searches: name -> `Search`.
      scores: name -> `Scores`.
      cost: what one hypergradient costs.
      trials: trainings that random search was allowed.
      num_hyperparameters: of one seed.

    Returns:
      The contents of `report.json`.
    """
    rows = [_row(name, searches[name], scores[name], settings, cost) for name in searches]
    differences = [_difference(name, scores) for name in searches if name != OURS]
    return {
        "settings": dataclasses.asdict(settings),
        "seeds": list(range(settings.seed, settings.seed + settings.seeds)),
        "versions": {
            "jaxhpo": jaxhpo.__version__,
            "jax": jax.__version__,
            "jaxlib": importlib.metadata.version("jaxlib"),
            "optax": optax.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "backend": jax.default_backend(),
        },
        "num_hyperparameters": num_hyperparameters,
        "cost": cost | {"trials": trials},
        "methods": rows,
        "paired_differences": differences,
        "conclusions": conclusions(rows, differences) + _outliers(rows) + _edges(searches),
    }


def _row(name, search, scores, settings, cost) -> dict:
    by_gradient = search.best_point is None
    trainings = len(search.values) * (cost["hypergradient_in_trainings"] if by_gradient else 1)
    chosen = demo_experiment.best(search.values)
    found = search.values[chosen, np.arange(settings.seeds)]
    row = {"name": name} | _mean_and_sem("validation_loss", found)
    row["validation_loss"] = row.pop("validation_loss_mean")
    for column, values in scores._asdict().items():
        row |= _mean_and_sem(column, values)
    row |= {
        "inner_steps": round(trainings * settings.num_steps),
        "evaluations": len(search.values),
        "seconds": round(search.seconds, 3),
        "per_seed": {"validation_loss": _plain(found)} | {c: _plain(v) for c, v in scores._asdict().items()},
        "best_evaluation": (chosen + 1).tolist(),
    }
    if not by_gradient:
        row["penalty"], row["rate"] = (_plain(np.exp(search.best_point[:, i])) for i in (0, 1))
    return row


def _mean_and_sem(name: str, values) -> dict[str, Any]:
    values = np.asarray(values, np.float64)
    sem = np.std(values, ddof=1) / math.sqrt(len(values))
    return {f"{name}_mean": _plain(values.mean()), f"{name}_sem": _plain(sem)}


def _plain(value):
    """Python numbers; None for what is not finite, since JSON has no NaN."""
    if np.ndim(value):
        return [_plain(item) for item in value]
    return round(float(value), 6) if np.isfinite(value) else None


def _difference(name: str, scores: dict) -> dict:
    """Ours minus `name`, seed by seed: splits, initial weights and minibatches are shared, so their noise cancels."""
    seeds = len(scores[OURS].test_loss)
    difference: dict[str, Any] = {"method": OURS, "against": name, "seeds": seeds}
    for column in COLUMNS:
        each = getattr(scores[OURS], column) - getattr(scores[name], column)
        difference |= _mean_and_sem(column, each)
        difference[f"{column}_seeds_better"] = int(np.sum(each < 0 if column.endswith("loss") else each > 0))
    return difference


def verdict(column: str, mean: float | None, sem: float | None) -> str:
    """`better`, `worse`, or `no clear difference` within two standard errors."""
    if mean is None or sem is None or abs(mean) <= 2 * sem:
        return "no clear difference"
    return "better" if (mean < 0) == column.endswith("loss") else "worse"


def conclusions(rows: list[dict], differences: list[dict]) -> list[str]:
    """Sentences on where the hypergradient does not win, computed from the paired differences.

    Args:
      rows: the report's methods.
      differences: the report's paired differences.

    Returns:
      One sentence a list item.
    """
    ours = next(row for row in rows if row["name"] == OURS)
    sentences = []
    for found, text in (("worse", "is worse than"), ("no clear difference", "does not clearly differ from")):
        for column in COLUMNS:
            others = [
                f"{d['against']} ({_difference_in_words(d, column)})"
                for d in differences
                if verdict(column, d[f"{column}_mean"], d[f"{column}_sem"]) == found
            ]
            if others:
                sentences.append(f"In {IN_WORDS[column]} the hypergradient {text} {', '.join(others)}.")
    if not sentences:
        sentences.append("The hypergradient is better, by more than two standard errors, in every comparison.")
    reached = f"{_number(ours['validation_loss'])} there, and {_number(ours['test_loss_mean'])} on the test part"
    sentences.append(f"A validation loss that was minimised is no estimate: the hypergradient reaches {reached}.")
    return sentences


def _difference_in_words(difference: dict, column: str) -> str:
    mean, sem = (difference[f"{column}_{figure}"] for figure in ("mean", "sem"))
    better = difference[f"{column}_seeds_better"]
    return f"{_signed(mean)} ± {_number(sem)}, better in {better} of {difference['seeds']} seeds"


def _outliers(rows: list[dict]) -> list[str]:
    """Says where one seed carries a mean, so that a reader does not take it for the usual case."""
    losses = {row["name"]: [v for v in row["per_seed"]["refit_test_loss"] if v is not None] for row in rows}
    sentences = []
    for name, values in losses.items():
        if values and max(values) > 2 * np.median(values):
            worst, usual, ours = map(_number, (max(values), np.median(values), np.median(losses[OURS])))
            text = f"its worst seed has test loss {worst}, its median seed {usual} (the hypergradient's: {ours})"
            sentences.append(f"Refitted, {name} is unstable: {text}.")
    return sentences


def _edges(searches: dict) -> list[str]:
    """Says where a baseline's best point lies at the edge of its range, so that a wider range might help it."""
    limits = np.log([demo_experiment.PENALTY_RANGE, demo_experiment.RATE_RANGE])
    step = (limits[:, 1] - limits[:, 0]) / 40
    sentences = []
    for name in ("grid", "random"):
        point = searches[name].best_point
        at_edge = (point < limits[:, 0] + step) | (point > limits[:, 1] - step)
        for which, what in enumerate(("penalty", "rate")):
            seeds = int(at_edge[:, which].sum())
            if seeds:
                low, high = np.exp(limits[which])
                text = f"{name} chose a {what} at the edge of its range, {low:g} to {high:g}"
                sentences.append(f"In {seeds} of {len(point)} seeds {text}.")
    return sentences


# --- text -------------------------------------------------------------------------------------------------------------


def _number(value, digits: int = 3) -> str:
    return "  n/a" if value is None else f"{value:.{digits}f}"


def _signed(value) -> str:
    return "n/a" if value is None else f"{value:+.3f}"


def _pair(row, column) -> str:
    return f"{_number(row[f'{column}_mean'])} ± {_number(row[f'{column}_sem'])}"


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
        selected = f" {_pair(row, 'test_loss')}   {_pair(row, 'test_accuracy')} "
        refitted = f"{_pair(row, 'refit_test_loss'):^18} {_pair(row, 'refit_test_accuracy'):^19}"
        lines.append(
            f"{row['name']:16}{_number(row['validation_loss']):>11} │{selected:^31}│{refitted}│"
            f"{row['inner_steps']:>7}{row['seconds']:>8.1f}"
        )
    return lines


def _comparison(differences: list[dict]) -> list[str]:
    width = 24
    lines = [f"{'Hypergradient minus':20}" + "".join(f"{IN_WORDS[c].removeprefix('test '):>{width}}" for c in COLUMNS)]
    for row in differences:
        cells = "".join(f"{_signed(row[f'{c}_mean'])} ± {_number(row[f'{c}_sem'])}".rjust(width) for c in COLUMNS)
        lines.append(f"{row['against']:20}{cells}")
    return lines


def write(report: dict, path: pathlib.Path) -> None:
    """Writes strict JSON."""
    path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
