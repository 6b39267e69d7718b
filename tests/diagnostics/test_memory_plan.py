"""`memory_plan` predicts, without compiling, the memory that the compiler allocates for every schedule."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhpo
from jaxhpo import Implicit, Unroll
from jaxhpo._core.cost import count_and_peak, count_arithmetic, with_memory
from jaxhpo._diagnostics.memory_plan import MemoryPlan, PlanRow

slow = pytest.mark.slow
SIZE = 100


def matrix(adjoint, num_steps, tx=None):
    """Adam on a matrix, with a hyperparameter for each of its entries."""
    solver = jaxhpo.from_optax(
        lambda p, h, b: jnp.sum(jnp.sin(p) * h) + jnp.sum(p @ p), tx or optax.adam(0.01, eps_root=1e-8)
    )

    def outer(h):
        start = solver.init(jnp.ones((SIZE, SIZE)), h)
        return jnp.sum(jaxhpo.solve(solver, start, h, num_steps=num_steps, adjoint=adjoint).params ** 2)

    return outer, jnp.ones((SIZE, SIZE))


def regression(adjoint, num_steps):
    """Logistic regression on a closed-over data set, with one penalty."""
    x = jax.random.normal(jax.random.key(0), (500, 200))
    labels = jnp.sign(x[:, 0])

    def nll(p):
        return jnp.mean(jax.nn.softplus(-labels * (x @ p)))

    solver = jaxhpo.from_optax(lambda p, h, b: nll(p) + jnp.exp(h) * jnp.sum(p**2), optax.sgd(0.1, momentum=0.9))

    def outer(h):
        start = solver.init(jnp.zeros(200), h)
        return nll(jaxhpo.solve(solver, start, h, num_steps=num_steps, adjoint=adjoint).params)

    return outer, jnp.zeros(())


def network(adjoint, num_steps):
    """A network with one batch per step and tuned penalties, learning rates of steps and weights of examples."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = [(jax.random.normal(k, s) / 8, jnp.zeros(s[1])) for k, s in zip(keys, ((64, 64), (64, 10)), strict=False)]
    batches = jax.random.normal(keys[2], (num_steps, 32, 64))

    def loss(p, h, batch):
        x, t = batch
        hidden = jax.nn.gelu(x @ p[0][0] + p[0][1][None])
        fit = jnp.mean(jnp.exp(h["example"]) * jax.nn.logsumexp(hidden @ p[1][0] + p[1][1][None], -1))
        return fit + sum(jnp.sum(jnp.exp(h["decay"]) * w**2) for w, _ in p)

    solver = jaxhpo.from_optax(loss, lambda h: optax.sgd(lambda t: jnp.exp(h["rate"][t]), momentum=0.9))

    def outer(h):
        sol = jaxhpo.solve(solver, solver.init(params, h), h, (batches, jnp.arange(num_steps)), adjoint=adjoint)
        return jnp.sum(sol.params[0][0] ** 2)

    return outer, {"decay": jnp.zeros(()), "rate": jnp.full(num_steps, -3.0), "example": jnp.zeros(32)}


PROBLEMS = {"matrix": matrix, "regression": regression, "network": network}
CHECKPOINTS = (None, 1, 10, "binomial")


@pytest.mark.codegen
@pytest.mark.parametrize("num_steps", [20, 200])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_predicted_memory_is_near_the_allocated(problem, checkpoint, num_steps):
    """Within 20 % where the stored states are at least half of the memory (all cases of 200 steps), else within 1.5."""
    outer, h = PROBLEMS[problem](Unroll(checkpoint=checkpoint), num_steps)
    allocated = jax.jit(jax.value_and_grad(outer)).lower(h).compile().memory_analysis().temp_size_in_bytes
    predicted = count_and_peak(jax.value_and_grad(outer), h)[1]
    few = num_steps == 20 or checkpoint == "binomial"
    assert 1 / (1.5 if few else 1.2) < predicted / allocated < (1.5 if few else 1.2), (predicted, allocated)


def test_rows_and_text_of_a_plan(capsys):
    outer, h = matrix(Unroll(checkpoint="sqrt"), 1000)
    plan = jaxhpo.memory_plan(outer, h, memory_limit=2**31)
    assert capsys.readouterr().out.strip() == str(plan)
    calls = [row.call for row in plan.rows]
    assert calls == ["Unroll(checkpoint=None)", "Unroll(checkpoint=1)", "Unroll(checkpoint='sqrt')", "Unroll()"] + [
        "Unroll(checkpoint='binomial')"
    ]
    assert plan.asked == plan.rows[2] and plan.param_bytes == h.nbytes and plan.population == 1
    assert "17 states, by binomial checkpointing" in str(plan)
    assert "a state every 25 steps, and every state and gradient of one segment" in str(plan)  # √(1000 · 3/4) = 27.4
    default = plan.rows[3]
    assert default.keeps == plan.rows[1].keeps and default.bytes <= 2**30
    costs = [row.cost for row in plan.fitting]
    assert len(costs) == 5 and costs == sorted(costs)
    assert plan.rows[4].cost == plan.rows[4].time and plan.rows[0].cost > plan.rows[0].time  # beyond 32 MiB
    assert plan.rows[2].time - plan.rows[1].time == pytest.approx(1, abs=0.05)  # one more pass forward
    assert plan.rows[0].time < plan.rows[1].time and plan.rows[2].time + 0.8 < plan.rows[4].time


@pytest.mark.parametrize(
    ("asked", "limit", "said"),
    [
        (
            1,
            1000,
            r"On this machine write `Unroll\(checkpoint=None\)`: 3\.00 .* of 3\.70 \(19% fewer operations\)",
        ),
        (
            1,
            600,
            r"`Unroll\(checkpoint=1\)` has the least cost of what fits: leave it as it is",
        ),  # 553 > .8 * 600
        (0, 600, r"write `Unroll\(checkpoint=1\)`: .* \(23% more operations\), in 59 B of memory instead of 553 B"),
        (1, 60, r"No schedule fits into 48 B, four fifths"),
        (0, 1000, r"leave it as it is\.$"),  # what a cache holds takes no time
        (0, 1000 * 2**20, r"write `Unroll\(checkpoint=1\)`: 3\.70 .* of 3\.00 \(23% more .* 59 MiB .* of 553 MiB\."),
        (1, 1000 * 2**20, r"leave it as it is\. `Unroll\(checkpoint=None\)` takes 19% fewer .* 553 MiB.*: `compare`"),
        (None, 1000, "No solve keeps states"),
    ],
)
def test_a_plan_ends_with_what_to_write(asked, limit, said):
    unit = 2**20 if limit > 2**20 else 1
    rows = tuple(  # of 10¹⁰ operations a training
        PlanRow(f"Unroll(checkpoint={k})", size * unit, time, with_memory(1e10 * time, size * unit) / 1e10, ())
        for k, size, time in ((None, 553, 3.0), (1, 59, 3.7))
    )
    plan = MemoryPlan(rows[asked or 0], rows if asked is not None else (), limit, 1, 1, ())
    assert re.search(said, str(plan).splitlines()[-1])


@pytest.mark.slow
def test_refusal_names_the_schedules_that_fit():
    outer, h = matrix(Unroll(checkpoint=1), 1000)
    size = h.nbytes
    with pytest.raises(jaxhpo.JaxhpoError, match=r"takes about .*What would fit: .*`Unroll\(checkpoint='sqrt'\)` \("):
        jaxhpo.memory_plan(outer, h, memory_limit=500 * size)
    with pytest.raises(jaxhpo.JaxhpoError, match="No schedule fits: make the batch or the population smaller"):
        jaxhpo.memory_plan(outer, h, memory_limit=3 * size)


@pytest.mark.slow
def test_memory_is_proportional_to_the_population():
    outer, h = matrix(Unroll(checkpoint=1), 100)
    one = jaxhpo.memory_plan(outer, h)
    four = jaxhpo.memory_plan(jax.vmap(outer), jnp.stack([h] * 4))
    assert four.population == 4
    assert four.asked.bytes == pytest.approx(4 * one.asked.bytes, rel=0.02)


def test_jitted_loss_is_planned_and_its_jaxpr_unchanged():
    outer, h = matrix(Unroll(checkpoint=1), 200)
    jitted = jax.jit(outer)
    before = str(jax.make_jaxpr(jax.grad(jitted))(h))
    plan = jaxhpo.memory_plan(jitted, h)
    assert len({row.bytes for row in plan.rows}) == 4  # the default keeps every state and gradient
    assert str(jax.make_jaxpr(jax.grad(jitted))(h)) == before


def test_implicit_rule_has_one_row():
    outer, h = matrix(Implicit(jaxhpo.CG(10)), 100, optax.sgd(0.01))
    plan = jaxhpo.memory_plan(outer, h)
    assert not plan.rows and plan.asked.call.startswith("Implicit(") and plan.asked.bytes < 30 * h.nbytes


@slow
def test_memory_limit_chooses_the_fastest_schedule_that_fits():
    """`memory_limit` and `memory_plan` use the same estimate."""
    outer, h = matrix(Unroll(), 400)
    rows = jaxhpo.memory_plan(outer, h).rows
    for row, more in zip(rows, (1.01, 1.01, 1.01, 1.01, 1.01), strict=True):
        limited, _ = matrix(Unroll(memory_limit=row.bytes * more), 400)
        found = jaxhpo.memory_plan(limited, h).asked
        assert found.bytes <= row.bytes * more and found.time <= row.time * 1.01


def test_branches_are_counted_as_a_known_table_selects_them():
    taken = np.array([True, False, False, True, False])

    def loop(x):
        body = lambda x, turn: (jax.lax.cond(turn, lambda x: x @ x, lambda x: x, x), None)  # noqa: E731
        return jax.lax.scan(body, x, taken)[0]

    assert count_arithmetic(loop, jnp.ones((7, 7))) == 2 * (2 * 7**3)


def test_invalid_inputs_are_refused():
    outer, h = matrix(Unroll(), 4)
    with pytest.raises(jaxhpo.JaxhpoError, match=r"must return one number.*jax\.vmap"):
        jaxhpo.memory_plan(lambda h: h, h)
    with pytest.raises(jaxhpo.JaxhpoError, match="memory_limit"):
        jaxhpo.memory_plan(outer, h, memory_limit=-1.0)
    assert dataclasses.is_dataclass(jaxhpo.MemoryPlan)


def test_loss_without_solve_and_loss_without_derivative():
    plan = jaxhpo.memory_plan(lambda h: h["a"], {"a": jnp.ones(())})
    assert plan.asked.call == "no solve" and plan.asked.bytes == 0
    with pytest.raises(jaxhpo.JaxhpoError, match="returned int.*no derivative"):
        jaxhpo.memory_plan(lambda h: jnp.sum(h > 0), jnp.ones(3))


@slow
def test_hvp_fraction_keeps_within_the_memory_limit():
    solver = jaxhpo.from_optax(lambda p, h, b: jnp.mean((b @ p) ** 2) + jnp.exp(h) * jnp.sum(p**2), optax.sgd(0.1))

    def plan(**settings):
        def outer(h):
            rule, start = Unroll(hvp_fraction=0.5, **settings), solver.init(jnp.ones(300), h)
            x = jnp.ones((24, 4, 300))
            return jnp.sum(jaxhpo.solve(solver, start, h, x, key=jax.random.key(0), adjoint=rule).params)

        return jaxhpo.memory_plan(outer, jnp.zeros(()))

    rows = plan().rows
    assert not [row for row in rows if "None" in row.keeps[0]]
    least = min(row.bytes for row in rows)
    for limit in (1.1 * least, 1.5 * least, 3 * least):
        assert plan(memory_limit=limit).asked.bytes <= limit


@slow
def test_memory_limit_is_tried_when_no_row_fits():
    """Fewer states than `"binomial"` keeps may fit."""
    outer, h = matrix(Unroll(), 300)
    least = min(row.bytes for row in jaxhpo.memory_plan(outer, h).rows)
    with pytest.raises(jaxhpo.JaxhpoError, match=r"What would fit: `Unroll\(memory_limit="):
        jaxhpo.memory_plan(outer, h, memory_limit=0.9 * least)


def test_an_outer_loss_of_three_arguments_is_told_what_to_write():
    with pytest.raises(jaxhpo.JaxhpoError, match=r"give `lambda hparams: outer_loss\(hparams, carry, key\)\[0\]`"):
        jaxhpo.memory_plan(lambda h, carry, key: (h**2, carry, None), 1.0)
