"""The result of a check, as numbers and as text."""

import dataclasses

import numpy as np

from jaxhpo._core.types import LinearStatus
from jaxhpo._diagnostics.differences import DIFFERENCES
from jaxhpo._diagnostics.predictivity import Predictivity

AGREES = 3e-3  # a relative error up to which a hypergradient is called right: below that of products in bfloat16


@dataclasses.dataclass(frozen=True)
class HypergradientCheck:
    """A hypergradient compared with its reference; prints as a short report, the verdict first.

    Attributes:
      verdict: "agrees", "differs" or "cannot tell".
      relative_error: ‖ĝ − g‖ / ‖g‖, of the hypergradient ĝ and its reference g.
      interval: its 95 % confidence interval; both ends are equal where every coordinate was taken.
      cosine: cosine of the angle between the two.
      norm_ratio: ‖ĝ‖ / ‖g‖.
      by_leaf: the relative error of every leaf; without all coordinates and without `by_leaf`, along its slope alone.
      reference: "exact tangents" of the steps that were run, or "central differences" of the outer loss.
      numeric_error: estimated relative error of the reference itself: of tangents by rounding, where it was measured,
        else the precision of their type.
      analytic: directional derivatives by the rule, shape (directions,).
      numeric: the same of the reference.
      coordinates: the name of each direction where they are coordinates, else None.
      draws: hypergradients that were drawn, with different keys, and averaged.
      noise: of several draws, the relative standard error of their mean; else 0.
      linear_statuses: how the linear solves of the hypergradient ended, as `LinearStatus`.
      causes: why it differs, and what to write instead, the likeliest first.
      predictivity: with `step`, how well it foretells steps of that size, and of a third of it.
      remedies: where that is badly, how well the hypergradients of other trainings foretell theirs, by name.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: (p - h) ** 2, optax.sgd(0.25))
      >>> def outer_loss(h):
      ...     adjoint = jaxhpo.Unroll(truncate=1)
      ...     return jaxhpo.solve(solver, solver.init(0.0, h), h, num_steps=3, adjoint=adjoint).params
      >>> check = jaxhpo.check_hypergradient(outer_loss, 1.0)
      >>> check.verdict, round(check.relative_error, 3)  # 0.5 of 0.875
      ('differs', 0.429)
      >>> print(check.causes[0])
      `Unroll(truncate=1)` differentiates the last 1 inner steps alone; `Unroll()`, which differentiates all, is right
      here. Take more, until the hypergradient no longer changes.
    """

    verdict: str
    relative_error: float
    interval: tuple[float, float]
    cosine: float
    norm_ratio: float
    by_leaf: dict[str, float]
    reference: str
    numeric_error: float
    analytic: np.ndarray
    numeric: np.ndarray
    coordinates: tuple[str, ...] | None
    draws: int = 1
    noise: float = 0.0
    linear_statuses: tuple[int, ...] = ()
    causes: tuple[str, ...] = ()
    predictivity: tuple[Predictivity, ...] = ()
    remedies: dict[str, Predictivity] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        low, high = self.interval
        between = f" ({percent(low)} to {percent(high)})" if high > low else ""
        size, causes = f"{percent(self.relative_error)}{between}", self.causes
        head = {"agrees": f"agrees, to {size}: ", "differs": f"differs by {size}: "}.get(self.verdict, "")
        if not head:
            head, causes = f"cannot tell, because {causes[0][0].lower()}{causes[0][1:]}\n  ", causes[1:]
        kind = "coordinates" if self.coordinates else "directions"
        text = (
            f"{head}hypergradient against {self.reference} along {len(self.numeric)} {kind}: relative error "
            f"{self.relative_error:.1e}, cosine {self.cosine:.6f}, norm ratio {self.norm_ratio:.4f}"
        )
        if self.reference == DIFFERENCES:
            text += f" (differences good to {self.numeric_error:.0e})"
        if self.draws > 1:
            text += f"\n  mean of {self.draws} draws, with a standard error of {percent(self.noise)}."
        bad = sorted({LinearStatus(status).name for status in self.linear_statuses if status})
        if bad:
            text += f"\n  The linear solve of an implicit rule ended {', '.join(bad)}."
        for cause in causes:
            text += f"\n  {cause}"
        text += self._foretold()
        if self.verdict == "agrees":
            return text
        worst = int(np.argmax(np.abs(self.analytic - self.numeric)))
        where = f" at {self.coordinates[worst]}" if self.coordinates else ""
        text += f"\n  worst{where}: {self.analytic[worst]:.4g} by the rule, {self.numeric[worst]:.4g} by the reference."
        apart = {name: error for name, error in self.by_leaf.items() if error > AGREES}
        if len(self.by_leaf) > 1 and apart:
            some = sorted(apart, key=lambda name: -apart[name])[:4]
            text += f"\n  by leaf: {', '.join(f'{name} {percent(apart[name])}' for name in some)}."
        return text

    def _foretold(self) -> str:
        """The correlation with real changes at finite steps: in words, with what raised it, and what else may."""
        if not self.predictivity:
            return ""
        first, *rest = self.predictivity
        better = {name: found for name, found in self.remedies.items() if found.above(first)}
        text = f"\n  It {first}{''.join(f'; with {name} {found.correlation:.2f}' for name, found in better.items())}."
        text += "".join(f"\n  It {foretold}." for foretold in rest)
        if not any(foretold.low for foretold in self.predictivity):
            return text
        if vain := [f"{name} ({x.correlation:.2f})" for name, x in self.remedies.items() if name not in better]:
            text += f"\n  Tried, and not better beyond chance: {', '.join(vain)}."
        fewer = "" if self.remedies else " fewer inner steps;"
        return (
            f"{text}\n  What {'else ' * bool(self.remedies)}may raise that: a lower outer rate; under Adam "
            f"`eps_root=1e-6` or more; a decaying inner rate;{fewer} a penalty in the loss; tanh or gelu for ReLU."
        )


def percent(x: float) -> str:
    """A part as a percentage of two digits, where that reads well."""
    if x >= 10:
        return f"{x:.2g} times"
    return f"{100 * x:.3g} %" if x >= 1 else f"{100 * x:.2g} %" if x >= 1e-4 else f"{x:.0e}"
