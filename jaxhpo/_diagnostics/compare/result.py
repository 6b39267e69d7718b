"""What a comparison of methods finds, as numbers and as text."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from typing import Any, NamedTuple

WIDTH = 118


class MethodRow(NamedTuple):
    """One method's line in a `Comparison`. What was not measured is None.

    Attributes:
      name: as the method was given, or as one would write it.
      rule: the derivative rule itself.
      relative_error: ‖g − reference‖ / ‖reference‖.
      cosine: of the angle between g and the reference.
      norm_ratio: ‖g‖ / ‖reference‖.
      leaf_errors: the relative error of every leaf of the hyperparameters, against an exact reference.
      gradients: time of a value and hypergradient together, in inner gradient steps.
      seconds: the same in seconds, the fastest of several calls.
      copies: peak temporary memory, in copies of the inner parameters.
      finite: whether every entry of g is finite.
      linear_status: how the iterative linear solves ended, the worst: `"converged"`, `"max iterations"`,
        `"indefinite"`, `"not finite"`.
      linear_residual: the largest relative residual among them.
      linear_iterations: the largest number of products.
      blind: leaves whose hypergradient is exactly zero, in whole or in part, because the method cannot see them.
      error: what the method raised, in which case nothing else was measured.
      notes: what is wrong with it on this problem, in words.
    """

    name: str
    rule: Any
    relative_error: float | None = None
    cosine: float | None = None
    norm_ratio: float | None = None
    leaf_errors: dict[str, float] | None = None
    gradients: float | None = None
    seconds: float | None = None
    copies: float | None = None
    finite: bool | None = None
    linear_status: str | None = None
    linear_residual: float | None = None
    linear_iterations: int | None = None
    blind: tuple[str, ...] = ()
    error: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether it gives a finite hypergradient that sees every leaf."""
        return self.error is None and bool(self.finite) and not self.blind and self.relative_error is not None

    @property
    def accurate(self) -> bool:
        """Whether it can be taken for the exact hypergradient: relative error ≤ 1e-2 and cosine ≥ 0.999."""
        return self.usable and (self.relative_error or 0.0) <= 1e-2 and (self.cosine or 0.0) >= 0.999


class Reference(NamedTuple):
    """What the methods are measured against.

    Attributes:
      name: the exact rule, or `"differences"`.
      text: one sentence: what it is, and how well it agrees with central differences.
      disagreement: relative error of the exact rule against central differences; None without an exact rule.
      differences_error: estimated relative error of the differences themselves, for a smooth outer loss.
      trusted: whether the differences contradict neither the reference nor themselves.
    """

    name: str
    text: str
    disagreement: float | None
    differences_error: float
    trusted: bool


class Problem(NamedTuple):
    """The size of the problem, as met while running it once.

    Attributes:
      num_hparams: hyperparameters.
      num_params: numbers in the parameters θ of the (largest) inner problem.
      num_steps: inner steps of one outer loss, all inner solves together.
      start: norm of the inner condition (the gradient of the train loss) where the inner run starts.
      end: the same where it ends.
      seconds: of one outer loss without derivative.
    """

    num_hparams: int
    num_params: int
    num_steps: int
    start: float
    end: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Methods measured on one problem; prints as a table that ends with a recommendation.

    Attributes:
      rows: one `MethodRow` a method, in the order given.
      reference: what they are measured against.
      problem: the size of the problem.
      recommended: the name of the method to take, or None where none can be trusted.
      recommendation: the same in plain words, with the reason.
    """

    rows: tuple[MethodRow, ...]
    reference: Reference
    problem: Problem
    recommended: str | None
    recommendation: str

    def __getitem__(self, name: str) -> MethodRow:
        """The row of that name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r} is none of {[row.name for row in self.rows]}")

    def __str__(self) -> str:
        """The table, the notes and the recommendation."""
        problem = self.problem
        unit = problem.seconds / max(problem.num_steps, 1)
        head = (
            f"{problem.num_hparams} hyperparameters, {problem.num_params} parameters, {problem.num_steps} inner steps; "
            f"one inner step takes {_seconds(unit)}."
        )
        lines = [head, *_wrapped(f"Reference: {self.reference.text}"), "", *_table(self.rows), ""]
        noted = [f"{row.name}: {' '.join(row.notes)}" for row in self.rows if row.notes]
        for note in noted:
            lines += _wrapped(f"- {note}")
        return "\n".join([*lines, *([""] if noted else []), *_wrapped(self.recommendation)])

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, strings, lists and dicts, ready for JSON; None for what is not finite."""
        rows = [{**row._asdict(), "rule": repr(row.rule)} for row in self.rows]
        return {
            "problem": _plain(self.problem._asdict()),
            "reference": _plain(self.reference._asdict()),
            "methods": _plain(rows),
            "recommended": self.recommended,
            "recommendation": self.recommendation,
        }


def _table(rows) -> list[str]:
    width = min(max(len(row.name) for row in rows), 29)
    head = f"{'method':{width}}  rel. error   cosine  norm ratio  gradients   copies  finite  linear solve"
    legend = (
        "gradients: time of the hypergradient, in inner steps; copies: its peak memory, in copies of the parameters"
    )
    return [head, "─" * WIDTH, *(_line(row, width) for row in rows), legend]


def _line(row: MethodRow, width: int) -> str:
    name = row.name if len(row.name) <= width else row.name[: width - 1] + "…"
    if row.error is not None:
        return f"{name:{width}}  raised: see below"
    return (
        f"{name:{width}}  {_error(row.relative_error):>10}  {_fixed(row.cosine, 4):>7}  {_short(row.norm_ratio):>10}  "
        f"{_short(row.gradients):>9}  {_short(row.copies):>7}  {'yes' if row.finite else 'NO':>6}  {_linear(row)}"
    ).rstrip()


def _linear(row: MethodRow) -> str:
    if row.linear_status is None:
        return ""
    return f"{row.linear_status} {row.linear_iterations}, {_error(row.linear_residual)}"


def _error(value) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"


def _fixed(value, digits) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _short(value) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 1e4 or not math.isfinite(value) else f"{value:.1e}"


def _seconds(value: float) -> str:
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _plain(value):
    """Python numbers, strings, lists and dicts; None for what is not finite, since JSON has no NaN."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
