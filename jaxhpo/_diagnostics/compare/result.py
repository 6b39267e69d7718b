"""The result of a comparison of methods, as numbers and as text."""

import dataclasses
import json
import textwrap
from typing import Any, NamedTuple

from jaxhpo._core.cost import human_seconds

WIDTH = 118


class MethodRow(NamedTuple):
    """One method's row in a `Comparison`; None for what was not measured.

    Attributes:
      name: as the method was given, or as written in code.
      rule: the derivative rule itself, or the `gradient` of a pair.
      relative_error: ‖g − reference‖ / ‖reference‖; of a random method the root mean square over draws, and so of the
        leaves and the norm ratio; the cosine is their mean.
      cosine: of the angle between g and the reference.
      norm_ratio: ‖g‖ / ‖reference‖.
      leaf_errors: the relative error of every leaf of the hyperparameters, against an exact reference.
      gradients: time of a value and hypergradient together, in inner gradient steps.
      seconds: the same in seconds, the fastest of several calls.
      copies: peak temporary memory, in copies of the inner parameters.
      finite: whether every entry of g is finite.
      linear_status: how the iterative linear solves ended, the worst: `"converged"`, `"max iterations"`, `"stalled"`,
        `"indefinite"`, `"not finite"`.
      linear_residual: the largest relative residual among them.
      linear_iterations: the largest number of products.
      blind: leaves whose hypergradient is exactly zero, in whole or in part, because the method cannot see them.
      partly_blind: those of them of which it sees some entries, as a truncated rule the last rates of a schedule.
      error: the exception that the method raised, in which case nothing else was measured.
      notes: the method's faults on this problem, in words.
      predictivity: with `step`, the correlation of the change foretold by g with the real one, over finite steps.
      interval: 95 % confidence interval of `relative_error`; a point where neither draws nor directions are sampled.
      draws: hypergradients that were drawn, with other keys; 1 of what is not random.
      first_error: of a pair, the relative error of its first call; the other figures are of the last of several.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: (p - h) ** 2, optax.sgd(0.25))
      >>> def make_outer_loss(adjoint):
      ...     return lambda h: jaxhpo.solve(solver, solver.init(0.0, h), h, num_steps=3, adjoint=adjoint).params ** 2
      >>> rules = {"exact": jaxhpo.Unroll(), "last step": jaxhpo.Unroll(truncate=1)}
      >>> for row in jaxhpo.compare(make_outer_loss, 1.0, rules, repeats=1, progress=False).rows:
      ...     print(f"{row.name}: {row.relative_error:.3f}", *row.notes)  # dp/dh is 0.875, and 0.5 of the last step
      exact: 0.000
      last step: 0.429 The last 1 inner steps carry only part of the hypergradient.
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
    partly_blind: tuple[str, ...] = ()
    error: str | None = None
    notes: tuple[str, ...] = ()
    predictivity: float | None = None
    interval: tuple[float, float] | None = None
    draws: int = 1
    first_error: float | None = None

    @property
    def usable(self) -> bool:
        """True where the method gives a finite hypergradient that sees every leaf."""
        return self.error is None and bool(self.finite) and not self.blind and self.relative_error is not None

    @property
    def accurate(self) -> bool:
        """True where the hypergradient is as good as exact: relative error ≤ 1e-2 and cosine ≥ 0.999."""
        return self.usable and (self.relative_error or 0.0) <= 1e-2 and (self.cosine or 0.0) >= 0.999


class Reference(NamedTuple):
    """The hypergradient that the methods are compared with.

    Attributes:
      name: the exact rule, or `"tangents"`, or `"differences"`.
      text: one sentence: its kind, and how well it agrees with exact tangents, or with central differences.
      disagreement: relative error of the exact rule against these; None without an exact rule.
      differences_error: estimated relative error of these themselves, for a smooth outer loss.
      trusted: whether they contradict neither the reference nor themselves.
    """

    name: str
    text: str
    disagreement: float | None
    differences_error: float
    trusted: bool

    @property
    def is_directional(self) -> bool:
        """True for derivatives along directions, without an exact rule."""
        return self.name in ("tangents", "differences")


class ProblemSize(NamedTuple):
    """The size of the problem, measured in one run.

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
      rows: one `MethodRow` per method, in the order given.
      reference: the hypergradient that they are compared with.
      problem: the size of the problem.
      recommended: the name of the recommended method, or None where none is reliable.
      recommendation: the recommendation in plain words, with the reason.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: (p - h) ** 2, optax.sgd(0.25))
      >>> def make_outer_loss(adjoint):
      ...     return lambda h: jaxhpo.solve(solver, solver.init(0.0, h), h, num_steps=3, adjoint=adjoint).params ** 2
      >>> rules = {"exact": jaxhpo.Unroll(), "last step": jaxhpo.Unroll(truncate=1)}
      >>> comparison = jaxhpo.compare(make_outer_loss, 1.0, rules, repeats=1, progress=False)
      >>> comparison.recommended, comparison["last step"].accurate, comparison.problem.num_steps
      ('exact', False, 3)
    """

    rows: tuple[MethodRow, ...]
    reference: Reference
    problem: ProblemSize
    recommended: str | None
    recommendation: str

    def __getitem__(self, name: str) -> MethodRow:
        """The row of that name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r} is not one of {[row.name for row in self.rows]}")

    def __str__(self) -> str:
        """The table, the notes and the recommendation."""
        problem = self.problem
        head = (
            f"{problem.num_hparams} hyperparameters, {problem.num_params} parameters, {problem.num_steps} inner steps; "
            f"one inner step takes {human_seconds(problem.seconds / max(problem.num_steps, 1))}."
        )
        lines = [head, *_wrapped(f"Reference: {self.reference.text}"), "", *_table(self.rows), ""]
        notes = [line for row in self.rows if row.notes for line in _wrapped(f"- {row.name}: {' '.join(row.notes)}")]
        return "\n".join([*lines, *notes, *([""] if notes else []), *_wrapped(self.recommendation)])

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, strings, lists and dicts, ready for JSON; None for what is not finite."""
        fields = {
            "problem": self.problem._asdict(),
            "reference": self.reference._asdict(),
            "methods": [{**row._asdict(), "rule": repr(row.rule)} for row in self.rows],
            "recommended": self.recommended,
            "recommendation": self.recommendation,
        }
        return json.loads(json.dumps(fields), parse_constant=lambda not_finite: None)  # JSON has no NaN


def _table(rows) -> list[str]:
    width = min(max(len(row.name) for row in rows), 29)
    foretold = any(row.predictivity is not None for row in rows)
    sampled = any(row.interval is not None and row.interval[0] < row.interval[1] for row in rows)
    extra = "  foretells" * foretold
    between = "        interval" * sampled
    head = (
        f"{'method':{width}}  rel. error{between}   cosine  norm ratio{extra}  gradients   copies  finite  linear solve"
    )
    legend = "gradients: time of the hypergradient in inner steps; copies: its peak memory in copies of the parameters"
    more = ["interval: of the relative error, 95 %"] * sampled
    return [head, "-" * WIDTH, *(_line(row, width, sampled, foretold) for row in rows), legend, *more]


def _line(row: MethodRow, width: int, sampled: bool, foretold: bool) -> str:
    name = row.name if len(row.name) <= width else row.name[: width - 3] + "..."
    if row.error is not None:
        return f"{name:{width}}  raised: see below"
    low, high = row.interval or (0.0, 0.0)
    between = f"  {f'{low:.0e} to {high:.0e}' if high > low else '':>14}" * sampled
    extra = f"{_number(row.predictivity, '.2f'):>9}  " * foretold
    linear = f"{row.linear_status} {row.linear_iterations}, {_number(row.linear_residual, '.1e')}"
    return (
        f"{name:{width}}  {_number(row.relative_error, '.1e'):>10}{between}  {_number(row.cosine, '.4f'):>7}  "
        f"{_number(row.norm_ratio):>10}  {extra}{_number(row.gradients):>9}  {_number(row.copies):>7}  "
        f"{'yes' if row.finite else 'NO':>6}  {linear if row.linear_status else ''}"
    ).rstrip()


def _number(value: float | None, spec: str = "") -> str:
    """A number as `spec` has it, by default with three digits, or two where the exponent needs the room."""
    if not value:
        return "-" if value is None else "0"
    return format(value, spec or (".3g" if value < 1e4 else ".1e"))


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
