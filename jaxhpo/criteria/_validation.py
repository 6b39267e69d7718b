"""Losses on examples that training has not seen."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.types import PyTree
from jaxhpo._core.validate import check_callable, check_count, describe

FIT = "fit(hparams, weights)"
LOSSES = "losses(trained, hparams)"


def folds(num_examples: int, k: int = 5, *, seed: int = 0, stratify: Any = None) -> np.ndarray:
    """Masks of k folds, drawn at random: each example is held out in one of them.

    Args:
      num_examples: n.
      k: folds, of n / k examples, rounded up or down.
      seed: of the random order, an integer ≥ 0.
      stratify: n labels; each fold then has its share of each, up to one example. None does not look at labels.

    Returns:
      Shape (k, n): 1 where an example is held out, else 0.

    Raises:
      JaxhpoError: fewer examples than folds, another seed, as many labels as examples are not, or one that is missing.

    Example:
      >>> masks = jaxhpo.criteria.folds(10, 5)
      >>> print(masks.shape, masks.sum(0))
      (5, 10) [1. 1. 1. 1. 1. 1. 1. 1. 1. 1.]
    """
    check_count("num_examples", num_examples)
    check_count("k", k, 2)
    check_count("seed", seed, 0)
    if k > num_examples:
        raise JaxhpoError(f"`k` got {k} folds for {num_examples} examples: write {num_examples} or fewer.")
    order = np.random.default_rng(seed).permutation(num_examples)
    if stratify is not None:
        labels = np.asarray(stratify)
        if labels.shape != (num_examples,):
            raise JaxhpoError(
                f"`stratify` got {describe(stratify)}: write one label for each of {num_examples} examples."
            )
        missing = [i for i, label in enumerate(labels.tolist()) if _is_missing(label)]
        if missing:
            raise JaxhpoError(
                f"`stratify` has no label (None or NaN) for {len(missing)} examples, the first at {missing[0]}, which "
                "are of no class: write a label of their own there, such as 'unknown', or leave them away."
            )
        labels = labels.astype(str) if labels.dtype == object else labels  # of several types there is no order
        order = order[np.argsort(labels[order], kind="stable")]  # dealt out class by class
    fold = np.empty(num_examples, int)
    fold[order] = np.arange(num_examples) % k
    return np.eye(k)[:, fold]


def _is_missing(label) -> bool:
    try:
        return label is None or bool(label != label)  # NaN, NaT
    except TypeError:  # pandas.NA
        return True


def check_losses(values: Any, weights: Any) -> jax.Array:
    """Raises unless there is a loss for each weighted example; returns them."""
    if jnp.ndim(weights) != 1 or jnp.shape(values) != jnp.shape(weights):
        raise JaxhpoError(
            f"`losses` returned shape {jnp.shape(values)}, but the examples' weights have shape {jnp.shape(weights)}: "
            "write one loss and one weight for each of them, shape (n,), without a sum or a mean."
        )
    return jnp.asarray(values)


@dataclasses.dataclass(frozen=True, eq=False)
class CrossValidation:
    """The mean loss on held-out examples, as a function of the hyperparameters; made by `cross_validation`.

    Args:
      fit: as given.
      losses: as given.
      masks: as given, shape (k, n).

    Example:
      >>> fit = lambda h, weights: weights @ jnp.arange(4.0) / weights.sum()      # trained: a mean of the rest
      >>> losses = lambda mean, h: (mean - jnp.arange(4.0)) ** 2
      >>> cv = jaxhpo.criteria.cross_validation(fit, losses, jnp.eye(4))
      >>> print(f"{cv(None):.3f}", cv.by_fold(None).round(2))
      2.222 [4.   0.44 0.44 4.  ]
    """

    fit: Callable
    losses: Callable
    masks: Any

    def __call__(self, hparams: PyTree) -> jax.Array:
        """The mean over all held-out examples: of folds of equal size, the mean over folds."""
        counts = jnp.asarray(self.masks).astype(jnp.result_type(float)).sum(1)
        return jnp.sum(self.by_fold(hparams) * counts) / counts.sum()

    def by_fold(self, hparams: PyTree) -> jax.Array:
        """The mean loss of each fold, shape (k,): their spread is an error bar of the mean, if a narrow one."""

        def fold(mask):
            values = check_losses(self.losses(self.fit(hparams, 1 - mask), hparams), mask)
            return jnp.where(mask > 0, values * mask, 0).sum() / mask.sum()  # of the others a NaN is none of its own

        masks = jnp.asarray(self.masks)
        return jax.vmap(fold)(masks.astype(jnp.result_type(float)))


def cross_validation(fit: Callable, losses: Callable, masks: Any) -> CrossValidation:
    r"""k-fold cross-validation: :math:`\frac1n \sum_f \sum_{i \in f} \ell_i(\theta_{-f}(h), h)`.

    The folds are trained together, by `vmap` over their masks, which keep all shapes alike. `fit` trains on weighted
    examples, in whatever way: full batches, by a loss with weights; minibatches drawn among the examples of weight 1
    (`jax.random.choice(key, n, shape, p=weights / weights.sum())`), which batch norm needs; models with state, which is
    then a part of `trained`.

    **Cost and bias**: k trainings, and k times the memory of one. The models have seen n (k − 1) / k examples, so that
    the loss is that of a slightly smaller data set; minimised over many hyperparameters, it is too low.

    Args:
      fit: `(hparams, weights) -> trained`, weights of shape (n,): 1 where an example is in training, 0 where it is not.
        Within it, `jaxhpo.solve`; its rule is how the criterion is differentiated. `trained` is any pytree.
      losses: `(trained, hparams) -> (n,)`, the loss of each example.
      masks: shape (k, n), 1 where an example is held out, as `folds` makes them. k = n is leave-one-out.

    Returns:
      A function of the hyperparameters, with `by_fold(hparams)` beside it.

    Raises:
      JaxhpoError: a function of another signature; masks that are no matrix of 0 and 1, or with a fold that holds out
        nothing or everything.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (40, 3))
      >>> y = x @ jnp.array([1.0, 0.0, 0.0])
      >>> solver = jaxhpo.from_optax(lambda w, h, b: b @ (x @ w - y) ** 2 / b.sum() + h @ w**2, optax.sgd(0.1))
      >>> def fit(h, weights):
      ...     start = solver.init(jnp.zeros(3), h)
      ...     return jaxhpo.solve(solver, start, h, lambda t: weights, num_steps=50).params
      >>> masks = jaxhpo.criteria.folds(40, 5)
      >>> cv = jaxhpo.criteria.cross_validation(fit, lambda w, h: (x @ w - y) ** 2, masks)
      >>> print((jax.grad(cv)(jnp.full(3, 0.1)) > 0).tolist())  # which penalties should fall
      [True, False, False]

    References:
      Stone. Cross-Validatory Choice and Assessment of Statistical Predictions. 1974.
    """
    check_callable("fit", fit, FIT, 2)
    check_callable("losses", losses, LOSSES, 2)
    if jnp.ndim(masks) != 2:
        raise JaxhpoError(
            f"`masks` got {describe(masks)}: write an array of shape (folds, examples), as of `folds(n, k)`."
        )
    if not isinstance(masks, Tracer):
        held = np.asarray(masks)
        if not np.isin(held, (0, 1)).all():
            raise JaxhpoError(
                "`masks` has entries other than 0 (in training) and 1 (held out): weigh examples in `fit`."
            )
        if not (held.any(1) & (held == 0).any(1)).all():
            raise JaxhpoError("`masks` has a fold that holds out nothing, or everything: leave it away.")
    return CrossValidation(fit, losses, masks)


def hold_out(fit: Callable, losses: Callable, mask: Any) -> Callable[[PyTree], jax.Array]:
    """The mean loss on one set of held-out examples: cross-validation of one fold.

    **Cost and bias**: one training.

    Args:
      fit: as for `cross_validation`.
      losses: as for `cross_validation`.
      mask: shape (n,), 1 where an example is held out.

    Returns:
      A function of the hyperparameters.

    Raises:
      JaxhpoError: as for `cross_validation`.

    Example:
      >>> fit = lambda h, weights: weights @ jnp.arange(4.0) / weights.sum()
      >>> losses = lambda mean, h: (mean - jnp.arange(4.0)) ** 2
      >>> outer_loss = jaxhpo.criteria.hold_out(fit, losses, jnp.array([0, 0, 0, 1]))
      >>> print(outer_loss(None))
      4.0
    """
    return cross_validation(fit, losses, jnp.asarray(mask)[None])
