"""Linear and kernel regression: convex, with condition numbers from 1 to 1e6."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_diabetes
from sklearn.preprocessing import PolynomialFeatures

import jaxhpo.testing
from jaxhpo.data import Examples
from suite.problem import Problem, arrays, bilevel, by, corrupted, full, tabular


def closed_form(make, title, num_steps, seed) -> Problem:
    """A problem of `jaxhpo.testing`, by gradient descent; there are no test data."""
    given = make(seed)
    return bilevel(
        f"{title}, a penalty for every weight",
        by(optax.sgd(given.step_size)),
        (None, None, None),
        jnp.asarray(given.params, float),
        jnp.asarray(given.hparams, float),
        train_loss=given.train_loss,
        loss=lambda w, h, data: given.val_loss(w),
        num_steps=num_steps,
        step_size=given.step_size,
        outer_rate=0.1,
        convex=True,
        converged=True,
    )


def squared_error(w, h, data):
    return jnp.mean((data.inputs @ w - data.targets) ** 2)


def designed(condition, momentum, num_steps, converged, seed, *, rate=1.0, dim=30, penalties=True) -> Problem:
    r"""Ridge regression whose Hessian at the start has eigenvalues spread evenly in logarithm from 1/condition to 1.

    .. math:: L = \tfrac12\|Xw-y\|^2 + \tfrac12\sum_j e^{h_j} w_j^2, \qquad X = U (\Lambda - e^{h_0} I)^{1/2} Q^\top

    with orthonormal U and Q. Rows of validation and test data are drawn with the covariance of those of X.
    """
    rng = np.random.default_rng(seed)
    rows, penalty = 2 * dim, 0.5 / condition
    basis, left = (np.linalg.qr(rng.normal(size=shape))[0] for shape in ((dim, dim), (rows, dim)))
    root = np.sqrt(np.geomspace(1 / condition, 1, dim) - penalty)[:, None] * basis.T
    truth = rng.permutation(np.geomspace(0.03, 3.0, dim)) * rng.choice([-1.0, 1.0], dim)

    def part(left):
        x = left @ root
        return arrays(Examples(x, x @ truth + 0.3 * rng.normal(size=rows) / rows**0.5))

    parts = part(left), *(part(rng.normal(size=(rows, dim)) / rows**0.5) for _ in range(2))

    def loss(w, h, data):
        return 0.5 * jnp.sum((data.inputs @ w - data.targets) ** 2)

    kind = "a penalty for every weight" if penalties else "one penalty"
    return bilevel(
        f"ridge regression of condition {condition:.0e} in {num_steps} steps, {kind}",
        by(optax.sgd(rate, momentum)),
        parts,
        full(0.0, dim),
        full(np.log(penalty), dim if penalties else 1),
        train_loss=lambda w, h, data: loss(w, h, data) + 0.5 * jnp.sum(jnp.exp(h) * w**2),
        loss=loss,
        num_steps=num_steps,
        step_size=1.0,
        outer_rate=0.1,
        convex=True,
        converged=converged,
        condition=condition,
    )


def diabetes(seed: int) -> Problem:
    """Products of the ten features of the diabetes data, a penalty each."""
    products = PolynomialFeatures(2, include_bias=False).fit_transform
    parts = tabular(load_diabetes, seed, 200, 120, products)
    x = np.asarray(parts.train.inputs, float)
    curvatures = np.linalg.eigvalsh(x.T @ x / len(x)) + 0.05
    dim, rate = x.shape[1], 1 / float(curvatures[-1])
    return bilevel(
        "ridge regression of diabetes on products of features, a penalty for every feature",
        by(optax.sgd(rate, 0.9)),
        parts,
        full(0.0, dim),
        full(np.log(0.05), dim),
        train_loss=lambda w, h, data: 0.5 * (squared_error(w, h, data) + jnp.sum(jnp.exp(h) * w**2)),
        loss=squared_error,
        num_steps=300,
        step_size=rate,
        outer_rate=0.1,
        convex=True,
        converged=True,
        condition=float(curvatures[-1] / curvatures[0]),
    )


def elastic_net(seed: int) -> Problem:
    """Forty features of which five count; |w| is smoothed to √(w² + ε²)."""
    rng, dim, rounding = np.random.default_rng(seed), 40, 0.05
    truth = np.where(np.arange(dim) < 5, 1.0, 0.0)

    def part(rows):
        x = rng.normal(size=(rows, dim))
        return arrays(Examples(x, x @ truth + rng.normal(size=rows)))

    def train_loss(w, h, data):
        penalty = jnp.exp(h["log_l1"]) * jnp.sum(jnp.sqrt(w**2 + rounding**2))
        return 0.5 * squared_error(w, h, data) + penalty + 0.5 * jnp.exp(h["log_l2"]) * jnp.sum(w**2)

    return bilevel(
        "smoothed elastic net, both penalties",
        by(optax.sgd(0.1, 0.9)),
        (part(60), part(60), part(600)),
        full(0.0, dim),
        {"log_l1": full(np.log(0.02)), "log_l2": full(np.log(0.02))},
        train_loss=train_loss,
        loss=squared_error,
        num_steps=300,
        step_size=0.1,
        outer_rate=0.1,
        convex=True,
        converged=True,
    )


def kernel_ridge(seed: int) -> Problem:
    r"""A Gaussian kernel with a scale per feature.

    .. math:: L = \tfrac12\alpha^\top (K_h + e^{h_0} I)\alpha - \alpha^\top y, \qquad f(x) = \sum_i \alpha_i k_h(x, x_i)

    All eigenvalues of K are below its trace n, hence the rate.
    """
    parts, rows = tabular(load_diabetes, seed, 120, 160), 120
    inputs, rate = parts.train.inputs, 1 / (rows + 1.0)

    def kernel(h, x):
        scaled, centres = (a * jnp.exp(h["log_scale"])[None] for a in (x, inputs))
        return jnp.exp(-0.5 * jnp.sum((scaled[:, None] - centres[None]) ** 2, axis=-1))

    def train_loss(alpha, h, data):
        ridge = jnp.exp(h["log_penalty"]) * jnp.sum(alpha**2)
        return 0.5 * (alpha @ kernel(h, data.inputs) @ alpha + ridge) - alpha @ data.targets

    def loss(alpha, h, data):
        return jnp.mean((kernel(h, data.inputs) @ alpha - data.targets) ** 2)

    hparams = {"log_scale": full(np.log(0.2), 10), "log_penalty": full(0.0)}
    curvatures = np.linalg.eigvalsh(np.asarray(kernel(hparams, inputs), float)) + 1.0
    return bilevel(
        "kernel ridge regression of diabetes in dual coefficients, a scale for every feature and the penalty",
        by(optax.sgd(rate, 0.85)),
        parts,
        full(0.0, rows),
        hparams,
        train_loss=train_loss,
        loss=loss,
        num_steps=150,
        step_size=rate,
        outer_rate=0.1,
        convex=True,
        converged=True,
        condition=float(curvatures[-1] / curvatures[0]),
    )


def outliers(seed: int) -> Problem:
    """A fifth of the training targets have large errors; the weight of an example is 2 sigmoid(h)."""
    parts = tabular(load_diabetes, seed, 150, 100)
    targets = corrupted(parts.train.targets, seed, 0.2, lambda rng, y: np.asarray(y) + 4 * rng.normal(size=y.shape))
    parts = parts._replace(train=arrays(parts.train._replace(targets=targets)))

    def train_loss(w, h, data):
        weighted = 2 * jax.nn.sigmoid(h) * (data.inputs @ w - data.targets) ** 2
        return 0.5 * (jnp.mean(weighted) + 0.05 * jnp.sum(w**2))

    return bilevel(
        "linear regression of diabetes with wrong targets, a weight for every example",
        by(optax.sgd(0.1, 0.9)),
        parts,
        full(0.0, 10),
        full(0.0, 150),
        train_loss=train_loss,
        loss=squared_error,
        num_steps=300,
        step_size=0.1,
        outer_rate=0.2,
        convex=True,
        converged=True,
    )


PROBLEMS = {
    "ridge": functools.partial(closed_form, jaxhpo.testing.ridge, "ridge regression", 200),
    "ridge-1": functools.partial(designed, 1.0, None, 30, True, rate=0.5, penalties=False),
    "ridge-1e2": functools.partial(designed, 1e2, 0.8, 200, True),
    "ridge-1e4": functools.partial(designed, 1e4, 0.98, 2000, True),
    "ridge-1e4-short": functools.partial(designed, 1e4, None, 100, False),
    "ridge-1e6": functools.partial(designed, 1e6, None, 300, False),
    "diabetes": diabetes,
    "elastic-net": elastic_net,
    "kernel-ridge": kernel_ridge,
    "outliers": outliers,
}
