"""Linear solvers report the right status and residual, on regular and degenerate systems, against NumPy."""

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optax
import pytest
import test_sharding

import jaxhpo
from jaxhpo import (
    CG,
    GMRES,
    BiCGStab,
    Direct,
    Identity,
    Implicit,
    LinearStatus,
    Neumann,
    NormalCG,
    Nystrom,
    from_lineax,
)

N = 8
CONVERGED, MAX_ITERATIONS, INDEFINITE, NOT_FINITE, STALLED = LinearStatus
MOST = 10_000  # iterations allowed: a solve that stalls must end long before


def rotated(eigenvalues, seed):
    """Return a symmetric matrix of these eigenvalues."""
    Q = np.linalg.qr(np.random.default_rng(seed).normal(size=(N, N)))[0]
    return (Q * eigenvalues) @ Q.T


def systems(small, large):
    """Return name -> (A, b); the squares of `small` and `large` are zero and infinite in the working precision."""
    rng = np.random.default_rng(0)
    b, A = rng.normal(size=N), rng.normal(size=(N, N))
    definite = rotated(np.geomspace(1e-2, 1, N), 1)
    singular = rotated(np.r_[0, 0, np.linspace(0.2, 1, N - 2)], 3)
    at = np.arange(N) == 3
    return {
        "definite": (definite, b),
        "tiny b": (definite, small * b),
        "huge b": (definite, large * b),
        "b = 0": (definite, 0 * b),
        "not symmetric": (A + 4 * np.eye(N), b),
        "indefinite": (rotated(np.linspace(-1, 1, N), 2), b),
        "skew": (A - A.T, b),
        "singular": (singular, b),  # b is not in its range
        "singular, solvable": (singular, singular @ b),
        "zero pivot": (np.diag(np.r_[np.linspace(0.2, 1, N - 1), 0]), b),
        "ill-conditioned": (rotated(np.geomspace(1e-14, 1, N), 4), b),
        "zero": (np.zeros((N, N)), b),
        "NaN in A": (np.where(np.eye(N) > 0, np.nan, definite), b),
        "NaN in b": (definite, np.where(at, np.nan, b)),
        "infinite b": (definite, np.where(at, np.inf, b)),
    }


SOLVERS = {
    "CG": CG(maxiter=MOST),
    "NormalCG": NormalCG(maxiter=MOST),
    "GMRES": GMRES(maxiter=MOST),
    "BiCGStab": BiCGStab(maxiter=MOST),
    "Direct": Direct(),
    "Neumann": Neumann(40, 0.5),
    "Identity": Identity(0.5),
    "Nystrom": Nystrom(4, 0.5),
    "lineax GMRES": from_lineax(lineax.GMRES(rtol=1e-10, atol=1e-10)),
    "lineax LU": from_lineax(lineax.LU()),
}
ITERATIVE = ("CG", "NormalCG", "GMRES", "BiCGStab")
# The status of each solve by its first letter (Converged, Max iterations or terms, Indefinite, Not finite, Stalled), in
# the order of SOLVERS. `-`: the solver is for symmetric matrices only.
ENDS = {
    "definite": "C C C C C M M M C C",
    "tiny b": "C C C C C M M M C C",
    "huge b": "C C C C C M M M C C",
    "b = 0": "C C C C C C C C C C",
    "not symmetric": "- C C C C S S - C C",
    "indefinite": "I C C C C S M I C C",
    "skew": "I C C S C S S - C C",
    "singular": "S C S S S M M M S S",  # NormalCG: least squares
    "singular, solvable": "C C C C C M M M C C",
    "zero pivot": "S C S S N M M M S N",
    "ill-conditioned": "S S S S S M M C S S",
    "zero": "S S S S N S S C N N",  # Nystrom: ρI is solved
    "NaN in A": "N N N N N N N N N N",
    "NaN in b": "N N N N N N N N N N",
    "infinite b": "N N N N N N N N N N",
}
STATUS = {status.name[0]: status for status in LinearStatus}
QUICK = ("CG", "Direct", "Neumann")


def rows(quick, names=tuple(SOLVERS), codegen=()):
    def marks(name):
        return pytest.mark.codegen if name in codegen else () if name in quick else pytest.mark.slow

    return pytest.mark.parametrize("name", [pytest.param(n, marks=marks(n)) for n in names])


def solve(name, A, b):
    key = {"key": jax.random.key(0)} if name == "Nystrom" else {}
    return SOLVERS[name](lambda v: A @ v, b, **key)


def true_residual(name, A, b, x):
    """Return ‖b − A x‖ / ‖b‖ in float64, of the damped matrix where the solver has a damping."""
    A = A + getattr(SOLVERS[name], "damping", 0) * np.eye(N)
    size = np.abs(b).max() or 1.0
    r = b / size - A @ (x / size)
    return np.linalg.norm(r) / (np.linalg.norm(b / size) or 1.0)


# The iteration at which BiCGStab stalls hangs on the last bits of its sums.
@rows(QUICK, codegen=("BiCGStab",))
def test_status_and_residual(name):
    """All systems in one batch, under `jit` of `vmap`."""
    check(name, systems(1e-200, 1e200), jnp.float64)


@pytest.mark.slow
@rows((), tuple(SOLVERS))
def test_status_and_residual_in_float32(name):
    cases = systems(1e-30, 1e30)
    del cases["ill-conditioned"]  # singular in float32
    check(name, cases, jnp.float32)


def check(name, cases, dtype):
    A, b = (np.stack(part).astype(dtype) for part in zip(*cases.values(), strict=True))
    xs, infos = jax.tree.map(np.asarray, jax.jit(jax.vmap(lambda A, b: solve(name, A, b)))(A, b))
    eps = float(jnp.finfo(dtype).eps)
    for i, case in enumerate(cases):
        end = ENDS[case].split()[list(SOLVERS).index(name)]
        if end == "-":
            continue
        x, info, where = xs[i].astype(float), jax.tree.map(lambda leaf, i=i: leaf[i], infos), f"{name}, {case}"
        if case in ("singular", "zero pivot") and dtype == jnp.float32 and name == "Neumann":
            end = "S"  # the terms in the range have vanished; those in the null space remain
        assert LinearStatus(int(info.status)) == STATUS[end], where
        if end == "N":
            assert np.isnan(info.residual), where
            assert not np.isfinite(x).all() or (name == "Identity" and case == "NaN in A"), where
            continue
        A64, b64 = A[i].astype(float), b[i].astype(float)
        want = true_residual(name, A64, b64, x)
        # Both sides round A x, by ε ‖A‖ ‖x‖ per term.
        size = np.linalg.norm(b64 / (np.abs(b64).max() or 1)) or 1.0
        rounding = N * eps * (1 + np.linalg.norm(A64, 2) * np.linalg.norm(x / (np.abs(b64).max() or 1)) / size)
        assert np.isfinite(x).all() and abs(info.residual - want) <= rounding, where
        if end == "C" and name != "NormalCG":
            assert info.residual <= (1 if "lineax" in name else eps**0.5), where
        if name in ITERATIVE:
            assert info.residual <= 1 or end == "I", where  # no worse than x = 0
            assert info.num_iterations <= 600, where  # of at least 10 000


@pytest.mark.slow
@rows((), tuple(SOLVERS))
def test_batched_status_equals_unbatched(name):
    """`vmap` runs every solve as long as the longest, which must not change the others."""
    cases = systems(1e-200, 1e200)
    A, b = (np.stack(part) for part in zip(*cases.values(), strict=True))
    one = jax.jit(lambda A, b: solve(name, A, b)[1])
    batched = jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(A, b))
    single = [one(A[i], b[i]) for i in range(len(cases))]
    for i, case in enumerate(cases):
        # Batched products are rounded differently, and rounding decides the iterations of these two systems.
        if case not in ("skew", "ill-conditioned"):
            assert single[i].status == batched.status[i], case
            assert abs(int(single[i].num_iterations) - int(batched.num_iterations[i])) <= 20, case


@pytest.mark.slow
@rows((), ITERATIVE)
def test_start_from_x0(name):
    """No product is needed from the solution; the answer is the same from other starts; b = 0 ignores the start."""
    A, b = systems(1, 1)["definite"]
    x = np.linalg.solve(A, b)

    @jax.jit
    @jax.vmap
    def run(b, x0):
        return SOLVERS[name](lambda v: A @ v, b, x0)

    bs, starts = np.stack([b, b, 1e-200 * b, 0 * b]), np.stack([x, 10 * b, 1e-200 * x, b])
    got, info = jax.tree.map(np.asarray, run(bs, starts))
    want = np.stack([x, x, x, 0 * b])
    # ‖x − x*‖ ≤ ‖A⁻¹‖ ‖r‖ with ‖A⁻¹‖ = 100 and ‖r‖ ≤ 4e-12 ‖b‖; for the normal equations 100 once more.
    scale = np.asarray([1, 1, 1e-200, 1])[:, None]
    assert np.abs(got / scale - want).max() <= 1e4 * 4e-12 * np.linalg.norm(b)
    assert list(info.status) == [CONVERGED] * 4
    assert info.num_iterations[0] == info.num_iterations[2] == info.num_iterations[3] == 0 < info.num_iterations[1]


def krylov(A, b, k):
    """Return an orthonormal basis of b, Ab, …, Aᵏ⁻¹b."""
    return np.linalg.qr(np.stack([np.linalg.matrix_power(A, j) @ b for j in range(k)], axis=1))[0]


@pytest.mark.slow
@rows((), ("CG", "NormalCG", "GMRES"))
def test_stopped_after_three_iterations(name):
    """The iterate minimises the error in A's norm (CG), or the residual, over the Krylov space."""
    A, b = systems(1, 1)["definite"]
    if name == "CG":
        V, solver = krylov(A, b, 3), CG(maxiter=3)
        want = V @ np.linalg.solve(V.T @ A @ V, V.T @ b)
    else:
        V = krylov(A, b, 3) if name == "GMRES" else krylov(A.T @ A, A.T @ b, 3)
        want = V @ np.linalg.lstsq(A @ V, b)[0]
        solver = GMRES(maxiter=1, restart=3) if name == "GMRES" else NormalCG(maxiter=3)
    x, info = jax.tree.map(np.asarray, jax.jit(lambda b: solver(lambda v: A @ v, b))(b))
    np.testing.assert_allclose(x, want, rtol=1e-10)
    assert info.status == MAX_ITERATIONS and info.num_iterations == 3
    assert info.residual == pytest.approx(np.linalg.norm(b - A @ want) / np.linalg.norm(b), rel=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver", [BiCGStab(maxiter=2), from_lineax(lineax.BiCGStab(rtol=1e-9, atol=1e-9, max_steps=2))], ids=str
)
def test_max_iterations_status(solver):
    A, b = systems(1, 1)["definite"]
    x, info = solver(lambda v: A @ v, jnp.asarray(b))
    assert info.status == MAX_ITERATIONS
    assert info.residual == pytest.approx(np.linalg.norm(b - A @ x) / np.linalg.norm(b), rel=1e-10)
    assert 1e-9 < info.residual


@pytest.mark.slow
@pytest.mark.parametrize("solver", [CG, GMRES, BiCGStab], ids=lambda s: s.__name__)
def test_rounding_limited_residual_converges_without_tol(solver):
    """In float32 at condition 3000 a residual of 1e-6 is out of reach, and no solver uses all its iterations."""
    A = jnp.asarray(rotated(np.geomspace(1 / 3000, 1, N), 5), jnp.float32)
    b = jnp.asarray(np.random.default_rng(6).normal(size=N), jnp.float32)
    _, info = solver(maxiter=MOST)(lambda v: A @ v, b)
    assert info.status == CONVERGED and info.residual <= 3.5e-4  # √ε
    _, info = solver(maxiter=MOST, tol=1e-7)(lambda v: A @ v, b)
    assert info.status == STALLED and info.residual <= 3.5e-4 and info.num_iterations < 600


@pytest.mark.slow
def test_normal_cg_least_squares_and_its_transpose():
    """On a singular matrix: A⁺b, and A⁺ᵀv for the derivative, though neither b nor v is in the range."""
    rng = np.random.default_rng(0)
    A = rng.normal(size=(N, N)) @ (np.eye(N) - np.ones((N, N)) / N)
    b, v = rng.normal(size=(2, N))
    x, back = jax.vjp(lambda b: NormalCG()(lambda u: A @ u, b)[0], jnp.asarray(b))
    np.testing.assert_allclose(x, np.linalg.pinv(A) @ b, rtol=1e-8)
    np.testing.assert_allclose(back(jnp.asarray(v))[0], np.linalg.pinv(A).T @ v, rtol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [GMRES(tol=1e-13), BiCGStab(tol=1e-13), NormalCG(tol=1e-13)], ids=str)
def test_inside_shard_map(solver):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(test_sharding.AxisType.Auto,))
    test_sharding.test_data_parallel_shard_map(Implicit(solver), "grad of shard_map", mesh)
    test_sharding.test_data_parallel_shard_map(Implicit(solver), "shard_map of grad", mesh)
    test_sharding.test_one_inner_problem_per_device(Implicit(solver), mesh)


@pytest.mark.slow
def test_check_hypergradient_reports_stalled():
    """A parameter that only the outer loss reads gives a singular Hessian and a right-hand side outside its range."""
    solver = jaxhpo.from_optax(lambda p, h, b: jnp.sum((p[:2] - h) ** 2), optax.sgd(0.1))

    def loss(h):
        return jnp.sum(jaxhpo.solve(solver, solver.init(jnp.ones(3), h), h, num_steps=100, adjoint=Implicit()).params)

    check = jaxhpo.check_hypergradient(loss, jnp.asarray(0.5))
    assert check.linear_statuses == (STALLED,) and "STALLED" in str(check)
    # H = diag(2, 2, 0), b = (1, 1, 1): one step of 3/4 along b, then a direction of no curvature. 2 · 2 · 3/4, not 2.
    assert check.analytic[0] == pytest.approx(3) and check.numeric[0] == pytest.approx(2)
