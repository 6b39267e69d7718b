"""The mixed-mode derivative of inner gradients equals plain autodiff's, at any order, and costs less."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhpo
from jaxhpo import Unroll
from jaxhpo._core.cost import count_arithmetic
from jaxhpo._inner.gradient import mixed_value_and_grad, value_and_grad

KEYS = jax.random.split(jax.random.key(0), 5)
X = jax.random.normal(KEYS[0], (6, 7, 5))  # six minibatches
PARAMS = {"in": jax.random.normal(KEYS[1], (5, 8)), "out": jax.random.normal(KEYS[2], (8,))}
STATE = {"mean": jnp.zeros(8), "count": jnp.zeros((), jnp.int32)}
H = {"decay": jnp.array([-1.0, -2.0]), "weight": jnp.linspace(0.5, 1.5, 7), "rate": jnp.array(0.05)}


def loss(params, h, batch, state):
    """Batch statistics, an integer and a key ride along; the new state depends on everything."""
    x, key = batch
    hidden = jnp.tanh(x @ params["in"]) * jax.random.bernoulli(key, 0.8, (7, 8))
    mean = 0.9 * state["mean"] + 0.1 * h["weight"] @ hidden
    error = jnp.mean(h["weight"] * ((hidden - mean[None]) @ params["out"] - 1.0) ** 2)
    penalty = jnp.exp(h["decay"]) @ jnp.stack([jnp.sum(params["in"] ** 2), jnp.sum(params["out"] ** 4)])
    return error + penalty, {"mean": mean, "count": state["count"] + 1}


def outer_loss(h, compute, read_state=True, read_value=True):
    """A run by hand, its gradients taken by `compute`."""

    def step(carry, x):
        params, state, total = carry
        (value, state), grad = compute(loss, params, h, x, state)
        params = jax.tree.map(lambda p, g: p - h["rate"] * g * (1 + value if read_value else 1), params, grad)
        return (params, state, total + value), None

    xs = X, jax.random.split(KEYS[3], 6)
    (params, state, total), _ = jax.lax.scan(step, (PARAMS, STATE, 0.0), xs)
    last = jnp.sum(params["in"] ** 2) + jnp.sum(params["out"]) * jnp.sum(h["decay"])
    return last + jnp.sum(state["mean"] ** 2) * read_state + total * read_value


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("order", "read"),
    [
        pytest.param("grad", (True, True), marks=SLOW),  # quick: closed forms of unrolling, which takes mixed mode
        pytest.param("jacfwd", (True, True), marks=SLOW),
        *(pytest.param("grad", read, marks=SLOW) for read in ((False, False), (True, False), (False, True))),
        pytest.param("jacrev", (True, True), marks=SLOW),
        pytest.param("jacrev", (False, False), marks=SLOW),
        pytest.param("jacfwd", (False, False), marks=SLOW),
    ],
    ids=str,
)
def test_equals_plain_autodiff(order, read):
    """With and without cotangents for the loss and the model's state."""
    derive = {
        "grad": jax.grad,
        "jacrev": lambda f: jax.jacrev(jax.grad(f)),
        "jacfwd": lambda f: jax.jacfwd(jax.grad(f)),
    }[order]
    got, want = (
        jax.jit(derive(functools.partial(outer_loss, compute=c, read_state=read[0], read_value=read[1])))(H)
        for c in (mixed_value_and_grad, value_and_grad)
    )
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12 * scale)


@pytest.mark.slow
def test_complex_parameters():
    def complex_loss(params, h, batch, state):
        return jnp.sum(jnp.abs(params**2 - h * batch) ** 2), state

    def outer(h, compute):
        w = jnp.array([1.0 + 0.5j, 0.3 - 1j])
        for batch in (0.5, 1.5):
            _, grad = compute(complex_loss, w, h, batch, None)
            w = w - 0.05 * jnp.conj(grad)
        return jnp.sum(jnp.abs(w - 1j) ** 2)

    h = jnp.array([0.7, 1.1])
    got, want = (
        jax.jit(jax.grad(functools.partial(outer, compute=c)))(h) for c in (mixed_value_and_grad, value_and_grad)
    )
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.slow
def test_vmap_over_hyperparameters():
    hs = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x]), H)
    one = jax.grad(functools.partial(outer_loss, compute=mixed_value_and_grad))
    got = jax.jit(jax.vmap(one))(hs)
    for i in range(2):
        want = jax.jit(one)(jax.tree.map(lambda x, i=i: x[i], hs))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-10)


# --- what it costs: matrix units of the network; a gradient is three a layer ---


def deep_problem(num_layers=6, width=32, num_steps=12):
    params = 0.1 * jax.random.normal(KEYS[4], (num_layers, width, width))
    x = jax.random.normal(KEYS[0], (64, width))

    def train_loss(params, h, batch):
        hidden = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params)[0]
        return jnp.mean(hidden**2) + jnp.sum(jnp.exp(h) * params**2)

    solver = jaxhpo.from_optax(train_loss, optax.sgd(0.1, momentum=0.9))

    def outer(h, rule):
        return jnp.sum(jaxhpo.solve(solver, solver.init(params, h), h, num_steps=num_steps, adjoint=rule).params ** 2)

    return outer, jnp.full(params.shape, -5.0)


# A step takes three units forward and six for the derivative of its gradient; redone from its state alone it takes two
# more where its gradient is kept (the weights' gradients fall away); a segment that is redone, three more. The
# elementwise rest of so narrow a network counts too: hence the margin of a tenth.
@pytest.mark.parametrize(("checkpoint", "gradients"), [(None, 9 / 3), (1, 11 / 3), (4, 14 / 3)])
def test_arithmetic(checkpoint, gradients):
    outer, h = deep_problem()
    plain = count_arithmetic(functools.partial(outer, rule=Unroll()), h)
    counted = count_arithmetic(jax.grad(functools.partial(outer, rule=Unroll(checkpoint=checkpoint))), h)
    assert counted / plain == pytest.approx(gradients, rel=0.1)


def test_what_a_step_keeps():
    """The weights alone: the update is linear in momentum and gradient, and the gradient's derivative needs no more."""
    outer, h = deep_problem(num_steps=12)
    jaxpr = jax.make_jaxpr(jax.grad(functools.partial(outer, rule=Unroll(checkpoint=1))))(h).jaxpr
    scan = next(e for e in jaxpr.eqns if e.primitive.name == "scan" and e.params["length"] == 12)
    inside = getattr(scan.params["jaxpr"], "jaxpr", scan.params["jaxpr"]).outvars
    stacked = [v for v, w in zip(scan.outvars, inside, strict=True) if v.aval.ndim > w.aval.ndim]
    assert sum(v.aval.size for v in stacked if jnp.issubdtype(v.aval.dtype, jnp.floating)) == 12 * h.size


# --- losses with derivative rules of their own -----------------------------------------------------------------------


@jax.custom_vjp
def reversed_gradient(x):
    """Domain-adversarial training's layer: no function has such a gradient."""
    return x


reversed_gradient.defvjp(lambda x: (x, None), lambda _, g: (-g,))


@jax.custom_jvp
def reversed_tangent(x):
    """The same, by the other rule."""
    return x


reversed_tangent.defjvp(lambda primals, tangents: (primals[0], -tangents[0]))


@jax.custom_vjp
def documented(x):
    """x sin x, as JAX's documentation writes such rules: the forward rule calls the function itself."""
    return x * jnp.sin(x)


documented.defvjp(lambda x: (documented(x), x), lambda x, g: (g * (jnp.sin(x) + x * jnp.cos(x)),))


def through(layer, adjoint, make_solver=lambda loss: jaxhpo.from_optax(loss, optax.sgd(0.1))):
    """The hypergradient of two penalties, where one half of the parameters meets the other behind the layer."""

    def train_loss(p, h, b):
        meeting = jnp.sum(jnp.sin(p["b"] * layer(p["a"]))) + jnp.sum((p["a"] - 1.0) ** 2)
        return 0.5 * meeting + jnp.exp(h[0]) * jnp.sum(p["a"] ** 2) + jnp.exp(h[1]) * jnp.sum(p["b"] ** 2)

    solver = make_solver(train_loss)

    def outer(h):
        start = solver.init({"a": jnp.ones(3), "b": jnp.full(3, 0.5)}, h)
        params = jaxhpo.solve(solver, start, h, num_steps=6, adjoint=adjoint).params
        return sum(jnp.sum((x - 0.3) ** 2) for x in jax.tree.leaves(params))

    h = jnp.array([-2.0, -1.0])
    return jax.jit(jax.grad(outer))(h), outer, h


@SLOW
@pytest.mark.parametrize("layer", [reversed_gradient, reversed_tangent, documented])
def test_a_rule_of_the_users_need_be_no_derivative(layer):
    """Products with such a Jacobian are none with its transpose, so mixed mode would be wrong."""
    want, outer, h = through(layer, Unroll(checkpoint=None))
    for checkpoint in (1, 3, "binomial"):
        np.testing.assert_allclose(through(layer, Unroll(checkpoint=checkpoint))[0], want, rtol=1e-12)
    if layer is documented:  # the gradient of the others is that of no loss
        assert jaxhpo.check_hypergradient(outer, h).relative_error < 1e-6
    by_momentum = functools.partial(jaxhpo.momentum_sgd, learning_rate=0.1, momentum=0.5)
    back, want = (through(layer, rule, by_momentum)[0] for rule in (jaxhpo.Reversible(), Unroll(checkpoint=None)))
    np.testing.assert_allclose(back, want, rtol=1e-3)  # the momentum is 0.5 + 2**-16


def test_a_part_of_the_minibatch_has_no_hessian_then():
    solver = jaxhpo.from_optax(lambda p, h, b: jnp.mean((b @ reversed_gradient(p)) ** 2) * h, optax.sgd(0.1))
    run = functools.partial(jaxhpo.solve, solver, solver.init(jnp.ones(3), jnp.ones(())), jnp.ones(()))
    with pytest.raises(jaxhpo.JaxhpoError, match=r"contains `reversed_gradient`.*omit `hvp_fraction`"):
        run(jnp.ones((2, 4, 3)), key=jax.random.key(0), adjoint=Unroll(hvp_fraction=0.5))


def test_conjugate_gradients_warn_of_such_a_rule():
    with pytest.warns(RuntimeWarning, match=r"holds `reversed_gradient`.*takes the Hessian to be symmetric"):
        through(reversed_gradient, jaxhpo.Implicit())


@pytest.mark.filterwarnings("ignore:The train loss holds")
def test_implicit_products_that_cannot_be_taken_are_refused():
    with pytest.raises(jaxhpo.JaxhpoError, match=r"forward rule calls the function itself.*`Unroll\(\)`"):
        through(documented, jaxhpo.Implicit())


def test_a_step_without_second_derivatives_can_be_taken():
    """The size of what would be kept is not known then; nothing is."""

    @jax.custom_vjp
    def outside(x):
        return on_host(np.sin, x)

    def on_host(fn, x):
        return jax.pure_callback(fn, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    outside.defvjp(lambda x: (outside(x), x), lambda x, g: (g * on_host(np.cos, x),))
    solver = jaxhpo.from_optax(lambda p, h, b: jnp.sum(outside(p) ** 2), optax.sgd(0.1))
    got = jaxhpo.solve(solver, solver.init(jnp.ones(3), None), None, num_steps=1).params
    np.testing.assert_allclose(got, 1.0 - 0.1 * np.sin(2.0), rtol=1e-12)  # d(sin² x)/dx = sin 2x
