"""Transforms between natural and unconstrained hyperparameters: values, derivatives, checks, prefix trees."""

import collections
import pickle

import chex
import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.transforms import box, positive, simplex, to_natural, to_unconstrained, unit_interval

ARRAYS = box(np.arange(5.0) - 2, jnp.arange(5.0) + 1)
TRANSFORMS = [positive, unit_interval, box(0.0, 0.9), box(-2.0, 0.0), box(-10, 1e4), box(64.0, 80.0), simplex, ARRAYS]
each_transform = pytest.mark.parametrize("transform", TRANSFORMS, ids=[*map(str, TRANSFORMS[:-1]), "box of arrays"])
ROWS = hnp.arrays(
    np.float64, (5,), elements=st.floats(-1e4, 1e4)
)  # one shape: each transform is compiled once per dtype


@pytest.mark.parametrize(
    "dtype", [jnp.float64, *(pytest.param(low, marks=pytest.mark.slow) for low in (jnp.float32, jnp.bfloat16))]
)
@each_transform
def test_values_are_finite_and_inside_and_round_trips_agree(transform, dtype):
    @jax.jit
    def compiled(u):
        h, pullback = jax.vjp(transform.forward, u)
        back = transform.inverse(h)
        return h, back, transform.forward(back), pullback(jnp.ones_like(h))[0]

    @hypothesis.settings(max_examples=50, deadline=None, derandomize=True)
    @hypothesis.given(u=ROWS | ROWS.map(lambda u: u / 1250))
    @hypothesis.example(u=np.full(5, 1e4))
    @hypothesis.example(u=np.full(5, -1e4))
    @hypothesis.example(u=np.array([-1e4, 1e4, 0.0, -1e4, 1e4]))
    def check(u):
        u = jnp.asarray(u, dtype)
        results = compiled(u)
        assert all(x.dtype == dtype and x.shape == u.shape and jnp.all(jnp.isfinite(x)) for x in results)
        transform.inverse(results[0])  # concrete: raises if rounding had put a value on the boundary
        if jnp.abs(u).max() <= 8:
            check_round_trips(transform, u, *(np.asarray(x, np.float64) for x in results[:3]))

    check()


def check_round_trips(transform, u, natural, back, again):
    if u.dtype == jnp.float64:
        expected = u - jnp.mean(u) if transform is simplex else u
        # The condition number of the logit at u is at most e^|u|; of the box at 64, the offset times that over width.
        np.testing.assert_allclose(back, expected, rtol=0, atol=1e-10)
    # Rounding u by eps |u| moves h by at most |dh/du| eps |u| <= |h| eps |u|, or, for a box, width/4 eps |u|.
    scale = np.abs(natural) + (np.subtract(transform.high, transform.low) if isinstance(transform, box) else 0)
    assert np.all(np.abs(again - natural) <= 4 * float(jnp.finfo(u.dtype).eps) * (1 + np.abs(back).max()) * scale)


def test_closed_forms():
    u, s, e = jnp.float64(0.5), 1 / (1 + np.exp(-0.5)), np.exp(0.5)
    table = [(positive, e, e), (unit_interval, s, s * (1 - s)), (box(-1.0, 3.0), -1 + 4 * s, 4 * s * (1 - s))]
    for transform, value, slope in table:
        np.testing.assert_allclose(jax.jit(jax.value_and_grad(transform.forward))(u), (value, slope), rtol=1e-14)
        np.testing.assert_allclose(transform.inverse(jnp.float64(value)), u, rtol=1e-14)
    np.testing.assert_allclose(jax.jit(jax.grad(jax.grad(positive.forward)))(u), e, rtol=1e-14)
    u = jnp.asarray([0.3, -1.0, 2.0], jnp.float64)
    h = np.exp(u) / np.exp(u).sum()
    np.testing.assert_allclose(simplex.forward(u), h, rtol=1e-14)
    np.testing.assert_allclose(simplex.inverse(jnp.asarray(h)), np.log(h) - np.log(h).mean(), rtol=1e-14)
    jacobian = np.diag(h) - np.outer(h, h)  # dh_i/du_j = h_i (δ_ij - h_j)
    np.testing.assert_allclose(jax.jit(jax.jacobian(simplex.forward))(u), jacobian, rtol=1e-12, atol=1e-16)


@each_transform
def test_jit_and_vmap_equal_eager(transform):
    u = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5)), jnp.float32)
    for apply, x in ((transform.forward, u), (transform.inverse, jax.vmap(transform.forward)(u))):
        expected = np.stack([apply(row) for row in x])
        np.testing.assert_allclose(jax.jit(jax.vmap(apply))(x), expected, rtol=1e-6, atol=1e-6)


def test_weak_types_and_traced_values():  # a weak type would compile the second outer step anew
    assert not any(apply(0.5).weak_type for t in TRANSFORMS[:6] for apply in (positive.inverse, t.forward))
    assert np.isnan(jax.jit(positive.inverse)(jnp.float32(-1.0)))  # traced
    assert all(np.isnan(t.forward(jnp.full(5, jnp.nan))).all() for t in TRANSFORMS)


def test_printing_equality_hash_and_pickle():
    assert ", ".join(map(repr, TRANSFORMS[:3] + [simplex])) == "positive, unit_interval, box(0.0, 0.9), simplex"
    assert box(0.0, 1.0) == box(0, 1) and hash(box(0.0, 1.0)) == hash(box(0, 1)) and box(0.0, 0.9) != box(0.0, 1.0)
    assert len({positive, unit_interval, simplex, box(0.0, 1.0)}) == 4
    assert all(pickle.loads(pickle.dumps(t)) == t for t in TRANSFORMS[:-1])


def test_inverse_refuses_values_outside_the_domain():
    for transform, value, message in [
        (positive, -1.0, "`positive.inverse` got -1, but must be greater than 0.*1e-6.*`box"),
        (positive, np.nan, "got nan"),
        (positive, jnp.asarray([1.0, 0.0]), "got 0, "),
        (positive, np.inf, "got inf"),
        (positive, np.float32(1e-44), "greater than 0 .in float32: from 1.6e-38"),
        (unit_interval, 0.0, "`unit_interval.inverse` got 0, .*strictly between 0.0 and 1.0.*Start inside"),
        (unit_interval, jnp.asarray([0.5, 1.5]), "got 1.5"),
        (box(0.0, 0.9), 0.9, r"`box\(0.0, 0.9\).inverse` got 0.9, but must be strictly between 0.0 and 0.9.*widen"),
        (box(0.0, 0.9), 0.0, "got 0"),
        (box(1.0, 2.0), np.nan, "got nan"),
        (ARRAYS, np.array([-1.0, 0.0, 3.0, 2.0, 3.0]), "got 3"),
        (simplex, jnp.asarray([[0.5, 0.5], [0.5, 0.6]]), r"`simplex.inverse` got a sum of 1.1, .*sum to 1. Divide"),
        (simplex, jnp.asarray([0.0, 1.0]), "got 0, but shares must be greater than 0"),
        (simplex, jnp.asarray([np.nan, 1.0]), "got nan"),
    ]:
        with pytest.raises(JaxhpoError, match=message):
            transform.inverse(value)


def test_inputs_other_than_floating_point_arrays_are_refused():
    for x in (1, True, "1.0", 1j, {}, None, jnp.arange(3), jax.random.key(0)):
        for apply in (apply for t in (positive, box(0.0, 1.0), simplex) for apply in (t.forward, t.inverse)):
            with pytest.raises(JaxhpoError, match=rf"\.{apply.__name__}` got .*floating-point"):
                apply(x)


BAD = [(1.0, 0.0), (1.0, 1.0), (np.zeros(2), np.array([1.0, -1.0])), (np.zeros(2), np.ones(3)), (0.0, np.inf)]
BAD += [(np.nan, 1.0), ("0", 1.0), (0.0, None), (0.0, [1.0, 2.0]), (0.0, 1j), (np.zeros(2, complex), 1.0)]


def test_box_refuses_bad_bounds():
    for low, high in BAD:
        with pytest.raises(JaxhpoError, match=r"^`box\(.*\)` is not valid.*`box\(0.0, 0.9\)`"):
            box(low, high)
    with pytest.raises(JaxhpoError, match="concrete"):
        jax.eval_shape(lambda traced: box(0.0, traced).forward(0.0), 1.0)


def test_arrays_that_do_not_fit_are_refused_while_tracing():
    for transform, value, message in [
        (ARRAYS, jnp.float32(0.5), r"float32\[\].*shape"),
        (ARRAYS, jnp.zeros((2, 5), jnp.float32), r"float32\[2, 5\].*shape"),
        (box(1.0, 1.001), jnp.bfloat16(1.0), "bfloat16.*wider dtype"),
        (box(0.0, 1e300), jnp.float32(1.0), "float32.*wider dtype"),
        (box(-3e38, 3e38), jnp.float32(1.0), "float32.*wider dtype"),
        (box(3e5, 5e5), jnp.float16(1.0), "float16.*wider dtype"),
        (simplex, jnp.float32(1.0), r"shape \(\).*last axis.*`unit_interval`"),
        (simplex, jnp.zeros((2, 0), jnp.float32), r"shape \(2, 0\).*last axis"),
    ]:
        for apply in (transform.forward, transform.inverse):
            for call in (apply, lambda x, apply=apply: jax.eval_shape(apply, x)):
                with pytest.raises(JaxhpoError, match=message):
                    call(value)


Pair = collections.namedtuple("Pair", "lr momentum")
Foreign = collections.namedtuple("Foreign", "forward inverse")  # any object with the two functions, even a pytree
halver, identity = Foreign(lambda u: u / 2, lambda h: h * 2), Foreign(lambda u: u, lambda h: h)
OPT = Pair(jnp.float64(0.3), jnp.float64(0.9))
HPARAMS = {"l2": {"w": jnp.full(2, 0.1), "b": jnp.float64(0.2)}, "opt": OPT, "x": [5, None]}
PREFIX = {"l2": {"w": None, "b": halver}, "opt": Pair(positive, box(0.0, 0.99)), "x": (None, positive)}


def test_prefix_trees():
    for transforms, applied in [
        (None, {}),
        ({"l2": positive, "opt": None, "x": None}, {"['l2']['w']": positive, "['l2']['b']": positive}),
        (PREFIX, {"['l2']['b']": halver, "['opt'].lr": positive, "['opt'].momentum": box(0.0, 0.99)}),
    ]:
        expected = {path: applied.get(path, identity).inverse(leaf) for path, leaf in by_path(HPARAMS).items()}
        unconstrained = to_unconstrained(transforms, HPARAMS)
        chex.assert_trees_all_equal(by_path(unconstrained), expected)
        chex.assert_trees_all_close(to_natural(transforms, unconstrained), HPARAMS, rtol=1e-12)  # structures, too


def by_path(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_one_transform_for_all_and_derivatives_through_a_tree():
    tree = {"a": jnp.ones(2), "b": [jnp.ones(())], "c": {}}
    chex.assert_trees_all_equal(to_unconstrained(positive, tree), jax.tree.map(jnp.zeros_like, tree))
    assert to_natural(positive, jnp.zeros(())) == 1.0
    transforms = {"l2": positive, "m": unit_interval}
    slope = jax.jit(jax.grad(lambda u: jnp.prod(jnp.stack(jax.tree.leaves(to_natural(transforms, u))))))
    # l2 m with l2 = e^u, m = σ(v) at 0: derivatives m l2 = 1/2 and l2 m (1 - m) = 1/4
    chex.assert_trees_all_close(slope({"l2": 0.0, "m": 0.0}), {"l2": 0.5, "m": 0.25}, rtol=1e-6)


def test_bad_prefixes_and_bad_values_are_named_by_their_path():
    for transforms, hparams, message in [
        ({"l2": 3.0}, {"l2": 0.1}, r"`transforms\['l2'\]` is 3.0, but `hparams\['l2'\]` has no parts. Write.*None"),
        ("positive", {"l2": 0.1}, r"`transforms` is 'positive', but `hparams` has `\['l2'\]`. Write a transform"),
        ({"l2": box}, {"l2": 0.1}, r"is <class.*box.*Write.*`box\(low, high\)`.*`forward` and `inverse`"),
        ({"l2": positive}, {"l2": 0.1, "lr": 0.1}, r"is {'l2': positive}, but `hparams` has `\['l2'\]`, `\['lr'\]`"),
        ({"a": {"w": positive}}, {"a": {"b": 0.1}}, r"`transforms\['a'\]` is.*`hparams\['a'\]` has `\['b'\]`"),
        ({"l2": {"w": positive}}, {"l2": 0.1}, r"`hparams\['l2'\]` has no parts"),
        ([positive, positive], [0.1], r"has `\[0\]`"),
        ({}, 0.1, r"`transforms` is {}, but `hparams` has no parts"),
    ]:
        for apply in (to_natural, to_unconstrained):
            with pytest.raises(JaxhpoError, match=message):
                apply(transforms, hparams)
    with pytest.raises(JaxhpoError, match=r"`hparams\['net'\]\[1\]`: `positive.inverse` got -1"):
        to_unconstrained({"net": positive}, {"net": [1.0, -1.0]})
