"""Cost of an implicit hypergradient: one linearisation, shared by all its products and by all outer losses."""

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optax
import pytest
from helpers import PROBLEMS, partial_sum

from jaxhpo import (
    CG,
    GMRES,
    BiCGStab,
    Direct,
    Identity,
    Implicit,
    Neumann,
    NormalCG,
    Nystrom,
    from_lineax,
    from_optax,
    hypergradient,
    solve,
)
from jaxhpo._core.cost import count_arithmetic

SIZES, BATCH, STEPS, ITERATIONS = (12, 6, 5, 3), 8, 3, 5
# Multiplications of matrix products for one example, with F = Σ nᵢ nᵢ₊₁ of the layers and D = F less the first layer's,
# whose inputs have no derivative. A gradient is a pass forward, F, one back to the activations, D, and one to the
# weights, F. A tangent of x W is ẋ W + x Ẇ, in all D + F; of the two products of the backward pass, 2 D and D + F.
F = sum(a * b for a, b in zip(SIZES[:-1], SIZES[1:], strict=True))
D = F - SIZES[0] * SIZES[1]
GRADIENT, PRODUCT = 2 * F + D, 2 * F + 4 * D
LINEARISATION = F + D  # what products need: activations, and the backward pass to them
MIXED = F + D  # of weights of examples, the tangent of the losses: it shares the linearisation's values


def network():
    """An MLP with a weight for each example: `(linear_solver, h) -> outer losses`, a pair's `h -> hypergradient`, h."""
    rng = np.random.default_rng(0)
    params = [rng.normal(size=shape) for shape in zip(SIZES[:-1], SIZES[1:], strict=True)]
    data, val_data = rng.normal(size=(2, BATCH, SIZES[0]))

    def losses(params, inputs):
        *hidden, last = params
        for weights in hidden:
            inputs = jnp.tanh(inputs @ weights)
        return jnp.sum((inputs @ last) ** 2, axis=-1)

    def train_loss(params, h, batch):
        return jnp.sum(h * losses(params, data))

    solver = from_optax(train_loss, optax.sgd(0.1))

    def outer(linear_solver, h):
        start = solver.init(params, h)
        return losses(solve(solver, start, h, num_steps=STEPS, adjoint=Implicit(linear_solver)).params, val_data)

    def update(h):
        outer_loss = lambda solution, h, batch: jnp.sum(losses(solution.params, val_data))  # noqa: E731
        pair = hypergradient(Implicit(CG(ITERATIONS)), solver, outer_loss, num_steps=STEPS)
        return pair.update(h, pair.init(params, h))[0]

    return outer, update, np.ones(BATCH)


def products(function, *args):
    """Multiplications of matrix products for one example."""
    return count_arithmetic(function, *args, unknown_length=ITERATIONS, elementwise=False) / (2 * BATCH)


@pytest.mark.parametrize(
    "linear_solver", [CG(ITERATIONS), pytest.param(Neumann(ITERATIONS + 1, 0.1), marks=pytest.mark.slow)], ids=str
)
def test_one_linearisation_for_all_products_and_outer_losses(linear_solver):
    """At 784-256-256-10 that is K · 1.34 + 1.11 gradients, beside those of training and of the outer loss."""
    outer, _, h = network()
    shared = STEPS * GRADIENT + LINEARISATION + F
    each = (F + D) + ITERATIONS * PRODUCT + MIXED  # of the outer loss first, whose pass forward is shared
    assert products(jax.jacrev(lambda h: outer(linear_solver, h)[:4]), h) == shared + 4 * each


@pytest.mark.slow
def test_a_pair_linearises_once():
    """One product more is for the residual at which the warm-started solve begins."""
    _, update, h = network()
    want = STEPS * GRADIENT + GRADIENT + LINEARISATION + (ITERATIONS + 1) * PRODUCT + MIXED
    assert products(update, h) == want


RIDGE = PROBLEMS["ridge"]
DAMPED = lambda A: np.linalg.inv(A + 0.1 * np.eye(len(A)))  # noqa: E731
INVERSES = [
    (CG(), np.linalg.inv),
    (CG(damping=0.1), DAMPED),
    (GMRES(), np.linalg.inv),
    (BiCGStab(), np.linalg.inv),
    (NormalCG(), np.linalg.inv),
    (Direct(), np.linalg.inv),
    (Nystrom(6, 0.1), DAMPED),
    (Neumann(5, 0.3), lambda A: partial_sum(A, 0.3, 5)),
    (Identity(0.3), lambda A: 0.3 * np.eye(len(A))),
    (from_lineax(lineax.CG(rtol=1e-12, atol=1e-12)), np.linalg.inv),
    (from_lineax(lineax.LU()), np.linalg.inv),
]


@pytest.mark.parametrize(
    ("linear_solver", "inverse"),
    [pytest.param(*row, id=str(row[0]), marks=[pytest.mark.slow] if i else []) for i, row in enumerate(INVERSES)],
)
def test_many_right_hand_sides(linear_solver, inverse):
    """θ = A⁻¹ Xᵀy with A = XᵀX + diag(eʰ), so vᵀ dθ/dh = −(A⁻¹v) eʰ θ, for right-hand sides that end apart."""
    solver, theta = from_optax(RIDGE.train_loss, optax.sgd(RIDGE.step_size)), RIDGE.solution(RIDGE.hparams)
    hessians = []
    RIDGE.partial(RIDGE.hparams, lambda H: hessians.append(H) or H)
    A = hessians[0]
    # An eigenvector takes one iteration of conjugate gradients, zero none, and a sum of k eigenvectors k.
    Q = np.linalg.eigh(A)[1]
    V = np.stack([Q[:, 0], 1e3 * Q.sum(1), 0 * theta, Q[:, :3].sum(1), np.eye(6)[0]])

    @jax.jit
    def pulled(h, V):
        rule, key = Implicit(linear_solver), jax.random.key(0)
        start = solver.init(theta, h)
        _, pullback = jax.vjp(lambda h: solve(solver, start, h, num_steps=1, adjoint=rule, key=key).params, h)
        return jax.vmap(lambda v: pullback(v)[0])(V)

    want = -(V @ inverse(A)) * np.exp(RIDGE.hparams) * theta  # every inverse here is symmetric
    # Relative residuals of 2e-12, and condition numbers below 10 (100 for the normal equations).
    for got, row in zip(pulled(RIDGE.hparams, V), want, strict=True):
        assert np.linalg.norm(got - row) <= 1e-9 * np.linalg.norm(row)
