"""Hyperparameters tuned within one training: the direction, its cost, any optimiser, and steps shortened by noise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhpo
from jaxhpo.single_loop import Online, slow_where_noisy

N = 24
X = jax.random.normal(jax.random.key(0), (N, 4))
Y = jnp.tanh(X @ jnp.array([1.0, -1.0, 0.5, 2.0]))
INDEX = jax.random.randint(jax.random.key(1), (3, 8), 0, N)
H = {"weights": jnp.zeros(N), "penalties": jnp.full(4, -2.0), "rate": jnp.log(0.1)}
W = jnp.full(4, 0.3)


def train_loss(w, h, index):
    error = (jnp.tanh(X[index] @ w) - Y[index]) ** 2
    return jnp.mean(jax.nn.sigmoid(h["weights"][index]) * error) + jnp.sum(jnp.exp(h["penalties"]) * w**2)


def outer_loss(solution, h, index):
    return jnp.mean((X[index] @ solution.params - Y[index]) ** 2) + 0.01 * jnp.sum(h["penalties"] ** 2)


OPTIMIZERS = {
    "sgd": lambda h: optax.sgd(jnp.exp(h["rate"])),
    "momentum": lambda h: optax.sgd(jnp.exp(h["rate"]), momentum=0.9),
    "adam": lambda h: optax.adam(jnp.exp(h["rate"]), eps_root=1e-12),
    "chain": lambda h: optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(jnp.exp(h["rate"]), eps_root=1e-12)),
}


def pair_of(method, optimizer=OPTIMIZERS["sgd"], loss=train_loss, num_steps=3):
    return jaxhpo.hypergradient(method, jaxhpo.from_optax(loss, optimizer), outer_loss, num_steps=num_steps)


@pytest.mark.parametrize(
    "optimizer",
    [pytest.param(fn, id=name, marks=() if name == "adam" else pytest.mark.slow) for name, fn in OPTIMIZERS.items()],
)
def test_it_is_the_derivative_of_the_last_step_through_any_optimiser(optimizer):
    found = []
    for method in (Online(), jaxhpo.Unroll(truncate=1)):
        pair = pair_of(method, optimizer)
        grad, state, info = jax.jit(pair.update)(H, pair.init(W, H), INDEX, jnp.arange(8))
        grad, state, _ = jax.jit(pair.update)(H, state, INDEX[::-1], jnp.arange(8, 16))
        found.append((grad, state.inner.params, info.value))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-15), *found)


@pytest.mark.slow
def test_window_adds_the_products_of_all_minibatches():
    pair = pair_of(Online("window"), lambda h: optax.sgd(0.1))
    grad, state, _ = pair.update(H, pair.init(W, H), INDEX, jnp.arange(8))
    before = W
    for index in INDEX[:2]:
        before = before - 0.1 * jax.grad(train_loss)(before, H, index)
    outer = lambda w, h: outer_loss(jaxhpo.Solution(w, None, None, None), h, jnp.arange(8))  # noqa: E731
    by_params, want = jax.grad(outer, (0, 1))(state.inner.params, H)
    for index in INDEX:
        mixed = jax.jacobian(jax.grad(train_loss), 1)(before, H, index)
        want = jax.tree.map(lambda a, m: a - 0.1 * by_params @ m, want, mixed)  # noqa: B023
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-16), grad, want)


@pytest.mark.slow
def test_implicit_is_the_implicit_hypergradient_where_both_have_converged():
    everything = jnp.tile(jnp.arange(N), (3, 1))
    pair = pair_of(Online("implicit"), lambda h: optax.sgd(0.1))
    state = pair.init(W, H)
    advance = jax.jit(lambda state: pair.update(H, state, everything, jnp.arange(8))[:2])
    for _ in range(700):
        grad, state = advance(state)
    exact = pair_of(jaxhpo.Implicit(jaxhpo.Direct()), lambda h: optax.sgd(0.1))
    with pytest.warns(jaxhpo.ZeroHypergradientWarning, match="rate"):  # which nothing reads here
        want, _, _ = exact.update(H, exact.init(state.inner.params, H), everything, jnp.arange(8))
    for name in ("weights", "penalties"):
        np.testing.assert_allclose(grad[name], want[name], rtol=1e-7)  # what 700 updates leave


def network(params, x):
    return jnp.tanh(jnp.tanh(x @ params[0]) @ params[1]) @ params[2]


def counted(loss, h, rows):
    """Operations of an update less those of a step, in steps; and memory beyond two steps', in copies of θ."""
    params = [jnp.zeros((64, 128)), jnp.zeros((128, 128)), jnp.zeros((128, 10))]
    batch = jnp.zeros((rows, 64)), jnp.zeros(rows, int), jnp.arange(rows)
    solver = jaxhpo.from_optax(loss, optax.adam(1e-3))
    pair = jaxhpo.hypergradient(
        Online(), solver, lambda solution, h, b: jnp.mean(entropies(solution.params, *b)), num_steps=1
    )

    def compiled(fn, *args):
        made = jax.jit(fn).lower(*args).compile()
        return made.cost_analysis()["flops"], made.memory_analysis().temp_size_in_bytes

    one = jax.tree.map(lambda x: x[None], batch)
    update = compiled(lambda h, s: pair.update(h, s, one, batch[:2]), h, pair.init(params, h))
    state = solver.init(params, h)
    step = compiled(lambda s, h: solver.step(s, h, batch), state, h)
    two = compiled(lambda s, h: solver.step(solver.step(s, h, batch), h, batch), state, h)
    size = sum(x.nbytes for x in params)
    return (update[0] - step[0]) / step[0], (update[1] - two[1]) / size


def entropies(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(network(params, x), y)


def penalised(params, h, batch):
    return jnp.mean(entropies(params, *batch[:2])) + sum(
        jnp.sum(jnp.exp(a) * w**2) for a, w in zip(h, params, strict=True)
    )


def weighted(params, h, batch):
    return jnp.mean(jax.nn.sigmoid(h[batch[2]]) * entropies(params, *batch[:2]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "h", "most"),
    # The gradient of the outer loss is one step; the mixed product of penalties has no pass of the network, that of
    # weights a forward derivative, 2/3 of a gradient. A tenth more for what Adam and the penalties take.
    [
        (penalised, [jnp.zeros((64, 128)), jnp.zeros((128, 128)), jnp.zeros((128, 10))], 1.1),
        (weighted, jnp.zeros(1000), 1.77),
    ],
    ids=["penalties", "weights"],
)
def test_what_an_update_costs_beside_a_step(loss, h, most):
    assert 0.9 < counted(loss, h, 50)[0] < most
    assert counted(loss, h, 2)[1] < 2  # copies of the parameters, with few activations


@pytest.mark.slow
def test_flax_model_with_state():
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(1)(nn.BatchNorm(use_running_average=not train)(x))[:, 0]

    net = Net()
    variables = net.init(jax.random.key(0), X, True)

    def loss(params, h, index, state):
        out, after = net.apply({"params": params, **state}, X[index], True, mutable=["batch_stats"])
        return jnp.mean(jax.nn.sigmoid(h["weights"][index]) * (out - Y[index]) ** 2), after

    def outer(solution, h, index):
        out = net.apply({"params": solution.params, **solution.model_state}, X[index], False)
        return jnp.mean((out - Y[index]) ** 2)

    found = []
    for method in (Online(), jaxhpo.Unroll(truncate=1)):
        pair = jaxhpo.hypergradient(method, jaxhpo.from_optax(loss, optax.sgd(0.1), has_state=True), outer, num_steps=3)
        h = {"weights": jnp.zeros(N)}
        state = pair.init(variables["params"], h, {"batch_stats": variables["batch_stats"]})
        grad, state, info = jax.jit(pair.update)(h, state, INDEX, jnp.arange(8))
        found.append((grad, state.inner.params, state.inner.model_state, info.value))
    # The running averages have passed on what the weights do to θ, not what they do to the averages.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13), *found)


def averages(params, h, index, state):
    """The train loss; the model state is a mean of inputs that depends on the hyperparameters, and one of θ."""
    inputs = jnp.mean(X[index], 0) * jnp.exp(h["penalties"])
    after = {"inputs": (state["inputs"] + inputs) / 2, "w": (state["w"] + params) / 2, "count": state["count"] + 1}
    return train_loss(params, h, index) + jnp.sum(after["inputs"] * params), after


def with_other_weights(of):
    """The outer loss at weights that are not the parameters: an average of them, or what a state holds."""
    return lambda solution, h, index: outer_loss(solution._replace(params=of(solution)), h, index)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "weights"),
    [
        (lambda h: optax.chain(OPTIMIZERS["sgd"](h), optax.ema(0.5)), lambda s: s.opt_state[1].ema + W),
        (
            lambda h: optax.contrib.schedule_free(OPTIMIZERS["adam"](h), jnp.exp(h["rate"])),
            lambda s: optax.contrib.schedule_free_eval_params(s.opt_state, s.params),
        ),
        (OPTIMIZERS["sgd"], lambda s: s.model_state["w"] + s.params * s.model_state["inputs"]),
        (lambda h: optax.polyak_sgd(max_learning_rate=100.0), lambda s: s.params),  # its step size is of the train loss
    ],
    ids=["average", "schedule_free", "model_state", "polyak"],
)
@pytest.mark.parametrize("parts", [1, 2])
def test_what_the_outer_loss_reads_beside_the_parameters_is_differentiated(optimizer, weights, parts):
    found = []
    for method in (Online(parts=parts), jaxhpo.Unroll(truncate=1)):
        solver = jaxhpo.from_optax(averages, optimizer, has_state=True)
        pair = jaxhpo.hypergradient(method, solver, with_other_weights(weights), num_steps=3)
        start = {"inputs": jnp.zeros(4), "w": jnp.zeros(4), "count": jnp.zeros((), int)}
        outer = jnp.arange(8).reshape(2, 4) if isinstance(method, Online) and parts == 2 else jnp.arange(8)
        grad, state, info = jax.jit(pair.update)(H, pair.init(W, H, start), INDEX, outer)
        found.append((grad, state.inner.params, info.value))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-15), *found)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_a_step_that_changes_the_model_state_is_named(num_steps):
    loss = lambda w, h, index, state: (train_loss(w, h, index), {**state, "more": w})  # noqa: E731
    solver = jaxhpo.from_optax(loss, optax.sgd(0.1), has_state=True)
    pair = jaxhpo.hypergradient(Online(), solver, outer_loss, num_steps=num_steps)
    with pytest.raises(jaxhpo.JaxhpoError, match="return the whole model state"):
        pair.update(H, pair.init(W, H, {}), INDEX[:num_steps], jnp.arange(8))


@pytest.mark.slow
def test_adam_without_eps_root_and_weights_that_no_gradient_has_reached():
    def loss(w, h, index):
        return jnp.mean((X[index, :2] @ w[:2] - Y[index]) ** 2) + jnp.sum(h["penalties"][:2] * w[:2] ** 2)

    pair = pair_of(Online(), lambda h: optax.adam(0.1), loss)
    grad, state, _ = pair.update(H, pair.init(W, H), INDEX, jnp.arange(8))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((grad, state)))
    assert (grad["penalties"][:2] != 0).all()


@pytest.mark.slow
def test_parts_are_a_mean_with_its_standard_error():
    outer = jnp.arange(12).reshape(3, 4)
    each = []
    for part in outer:
        pair = pair_of(Online())
        each.append(pair.update(H, pair.init(W, H), INDEX, part)[0])
    pair = pair_of(Online(parts=3))
    grad, _, info = pair.update(H, pair.init(W, H), INDEX, outer)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *each)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b.mean(0), rtol=1e-11, atol=1e-16), grad, stacked)
    variance = sum(jnp.sum(jnp.var(x, 0, ddof=1)) for x in jax.tree.leaves(stacked)) / 3
    np.testing.assert_allclose(info.standard_error, jnp.sqrt(variance), rtol=1e-10)


def run(optimizer, method, **more):
    pair = pair_of(method, OPTIMIZERS["sgd"], num_steps=2)

    def data(key):
        i, j = jax.random.randint(key, (2, 6), 0, 16), jax.random.randint(key, (6,), 16, N)
        return i, j.reshape(2, 3) if method.parts == 2 else j

    return jaxhpo.tune(
        None,
        {"weights": jnp.zeros(N), "penalties": jnp.full(4, -2.0), "rate": jnp.log(0.1)},
        optimizer,
        num_steps=40,
        gradient=jaxhpo.from_pair(pair, data),
        carry=pair.init(W, H),
        progress=False,
        **more,
    )


@pytest.mark.slow
def test_a_run_in_calls_of_several_steps_goes_on_to_the_bit(tmp_path):
    whole = run(optax.adam(0.05), Online(), steps_per_call=10)
    run(optax.adam(0.05), Online(), steps_per_call=10, run_dir=tmp_path, callbacks=[stop_at_20])
    resumed = run(optax.adam(0.05), Online(), steps_per_call=10, run_dir=tmp_path, resume="continue")
    jax.tree.map(np.testing.assert_array_equal, whole.hparams, resumed.hparams)
    jax.tree.map(np.testing.assert_array_equal, whole.carry, resumed.carry)


def stop_at_20(step):
    return step.step == 19


@pytest.mark.slow
def test_parameters_on_a_mesh_are_those_of_one_device():
    if jax.device_count() < 2:
        pytest.skip("one device")
    mesh = jax.make_mesh((2,), ("data",))
    place = lambda x: jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))  # noqa: E731
    pair = pair_of(Online(), OPTIMIZERS["adam"])
    want, after, _ = jax.jit(pair.update)(H, pair.init(W, H), INDEX, jnp.arange(8))
    h = H | {"weights": place(H["weights"])}
    with jax.set_mesh(mesh):
        loss = lambda w, h, index: train_loss(w, h | {"weights": jax.reshard(h["weights"], jax.P(None))}, index)  # noqa: E731
        pair = pair_of(Online(), OPTIMIZERS["adam"], loss)
        got, state, _ = jax.jit(pair.update)(h, pair.init(W, h), INDEX, jnp.arange(8))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-16), got, want)
    np.testing.assert_allclose(state.inner.params, after.inner.params, rtol=1e-12)


def test_noise_shortens_the_steps_of_any_optimiser():
    g = jnp.array([3.0, 4.0])
    for optimizer in (optax.sgd(0.1), optax.adam(0.1)):
        plain, _ = optimizer.update(g, optimizer.init(g), g)
        slow = slow_where_noisy(optimizer)
        updates, state = slow.update(g, slow.init(g), g, noise=0.6)
        np.testing.assert_allclose(updates, 0.4 * plain, rtol=1e-12)
        updates, _ = slow.update(g, state, g, noise=2.0)  # running means: (.9 · .6 + 2) / (.9 + 1) of the norm is noise
        assert jnp.all(updates == 0)


@pytest.mark.slow
def test_tune_hands_the_noise_on():
    seen = []

    def watch(updates, state, params=None, **more):
        jax.debug.callback(lambda noise: seen.append(float(noise)), more["noise"])
        return jax.tree.map(lambda g: -0.05 * g, updates), state

    watching = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), watch)
    result = run(watching, Online(parts=2), record=("hparams", "hypergradient"))
    jax.effects_barrier()
    size = np.sqrt(
        sum(np.sum(np.square(x), tuple(range(1, x.ndim))) for x in jax.tree.leaves(result.history["hypergradient"]))
    )
    error = result.history["info"].standard_error
    np.testing.assert_allclose(sorted(seen), sorted((error / size) ** 2), rtol=1e-9)


def test_messages_say_what_to_write():
    with pytest.raises(jaxhpo.JaxhpoError, match="'last_step', 'window' or 'implicit'"):
        Online("one_step")
    with pytest.raises(jaxhpo.JaxhpoError, match="leading axis of 2"):
        pair = pair_of(Online(parts=2))
        pair.update(H, pair.init(W, H), INDEX, jnp.arange(8))
    state = pair_of(Online()).init(W, H)
    with pytest.raises(jaxhpo.JaxhpoError, match="another direction than"):  # silently that of the state
        pair_of(Online("implicit")).update(H, state, INDEX, jnp.arange(8))
    with pytest.raises(jaxhpo.JaxhpoError, match="made by another"):
        pair_of(Online(), OPTIMIZERS["momentum"]).update(H, state, INDEX, jnp.arange(8))
    with pytest.raises(jaxhpo.JaxhpoError, match="from_optax"):
        jaxhpo.hypergradient(Online(), jaxhpo.fixed_point(lambda w, h, batch: w / 2), outer_loss, num_steps=2)
    with pytest.raises(jaxhpo.JaxhpoError, match="standard_error"):
        run(slow_where_noisy(optax.sgd(0.1)), Online())
    with pytest.raises(jaxhpo.JaxhpoError, match="write 0.9"):
        slow_where_noisy(optax.sgd(0.1), memory=1.0)
    with pytest.raises(jaxhpo.JaxhpoError, match="warm_start"):
        jaxhpo.hypergradient(Online(), jaxhpo.from_optax(train_loss, optax.sgd(0.1)), outer_loss, warm_start=False)
