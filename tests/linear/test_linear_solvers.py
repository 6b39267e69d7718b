"""Linear solvers report the right status and residual, on regular and degenerate systems, against NumPy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optax
import pytest
import test_sharding
from jax.scipy.sparse.linalg import bicgstab

import jaxhpo
from jaxhpo import (
    CG,
    GMRES,
    BiCGStab,
    Direct,
    General,
    Identity,
    Implicit,
    LinearInfo,
    LinearStatus,
    Neumann,
    NormalCG,
    Nystrom,
    from_lineax,
)
from jaxhpo._core.trace import equations
from jaxhpo._core.validate import short_name
from jaxhpo._linear.report import judged

N = 8
CONVERGED, MAX_ITERATIONS, INDEFINITE, NOT_FINITE, STALLED = LinearStatus
MOST = 10_000  # iterations allowed: a solve that stalls must end long before


def rotated(eigenvalues, seed):
    """Return a symmetric matrix of these eigenvalues."""
    Q = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues), len(eigenvalues))))[0]
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
    "General": General(),
}
ITERATIVE = ("CG", "NormalCG", "GMRES", "BiCGStab")
# The status of each solve by its first letter (Converged, Max iterations or terms, Indefinite, Not finite, Stalled), in
# the order of SOLVERS. `-`: the solver is for symmetric matrices only.
ENDS = {
    "definite": "C C C C C M M M C C C",
    "tiny b": "C C C C C M M M C C C",
    "huge b": "C C C C C M M M C C C",
    "b = 0": "C C C C C C C C C C C",
    "not symmetric": "- C C C C S S - C C C",
    "indefinite": "I C C C C S M I C C C",
    "skew": "I C C S C S S - C C C",
    "singular": "S C S S S M M M S S S",  # NormalCG: least squares
    "singular, solvable": "C C C C S M M M S S S",  # these see the null space, in which x is arbitrary
    "zero pivot": "S C S S N M M M S N S",
    "ill-conditioned": "S S S S S M M C S S S",
    "zero": "S S S S N S S C N N S",  # Nystrom: ρI is solved
    "NaN in A": "N N N N N N N N N N N",
    "NaN in b": "N N N N N N N N N N N",
    "infinite b": "N N N N N N N N N N N",
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
    check(name, jnp.float64)


@pytest.mark.slow
@rows((), tuple(SOLVERS))
def test_status_and_residual_in_float32(name):
    check(name, jnp.float32)


@functools.cache
def solved(name, dtype):
    """Returns the systems, stacked, their solutions and reports."""
    low = dtype == jnp.float32
    cases = systems(*((1e-30, 1e30) if low else (1e-200, 1e200)))
    if low:
        del cases["ill-conditioned"]  # singular in float32
    A, b = (np.stack(part).astype(dtype) for part in zip(*cases.values(), strict=True))
    xs, infos = jax.tree.map(np.asarray, jax.jit(jax.vmap(lambda A, b: solve(name, A, b)))(A, b))
    return tuple(cases), A, b, xs, infos


def check(name, dtype):
    cases, A, b, xs, infos = solved(name, dtype)
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
    cases, A, b, _, batched = solved(name, jnp.float64)
    one = jax.jit(lambda A, b: solve(name, A, b)[1])
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


def dense(matvec, b):
    """A solver of a user's, whose columns vary over no mesh axis."""
    matrix = jax.vmap(matvec, out_axes=1)(jnp.eye(b.size))
    return jnp.linalg.solve(matrix, b), LinearInfo(status=CONVERGED)


def scipy_cg(matvec, b):
    return jax.scipy.sparse.linalg.cg(matvec, b, tol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver", [GMRES(tol=1e-13), BiCGStab(tol=1e-13), NormalCG(tol=1e-13), dense, scipy_cg], ids=short_name
)
def test_inside_shard_map(solver):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(test_sharding.AxisType.Auto,))
    like = Implicit(Direct())  # on one device; `test_any_invertible_matrix` and others hold the solvers to it there
    test_sharding.test_data_parallel_shard_map(Implicit(solver), "grad of shard_map", mesh, like)
    test_sharding.test_data_parallel_shard_map(Implicit(solver), "shard_map of grad", mesh, like)
    test_sharding.test_one_inner_problem_per_device(Implicit(solver), mesh, like)


def invertible(n):
    """Return name -> an invertible matrix; on all but the first some method for definite or symmetric ones is wrong."""
    rng = np.random.default_rng(7)
    C, B = rng.normal(size=(n // 4, n - n // 4)), rng.normal(size=(n - n // 4, n - n // 4))
    H, zero = B @ B.T / n + 0.1 * np.eye(n - n // 4), np.zeros((n // 4, n // 4))
    definite = rotated(np.geomspace(1e-2, 1, n), 1)
    return {
        "definite": definite,
        "negative": -definite,
        "KKT": np.block([[H, C.T], [C, zero]]),
        "KKT, other sign": np.block([[H, -C.T], [C, zero]]),
        "skew": np.kron(np.diag(np.linspace(1, 2, n // 2)), [[0, -1], [1, 0]]),
        "cycle": np.roll(np.eye(n), 1, 0),
        "contraction": np.eye(n) - 0.9 * np.abs(B := rng.normal(size=(n, n))) / np.abs(B).sum(1, keepdims=True),
    }


GENERAL = {"dense": (100, 1000), "dense at last": (1, 1000), "no matrix": (1, 1)}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*GENERAL, "after CG", "GMRES", "NormalCG", "Direct"])
def test_any_invertible_matrix(name, monkeypatch):
    """And its transpose; also by the methods that `General` has for more parameters."""
    tiny, small = GENERAL.get(name, (1, 1000))
    monkeypatch.setattr("jaxhpo._linear.general._TINY", tiny)
    monkeypatch.setattr("jaxhpo._linear.general._SMALL", small)
    solver = CG(fallback=General()) if name == "after CG" else SOLVERS.get(name, General())
    symmetric = name == "after CG"
    A = np.stack([A for A in invertible(12).values() if not symmetric or np.allclose(A, A.T)])
    w = np.random.default_rng(8).normal(size=(len(A), 12))

    @jax.jit
    @jax.vmap
    def both(A, b, v):
        x, back, info = jax.vjp(lambda b: solver(lambda u: A @ u, b), b, has_aux=True)
        return x, back(v)[0], info

    x, back, info = both(A, np.einsum("kij,kj->ki", A, w), np.einsum("kji,kj->ki", A, w))
    # Condition numbers up to 100, squared in the normal equations, times a residual of 4e-12.
    assert max(np.abs(x - w).max(), np.abs(back - w).max()) <= 1e-6
    assert (info.status == CONVERGED).all() and not info.failed.any()


@pytest.mark.codegen
def test_dense_fallback_is_made_only_where_it_is_needed():
    """Under `vmap`: XLA would move a factorisation that depends on nothing in a loop to before it."""
    program = jax.vmap(lambda scale, b: CG(fallback=General())(lambda v: scale * v, b)[0])
    text = jax.jit(program).lower(jnp.ones(2), jnp.ones((2, 8))).compile().as_text()
    before, main = text.split("\nENTRY")
    assert "lapack" in before and "lapack" not in main


# Of solvers that are not the library's, the library judges the answer; that of lineax is an adapter's.
OTHERS = {
    "lineax CG": from_lineax(lineax.CG(rtol=1e-6, atol=1e-6)),
    "jax.scipy cg": judged(lambda matvec, b, x0: jax.scipy.sparse.linalg.cg(matvec, b)),
    "jax.scipy gmres": judged(lambda matvec, b, x0: jax.scipy.sparse.linalg.gmres(matvec, b)),
    "claims": judged(lambda matvec, b, x0: (bicgstab(matvec, b)[0], LinearInfo(jnp.zeros(()), 0, CONVERGED))),
}
LIBRARY = ("CG", "NormalCG", "GMRES", "BiCGStab", "Direct", "General", "lineax LU", "Nystrom")


def in_float32(A, v):
    return A @ v


def in_bfloat16(A, v):
    return (A @ v.astype(A.dtype)).astype(jnp.float32)


@functools.cache
def damped_solve(name, product, rank):
    """One program for all systems and dampings, and for matrices that are rounded to bfloat16 or are not."""

    def run(A, b, damping):
        if name == "Nystrom":
            rule = Nystrom(rank, 1.0)
            object.__setattr__(rule, "damping", damping)  # traced
            return rule(lambda v: product(A, v), b, key=jax.random.key(0))
        return (SOLVERS | OTHERS)[name](lambda v: product(A, v) + damping * v, b, None)

    return jax.jit(run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "product"),
    [
        *((name, jnp.float32, in_float32) for name in (*LIBRARY, *OTHERS)),
        # Rounded to bfloat16 a matrix may be slightly indefinite: CG, GMRES and BiCGStab pass 1 in 1000 of these with
        # an error above 1 %.
        *((name, jnp.bfloat16, in_float32) for name in ("NormalCG", "Direct", "General", "Nystrom", *OTHERS)),
        *((name, jnp.bfloat16, in_bfloat16) for name in ("CG", "GMRES", "Direct", "lineax CG", "claims")),
    ],
)
def test_float32_is_right_within_one_percent_or_says_so(name, dtype, product):
    """Against the damped solution in float64, for b without structure and b = A w; `pytest -s` prints the table.

    In b = A w the small eigenvalues leave no trace above the tolerance: the residual is small, and x may be wrong. A
    matrix of a bfloat16 model is rounded; its products are taken in float32, unless the model insists on bfloat16.
    """
    n, conditions, rng = 24, (1e0, 1e2, 1e3, 1e4, 1e5, 1e6, 1e8), np.random.default_rng(9)
    kinds = [(condition, kind) for condition in conditions for kind in ("b", "A w")]
    matrices = [rotated(np.geomspace(1 / c, 1, n), i) for i, (c, _) in enumerate(kinds)]
    As = [jnp.asarray((A + A.T) / 2, dtype) for A in matrices]
    if product is in_float32:
        As = [A.astype(jnp.float32) for A in As]

    for damping, rank in itertools.product((1e-8, 1e-6, 1e-4, 1e-2, 1.0), (5, n) if name == "Nystrom" else (n,)):
        for (condition, kind), A, w in zip(kinds, As, rng.normal(size=(len(kinds), n)), strict=True):
            damped = np.asarray(A).astype(float) + damping * np.eye(n)
            b = (damped @ w if kind == "A w" else w).astype(np.float32)
            x, info = damped_solve(name, product, rank)(A, b, np.float32(damping))
            want = np.linalg.solve(damped, b.astype(float))
            error, status = np.linalg.norm(x - want) / np.linalg.norm(want), LinearStatus(int(info.status))
            where = f"{name}({damping:g}), {condition:g}, {kind}, {rank}"
            print(f"{where}: error {error:.0e}, residual {info.residual:.0e}, {status.name}{' F' * bool(info.failed)}")
            # The status of NormalCG is that of least squares: its residual says that A x = b is not solved.
            assert error <= 1e-2 or status != CONVERGED or (name == "NormalCG" and info.residual > 1e-2), where
            if min(condition, 1 / damping) <= 1e3 and rank == n and dtype == jnp.float32:
                # ε times the square of that is 0.1, for NormalCG; the tolerance of jax.scipy's is 1e-5
                assert name in ("NormalCG", *OTHERS) or (error <= 1e-2 and status == CONVERGED and not info.failed), (
                    where
                )
            if condition == damping == 1 and product is in_float32 and rank == n:
                assert error <= 1e-2 and status == CONVERGED and not info.failed, where


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CG", "GMRES", "BiCGStab"])
def test_unseen_directions_in_float32(name):
    """One that A nearly maps to zero, without a trace in b, is met in the residual; one that it maps to zero is not."""
    n, draws, rng = 24, 100, np.random.default_rng(10)
    near = np.stack([rotated(np.r_[1e-5, np.geomspace(1e-3, 1, n - 1)], i) for i in range(draws)])
    # Softmax regression, whose intercepts are not penalised.
    x = np.concatenate([rng.normal(size=(draws, 2 * n, n // 3 - 1)), np.ones((draws, 2 * n, 1))], 2)
    p = np.asarray(jax.nn.softmax(rng.normal(size=(draws, 2 * n, 3))))
    curvature = p[..., None] * np.eye(3) - p[..., None] * p[..., None, :]
    flat = np.einsum("dmi,dmj,dmab->diajb", x, x, curvature).reshape(draws, n, n) / (2 * n)
    flat += np.diag(np.r_[np.full(n - 3, 0.01), np.zeros(3)])

    A = np.stack([near, flat]).astype(np.float32)
    b = np.einsum("kdij,dj->kdi", A.astype(float), rng.normal(size=(draws, n))).astype(np.float32)
    solve = jax.jit(jax.vmap(jax.vmap(lambda A, b: SOLVERS[name](lambda v: A @ v, b))))
    x, info = jax.tree.map(np.asarray, solve(A, b))
    want = np.linalg.solve(A[0].astype(float), b[0].astype(float)[..., None])[..., 0]
    wrong = np.linalg.norm(x[0] - want, axis=1) > 1e-2 * np.linalg.norm(want, axis=1)
    assert wrong.sum() > 10 and not (wrong & (info.status[0] == CONVERGED)).any()
    assert (info.status[1] == CONVERGED).all()


METHODS = [
    *(Implicit(solver) for solver in (Nystrom(3, 0.1), Nystrom(6, 0.1), GMRES())),
    jaxhpo.Forward(),
    jaxhpo.ForwardGradient(3),
    jaxhpo.Smoothing(3, 0.1),
    jaxhpo.RealTime(),
    jaxhpo.PersistentES(2, 0.1, horizon=4),
    jaxhpo.Hypernetwork(optax.sgd(0.1), scale=0.1),
]


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(
            m,
            id=type(getattr(m, "linear_solver", m)).__name__,
            marks=[] if m in (METHODS[0], jaxhpo.RealTime()) else pytest.mark.slow,
        )
        for m in METHODS
    ],
)
def test_own_products_have_the_highest_precision(method):
    """An accelerator's default rounds to fewer bits. The losses have no product of matrices, so all are our own."""
    solver = jaxhpo.from_optax(lambda p, h, b: jnp.sum((jnp.sin(p) - h) ** 2 + (p * p[::-1]) ** 2), optax.sgd(0.1))
    pair = jaxhpo.hypergradient(method, solver, lambda solution, h, b: jnp.sum(solution.params**2), num_steps=4)
    h, key = jnp.ones(6), jax.random.key(0)
    program = jax.make_jaxpr(lambda h: pair.update(h, pair.init(jnp.zeros(6), h), None, None, key))(h)
    products = [e for e in equations(program.jaxpr) if e.primitive.name == "dot_general"]
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert products and all(e.params["precision"] == highest for e in products)


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
