"""Trainings that cross-validation takes: minibatches of a plain loss, and of models with batch norm."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxhpo
from jaxhpo import criteria

N, K = 24, 3
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, 3))
Y = np.sin(X[:, 0]) + 0.1 * RNG.normal(size=N)
MASKS = criteria.folds(N, K)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(4, param_dtype=float)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.8, param_dtype=float)(x)
        return nn.Dense(1, param_dtype=float)(nn.tanh(x))[:, 0]


class BatchNorm(nnx.BatchNorm):  # of the recipe: running statistics that have a derivative
    def __call__(self, x):
        mean, var, m = self.mean[...], self.var[...], self.momentum
        normalised = super().__call__(x)
        if not self.use_running_average:
            self.mean[...], self.var[...] = m * mean + (1 - m) * x.mean(0), m * var + (1 - m) * x.var(0)
        return normalised


def linear():
    """Parameters, a state, and apply, which gives outputs and the new state."""
    return jnp.zeros(3), (), lambda params, state, x, train: (x @ params, state)


def linen():
    net = Linen()
    start = net.init(jax.random.key(0), X, train=False)

    def apply(params, state, x, train):
        out, new = net.apply({"params": params, "batch_stats": state}, x, train=train, mutable="batch_stats")
        return out, new["batch_stats"]

    return start["params"], jax.tree.map(lambda s: s.astype(float), start["batch_stats"]), apply


def flax_nnx():
    rngs = nnx.Rngs(0)
    layers = nnx.Linear(3, 4, param_dtype=float, rngs=rngs), BatchNorm(4, momentum=0.8, param_dtype=float, rngs=rngs)
    net = nnx.Sequential(*layers, nnx.tanh, nnx.Linear(4, 1, param_dtype=float, rngs=rngs))
    graph, params, rest = nnx.split(net, nnx.Param, ...)

    def apply(params, state, x, train):
        net = nnx.merge(graph, params, state)
        net.train() if train else net.eval()
        return net(x)[:, 0], nnx.split(net, nnx.Param, ...)[2]

    return params, jax.tree.map(lambda s: s.astype(float), rest), apply


@pytest.mark.slow
@pytest.mark.parametrize("model", [linear, linen, flax_nnx])
def test_minibatches_and_models_with_state(model):
    """Against a training for each fold, without `vmap`. Training never meets the rows held out, which are NaN there."""
    params, state, apply = model()

    def train_loss(params, h, batch, state):
        x, y = batch
        out, state = apply(params, state, x, True)
        return jnp.mean((out - y) ** 2) + jnp.exp(h) * sum(jnp.sum(p**2) for p in jax.tree.leaves(params)), state

    solver = jaxhpo.from_optax(train_loss, optax.sgd(0.1), has_state=True)

    def fit(h, weights):
        seen = jnp.where(weights[:, None] > 0, jnp.column_stack([X, Y]), jnp.nan)

        def batch(t):
            key = jax.random.fold_in(jax.random.key(0), t)
            rows = jax.random.choice(key, N, (6,), p=weights / weights.sum())
            return seen[rows, :3], seen[rows, 3]

        found = jaxhpo.solve(solver, solver.init(params, h, state), h, batch, num_steps=12)
        return found.params, found.model_state

    def losses(trained, h):
        return (apply(*trained, jnp.asarray(X), False)[0] - Y) ** 2

    cv, h = criteria.cross_validation(fit, losses, MASKS), jnp.array(-3.0)
    one = jax.jit(lambda h, mask: losses(fit(h, 1 - mask), h))
    expected = [np.mean(np.asarray(one(h, mask))[mask == 1]) for mask in MASKS]
    np.testing.assert_allclose(jax.jit(cv.by_fold)(h), expected, rtol=1e-9)
    assert jaxhpo.check_hypergradient(cv, h).relative_error < 1e-6
    if state:
        _, statistics = fit(h, 1 - MASKS[0])
        assert any(
            np.abs(new - old).max() > 1e-2 for new, old in zip(*map(jax.tree.leaves, (statistics, state)), strict=True)
        )
