"""Proximal and projected inner steps: the solution, and its implicit derivative along the active set."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import relative_error

import jaxhpo
from jaxhpo import GMRES, BiCGStab, Direct, Implicit, Neumann, NormalCG, Unroll

RNG = np.random.default_rng(0)
DIM, NUM = 8, 40
# A general design: correlated columns, none orthogonal to another.
X = RNG.normal(size=(NUM, DIM)) @ (np.eye(DIM) + 0.3 * RNG.normal(size=(DIM, DIM)))
Y = X @ np.array([2.0, -1.5, 0, 0, 1.0, 0, 0.5, 0]) + 0.3 * RNG.normal(size=NUM)
GRAM, XY = X.T @ X / NUM, X.T @ Y / NUM
RATE = 1 / np.linalg.eigvalsh(GRAM)[-1]
TARGET = RNG.normal(size=DIM)
UPPER = 0.8  # of the box
STEPS = 4000  # the contraction 1 − μ/L on the support, to the power of this, is below 1e-16


class Problem(NamedTuple):
    """An update, the hyperparameters, and its solution and Jacobian in closed form.

    `solution(w)` is the solution in closed form on the support, bounds or face where w lies, and `jacobian(w)` its
    derivative with respect to the hyperparameters, shape (DIM, m).
    """

    step: Callable
    hparams: Any
    solution: Callable[[np.ndarray], np.ndarray]
    jacobian: Callable[[np.ndarray], np.ndarray]


def soft(w, threshold):
    return jnp.sign(w) * jnp.maximum(jnp.abs(w) - threshold, 0)


def descent(w, linear=XY):
    return w - RATE * (GRAM @ w - linear)


def embed(rows, block):
    """A matrix of DIM rows with the block in the given rows, zeros elsewhere."""
    out = np.zeros((DIM, *np.shape(block)[1:]))
    out[rows] = block
    return out


def lasso(h):
    """min ‖y − Xw‖²/2n + Σ e^h_j |w_j|, and ½ e^g ‖w‖² with two hyperparameters: w_S = (G_SS + e^g)⁻¹ (c_S − e^h s)."""
    h, ridge = (h["l1"], np.exp(h["l2"])) if isinstance(h, dict) else (h, 0.0)
    penalty = np.exp(h) * np.ones(DIM)

    def step(w, h, batch):
        h, ridge = (h["l1"], jnp.exp(h["l2"])) if isinstance(h, dict) else (h, 0.0)
        return soft(descent(w), RATE * jnp.exp(h)) / (1 + RATE * ridge)

    def inverse(S):
        return np.linalg.inv(GRAM[np.ix_(S, S)] + ridge * np.eye(S.sum()))

    def solution(w):
        S = w != 0
        return embed(S, inverse(S) @ (XY - penalty * np.sign(w))[S])

    def jacobian(w):
        S = w != 0
        columns = np.diag(penalty * np.sign(w)) if np.ndim(h) else (penalty * np.sign(w))[:, None]
        by_penalty = embed(S, -inverse(S) @ columns[S])
        return np.hstack([by_penalty, embed(S, -ridge * inverse(S) @ w[S, None])]) if ridge else by_penalty

    return Problem(step, {"l1": h, "l2": np.log(ridge)} if ridge else h, solution, jacobian)


def box(h):
    """min ½wᵀGw − cᵀw over 0 ≤ w ≤ u, in c and u: w_F = G_FF⁻¹ (c_F − G_FU u_U) on the free set F, U at the bound."""

    def step(w, h, batch):
        return jnp.clip(descent(w, h["linear"]), 0, h["upper"])

    def sets(w):
        return (w > 0) & (w < h["upper"]), w == h["upper"]

    def solution(w):
        F, U = sets(w)
        return embed(F, np.linalg.solve(GRAM[np.ix_(F, F)], h["linear"][F] - GRAM[np.ix_(F, U)] @ w[U])) + U * w

    def jacobian(w):
        F, U = sets(w)
        inverse = np.linalg.inv(GRAM[np.ix_(F, F)])
        by_linear, by_upper = np.zeros((2, DIM, DIM))
        by_linear[np.ix_(F, F)] = inverse
        by_upper[np.ix_(U, U)] = np.eye(U.sum())
        by_upper[np.ix_(F, U)] = -inverse @ GRAM[np.ix_(F, U)]
        return np.hstack([by_linear, by_upper])

    return Problem(step, h, solution, jacobian)


def simplex(h):
    """min ½wᵀGw − cᵀw over the simplex, in c: on the support G w + ν1 = c and 1ᵀw = 1."""

    def step(w, h, batch):
        return optax.projections.projection_simplex(descent(w, h))

    def kkt(w):
        S = w > 0
        ones = np.ones((S.sum(), 1))
        return S, np.linalg.inv(np.block([[GRAM[np.ix_(S, S)], ones], [ones.T, np.zeros((1, 1))]]))

    def solution(w):
        S, inverse = kkt(w)
        return embed(S, (inverse @ np.r_[h[S], 1.0])[:-1])

    def jacobian(w):
        S, inverse = kkt(w)
        out = np.zeros((DIM, DIM))
        out[np.ix_(S, S)] = inverse[:-1, :-1]
        return out

    return Problem(step, h, solution, jacobian)


def group(h):
    """Groups of two, e^h ‖w_g‖ each: G w − c + e^h w/‖w_g‖ = 0 on the groups that are not zero."""

    def step(w, h, batch):
        z = descent(w).reshape(-1, 2)
        size = jnp.linalg.norm(z, axis=1, keepdims=True)
        return (z * jnp.maximum(1 - RATE * jnp.exp(h) / size, 0)).reshape(-1)

    def unit(w):
        pairs = w.reshape(-1, 2)
        return (pairs / np.maximum(np.linalg.norm(pairs, axis=1, keepdims=True), 1e-300)).reshape(-1)

    def curvature(w):
        out = np.zeros((DIM, DIM))
        for g in range(0, DIM, 2):
            n, size = unit(w)[g : g + 2], np.linalg.norm(w[g : g + 2])
            if size:
                out[g : g + 2, g : g + 2] = np.exp(h) * (np.eye(2) - np.outer(n, n)) / size
        return out

    def solution(w):  # one step of Newton's method, which the solution does not move
        S = w != 0
        gradient = GRAM @ w - XY + np.exp(h) * unit(w)
        return w - embed(S, np.linalg.solve((GRAM + curvature(w))[np.ix_(S, S)], gradient[S]))

    def jacobian(w):
        S = w != 0
        return embed(S, -np.linalg.solve((GRAM + curvature(w))[np.ix_(S, S)], np.exp(h) * unit(w)[S, None]))

    return Problem(step, h, solution, jacobian)


PROBLEMS = {
    "lasso": lasso(np.log(0.3)),
    "weighted lasso": lasso(np.log(np.linspace(0.1, 0.6, DIM))),
    "elastic net": lasso({"l1": np.log(0.2), "l2": np.log(0.1)}),
    "group lasso": group(np.log(0.5)),
    "box": box({"linear": XY, "upper": np.full(DIM, UPPER)}),
    "simplex": simplex(XY),
}
RULES = {
    "direct": Implicit(Direct()),
    "gmres": Implicit(GMRES(tol=1e-13)),
    "bicgstab": Implicit(BiCGStab(tol=1e-13)),
    "normal-cg": Implicit(NormalCG(tol=1e-13)),
    "neumann": Implicit(Neumann(STEPS, 1.0)),
    "unroll": Unroll(),
}
QUICK = {("weighted lasso", "direct")}


def solve(problem, h, rule=RULES["direct"]):
    solver = jaxhpo.fixed_point(problem.step)
    return jaxhpo.solve(solver, solver.init(jnp.full(DIM, 0.1), h), h, num_steps=STEPS, adjoint=rule).params


def outer_loss(problem, rule=RULES["direct"]):
    return lambda h: 0.5 * jnp.sum((solve(problem, h, rule) - TARGET) ** 2)


@functools.cache
def solution(name):
    return np.asarray(jax.jit(lambda: solve(PROBLEMS[name], PROBLEMS[name].hparams))())


def gradient(problem, rule):
    h = jax.tree.map(jnp.asarray, problem.hparams)
    return np.concatenate([np.atleast_1d(g) for g in jax.tree.leaves(jax.jit(jax.grad(outer_loss(problem, rule)))(h))])


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        pytest.param(name, rule, marks=() if (name, rule) in QUICK else pytest.mark.slow)
        for name in PROBLEMS
        for rule in RULES
    ],
)
def test_hypergradient(name, rule):
    """dF/dh = (dw/dh)ᵀ(w − target), by the closed form on the active set; exactly zero off it."""
    problem = PROBLEMS[name]
    w = solution(name)
    assert relative_error(w, problem.solution(w)) <= 1e-12
    active = w[(w != 0) & (w != UPPER)]
    assert 2 <= len(active) < DIM and np.abs(active).min() > 1e-3  # some inactive, none about to change
    jacobian = problem.jacobian(w)
    got = gradient(problem, RULES[rule])
    assert relative_error(got, jacobian.T @ (w - TARGET)) <= 1e-10
    if rule != "unroll":  # earlier steps had another active set
        assert np.array_equal(got == 0, ~jacobian.any(axis=0))


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBLEMS)
def test_central_differences(name):
    """The steps of the differences, below 2e-3, do not change the active set."""
    check = jaxhpo.check_hypergradient(outer_loss(PROBLEMS[name]), PROBLEMS[name].hparams)
    assert check.relative_error <= 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lasso", "weighted lasso", "elastic net"])
def test_solution_equals_scikit_learn(name):
    """Its objective: ‖y − Xw‖²/2n + α ρ ‖w‖₁ + ½ α (1 − ρ) ‖w‖²; one penalty per feature by scaling the columns."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    problem, exact = PROBLEMS[name], {"fit_intercept": False, "tol": 1e-14, "max_iter": 10**6}
    h, scale = problem.hparams, 1.0
    if name == "elastic net":
        l1, l2 = np.exp(h["l1"]), np.exp(h["l2"])
        model = linear_model.ElasticNet(alpha=l1 + l2, l1_ratio=l1 / (l1 + l2), **exact)
    else:
        model, scale = linear_model.Lasso(alpha=1.0, **exact), 1 / np.exp(h)
    want = model.fit(X * scale, Y).coef_ * scale
    got = solution(name)
    assert relative_error(got, want) <= 1e-8
    assert np.array_equal(got != 0, want != 0)


@pytest.mark.slow
def test_penalties_of_inactive_features_warn_and_are_not_refused():
    """The hypergradient of such a leaf is zero at this point only: it warns, where an unused leaf would raise."""
    problem = PROBLEMS["weighted lasso"]
    h = {"active": jnp.asarray(problem.hparams[:5]), "inactive": jnp.asarray(problem.hparams[5:])}

    def loss(h):
        return outer_loss(problem)(jnp.concatenate([h["active"], h["inactive"]]))

    with pytest.warns(jaxhpo.ZeroHypergradientWarning, match=r"hparams\['inactive'\].*zero at this point"):
        check = jaxhpo.check_hypergradient(loss, h)
    assert check.relative_error <= 1e-8
    with pytest.warns(jaxhpo.ZeroHypergradientWarning, match=r"hparams\['inactive'\].*zero at this point"):
        result = jaxhpo.tune(loss, h, optax.sgd(0.01), num_steps=2, progress=False)
    assert np.array_equal(result.hparams["inactive"], h["inactive"])
    assert result.history["value"][1] < result.history["value"][0]
