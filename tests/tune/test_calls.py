"""Several outer steps in one call: the same steps, one row of history, failures named by their step."""

import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhpo

MOVES = optax.adam(0.1)


def noisy(h, carry, key):
    """A random outer loss whose carry counts the steps."""
    value = jnp.sum((h - 3.0 + 0.1 * jax.random.normal(key, h.shape)) ** 2)
    return value, carry + 1, {"carry": carry}


def fails_at(step):
    """An outer loss that is NaN at one step."""

    def outer_loss(h, carry, key):
        return jnp.where(carry == step, jnp.nan, 1.0) * (h - 3.0) ** 2, carry + 1, None

    return outer_loss


def run(steps_per_call, num_steps=12, outer_loss=noisy, start=None, **settings):
    start = jnp.zeros(2) if start is None else start
    settings = {"carry": jnp.zeros(()), "progress": False} | settings
    return jaxhpo.tune(outer_loss, start, MOVES, num_steps=num_steps, steps_per_call=steps_per_call, **settings)


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_calls_take_the_steps_one_by_one():
    alone, calls = run(1), run(4)
    assert_same((alone.hparams, alone.carry), (calls.hparams, calls.carry))
    last = slice(3, None, 4)  # of each call
    for name in ("value", "hypergradient_norm", "hparams", "info"):
        assert_same(jax.tree.map(lambda x: x[last], alone.history[name]), calls.history[name])
    assert calls.message == "12 outer steps were taken, of 12 asked for"
    assert calls.best_step in range(3)


def test_remedies_are_counted_over_all_steps_of_a_call():
    alone, calls = (run(k, remedies=jaxhpo.Remedies(clip=1e-3)) for k in (1, 6))
    for name, counts in alone.history["remedies"].items():
        np.testing.assert_array_equal(counts.reshape(2, 6).sum(1), calls.history["remedies"][name])
    assert sum(map(np.sum, calls.history["remedies"].values())) > 0


def test_members_of_a_population_are_runs_of_their_own():
    keys = jax.random.split(jax.random.key(1), 3)
    starts = jnp.arange(6.0).reshape(3, 2)
    together = run(3, start=starts, population=3, carry=jnp.zeros(3), key=keys)
    for i in range(3):
        alone = run(3, start=starts[i], key=keys[i])
        np.testing.assert_allclose(together.hparams[i], alone.hparams, rtol=1e-6)  # another program
        np.testing.assert_allclose(together.member(i).history["value"], alone.history["value"], rtol=1e-5)


@pytest.mark.slow
def test_hyperparameters_on_an_explicit_mesh():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        start = jax.device_put(jnp.zeros(2), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
        outer_loss = lambda h, carry, key: (jnp.sum((h - 3.0) ** 2), carry + 1, {"h": h})  # noqa: E731
        alone, calls = run(1, outer_loss=outer_loss, start=start), run(4, outer_loss=outer_loss, start=start)
    assert_same(alone.hparams, calls.hparams)


@pytest.mark.parametrize("step", [0, 1, 7, 8])
def test_a_step_that_is_not_finite_is_named_and_ends_the_run(step):
    start = jnp.array(0.0)
    if step == 0:
        with pytest.raises(jaxhpo.NonFiniteError, match="Outer step 0: The outer loss is nan"):
            run(4, outer_loss=fails_at(0), start=start)
        return
    with pytest.warns(RuntimeWarning, match=f"Outer step {step}: The outer loss is nan"):
        result = run(4, outer_loss=fails_at(step), start=start)
    assert result.status == "not_finite" and len(result.history["value"]) == step // 4
    np.testing.assert_array_equal(result.hparams, run(1, num_steps=step, outer_loss=fails_at(-1), start=start).hparams)


def test_resumed_calls_are_equal_to_the_bit(tmp_path):
    whole = run(4, num_steps=24)
    run(np.int64(4), num_steps=8, run_dir=tmp_path)
    resumed = run(4, num_steps=24, run_dir=tmp_path)
    assert "after 8 outer steps" in resumed.message
    assert_same(
        (whole.hparams, whole.carry, whole.best_hparams), (resumed.hparams, resumed.carry, resumed.best_hparams)
    )
    np.testing.assert_array_equal(whole.history["value"], resumed.history["value"])
    assert jaxhpo.load(tmp_path).history["value"].shape == (6,)
    for other in (1, 8):
        with pytest.raises(jaxhpo.JaxhpoError, match="steps_per_call"):
            run(other, num_steps=24, run_dir=tmp_path)


KILLED = """
import os, signal, sys
import jax, jax.numpy as jnp, optax, jaxhpo
def outer_loss(h, carry, key):
    return jnp.sum((h - 3.0 + 0.1 * jax.random.normal(key, h.shape)) ** 2), carry + 1, None
def kill(step):
    if step.step == 2 and sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
result = jaxhpo.tune(outer_loss, jnp.zeros(2), optax.adam(0.1), num_steps=40, steps_per_call=8, carry=jnp.zeros(()),
                     run_dir=sys.argv[1], save_every=1, callbacks=[kill], progress=False)
print(result.hparams.tolist(), float(result.carry))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_call(tmp_path):
    def call(folder, how):
        command = [sys.executable, "-c", KILLED, str(tmp_path / folder), how]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)

    assert call("killed", "kill").returncode == -signal.SIGKILL
    assert jaxhpo.load(tmp_path / "killed").status == "killed"
    ended, whole = call("killed", "go on"), call("whole", "go on")
    assert ended.stdout == whole.stdout and "40.0" in ended.stdout


def test_patience_and_budgets_count_calls():
    settings = {"num_steps": 50, "carry": None, "start": jnp.ones(2)}
    result = run(5, outer_loss=lambda h: jnp.sum(jnp.cosh(h)), patience=2, min_delta=1.0, **settings)
    assert result.status == "patience" and "in 2 calls of 5 outer steps" in result.message
    solver = jaxhpo.from_optax(lambda p, h, batch: jnp.sum((p - h) ** 2), optax.sgd(0.1))

    def outer_loss(h):
        return jnp.sum((jaxhpo.solve(solver, solver.init(h, h), h, num_steps=3).params - 1.0) ** 2)

    result = run(5, outer_loss=outer_loss, max_inner_steps=40, **settings | {"start": jnp.zeros(2)})
    assert result.message == "30 of 40 inner steps are taken, and a call of 5 outer steps takes 15"
    with pytest.raises(jaxhpo.JaxhpoError, match="the steps of a call take 15"):
        run(5, outer_loss=outer_loss, max_inner_steps=14, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 10}, "write 12, say"),
        ({"record": "error"}, "record='error'"),
        ({"record": ("hparams", "agreement")}, "record='agreement'"),
        ({"on_not_finite": "skip"}, "on_not_finite='skip'"),
        ({"on_error": "stop"}, "on_error='stop'"),
        ({"steps_per_call": 0}, "steps_per_call"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_what_a_call_cannot_do_is_refused(settings, message):
    with pytest.raises(jaxhpo.JaxhpoError, match=message):
        run(**{"steps_per_call": 4} | settings)
