"""`Reversible`: exact recovery, buffer size, and hypergradients against closed forms and plain reverse mode."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import PROBLEMS, enable_x64
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxhpo
from jaxhpo import Reversible, Unroll
from jaxhpo._adjoint import exact_arithmetic as arithmetic
from jaxhpo._adjoint import reversible
from jaxhpo._inner.problem import make_problem

slow = pytest.mark.slow
# With little optimisation XLA's products of the same matrices may differ from program to program, and then the reversal
# misses the start.
codegen = pytest.mark.codegen
D = 2**16  # the denominator d of the rational momentum


def nearest(m):
    """n/d of a single step: m d rounded, and never 0."""
    return np.maximum(np.floor(np.asarray(m, float) * D + 0.5), 1) / D


def used(momenta):
    """n_t/d of successive steps: n_t = ⌊½ + Σ_{s ≤ t} m_s d⌋ − ⌊½ + Σ_{s < t} m_s d⌋."""
    sums = np.concatenate([[0], np.cumsum(np.asarray(momenta, float) * D)])
    return np.diff(np.floor(sums + 0.5)) / D


def relative_error(got, want) -> float:
    got, want = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]).astype(float) for t in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


# --- exact arithmetic ------------------------------------------------------------------------------------------------

PRODUCTS, SHAPE = 200, (3, 40)
DEPTH = PRODUCTS * SHAPE[0] + 1  # enough if every product pushes all 16 bits


class Trip(NamedTuple):
    high: jax.Array
    added: jax.Array
    far: arithmetic.Velocity
    buffer: arithmetic.Buffer
    back: arithmetic.Velocity
    empty: arithmetic.Buffer

    def check(self):
        assert not self.buffer.full and arithmetic.is_empty(self.empty)
        np.testing.assert_array_equal(self.back.high, self.high)
        assert not np.any(self.back.low)


@jax.jit
def there_and_back(high, momenta, added):
    """Multiplies by all n/d with an addition after each, then undoes both."""
    form = arithmetic.current_format()
    high, added = form.encode(high.astype(form.real)), form.encode(added.astype(form.real))
    numerators = arithmetic.numerator(momenta.astype(form.real), jnp.uint32(arithmetic.HALF))
    n = jnp.broadcast_to(numerators[:, None, None], added.shape)

    def forward(carry, x):
        v, buffer = arithmetic.multiply(carry[0], x[1], carry[1], x[0])
        return (v._replace(high=v.high + x[2]), buffer), None

    def backward(carry, x):
        v, buffer = carry
        return arithmetic.divide(v._replace(high=v.high - x[2]), x[1], buffer, x[0]), None

    steps = (jnp.arange(PRODUCTS), n, added)
    start = arithmetic.Velocity(high, jnp.zeros(SHAPE, jnp.uint16)), arithmetic.empty_buffer(SHAPE[1], DEPTH)
    far, buffer = jax.lax.scan(forward, start, steps)[0]
    return Trip(high, added, far, buffer, *jax.lax.scan(backward, (far, buffer), steps, reverse=True)[0])


def round_trip(momenta, seed=0):
    """Takes random numbers of both signs, and both ends of the range, through 200 products and back."""
    form, rng = arithmetic.current_format(), np.random.default_rng(seed)
    high = rng.uniform(-1, 1, SHAPE) * 2.0 ** rng.uniform(-form.fraction, 1, SHAPE)
    high[0, :3] = 0, form.limit, -form.limit
    return there_and_back(high, momenta, rng.uniform(-0.01, 0.01, (PRODUCTS, *SHAPE)))


def test_200_random_factors_are_undone():
    momenta = np.random.default_rng(1).uniform(0, 1, PRODUCTS)
    trip = round_trip(momenta)
    trip.check()
    # The information is Σ log2(d/n) for each of three rows, within the required 2 %.
    want = SHAPE[0] * np.sum(-np.log2(nearest(momenta)))
    assert float(arithmetic.information(trip.buffer)) == pytest.approx(want, rel=0.02)


@slow
@settings(max_examples=50, deadline=None)
@given(momenta=st.lists(st.floats(0, 1), min_size=8, max_size=8), seed=st.integers(0, 99), x64=st.booleans())
def test_any_factors_are_undone(momenta, seed, x64):
    with enable_x64(x64):
        round_trip(np.tile(momenta, PRODUCTS // 8), seed).check()


@slow
@pytest.mark.parametrize("x64", [True, False], ids=["int64", "int32"])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.98, 0.99, 1.0])
def test_buffer_holds_the_information_of_each_product(momentum, x64):
    """log2(d/n) bits per product: 0.152 at 0.9, 0.029 at 0.98, 0.0145 at 0.99, 16 at 0 (n = 1), none at 1 (n = d)."""
    with enable_x64(x64):
        trip = round_trip(np.full(PRODUCTS, momentum))
        trip.check()
        want = PRODUCTS * SHAPE[0] * -np.log2(nearest(momentum))
        assert float(arithmetic.information(trip.buffer)) == pytest.approx(want, rel=0.02, abs=1e-3)


@slow
@pytest.mark.parametrize("x64", [True, False], ids=["int64", "int32"])
def test_error_of_a_product_is_one_unit(x64):
    """Against Python's integers: the guard digit takes the noise, so `high` is exact to one unit in the last place."""
    with enable_x64(x64):
        trip = round_trip(np.array([0.9] + [1.0] * (PRODUCTS - 1)))  # one product; at 1, n = d
        exact = [int(c) * 58982 // D for c in trip.high.ravel()]  # n = ⌊0.9 · 65536 + ½⌋
        added = trip.added.sum(0).ravel()
        error = [int(f) - int(a) - c for f, a, c in zip(trip.far.high.ravel(), added, exact, strict=True)]
        assert max(map(abs, error)) <= 1


# --- the scalar quadratic: L = ½ a x², the run is a product of 2 × 2 matrices ----------------------------------------

STEPS = 12
QUADRATIC = {
    "a": jnp.asarray(0.7),
    "lr": jnp.linspace(0.9, 0.3, STEPS),
    "m": jnp.linspace(0.3, 0.95, STEPS),
    "x0": jnp.asarray(1.2),
    "v0": jnp.asarray(-0.3),
}
SCALAR = jaxhpo.momentum_sgd(lambda x, h, b: 0.5 * h["a"] * x**2, lambda h, t: h["lr"][t], lambda h, t: h["m"][t])


def scalar_end(h, rule):
    """x_T + 2 v_T."""
    start = SCALAR.init(h["x0"], h)
    start = start._replace(opt_state=start.opt_state._replace(velocity=h["v0"]))
    sol = jaxhpo.solve(SCALAR, start, h, num_steps=STEPS, adjoint=rule)
    return sol.params + 2 * sol.opt_state.velocity


def scalar_closed_form(h, run=STEPS):
    """Runs of so many steps, in each of which the rounding of the momenta begins anew.

    (x, v) ← M_t (x, v) with v' = r v − (1−m) a x, x' = x + α v', r = n/d, and ∂r/∂m = 1.
    """
    a, lr, m, x0, v0 = (np.asarray(h[k], float) for k in ("a", "lr", "m", "x0", "v0"))
    rounded = np.concatenate([used(m[i : i + run]) for i in range(0, STEPS, run)])
    matrices = [
        np.array([[1 - s * (1 - k) * a, s * r], [-(1 - k) * a, r]]) for s, k, r in zip(lr, m, rounded, strict=True)
    ]
    states = [np.array([x0, v0])]
    for M in matrices:
        states.append(M @ states[-1])
    adjoint, grads = np.array([1.0, 2.0]), {"a": 0.0, "lr": np.zeros(STEPS), "m": np.zeros(STEPS)}
    value = adjoint @ states[-1]
    for t in reversed(range(STEPS)):
        by_lr = np.array([matrices[t][1], [0, 0]])
        by_m = np.array([[lr[t] * a, lr[t]], [a, 1.0]])
        by_a = np.array([[-lr[t] * (1 - m[t]), 0], [-(1 - m[t]), 0]])
        grads["lr"][t], grads["m"][t] = adjoint @ by_lr @ states[t], adjoint @ by_m @ states[t]
        grads["a"] += adjoint @ by_a @ states[t]
        adjoint = matrices[t].T @ adjoint
    return value, grads | {"x0": adjoint[0], "v0": adjoint[1]}


def test_closed_form():
    value, grads = jax.jit(jax.value_and_grad(scalar_end), static_argnums=1)(QUADRATIC, Reversible())
    want_value, want = scalar_closed_form(QUADRATIC)
    assert value == pytest.approx(want_value, rel=1e-12)
    for name in QUADRATIC:
        np.testing.assert_allclose(grads[name], want[name], rtol=1e-11, err_msg=name)


RIDGE = PROBLEMS["ridge"]
MOMENTA = {
    "constant": lambda h, t: h["m"],
    "schedule": lambda h, t: h["m"] - 0.2 * jnp.exp(-t / 20.0),
    "per weight": lambda h, t: h["m"] * jnp.linspace(0.8, 1.1, RIDGE.params.size),
}


@slow
@pytest.mark.parametrize("momentum", [0.9, 0.61])
@pytest.mark.parametrize("kind", MOMENTA)
def test_is_near_the_exact_hypergradient(kind, momentum):
    """Of the run with momenta that are not rational: one numerator for all 60 steps would be 5e-4 from it."""
    loss = lambda p, h, b: RIDGE.train_loss(p, h["penalty"], b)  # noqa: E731
    solver = jaxhpo.momentum_sgd(loss, lambda h, t: h["rate"], MOMENTA[kind])
    h = {"penalty": jnp.asarray(RIDGE.hparams), "rate": jnp.asarray(0.1), "m": jnp.asarray(momentum)}

    def gradient(rule):
        def outer(h):
            start = solver.init(jnp.asarray(RIDGE.params), h)
            return RIDGE.val_loss(jaxhpo.solve(solver, start, h, num_steps=60, adjoint=rule).params)

        return jax.jit(jax.grad(outer))(h)

    got, want = gradient(Reversible(buffer_bits=2.0)), gradient(Unroll())
    for name in h:
        assert relative_error(got[name], want[name]) <= 5e-5, name


@slow
def test_jit_equals_eager_equals_loop_equals_scan():
    one = jax.jit(jax.grad(scalar_end), static_argnums=1)
    assert relative_error(jax.grad(scalar_end)(QUADRATIC, Reversible()), one(QUADRATIC, Reversible())) < 1e-13
    many = jax.tree.map(lambda x: jnp.stack([x * c for c in (0.85, 0.9, 0.95, 1.0)]), QUADRATIC)
    at = lambda i: jax.tree.map(lambda x: x[i], many)  # noqa: E731
    loop = [one(at(i), Reversible()) for i in range(4)]
    batched = jax.vmap(lambda h: jax.grad(scalar_end)(h, Reversible()))(many)
    scanned = jax.lax.scan(lambda _, h: (None, jax.grad(scalar_end)(h, Reversible())), None, many)[1]
    for i in range(4):
        assert relative_error(jax.tree.map(lambda x, i=i: x[i], batched), loop[i]) < 1e-13
        assert relative_error(jax.tree.map(lambda x, i=i: x[i], scanned), loop[i]) < 1e-13
        assert relative_error(loop[i], scalar_closed_form(at(i))[1]) < 1e-11


# --- networks with a schedule for each leaf, against plain reverse mode over a hand-written scan ---------------------


def predict(layers, x):
    for layer in layers[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"][None])
    return x @ layers[-1]["w"] + layers[-1]["b"][None]


def cross_entropy(layers, x, y):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(predict(layers, x)), y[:, None], 1))


def penalty(layers, log_l2):
    return sum(jnp.exp(a) * jnp.sum(layer["w"] ** 2) for a, layer in zip(log_l2, layers, strict=True))


def rates_of(h, t, layers):
    """Learning rates and momenta, one per leaf."""
    fill = jax.tree.structure(layers).unflatten
    return fill(list(jnp.exp(h["log_lr"][t]))), fill(list(jax.nn.sigmoid(h["logit_m"][t])))


def random_layers(rng, sizes):
    return [{"w": rng.normal(size=(a, b)), "b": rng.normal(size=b)} for a, b in zip(sizes[:-1], sizes[1:], strict=True)]


def solver_of(loss, layers):
    return jaxhpo.momentum_sgd(loss, lambda h, t: rates_of(h, t, layers)[0], lambda h, t: rates_of(h, t, layers)[1])


def plain_run(loss, h, params, velocity, batches, num_steps):
    """The same run as a scan of floats with the same n/d, for plain reverse mode."""

    def step(carry, t):
        params, velocity, left = carry  # what has been rounded away, and a half: n = ⌊left + m d⌋
        lr, m = rates_of(h, t, params)
        grad = jax.grad(loss)(params, h, batches(t))
        sums = jax.tree.map(lambda r, m: r + jax.lax.stop_gradient(m) * D, left, m)
        rational = jax.tree.map(lambda m, s: m + jax.lax.stop_gradient(jnp.floor(s) / D - m), m, sums)
        left = jax.tree.map(lambda s: s - jnp.floor(s), sums)
        velocity = jax.tree.map(lambda r, m, v, g: r * v - (1 - m) * g, rational, m, velocity, grad)
        return (jax.tree.map(lambda p, a, v: p + a * v, params, lr, velocity), velocity, left), None

    halves = jax.tree.map(lambda m: jnp.full_like(m, 0.5), rates_of(h, 0, params)[1])
    return jax.lax.scan(jax.checkpoint(step), (params, velocity, halves), jnp.arange(num_steps))[0][:2]


def small_network(num_steps):
    """All inputs that the hypergradient depends on, as one tree, and the labels."""
    rng, sizes = np.random.default_rng(0), (6, 5, 3)
    h = {
        "log_lr": rng.normal(-0.5, 0.2, (num_steps, 4)),
        "logit_m": rng.normal(1.5, 0.7, (num_steps, 4)),
        "log_l2": rng.normal(-4, 0.3, 2),
        "params": jax.tree.map(lambda w: 0.4 * w, random_layers(rng, sizes)),
        "velocity": jax.tree.map(lambda w: 0.01 * w, random_layers(rng, sizes)),
        "x": rng.normal(size=(num_steps, 8, sizes[0])),
        "shift": rng.normal(size=sizes[0]) * 0.1,
    }
    return jax.tree.map(jnp.asarray, h), jnp.asarray(rng.integers(0, sizes[-1], (num_steps, 8)))


def small_loss(h):
    """The train loss, which closes over the shift."""
    shift = h["shift"][None]
    return lambda layers, hparams, batch: (
        cross_entropy(layers, batch[0] + shift, batch[1]) + penalty(layers, hparams["log_l2"])
    )


def squares(params, velocity):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(params)) + sum(jnp.sum(x) for x in jax.tree.leaves(velocity))


def small_exact(h, y):
    solver = solver_of(small_loss(h), h["params"])
    start = solver.init(h["params"], h)
    start = start._replace(opt_state=start.opt_state._replace(velocity=h["velocity"]))
    sol = jaxhpo.solve(solver, start, h, (h["x"], y), adjoint=Reversible(buffer_bits=0.5))
    return squares(sol.params, sol.opt_state.velocity)


def small_plain(h, y):
    batches = lambda t: (h["x"][t], y[t])  # noqa: E731
    return squares(*plain_run(small_loss(h), h, h["params"], h["velocity"], batches, len(y)))


def small_grads(fn):
    h, y = small_network(60)
    return jax.jit(jax.value_and_grad(fn))(h, y)


@codegen
def test_equals_plain_reverse_mode():
    """To the required 1e-8 in every leaf: schedules, penalties, start, data, and closed-over values."""
    (value, got), (want_value, want) = small_grads(small_exact), small_grads(small_plain)
    assert value == pytest.approx(float(want_value), rel=1e-10)
    for name in want:
        assert relative_error(got[name], want[name]) < 1e-8, name


@codegen
def test_int32_is_as_accurate_as_float32():
    """Without x64 the numbers have 28 fractional bits, and the error is that of reverse mode in float32."""
    _, want = small_grads(small_plain)
    with enable_x64(False):
        (_, got), (_, plain) = small_grads(small_exact), small_grads(small_plain)
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(got))
    error, float32 = relative_error(got, want), relative_error(plain, want)
    print(f"int32 form: relative error {error:.1e}; plain reverse mode in float32: {float32:.1e}")
    assert error < 3 * float32 < 1e-4


@codegen
def test_float32_parameters_under_x64():
    """int64 numbers are rounded to float32 only for the gradient, and are still recovered exactly."""
    h, y = small_network(60)
    low = jax.tree.map(lambda x: x.astype(jnp.float32), h)
    got = jax.jit(jax.grad(small_exact))(low, y)
    assert got["log_lr"].dtype == jnp.float32
    assert relative_error(got, jax.grad(small_plain)(h, y)) < 1e-4  # float32


# --- the published figures: MNIST, 784-50-50-50-10, T = 100, batch 200 -----------------------------------------------

TRAINED, BATCH = 100, 200


@pytest.fixture(scope="module")
def mnist_data():
    from jaxhpo.data import mnist

    try:
        parts = mnist(0, train=10_000, validation=1000, test=1)
    except (ImportError, jaxhpo.JaxhpoError) as error:
        pytest.skip(str(error))
    pick = np.random.default_rng(0).integers(0, 10_000, (TRAINED, BATCH))
    return parts.train.inputs, parts.train.targets, pick, parts.validation.inputs, parts.validation.targets


def mnist_problem(data, h, dtype=jnp.float64):
    """The loss, its batches, the initial weights and the outer loss."""
    x, y, pick, x_val, y_val = (jnp.asarray(a, dtype if a.dtype == np.float32 else None) for a in data)
    layers = jax.tree.map(
        lambda w: jnp.asarray(w, dtype), random_layers(np.random.default_rng(1), (784, 50, 50, 50, 10))
    )
    scales = jax.tree.structure(layers).unflatten(list(jnp.exp(h["log_scale"])))
    loss = lambda p, h, batch: cross_entropy(p, *batch) + penalty(p, h["log_l2"])  # noqa: E731
    start = jax.tree.map(jnp.multiply, scales, layers)
    return loss, lambda t: (x[pick[t]], y[pick[t]]), start, lambda p: cross_entropy(p, x_val, y_val)


def mnist_hparams(momentum, dtype=jnp.float64):
    """800 log rates, 800 logits of momenta, 4 penalties, 8 log scales of the initial weights."""
    h = {
        "log_lr": np.full((TRAINED, 8), -1.0),
        "logit_m": np.full((TRAINED, 8), np.log(momentum / (1 - momentum))),
        "log_l2": np.full(4, -8.0),
        "log_scale": np.full(8, -3.0),
    }
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), h)


def mnist_exact(h, data, momentum, dtype=jnp.float64):
    loss, batches, start, outer = mnist_problem(data, h, dtype)
    solver, rule = solver_of(loss, start), Reversible(buffer_bits=1.001 * -np.log2(momentum))
    sol = jaxhpo.solve(solver, solver.init(start, h), h, batches, num_steps=TRAINED, adjoint=rule)
    return outer(sol.params)


def mnist_plain(h, data, dtype=jnp.float64):
    loss, batches, start, outer = mnist_problem(data, h, dtype)
    return outer(plain_run(loss, h, start, jax.tree.map(jnp.zeros_like, start), batches, TRAINED)[0])


@pytest.mark.codegen
@pytest.mark.parametrize(("momentum", "bits"), [(0.9, 0.152), (0.98, 0.0291)])  # log2(1/0.9), log2(1/0.98)
def test_mnist_weights_are_recovered_bit_for_bit(mnist_data, momentum, bits):
    h = mnist_hparams(momentum)

    @jax.jit
    def there_and_back(h, data):
        loss, batches, start, _ = mnist_problem(data, h)
        solver = jaxhpo.momentum_sgd(loss, 0.5, momentum)
        plan, problem, consts = plan_of(solver, start, h, TRAINED, batches=batches)
        inputs = reversible.Inputs(problem.state, problem.inputs, problem.xs, consts)
        end = reversible.run_exact(plan, inputs)
        undo = lambda now, tx: (reversible.undo_step(plan, now, inputs, *tx)[0], None)  # noqa: E731
        back = jax.lax.scan(undo, end, plan.steps(inputs), reverse=True)[0]
        return end, back, reversible.exact_start(plan, problem.state)

    end, back, start = there_and_back(h, mnist_data)
    for name, a, b in (
        ("weights", back.weights, start.weights),
        ("velocity", back.velocity.high, start.velocity.high),
        ("guard digits", back.velocity.low, start.velocity.low),
        ("words of the buffer", back.buffer.words, start.buffer.words),
    ):
        np.testing.assert_array_equal(a, b, err_msg=name)
    assert end.broken == TRAINED and back.buffer.size == 0 and np.any(end.weights != start.weights)

    numbers = sum(w.size for w in jax.tree.leaves(mnist_problem(mnist_data, h)[2]))
    assert numbers == 784 * 50 + 50 + 2 * (50 * 50 + 50) + 50 * 10 + 10
    held = float(arithmetic.information(end.buffer)) * len(end.buffer.words)
    allocated = 8 * sum(x.nbytes for x in end.buffer)
    each = held / numbers / TRAINED
    print(
        f"{momentum}: {each:.5f} bits a weight and step, 32/{32 / each:.0f}; allocated {allocated / held:.2f} of that"
    )
    assert each == pytest.approx(bits, rel=0.02)
    assert allocated <= 1.5 * held


@pytest.mark.codegen
@pytest.mark.parametrize("momentum", [0.9, 0.98])
def test_mnist_hypergradient_equals_plain_reverse_mode(mnist_data, momentum):
    """1612 hyperparameters, equal to plain reverse mode with the same n/d to 1e-8; the error of int32 is printed."""
    h = mnist_hparams(momentum)
    (value, got), (want_value, want) = (
        jax.jit(jax.value_and_grad(lambda h, d, f=f: f(h, d)))(h, mnist_data)
        for f in (lambda h, d: mnist_exact(h, d, momentum), mnist_plain)
    )
    assert sum(x.size for x in jax.tree.leaves(got)) == 1612
    assert value == pytest.approx(float(want_value), rel=1e-8)
    error = relative_error(got, want)
    with enable_x64(False):
        low = mnist_hparams(momentum, jnp.float32)
        int32, float32 = (
            relative_error(jax.jit(jax.grad(f))(low, mnist_data), want)
            for f in (
                lambda h, d: mnist_exact(h, d, momentum, jnp.float32),
                lambda h, d: mnist_plain(h, d, jnp.float32),
            )
        )
    print(f"momentum {momentum}: int64 {error:.1e}, int32 {int32:.1e}, plain reverse mode in float32 {float32:.1e}")
    for name in want:
        assert relative_error(got[name], want[name]) < 1e-8, name
    assert int32 < 1e-3


@slow
def test_mnist_reversal_in_float32_loses_the_weights(mnist_data):
    """Control: undoing the steps in float32, v ← (v + (1 − m) g) / m, has an error larger than the weights."""
    with enable_x64(False):
        error = float_reversal_error(mnist_data, 0.9, 300)
    print(f"float32, momentum 0.9, 300 steps: relative error of the initial weights {error:.1e}")
    assert not error < 1


def float_reversal_error(data, momentum, num_steps):
    """max |recovered − true| / max |true| of the initial weights."""
    h = mnist_hparams(momentum, jnp.float32)
    loss, batches, start, _ = mnist_problem(data, h, jnp.float32)
    batch = lambda t: batches(t % TRAINED)  # noqa: E731
    rate = jnp.exp(-1.0)

    def forward(carry, t):
        x, v = carry
        v = jax.tree.map(lambda v, g: momentum * v - (1 - momentum) * g, v, jax.grad(loss)(x, h, batch(t)))
        return (jax.tree.map(lambda x, v: x + rate * v, x, v), v), None

    def backward(carry, t):
        x, v = carry
        x = jax.tree.map(lambda x, v: x - rate * v, x, v)
        return (
            x,
            jax.tree.map(lambda v, g: (v + (1 - momentum) * g) / momentum, v, jax.grad(loss)(x, h, batch(t))),
        ), None

    @jax.jit
    def error(start):
        steps, zero = jnp.arange(num_steps), jax.tree.map(jnp.zeros_like, start)
        end = jax.lax.scan(forward, (start, zero), steps)[0]
        back = jax.lax.scan(backward, end, steps, reverse=True)[0][0]
        worst = [jnp.max(jnp.abs(a - b)) for a, b in zip(*map(jax.tree.leaves, (back, start)), strict=True)]
        return jnp.max(jnp.stack(worst)) / jnp.max(jnp.stack([jnp.max(jnp.abs(a)) for a in jax.tree.leaves(start)]))

    return float(error(start))


# --- size of the buffer ----------------------------------------------------------------------------------------------


def plan_of(solver, params, h, num_steps, buffer_bits=None, batches=None):
    start = solver.init(params, h)
    problem = make_problem(solver, start, h, batches, num_steps=num_steps)
    return reversible.make_plan(problem, buffer_bits)


SCHEDULE = jnp.linspace(0.5, 0.9, 10)
LOWER = np.floor(np.asarray(SCHEDULE, float) * D)  # the lower of the two n of each step


def distance(p, h, batch):
    return 0.5 * jnp.sum((p - h["target"]) ** 2)


@pytest.mark.parametrize(
    ("momentum", "bits"),
    [
        pytest.param(0.9, np.log2(D / 58982), marks=slow),  # the lower n, ⌊0.9 · 65536⌋
        (lambda h, t: h["m"], 1.0),  # traced, or treated as traced
        pytest.param(lambda h, t: 0.98, np.log2(D / 64225), marks=slow),
        pytest.param(lambda h, t: SCHEDULE[t], np.mean(np.log2(D / LOWER)), marks=slow),
        pytest.param(lambda h, t: jnp.array([0.9, 0.5, 0.99]), 1.0, marks=slow),  # the lowest counts
        pytest.param(lambda h, t: jax.nn.sigmoid(h["logits"])[t], 1.0, marks=slow),
    ],
    ids=["float", "hyperparameter", "function", "schedule", "per weight", "schedule of hyperparameters"],
)
def test_the_buffer_is_sized_by_the_momentum(momentum, bits):
    h = {"target": jnp.zeros(3), "m": jnp.asarray(0.9), "logits": jnp.zeros(10)}
    solver = jaxhpo.momentum_sgd(distance, lambda h, t: h["m"], momentum)
    plan, *_ = plan_of(solver, jnp.ones(3), h, 10)
    assert plan.depth == max(1, int((bits * 10 + 1) / 16)) and plan.layout.rows == 1

    def depth(h):  # the same if the initial state is made under `jit`
        sizes.append(plan_of(solver, jnp.ones(3), h, 10)[0].depth)
        return 0

    sizes = []
    jax.jit(depth)(h)
    assert sizes == [plan.depth]


@codegen
@pytest.mark.parametrize("momentum", [0.9, 0.98])
def test_memory_does_not_grow_with_the_steps(momentum):
    """Temporary memory at 100 and at 1000 steps differs by the buffer's bits, within the 1.5 of its allocation."""
    size = 20_000
    solver = jaxhpo.momentum_sgd(lambda p, h, b: 0.5 * jnp.sum(h * p**2), 0.1, momentum)

    def memory(num_steps, rule):
        def loss(h):
            return jnp.sum(
                jaxhpo.solve(solver, solver.init(jnp.ones(size), h), h, num_steps=num_steps, adjoint=rule).params
            )

        compiled = jax.jit(jax.grad(loss)).lower(jnp.asarray(1.0)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    grown = memory(1000, Reversible()) - memory(100, Reversible())
    assert 8 * grown < 1.5 * 900 * size * -np.log2(momentum)
    assert memory(1000, Unroll(checkpoint=1)) > 1000 * size * 8 > 50 * memory(1000, Reversible())


# --- errors and faults -----------------------------------------------------------------------------------------------

H = {"target": jnp.zeros(3)}
SGD = jaxhpo.momentum_sgd(distance, 0.5, 0.9)


def solve_distance(h=H, solver=SGD, rule=Reversible(), num_steps=5, **more):  # noqa: B008 (frozen)
    return jaxhpo.solve(solver, solver.init(jnp.ones(3), h), h, num_steps=num_steps, adjoint=rule, **more)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: solve_distance(solver=jaxhpo.from_optax(distance, optax.adam(0.1))),
            r"Reversible\(.*`from_optax`.*opaque.*two forms of momentum.*Write `momentum_sgd\(loss,",
        ),
        (lambda: solve_distance(solver=jaxhpo.fixed_point(lambda p, h, b: p)), r"`fixed_point`.*Write `momentum_sgd"),
        (lambda: solve_distance(tol=1e-3), "`tol=0.001` stops.*omit `tol`"),
        (lambda: Reversible(buffer_bits=0), r"Reversible\(buffer_bits=\.\.\.\).*got 0.*above 0"),
        (lambda: Reversible(buffer_bits="1"), r"Reversible\(buffer_bits=\.\.\.\).*got '1'.*plain number"),
    ],
    ids=["adam", "fixed_point", "tol", "no bits", "bits not a number"],
)
def test_invalid_arguments_are_refused(call, says):
    with pytest.raises(jaxhpo.JaxhpoError, match=says):
        call()


def test_a_model_state_is_refused():
    solver = jaxhpo.momentum_sgd(lambda p, h, b, s: (distance(p, h, b), s + 1), 0.5, 0.9, has_state=True)
    start = solver.init(jnp.ones(3), H, {"mean": jnp.zeros(3)}["mean"])
    with pytest.raises(jaxhpo.JaxhpoError, match="not `model_state`, which every step replaces.*Unroll"):
        jaxhpo.solve(solver, start, H, num_steps=5, adjoint=Reversible())


@pytest.mark.parametrize("outer", [jax.jacrev, pytest.param(jax.jacfwd, marks=slow)], ids=["jacrev", "jacfwd"])
def test_a_hessian_is_refused(outer):
    for argument in (
        H,
        jnp.ones(3),
    ):  # hyperparameters, initial weights (which rounding would cut off)

        def loss(x, argument=argument):
            h, start = (x, jnp.ones(3)) if argument is H else (H, x)
            sol = jaxhpo.solve(SGD, SGD.init(start, h), h, num_steps=5, adjoint=Reversible())
            return jnp.sum(sol.params**3)

        with pytest.raises(
            jaxhpo.JaxhpoError, match=r"second derivative was asked of `Reversible\(buffer_bits=None\)`"
        ):
            jax.eval_shape(outer(jax.grad(loss)), argument)


def ends(h, **more):
    return jnp.sum(solve_distance(h, **more).params)


# The rate at which L = ½ (p − target)², started at 1, leaves the range: the velocity's factor is (1 − m) rate ≫ 1.
WILD = jaxhpo.momentum_sgd(distance, 400.0, 0.9)


@slow
@pytest.mark.parametrize(
    ("solver", "more", "says"),
    [
        (WILD, {}, r"at inner step 2 a weight or a velocity left the range ±2046.*learning rate.*too high"),
        (
            jaxhpo.momentum_sgd(lambda p, h, b: jnp.sum(jnp.sqrt(p - 1) + h["target"]), 0.5, 0.9),
            {},
            "at inner step 0 .*or the gradient was not finite",
        ),
        (jaxhpo.momentum_sgd(distance, 0.5, lambda h, t: 1.5 + h["target"]), {}, r"step 0 .*momentum not in \[0, 1\]"),
    ],
    ids=["overflow", "gradient", "momentum"],
)
def test_numbers_out_of_range_are_detected(solver, more, says):
    """The value and the hypergradient are NaN, `info.finite` is false, and `check_hypergradient` says why."""
    sol = solve_distance(solver=solver, **more)
    assert not sol.info.finite and np.isnan(sol.params).all() and np.isnan(sol.opt_state.velocity).all()
    assert np.isnan(jax.grad(ends)(H, solver=solver, **more)["target"]).all()
    with pytest.raises(jaxhpo.NonFiniteError, match=says):
        jaxhpo.check_hypergradient(lambda h: ends(h, solver=solver, **more), H)


@slow
def test_full_buffer_is_detected():
    """With 0.05 bits where 0.152 are needed, the value is right, the hypergradient NaN, and the reason reported."""
    more = {"num_steps": 500, "rule": Reversible(buffer_bits=0.05)}
    value, grads = jax.value_and_grad(ends)(H, **more)
    assert np.isfinite(value) and np.isnan(grads["target"]).all()
    with pytest.raises(jaxhpo.NonFiniteError, match=r"has 0\.0.* bits .* do not suffice.*buffer_bits="):
        jaxhpo.check_hypergradient(lambda h: ends(h, **more), H)
    assert np.isfinite(jax.grad(ends)(H, num_steps=500)["target"]).all()


@slow
def test_random_gradient_is_detected():
    """With a loss that differs each time it is computed, the reversal misses the start and reports it."""
    rng = np.random.default_rng(0)

    def loss(p, h, b):
        noise = jax.pure_callback(lambda: rng.normal(), jax.ShapeDtypeStruct((), float))
        return distance(p, h, b) + jax.lax.stop_gradient(noise) * jnp.sum(p)

    solver = jaxhpo.momentum_sgd(loss, 0.5, 0.9)
    value, grads = jax.value_and_grad(ends)(H, solver=solver)
    assert np.isfinite(value) and np.isnan(grads["target"]).all()
    with pytest.raises(jaxhpo.NonFiniteError, match="did not end where it began.*deterministic"):
        jaxhpo.check_hypergradient(lambda h: ends(h, solver=solver), H)


@slow
def test_two_warm_started_runs_equal_one():
    """Two runs of six steps, the second from the state of the first, equal the closed form up to the guard digits."""

    def twice(h):
        start = SCALAR.init(h["x0"], h)
        start = start._replace(opt_state=start.opt_state._replace(velocity=h["v0"]))
        for _ in range(2):
            start = jaxhpo.solve(SCALAR, start, h, num_steps=STEPS // 2, adjoint=Reversible()).state
        return start.params + 2 * start.opt_state.velocity

    assert relative_error(jax.jit(jax.grad(twice))(QUADRATIC), scalar_closed_form(QUADRATIC, STEPS // 2)[1]) < 1e-11


@slow
def test_one_inner_problem_per_device():
    """Under `shard_map`: hyperparameters that vary over devices, or data that do with a mean in the loss."""
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    targets = jnp.arange(24.0).reshape(8, 3) / 10
    one = lambda h: jax.grad(ends)({"target": h})["target"]  # noqa: E731
    apart = jax.shard_map(lambda h: one(h[0])[None], mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert relative_error(jax.jit(apart)(targets), jax.vmap(one)(targets)) < 1e-12

    def shared(data, mean):
        solver = jaxhpo.momentum_sgd(lambda p, h, b: mean(jnp.mean((p[None] - data * h[None]) ** 2)), 0.5, 0.9)

        def loss(h):
            sol = jaxhpo.solve(solver, solver.init(jnp.ones(3), h), h, num_steps=5, adjoint=Reversible())
            return jnp.sum(sol.params**2)

        return jax.grad(loss)(jnp.ones(3))

    together = jax.shard_map(
        lambda data: shared(data, lambda v: jax.lax.pmean(v, "data")), mesh=mesh, in_specs=P("data"), out_specs=P()
    )
    assert relative_error(jax.jit(together)(targets), shared(targets, lambda v: v)) < 1e-12


@slow
def test_warm_start_under_jit_has_room_for_a_falling_momentum():
    """Under `jit` the step at which the run begins is unknown while the buffer is sized."""
    h, x = jnp.array([-2.0, -1.0, -0.5]), jax.random.normal(jax.random.key(0), (6, 3))

    def loss(p, h, b):
        return jnp.mean((x @ jnp.tanh(p) - jnp.arange(6.0) / 3) ** 2) + jnp.sum(jnp.exp(h) * p**2)

    solver = jaxhpo.momentum_sgd(loss, 0.05, lambda h, t: jnp.maximum(0.99 - 0.99 * t / 400, 0.01))
    warm = jaxhpo.solve(solver, solver.init(jnp.ones(3), h), h, num_steps=200).state

    def outer(h, start):
        return jnp.sum((jaxhpo.solve(solver, start, h, num_steps=200, adjoint=Reversible()).params - 0.3) ** 2)

    np.testing.assert_allclose(jax.jit(jax.grad(outer))(h, warm), jax.grad(outer)(h, warm), rtol=1e-9)


def test_empty_leaf():
    params = {"a": jnp.zeros(3), "none": jnp.zeros((0, 2))}
    decay = {"a": jnp.full(3, 0.9), "none": jnp.zeros((0, 2))}
    solver = jaxhpo.momentum_sgd(lambda p, h, b: jnp.sum((p["a"] - h) ** 2), 0.1, lambda h, t: decay)
    h = jnp.ones(3)
    final = jaxhpo.solve(solver, solver.init(params, h), h, num_steps=3, adjoint=Reversible()).params
    assert final["none"].shape == (0, 2) and (final["a"] > 0).all()


@pytest.mark.slow
def test_strict_promotion_of_types_is_for_the_user_alone():
    """The library's integers of 16 and 32 bits mix, whatever `jax_numpy_dtype_promotion` says."""
    momenta = jnp.array([0.5, 0.6, 0.7])
    train_loss = lambda w, h, batch: jnp.sum((w - h["c"]) ** 2)  # noqa: E731
    solver = jaxhpo.momentum_sgd(train_loss, lambda h, step: h["r"], lambda h, step: momenta[step])

    def loss(h):
        solution = jaxhpo.solve(solver, solver.init(jnp.zeros(2), h), h, num_steps=3, adjoint=Reversible())
        return jnp.sum(solution.params**2)

    h = {"c": jnp.ones(2), "r": jnp.array(0.1)}
    want = jax.grad(loss)(h)
    with jax.numpy_dtype_promotion("strict"):
        got = jax.grad(loss)(h)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, got, want))
