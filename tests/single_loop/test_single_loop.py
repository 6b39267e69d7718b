"""Methods of one loop: the identities that pin them down, random minibatches under `tune`, and their messages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhpo
from jaxhpo import single_loop
from jaxhpo.single_loop import (
    F2SA,
    MASOBA,
    PAGE,
    SABA,
    SAGA,
    SARAH,
    SOBA,
    SPABA,
    STORM,
    AmIGO,
    Estimator,
    FiniteSum,
    InTurn,
    Momentum,
    PerVariable,
    Plain,
    SingleLoop,
    StocBiO,
    Term,
    implicit_sums,
    penalty_sums,
    series_sums,
)

RATE = 0.1


def data(seed=0, n=24):
    x = jax.random.normal(jax.random.key(seed), (n, 3))
    return x, x @ jnp.array([1.0, -2.0, 0.5]) + jax.random.normal(jax.random.key(seed + 1), (n,))


def train_loss(w, h, batch):
    x, y = batch
    return jnp.mean((x @ w["w"] - y) ** 2) + jnp.sum(jnp.exp(h["l2"]) * w["w"] ** 2)


def outer_loss(solution, h, batch):
    x, y = batch
    return jnp.mean((x @ solution.params["w"] - y) ** 2) + 0.01 * jnp.sum(h["l2"] ** 2)


SOLVER = jaxhpo.from_optax(train_loss, optax.sgd(RATE))
ROWS = data(), data(7)
W0, H0 = {"w": jnp.zeros(3)}, {"l2": jnp.full(3, -1.0)}
WHOLE = tuple(FiniteSum(1, lambda i, part=part: part, lambda n: 0 * n) for part in ROWS)  # one minibatch
PARTS = tuple(FiniteSum.of(part, 6) for part in ROWS)


def run(method, updates, num_steps=None, rate=0.05):
    pair = jaxhpo.hypergradient(method, SOLVER, outer_loss, num_steps=num_steps)

    def update(carry, _):
        h, state = carry
        grad, state, info = pair.update(h, state)
        return (jax.tree.map(lambda x, g: x - rate * g, h, grad), state), (grad, info.value)

    return jax.jit(lambda: jax.lax.scan(update, (H0, pair.init(W0, H0)), length=updates))()


def descent(updates, rate=0.05):
    """Gradient descent on (θ, v, h), written out."""
    w, v, h = W0["w"], jnp.zeros(3), H0["l2"]
    for _ in range(updates):

        def inner(w, h):
            return train_loss({"w": w}, {"l2": h}, ROWS[0])

        def outer(w, h):
            return jnp.mean((ROWS[1][0] @ w - ROWS[1][1]) ** 2) + 0.01 * jnp.sum(h**2)

        d_v = jax.hessian(inner)(w, h) @ v + jax.grad(outer)(w, h)
        d_h = v @ jax.jacobian(jax.grad(inner), 1)(w, h) + jax.grad(outer, 1)(w, h)
        w, v, h = w - RATE * jax.grad(inner)(w, h), v - RATE * d_v, h - rate * d_h
    return w, v, h


@pytest.mark.parametrize(
    "method",
    [
        SOBA(*WHOLE),
        SOBA(*WHOLE, linear=optax.sgd(RATE)),
        MASOBA(*WHOLE, weight=1.0),
        SABA(*WHOLE),
        SingleLoop(*WHOLE, STORM(0.3)),
        SingleLoop(*WHOLE, SARAH(3)),
    ],
    ids=["SOBA", "own optimiser", "MASOBA", "SABA", "STORM", "SARAH"],
)
def test_of_one_minibatch_all_are_gradient_descent(method):
    (h, state), _ = run(method, 7)
    found = state.inner.params["w"], state.auxiliary.params["w"], h["l2"]
    for got, want in zip(found, descent(7), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12)  # float64, seven updates


def trained(h):
    """The minimiser of the train loss and its Hessian, by the closed form of ridge regression."""
    x, y = ROWS[0]
    hessian = 2 * (x.T @ x / len(x) + jnp.diag(jnp.exp(h["l2"])))
    return {"w": jnp.linalg.solve(hessian, 2 * x.T @ y / len(x))}, hessian


def validation(h):
    return outer_loss(jaxhpo.Solution(trained(h)[0], None, None, None), h, ROWS[1])


def exact(h):
    """The trained parameters, the solution of the linear system, and the hypergradient."""
    w, hessian = trained(h)
    by_params = jax.grad(lambda w: outer_loss(jaxhpo.Solution(w, None, None, None), h, ROWS[1]))(w)
    return w, {"w": -jnp.linalg.solve(hessian, by_params["w"])}, jax.grad(validation)(h)


def test_at_the_solution_of_both_the_direction_is_the_implicit_hypergradient():
    w, v, want = exact(H0)
    pair = jaxhpo.hypergradient(SOBA(*WHOLE), SOLVER, outer_loss)
    state = pair.init(w, H0)
    grad, after, _ = pair.update(H0, state._replace(auxiliary=state.auxiliary._replace(params=v)))
    np.testing.assert_allclose(grad["l2"], want["l2"], rtol=1e-10)
    np.testing.assert_allclose(after.auxiliary.params["w"], v["w"], rtol=1e-10)  # and both stay


@pytest.mark.parametrize("method", [AmIGO(*WHOLE), AmIGO(*WHOLE, linear_steps=400)], ids=["as many", "more"])
def test_amigo_of_many_steps_is_the_implicit_hypergradient(method):
    _, (grads, _) = run(method, 1, num_steps=300)
    np.testing.assert_allclose(grads["l2"][0], exact(H0)[2]["l2"], rtol=1e-8)  # (1 − .1 λ)^300 is below 1e-9


def test_stocbio_of_one_minibatch_is_neumann():
    terms = 4
    _, (grads, _) = run(StocBiO(*WHOLE, step_size=RATE, num_terms=terms), 1, num_steps=20)

    def loss(h):
        adjoint = jaxhpo.Implicit(jaxhpo.Neumann(terms + 1, RATE))
        solution = jaxhpo.solve(SOLVER, SOLVER.init(W0, h), h, lambda t: ROWS[0], num_steps=20, adjoint=adjoint)
        return outer_loss(solution, h, ROWS[1])

    np.testing.assert_allclose(grads["l2"][0], jax.grad(loss)(H0)["l2"], rtol=1e-10)


def test_f2sa_approaches_the_implicit_hypergradient_as_one_over_the_multiplier():
    errors = []
    for multiplier in (30.0, 300.0):
        method = F2SA(*WHOLE, optax.sgd(RATE / multiplier), multiplier=multiplier, growth=0.0)
        _, (grads, _) = run(method, 1, num_steps=300)
        errors.append(np.linalg.norm(grads["l2"][0] - exact(H0)[2]["l2"]))
    assert errors[0] < 0.1 * np.linalg.norm(exact(H0)[2]["l2"])
    assert 8 < errors[0] / errors[1] < 12  # of order 1/λ: ten


def test_the_mean_of_a_random_length_is_the_series_of_as_many_terms():
    method = StocBiO(*WHOLE, step_size=RATE, num_terms=4, random_length=True)
    pair = jaxhpo.hypergradient(method, SOLVER, outer_loss, num_steps=3)
    keys = jax.random.split(jax.random.key(0), 60)
    update = jax.jit(lambda key: pair.update(H0, pair.init(W0, H0), key=key)[0]["l2"])
    grads = [update(key) for key in keys]
    lengths = np.unique(np.round(grads, 12), axis=0)
    assert len(lengths) == 4  # each with probability 1/4
    _, (series, _) = run(StocBiO(*WHOLE, step_size=RATE, num_terms=3), 1, num_steps=3)  # 3 + 1 terms
    np.testing.assert_allclose(lengths.mean(0), series["l2"][0], atol=1e-11)


@pytest.mark.slow
def test_the_series_of_all_minibatches_is_that_of_their_means():
    sums = tuple(FiniteSum(part.num_batches, part.batch, lambda n: n % 4) for part in PARTS)
    found, want = (run(SingleLoop(*sums, SARAH(1), series_sums(3, RATE)), 3) for sums in (sums, WHOLE))
    plain = run(SingleLoop(*WHOLE, Plain(), series_sums(3, RATE)), 3)
    for got in (found, want):
        np.testing.assert_allclose(got[0][0]["l2"], plain[0][0]["l2"], rtol=1e-10)


def test_penalties_approach_the_implicit_hypergradient_as_one_over_the_multiplier():
    errors = []
    for multiplier in (30.0, 300.0):
        method = SingleLoop(
            *WHOLE, Plain(), penalty_sums(multiplier), optax.sgd(RATE / multiplier), lambda params: params
        )
        _, (grads, _) = run(method, 300, rate=0.0)
        errors.append(np.linalg.norm(grads["l2"][-1] - exact(H0)[2]["l2"]))
    assert errors[0] < 0.1 * np.linalg.norm(exact(H0)[2]["l2"])
    assert 8 < errors[0] / errors[1] < 12  # of order 1/λ: ten


@pytest.mark.parametrize(
    "estimator", [SAGA(), *(pytest.param(other, marks=pytest.mark.slow) for other in (STORM(0.3), SARAH(4)))], ids=str
)
def test_multipliers_that_grow_are_no_part_of_what_is_remembered(estimator):
    growing = penalty_sums(lambda count: 1.0 + count), optax.sgd(0.01), lambda params: params
    (h, state), _ = run(SingleLoop(*WHOLE, estimator, *growing), 6)
    (plain, _), _ = run(SingleLoop(*WHOLE, Plain(), *growing), 6)
    np.testing.assert_allclose(h["l2"], plain["l2"], rtol=1e-12)
    assert state.auxiliary.params["w"].any()


def test_in_turn_draws_for_each_direction():
    sums = tuple(FiniteSum(part.num_batches, part.batch, lambda n: n % 4) for part in PARTS)
    (_, state), _ = run(InTurn(*sums, PerVariable(hparams=STORM(0.5))), 3)
    assert state.draws == (9, 6)  # the direction of θ has no part of the outer loss


def test_the_table_of_saga_keeps_the_mean_of_its_entries():
    order = [0, 2, 1, 2, 2]  # minibatch 3 is never seen
    sums = tuple(FiniteSum(part.num_batches, part.batch, lambda n: jnp.asarray(order)[n % 5]) for part in PARTS)
    (_, state), _ = run(SABA(*sums), len(order))
    for table, mean, (last, entry) in state.memories:
        leaves = zip(*map(jax.tree.leaves, (table, mean, entry)), strict=True)
        for entries, average, new in leaves:
            assert last == 2 and new.any() and not entries[3].any()
            np.testing.assert_allclose(entries.at[last].set(new).mean(0), average, rtol=1e-10, atol=1e-14)
    assert jax.tree.structure(state.memories[1][0]).num_leaves == 2  # the outer loss has no direction of θ


def test_sarah_restarts_without_drawing():
    sums = tuple(FiniteSum(part.num_batches, part.batch, lambda n: n % 4) for part in PARTS)
    (_, state), (grads, _) = run(SingleLoop(*sums, SARAH(3)), 7)
    assert state.draws == (4, 4)  # updates 0, 3 and 6 take all minibatches
    _, (whole, _) = run(SOBA(*WHOLE), 1)
    np.testing.assert_allclose(grads["l2"][0], whole["l2"][0], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("method", "num_steps"),
    [
        (MASOBA(*PARTS, weight=lambda count: 1.0 / (count + 1.0)), None),
        (SABA(*PARTS), None),
        (SPABA(*PARTS), None),
        (SingleLoop(*PARTS, STORM(0.5), series_sums(5, RATE)), 1),
        (AmIGO(*PARTS), 5),
        (StocBiO(*PARTS, step_size=RATE), 5),
        (F2SA(*PARTS, optax.sgd(0.02)), 5),
        (InTurn(*PARTS, PerVariable(hparams=STORM(0.5))), None),
        (StocBiO(*PARTS, step_size=RATE, random_length=True), 5),
        (SingleLoop(*PARTS, STORM(0.5), series_sums(5, RATE, random_length=True)), None),
        (SingleLoop(*PARTS, SARAH(4), series_sums(5, RATE)), None),
        (SingleLoop(*PARTS, SAGA(), penalty_sums(5.0), optax.sgd(0.02), lambda params: params), None),
    ],
    ids="MASOBA SABA SPABA MRBO AmIGO StocBiO F2SA FSLA BSA SUSTAIN VRBO penalty".split(),
)
@pytest.mark.slow
def test_random_minibatches_lower_the_loss_under_tune(method, num_steps):
    pair = jaxhpo.hypergradient(method, SOLVER, outer_loss, num_steps=num_steps)
    result = jaxhpo.tune(
        None,
        H0,
        optax.sgd(0.05),
        num_steps=150,
        gradient=jaxhpo.from_pair(pair),
        carry=pair.init(W0, H0),
        progress=False,
    )

    lowest = jaxhpo.tune(validation, H0, optax.adam(0.1), num_steps=300, progress=False).best_value
    assert validation(result.hparams) < validation(H0) - 0.5 * (validation(H0) - lowest)


def test_page_restarts_by_chance_and_draws_otherwise():
    pair = jaxhpo.hypergradient(SingleLoop(*PARTS, PAGE(2)), SOLVER, outer_loss)
    keys = jax.random.split(jax.random.key(0), 40)
    state = jax.lax.scan(lambda state, key: (pair.update(H0, state, key=key)[1], None), pair.init(W0, H0), keys)[0]
    assert 8 < state.draws.train < 32  # of 40 with probability 1/2: within four deviations


def test_flax_model_with_state_and_two_optimisers():
    def loss(w, h, batch, count):
        return train_loss(w, h, batch), count + 1

    solver = jaxhpo.from_optax(loss, optax.adam(0.05), has_state=True)
    pair = jaxhpo.hypergradient(SOBA(*WHOLE), solver, outer_loss)
    state = pair.init(W0, H0, jnp.zeros(()))
    for _ in range(3):
        _, state, info = pair.update(H0, state)
    assert state.inner.model_state == 3 and info.solution.finite
    assert jax.tree.structure(state.auxiliary.opt_state) == jax.tree.structure(state.inner.opt_state)


def keyed(method):
    pair = jaxhpo.hypergradient(method, SOLVER, outer_loss)
    return pair.update(H0, pair.init(W0, H0), key=jax.random.key(0))


class Restarting(Estimator):
    def restarts(self, count, key):
        return count == 0


def test_messages_say_what_to_write():
    fixed = jaxhpo.fixed_point(lambda w, h, batch: w)
    cases = [
        (lambda: FiniteSum.of(jnp.zeros(10), 4), "leave out 2 rows, or write 2 or 5"),
        (lambda: FiniteSum.of(jnp.zeros(6), 10), "6 rows, fewer than batch_size=10"),
        (lambda: FiniteSum(0, lambda i: i), "num_batches"),
        (lambda: FiniteSum(3, lambda i: i, lambda n: jnp.array([2, 0, 1])[n]), r"write `shuffled\[n % 3\]`"),
        (lambda: FiniteSum(3, lambda i: i, lambda n: n), "from 0 to 2"),
        (lambda: FiniteSum(3, lambda i: i, lambda n: n % 3 + 0.5), "return one integer"),
        (lambda: SPABA(*PARTS, period=0), "period"),
        (lambda: series_sums(-1, RATE), "num_terms"),
        (lambda: F2SA(*PARTS, growth="fast"), "growth"),
        (lambda: jaxhpo.hypergradient(SOBA(*PARTS, linear=0.1), SOLVER, outer_loss), r"`optax.sgd\(0.1\)`"),
        (lambda: jaxhpo.hypergradient(SingleLoop(*PARTS, SAGA), SOLVER, outer_loss), "no estimator"),
        (lambda: PerVariable(hparams=0.1), "no estimator"),
        (lambda: PerVariable(hparams=Restarting()), "restarts all three"),
        (lambda: FiniteSum(3, lambda: 0), "batch"),
        (lambda: jaxhpo.hypergradient(SOBA(ROWS[0], PARTS[1]), SOLVER, outer_loss), "write `FiniteSum.of"),
        (lambda: jaxhpo.hypergradient(SOBA(*PARTS), fixed, outer_loss), "from_optax"),
        (lambda: jaxhpo.hypergradient(SOBA(*PARTS), SOLVER, outer_loss, num_steps=3), "`AmIGO`"),
        (lambda: jaxhpo.hypergradient(SOBA(*PARTS), SOLVER, outer_loss, warm_start=False), "warm_start=False"),
        (lambda: jaxhpo.hypergradient(AmIGO(*PARTS), SOLVER, outer_loss), "num_steps=10"),
        (lambda: PerVariable(hparams=SARAH(3)), "restarts all three"),
        (lambda: Momentum(2.0), r"\(0, 1\]"),
        (lambda: run(SOBA(*PARTS), 1), "got no key"),
        (lambda: run(SingleLoop(*WHOLE, SAGA(), series_sums(3, RATE)), 1), "sums=implicit_sums"),
        (lambda: keyed(SingleLoop(*WHOLE, SARAH(2), series_sums(3, RATE, True))), "sums=implicit_sums"),
        (lambda: run(SingleLoop(*WHOLE, sums=series_sums(3, RATE, random_length=True)), 1), "got no key"),
        (lambda: series_sums(3, RATE, random_length="yes"), "True or False"),
        (lambda: StocBiO(*WHOLE, RATE, random_length=1), "True or False"),
        (lambda: penalty_sums(0.0), "above 0"),
        (lambda: penalty_sums("fast"), "multiplier"),
        (lambda: InTurn(*WHOLE, STORM(0.5)), r"PerVariable\(hparams=STORM"),
        (lambda: InTurn(*WHOLE, begin=lambda: 0), "begin"),
        (lambda: run(SingleLoop(*WHOLE, begin=lambda params: {"w": params["w"][:2]}), 1), "like the parameters"),
    ]
    for call, message in cases:
        with pytest.raises(jaxhpo.JaxhpoError, match=message):
            call()
    pair = jaxhpo.hypergradient(SOBA(*WHOLE), SOLVER, outer_loss)
    with pytest.raises(jaxhpo.JaxhpoError, match="draws its own"):
        pair.update(H0, pair.init(W0, H0), ROWS[0])
    with pytest.raises(jaxhpo.JaxhpoError, match="SingleLoopState"):
        pair.update(H0, (W0, H0))


@pytest.mark.parametrize("settings", [{"record": "error"}, {"on_error": "stop"}], ids=["record", "on_error"])
def test_no_derivative_of_one_update_is_the_hypergradient(settings):
    """θ has not followed h yet: the derivative of the outer loss that an update reports is zero."""
    pair = jaxhpo.hypergradient(SOBA(*WHOLE), SOLVER, outer_loss)
    given = {"gradient": jaxhpo.from_pair(pair), "carry": pair.init(W0, H0)}
    with pytest.raises(jaxhpo.JaxhpoError, match="SingleLoopState.*gathers over its updates"):
        jaxhpo.tune(None, H0, optax.sgd(0.1), num_steps=2, progress=False, **given, **settings)
    with pytest.raises(jaxhpo.JaxhpoError, match="gathers over its updates"):
        jaxhpo.check_hypergradient(None, H0, **given)


def test_estimators_of_each_variable_are_those_alone():
    method = SingleLoop(*WHOLE, PerVariable(hparams=Momentum(0.5)), implicit_sums)
    _, (averaged, _) = run(method, 2, rate=0.0)
    _, (plain, _) = run(SOBA(*WHOLE), 2, rate=0.0)
    np.testing.assert_allclose(averaged["l2"][1], plain["l2"].mean(0), rtol=1e-10, atol=1e-14)


def test_averages_keep_the_memory_of_the_hyperparameters_alone():
    pair = jaxhpo.hypergradient(MASOBA(*PARTS, weight=0.5), SOLVER, outer_loss)
    assert [x.shape for x in jax.tree.leaves(pair.init(W0, H0).memories) if x.ndim] == [(3,), (3,)]


def test_means_of_many_minibatches_in_bfloat16():
    num, half = 600, jnp.bfloat16
    ones = FiniteSum(num, lambda i: jnp.ones((), half), lambda n: n % num)
    solver = jaxhpo.from_optax(lambda w, h, b: jnp.sum(b * w) + h * jnp.sum(w), optax.sgd(0.0))
    h = jnp.zeros((), half)

    def directions(estimator, updates):
        method = SingleLoop(ones, ones, estimator)
        pair = jaxhpo.hypergradient(method, solver, lambda solution, h, b: jnp.sum(solution.params * b))
        start = pair.init(jnp.ones(2, half), h)
        state = jax.jit(lambda: jax.lax.scan(lambda s, _: (pair.update(h, s)[1], None), start, length=updates)[0])()
        assert jax.tree.map(lambda x: x.dtype, (state.inner, start.inner))
        return state.memories

    whole = directions(SARAH(1), 1)  # each direction is one: a sum in bfloat16 would end at one half
    np.testing.assert_allclose(whole[0].params, 1.0, rtol=1e-2)
    np.testing.assert_allclose(directions(SAGA(), num)[0][1].params, 1.0, rtol=1e-2)
    last, _ = directions(Momentum(lambda count: jnp.where(count == 0, 1.0, 1e-3)), 3)[0]
    assert last.params.dtype == jnp.float32  # smaller weights would change nothing in bfloat16


def test_a_train_loss_that_is_not_finite_is_seen():
    solver = jaxhpo.from_optax(lambda w, h, b: jnp.log(w["w"][0] - 1.0) + train_loss(w, h, b), optax.sgd(RATE))
    for method, num_steps in ((SOBA(*WHOLE), None), (AmIGO(*WHOLE), 2), (F2SA(*WHOLE), 2)):
        pair = jaxhpo.hypergradient(method, solver, outer_loss, num_steps=num_steps)
        grad, state, info = pair.update(H0, pair.init(W0, H0))  # the logarithm of -1, with the derivative -1
        assert not info.solution.finite and jnp.isnan(state.inner.params["w"]).all(), method


@pytest.mark.parametrize("method", [AmIGO(*WHOLE), F2SA(*WHOLE), StocBiO(*WHOLE, step_size=RATE)], ids=type)
def test_the_outer_loss_sees_the_model_state_after_the_steps(method):
    solver = jaxhpo.from_optax(
        lambda w, h, batch, count: (train_loss(w, h, batch), count + 1), optax.sgd(RATE), has_state=True
    )
    pair = jaxhpo.hypergradient(
        method, solver, lambda solution, h, batch: solution.model_state + 0.0 * jnp.sum(h["l2"]), num_steps=4
    )
    _, state, info = pair.update(H0, pair.init(W0, H0, jnp.zeros(())))
    assert info.value == state.inner.model_state == 4


def test_f2sa_reports_the_outer_loss_of_the_trained_parameters():
    pair = jaxhpo.hypergradient(F2SA(*WHOLE, optax.sgd(0.02)), SOLVER, outer_loss, num_steps=5)
    _, state, info = pair.update(H0, pair.init(W0, H0))
    want = outer_loss(jaxhpo.Solution(state.inner.params, None, None, None), H0, ROWS[1])
    np.testing.assert_allclose(info.value, want, rtol=1e-12)


def test_derivative_rules_of_the_train_loss_are_transposed():
    @jax.custom_vjp
    def doubled(x):
        return x

    doubled.defvjp(lambda x: (x, None), lambda _, g: (jax.tree.map(lambda g: 2 * g, g),))
    w, v, _ = exact(H0)
    products = []
    for loss in (train_loss, lambda w, h, batch: train_loss(doubled(w), h, batch)):  # ∇_θ L twice as large, not ∇_h L
        pair = jaxhpo.hypergradient(SOBA(*WHOLE), jaxhpo.from_optax(loss, optax.sgd(RATE)), outer_loss)
        state = pair.init(w, H0)
        grad, after, _ = pair.update(H0, state._replace(auxiliary=state.auxiliary._replace(params=v)))
        products.append((grad["l2"] - 0.02 * H0["l2"], after.auxiliary.params["w"] - v["w"]))
    (mixed, _), (twice, moved) = products
    np.testing.assert_allclose(twice, 2 * mixed, rtol=1e-10)
    np.testing.assert_allclose(moved, -RATE * trained(H0)[1] @ v["w"], rtol=1e-10)  # 2 H v + ∂_θ F


def test_sums_may_draw_of_one_loss_alone():
    def direct(problem):
        def at(point, i, j):
            return problem.outer(point, j[0])._replace(params=None, auxiliary=None)

        return [Term(at, 0, 1)]

    _, (grads, _) = run(SingleLoop(*WHOLE, sums=direct), 1)
    np.testing.assert_allclose(grads["l2"][0], 0.02 * H0["l2"], rtol=1e-10)


@pytest.mark.parametrize(("num_steps", "per_call"), [(8, 1), (2, 1), (8, 8), (8, 4), (4, 2), (30, 5)])
def test_a_hyperparameter_without_effect_is_named_whatever_the_calls(num_steps, per_call):
    pair = jaxhpo.hypergradient(SOBA(*WHOLE), SOLVER, outer_loss)
    h = H0 | {"unused": jnp.array(1.0)}
    with pytest.warns(jaxhpo.ZeroHypergradientWarning, match="unused") as caught:
        jaxhpo.tune(
            None,
            h,
            optax.sgd(0.05),
            num_steps=num_steps,
            steps_per_call=per_call,
            gradient=jaxhpo.from_pair(pair),
            carry=pair.init(W0, h),
            progress=False,
        )
    assert len(caught) == 1


def test_help_lists_every_name():
    assert all(name in single_loop.__doc__ for name in single_loop.__all__)
