"""Schedules are transferred as said; both rules learn the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import schedules as script

import jaxhpo

SMALL = script.Sizes(4, (784, 3, 3, 3, 10))


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    part = lambda n: (jnp.asarray(rng.uniform(size=(n, 784))), jnp.asarray(rng.integers(0, 10, n)))  # noqa: E731
    return script.Images(part(40), part(20))


def test_a_transfer_to_the_same_size_changes_nothing_and_stretches_otherwise():
    rates = jnp.tile(jnp.linspace(-1, 1, 4)[:, None], (1, 8))
    h = {"log_rate": rates, "logit_momentum": 2 * rates, "log_scale": jnp.arange(8.0)}
    same = script.transferred(h, SMALL, SMALL)
    for name in h:
        np.testing.assert_allclose(same[name], h[name], rtol=1e-12, err_msg=name)
    longer = script.transferred(h, SMALL, SMALL._replace(steps=12))
    np.testing.assert_allclose(longer["log_rate"][1::3], rates, atol=1e-12)  # the middle of each old step
    np.testing.assert_allclose(longer["logit_momentum"], 2 * longer["log_rate"], atol=1e-12)


def test_wider_layers_get_smaller_weights_where_their_inputs_are_more():
    h = script.constant(1.0, 4)
    wide = script.transferred(h, SMALL, SMALL._replace(widths=(784, 27, 27, 27, 10)))
    np.testing.assert_allclose(wide["log_scale"] - h["log_scale"], [0, 0, *[-np.log(3)] * 6], atol=1e-12)


def test_initial_weights_have_their_scales():
    h = script.constant(1.0, 4, log_scale=jnp.linspace(-2, 1, 8))
    layers = script.initial(h, (784, 50, 50, 50, 10), jax.random.key(0))
    for i, (w, _) in enumerate(layers):
        assert np.std(w) == pytest.approx(np.exp(h["log_scale"][2 * i]), rel=0.1)
    np.testing.assert_allclose(np.exp(2 * script.fan_in_scales((784, 50, 10))[::2]), [1 / 784, 1 / 50], rtol=1e-6)


def test_cosine_and_one_cycle_have_their_peaks():
    sizes = SMALL._replace(steps=1000)
    falls, cycle = (np.exp(make(2.0, sizes)["log_rate"][:, 0]) for make in (script.cosine, script.one_cycle))
    assert falls[0] == pytest.approx(2, rel=1e-3) and falls[500] == pytest.approx(1, rel=1e-2) and falls[-1] < 1e-4
    assert cycle.argmax() == pytest.approx(300, abs=1) and cycle.max() == pytest.approx(2, rel=1e-3)
    assert cycle[0] == pytest.approx(2 / 25, rel=0.01) and cycle[-1] == pytest.approx(2e-3, rel=0.01)


@pytest.mark.slow
def test_both_rules_have_the_same_hypergradient(images):
    def hypergradient(rule):
        loss = lambda h: script.final_loss(h, jax.random.key(0), images.train, SMALL, rule)  # noqa: E731
        return jax.jit(jax.grad(loss))(script.constant(0.5, SMALL.steps))

    plain, back = (hypergradient(rule) for rule in (jaxhpo.Unroll(), jaxhpo.Reversible(buffer_bits=script.BUFFER)))
    for name in plain:
        assert np.abs(plain[name]).max() > 0, name
        np.testing.assert_allclose(
            back[name], plain[name], rtol=1e-3, atol=1e-5 * np.abs(plain[name]).max(), err_msg=name
        )
