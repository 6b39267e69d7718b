"""The diagnostics leave the process as they find it: compiled functions, JAX's caches and the context variable.

`tune`, `check_hypergradient`, `compare` and `memory_plan` trace the outer loss anew, also where the user jitted it, to
see its solves and warnings. No function that was compiled before is traced or compiled again afterwards.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import compile_events

import jaxhpo
from jaxhpo import CG, Implicit, Unroll
from jaxhpo._core.record import Recording, active

STEPS = 5
H = {"goal": jnp.array([1.0, 2.0]), "rate": jnp.asarray(0.1)}


class Traced:
    """A jitted function that counts how often it is traced."""

    def __init__(self, fn):
        self.count = 0

        def counted(*args):
            self.count += 1
            return fn(*args)

        self.jitted = jax.jit(counted)

    def __call__(self, *args):
        return self.jitted(*args)


@contextlib.contextmanager
def unchanged(*calls):
    """Calls functions before and after the block; fails if JAX traces, lowers or compiles them after it."""
    for call in calls:
        jax.block_until_ready(call())
    with compile_events() as events:
        jax.jit(lambda x: x + 1)(1.0)
        assert any("backend_compile" in event for event in events)  # the listener hears compilations
        yield
        events.clear()
        for call in calls:
            jax.block_until_ready(call())
        assert not events


def outer_loss(rule):
    solver = jaxhpo.from_optax(lambda p, h, b: jnp.sum((p - h["goal"]) ** 2), lambda h: optax.sgd(h["rate"]))

    def loss(h):
        start = solver.init(jnp.zeros(2), h)
        return jnp.sum((jaxhpo.solve(solver, start, h, num_steps=STEPS, adjoint=rule).params - 3.0) ** 2)

    return loss


def run_tune(make):
    settings = {"num_steps": 5, "max_inner_steps": 2 * STEPS, "progress": False}
    result = jaxhpo.tune(make(Unroll()), H, optax.sgd(0.01), **settings)
    assert result.status == "budget" and len(result.history["value"]) == 2  # the inner steps are seen


def run_check(make):
    assert jaxhpo.check_hypergradient(make(Unroll()), H).relative_error < 1e-6


def run_compare(make):
    found = jaxhpo.compare(make, H, [Unroll(), Implicit(CG())], repeats=1, progress=False)
    # The solves and the warnings of functions that were traced before are seen.
    assert found.problem.num_steps == STEPS
    row = found["Implicit(CG())"]
    assert row.linear_status == "converged" and row.blind == ("hparams['rate']",)


def run_memory_plan(make):
    assert len(jaxhpo.memory_plan(make(Unroll()), H).rows) == 5


TOOLS = [run_tune, run_check, run_compare, run_memory_plan]


@pytest.mark.parametrize("tool", [*TOOLS[:2], *(pytest.param(tool, marks=pytest.mark.slow) for tool in TOOLS[2:])])
def test_compiled_functions_are_neither_traced_nor_compiled_again(tool):
    """An unrelated function, and the user's jitted outer loss, its gradient and a jitted function inside it."""
    unrelated, inner = Traced(jnp.sin), Traced(lambda x: jnp.sum(x**2))

    @functools.cache
    def make(rule):
        loss = outer_loss(rule)
        return Traced(lambda h: loss(h) + 0.1 * inner(h["goal"]))

    rules = [Unroll(), Implicit(CG())]
    grads = {rule: Traced(jax.value_and_grad(make(rule))) for rule in rules}
    calls = [lambda: unrelated(jnp.ones(3)), lambda: inner(H["goal"])]
    calls += [functools.partial(fn, H) for rule in rules for fn in (make(rule), grads[rule])]
    counted = [unrelated, inner, *map(make, rules), *grads.values()]
    with pytest.warns(jaxhpo.ZeroHypergradientWarning):  # `Implicit` does not see the rate
        [call() for call in calls]
    with unchanged(*calls):
        tool(make)
        counts = [fn.count for fn in counted]
        assert unrelated.count == 1
        assert make(Unroll()).count > 1  # traced anew inside the tool
        assert active() == Recording()
    assert [fn.count for fn in counted] == counts


@pytest.mark.parametrize("tool", [run_tune, run_check])
def test_warnings_of_a_loss_traced_before_are_seen(tool):
    """JAX's cache of the user's jitted loss would hide the warning that makes the error name its reason."""
    loss = jax.jit(outer_loss(Implicit(CG())))
    with pytest.warns(jaxhpo.ZeroHypergradientWarning):
        jax.jit(jax.grad(loss))(H)
    with pytest.raises(jaxhpo.ZeroHypergradientError, match=r"hparams\['rate'\].*Implicit"):
        tool(lambda rule: loss)
    assert active() == Recording()


def test_linear_solves_and_schedules_of_a_loss_traced_before_are_seen():
    solver = jaxhpo.from_optax(lambda p, h, b: jnp.sum((p - h) ** 2), optax.sgd(0.1))

    def loss(rule):
        def fn(h):
            sol = jaxhpo.solve(solver, solver.init(jnp.zeros(2), h), h, num_steps=STEPS, adjoint=rule)
            return jnp.sum(sol.params**2)

        return jax.jit(fn)

    implicit, unrolled = loss(Implicit(CG())), loss(Unroll())
    for fn in (implicit, unrolled):
        fn(jnp.ones(2)), jax.grad(fn)(jnp.ones(2))
    assert jaxhpo.check_hypergradient(implicit, jnp.ones(2)).linear_statuses == (jaxhpo.LinearStatus.CONVERGED,)
    assert jaxhpo.memory_plan(unrolled, jnp.ones(2)).asked.call == "Unroll()"


@pytest.mark.parametrize("tool", TOOLS)
def test_an_exception_ends_the_recording(tool):
    """An exception of the user's loss, while it is traced; a function compiled before stays compiled."""
    unrelated = Traced(jnp.cos)

    def make(rule):
        def loss(h):
            outer_loss(rule)(h)
            raise KeyError("no such column")

        return loss

    with unchanged(lambda: unrelated(jnp.ones(3))):
        with pytest.raises(KeyError, match="no such column"):
            tool(make)
        assert active() == Recording()
    assert unrelated.count == 1


def test_a_diagnosis_ends_the_recording():
    loss = outer_loss(Unroll())
    with pytest.raises(jaxhpo.NonFiniteError, match="No inner step is at fault"):
        jaxhpo.check_hypergradient(jax.jit(lambda h: loss(h) / 0), H)
    assert active() == Recording()
