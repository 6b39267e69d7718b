"""Shared by attribution and its tests: the user's training as one function of the weights, and retrainings."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo._core.errors import JaxhpoError, NonFiniteError
from jaxhpo._core.processes import whole
from jaxhpo._core.tree import map_in_chunks
from jaxhpo._core.validate import check_callable, check_count, check_key, check_positive, describe, is_real_float
from jaxhpo._diagnostics.not_finite import diagnose

# What a key is folded with, so that what is drawn is independent of what `jax.random.split(key)` gives to the user.
SEEDS, SUBSETS, DROPS, CHECKS = range(0x5EED0, 0x5EED4)


class Measured:
    """`(weights, key) -> measurements` of the user's training; checks the arguments that `attribution` describes."""

    def __init__(self, train: Callable, measure: Callable, num_examples: int, key: Any, batch_size: int | None):
        self.takes_key = _takes_key(train)
        check_callable("train", train, "train(weights)", 1 + self.takes_key, " or `train(weights, key)`")
        check_callable("measure", measure, "measure(trained)", 1)
        check_count("num_examples", num_examples, 2)
        if batch_size is not None:
            check_count("batch_size", batch_size)
        self.train, self.measure, self.n = train, measure, num_examples
        self.key = jax.random.key(0) if key is None else check_key(key)
        self.ones = jnp.ones(num_examples)
        self._retrain = jax.jit(lambda kept, key: map_in_chunks(lambda w: self(w, key), kept, batch_size))

    def __call__(self, weights: jax.Array, key: Any) -> jax.Array:
        """The measurements, of shape (m,)."""
        values = self.measure(self.train(weights, key) if self.takes_key else self.train(weights))
        if not isinstance(values, jax.Array) or not is_real_float(values) or values.ndim > 1:
            raise JaxhpoError(
                f"`measure(trained)` returned {describe(values)}, but each measurement is differentiated: return real "
                "floating-point numbers of shape (m,), such as the margins or the losses of m test examples."
            )
        return jnp.atleast_1d(values)

    def seed(self, number: int) -> Any:
        """The key of a training; that of number 0 is the key that was given."""
        return jax.random.fold_in(jax.random.fold_in(self.key, SEEDS), number) if number else self.key

    def without(self, drop: float, draws: int, kind: int) -> np.ndarray:
        """Weights of 0 and 1, of shape (draws, n), each without a random part of the examples."""
        order_key = jax.random.fold_in(jax.random.fold_in(self.key, kind), self.dropped(drop))
        keys = jax.random.split(order_key, draws)
        orders = jax.vmap(lambda key: jax.random.permutation(key, self.n))(keys)
        return np.asarray(orders >= self.dropped(drop), self.ones.dtype)

    def dropped(self, drop: float) -> int:
        """The number of examples that are a part of all: at least one, and not all."""
        check_positive("drop", drop)
        if drop >= 1:
            raise JaxhpoError(f"`drop` got {drop}, but it is a part of the examples: write a number below 1.")
        return min(max(1, round(drop * self.n)), self.n - 1)

    def retrain(self, kept: np.ndarray, key: Any) -> np.ndarray:
        """Trains with each row of weights; returns the measurements, of shape (rows, m)."""
        values = whole(self._retrain(jnp.asarray(kept), key))
        self.raise_unless_finite(kept, values, key)
        return np.asarray(values, float)

    def raise_unless_finite(self, weights: Any, values: np.ndarray, key: Any) -> None:
        """Raises where measurements, or their derivatives, (rows, m, ...) for rows of weights, are not finite."""
        if np.isfinite(values).all():
            return
        row, j, *_ = np.argwhere(~np.isfinite(values))[0]
        what = "with all examples" if np.all(weights[row] == 1) else f"without {int(np.sum(weights[row] == 0))} of them"
        diagnosis = diagnose(lambda w: self(w, key)[j], jnp.asarray(weights[row]))
        raise NonFiniteError(f"Measurement {j}, or its derivative, is not finite where trained {what}. {diagnosis}")


def _takes_key(train: Any) -> bool:
    """Returns whether exactly two positional arguments are required."""
    try:
        parameters = inspect.signature(train).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters) == 2
