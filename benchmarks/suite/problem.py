"""A problem of the suite, and how one is made."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxhpo
from jaxhpo.data import Examples, Split, split

PyTree = Any


class Problem(NamedTuple):
    """A bilevel problem; arrays have JAX's default type of floats.

    Attributes:
      name: as in `NAMES`.
      title: one line.
      make_outer_loss: `adjoint -> (hparams -> scalar)`, deterministic; random rules draw from a fixed key.
      train: `hparams -> params`, the plain training.
      train_loss: `(params, hparams) -> scalar`, on all training data.
      test_loss: `hparams -> scalar`, the trained model's loss on data that neither of the two losses saw; None without.
      hparams: the start of the outer optimisation, unconstrained: logarithms of positive ones.
      params: the inner start at `hparams`.
      num_steps: inner steps T.
      step_size: at which gradient descent on the train loss is stable at `hparams`.
      outer_rate: of an Adam that makes progress in 60 steps.
      convex: whether the train loss is convex in the parameters.
      converged: whether the norm of its gradient falls by 1e-4 or more in the T steps at `hparams`.
      condition: condition number of the Hessian, for quadratic train losses.
    """

    name: str
    title: str
    make_outer_loss: Callable[[Any], Callable[[PyTree], jax.Array]]
    train: Callable[[PyTree], PyTree]
    train_loss: Callable[[PyTree, PyTree], jax.Array]
    test_loss: Callable[[PyTree], jax.Array] | None
    hparams: PyTree
    params: PyTree
    num_steps: int
    step_size: float
    outer_rate: float
    convex: bool
    converged: bool
    condition: float | None = None


def bilevel(title, solver, parts, params, hparams, *, train_loss, loss, num_steps, step_size, **settings) -> Problem:
    """Make a `Problem`, as yet without a name.

    Args:
      title: one line.
      solver: `train_loss -> Solver`.
      parts: training, validation and test data; None without test data.
      params: the inner start, or a function of `hparams`.
      hparams: where the outer optimisation starts.
      train_loss: `(params, hparams, part of the training data) -> scalar`.
      loss: `(params, hparams, data) -> scalar`, for validation and test.
      num_steps: inner steps T.
      step_size: of a `Problem`.
      settings: the other attributes of a `Problem`, and `batches`: minibatches, with a leading axis T; otherwise every
        step sees all training data.
    """
    train_part, validation, test = parts
    start = params if callable(params) else lambda hparams: params
    batches = settings.pop("batches", None)
    everything = None if batches is None else train_part

    def on(params, hparams, batch):
        return train_loss(params, hparams, train_part if batch is None else batch)

    inner = solver(on)

    def train(hparams, adjoint=jaxhpo.Unroll()):  # noqa: B008 (a frozen dataclass)
        state = inner.init(start(hparams), hparams)
        inputs = {"num_steps": num_steps, "condition_batch": everything, "key": jax.random.key(0)}
        return jaxhpo.solve(inner, state, hparams, batches, adjoint=adjoint, **inputs).params

    return Problem(
        name="",
        title=title,
        make_outer_loss=lambda adjoint: lambda hparams: loss(train(hparams, adjoint), hparams, validation),
        train=train,
        train_loss=lambda params, hparams: on(params, hparams, None),
        test_loss=None if test is None else lambda hparams: loss(train(hparams), hparams, test),
        hparams=hparams,
        params=start(hparams),
        num_steps=num_steps,
        step_size=step_size,
        **settings,
    )


def by(tx) -> Callable:
    """An optimiser of optax, or `hparams -> optimiser`, as the `solver` of `bilevel`."""
    return lambda train_loss: jaxhpo.from_optax(train_loss, tx)


def arrays(tree: PyTree) -> PyTree:
    """JAX's arrays, with floats of its default type and integers of 32 bits."""
    return jax.tree.map(lambda x: jnp.asarray(x, float if np.issubdtype(x.dtype, np.floating) else np.int32), tree)


def full(value: float, *shape: int) -> jax.Array:
    return jnp.asarray(np.full(shape, value), float)


def tabular(load: Callable, seed: int, train: int, validation: int, features: Callable = np.asarray) -> Split:
    """A table of scikit-learn's, its features (and targets, if real) standardised by the training rows."""
    x, y = map(np.asarray, load(return_X_y=True))
    parts = split(Examples(features(x), y), seed, train=train, validation=validation, test=None)
    mean, spread = parts.train.inputs.mean(0), parts.train.inputs.std(0) + 1e-9
    real = np.issubdtype(y.dtype, np.floating)
    shift, scale = (parts.train.targets.mean(), parts.train.targets.std()) if real else (0, 1)
    return Split(
        *(
            arrays(Examples((part.inputs - mean) / spread, (part.targets - shift) / scale if real else part.targets))
            for part in parts
        )
    )


def corrupted(targets, seed: int, share: float, other: Callable) -> np.ndarray:
    """Targets with a random share of them replaced by `other(rng, targets)`."""
    rng = np.random.default_rng(seed)
    return np.where(rng.uniform(size=targets.shape) < share, other(rng, targets), targets)


def minibatches(part: PyTree, seed: int, num_steps: int, size: int) -> PyTree:
    """Minibatches of a part, drawn with replacement, with a leading axis `num_steps`."""
    total = len(jax.tree.leaves(part)[0])
    rows = np.random.default_rng(seed).integers(0, total, (num_steps, size))
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[rows]), part)


def cross_entropies(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
