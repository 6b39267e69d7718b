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

from jaxhpo._errors import JaxhpoError
from jaxhpo._transforms import box, positive, simplex, to_natural, to_unconstrained, unit_interval

TRANSFORMS = [positive, unit_interval, box(0.0, 0.9), box(-2.0, 0.0), box(-10, 1e4), box(64.0, 80.0), simplex]
DTYPES = [jnp.float64, jnp.float32, jnp.bfloat16]
each_transform = pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
quickly = hypothesis.settings(max_examples=60, deadline=None, derandomize=True)


def rows(bound):
    """One fixed shape, so that each transform and type is compiled once."""
    return hnp.arrays(np.float64, (5,), elements=st.floats(-bound, bound))


def compiled(transform, cache={}):  # noqa: B006  (one compilation a transform, shared by the examples)
    if transform not in cache:

        def all_of_it(u):
            h, pullback = jax.vjp(transform.forward, u)
            back = transform.inverse(h)
            return h, pullback(jnp.ones_like(h))[0], back, transform.forward(back)

        cache[transform] = jax.jit(all_of_it)
    return cache[transform]


# --- values and derivatives -----------------------------------------------------------------------------------------


@each_dtype
@each_transform
@quickly
@hypothesis.given(u=rows(1e4))
@hypothesis.example(u=np.full(5, 1e4))
@hypothesis.example(u=np.full(5, -1e4))
@hypothesis.example(u=np.array([-1e4, 1e4, 0.0, -1e4, 1e4]))
def test_extreme_inputs_stay_finite_and_in_the_domain(transform, dtype, u):
    u = jnp.asarray(u, dtype)
    natural, derivative, back, again = compiled(transform)(u)
    for x in (natural, derivative, back, again):
        assert x.dtype == dtype and x.shape == u.shape
        assert np.all(np.isfinite(np.asarray(x, np.float64)))
    transform.inverse(natural)  # concrete: raises if rounding had put a value on the boundary


@each_transform
@quickly
@hypothesis.given(u=rows(8.0))
def test_round_trip_of_unconstrained_values(transform, u):
    u = jnp.asarray(u, jnp.float64)
    expected = u - jnp.mean(u) if transform is simplex else u
    # The condition number of the logit at u is at most e^|u|; of the box at 64, the offset times that over the width.
    np.testing.assert_allclose(compiled(transform)(u)[2], expected, rtol=0, atol=1e-10)


@each_dtype
@each_transform
@quickly
@hypothesis.given(u=rows(8.0))
def test_round_trip_of_natural_values(transform, dtype, u):
    natural, _, back, again = compiled(transform)(jnp.asarray(u, dtype))
    # Rounding u by eps |u| moves h by at most |dh/du| eps |u| <= |h| eps |u|, or, for a box, width/4 eps |u|.
    scale = np.asarray(natural, np.float64)
    if isinstance(transform, box):
        scale = np.abs(scale) + (transform.high - transform.low)
    bound = 4 * float(jnp.finfo(dtype).eps) * (1 + np.abs(np.asarray(back, np.float64)).max()) * np.abs(scale)
    assert np.all(np.abs(np.asarray(again, np.float64) - np.asarray(natural, np.float64)) <= bound)


@pytest.mark.parametrize(
    ("transform", "u", "natural", "derivative"),
    [
        (positive, 0.5, np.exp(0.5), np.exp(0.5)),
        (unit_interval, 0.5, 1 / (1 + np.exp(-0.5)), np.exp(-0.5) / (1 + np.exp(-0.5)) ** 2),
        (box(-1.0, 3.0), 0.5, -1 + 4 / (1 + np.exp(-0.5)), 4 * np.exp(-0.5) / (1 + np.exp(-0.5)) ** 2),
    ],
)
def test_closed_forms(transform, u, natural, derivative):
    value, slope = jax.value_and_grad(transform.forward)(jnp.float64(u))
    np.testing.assert_allclose([value, slope], [natural, derivative], rtol=1e-14)
    np.testing.assert_allclose(transform.inverse(value), u, rtol=1e-14)


def test_simplex_closed_form():
    u = jnp.asarray([0.3, -1.0, 2.0], jnp.float64)
    h = np.exp(u) / np.exp(u).sum()
    np.testing.assert_allclose(simplex.forward(u), h, rtol=1e-14)
    # dh_i/du_j = h_i (δ_ij - h_j)
    np.testing.assert_allclose(jax.jacobian(simplex.forward)(u), np.diag(h) - np.outer(h, h), rtol=1e-12, atol=1e-16)
    np.testing.assert_allclose(simplex.inverse(jnp.asarray(h)), np.log(h) - np.log(h).mean(), rtol=1e-14)


def test_second_derivative_of_the_exponential():
    np.testing.assert_allclose(jax.grad(jax.grad(positive.forward))(jnp.float64(0.7)), np.exp(0.7), rtol=1e-14)


@each_dtype
@each_transform
def test_jit_and_vmap_equal_eager(transform, dtype):
    u = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), dtype)
    natural = transform.forward(u)
    for apply, x in ((transform.forward, u), (transform.inverse, natural)):
        expected = np.asarray(apply(x), np.float64)
        close = dict(rtol=8 * float(jnp.finfo(dtype).eps), atol=8 * float(jnp.finfo(dtype).eps))
        np.testing.assert_allclose(np.asarray(jax.jit(apply)(x), np.float64), expected, **close)
        np.testing.assert_allclose(np.asarray(jax.vmap(apply)(x), np.float64), expected, **close)
        np.testing.assert_allclose(np.stack([np.asarray(apply(row), np.float64) for row in x]), expected, **close)


def test_pytrees_python_floats_and_types():
    tree = {"a": jnp.zeros(2, jnp.float32), "b": (0.0, jnp.zeros((1, 2), jnp.bfloat16)), "c": None}
    natural = unit_interval.forward(tree)
    chex.assert_trees_all_equal_structs(natural, tree)
    assert natural["b"][1].dtype == jnp.bfloat16 and natural["a"].dtype == jnp.float32
    # A weak type would make the second outer step a second compilation.
    assert not natural["b"][0].weak_type


def test_traced_values_are_not_checked():
    assert np.isnan(jax.jit(positive.inverse)(jnp.float32(-1.0)))


def test_nan_passes_through_forward():
    assert all(np.isnan(t.forward(jnp.full(2, jnp.nan))).all() for t in TRANSFORMS)


# --- box ------------------------------------------------------------------------------------------------------------


def test_box_of_arrays_broadcasts():
    transform = box(jnp.asarray([0.0, 10.0]), np.asarray([[1.0], [20.0]]) + 9.5)
    natural = transform.forward(jnp.zeros((2, 2)))
    np.testing.assert_allclose(natural, [[5.25, 10.25], [14.75, 19.75]], rtol=1e-6)
    np.testing.assert_allclose(transform.inverse(natural), np.zeros((2, 2)), atol=1e-6)


def test_box_of_traced_bounds_is_differentiable():
    # d/db of a + (b - a) σ(u) is σ(u)
    slope = jax.jit(jax.grad(lambda high: box(0.0, high).forward(jnp.float64(0.0))))(2.0)
    assert slope == 0.5


def test_printing_equality_hash_and_pickle():
    assert [str(t) for t in (positive, unit_interval, simplex)] == ["positive", "unit_interval", "simplex"]
    assert repr(box(0.0, 0.9)) == "box(0.0, 0.9)"
    assert box(0.0, 1.0) == box(0, 1) and hash(box(0.0, 1.0)) == hash(box(0, 1)) and box(0.0, 0.9) != box(0.0, 1.0)
    array = jnp.ones(2)
    assert box(0.0, array) == box(0.0, array) and box(0.0, array) != box(0.0, jnp.ones(2)) and box(0.0, 1.0) != 3
    assert len({positive, unit_interval, simplex, box(0.0, 1.0), box(0.0, array)}) == 5
    for transform in (*TRANSFORMS, box(0.0, 1.0)):
        assert pickle.loads(pickle.dumps(transform)) == transform


# --- bad input ------------------------------------------------------------------------------------------------------

BAD_INVERSE = [
    (positive, -1.0, "greater than 0.*-1"),
    (positive, 0.0, "greater than 0.*`box"),
    (positive, np.nan, "got nan"),
    (positive, np.inf, "got inf"),
    (positive, jnp.asarray([1.0, -2.0]), "got -2"),
    (positive, np.float32(1e-44), "greater than 0"),
    (unit_interval, 0.0, "strictly between 0 and 1.*got 0"),
    (unit_interval, 1.0, "got 1"),
    (unit_interval, jnp.asarray([0.5, 1.5]), "got 1.5"),
    (unit_interval, np.nan, "got nan"),
    (box(0.0, 0.9), 0.9, r"`box\(0.0, 0.9\).inverse` needs values strictly between the bounds.*got 0.9"),
    (box(0.0, 0.9), 0.0, "got 0"),
    (box(1.0, 2.0), -3.0, "got -3"),
    (box(1.0, 2.0), np.nan, "got nan"),
    (simplex, jnp.asarray([0.5, 0.6]), "sum to 1.*a sum of 1.1"),
    (simplex, jnp.asarray([[0.5, 0.5], [0.5, 0.4]]), "a sum of 0.9"),
    (simplex, jnp.asarray([0.0, 1.0]), "greater than 0"),
    (simplex, jnp.asarray([np.nan, 1.0]), "got nan"),
    (simplex, 1.0, "last axis.*shape"),
]


@pytest.mark.parametrize(("transform", "value", "message"), BAD_INVERSE)
def test_inverse_refuses_values_outside_the_domain(transform, value, message):
    with pytest.raises(JaxhpoError, match=message):
        transform.inverse(value)


@pytest.mark.parametrize("make", [int, bool, str, complex, object, lambda: jnp.arange(3), lambda: jax.random.key(0)])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@each_transform
def test_only_floating_point_leaves(transform, direction, make):
    with pytest.raises(JaxhpoError, match=r"at `\['lr'\]\[0\]`.*floating-point"):
        getattr(transform, direction)({"lr": [make()]})


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (1.0, 0.0, "low must be below high"),
        (1.0, 1.0, "low must be below high"),
        (np.zeros(2), np.array([1.0, -1.0]), "low must be below high"),
        (0.0, np.inf, "high is inf.*finite"),
        (np.nan, 1.0, "low is nan.*finite"),
        ("0", 1.0, "low is '0'"),
        (0.0, None, "high is None"),
        (False, 1.0, "low is False"),
        (0.0, [1.0, 2.0], "real number or an array"),
        (0.0, 1j, "real number"),
        (np.zeros(2), np.ones(3), "do not broadcast"),
    ],
)
def test_box_refuses_bad_bounds(low, high, message):
    with pytest.raises(JaxhpoError, match=message):
        box(low, high)


@pytest.mark.parametrize(
    ("transform", "leaf", "message"),
    [
        (box(np.zeros(2), np.ones(2)), jnp.zeros(3, jnp.float32), "do not broadcast"),
        (box(np.zeros(2), np.ones(2)), jnp.float32(0.5), "do not broadcast"),
        (box(1.0, 1.001), jnp.bfloat16(1.0), "bfloat16.*wider type"),
        (box(0.0, 1e300), jnp.float32(1.0), "float32.*wider type"),
        (box(-3e38, 3e38), jnp.float32(1.0), "float32.*wider type"),
        (simplex, jnp.float32(1.0), "last axis"),
        (simplex, jnp.zeros((2, 0), jnp.float32), "last axis"),
    ],
)
def test_leaves_that_do_not_fit_are_refused_while_tracing(transform, leaf, message):
    for apply in (transform.forward, transform.inverse):
        with pytest.raises(JaxhpoError, match=message):
            jax.eval_shape(apply, leaf)
        with pytest.raises(JaxhpoError, match=message):
            apply(leaf)


# --- prefix trees ---------------------------------------------------------------------------------------------------

Pair = collections.namedtuple("Pair", "lr momentum")
Halver = collections.namedtuple("Halver", "forward inverse")  # anything with the two functions is a transform
HPARAMS = {
    "l2": {"w": jnp.full(2, 0.1), "b": jnp.float64(0.2)},
    "opt": Pair(jnp.float64(0.3), jnp.float64(0.9)),
    "x": 5,
}
halver = Halver(lambda u: u / 2, lambda h: h * 2)


@pytest.mark.parametrize(
    ("transforms", "applied"),
    [
        (None, {}),
        ({"l2": positive, "opt": None, "x": None}, {"['l2']['w']": positive, "['l2']['b']": positive}),
        (
            {"l2": {"w": None, "b": halver}, "opt": Pair(positive, box(0.0, 0.99)), "x": None},
            {"['l2']['b']": halver, "['opt'].lr": positive, "['opt'].momentum": box(0.0, 0.99)},
        ),
    ],
)
def test_prefix_trees(transforms, applied):
    unconstrained = to_unconstrained(transforms, HPARAMS)
    chex.assert_trees_all_equal_structs(unconstrained, HPARAMS)
    for path, leaf in jax.tree_util.tree_leaves_with_path(HPARAMS):
        name = jax.tree_util.keystr(path)
        got = dict((jax.tree_util.keystr(p), x) for p, x in jax.tree_util.tree_leaves_with_path(unconstrained))[name]
        chex.assert_trees_all_equal(got, applied[name].inverse(leaf) if name in applied else leaf)
    chex.assert_trees_all_close(to_natural(transforms, unconstrained), HPARAMS, rtol=1e-12)


def test_one_transform_for_the_whole_tree_and_for_a_bare_array():
    tree = {"a": jnp.ones(2), "b": [jnp.ones(())]}
    chex.assert_trees_all_close(to_unconstrained(positive, tree), jax.tree.map(jnp.zeros_like, tree))
    assert to_natural(positive, jnp.zeros(())) == 1.0


def test_prefix_trees_may_use_another_kind_of_sequence():
    zero = jnp.zeros(())
    chex.assert_trees_all_close(to_natural((positive, None), [zero, zero]), [jnp.ones(()), zero])


def test_prefix_trees_under_jit_and_grad():
    transforms = {"l2": positive, "m": unit_interval}

    def loss(u):
        h = to_natural(transforms, u)
        return h["l2"] * h["m"]

    slope = jax.jit(jax.grad(loss))({"l2": jnp.float64(0.0), "m": jnp.float64(0.0)})
    # l2 m with l2 = e^u, m = σ(v) at 0: derivatives m l2 = 1/2 and l2 m (1 - m) = 1/4
    chex.assert_trees_all_close(slope, {"l2": 0.5, "m": 0.25}, rtol=1e-14)


@pytest.mark.parametrize(
    ("transforms", "hparams", "message"),
    [
        ({"l2": 3.0}, {"l2": 0.1}, r"`transforms\['l2'\]` is 3.0, which is neither None nor a transform"),
        ({"l2": "positive"}, {"l2": 0.1}, "is 'positive', which is neither"),
        (jnp.exp, {"l2": 0.1}, "neither None nor a transform"),
        ({"l2": positive}, {"l2": 0.1, "lr": 0.1}, r"no entry for `\['lr'\]` of `hparams`.*None"),
        ({"l2": positive, "l1": positive}, {"l2": 0.1}, r"has `\['l1'\]`, which `hparams` has not"),
        ({"a": {"w": positive}}, {"a": {"b": 0.1}}, r"`transforms\['a'\]` has no entry for `\['b'\]`"),
        ({"l2": {"w": positive}}, {"l2": 0.1}, r"`hparams\['l2'\]` is a single value"),
        ([positive], {"l2": 0.1}, r"no entry for `\['l2'\]`"),
        ([positive, positive], [0.1], r"has `\[1\]`"),
        ({}, {"l2": 0.1}, "no entry for"),
    ],
)
def test_prefixes_that_do_not_fit(transforms, hparams, message):
    for apply in (to_natural, to_unconstrained):
        with pytest.raises(JaxhpoError, match=message):
            apply(transforms, hparams)


def test_bad_values_are_named_by_their_path():
    with pytest.raises(JaxhpoError, match=r"`hparams\['net'\]\[1\]`: `positive.inverse` needs.*got -1"):
        to_unconstrained({"net": positive}, {"net": [1.0, -1.0]})
