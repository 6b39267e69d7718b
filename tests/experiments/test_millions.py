"""Penalties of all kinds are one penalty where they are equal, and their hypergradients are sums of each other."""

import jax
import jax.numpy as jnp
import millions as script
import numpy as np
import pytest

import jaxhpo

WIDTHS = (7, 5, 4, 10)


@pytest.fixture
def part():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(12, 7))), jnp.asarray(rng.integers(0, 10, 12))


def test_equal_penalties_train_alike_whatever_their_kind(part):
    layers = script.initial(jax.random.key(0), WIDTHS)
    found = [
        jax.tree.leaves(script.train(kind, 3, layers, script.start_of(kind, layers), part)) for kind in script.KINDS
    ]
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)
    stronger = script.train("layers", 3, layers, 5 + script.start_of("layers", layers), part)
    assert not np.allclose(stronger[0][0], found[0][0], rtol=1e-4)


def test_the_ten_groups_are_every_weight_once():
    layers = script.initial(jax.random.key(0), WIDTHS)
    groups = script.expand("ten", jnp.arange(10.0), layers)
    whole = jax.tree.map(lambda g, w: jnp.broadcast_to(g, w.shape), groups, layers)
    assert sorted({float(x) for leaf in jax.tree.leaves(whole) for x in np.ravel(leaf)}) == list(range(10))
    assert [len(set(np.ravel(leaf))) for leaf in jax.tree.leaves(whole)] == [5, 1, 1, 1, 1, 1]


@pytest.mark.slow
def test_the_hypergradient_of_a_layer_is_the_sum_over_its_weights(part):
    """Of any rule that differentiates the same condition, the Neumann series included."""
    layers, rule = script.initial(jax.random.key(0), WIDTHS), jaxhpo.Implicit(jaxhpo.Neumann(5, 0.05))

    def hypergradient(kind):
        def outer_loss(h):
            solver = script.make_solver(kind)
            start = solver.init(layers, h)
            trained = jaxhpo.solve(solver, start, h, lambda t: part, num_steps=5, adjoint=rule)
            return script.cross_entropy(trained.params, part)

        return jax.jit(jax.grad(outer_loss))(script.start_of(kind, layers))

    each, of_layers = hypergradient("million"), hypergradient("layers")
    sums = [w.sum() + b.sum() for w, b in each]
    assert np.abs(of_layers).min() > 0
    np.testing.assert_allclose(of_layers, sums, rtol=1e-4)
