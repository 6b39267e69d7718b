"""`attribution`: what each training example does to each test measurement, by the derivative of the training."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo._core.cost import UNKNOWN_LENGTH, count_arithmetic
from jaxhpo._core.errors import JaxhpoError, ZeroHypergradientError, warn
from jaxhpo._core.processes import whole
from jaxhpo._core.progress import EVERY, Progress
from jaxhpo._core.trace import flat_by
from jaxhpo._core.tree import map_in_chunks
from jaxhpo._core.validate import check_count, check_switch, describe
from jaxhpo._diagnostics.attribution.measured import CHECKS, SUBSETS, Measured

CHECKED = 0.05  # of the examples are dropped in the retrainings that test the scores
GOOD = 0.9  # correlation of foretold and real changes from which scores are not warned of
REMEDIES = (
    "a learning rate that decays to zero (cosine), an L2 penalty in the train loss, a smooth activation in the place "
    "of relu, a larger `eps_root` in Adam (1e-5), and the mean over random subsets, `attribution(..., repeats=8)`"
)


@dataclasses.dataclass(frozen=True)
class Attribution:
    """Scores of training examples for test measurements; prints as a few lines.

    Attributes:
      scores: (m, n) the derivative of each measurement with respect to the weight of each example at 1: positive
        where the example raises the measurement.
      base: (m,) the measurements with all examples: as trained, or with `drop` as foretold from the subsets.
      foretells: mean over measurements of the correlation of foretold and real changes without a random 5 % of the
        examples; None where that was not tried.
      trainings: cost of all, in plain trainings, by counted operations.

    Example:
      >>> found = jaxhpo.Attribution(scores=np.array([[1.0, -0.5, 0.0]]), base=np.array([2.0]))
      >>> found.predict([0, 1, 1]), found.top(2), found.top(1, lowest=True)
      (array([1.]), array([[0, 2]]), array([[1]]))
    """

    scores: np.ndarray
    base: np.ndarray
    foretells: float | None = None
    trainings: float | None = None

    def predict(self, weights: Any) -> np.ndarray:
        """Foretells the measurements of a training with other weights, by the tangent: base + scores · (weights − 1).

        Args:
          weights: (..., n), such as 0 for the examples that are left out and 1 for the others.

        Returns:
          (..., m) measurements.
        """
        weights = np.asarray(weights, self.scores.dtype)
        if weights.shape[-1:] != self.scores.shape[1:]:
            n = self.scores.shape[1]
            raise JaxhpoError(f"`weights` is {describe(weights)}, but there are {n} examples: give one weight to each.")
        return self.base + (weights - 1) @ self.scores.T

    def top(self, k: int, lowest: bool = False) -> np.ndarray:
        """The examples that raise each measurement most, or lower it most.

        Args:
          k: how many.
          lowest: takes those of the lowest scores, the lowest first.

        Returns:
          (m, k) indices of examples, those of the largest effect first.
        """
        check_count("k", k)
        return np.argsort(self.scores if lowest else -self.scores, axis=1, kind="stable")[:, :k]

    def __str__(self) -> str:
        """Sizes, cost, and what the scores foretell."""
        m, n = self.scores.shape
        lines = [f"Scores of {n} examples for {m} measurement{'s' * (m > 1)}."]
        if self.trainings is not None:
            lines[0] += f" They cost as much as {self.trainings:.3g} trainings."
        if self.foretells is not None:
            lines.append(
                f"What training does without 5 % of the examples they foretell, correlation {self.foretells:.2f}."
            )
        if none := int((self.scores == 0).all(axis=0).sum()):
            lines.append(f"{none} of the examples have scores of exactly zero: their weight enters no step.")
        return "\n".join(lines)


def attribution(
    train: Callable,
    measure: Callable,
    num_examples: int,
    *,
    repeats: int = 1,
    drop: float | None = None,
    new_seeds: bool = False,
    checks: int = 8,
    key: jax.Array | None = None,
    batch_size: int | None = 8,
    progress: bool = True,
) -> Attribution:
    r"""Scores what each training example does to each test measurement, for any solver and model.

    With :math:`\theta(w)` the trained parameters for the weights w of the examples, the scores are the derivative of
    the measurements f at the training as it is, :math:`S = \partial f(\theta(w)) / \partial w` at w = 1, or the mean
    of such over random subsets and seeds. The measurements without some examples are :math:`f - \sum_i S_i` over
    these, to first order. Which derivative of the training that is, the rule in `train` says: `Unroll()` that of the
    steps that were run; `Implicit(CG(), curvature=gauss_newton(...))` influence functions; `Implicit(Identity(1.0))`
    products of gradients at the end, as in T1-T2.

    **Cost and bias**: each repeat is one training, kept for the way back, and one reverse pass for each measurement,
    of one to two trainings with `Unroll()`; `checks` trainings besides. Memory is that of `batch_size` reverse passes.
    The derivative is exact; a whole example is a finite step, which it foretells where training is smooth. `checks`
    tries that, and warns; `lds` measures it more closely.

    Args:
      train: `weights -> trained`, or `(weights, key) -> trained`: your training, with a `solve` in which each
        example's loss is multiplied by its weight. `weights` has the shape (n,), and the key is for initial
        parameters and minibatches. Instead of an example a weight may be of a group or of a source.
      measure: `trained -> (m,)` or a scalar: what is measured, such as the margins or losses of m test examples.
      num_examples: n.
      repeats: derivatives of which the scores are the mean: 8 subsets help where training is rough, 1 or 4 do not.
      drop: the part of the examples that each repeat does without, at random; None takes none where there is one
        repeat, else a tenth.
      new_seeds: trains each repeat with a key of its own, for the effect averaged over seeds. False takes `key`
        itself for all, for what the examples did in the training with this key.
      checks: retrainings without a random 5 % of the examples that test the scores; 0 does not, nor does `new_seeds`,
        where a single retraining is another thing than the mean.
      key: for `train`, and for the subsets; `jax.random.key(0)` when None.
      batch_size: reverse passes, or retrainings, under one `vmap`; None takes all.
      progress: shows progress on stderr, where it takes longer than 5 s.

    Returns:
      An `Attribution`; `print` it.

    Raises:
      ZeroHypergradientError: no measurement depends on the weights.
      NonFiniteError: a measurement or its derivative is not finite; says where that began.
      JaxhpoError: an invalid input.

    Example:
      >>> x, y = jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, 2.0, 6.0])  # a line through zero; the last is off
      >>> solver = jaxhpo.from_optax(lambda p, w, batch: jnp.mean(w * (p * x - y) ** 2), optax.sgd(0.1))
      >>> def train(w):
      ...     return jaxhpo.solve(solver, solver.init(0.0, w), w, num_steps=50, adjoint=jaxhpo.Unroll()).params
      >>> found = jaxhpo.attribution(train, lambda slope: 10 * slope, 3)
      >>> print(found.base.round(2), found.scores.round(2))  # 10 Σxy / Σx², and 10 x (y - slope x) / Σx²
      [16.43] [[-0.46 -1.84  2.3 ]]

    References:
      Koh, Liang. Understanding Black-box Predictions via Influence Functions. 2017. arXiv:1703.04730
      Engstrom, Ilyas, Chen, Feldmann, Moses, Madry. Optimizing ML Training with Metagradient Descent. 2025.
      arXiv:2503.13751
      Ilyas, Engstrom. MAGIC: Near-Optimal Data Attribution for Deep Learning. 2025. arXiv:2504.16430
    """
    measured = Measured(train, measure, num_examples, key, batch_size)
    check_count("repeats", repeats)
    check_count("checks", checks, 0)
    if 0 < checks < 3:
        raise JaxhpoError(f"`checks` got {checks}, too few for a correlation: write 3 or more, or 0 for none.")
    check_switch("new_seeds", new_seeds)
    if new_seeds and not measured.takes_key:
        raise JaxhpoError("`new_seeds=True` needs a training that takes a key: write it as `train(weights, key)`.")
    drop = (0.1 if repeats > 1 else 0.0) if drop is None else drop
    if repeats > 1 and not drop and not new_seeds:
        raise JaxhpoError(f"`repeats={repeats}` would repeat one derivative: give `drop` above 0, or `new_seeds=True`.")
    kept = measured.without(drop, repeats, SUBSETS) if drop else np.ones((repeats, num_examples), measured.ones.dtype)

    def derivative(weights, key):
        values, pull = jax.vjp(lambda w: measured(w, key), weights)
        rows = jnp.eye(values.size, dtype=values.dtype)
        return values, map_in_chunks(lambda row: pull(row)[0], rows, batch_size)

    program = jax.jit(derivative)
    base: Any = 0.0
    scores: Any = 0.0
    checks = 0 if new_seeds else checks
    with Progress(repeats + bool(checks), "attribution", progress, delay=EVERY) as bar:
        for number, weights in enumerate(kept):
            seed = measured.seed(number * new_seeds)
            values, slopes = whole(program(jnp.asarray(weights), seed))
            measured.raise_unless_finite(weights[None], values[None], seed)
            measured.raise_unless_finite(weights[None], slopes[None], seed)
            # Each repeat foretells the measurements of all examples from its own subset.
            base, scores = base + (values + slopes @ (1 - weights)) / repeats, scores + slopes / repeats
            bar.update(f"derivative {number + 1}")
        if not np.any(scores):
            raise ZeroHypergradientError(_why_zero(measured))
        found = Attribution(scores, base, None, checks + repeats * _cost(derivative, measured))
        if checks:
            found = dataclasses.replace(found, foretells=_foretells(found, measured, checks))
            bar.update("retrainings")
    return found


def _why_zero(measured: Measured) -> str:
    flat = flat_by(lambda w: measured(w, measured.key).sum(), measured.ones)[0]
    if flat:
        return (
            f"Every score is exactly zero: the measurements are piecewise constant, through `{'`, `'.join(flat)}`, "
            "whose derivative is zero. Measure something smooth: a margin or a loss in the place of an accuracy."
        )
    return (
        "Every score is exactly zero: no measurement depends on the weights through the derivative rule in `train`. "
        "Multiply each example's loss by its weight in the train loss, `jnp.mean(weights[batch] * losses)`, pass the "
        "weights to `solve` as hyperparameters, and return what it trained."
    )


def _cost(derivative: Callable, measured: Measured) -> float:
    """Of values and derivatives of all measurements, in trainings, by counted operations."""
    args = measured.ones, measured.key
    counts = [count_arithmetic(f, *args, unknown_length=UNKNOWN_LENGTH) for f in (derivative, measured)]
    return counts[0] / max(counts[1], 1.0)


def _foretells(found: Attribution, measured: Measured, checks: int) -> float:
    """The mean correlation, over measurements, of foretold and real ones; warns where it is low."""
    kept = measured.without(CHECKED, checks, CHECKS)
    pairs = zip(found.predict(kept).T, measured.retrain(kept, measured.key).T, strict=True)
    pairs = [pair for pair in pairs if any(map(np.ptp, pair))]  # the others stay, as foretold
    with np.errstate(invalid="ignore", divide="ignore"):  # where one of the two does not move: zero
        correlation = float(np.mean([np.nan_to_num(np.corrcoef(*pair)[0, 1]) for pair in pairs])) if pairs else np.nan
    if not correlation >= GOOD:
        warn(
            f"The scores foretell what {checks} retrainings without a random 5 % of the examples do with correlation "
            f"{correlation:.2f}, below {GOOD}. Where the derivative rule is approximate, try `Unroll()`. Else training "
            f"is too rough to be foretold by its derivative; what helps, in this order, is {REMEDIES}. `jaxhpo.lds` "
            "measures it more closely."
        )
    return correlation
