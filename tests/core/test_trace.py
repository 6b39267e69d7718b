"""Traced programs: used inputs, dependent results, closures, and gradients that are stopped with a warning."""

import warnings

import jax
import jax.numpy as jnp
import pytest

import jaxhpo
from jaxhpo._core.record import traced_anew
from jaxhpo._core.stop_gradient import first_order, stop_gradient_with_warning
from jaxhpo._core.trace import closure_convert, dependent_results, differentiable_inputs, used_inputs

X = jnp.arange(3.0)


def carried(c, x):
    """A scan step in which b depends on a after one step, and c on a after two."""
    a, b, c = c
    return (a, a + x, b), x


def test_used_inputs_and_dependent_results():
    def fn(tree, other):
        return {"sum": tree["a"] + 1, "constant": jnp.ones(2), "other": jnp.sin(other)}

    assert used_inputs(fn, {"a": X, "b": X}, X) == [True, False, True]
    assert dependent_results(fn, {"a": X, "b": X}, X) == [False, True, True]  # constant, other, sum


def test_dependence_through_a_scan():
    def scanned(a):
        return jax.lax.scan(carried, (a, jnp.zeros(()), jnp.zeros(())), jnp.ones(4))

    assert dependent_results(scanned, 1.0) == [True, True, True, False]
    unused = lambda a, b: jax.lax.scan(lambda c, x: (c * a, None), 1.0, None, 3)[0]  # noqa: E731
    assert used_inputs(unused, 2.0, 3.0) == [True, False]


@pytest.mark.parametrize("wrap", [lambda fn: fn, jax.jit, jax.checkpoint], ids=["plain", "jit", "checkpoint"])
def test_differentiable_inputs(wrap):
    def fn(leaves):
        used, stopped, ignored, selected = leaves
        return jnp.sum(used * jax.lax.stop_gradient(stopped)) + jnp.where(stopped[0] > 0, selected[0], 0.0)

    assert differentiable_inputs(wrap(fn), [X, X, X, X]) == [True, False, False, True]


def test_closure_convert_leaves_nothing_closed_over():
    keys, indices = jax.random.split(jax.random.key(0), 2), jnp.array([2, 0])

    def outer(scale):
        pure, consts = closure_convert(lambda x: {"y": scale * x[indices] + jax.random.normal(keys[0])}, X)
        assert {str(c.dtype) for c in consts} == {"float64", "int64", "key<fry>"}
        assert not jax.make_jaxpr(pure)(consts, X).consts
        return pure(consts, X)["y"].sum()

    assert jax.grad(outer)(2.0) == 2.0  # Σ x[indices]


def test_stop_gradient_warns_of_perturbed_leaves():
    def loss(tree):
        stopped = stop_gradient_with_warning(tree, ["a", "b", "n"], "is stopped.", partial=True)
        return stopped["a"].sum() * stopped["b"].sum() + 0 * tree["a"].sum()

    tree = {"a": X, "b": X, "n": jnp.arange(2)}
    with pytest.warns(jaxhpo.ZeroHypergradientWarning, match=r"^a \(and 1 more leaves\) is stopped\.$") as caught:
        grads = jax.grad(loss, allow_int=True)(tree)
    assert len(caught) == 1 and caught[0].message.partial and not grads["a"].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(tree)
        jax.grad(lambda x: loss(tree) + x)(1.0)


def test_stop_gradient_warns_of_perturbed_inputs_of_a_stopped_tree():
    def loss(h):
        state = stop_gradient_with_warning(jnp.sum(h) * X, ["state"], "was made from h.", inputs={"h": h, "x": X})
        return jnp.sum(state * h)

    with pytest.warns(jaxhpo.ZeroHypergradientWarning, match="^state was made from h") as caught:
        grad = jax.grad(loss)(jnp.ones(3))
    assert len(caught) == 1 and (grad == 3 * X).all()  # h is differentiated in the product alone


def test_first_order_raises_when_differentiated():
    assert (first_order(X, "rule") == X).all()
    with pytest.raises(jaxhpo.JaxhpoError, match="second derivative"):
        jax.grad(lambda x: first_order(x, "rule"))(1.0)


def test_what_is_traced_anew_is_the_same_program():
    """As JAX's cache of compiled programs on disk finds them by their text."""
    traced = []
    fn = jax.jit(lambda x: (traced.append(x), jnp.sin(x))[1])

    def text():
        with traced_anew():
            return fn.lower(X).as_text("hlo")

    assert text() == text() and len(traced) == 2
