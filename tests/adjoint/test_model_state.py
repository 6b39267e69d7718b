"""Model states that the train loss computes behind `stop_gradient`: said where a derivative would need them."""

import importlib.metadata
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import jaxhpo
from jaxhpo import Unroll

X = jax.random.normal(jax.random.key(0), (6, 2))
# How a step makes its new model state, from the old one and a statistic of the parameters.
UPDATES = {
    "stopped": lambda old, new: jax.lax.stop_gradient(0.9 * old + new),
    "stopped in a jitted function": lambda old, new: jax.jit(jax.lax.stop_gradient)(0.9 * old + new),
    "behind what was stopped": lambda old, new: jnp.tanh(old + jax.lax.stop_gradient(new)),
    "differentiable": lambda old, new: 0.9 * old + new,
    "partly stopped": lambda old, new: 0.9 * jax.lax.stop_gradient(old) + new,
    "counter": lambda old, new: old + 1,
    "piecewise constant": lambda old, new: 0.9 * old + jnp.round(new),
}


def outer(update, adjoint=Unroll(), *, read=True, trained_on=False, num_steps=3, start=1.0):  # noqa: B008
    def train_loss(w, h, batch, state):
        scale = state["mean"] if trained_on else 1.0
        loss = jnp.mean((X @ w * scale - 1) ** 2) + jnp.sum(h * w**2)
        return loss, {"calls": state["calls"] + 1, "mean": UPDATES[update](state["mean"], jnp.mean(X @ w))}

    solver = jaxhpo.from_optax(train_loss, optax.sgd(0.1), has_state=True)

    def outer_loss(h):
        state = solver.init(jnp.ones(2), h, {"calls": jnp.array(0), "mean": jnp.asarray(start)})
        sol = jaxhpo.solve(solver, state, h, num_steps=num_steps, adjoint=adjoint)
        return jnp.sum(sol.params**2) + (sol.model_state["mean"] if read else 0.0)

    return outer_loss


def said(fn) -> list[str]:
    """The leaves of which tracing `fn(h)` warns."""
    with warnings.catch_warnings(record=True, action="always", category=jaxhpo.ZeroHypergradientWarning) as caught:
        jax.jit(fn).lower(jnp.ones(2))
    return [w.message.leaf for w in caught]


MEAN = ["model_state['mean']"]


@pytest.mark.parametrize("update", UPDATES)
def test_a_state_behind_stop_gradient_is_named(update):
    lost = "stopped" in update and update != "partly stopped"
    assert said(jax.grad(outer(update))) == MEAN * lost


@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint, lambda f: lambda h: jnp.sum(jax.vmap(f)(h[None]))])
def test_it_is_named_only_where_the_outer_loss_reads_it(transform):
    assert said(jax.grad(transform(outer("stopped")))) == MEAN
    assert said(jax.grad(transform(outer("stopped", read=False)))) == []
    assert said(transform(outer("stopped"))) == []  # no derivative is taken


RULES = [Unroll(1), Unroll(2), Unroll("binomial"), Unroll(truncate=2), jaxhpo.DrMAD(), jaxhpo.Forward()]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_every_rule_that_differentiates_the_steps_says_so(rule):
    assert said(jax.grad(outer("stopped", rule))) == MEAN
    assert said(jax.grad(outer("stopped", rule, read=False))) == []


def test_a_derivative_with_respect_to_the_state_itself_is_kept():
    def outer_loss(start):
        return outer("behind what was stopped", start=start)(jnp.ones(2))

    assert jax.grad(outer_loss)(1.0) > 0.01  # (1 - tanh²)³ at most


def test_it_is_named_where_training_reads_it():
    """A derivative is lost on the way to the parameters too, from the second step on."""
    assert said(jax.grad(outer("stopped", read=False, trained_on=True))) == MEAN
    assert said(jax.grad(outer("stopped", trained_on=True, num_steps=1))) == []  # it knows no h yet


def test_other_modes():
    """Forward mode cannot tell what is read; second derivatives take the first in reverse mode."""
    assert said(lambda h: jax.linearize(outer("stopped"), h)[1](h)) == MEAN
    assert said(jax.jacfwd(jax.grad(outer("stopped")))) == MEAN
    assert said(jax.jacfwd(jax.grad(outer("stopped", read=False)))) == []


@pytest.mark.slow
def test_nothing_stays_in_the_program_and_numbers_are_the_same():
    h = jnp.ones(2)
    with warnings.catch_warnings(action="ignore"):
        lowered = jax.jit(jax.grad(outer("stopped"))).lower(h).as_text()
        tangent = jax.jvp(outer("stopped"), (h,), (h,))[1]
        grad = jax.grad(outer("stopped"))(h)
    assert "blind" not in lowered
    assert jnp.allclose(tangent, grad @ h, rtol=1e-6)
    assert jnp.array_equal(grad, jax.grad(outer("stopped", read=False))(h))  # the state is a constant


@pytest.mark.parametrize("subclass", [False, True])
def test_nnx_batch_norm(subclass):
    class BatchNorm(nnx.BatchNorm):
        def __call__(self, x):
            old = self.mean[...], self.var[...]
            out = super().__call__(x)
            if subclass and not self.use_running_average:
                self.mean[...], self.var[...] = old[0] + x.mean(0), old[1] + x.var(0)
            return out

    x = X.astype(jnp.float32)  # as nnx's statistics are
    graph, params, rest = nnx.split(BatchNorm(2, rngs=nnx.Rngs(0)), nnx.Param, ...)

    def train_loss(params, h, batch, rest):
        net = nnx.merge(graph, params, rest)
        net.train()
        return jnp.mean((net(net(x)) - 1) ** 2) + h[0], nnx.split(net, nnx.Param, ...)[2]

    solver = jaxhpo.from_optax(train_loss, lambda h: optax.sgd(h[1]), has_state=True)

    def outer_loss(h):
        sol = jaxhpo.solve(solver, solver.init(params, h, rest), h, num_steps=3)
        net = nnx.merge(graph, sol.params, sol.model_state)
        net.eval()
        return jnp.mean(net(x))

    stops = [int(n) for n in importlib.metadata.version("flax").split(".")[:3]] >= [0, 12, 1]  # older ones never do
    assert said(jax.grad(outer_loss)) == ["model_state['mean'].value"] * (stops and not subclass)
