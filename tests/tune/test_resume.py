"""State that a resumed run keeps, and changes that it refuses."""

import os
import signal
import subprocess
import sys
import time
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhpo
from jaxhpo import JaxhpoError, Remedies
from jaxhpo._tune.history import decode, encode
from jaxhpo._tune.run_dir import RunDir
from jaxhpo._tune.table import standing

START = jnp.array([1.0, 2.0])
ADAM = optax.adam(0.1)


def noisy(h, carry, key):
    """An outer loss with an info of one number."""
    return jnp.sum(h**2) * jax.random.uniform(key), carry, {"sum": h.sum()}


def plain(h, carry, key):
    return jnp.sum(h**2), carry, {"sum": h.sum()}


def run(folder, num_steps, loss=plain, start=START, optimizer=ADAM, **settings):
    return jaxhpo.tune(loss, start, optimizer, num_steps=num_steps, run_dir=folder, progress=False, **settings)


@pytest.mark.parametrize(
    ("before", "after", "match"),
    [
        ({}, {"remedies": Remedies(accumulate=3)}, r"the shape \[\] there, \[3\] here.*`accumulate`"),
        ({"remedies": Remedies(accumulate=3)}, {}, r"the shape \[3\] there, \[\] here"),
        ({}, {"record": "hypergradient"}, "'hypergradient' is in one of them only.*the `record`"),
        ({"record": "hypergradient"}, {}, "'hypergradient' is in one of them only"),
        (
            {},
            {"monitor": lambda info: info["sum"]},
            r"began with another value of \['monitor'\].*`monitor` of that run",
        ),
        (
            {"monitor": lambda info: info["sum"]},
            {},
            r"began with another value of \['monitor'\].*`monitor` of that run",
        ),
        ({}, {"optimizer": optax.sgd(0.1)}, "belongs to a run of another optimiser"),
    ],
    ids=["more keys", "fewer keys", "more columns", "fewer columns", "a monitor", "no monitor", "an optimiser"],
)
def test_resume_refuses_incompatible_changes(before, after, match, tmp_path):
    first = run(tmp_path, 2, noisy, **before)
    with pytest.raises(JaxhpoError, match=match):
        run(tmp_path, 4, noisy, **after)
    again = run(tmp_path, 2, noisy, resume="continue", **before)  # the refused call has changed nothing
    chex.assert_trees_all_equal(again.history, first.history)


def test_resume_refuses_whole_leaves_after_summaries(tmp_path):
    run(tmp_path, 2, start=jnp.ones(1500))
    with pytest.raises(JaxhpoError, match="'hparams' is in one of them only"):
        run(tmp_path, 4, start=jnp.ones(1500), record="hparams")


def test_resume_reports_accepted_changes(tmp_path):
    def loss(num_steps):
        solver = jaxhpo.from_optax(lambda p, h, b: jnp.sum((p - h) ** 2), optax.sgd(0.1))
        train = lambda h: jaxhpo.solve(solver, solver.init(jnp.zeros(2), h), h, num_steps=num_steps)  # noqa: E731
        return lambda h, carry, key: (jnp.sum((train(h).params - 1) ** 2), carry, None)

    simplex = optax.projections.projection_simplex
    run(tmp_path, 2, loss(5), jnp.array([0.4, 0.6]), projections=simplex)
    with pytest.warns(RuntimeWarning, match="is another; the run goes on, and its best step is one of before"):
        message = run(tmp_path, 4, loss(7), jnp.array([0.4, 0.6]), on_not_finite="backtrack").message
    for said in (
        "projections is None, was <function projection_simplex>",
        "on_not_finite is backtrack, was stop",
        "inner_steps is 7, was 5",
        "the best step so far is that of the earlier inner steps",
    ):
        assert said in message


class Decay:
    """A schedule that is an object."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, count):
        return self.rate / (1 + count)


def injected(rate):
    return optax.inject_hyperparams(optax.sgd)(learning_rate=rate)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (injected(0.1), injected(0.0), "opt_state.hyperparams['learning_rate'] is 0.0, was 0.1;"),
        (
            optax.chain(optax.clip(1.0), optax.MultiSteps(injected(0.1), 1)),
            optax.chain(optax.clip(1.0), optax.MultiSteps(injected(0.0), 1)),
            "opt_state[1].inner_opt_state.hyperparams['learning_rate'] is 0.0, was 0.1;",
        ),
        (optax.MultiSteps(optax.sgd(0.1), 1), optax.MultiSteps(optax.sgd(0.0), 2), "every_k_schedule is 2, was 1;"),
        (optax.sgd(Decay(0.1)), optax.sgd(Decay(0.0)), "Decay.rate is 0.0, was 0.1;"),
        (optax.sgd(jax.jit(Decay(0.1))), optax.sgd(jax.jit(Decay(0.0))), "Decay.rate is 0.0, was 0.1;"),
        (optax.sgd(lambda count: 0.1), optax.sgd(lambda count: 0.0), "is another, in a number that its code holds;"),
    ],
    ids=["injected", "injected into a chain", "an object", "a schedule", "a jitted schedule", "code"],
)
def test_another_setting_of_the_optimiser_is_taken_and_said(before, after, said, tmp_path):
    run(tmp_path, 2, optimizer=before)
    result = run(tmp_path, 5, optimizer=after)
    assert said in result.message
    assert len(set(result.history["value"][2:])) == 1  # the rate is zero


def test_a_setting_that_the_run_has_changed_is_said(tmp_path):
    """The rate follows its schedule; the seed's key has drawn numbers, and is that of the checkpoint."""

    def optimizer(rate, seed):
        return optax.chain(optax.add_noise(0.0, 0.0, seed), injected(optax.linear_schedule(rate, 0.0, 4)))

    run(tmp_path, 2, optimizer=optimizer(0.1, 0))
    message = run(tmp_path, 3, optimizer=optimizer(0.2, 1)).message
    assert "opt_state[1].hyperparams['learning_rate'] goes on from 0.075" in message
    assert "polynomial_schedule.init_value is 0.2, was 0.1" in message
    assert "opt_state[0].rng_key goes on from" in message


@pytest.mark.parametrize("kind", ["weak", "rbg", "unsafe_rbg", "threefry2x32"])
def test_resume_is_bit_identical_for_weak_types_and_keys(kind, tmp_path):
    """Files store neither weak types, which promote differently, nor the implementation of a key."""
    if kind == "weak":
        carry, start = 0.731, jnp.array([1.1, 2.3], jnp.bfloat16)

        def loss(h, carry, key):
            return jnp.sum(h * carry * 1.37).astype(jnp.float32), carry, None
    else:
        carry, start = jax.random.key(0, impl=kind), START

        def loss(h, carry, key):
            carry, now = jax.random.split(carry)
            return jnp.sum(h**2) * jax.random.uniform(now), carry, {"key": now}

    settings = {"loss": loss, "start": start, "optimizer": optax.sgd(0.013), "carry": carry}
    want = run(tmp_path / "whole", 5, **settings)
    run(tmp_path / "parts", 2, **settings)
    got = run(tmp_path / "parts", 5, **settings)
    data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    apart = lambda history: {k: v for k, v in history.items() if k not in ("seconds", "peak_bytes")}  # noqa: E731
    chex.assert_trees_all_equal(apart(got.history), apart(want.history))
    chex.assert_trees_all_equal(jax.tree.map(data, got.carry), jax.tree.map(data, want.carry))


def test_callbacks_and_monitors_may_edit_their_containers(tmp_path):
    def callback(step):
        step.hparams["loss"] = step.value
        step.info.clear()

    def monitor(info):
        return info.pop("sum")

    start = {"rate": jnp.asarray(1.0)}
    loss = lambda h, carry, key: (h["rate"] ** 2, carry, {"sum": h["rate"]})  # noqa: E731
    result = run(tmp_path, 3, loss, start, callbacks=[callback], monitor=monitor, score_window=1)
    assert result.best_hparams.keys() == result.history["hparams"].keys() == {"rate"}
    np.testing.assert_array_equal(result.history["info"]["sum"], result.history["score"])
    assert len(run(tmp_path, 5, loss, start, monitor=monitor, score_window=1).history["value"]) == 5


@pytest.mark.slow
def test_solves_in_functions_traced_before_are_recorded():
    """JAX would reuse a trace made without the recording."""
    solver = jaxhpo.from_optax(lambda p, h, b: jnp.sum((p - 1) ** 2) + h * jnp.sum(p**2), optax.sgd(0.1))
    rule = jaxhpo.Implicit(jaxhpo.CG(fallback=None))  # half as long to compile

    @jax.jit
    def inner(h):
        start = solver.init(jnp.zeros(2), h)
        return jnp.sum((jaxhpo.solve(solver, start, h, num_steps=20, adjoint=rule).params - 0.5) ** 2)

    jax.eval_shape(jax.grad(inner), jnp.asarray(0.1))
    settings = {"record": "linear_solves", "max_inner_steps": 70, "progress": False}
    for _ in range(2):
        result = jaxhpo.tune(lambda h: inner(h), jnp.asarray(0.1), ADAM, num_steps=9, **settings)
        assert len(result.history["value"]) == 3 and result.status == "budget"  # 3 * 20 <= 70 < 4 * 20
        np.testing.assert_array_equal(result.history["linear_solves"]["num_iterations"], 1)  # a scaled identity
    assert len(jaxhpo.check_hypergradient(lambda h: inner(h), jnp.asarray(0.1)).linear_statuses) == 1


def test_resume_keeps_the_spent_seconds(tmp_path):
    settings = {"max_seconds": 1.0, "callbacks": [lambda step: time.sleep(0.6)], "resume": "continue"}
    runs = [run(tmp_path, 50, **settings) for _ in range(3)]
    assert runs[0].status == "budget" and len({len(r.history["value"]) for r in runs}) == 1


def test_a_full_disk_warns_at_every_checkpoint_that_is_due(tmp_path, monkeypatch):
    def full(self, *args):
        raise OSError("no space")

    monkeypatch.setattr(RunDir, "_commit", full)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(tmp_path, 10, save_every=4)
    assert len(caught) == 3  # after steps 4 and 8, and at the end
    assert all("could not be saved" in str(w.message) for w in caught)


def test_status_in_the_folder(tmp_path):
    seen = []
    run(tmp_path, 3, callbacks=[lambda step: seen.append(standing(tmp_path, 2))])
    assert seen[0].startswith(f"going on (process {os.getpid()} on ") and seen[0].endswith(": 2 of 3 steps")
    assert standing(tmp_path, 3) == "finished: 3 outer steps were taken, of 3 asked for"

    def broken(step):
        raise ValueError("my own mistake")

    with pytest.raises(ValueError, match="my own mistake"):
        run(tmp_path, 5, callbacks=[broken])
    assert standing(tmp_path, 4) == "raised: ValueError: my own mistake"


@pytest.mark.slow
def test_status_of_a_killed_run(tmp_path):
    program = f"""if True:
        import os, signal, jax.numpy as jnp, optax, jaxhpo
        kill = lambda step: step.step == 12 and os.kill(os.getpid(), signal.SIGKILL)
        loss = lambda h: jnp.sum(h**2)
        start, optimizer = jnp.ones(2), optax.adam(0.1)
        jaxhpo.tune(loss, start, optimizer, num_steps=20, run_dir={str(tmp_path)!r}, save_every=5, callbacks=[kill])
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    said = standing(tmp_path, 12)
    assert said.startswith("cut off") and said.endswith("goes on after 10 outer steps, from the last checkpoint")


@pytest.mark.parametrize("value", [complex(1, np.inf), complex(-0.0, -0.0), complex(np.nan, 1)])
def test_complex_numbers_are_read_back_bit_identical(value):
    row = {"info": np.asarray(value, np.complex64)}
    assert decode(encode(0, row), row)["info"].tobytes() == row["info"].tobytes()


def test_empty_complex_array_is_read_back():
    row = {"info": np.zeros((0, 3), np.complex64)}
    found = decode(encode(0, row), row)["info"]
    assert found.shape == (0, 3) and found.dtype == np.complex64


def test_an_optimiser_may_hold_a_key():
    key = jax.random.key(0)
    jitter = optax.GradientTransformation(
        lambda params: optax.EmptyState(), lambda g, s, p=None: (-jax.random.uniform(key) * g, s)
    )
    assert jaxhpo.tune(lambda h: jnp.sum(h**2), START, jitter, num_steps=2, progress=False).status == "finished"
