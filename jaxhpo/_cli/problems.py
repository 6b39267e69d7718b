"""The ready-made problems of `jaxhpo compare`, and its methods by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxhpo
import jaxhpo.data
import jaxhpo.models
import jaxhpo.testing


class Ready(NamedTuple):
    """A problem to compare methods on.

    Attributes:
      title: what it is, in a line.
      make_outer_loss: `adjoint -> (hparams -> scalar)`.
      hparams: where to compare.
      num_steps: inner steps T.
      step_size: of the inner gradient descent, for the methods that want one.
      num_params: of the inner problem.
    """

    title: str
    make_outer_loss: Callable[[Any], Callable[[Any], jax.Array]]
    hparams: Any
    num_steps: int
    step_size: float
    num_params: int


def _of_known_form(problem: jaxhpo.testing.BilevelProblem, title: str, num_steps: int) -> Ready:
    """A problem of `jaxhpo.testing`, by gradient descent."""
    solver = jaxhpo.from_optax(problem.train_loss, optax.sgd(problem.step_size))
    params, hparams = jnp.asarray(problem.params), jnp.asarray(problem.hparams)
    return _ready(title, solver, params, problem.val_loss, hparams, num_steps, problem.step_size)


def _ready(title, solver, params, val_loss, hparams, num_steps, step_size, batches=None) -> Ready:
    def make_outer_loss(adjoint):
        def outer_loss(hparams):
            state, key = solver.init(params, hparams), jax.random.key(0)  # the key is for randomised rules
            solution = jaxhpo.solve(solver, state, hparams, batches, num_steps=num_steps, key=key, adjoint=adjoint)
            return val_loss(solution.params)

        return outer_loss

    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return Ready(title, make_outer_loss, hparams, num_steps, step_size, size)


def ridge(seed: int, num_steps: int = 200) -> Ready:
    """Ridge regression with a log penalty for every weight; training converges."""
    title = "ridge regression, a penalty for every weight"
    return _of_known_form(jaxhpo.testing.ridge(seed), title, num_steps)


def logistic(seed: int, num_steps: int = 300) -> Ready:
    """Logistic regression with a log penalty for every weight; training converges."""
    title = "logistic regression, a penalty for every weight"
    return _of_known_form(jaxhpo.testing.logistic(seed), title, num_steps)


def mlp(seed: int, num_steps: int = 100) -> Ready:
    """A network 64-16-10 on scikit-learn's digits: a log penalty for every layer, and the log learning rate."""
    parts = jaxhpo.data.digits(seed, train=200, validation=300)
    dtype = jnp.result_type(float)  # float64 where that is switched on
    train, validation = ((jnp.asarray(part.inputs, dtype), jnp.asarray(part.targets)) for part in parts[:2])
    model = jaxhpo.models.MLP((16, 10))
    params = model.init(jax.random.key(seed), jnp.zeros((1, 64)))["params"]
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    rows = jnp.asarray(np.random.default_rng(seed).integers(0, 200, (num_steps, 50)))

    def loss(params, inputs, targets):
        logits: Any = model.apply({"params": params}, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def train_loss(params, hparams, batch):
        penalties = [
            jnp.exp(log_penalty) * jnp.sum(params[layer]["kernel"] ** 2)
            for layer, log_penalty in hparams["log_penalty"].items()
        ]
        return loss(params, *batch) + 0.5 * sum(penalties)

    def rate(hparams, step):
        del step
        return jnp.exp(hparams["log_rate"])

    hparams = {"log_penalty": {layer: jnp.log(0.01) for layer in params}, "log_rate": jnp.log(0.1)}
    solver = jaxhpo.momentum_sgd(train_loss, rate, 0.9)
    batches = jax.tree.map(lambda array: array[rows], train)
    title = "a network 64-16-10 on handwritten digits, a penalty for every layer and the learning rate"
    return _ready(title, solver, params, lambda p: loss(p, *validation), hparams, num_steps, 0.1, batches)


def hard(seed: int, num_steps: int = 20) -> Ready:
    r"""A factorisation broken off at a saddle: the Hessian is indefinite and training has not converged.

    .. math:: L = \tfrac12\|UV^\top - M\|^2 + \tfrac12\sum_j e^{h_j} (\|U_j\|^2 + \|V_j\|^2)

    from U, V ≈ 0, where the Hessian is that of :math:`-\langle UV^\top, M\rangle`: as many negative as positive
    curvatures.
    """
    rng = np.random.default_rng(seed)
    size, rank = 6, 3
    truth = rng.normal(size=(size, rank)) @ rng.normal(size=(rank, size)) / size**0.5
    target, held_out = (jnp.asarray(truth + 0.3 * rng.normal(size=(size, size))) for _ in range(2))
    params = {name: jnp.asarray(0.1 * rng.normal(size=(size, rank))) for name in ("U", "V")}

    def train_loss(params, hparams, batch):
        del batch
        sizes = jnp.sum(params["U"] ** 2 + params["V"] ** 2, axis=0)
        return 0.5 * jnp.sum((params["U"] @ params["V"].T - target) ** 2) + 0.5 * jnp.sum(jnp.exp(hparams) * sizes)

    def val_loss(params):
        return 0.5 * jnp.sum((params["U"] @ params["V"].T - held_out) ** 2)

    solver = jaxhpo.from_optax(train_loss, optax.sgd(0.05))
    title = "a matrix factorisation broken off near a saddle, a penalty for every factor"
    return _ready(title, solver, params, val_loss, jnp.linspace(-2.0, -1.0, rank), num_steps, 0.05)


PROBLEMS = {"ridge": ridge, "logistic": logistic, "mlp": mlp, "hard": hard}

METHODS: dict[str, Callable[[Ready], Any]] = {
    "unroll": lambda problem: jaxhpo.Unroll(),
    "unroll-plain": lambda problem: jaxhpo.Unroll(checkpoint=None),
    "truncated": lambda problem: jaxhpo.Unroll(truncate=max(1, problem.num_steps // 10)),
    "forward": lambda problem: jaxhpo.Forward(),
    "reversible": lambda problem: jaxhpo.Reversible(),
    "drmad": lambda problem: jaxhpo.DrMAD(),
    "finite-difference": lambda problem: jaxhpo.FiniteDifference(problem.step_size),
    "sama": lambda problem: jaxhpo.SAMA(),
    "forward-gradient": lambda problem: jaxhpo.ForwardGradient(4),
    "smoothing": lambda problem: jaxhpo.Smoothing(4, 0.01),
    "cg": lambda problem: jaxhpo.Implicit(jaxhpo.CG()),
    "neumann": lambda problem: jaxhpo.Implicit(jaxhpo.Neumann(20, problem.step_size)),
    "identity": lambda problem: jaxhpo.Implicit(jaxhpo.Identity(problem.step_size)),
    "nystrom": lambda problem: jaxhpo.Implicit(jaxhpo.Nystrom(min(10, problem.num_params), 0.01)),
    "gmres": lambda problem: jaxhpo.Implicit(jaxhpo.GMRES()),
    "direct": lambda problem: jaxhpo.Implicit(jaxhpo.Direct()),
}
USUAL = ("unroll", "unroll-plain", "truncated", "forward", "cg", "neumann", "identity")
