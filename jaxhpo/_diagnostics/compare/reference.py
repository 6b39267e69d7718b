"""The reference of a comparison: the exact hypergradient, or directional derivatives where that fails."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import t

from jaxhpo._core.mesh import ravel
from jaxhpo._core.types import PyTree
from jaxhpo._diagnostics.compare.measure import Measured
from jaxhpo._diagnostics.compare.result import Reference
from jaxhpo._diagnostics.differences import (
    TANGENTS,
    UNRELIABLE,
    Differences,
    agreement,
    central_differences,
    coordinate_names,
    difference_along,
)
from jaxhpo._diagnostics.health import reasons_for_zero, zero_entries
from jaxhpo._diagnostics.rows import interval_of_ratio
from jaxhpo._diagnostics.tangents import Tangents, if_defined

ROUGH = 0.1  # a relative distance of a finite step from the tangent at which the loss is called rough
WRONG = 1e-2  # a relative error of the exact rule at which the derivatives contradict it


class Standard(NamedTuple):
    """The reference, and the comparisons with it.

    Attributes:
      reference: its description.
      gradient: (m,) the exact hypergradient, or the derivatives along every coordinate; None if neither is known.
      differences: derivatives along the directions tried.
    """

    reference: Reference
    gradient: np.ndarray | None
    differences: Differences

    def scores(self, draws: np.ndarray, leaves: dict[str, slice], warnings: tuple) -> dict[str, Any]:
        """The fields of a `MethodRow` that compare a finite flat hypergradient, or draws of it, with the reference."""
        given, want = self._components(draws)
        if self.gradient is None:
            errors, ends = None, [interval_of_ratio(given[0] - want, want)]
        else:
            errors, ends = (
                {name: _rms([_leaf_error(g[at], want[at]) for g in given]) for name, at in leaves.items()},
                [],
            )
        found = [agreement(each, want) for each in given]
        relative_error = _rms([each.relative_error for each in found])
        if len(draws) > 1:
            ends.append(_interval_of_rms(np.array([each.relative_error for each in found])))
        low, high = zip(*ends or [(relative_error, relative_error)], strict=True)
        blind = self._blind(draws[0], leaves, warnings)
        return {
            "relative_error": relative_error,
            "interval": (min(low), max(high)),
            "cosine": float(np.mean([each.cosine for each in found])),
            "norm_ratio": _rms([each.norm_ratio for each in found]),
            "leaf_errors": errors,
            "blind": blind,
            "partly_blind": tuple(name for name in blind if draws[0][leaves[name]].any()),
        }

    def error(self, grad: np.ndarray) -> float:
        """The relative error of one hypergradient."""
        given, want = self._components(grad[None])
        return agreement(given[0], want).relative_error

    def _components(self, grads) -> tuple[np.ndarray, np.ndarray]:
        """The components of hypergradients and of the reference to compare: all entries, or those along directions."""
        if self.gradient is not None:
            return grads, self.gradient
        return np.array([self.differences.along(grad) for grad in grads]), self.differences.numeric

    def _blind(self, grad, leaves, warnings) -> tuple[str, ...]:
        """The leaves that are wrongly zero: throughout, or in entries that the method says it cuts off."""
        reasons = reasons_for_zero(warnings)
        zero = {name: part for name, part in leaves.items() if zero_entries(grad[part], reasons.get(name))}
        if self.gradient is None:
            return tuple(name for name in zero if name in reasons)
        # Differences along a leaf without effect are zero only up to their own error.
        noise = 1e-6 * np.linalg.norm(self.gradient) if self.reference.is_directional else 0.0
        missed = np.abs(self.gradient) * (grad == 0) > noise
        return tuple(name for name, part in zero.items() if missed[part].any())


def _rms(values) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _interval_of_rms(values) -> tuple[float, float]:
    """95 % interval of the root mean square of positive numbers, taken to be log-normal: squares have heavy tails.

    Cox's width, of the logarithm: t √(s² / n + s⁴ / 2 (n − 1)), with s² the variance of log x². It covers 93 to 96 % of
    cases for sums of squares over some dimensions, and 73 % for an estimate from one direction of three.
    """
    number, center = len(values), _rms(values)
    variance = np.var(2 * np.log(np.maximum(values, np.finfo(float).tiny)), ddof=1)
    width = t.ppf(0.975, number - 1) * np.sqrt(variance / number + variance**2 / (2 * (number - 1)))
    return center * float(np.exp(-width / 2)), center * float(np.exp(width / 2))


def _leaf_error(got, want) -> float:
    off, size = np.linalg.norm(got - want), np.linalg.norm(want)
    return float(off / size) if size else (math.inf if off else 0.0)


def directional_derivatives(
    loss: Callable,
    hparams: PyTree,
    num_directions: int | None,
    key: jax.Array,
    forward: bool,
    exact: np.ndarray | None,
    after_each: Callable[[], None],
) -> Differences:
    """Derivatives along coordinates or random directions: exact tangents, or central differences where those fail.

    Args:
      loss: of the ravelled hyperparameters.
      hparams: where to differentiate.
      num_directions: number of random directions; None takes every coordinate.
      key: for the directions.
      forward: False takes differences at once.
      exact: (m,) what tangents should agree with; where they do not, a difference along one direction decides. Where
        they do, its distance from the tangent is their `error`: that of a finite step. None believes them.
      after_each: called after each direction of differences.
    """
    flat = ravel(hparams)[0]
    rows = np.eye(flat.size)
    if num_directions is not None:
        normal = np.asarray(jax.random.normal(key, (num_directions, flat.size)), float)
        rows = normal / np.linalg.norm(normal, axis=1)[:, None]

    def by_tangents():
        tangents = Tangents(loss, flat)
        return None if tangents.rounded else tangents.along(rows)[1]

    found = if_defined(by_tangents) if forward else None
    if found is not None and np.isfinite(found).all():
        given = found if exact is None else rows @ exact
        off = np.abs(given - found)
        contradicted = bool(np.linalg.norm(off) > WRONG * np.linalg.norm(found))
        j = int(np.argmax(off if contradicted else np.abs(found)))
        by_step, error = difference_along(loss, hparams, rows[j])
        if not contradicted or 3 * max(error, abs(by_step - given[j])) >= off[j]:
            coarse, rounding = found.copy(), np.abs(found) * float(jnp.finfo(flat.dtype).eps)
            coarse[j] = by_step
            coordinates = coordinate_names(hparams) if num_directions is None else None
            return Differences(rows, found, coarse, rounding, coordinates, TANGENTS)
    return central_differences(loss, hparams, num_directions, None, key, after_each)


def standard(name: str, measured: Measured | None, differences: Differences) -> Standard:
    """The reference: the exact rule, unless it failed or reliable derivatives along directions contradict it.

    Args:
      name: of the exact rule.
      measured: its run; None where differences were asked for.
      differences: derivatives of the outer loss along directions.
    """
    error, kind = differences.error, str(differences)

    def by_differences(text, off=None) -> Standard:
        differences.check(f"Nothing can be the reference: {text} ")
        # Along coordinates the directions are the unit vectors, so these are the entries of the gradient.
        gradient = differences.numeric if differences.coordinates else None
        return Standard(Reference(differences.kind.split()[-1], text, off, error, error <= 1e-2), gradient, differences)

    if measured is None:
        return by_differences(f"{kind}, good to {error:.0e}.")
    grad = None if measured.error else measured.result[1]
    if grad is None or not np.all(np.isfinite(grad)):
        failed = measured.error or "its hypergradient is not finite."
        return by_differences(f"{kind}, because `{name}` cannot be the reference: {failed}")
    if not np.any(grad):
        differences.check()
    off = agreement(differences.along(grad), differences.numeric).relative_error if differences.valid else math.inf
    if off > WRONG and error <= off / 10:
        text = (
            f"{kind} (good to {error:.0e}), because `{name}` contradicts them (relative error {off:.0e}): a derivative "
            "in the losses is not that of its function (a `custom_vjp`, a `stop_gradient`)."
        )
        return by_differences(text, off)
    verdict = f"agree with it to {off:.0e} (they are good to {error:.0e})"
    if differences.kind == TANGENTS and off <= WRONG:
        verdict = f"agree with it to {off:.0e}, and a finite step with these to {error:.0e}"
    if off > WRONG:
        verdict = f"do not confirm it (off by {off:.0e}, with an error of their own of {error:.0e}): {UNRELIABLE}"
    rough = differences.kind == TANGENTS and error > ROUGH
    if rough:
        verdict += f". So it foretells little: {UNRELIABLE}"
    text = f"`{name}`, exact for the steps taken; {kind} {verdict}."
    return Standard(Reference(name, text, off, error, off <= WRONG and not rough), grad, differences)
