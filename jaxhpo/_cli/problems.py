"""The problems and methods of `jaxhpo compare`, by name."""

import functools
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
from jaxhpo._cli.demo_experiment import cross_entropy


class CompareProblem(NamedTuple):
    """A problem to compare methods on.

    Attributes:
      title: a description in one line.
      make_outer_loss: `adjoint -> (hparams -> scalar)`.
      hparams: the hyperparameters at which methods are compared.
      num_steps: inner steps T.
      step_size: of the inner gradient descent, for the methods that need one.
      num_params: number of inner parameters.
    """

    title: str
    make_outer_loss: Callable[[Any], Callable[[Any], jax.Array]]
    hparams: Any
    num_steps: int
    step_size: float
    num_params: int


def _problem(title, solver, params, val_loss, hparams, num_steps, step_size, batches=None) -> CompareProblem:
    def make_outer_loss(adjoint):
        def outer_loss(hparams):
            state, key = solver.init(params, hparams), jax.random.key(0)  # randomised rules draw from the key
            solution = jaxhpo.solve(solver, state, hparams, batches, num_steps=num_steps, key=key, adjoint=adjoint)
            return val_loss(solution.params)

        return outer_loss

    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return CompareProblem(title, make_outer_loss, hparams, num_steps, step_size, size)


def _regression(problem: jaxhpo.testing.BilevelProblem, title: str, num_steps: int) -> CompareProblem:
    solver = jaxhpo.from_optax(problem.train_loss, optax.sgd(problem.step_size))
    params, hparams = jnp.asarray(problem.params), jnp.asarray(problem.hparams)
    return _problem(title, solver, params, problem.val_loss, hparams, num_steps, problem.step_size)


def ridge(seed: int, num_steps: int = 200) -> CompareProblem:
    """Ridge regression with a log penalty per weight; training converges."""
    return _regression(jaxhpo.testing.ridge(seed), "ridge regression, a penalty for every weight", num_steps)


def logistic(seed: int, num_steps: int = 300) -> CompareProblem:
    """Logistic regression with a log penalty per weight; training converges."""
    return _regression(jaxhpo.testing.logistic(seed), "logistic regression, a penalty for every weight", num_steps)


def mlp(seed: int, num_steps: int = 100) -> CompareProblem:
    """A network 64-16-10 on scikit-learn's digits, with a log penalty per layer and the log learning rate."""
    parts = jaxhpo.data.digits(seed, train=200, validation=300)
    dtype = jnp.result_type(float)  # float64 under x64
    train, validation = ((jnp.asarray(part.inputs, dtype), jnp.asarray(part.targets)) for part in parts[:2])
    model = jaxhpo.models.MLP((16, 10))
    params = model.init(jax.random.key(seed), jnp.zeros((1, 64)))["params"]
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    rows = jnp.asarray(np.random.default_rng(seed).integers(0, 200, (num_steps, 50)))

    def train_loss(params, hparams, batch):
        penalties = [jnp.exp(p) * jnp.sum(params[layer]["kernel"] ** 2) for layer, p in hparams["log_penalty"].items()]
        return cross_entropy(model, params, *batch) + 0.5 * sum(penalties)

    hparams = {"log_penalty": {layer: jnp.log(0.01) for layer in params}, "log_rate": jnp.log(0.1)}
    solver = jaxhpo.momentum_sgd(train_loss, lambda hparams, step: jnp.exp(hparams["log_rate"]), 0.9)
    batches = jax.tree.map(lambda array: array[rows], train)
    title = "a network 64-16-10 on handwritten digits, a penalty for every layer and the learning rate"
    val_loss = functools.partial(cross_entropy, model, images=validation[0], labels=validation[1])
    return _problem(title, solver, params, val_loss, hparams, num_steps, 0.1, batches)


def hard(seed: int, num_steps: int = 20) -> CompareProblem:
    r"""A matrix factorisation stopped at a saddle: the Hessian is indefinite and training has not converged.

    .. math:: L = \tfrac12\|UV^\top - M\|^2 + \tfrac12\sum_j e^{h_j} (\|U_j\|^2 + \|V_j\|^2)

    It starts from U, V ≈ 0, where the Hessian is that of :math:`-\langle UV^\top, M\rangle`, with as many negative as
    positive curvatures.
    """
    rng = np.random.default_rng(seed)
    size, rank = 6, 3
    truth = rng.normal(size=(size, rank)) @ rng.normal(size=(rank, size)) / size**0.5
    target, held_out = (jnp.asarray(truth + 0.3 * rng.normal(size=(size, size))) for _ in range(2))
    params = {name: jnp.asarray(0.1 * rng.normal(size=(size, rank))) for name in ("U", "V")}

    def half_squared_error(params, target):
        return 0.5 * jnp.sum((params["U"] @ params["V"].T - target) ** 2)

    def train_loss(params, hparams, batch):
        del batch
        sizes = jnp.sum(params["U"] ** 2 + params["V"] ** 2, axis=0)
        return half_squared_error(params, target) + 0.5 * jnp.sum(jnp.exp(hparams) * sizes)

    solver = jaxhpo.from_optax(train_loss, optax.sgd(0.05))
    title = "a matrix factorisation stopped near a saddle, a penalty for every factor"
    val_loss = functools.partial(half_squared_error, target=held_out)
    return _problem(title, solver, params, val_loss, jnp.linspace(-2.0, -1.0, rank), num_steps, 0.05)


PROBLEMS = {"ridge": ridge, "logistic": logistic, "mlp": mlp, "hard": hard}

METHODS: dict[str, Callable[[CompareProblem], Any]] = {
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
