"""The reference of a comparison: the exact hypergradient, or central differences where that fails."""

import math
from typing import Any, NamedTuple

import numpy as np

from jaxhpo._diagnostics.compare.measure import Measured
from jaxhpo._diagnostics.compare.result import Reference
from jaxhpo._diagnostics.differences import UNRELIABLE, Differences, agreement
from jaxhpo._diagnostics.health import reasons_for_zero, zero_entries


class Standard(NamedTuple):
    """The reference, and the comparisons with it.

    Attributes:
      reference: its description.
      gradient: (m,) the exact hypergradient, or that of differences along every coordinate; None if neither is known.
      differences: along the directions tried.
    """

    reference: Reference
    gradient: np.ndarray | None
    differences: Differences

    def scores(self, grad: np.ndarray, leaves: dict[str, slice], warnings: tuple) -> dict[str, Any]:
        """The fields of a `MethodRow` that compare a finite flat hypergradient with the reference."""
        if self.gradient is not None:
            found, want = agreement(grad, self.gradient), self.gradient
            errors = {name: _leaf_error(grad[part], want[part]) for name, part in leaves.items()}
        else:
            found, errors = agreement(self.differences.along(grad), self.differences.numeric), None
        blind = self._blind(grad, leaves, warnings)
        partly = tuple(name for name in blind if grad[leaves[name]].any())
        return {**found._asdict(), "leaf_errors": errors, "blind": blind, "partly_blind": partly}

    def _blind(self, grad, leaves, warnings) -> tuple[str, ...]:
        """The leaves that are wrongly zero: throughout, or in entries that the method says it cuts off."""
        reasons = reasons_for_zero(warnings)
        zero = {name: part for name, part in leaves.items() if zero_entries(grad[part], reasons.get(name))}
        if self.gradient is None:
            return tuple(name for name in zero if name in reasons)
        # Differences along a leaf without effect are zero only up to their own error.
        noise = 1e-6 * np.linalg.norm(self.gradient) if self.reference.name == "differences" else 0.0
        missed = np.abs(self.gradient) * (grad == 0) > noise
        return tuple(name for name, part in zero.items() if missed[part].any())


def _leaf_error(got, want) -> float:
    off, size = np.linalg.norm(got - want), np.linalg.norm(want)
    return float(off / size) if size else (math.inf if off else 0.0)


def standard(name: str, measured: Measured | None, differences: Differences) -> Standard:
    """The reference: the exact rule, unless it failed or reliable differences contradict it.

    Args:
      name: of the exact rule.
      measured: its run; None where differences were asked for.
      differences: of the outer loss.
    """
    error = differences.error
    kind = f"central differences along {differences}"

    def by_differences(text, off=None) -> Standard:
        differences.check(f"Nothing can be the reference: {text} ")
        # Along coordinates the directions are the unit vectors, so these are the entries of the gradient.
        gradient = differences.numeric if differences.coordinates else None
        return Standard(Reference("differences", text, off, error, error <= 1e-2), gradient, differences)

    if measured is None:
        return by_differences(f"{kind}, good to {error:.0e}.")
    grad = None if measured.error else measured.result[1]
    if grad is None or not np.all(np.isfinite(grad)):
        failed = measured.error or "its hypergradient is not finite."
        return by_differences(f"{kind}, because `{name}` cannot be the reference: {failed}")
    if not np.any(grad):
        differences.check()
    off = agreement(differences.along(grad), differences.numeric).relative_error if differences.valid else math.inf
    if off > 1e-2 and error <= off / 10:
        text = (
            f"{kind} (good to {error:.0e}), because `{name}` contradicts them (relative error {off:.0e}): a derivative "
            "in the losses is not that of its function (a `custom_vjp`, a `stop_gradient`)."
        )
        return by_differences(text, off)
    verdict = f"agree with it to {off:.0e} (they are good to {error:.0e})"
    if off > 1e-2:
        verdict = f"do not confirm it (off by {off:.0e}, with an error of their own of {error:.0e}): {UNRELIABLE}"
    text = f"`{name}`, exact for the steps taken; {kind} {verdict}."
    return Standard(Reference(name, text, off, error, off <= 1e-2), grad, differences)
