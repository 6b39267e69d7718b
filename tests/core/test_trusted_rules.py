"""Trust of derivative rules in a train loss: right ones raise no warning, those that alter gradients do."""

import contextlib
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhpo
from jaxhpo import CG, Implicit, Unroll
from jaxhpo._core.cost import bytes_between_passes
from jaxhpo._core.trace import trust, untrusted_rule


@jax.custom_vjp
def reversed_vjp(x):
    return x


reversed_vjp.defvjp(lambda x: (x, None), lambda _, g: (-g,))


@jax.custom_vjp
def clipped_vjp(x):
    return x


clipped_vjp.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))


@jax.custom_jvp
def reversed_jvp(x):
    return x


reversed_jvp.defjvp(lambda primals, tangents: (primals[0], -tangents[0]))


@jax.custom_jvp
def scaled_jvp(x, scale, key):
    """An identity in the first argument; the others have no tangent."""
    return x


scaled_jvp.defjvp(lambda primals, tangents: (primals[0], 0.5 * tangents[0]))


@jax.custom_jvp
def square(x):
    return x * x


square.defjvp(lambda primals, tangents: (primals[0] ** 2, 2 * primals[0] * tangents[0]))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def same_type(dtype, x):
    """An identity whose rule calls the function itself, as `lineax` has one."""
    return jnp.asarray(x, dtype)


same_type.defjvp(lambda dtype, primals, tangents: (same_type(dtype, *primals), same_type(dtype, *tangents)))


@jax.custom_jvp
def constant(x):
    return x


@constant.defjvp
def _constant_jvp(primals, tangents):
    raise RuntimeError("not differentiable")


def linear_solve(x):
    lineax = pytest.importorskip("lineax")
    matrix = jnp.eye(x.size, dtype=x.dtype) + x[:, None] * x[None, :]
    return lineax.linear_solve(lineax.MatrixLinearOperator(matrix), x, lineax.AutoLinearSolver(well_posed=True)).value


RIGHT = {
    "optax.projections.projection_simplex": optax.projections.projection_simplex,
    "lineax.linear_solve": linear_solve,
    "jax.nn.relu": jax.nn.relu,
    "a custom_jvp": square,
    "an identity that keeps the tangent": functools.partial(same_type, jnp.float64),
    "an identity that refuses a tangent": lambda x: x + constant(jax.lax.stop_gradient(x)),
}
ALTERING = {
    "custom_vjp that reverses": reversed_vjp,
    "custom_vjp that clips": clipped_vjp,
    "optax.scale_gradient": lambda x: optax.scale_gradient(x, 0.5),
    "custom_jvp that reverses": reversed_jvp,
    "custom_jvp that scales": lambda x: scaled_jvp(x, 2, jax.random.key(0)),
}
TRANSFORMS = {
    "plain": lambda fn: fn,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "vmap": lambda fn: lambda x: jax.vmap(fn)(jnp.stack([x, x])),
    "scan": lambda fn: lambda x: jax.lax.scan(lambda c, _: (fn(c), None), x, None, 2)[0],
}
X = jnp.array([0.2, 0.5, 0.9])


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", RIGHT | ALTERING)
def test_untrusted_rule(name, transform):
    fn = TRANSFORMS[transform]((RIGHT | ALTERING)[name])
    found = untrusted_rule(lambda x: jnp.sum(fn(x) ** 2), X)
    assert (found is None) == (name in RIGHT), found


def test_untrusted_rule_names_function_and_place():
    found = untrusted_rule(reversed_vjp, X)
    assert found is not None and found.startswith("`reversed_vjp` (") and "test_trusted_rules.py" in found


def test_trust_is_of_one_function_not_of_its_name():
    def make():
        @jax.custom_vjp
        def layer(x):
            return x

        layer.defvjp(lambda x: (x, None), lambda _, g: (g,))
        return layer

    ours = trust(make())
    assert untrusted_rule(ours, X) is None

    @jax.custom_vjp
    def layer(x):
        return x

    layer.defvjp(lambda x: (x, None), lambda _, g: (g,))
    assert untrusted_rule(layer, X) is not None


@pytest.mark.parametrize(
    "rule", [Unroll(), Unroll(checkpoint="binomial"), Implicit(CG()), jaxhpo.DrMAD(), jaxhpo.Forward()], ids=repr
)
def test_nested_solves_are_trusted(rule):
    solver = jaxhpo.from_optax(lambda p, h, b: jnp.sum((p - h) ** 2) + jnp.sum(p**4), optax.sgd(0.1))
    if isinstance(rule, jaxhpo.DrMAD):
        solver = jaxhpo.momentum_sgd(lambda p, h, b: jnp.sum((p - h) ** 2), 0.1, 0.9)

    def nested(h):
        start = solver.init(jnp.zeros(3), h)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return jaxhpo.solve(solver, start, h, num_steps=3, adjoint=rule).params

    assert untrusted_rule(nested, X) is None
    if not isinstance(rule, jaxhpo.Forward):
        assert untrusted_rule(jax.grad(lambda h: jnp.sum(nested(h) ** 2)), X) is None


def through(layer, adjoint, **kwargs):
    """The hypergradient of a penalty, with the parameters behind a layer."""

    def train_loss(p, h, b):
        return jnp.mean((b @ layer(p) - 0.3) ** 2) + h * jnp.sum(p**2)

    solver = jaxhpo.from_optax(train_loss, optax.sgd(0.1))

    def outer(h):
        return jnp.sum(
            jaxhpo.solve(solver, solver.init(X, h), h, jnp.ones((3, 2, 3)), adjoint=adjoint, **kwargs).params
        )

    return jax.grad(outer)(jnp.array(0.5)), outer


@pytest.mark.parametrize("name", RIGHT)
def test_right_rules_under_implicit_cg_raise_no_warning(name):
    grad = jax.eval_shape(lambda: through(RIGHT[name], Implicit(CG()))[0])  # warnings are errors
    assert grad.shape == ()


@pytest.mark.parametrize("name", ALTERING)
def test_rules_that_alter_gradients_warn_under_implicit_cg(name):
    with pytest.warns(RuntimeWarning, match="derivative rule of its own"), contextlib.suppress(jaxhpo.JaxhpoError):
        jax.eval_shape(lambda: through(ALTERING[name], Implicit(CG()))[0])


@pytest.mark.parametrize("name", RIGHT)
def test_right_rules_under_hvp_fraction_are_accepted(name):
    adjoint = Unroll(hvp_fraction=0.5)
    grad = jax.eval_shape(lambda: through(RIGHT[name], adjoint, key=jax.random.key(0))[0])
    assert grad.shape == ()


@pytest.mark.parametrize("name", ALTERING)
def test_rules_that_alter_gradients_are_refused_under_hvp_fraction(name):
    with pytest.raises(jaxhpo.JaxhpoError, match="hvp_fraction"):
        jax.eval_shape(lambda: through(ALTERING[name], Unroll(hvp_fraction=0.5), key=jax.random.key(0))[0])


@pytest.mark.parametrize("name", ["custom_vjp that reverses", "custom_jvp that reverses"])
def test_rules_that_alter_gradients_are_differentiated_in_plain_reverse_mode(name):
    got, want = (through(ALTERING[name], Unroll(checkpoint=c))[0] for c in (1, None))
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("name", ["optax.projections.projection_simplex", "lineax.linear_solve"])
def test_right_rules_are_differentiated_in_mixed_mode(name):
    (got, outer), (want, plain) = (through(RIGHT[name], Unroll(checkpoint=c)) for c in (1, None))
    np.testing.assert_allclose(got, want, rtol=1e-10)
    # Mixed mode keeps the state alone of every step, plain reverse mode all that the gradient computed.
    assert bytes_between_passes(outer, jnp.array(0.5)) < bytes_between_passes(plain, jnp.array(0.5)) / 2
