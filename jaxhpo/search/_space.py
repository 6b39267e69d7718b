"""The space of a search: what `low`, `high` and `transforms` say of a tree of hyperparameters."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path
from optuna.distributions import FloatDistribution

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.transforms import apply_transforms, positive
from jaxhpo._core.types import PyTree, Transform
from jaxhpo._core.validate import check_params
from jaxhpo._tune.history import distinct

EDGE = 0.01  # part of a range that counts as its edge


class Space:
    """A box in the units of the search: uniform where there is no transform, in the logarithm under `positive`.

    Optuna has a parameter for each entry of a leaf, in natural units; under other transforms than `positive` in those
    of the search.

    Args:
      hparams: the start.
      low: a number for all of them, a tree like the hyperparameters, or a prefix of one.
      high: the same.
      transforms: as for `tune`.

    Attributes:
      distributions: of Optuna's parameters, by name.
      start: their values at the start.
    """

    def __init__(self, hparams: PyTree, low: PyTree, high: PyTree, transforms: PyTree):
        for path, leaf in tree_leaves_with_path(hparams):
            if isinstance(leaf, (int, str)) or getattr(getattr(leaf, "dtype", None), "kind", "") in {"b", "i", "u"}:
                raise JaxhpoError(
                    f"`hparams{keystr(path)}` got {leaf!r}, but a search is over real numbers: let Optuna suggest "
                    "integers and choices, and tune the rest within its trials, by `jaxhpo.search.tune_trial`."
                )
        self.hparams = check_params(hparams, "hparams")
        found = jax.tree.leaves(apply_transforms(lambda transform, leaf: transform, transforms, self.hparams))
        self.rules = [rule if isinstance(rule, Transform) else None for rule in found]
        distributions, starts = [], []
        lows, highs = (_spread(bound, self.hparams, what) for bound, what in ((low, "low"), (high, "high")))
        leaves = tree_leaves_with_path(self.hparams)
        for (path, leaf), rule, below, above in zip(leaves, self.rules, lows, highs, strict=True):
            bounds = {"low": below, "hparams": np.asarray(leaf, float), "high": above}
            a, x, b = (_searched(rule, value, leaf, what + keystr(path)) for what, value in bounds.items())
            rounding = 4 * float(jnp.finfo(leaf.dtype).eps) * np.maximum(abs(a), abs(b))
            for i in np.argwhere(~((a < b) & (a - rounding <= x) & (x <= b + rounding))):
                values = ", ".join(f"{what}={np.broadcast_to(v, leaf.shape)[tuple(i)]:g}" for what, v in bounds.items())
                raise JaxhpoError(
                    f"`hparams{keystr(path)}`{f' at {(*i.tolist(),)}' * bool(i.size)} got {values}: write low below "
                    "high, and a start between them."
                )
            name = keystr(path, simple=True, separator=".") or "hparams"
            for i in np.ndindex(leaf.shape):
                entry = name + f"[{', '.join(map(str, i))}]" * bool(i)
                distributions.append((entry, FloatDistribution(float(a[i]), float(b[i]), log=rule == positive)))
                starts.append(float(np.clip(x[i], a[i], b[i])))
        self.distributions: dict[str, FloatDistribution] = distinct(distributions)
        self.start = dict(zip(self.distributions, starts, strict=True))

    def tree(self, params: dict[str, float]) -> PyTree:
        """The hyperparameters of Optuna's parameters."""
        flat, leaves, place = np.array([params[name] for name in self.distributions]), [], 0
        for leaf, rule in zip(jax.tree.leaves(self.hparams), self.rules, strict=True):
            x = jnp.asarray(flat[place : place + leaf.size].reshape(leaf.shape), leaf.dtype)
            leaves.append(x if rule is None or rule == positive else rule.forward(x))
            place += leaf.size
        return jax.tree.unflatten(jax.tree.structure(self.hparams), leaves)

    def to_unit(self, params: dict[str, float]) -> np.ndarray:
        """Parameters as a point of the unit cube."""
        return np.array([_scaled(params[name], d) for name, d in self.distributions.items()])

    def from_unit(self, point: Any) -> dict[str, float]:
        """Inverse of `to_unit`."""
        return {name: _unscaled(float(x), d) for x, (name, d) in zip(point, self.distributions.items(), strict=True)}

    def edges(self, params: dict[str, float]) -> str:
        """Which parameters lie at an edge of the space, in words; empty where none does."""
        at = [
            f"{name} = {params[name]:.3g} ({'low' if x < 0.5 else 'high'})"
            for name, x in zip(self.distributions, self.to_unit(params), strict=True)
            if not EDGE < x < 1 - EDGE
        ]
        more = f" and {len(at) - 3} more" * (len(at) > 3)
        return f"the best lies at the edge of the space, in {', '.join(at[:3])}{more}: a wider one may hold better" * (
            len(at) > 0
        )


def _spread(bound: PyTree, hparams: PyTree, what: str) -> list[np.ndarray]:
    """The bound of each leaf."""
    try:
        return jax.tree.leaves(
            jax.tree.map(lambda x, below: jax.tree.map(lambda _: np.asarray(x, float), below), bound, hparams)
        )
    except (TypeError, ValueError) as error:
        raise JaxhpoError(
            f"`{what}` got {bound!r}, which does not fit `hparams` ({error}): write a number for all of them, or a "
            "tree of the same structure."
        ) from None


def _searched(rule, x: np.ndarray, leaf, name: str) -> np.ndarray:
    """Natural values in units of Optuna's parameter, in the shape of the leaf."""
    try:
        x = np.broadcast_to(x, leaf.shape)
    except ValueError:
        raise JaxhpoError(
            f"`{name}` has the shape {x.shape}, but the hyperparameter {leaf.shape}: give it that one, or one number."
        ) from None
    if not np.isfinite(x).all():
        raise JaxhpoError(f"`{name}` got {x[~np.isfinite(x)][0]}, but a search needs an end: write a finite number.")
    if rule is None:
        return x
    try:
        searched = np.asarray(rule.inverse(jnp.asarray(x, leaf.dtype)), float)
    except JaxhpoError as error:
        raise JaxhpoError(f"`{name}`: {error}") from None
    return x if rule == positive else searched


def _scaled(x: float, d: FloatDistribution) -> float:
    return math.log(x / d.low) / math.log(d.high / d.low) if d.log else (x - d.low) / (d.high - d.low)


def _unscaled(x: float, d: FloatDistribution) -> float:
    value = d.low * (d.high / d.low) ** x if d.log else d.low + x * (d.high - d.low)
    return min(max(value, d.low), d.high)
