"""A rule, a linear solver, a stateful method and a transform of a user's, each in a file outside the package."""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import PROBLEMS, outer_loss, partial_sum, relative_error
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxhpo
from jaxhpo import GMRES, Identity, Implicit, JaxhpoError, LinearInfo, LinearStatus, Unroll
from jaxhpo._linear.report import judged

sys.path.insert(0, str(pathlib.Path(__file__).parent / "own"))
from own_linear_solver import Richardson  # noqa: E402
from own_rule import LastSteps  # noqa: E402
from own_stateful_method import RunningMean  # noqa: E402
from own_transform import PowerOfTwo  # noqa: E402

P = PROBLEMS["ridge"]
H = jnp.asarray(P.hparams)
STEPS = 60
# Each with its closed form and the start for which that holds. Richardson's iterate from zero is the Neumann sum.
OWN = {
    "rule": (LastSteps(5), P.unrolled(P.hparams, P.step_size, STEPS, 5), P.params),
    "linear solver": (
        Implicit(Richardson(1 / P.step_size, 5)),
        P.partial(P.hparams, lambda hessian: partial_sum(hessian, P.step_size, 5)),
        P.solution(P.hparams),
    ),
}


def make_outer_loss(rule):
    return outer_loss(P, rule, STEPS)


@pytest.mark.parametrize("name", OWN)
def test_solve_gives_the_closed_form(name):
    rule, want, start = OWN[name]
    assert (
        relative_error(jax.jit(jax.grad(outer_loss(P, rule, STEPS, start=start)))(H), want) < 1e-9
    )  # DESIGN.md: closed forms to 1e-9


@pytest.mark.parametrize("name", OWN)
def test_tune_compare_and_check_hypergradient_take_it(name):
    rule, want, start = OWN[name]

    def make_outer_loss(rule):
        return outer_loss(P, rule, STEPS, start=start)

    loss = make_outer_loss(rule)
    check = jaxhpo.check_hypergradient(loss, H)
    directions = np.asarray(check.analytic)
    assert relative_error(directions, want) < 1e-9  # along every coordinate
    result = jaxhpo.tune(loss, H, optax.sgd(0.1), num_steps=1, progress=False)
    assert relative_error(H - result.hparams, 0.1 * want) < 1e-9  # one step of gradient descent
    comparison = jaxhpo.compare(make_outer_loss, H, [rule, Unroll()], repeats=1, progress=False)
    assert comparison.rows[0].finite and comparison.rows[0].name.startswith(("LastSteps", "Implicit(Richardson"))


def test_a_linear_solver_that_needs_symmetry_is_refused_where_there_is_none():
    solver = jaxhpo.fixed_point(lambda w, h, batch: 0.5 * w + h)
    with pytest.raises(JaxhpoError, match="needs a symmetric matrix"):
        jaxhpo.solve(solver, solver.init(H, H), H, num_steps=3, adjoint=Implicit(Richardson(10.0, 5)))


def test_a_stateful_method_runs_under_hypergradient_and_tune():
    solver = jaxhpo.from_optax(P.train_loss, optax.sgd(P.step_size))
    start = jnp.asarray(P.params)
    pair = jaxhpo.hypergradient(
        RunningMean(0.25), solver, lambda sol, h, batch: P.val_loss(sol.params), num_steps=STEPS, warm_start=False
    )
    want = 0.25 * P.unrolled(P.hparams, P.step_size, STEPS)  # a mean that starts at zero
    grad, _, info = pair.update(H, pair.init(start, H))
    assert relative_error(grad, want) < 1e-9 and bool(info.solution.finite)
    result = jaxhpo.tune(
        None,
        H,
        optax.sgd(0.1),
        num_steps=1,
        gradient=jaxhpo.from_pair(pair),
        carry=pair.init(start, H),
        progress=False,
    )
    assert relative_error(H - result.hparams, 0.1 * want) < 1e-9


def test_a_stateful_method_is_named_where_a_rule_is_wanted():
    with pytest.raises(JaxhpoError, match="hypergradient"):
        jax.grad(make_outer_loss(RunningMean(0.25)))(H)


def test_a_transform_is_searched_through():
    def loss(penalty):  # the problem's hyperparameters are natural logarithms
        return make_outer_loss(Unroll())(jnp.log(penalty))

    start = jnp.exp(H)
    result = jaxhpo.tune(loss, start, optax.sgd(0.1), num_steps=1, transforms=PowerOfTwo(), progress=False)
    want = jnp.log2(start) - 0.1 * jax.grad(lambda u: loss(2.0**u))(jnp.log2(start))
    assert relative_error(jnp.log2(result.hparams), want) < 1e-9


def test_a_function_is_a_linear_solver():
    def exact(matvec, b, x0=None):
        return GMRES()(matvec, b, x0)

    got, want = (jax.grad(make_outer_loss(rule))(H) for rule in (Implicit(exact), Implicit(GMRES())))
    np.testing.assert_array_equal(got, want)


@pytest.mark.slow
def test_a_linear_solver_need_not_be_linear():
    """Steepest descent until the residual is small; where its report says that it failed, the hypergradient is NaN."""

    def descent(status, matvec, b):
        def step(x):
            r = b - matvec(x)
            return x + (r @ r) / (r @ matvec(r)) * r

        x = jax.lax.while_loop(lambda x: jnp.linalg.norm(b - matvec(x)) > 1e-13 * jnp.linalg.norm(b), step, 0 * b)
        residual = jnp.linalg.norm(b - matvec(x)) / jnp.linalg.norm(b)
        return x, LinearInfo(residual, jnp.asarray(0), status)

    def value(status, on_failure="nan"):
        rule = Implicit(functools.partial(descent, status), on_failure=on_failure)
        return jax.grad(make_outer_loss(rule))(H)

    want = jax.jit(jax.grad(make_outer_loss(Implicit(GMRES()))))(H)
    got, failed = jax.jit(jax.vmap(value))(jnp.array([LinearStatus.CONVERGED, LinearStatus.INDEFINITE]))
    assert relative_error(got, want) < 1e-9
    assert jnp.isnan(failed).all()
    assert relative_error(jax.jit(lambda: value(LinearStatus.INDEFINITE, "keep"))(), want) < 1e-9


@pytest.mark.parametrize(
    ("report", "right", "wrong"),
    [
        (None, LinearStatus.CONVERGED, LinearStatus.MAX_ITERATIONS),
        (jnp.zeros(()), LinearStatus.CONVERGED, LinearStatus.MAX_ITERATIONS),  # as `jax.scipy.sparse.linalg.gmres`
        (LinearInfo(), LinearStatus.CONVERGED, LinearStatus.MAX_ITERATIONS),
        (LinearInfo(jnp.zeros(()), 0, LinearStatus.CONVERGED), LinearStatus.CONVERGED, LinearStatus.STALLED),
        (LinearInfo(status=LinearStatus.CONVERGED), LinearStatus.CONVERGED, LinearStatus.STALLED),
        (LinearInfo(status=LinearStatus.CONVERGED, failed=False),) + (LinearStatus.CONVERGED,) * 2,  # is believed
        (LinearInfo(jnp.ones(()), 0, LinearStatus.MAX_ITERATIONS),) + (LinearStatus.MAX_ITERATIONS,) * 2,
    ],
)
def test_a_report_of_a_user_is_checked_by_the_answer(report, right, wrong):
    """Of x = (1, s): a small residual hides a large error where s is wrong, and A = diag(1, 1e-6)."""
    scale = jnp.array([1.0, 1e-6])

    def solve(error, matvec, b, x0):
        x = b / scale * jnp.array([1.0, 1 + error])
        return x, report

    def status_of(error):
        info = judged(functools.partial(solve, error))(lambda v: scale * v, scale, None)[1]
        assert info.residual == pytest.approx(1e-6 * error, rel=1e-3, abs=1e-15) and not info.failed
        return int(info.status)

    assert status_of(0.0) == right and status_of(0.1) == wrong


@pytest.mark.slow
def test_a_linear_solver_must_not_close_over_arrays_of_an_explicit_mesh():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Explicit,))
    scale, start = (jax.device_put(jnp.full(6, v), NamedSharding(mesh, PartitionSpec("x"))) for v in (0.1, 0.0))
    solver = jaxhpo.from_optax(P.train_loss, optax.sgd(P.step_size))

    def scaled(matvec, b, x0=None, scale=scale):
        return scale * b, None

    def loss(rule, h, start):
        return P.val_loss(jaxhpo.solve(solver, solver.init(start, h), h, num_steps=3, adjoint=rule).params)

    with jax.set_mesh(mesh):
        grad = jax.grad(loss, 1)
        with pytest.raises(JaxhpoError, match=r"closes over an array on `Explicit` mesh axes.*functools\.partial"):
            grad(Implicit(scaled), H, start)
        given = functools.partial(scaled, scale=scale)
        assert not vars(given)  # a `partial` whose `__dict__` was looked at is not flattened by another
        got = grad(Implicit(given), H, start)
    assert relative_error(got, jax.grad(loss, 1)(Implicit(Identity(0.1)), H, jnp.zeros(6))) < 1e-9


@pytest.mark.slow
def test_a_randomised_rule_of_a_user_is_called_random():
    class Random:
        def run(self, problem):
            problem.require_key(self)
            return Implicit(Identity(0.1)).run(problem)

    comparison = jaxhpo.compare(make_outer_loss, H, [Random(), Unroll()], repeats=1, progress=False)
    assert "random" in " ".join(comparison.rows[0].notes)
    assert "random" not in " ".join(comparison.rows[1].notes)


@pytest.mark.parametrize(
    ("returned", "shown"),
    [
        (lambda state, n: state, r"InnerState\(params='float64\[6\]'"),
        (lambda state, n: (state.params, n), r"\('float64\[6\]', "),
        (lambda state, n: (tuple(state), n), r"\(\('float64\[6\]', "),
        (lambda state, n: (state, None), "None"),
        (lambda state, n: (state, 3.0), r"3\.0 \(float\)"),
        (lambda state, n: (state, "three"), "'three'"),
        (lambda state, n: (state._replace(params=state.params[:1]), n), r"params='float64\[1\]'"),
        (lambda state, n: (state._replace(params=state.params.astype("float32")), n), "params='float32"),
        (lambda state, n: (state._replace(model_state=1.0), n), "model_state='1.0"),
    ],
)
def test_a_rule_that_returns_something_else_is_refused(returned, shown):
    class Wrong:
        def run(self, problem):
            return returned(problem.state, problem.num_steps)

    with pytest.raises(JaxhpoError, match=rf"must return `\(state, steps\)`.* but it returned .*{shown}"):
        make_outer_loss(Wrong())(H)


class Keyed(jaxhpo.LinearSolver):
    """Richardson's iteration, with a key that it does not need."""

    needs_key = True

    def __call__(self, matvec, b, x0=None, *, key):
        assert jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
        return Richardson(1 / P.step_size, 5)(matvec, b, x0)


def test_a_linear_solver_with_a_key_gets_one():
    got = jax.grad(outer_loss(P, Implicit(Keyed()), STEPS, start=P.solution(P.hparams)))(H)
    assert relative_error(got, OWN["linear solver"][1]) < 1e-9


def test_implicit_has_no_key_to_give():
    with pytest.raises(JaxhpoError, match=r"has no key to give it: pass `functools\.partial\(solver, key=key\)`"):
        jaxhpo.implicit(lambda w, a: w - a, H, H, Keyed())


def test_a_linear_solver_that_declares_a_key_must_take_it():
    class NoKey(jaxhpo.LinearSolver):
        needs_key = True

        def __call__(self, matvec, b, x0=None):
            return b, None

    with pytest.raises(JaxhpoError, match=r"and `key=`: write it as `linear_solver\(matvec, b, x0=None, \*, key\)`"):
        Implicit(NoKey())


@pytest.mark.parametrize(
    ("pair", "told"),
    [
        (lambda: None, "returned None"),
        (
            lambda: jaxhpo.Hypergradient(lambda p, h, s=None: 0, lambda h, s, b, o, k: (h, s)),
            "return `.hypergradient, state",
        ),
    ],
)
def test_a_stateful_method_that_returns_something_else_is_refused(pair, told):
    class Wrong(jaxhpo.StatefulMethod):
        def pair(self, solver, outer_loss, num_steps, warm_start):
            return pair()

    solver = jaxhpo.from_optax(P.train_loss, optax.sgd(P.step_size))
    with pytest.raises(JaxhpoError, match=told):
        made = jaxhpo.hypergradient(Wrong(), solver, lambda sol, h, batch: P.val_loss(sol.params), num_steps=3)
        made.update(H, made.init(H, H))
