"""The directions along which a hypergradient is compared with its reference, and the error that follows."""

from typing import NamedTuple

import jax
import numpy as np
from scipy.stats import chi2, t

from jaxhpo._core.tree import named_leaves
from jaxhpo._core.types import PyTree
from jaxhpo._diagnostics.differences import Agreement, agreement, coordinate_names

ALL = 64  # hyperparameters of which every coordinate is taken
MOST_LEAVES = 32  # whose own slope is taken
COORDINATE, SLOPE, RANDOM = range(3)


class Rows(NamedTuple):
    """Directions, as rows of unit length or of normal numbers.

    With ĝ the hypergradient, ĝ_l its part in leaf l and g the reference: a slope is the direction ĝ_l / ‖ĝ_l‖, along
    which g has the component p_l; the random directions u are normal in the complement of all slopes, where ĝ is zero,
    so that ⟨g, u⟩² has the mean q², the squared norm of g there. With these

      ‖ĝ − g‖² = Σ (‖ĝ_l‖ − p_l)² + q²,      ‖g‖² = Σ p_l² + q²,      ⟨ĝ, g⟩ = Σ ‖ĝ_l‖ p_l :

    a wrong factor or sign of a leaf is measured without any chance, and only q² has an interval, by χ².

    Attributes:
      directions: (n, m).
      kinds: (n,) COORDINATE, SLOPE or RANDOM.
      leaves: (n,) the number of the leaf in which a direction lies; -1 for one in all of them.
    """

    directions: np.ndarray
    kinds: np.ndarray
    leaves: np.ndarray


class Judged(NamedTuple):
    """Error of a hypergradient by its components along some rows.

    Attributes:
      agreement: relative error, cosine and norm ratio.
      interval: of the relative error, 95 %.
      by_leaf: the relative error of each leaf where it was measured, else that of its slope.
    """

    agreement: Agreement
    interval: tuple[float, float]
    by_leaf: dict[str, float]

    def within(self, tolerance: float) -> bool:
        """True if the error of the whole, and that of every leaf, is at most a tolerance."""
        return all(error <= tolerance for error in (self.agreement.relative_error, *self.by_leaf.values()))


class Layout:
    """The leaves of the hyperparameters in one vector.

    Attributes:
      names: of the leaves.
      parts: the slice of each.
      size: of the vector.
      coordinates: the name of every hyperparameter, where all are taken.
    """

    def __init__(self, hparams: PyTree):
        leaves = named_leaves(hparams, "hparams")
        ends = np.cumsum([0, *(leaf.size for _, leaf in leaves)])
        self.names = [name for name, _ in leaves]
        self.parts = [slice(*ends[i : i + 2]) for i in range(len(leaves))]
        self.size = int(ends[-1])
        self.coordinates = coordinate_names(hparams) if self.size <= ALL else ()

    def leaf_of(self, index: int) -> int:
        """The number of the leaf that holds a hyperparameter."""
        return next(i for i, part in enumerate(self.parts) if index < part.stop)


def coordinate_rows(layout: Layout) -> Rows:
    """Every coordinate."""
    leaves = np.array([layout.leaf_of(i) for i in range(layout.size)])
    return Rows(np.eye(layout.size), np.full(layout.size, COORDINATE), leaves)


def slope_rows(layout: Layout, grad: np.ndarray, number: int, key: jax.Array) -> Rows:
    """The slope of every leaf (of all together, where there are many), and random directions in their complement."""
    slopes = _slopes(layout, grad)
    random = _complement(np.asarray(jax.random.normal(key, (number, layout.size))), slopes)
    leaves = [-1] if len(layout.parts) > MOST_LEAVES else [i for i, part in enumerate(layout.parts) if grad[part].any()]
    kinds = np.array([SLOPE] * len(slopes) + [RANDOM] * number)
    return Rows(np.concatenate([slopes, random]), kinds, np.array([*leaves, *[-1] * number]))


def leaf_rows(layout: Layout, grad: np.ndarray, number: int, key: jax.Array) -> Rows:
    """Random directions in every leaf, in the complement of its slope where that is taken; none where that is all."""
    normal = np.asarray(jax.random.normal(key, (len(layout.parts), number, layout.size)))
    rows, leaves = [], []
    for i, (part, block) in enumerate(zip(layout.parts, normal, strict=True)):
        alone = np.zeros_like(block)
        alone[:, part] = block[:, part]
        if len(layout.parts) <= MOST_LEAVES:
            alone = _complement(alone, _slopes(layout, grad))
        rows.append(alone[alone.any(1)])
        leaves += [i] * len(rows[-1])
    return Rows(np.concatenate(rows), np.full(len(leaves), RANDOM), np.array(leaves, int))


def joined(first: Rows, second: Rows) -> Rows:
    """The directions of both."""
    return Rows(*map(np.concatenate, zip(first, second, strict=True)))


def _slopes(layout, grad) -> np.ndarray:
    parts = [slice(None)] if len(layout.parts) > MOST_LEAVES else layout.parts
    rows = []
    for part in parts:
        if grad[part].any():
            row = np.zeros(layout.size)
            row[part] = grad[part] / np.linalg.norm(grad[part])
            rows.append(row)
    return np.reshape(rows, (-1, layout.size))


def _complement(rows, slopes) -> np.ndarray:
    return rows - (rows @ slopes.T) @ slopes  # the slopes are orthonormal


def judge(layout: Layout, rows: Rows, given: np.ndarray, reference: np.ndarray) -> Judged:
    """Compares the components of a hypergradient with those of its reference.

    Args:
      layout: of the hyperparameters.
      rows: the directions.
      given: (n,) the hypergradient's components along them.
      reference: (n,) the reference's.
    """
    off = given - reference
    named = [(name, rows.leaves == i) for i, name in enumerate(layout.names)]
    if (rows.kinds == COORDINATE).all():
        whole = agreement(given, reference)
        by_leaf = {name: _ratio(np.sum(off[at] ** 2), np.sum(reference[at] ** 2)) for name, at in named}
        return Judged(whole, (whole.relative_error, whole.relative_error), by_leaf)
    if not (rows.kinds == SLOPE).any():
        return Judged(agreement(given, reference), interval_of_ratio(off, reference), {})
    slope, random = rows.kinds == SLOPE, (rows.kinds == RANDOM) & (rows.leaves == -1)
    number = int(random.sum())

    def sums(x, y) -> np.ndarray:
        """Σ x y over the slopes, and its mean over the random directions: the two parts of a product in full space."""
        return np.array([np.sum((x * y)[slope]), np.sum((x * y)[random]) / max(number, 1)])

    wrong, size, right, both = sums(off, off), sums(given, given), sums(reference, reference), sums(given, reference)

    def error(factor) -> float:
        return _ratio(*(float(parts[0] + factor * parts[1]) for parts in (wrong, right)))

    factors = [number / chi2.ppf(end, number) if number else 1.0 for end in (0.975, 0.025)]
    ends = sorted(map(error, factors))
    lengths = np.sqrt(size.sum() * right.sum())
    by_leaf = {}
    for name, at in named:
        p, q = at & slope, at & (rows.kinds == RANDOM)
        parts = [float(np.sum(x[p] ** 2) + (np.mean(x[q] ** 2) if q.any() else 0.0)) for x in (off, reference)]
        if p.any() or q.any():
            by_leaf[name] = _ratio(*parts)
    whole = Agreement(error(1.0), float(both.sum() / lengths) if lengths else 0.0, _ratio(size.sum(), right.sum()))
    return Judged(whole, (ends[0], ends[1]), by_leaf)


def interval_of_ratio(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """95 % confidence interval of ‖X‖ / ‖Y‖, for components x and y of two vectors along the same random directions.

    That is a ratio of two standard deviations. With λ the true one, x + λ y and x − λ y are uncorrelated, which
    Student's t tests (Pitman, 1939).
    """
    number, w = len(x), _ratio(float(x @ x), float(y @ y))
    if number < 2 or not 0 < w < np.inf:
        return (0.0, np.inf) if number < 2 else (w, w)
    r = x @ y / np.sqrt((x @ x) * (y @ y))
    # λ² / w² = q with (1 − q)² / 4 q (1 − r²) = t² / (n − 1), whose two roots are K ± √(K² − 1).
    k = 1 + 2 * (1 - min(r**2, 1.0)) * t.ppf(0.975, number - 1) ** 2 / (number - 1)
    larger = float(np.sqrt(k + np.sqrt(k**2 - 1)))
    return w / larger, w * larger


def _ratio(off: float, size: float) -> float:
    """√(off / size) of two squared norms."""
    return float(np.sqrt(off / size)) if size else (np.inf if off else 0.0)
