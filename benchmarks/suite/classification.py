"""Logistic and softmax regression: convex."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_breast_cancer, load_wine

import jaxhpo.data
import jaxhpo.testing
from suite.problem import Problem, arrays, bilevel, by, corrupted, cross_entropies, full, minibatches, tabular
from suite.regression import closed_form


def linear(params, inputs):
    return inputs @ params["weights"] + params["bias"][None]


def error(params, h, data):
    return cross_entropies(linear(params, data.inputs), data.targets).mean()


def start(features: int, classes: int) -> dict:
    return {"weights": full(0.0, features, classes), "bias": full(0.0, classes)}


def breast_cancer(seed: int) -> Problem:
    def loss(w, h, data):
        z = data.inputs @ w
        return jnp.mean(jax.nn.softplus(z) - data.targets * z)

    return bilevel(
        "logistic regression of breast cancer, a penalty for every feature",
        by(optax.sgd(0.2, 0.9)),
        tabular(load_breast_cancer, seed, 150, 150),
        full(0.0, 30),
        full(np.log(0.02), 30),
        train_loss=lambda w, h, data: loss(w, h, data) + 0.5 * jnp.sum(jnp.exp(h) * w**2),
        loss=loss,
        num_steps=400,
        step_size=0.2,
        outer_rate=0.1,
        convex=True,
        converged=True,
    )


def wine(seed: int) -> Problem:
    def train_loss(params, h, data):
        penalty = jnp.sum(jnp.exp(h) * params["weights"] ** 2) + 0.01 * jnp.sum(params["bias"] ** 2)
        return error(params, h, data) + 0.5 * penalty

    return bilevel(
        "softmax regression of wines, a penalty for every weight",
        by(optax.sgd(0.3, 0.9)),
        tabular(load_wine, seed, 60, 50),
        start(13, 3),
        full(np.log(0.02), 13, 3),
        train_loss=train_loss,
        loss=error,
        num_steps=400,
        step_size=0.3,
        outer_rate=0.1,
        convex=True,
        converged=True,
    )


def digits_noisy(seed: int) -> Problem:
    """The weight of an example is 2 sigmoid(h)."""
    parts = jaxhpo.data.digits(seed, train=200, validation=200)
    wrong = corrupted(parts.train.targets, seed, 0.3, lambda rng, y: rng.integers(0, 10, y.shape, np.int32))
    parts = arrays(parts._replace(train=parts.train._replace(targets=wrong)))

    def train_loss(params, h, data):
        weighted = 2 * jax.nn.sigmoid(h) * cross_entropies(linear(params, data.inputs), data.targets)
        return jnp.mean(weighted) + 0.005 * jnp.sum(params["weights"] ** 2)

    return bilevel(
        "softmax regression of digits with wrong labels, a weight for every example",
        by(optax.sgd(0.3, 0.9)),
        parts,
        start(64, 10),
        full(0.0, 200),
        train_loss=train_loss,
        loss=error,
        num_steps=60,
        step_size=0.3,
        outer_rate=0.2,
        convex=True,
        converged=False,
    )


def digits_smoothing(seed: int) -> Problem:
    """Targets are (1 − s) one-hot + s/10, with s = sigmoid(h)."""
    parts = jaxhpo.data.digits(seed, train=150, validation=300)
    wrong = corrupted(parts.train.targets, seed, 0.1, lambda rng, y: rng.integers(0, 10, y.shape, np.int32))
    parts = arrays(parts._replace(train=parts.train._replace(targets=wrong)))

    def train_loss(params, h, data):
        targets = optax.smooth_labels(jax.nn.one_hot(data.targets, 10, dtype=float), jax.nn.sigmoid(h["smoothing"]))
        fit = optax.softmax_cross_entropy(linear(params, data.inputs), targets).mean()
        return fit + 0.5 * jnp.exp(h["log_penalty"]) * jnp.sum(params["weights"] ** 2)

    return bilevel(
        "softmax regression of digits by Adam, label smoothing and the penalty",
        by(optax.adam(0.02, eps_root=1e-6)),
        parts,
        start(64, 10),
        {"smoothing": full(-3.0), "log_penalty": full(np.log(1e-4))},
        train_loss=train_loss,
        loss=error,
        num_steps=150,
        step_size=0.3,
        outer_rate=0.1,
        convex=True,
        converged=False,
        batches=minibatches(parts.train, seed, 150, 50),
    )


logistic = functools.partial(
    closed_form, jaxhpo.testing.logistic, "logistic regression, a penalty for every weight", 300
)

PROBLEMS = {
    "logistic": functools.partial(closed_form, jaxhpo.testing.logistic, "logistic regression", 300),
    "breast-cancer": breast_cancer,
    "wine": wine,
    "digits-noisy": digits_noisy,
    "digits-smoothing": digits_smoothing,
}
