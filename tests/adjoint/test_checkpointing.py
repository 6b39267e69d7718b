"""Checkpoint schedules: what is chosen, what binomial checkpointing redoes, and what that takes."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhpo
from jaxhpo import CG, Implicit, Unroll
from jaxhpo._adjoint import checkpointing
from jaxhpo._adjoint.binomial import least_repeats, least_slots, make_actions
from jaxhpo._adjoint.checkpointing import ENOUGH, EVERYTHING, Sizes, choose
from jaxhpo._core.cost import count_arithmetic
from jaxhpo._core.types import Schedule

slow = pytest.mark.slow


# --- the table of actions ---


@functools.cache
def fewest(num_steps, slots):
    """Steps taken forward, by dynamic programming over all splits."""
    if num_steps == 1:
        return 0
    if slots == 1:
        return num_steps * (num_steps - 1) // 2
    splits = range(1, num_steps)
    return min(m + fewest(num_steps - m, slots - 1) + fewest(m, slots) for m in splits)


def test_no_schedule_redoes_fewer_steps():
    for num_steps in range(1, 50):
        for slots in range(1, 8):
            stored, actions = make_actions(num_steps, slots)
            redone = int((~actions.pull).sum())
            assert len(stored) - 1 + redone == fewest(num_steps, slots)
            r = least_repeats(num_steps, slots)  # less the T − 1 of the forward pass
            assert redone == (r * num_steps - math.comb(slots + r, r - 1) - (num_steps - 1) if r else 0)
            assert [*actions.step[actions.pull]] == [*range(num_steps)][::-1]


@pytest.mark.parametrize(("num_steps", "slots"), [(1, 1), (2, 1), (9, 3), (40, 4), (41, 40), (200, 6)])
def test_the_actions_find_their_states(num_steps, slots):
    """Played with the step's index for its state."""
    stored, actions = make_actions(num_steps, slots)
    held = {slot: step for step, slot in enumerate(stored) if slot >= 0}
    state = num_steps - 1
    for load, store, step, pull in zip(*actions, strict=True):
        state = held[load] if load >= 0 else state
        assert state == step and len(held) <= slots
        if store >= 0:
            held[store] = state
        state += not pull


def test_slots():
    """s states suffice for C(s + 3, 3) steps, none of them taken more than thrice (Griewank & Walther 2000)."""
    assert [least_slots(math.comb(s + 3, 3) + more, 3) for s in (4, 17) for more in (0, 1)] == [4, 5, 17, 18]


# --- on a solve ---


def problem(num_steps=30, size=6):
    """Adam, whose state holds an integer; batch statistics; rates, data and weights are all tuned."""

    def train_loss(params, h, batch, mean):
        hidden = jnp.tanh(batch @ params["in"] * h["scale"])
        mean = 0.9 * mean + 0.1 * hidden.mean()
        return jnp.mean((hidden @ params["out"] - mean) ** 2) + jnp.sum(params["in"] ** 2), mean

    solver = jaxhpo.from_optax(train_loss, lambda h: optax.adam(h["rate"], eps_root=1e-8), has_state=True)
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"in": jax.random.normal(keys[0], (size, size)), "out": jax.random.normal(keys[1], (size,))}
    batches = jax.random.normal(keys[2], (num_steps, 4, size))

    def outer(h, params, batches, rule):
        sol = jaxhpo.solve(solver, solver.init(params, h, jnp.zeros(())), h, batches, adjoint=rule)
        return jnp.sum(sol.params["in"] ** 2) + jnp.sum(sol.params["out"] ** 3) + sol.model_state

    return outer, ({"scale": jnp.array(0.7), "rate": jnp.array(0.05)}, params, batches)


def furthest(a, b):
    return max(jnp.max(jnp.abs(x - y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@slow  # quick: its closed form, among those of all rules
@pytest.mark.parametrize("limit", [None, 10_000.0])
def test_binomial_equals_plain_autodiff(limit):
    outer, args = problem()
    few = Unroll(checkpoint="binomial") if limit is None else Unroll(memory_limit=limit)
    grad = lambda rule: jax.jit(jax.grad(functools.partial(outer, rule=rule), argnums=(0, 1, 2)))(*args)  # noqa: E731
    assert furthest(grad(few), grad(Unroll(checkpoint=None))) < 1e-12


@slow
@pytest.mark.parametrize("outer_mode", [jax.jacfwd, jax.jacrev])
def test_binomial_hessians(outer_mode):
    outer, (h, *rest) = problem(7, 2)

    def hessian(rule):
        return jax.jit(outer_mode(jax.grad(lambda h: outer(h, *rest, rule=rule))))(h)

    assert furthest(hessian(Unroll(checkpoint="binomial")), hessian(Unroll(checkpoint=None))) < 1e-11


def programs(rule, num_steps, size=64):
    """A training whose states are all of its memory."""
    solver = jaxhpo.from_optax(lambda p, h, b: jnp.sum(jnp.sin(p) * h), optax.sgd(0.1, momentum=0.9))

    def outer(h):
        start = solver.init(jnp.ones((size, size)), h)
        return jnp.sum(jaxhpo.solve(solver, start, h, num_steps=num_steps, adjoint=rule).params)

    return outer


@pytest.mark.codegen
def test_binomial_arithmetic_and_memory():
    """17 states for 1000 steps, each step taken 2.8 times: 1 + 1000⁻¹(redone) + what pulling through a step takes."""
    size, outer = 64 * 64 * jnp.zeros(()).dtype.itemsize, programs(Unroll(checkpoint="binomial"), 1000)
    compiled = jax.jit(jax.grad(outer)).lower(jnp.array(1.0)).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    assert 17 * 2 * size < memory < (17 + 6) * 2 * size  # a state is two copies; six states in flight
    every = jax.jit(jax.grad(programs(Unroll(checkpoint="sqrt"), 1000))).lower(jnp.array(1.0)).compile()
    assert memory < 0.5 * every.memory_analysis().temp_size_in_bytes


def test_programs_are_as_long_for_any_number_of_steps():
    """Of every schedule with more than one segment: the traced program does not grow, so neither does compilation."""

    def length(rule, num_steps):
        return str(jax.make_jaxpr(jax.grad(programs(rule, num_steps, 2)))(1.0)).count("\n")

    for checkpoint in (None, 1, 20, "binomial"):
        rule = Unroll(checkpoint=checkpoint)
        assert length(rule, 400) == length(rule, 3600), checkpoint  # no segment is left over


@pytest.mark.parametrize("rule", [Unroll(memory_limit=2e5), Unroll(checkpoint=300, truncate=90_000), Implicit(CG(5))])
def test_step_indices_take_no_memory(rule):
    """Of 100 000 steps on three parameters: every index would be 400 or 800 kB."""
    solver = jaxhpo.from_optax(lambda p, h, t: jnp.sum((p - h * jnp.sin(t)) ** 2), optax.sgd(0.01))

    def outer(h):
        batches = lambda t: t / 100  # noqa: E731
        start = solver.init(jnp.zeros(3), h)
        return jnp.sum(jaxhpo.solve(solver, start, h, batches, num_steps=100_000, adjoint=rule).params ** 2)

    compiled = jax.jit(jax.grad(outer)).lower(jnp.ones(3)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 2e5


def test_an_unknown_length_of_memory_is_refused():
    outer = programs(Unroll(memory_limit=1e3), 100)
    with pytest.raises(jaxhpo.JaxhpoError, match=r"take about .* bytes even if .* 1 state, .* Raise the limit"):
        jax.make_jaxpr(jax.grad(outer))(1.0)
    with pytest.raises(jaxhpo.JaxhpoError, match="pass only one of them"):
        Unroll(checkpoint=3, memory_limit=1e9)
    assert count_arithmetic(jax.grad(programs(Unroll(memory_limit=1e9), 5)), 1.0) > 0


# --- the choice of a schedule ---

MB = 2**20
NETWORK = Sizes(2 * MB, MB, lambda: MB, lambda: 6 * MB)  # momentum; few activations
TRANSFORMER = Sizes(3 * MB, MB, lambda: 25 * MB, lambda: 90 * MB)  # Adam; many


@pytest.mark.parametrize(
    ("checkpoint", "num_steps", "sizes", "want"),
    [
        (None, 100, NETWORK, Schedule(None, False)),
        (1, 1000, NETWORK, Schedule(1, True)),
        ("sqrt", 16, NETWORK, Schedule(1, True)),
        ("sqrt", 17, NETWORK, Schedule(3, True)),  # √(17 · 2/3) = 3.4
        ("sqrt", 1000, NETWORK, Schedule(40, False)),  # 26 gradients would outweigh what one step takes
        ("sqrt", 1000, TRANSFORMER, Schedule(25, True)),  # √(1000 · 3/4) = 27.4, and 25 divides 1000
        (40, 1000, NETWORK, Schedule(40, False)),
        (10, 1000, NETWORK, Schedule(10, True)),
        (
            "sqrt",
            1000,
            Sizes(2 * MB, 0, lambda: 0, lambda: 0),
            Schedule(40, True),
        ),  # no gradient: what is kept of it is nothing
        (40, 12, NETWORK, Schedule(40, True)),  # no more than twelve are ever kept
        ("sqrt", 100, Sizes(2**16, 2**15, lambda: 0, lambda: 2**16), EVERYTHING),  # 12.5 MiB in all
        ("sqrt", 150, Sizes(2**16, 2**15, lambda: 2**15, lambda: 2**16), Schedule(1, True)),  # 18.75, 14 MiB
        ("sqrt", 200, Sizes(2**16, 2**15, lambda: 2**15, lambda: 2**16), Schedule(10, True)),  # √(200 · 2/3) = 11.5
        ("binomial", 1000, NETWORK, Schedule(slots=17)),
    ],
    ids=lambda value: "" if isinstance(value, Sizes) else str(value),
)
def test_schedules(checkpoint, num_steps, sizes, want):
    assert choose(checkpoint, num_steps, sizes) == want


def stored(num_steps, sizes, operations=1e12):
    """`sizes` with the cost of a schedule: for each step three trainings and what is redone; what it stores."""

    def cost(schedule):
        k, every, gradient = schedule.segment, sizes.state, sizes.gradient * schedule.gradients
        if schedule.slots is not None:
            kept, trainings = schedule.slots * every, 6.0
        elif k is None:
            kept, trainings = num_steps * sizes.residuals(), 3.0
        else:
            kept = (num_steps // k * every if k > 1 else 0) + (k if k > 1 else num_steps) * (every + gradient)
            trainings = 4.0 + (k > 1) - schedule.gradients / 3
        return trainings * operations * num_steps, kept + sizes.activations()

    return sizes._replace(cost=cost)


@pytest.mark.parametrize(
    ("num_steps", "sizes", "want"),
    [
        (100, NETWORK, EVERYTHING),  # 601 MiB
        (300, NETWORK, Schedule(1, True)),  # 901 MiB, and plain autodiff 1.76 GiB
        (400, NETWORK, Schedule(1, False)),  # with gradients 1.17 GiB
        (1000, NETWORK, Schedule(25, True)),  # 155 MiB; every state 1.95 GiB
        (16, TRANSFORMER, Schedule(1, True)),
        (20_000, TRANSFORMER, Schedule(125, True)),  # 1005 MiB
        (30_000, TRANSFORMER, Schedule(slots=55)),  # C(58, 3) ≥ 30 000 > C(57, 3); two levels take 1.2 GiB
        (16, Sizes(2**31, 2**29, lambda: 0, lambda: 2**32), Schedule(1, True)),  # nothing fits: as "sqrt"
        (1000, Sizes(2**31, 2**29, lambda: 0, lambda: 2**32), Schedule(40, False)),
    ],
    ids=lambda value: "" if isinstance(value, Sizes) else str(value),
)
def test_default_is_the_fastest_below_a_gibibyte(num_steps, sizes, want):
    sizes = stored(num_steps, sizes)
    found = choose("auto", num_steps, sizes)
    assert found == want and (sizes.peak(found) <= ENOUGH or found == choose("sqrt", num_steps, sizes))
    if sizes.peak(found) <= ENOUGH:
        assert choose("auto", num_steps, sizes, float(ENOUGH)) == found


@pytest.mark.parametrize(
    ("num_steps", "operations", "want"),
    [
        (100, 5e8, EVERYTHING),  # 3.76 trainings with memory; 4.03 and 4.23 with 301 and 201 MiB
        (100, 2.5e8, Schedule(1, True)),  # 4.39; 4.53 and 4.45
        (100, 1e8, Schedule(1, False)),  # 5.13; 6.82 and 5.47
        (5, 1.0, EVERYTHING),  # 31 MiB: a cache holds them
        (1000, 1.0, Schedule(25, True)),  # what keeps every state exceeds 1 GiB
    ],
)
def test_default_keeps_less_where_a_step_takes_few_operations(num_steps, operations, want):
    sizes = stored(num_steps, NETWORK, operations)
    assert choose("auto", num_steps, sizes) == want
    assert sizes.cost(choose("auto", num_steps, sizes, float(ENOUGH)))[0] <= sizes.cost(want)[0]


def test_device_is_four_fifths_of_what_is_free(monkeypatch):
    sizes = stored(1000, NETWORK)
    for most, want in ((6001 * MB, EVERYTHING), (6000 * MB, Schedule(1, True)), (100 * MB, Schedule(slots=17))):
        monkeypatch.setattr(checkpointing, "available_bytes", lambda most=most: most / 0.8)
        assert choose("auto", 1000, sizes, "device") == want
    monkeypatch.setattr(checkpointing, "available_bytes", lambda: MB)
    with pytest.raises(jaxhpo.JaxhpoError, match=r"memory_limit='device'\)`, 819 KiB: 1000 inner steps"):
        choose("auto", 1000, sizes, "device")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(jaxhpo.JaxhpoError, match="all must run the same program: write a number of bytes"):
        choose("auto", 1000, sizes, "device")


def test_a_step_without_derivative_runs_under_the_default():
    """Its memory cannot be predicted, and is not needed."""

    def step(params, hparams, batch):
        return jax.lax.while_loop(lambda p: jnp.sum(p) > 1.0, lambda p: p / 2, params + hparams)

    solver = jaxhpo.fixed_point(step)
    sol = jaxhpo.solve(solver, solver.init(jnp.zeros(2**20), 1e-6), 1e-6, num_steps=5)
    assert bool(jnp.all(jnp.isfinite(sol.params)))


def test_a_numpy_integer_is_an_integer():
    sizes = Sizes(8, 8, lambda: 0, lambda: 0)
    assert choose(Unroll(checkpoint=np.int64(7)).checkpoint, 100, sizes) == choose(7, 100, sizes)


def test_a_limit_that_nothing_keeps_is_refused_without_delay():
    """With one slot the table of actions would be 8 million entries long; it stays below 200 000."""
    sizes = Sizes(8, 8, lambda: 0, lambda: 0, lambda schedule: (0.0, schedule.slots or 4000))
    with pytest.raises(jaxhpo.JaxhpoError, match=r"memory_limit=1\)`: 4000 inner steps.* by binomial") as error:
        choose("auto", 4000, sizes, memory_limit=1.0)
    slots = int(re.search(r"kept is (\d+) states", str(error.value)).group(1))
    assert len(make_actions(4000, slots)[1].load) <= 200_000
