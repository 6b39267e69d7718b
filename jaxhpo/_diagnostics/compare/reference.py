"""What the methods are held against: the exact hypergradient, or central differences where that fails."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from jaxhpo._core.errors import NonFiniteError, ZeroHypergradientError, ZeroHypergradientWarning
from jaxhpo._diagnostics.compare.measure import Measured
from jaxhpo._diagnostics.compare.result import Reference
from jaxhpo._diagnostics.differences import Agreement, Differences, agreement


@dataclasses.dataclass(frozen=True, eq=False)
class Standard:
    """The reference, and the comparisons with it.

    Attributes:
      reference: what is told of it.
      gradient: (m,) the exact hypergradient, or that of differences along every coordinate; None if neither is known.
      differences: along the directions tried.
      exact: whether `gradient` is exact, to the last digit.
    """

    reference: Reference
    gradient: np.ndarray | None
    differences: Differences
    exact: bool

    def agreement(self, grad: np.ndarray) -> Agreement:
        """How a finite flat hypergradient compares."""
        if self.gradient is not None:
            return agreement(grad, self.gradient)
        return agreement(self.differences.along(grad), self.differences.numeric)

    def leaf_errors(self, grad: np.ndarray, leaves: dict[str, slice]) -> dict[str, float] | None:
        """The relative error of every leaf."""
        if self.gradient is None:
            return None
        errors = {}
        for name, part in leaves.items():
            off, size = np.linalg.norm(grad[part] - self.gradient[part]), np.linalg.norm(self.gradient[part])
            errors[name] = float(off / size) if size else (math.inf if off else 0.0)
        return errors

    def blind(self, grad: np.ndarray, leaves: dict[str, slice], warnings) -> tuple[str, ...]:
        """Leaves that are wrongly zero: throughout, or in entries that the method says it cuts off."""
        told = {w.leaf: w for w in warnings if isinstance(w, ZeroHypergradientWarning)}
        found = []
        for name, part in leaves.items():
            zero, reason = grad[part] == 0, told.get(name)
            suspect = zero.size and (zero.all() or (reason is not None and reason.partial and zero.any()))
            if not suspect or (self.gradient is None and reason is None):
                continue
            if self.gradient is None or np.any(np.abs(self.gradient[part][zero]) > self._noise(self.gradient)):
                found.append(name)
        return tuple(found)

    def _noise(self, gradient) -> float:
        return 0.0 if self.exact else 1e-6 * float(np.linalg.norm(gradient))


def standard(name: str, measured: Measured | None, differences: Differences) -> Standard:
    """The reference: the exact rule, unless it failed or trustworthy differences contradict it.

    Args:
      name: of the exact rule.
      measured: what it gave; None where differences were asked for.
      differences: of the outer loss.
    """
    usable = bool(np.all(np.isfinite(differences.numeric)) and np.all(np.isfinite(differences.coarse)))
    moves = usable and bool(np.any(differences.numeric))
    kind, error = f"central differences along {differences}", differences.error if moves else math.nan
    failed = None if measured is None else _failed(measured)
    if measured is None or failed:
        why = f", because `{name}` cannot be the reference: {failed}" if failed else f", good to {error:.0e}."
        return _by_differences(f"{kind}{why}", None, error, differences, usable, moves)
    grad: Any = measured.grad
    if not np.any(grad) and not moves:
        raise _no_effect()
    off = agreement(differences.along(grad), differences.numeric).relative_error if moves else math.inf
    if off > 1e-2 and error <= off / 10:
        text = (
            f"{kind} (good to {error:.0e}), because `{name}` contradicts them (relative error {off:.0e}): a derivative "
            "in the losses is not that of its function (a `custom_vjp`, a `stop_gradient`)."
        )
        return _by_differences(text, off, error, differences, usable, moves)
    text = f"`{name}`, exact for the steps taken; {kind} agree with it to {off:.0e} (they are good to {error:.0e})."
    if off > 1e-2:
        text = (
            f"`{name}`, exact for the steps taken; {kind} do not confirm it (relative difference {off:.0e}, and they "
            f"contradict themselves by {error:.0e}): the trained parameters jump or bend sharply with the "
            "hyperparameters, as networks with ReLU do, or rounding drowns the differences (try float64)."
        )
    return Standard(Reference(name, text, off, error, off <= 1e-2), grad, differences, exact=True)


def _failed(measured) -> str | None:
    if measured.error is not None:
        return " ".join(f"{type(measured.error).__name__}: {measured.error}".split())[:300]
    return None if np.all(np.isfinite(measured.grad)) else "its hypergradient is not finite."


def _by_differences(text, off, error, differences, usable, moves) -> Standard:
    if not usable:
        raise NonFiniteError(
            f"Nothing can be the reference: {text} The outer loss is not finite at all points that the differences "
            "visit: compare at hyperparameters further from the edge of their domain."
        )
    if not moves:
        raise _no_effect()
    gradient = None
    if differences.coordinates:
        # The directions are the unit vectors, so these are the entries of the gradient.
        gradient = differences.numeric
    reference = Reference("differences", text, off, error, error <= 1e-2)
    return Standard(reference, gradient, differences, exact=False)


def _no_effect() -> ZeroHypergradientError:
    return ZeroHypergradientError(
        "The outer loss does not change along any direction tried: no hyperparameter affects it. Pass the "
        "hyperparameters on to `solve`, and use them in the train loss or the optimiser."
    )
