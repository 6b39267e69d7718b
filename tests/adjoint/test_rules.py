"""Every derivative rule against its own closed form, through every transformation."""

import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    ALL_RULES,
    BY_NAME,
    PROBLEMS,
    QUICK,
    compile_events,
    grad,
    outer_loss,
    partial_sum,
    relative_error,
    rows,
)

import jaxhpo
from jaxhpo import CG, Direct, Identity, Implicit, Neumann, Nystrom, Unroll

rules, slow = rows(), pytest.mark.slow
SLOW = ("unroll-plain", "unroll-7", "forward", "direct", "gmres", "bicgstab", "normal-cg", "lineax")
CONVERGED = 400  # gradient steps after which every problem here is at its solution to 1e-12


def steps_for(case):
    return CONVERGED if case.implicit else 40


def closed_form_rows():
    """Each rule on each problem, and in each precision: ridge in float64, the others in float32 and float64 in turn."""
    rows = [(name, "ridge", 32) for name in QUICK]
    for i, case in enumerate(ALL_RULES):
        rows.append((case.name, "ridge", 64))
        rows.append((case.name, "quadratic", 32 if i % 2 or not case.implicit or case.name in QUICK else 64))
        if case.implicit:
            rows.append((case.name, "logistic", 64 if i % 2 and case.name not in QUICK else 32))
    return [
        pytest.param(
            BY_NAME[name],
            problem,
            bits,
            id=f"{problem}-{name}-f{bits}",
            marks=[] if problem == "ridge" or name in QUICK else [slow],
        )
        for name, problem, bits in rows
    ]


# What is asked of exact rules, 1e-9 in float64 and 1e-4 in float32; approximate ones reach it on their own closed form.
@pytest.mark.parametrize(("case", "problem", "bits"), closed_form_rows())
def test_closed_form(case, problem, bits):
    dtype, tolerance = {64: (jnp.float64, 1e-9), 32: (jnp.float32, 1e-4)}[bits]
    problem = PROBLEMS[problem]
    T = steps_for(case)
    got = grad(outer_loss(problem, case.make(problem), T, dtype))(jnp.asarray(problem.hparams, dtype))
    assert got.dtype == dtype
    assert relative_error(got, case.closed_form(problem, T)) <= tolerance


@pytest.mark.codegen
@pytest.mark.parametrize("case", ALL_RULES, ids=lambda c: c.name)
def test_default_code_generation(case):
    """Each rule compiled as users compile it; the other tests let XLA optimise little."""
    problem = PROBLEMS["ridge"]
    T = steps_for(case)
    got = grad(outer_loss(problem, case.make(problem), T))(jnp.asarray(problem.hparams))
    assert relative_error(got, case.closed_form(problem, T)) <= 1e-9


@pytest.mark.parametrize("checkpoint", [20, *(pytest.param(c, marks=pytest.mark.slow) for c in (None, 1, 7))])
def test_unrolled_logistic(checkpoint):
    """At convergence the unrolled hypergradient is the implicit one, whose closed form is known."""
    problem = PROBLEMS["logistic"]
    got = grad(outer_loss(problem, Unroll(checkpoint=checkpoint), CONVERGED))(jnp.asarray(problem.hparams))
    assert relative_error(got, problem.hypergradient(problem.hparams)) <= 1e-9


@pytest.mark.parametrize("num_steps", [17, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 16, 30))])
@pytest.mark.parametrize("checkpoint", [1, 4, 100, 5])
def test_schedules_agree(checkpoint, num_steps):
    """Every checkpoint schedule, dividing the number of steps or not, gives what plain autodiff gives."""
    problem = PROBLEMS["ridge"]
    h = jnp.asarray(problem.hparams)
    got = grad(outer_loss(problem, Unroll(checkpoint=checkpoint), num_steps))(h)
    assert relative_error(got, problem.unrolled(problem.hparams, problem.step_size, num_steps)) <= 1e-12


@rules
def test_jit_vmap_and_scan_equal_an_eager_loop(case):
    """Jitted as eagerly; three outer gradient steps in one scan, from several starts at once, are those of a loop."""
    problem = PROBLEMS["logistic"]
    loss = outer_loss(problem, case.make(problem), 20)
    once, h = grad(loss), jnp.asarray(problem.hparams)
    chex.assert_trees_all_close(jax.grad(loss)(h), once(h), rtol=1e-12)

    def three_steps(h):
        return jax.lax.scan(lambda h, _: (h - 0.1 * jax.grad(loss)(h), None), h, length=3)[0]

    hs = h[None] + jnp.linspace(-0.3, 0.3, 4)[:, None]
    scanned, looped = jax.jit(jax.vmap(three_steps))(hs), hs
    for _ in range(3):
        looped = looped - 0.1 * jnp.stack([once(h) for h in looped])
    chex.assert_trees_all_close(scanned, looped, rtol=1e-12)
    # The steps themselves, of which h is a multiple.
    chex.assert_trees_all_close(scanned - hs, looped - hs, rtol=1e-10)


def ridge_outer(h, problem):
    """F(h) of the ridge problem through a dense solve, for derivatives of any order by JAX alone."""
    A = jax.hessian(lambda w: problem.train_loss(w, h, None))(jnp.zeros(len(problem.params)))
    b = -jax.grad(lambda w: problem.train_loss(w, h, None))(jnp.zeros(len(problem.params)))
    return problem.val_loss(jnp.linalg.solve(A, b))


@functools.cache
def ridge_hessian():
    problem = PROBLEMS["ridge"]
    return jax.jit(jax.hessian(lambda h: ridge_outer(h, problem)))(jnp.asarray(problem.hparams))


# One rule of each kind in both modes, the others in each in turn.
HESSIANS = [(n, outer) for n in QUICK for outer in (jax.jacfwd, jax.jacrev)]
HESSIANS += [(n, (jax.jacfwd, jax.jacrev)[i % 2]) for i, n in enumerate(SLOW)]


@pytest.mark.parametrize(
    ("name", "outer"),
    [
        pytest.param(
            n, outer, id=f"{n}-{outer.__name__}", marks=[] if i == HESSIANS.index(("cg", jax.jacfwd)) else slow
        )
        for i, (n, outer) in enumerate(HESSIANS)
    ],
)
def test_hessian(name, outer):
    """Second derivatives of the outer loss: 1e-8 is the figure asked for."""
    problem = PROBLEMS["ridge"]
    h = jnp.asarray(problem.hparams)
    got = jax.jit(outer(jax.grad(outer_loss(problem, BY_NAME[name].make(problem), CONVERGED))))(h)
    assert relative_error(got, ridge_hessian()) <= 1e-8


LEVELS = {"unroll": Unroll(), "cg": Implicit(CG(tol=1e-13)), "direct": Implicit(Direct())}


@pytest.mark.parametrize(
    ("rule", "middle_rule"),
    [
        pytest.param(LEVELS[a], LEVELS[b], id=f"{a}-{b}", marks=[] if {a, b} == {"unroll", "cg"} else pytest.mark.slow)
        for a in LEVELS
        for b in LEVELS
    ],
)
def test_three_levels(rule, middle_rule):
    r"""Inner: w minimises ½(w−h)² + ½ρw², so w = h/(1+ρ); middle: h minimises ½(w(h)−z)² + ½κh²; outer: ½(w−c)² in z.

    h = z(1+ρ) / (1 + κ(1+ρ)²), so with s = dw/dz = 1/(1 + κ(1+ρ)²) the derivative is s (s z − c).
    """
    rho, kappa, c, z = 0.5, 0.3, 2.0, 1.2
    inner = jaxhpo.from_optax(lambda w, h, b: 0.5 * (w - h) ** 2 + 0.5 * rho * w**2, optax.sgd(0.5))

    def response(h):
        return jaxhpo.solve(inner, inner.init(jnp.zeros(()), h), h, num_steps=40, adjoint=rule).params

    middle = jaxhpo.from_optax(lambda h, z, b: 0.5 * (response(h) - z) ** 2 + 0.5 * kappa * h**2, optax.sgd(1.0))

    def outer(z):
        h = jaxhpo.solve(middle, middle.init(jnp.zeros(()), z), z, num_steps=120, adjoint=middle_rule).params
        return 0.5 * (response(h) - c) ** 2

    s = 1 / (1 + kappa * (1 + rho) ** 2)
    assert grad(outer)(jnp.asarray(z)) == pytest.approx(s * (s * z - c), rel=1e-9)


# --- identities at a converged solution of gradient descent ---
# 1e-12, entry by entry, is the figure asked for. The start is the solution itself, found by NumPy: from elsewhere a
# truncated sum would keep the derivative of the way there.


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (Unroll(truncate=1), lambda a: Implicit(Identity(a))),
        (Unroll(truncate=9), lambda a: Implicit(Neumann(9, a))),
        (Unroll(), lambda a: Implicit(CG(tol=1e-14))),
        pytest.param(Unroll(), lambda a: Implicit(CG()), marks=pytest.mark.slow),
        pytest.param(Unroll(), lambda a: Implicit(Direct()), marks=pytest.mark.slow),
        (Implicit(Neumann(1, 0.25)), lambda a: Implicit(Identity(0.25))),
    ],
    ids=[
        "one step = T1-T2",
        "K steps = K terms",
        "unrolled = CG",
        "unrolled = CG as it comes",
        "unrolled = direct",
        "one term = T1-T2",
    ],
)
@pytest.mark.parametrize("problem", ["ridge", pytest.param("logistic", marks=pytest.mark.slow)])
def test_identity(problem, left, right):
    both = [at_the_solution(problem, rule) for rule in (left, right(PROBLEMS[problem].step_size))]
    chex.assert_trees_all_close(*both, rtol=1e-12)


@functools.cache  # of unrolling, which is one side of several
def at_the_solution(name, rule):
    problem = PROBLEMS[name]
    start = problem.solution(problem.hparams)
    return grad(outer_loss(problem, rule, CONVERGED, start=start))(jnp.asarray(problem.hparams))


class Classifier(NamedTuple):
    """Logistic regression on given data, with the closed form of each curvature, and hypergradients by it.

    dF/dh = −eʰ w ∘ G⁻¹ ∇V, V = ‖w − target‖², with G = Xᵀ diag(weight) X / n + diag(eʰ): weight p(1 − p) for the
    Hessian, which is Gauss-Newton's since the model is linear, and (p − y)² for the outer product.
    """

    train_loss: Any
    target: np.ndarray
    batch: tuple
    hparams: np.ndarray
    solution: np.ndarray
    curvatures: dict[str, Any]
    hypergradients: dict[str, np.ndarray]


@functools.cache
def classifier():
    rng = np.random.default_rng(0)
    X, y, h, target = rng.normal(size=(40, 5)), np.sign(rng.normal(size=40)), np.linspace(-2, -1, 5), np.arange(5.0)

    def example_loss(w, h, batch):
        return jax.nn.softplus(-batch[1] * (batch[0] @ w))

    def penalty(w, h):
        return 0.5 * jnp.sum(jnp.exp(h) * w**2)

    def matrix(weight):
        return X.T @ (X * weight[:, None]) / len(y) + np.diag(np.exp(h))

    w = np.zeros(5)
    for _ in range(30):  # Newton's method
        p = 1 / (1 + np.exp(-X @ w))
        w = w - np.linalg.solve(matrix(p * (1 - p)), X.T @ (p - (y > 0)) / len(y) + np.exp(h) * w)
    p = 1 / (1 + np.exp(-X @ w))
    weights = {"hessian": p * (1 - p), "gauss_newton": p * (1 - p), "outer_product": (p - (y > 0)) ** 2}
    curvatures = {
        "hessian": "hessian",
        "gauss_newton": jaxhpo.gauss_newton(
            lambda w, h, batch: batch[0] @ w, lambda o, batch: jnp.mean(jax.nn.softplus(-batch[1] * o)), penalty
        ),
        "outer_product": jaxhpo.outer_product(example_loss, penalty),
    }
    return Classifier(
        lambda w, h, batch: jnp.mean(example_loss(w, h, batch)) + penalty(w, h),
        target,
        (X, y),
        h,
        w,
        curvatures,
        {name: -np.exp(h) * w * np.linalg.solve(matrix(v), 2 * (w - target)) for name, v in weights.items()},
    )


def classifier_gradient(linear_solver, curvature, dtype=jnp.float64):
    """At the solution, in the given precision."""
    case = classifier()
    batch, target = (jax.tree.map(lambda x: jnp.asarray(x, dtype), part) for part in (case.batch, case.target))
    solver = jaxhpo.from_optax(case.train_loss, optax.sgd(0.1))
    rule = Implicit(linear_solver, curvature=case.curvatures[curvature])

    def loss(h):
        start = solver.init(jnp.asarray(case.solution, dtype), h)
        sol = jaxhpo.solve(solver, start, h, lambda t: batch, num_steps=1, adjoint=rule)
        return jnp.sum((sol.params - target) ** 2)

    return grad(loss)(jnp.asarray(case.hparams, dtype))


@pytest.mark.parametrize(
    ("linear_solver", "curvature"),
    [
        pytest.param(Direct(), "outer_product", id="Larsen"),
        pytest.param(Direct(), "gauss_newton", id="Gauss-Newton", marks=pytest.mark.slow),
        pytest.param(Direct(), "hessian", id="Bengio", marks=pytest.mark.slow),
        pytest.param(CG(tol=1e-14), "hessian", id="HOAG and iMAML", marks=pytest.mark.slow),
    ],
)
def test_named_method(linear_solver, curvature):
    got = classifier_gradient(linear_solver, curvature)
    np.testing.assert_allclose(got, classifier().hypergradients[curvature], rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "inverse"),
    [
        pytest.param(lambda p: Identity(p.step_size), lambda H, a: a * np.eye(len(H)), id="T1-T2"),
        pytest.param(lambda p: Neumann(9, p.step_size), lambda H, a: partial_sum(H, a, 9), id="Lorraine"),
        pytest.param(lambda p: Nystrom(6, 0.1), lambda H, a: np.linalg.inv(H + 0.1 * np.eye(6)), id="Hataya"),
    ],
)
@pytest.mark.slow
def test_named_approximation(make, inverse):
    """To its own closed form on ridge regression, the rank of Hataya's sketch being that of the Hessian."""
    problem = PROBLEMS["ridge"]
    start = problem.solution(problem.hparams)
    got = grad(outer_loss(problem, Implicit(make(problem)), 1, start=start))(jnp.asarray(problem.hparams))
    np.testing.assert_allclose(
        got, problem.partial(problem.hparams, lambda H: inverse(H, problem.step_size)), rtol=1e-12
    )


def test_neumann_error_is_geometric():
    """Relative error in the slowest eigendirection: (1 − αμ)^K."""
    problem = PROBLEMS["ridge"]
    H = np.asarray(jax.jit(jax.hessian(problem.train_loss))(problem.params, problem.hparams, None))
    mu, v = (x[..., 0] for x in np.linalg.eigh(H))
    for K in (1, 4, 16):
        x, info = jax.jit(lambda b, K=K: Neumann(K, problem.step_size)(lambda u: H @ u, b))(v)
        error = relative_error(x, v / mu)
        assert error == pytest.approx((1 - problem.step_size * mu) ** K, rel=1e-9)
        assert info.residual == pytest.approx(error, rel=1e-9)


# --- precision, compilation ---


def spied(linear_solver, seen):
    """The linear solver, noting the types of the right-hand side, and of what its matrix takes and gives."""

    class Spy(jaxhpo.LinearSolver):
        needs_key = linear_solver.needs_key

        def __call__(self, matvec, b, x0=None, **key):
            product = jax.eval_shape(matvec, b)
            seen.extend(leaf.dtype for leaf in jax.tree.leaves((b, product)))
            return linear_solver(matvec, b, x0, **key)

    return Spy()


def cosine(got, want):
    got = np.asarray(got, float)
    return np.vdot(got, want) / np.linalg.norm(got) / np.linalg.norm(want)


@rules
def test_bfloat16(case):
    """A bfloat16 model: hypergradients point the right way, and every implicit rule solves in float32."""
    problem = PROBLEMS["ridge"]
    seen, adjoint = [], case.make(problem)
    if case.implicit:
        adjoint = dataclasses.replace(adjoint, linear_solver=spied(adjoint.linear_solver, seen))

    def to_bf16(loss):
        return lambda w, h, batch: loss(w, h, batch).astype(jnp.bfloat16)

    low = problem._replace(train_loss=to_bf16(problem.train_loss))
    h = jnp.asarray(problem.hparams, jnp.bfloat16)
    got = grad(outer_loss(low, adjoint, 60, jnp.bfloat16))(h)
    assert got.dtype == jnp.bfloat16
    assert cosine(got, case.closed_form(problem, 60)) > 0.99  # the figure of the reliability targets for bfloat16
    assert bool(seen) == case.implicit and set(seen) <= {jnp.dtype(jnp.float32)}


@pytest.mark.slow
@pytest.mark.parametrize("linear_solver", [CG(), Direct()], ids=str)
@pytest.mark.parametrize("curvature", ["gauss_newton", "outer_product"])
def test_bfloat16_curvature(curvature, linear_solver):
    seen = []
    got = classifier_gradient(spied(linear_solver, seen), curvature, jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    assert cosine(got, classifier().hypergradients[curvature]) > 0.99
    assert seen and set(seen) == {jnp.dtype(jnp.float32)}


@rules
def test_one_compilation(case):
    """100 outer steps of a plain loop compile in the first alone; eagerly, each later one compiles its loops alone."""
    problem = PROBLEMS["quadratic"]
    loss, h = outer_loss(problem, case.make(problem), 5), jnp.asarray(problem.hparams)
    step = grad(loss)
    with compile_events("backend_compile") as first:
        h = h - 0.01 * step(h)  # what comes out must be, in type and place, what went in
    with compile_events("backend_compile") as later:
        for _ in range(99):
            h = h - 0.01 * step(h)
    assert first and not later
    counts = []
    for _ in range(3):
        with compile_events("backend_compile") as found:
            h = h - 0.01 * jax.grad(loss)(h)
        counts.append(len(found))
    # JAX compiles a loop anew where its body is a new function: the run, the way back, those of a linear solve
    # (the normal equations have the most).
    assert counts[2] == counts[1] <= 6, counts


def test_settings_are_values():
    """Equal settings are equal, hash equal, and print as the call that made them."""
    assert Unroll(checkpoint=4) == Unroll(checkpoint=4) != Unroll(checkpoint=5)
    for make in (lambda: Implicit(CG(maxiter=7)), lambda: Implicit(Neumann(3, 0.5)), lambda: Unroll(truncate=3)):
        assert make() == make() and hash(make()) == hash(make())
        names = {n: getattr(jaxhpo, n) for n in ("Implicit", "CG", "Neumann", "Unroll")}
        assert eval(repr(make()), names) == make()


FORWARD_MODE = {
    "jvp": lambda f, h: jax.jvp(f, (h,), (h,)),
    "linearize": lambda f, h: jax.linearize(f, h)[1](h),
    "jacfwd": lambda f, h: jax.jacfwd(f)(h),
    "jit": lambda f, h: jax.jit(lambda h: jax.jvp(f, (h,), (h,)))(h),
}
SCHEDULES = {"checkpoint": 1}, {"checkpoint": 2}, {"checkpoint": "binomial"}, {"checkpoint": 1, "truncate": 2}
REVERSE_ONLY = [Unroll(**s) for s in SCHEDULES] + [jaxhpo.DrMAD(), jaxhpo.SAMA(), jaxhpo.FiniteDifference(0.1)]
REVERSE_ONLY += [jaxhpo.Reversible()]


@pytest.mark.parametrize("i", range(len(REVERSE_ONLY)), ids=lambda i: type(REVERSE_ONLY[i]).__name__)
def test_forward_mode_names_the_rule_that_has_it(i):
    """A `custom_vjp` would raise JAX's own error, which names neither the rule nor `Forward()`."""
    mode = list(FORWARD_MODE.values())[i % 4]
    solver = jaxhpo.momentum_sgd(lambda w, h, batch: jnp.sum((w - h) ** 2), 0.1, 0.5)

    def loss(h):
        start = solver.init(jnp.zeros(2), h)
        return jnp.sum(jaxhpo.solve(solver, start, h, num_steps=3, adjoint=REVERSE_ONLY[i]).params)

    with pytest.raises(jaxhpo.JaxhpoError, match=r"Forward mode .* `adjoint=Forward\(\)`"):
        mode(loss, jnp.ones(2))


@pytest.mark.parametrize("nothing", [{}, jnp.zeros(0)], ids=str)
def test_an_empty_tree_of_hyperparameters_is_as_good_as_none(nothing):
    def trained(rate, h):
        solver = jaxhpo.from_optax(lambda w, h, batch: (w - 1.0) ** 2, optax.sgd(rate))
        return jaxhpo.solve(solver, solver.init(0.0, h), h, num_steps=2, adjoint=jaxhpo.Forward()).params

    assert jax.grad(trained)(0.1, nothing) == jax.grad(trained)(0.1, None)
