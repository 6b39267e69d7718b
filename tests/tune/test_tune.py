"""The outer loop: descent, history, stopping, interruption, resumption."""

import io
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import enable_x64

import jaxhpo
from jaxhpo._tune import checkpoint

SOLVER = jaxhpo.from_optax(lambda p, h, b: jnp.sum((p - h["target"]) ** 2), lambda h: optax.sgd(h["lr"]))
START = {"target": jnp.full(3, 0.1), "lr": jnp.asarray(0.02)}
TRANSFORMS = {"target": None, "lr": jaxhpo.box(0.0, 0.4)}
GOAL = 1.5


def outer_loss(h):
    """The minimum is at target = 1.5 when the inner run converges, which a larger rate helps."""
    return jnp.sum((jaxhpo.solve(SOLVER, SOLVER.init(jnp.zeros(3), h), h, num_steps=20).params - GOAL) ** 2)


def run(loss=outer_loss, num_steps=8, optimizer=None, **kw):
    return jaxhpo.tune(loss, START, optimizer or optax.adam(0.1), num_steps=num_steps, progress=False, **kw)


def test_tune_equals_a_loop_written_by_hand():
    tx = optax.adam(0.1)
    u = {"target": START["target"], "lr": TRANSFORMS["lr"].inverse(START["lr"])}
    state, values = tx.init(u), []

    @jax.jit
    def step(u, state):
        value, g = jax.value_and_grad(lambda u: outer_loss({**u, "lr": TRANSFORMS["lr"].forward(u["lr"])}))(u)
        updates, state = tx.update(g, state, u)
        return optax.apply_updates(u, updates), state, value, optax.tree.norm(g)

    norms = []
    for _ in range(8):
        u, state, value, norm = step(u, state)
        values.append(value)
        norms.append(norm)
    result = run(transforms=TRANSFORMS)
    np.testing.assert_allclose(result.history["value"], values, rtol=1e-12)
    np.testing.assert_allclose(result.history["hypergradient_norm"], norms, rtol=1e-12)
    np.testing.assert_allclose(result.hparams["target"], u["target"], rtol=1e-12)
    np.testing.assert_allclose(result.hparams["lr"], TRANSFORMS["lr"].forward(u["lr"]), rtol=1e-12)


def test_converges_and_keeps_natural_units():
    result = run(num_steps=150, transforms=TRANSFORMS)
    assert result.status == "finished"
    assert 0 < result.best_hparams["lr"] < 0.4
    assert result.best_value < 1e-4
    assert result.history["hparams"]["lr"][0] == pytest.approx(0.02)
    assert result.history["value"].shape == (150,) and result.history["hparams"]["target"].shape == (150, 3)


def test_best_is_the_evaluated_point():
    """The best hyperparameters are those at which the best value was measured, not those after the update."""
    result = run(num_steps=30, optimizer=optax.sgd(0.9), transforms=TRANSFORMS)  # oscillates
    assert result.best_value == result.history["value"].min()
    assert result.best_step == result.history["value"].argmin()
    np.testing.assert_array_equal(result.history["score"], result.history["value"])
    assert float(jax.jit(outer_loss)(result.best_hparams)) == pytest.approx(result.best_value, rel=1e-12)


def noisy(h, carry, key):
    noise = jax.random.normal(key)
    return h**2 + noise, carry, {"noisy": h**2 - noise}


@pytest.mark.parametrize("settings", [{}, {"score_window": 4}, {"monitor": lambda info: info["noisy"]}])
def test_best_of_a_random_loss_is_that_of_the_best_window(settings):
    """The luckiest of 60 single values is 2.3 below the loss on average, that of means over ten about 0.5."""
    result = jaxhpo.tune(noisy, jnp.asarray(2.0), optax.sgd(0.03), num_steps=60, progress=False, **settings)
    history, window = result.history, settings.get("score_window", 10)
    numbers = history["info"]["noisy"] if "monitor" in settings else history["value"]
    want = [numbers[max(0, i + 1 - window) : i + 1].mean() for i in range(60)]
    np.testing.assert_allclose(history["score"], want, rtol=1e-12)
    assert result.best_step == np.argmin(want) != np.argmin(numbers)
    assert result.best_value == history["score"][result.best_step]
    assert result.best_hparams == history["hparams"][result.best_step]


def test_skipped_steps_are_not_in_the_window():
    """A step in three, on average, is NaN; the loss falls by one with each of the others."""

    def loss(h, carry, key):
        return jnp.where(jax.random.bernoulli(key, 1 / 3), jnp.nan, h), carry, None

    settings = {"on_not_finite": "skip", "score_window": 3, "num_steps": 20, "progress": False}
    history = jaxhpo.tune(loss, jnp.asarray(20.0), optax.sgd(1.0), **settings).history
    taken = np.isfinite(history["value"])
    np.testing.assert_array_equal(np.isfinite(history["score"]), taken)
    assert 0 < taken.sum() < 20
    values = 20.0 - np.arange(taken.sum())
    np.testing.assert_array_equal(
        history["score"][taken], [values[max(0, i - 2) : i + 1].mean() for i in range(len(values))]
    )


@pytest.mark.parametrize("number", [jnp.nan, jnp.inf])
def test_a_monitor_that_never_gives_a_number_is_said(number):
    with pytest.warns(RuntimeWarning, match="gave NaN or infinity at every outer step, so that none is the best"):
        result = jaxhpo.tune(
            noisy, 2.0, optax.sgd(0.03), num_steps=3, monitor=lambda info: number, patience=9, progress=False
        )
    assert result.status == "finished" and np.isnan(result.best_value) and result.best_step == 2
    assert result.best_hparams == result.history["hparams"][2]
    assert "best_value=nan" in repr(result)


def test_a_monitor_may_give_a_number_now_and_then():
    """At steps 1, 4, 7; of the others none is the best."""

    def loss(h, carry, key):
        return h**2, carry + 1, {"held_out": jnp.where(carry % 3 == 1, h**2, jnp.nan)}

    settings = {"monitor": lambda info: info["held_out"], "score_window": 2, "progress": False}
    result = jaxhpo.tune(loss, 2.0, optax.sgd(0.1), num_steps=9, carry=0, **settings)
    assert np.flatnonzero(np.isfinite(result.history["score"])).tolist() == [1, 4, 7] and result.best_step == 7
    assert result.best_value == result.history["value"][[4, 7]].mean()


@pytest.mark.parametrize(("score_window", "status"), [(1, "patience"), (4, "finished")])
def test_patience_follows_the_mean(score_window, status):
    """The loss falls by one a step, but for a peak in every fourth, of which each mean over four has one."""

    def loss(h, carry, key):
        return 1e-3 * h**2 - carry + 20.0 * (carry % 4 == 0), carry + 1, None

    settings = {"carry": jnp.zeros(()), "num_steps": 12, "patience": 1, "progress": False}
    result = jaxhpo.tune(loss, jnp.asarray(1.0), optax.sgd(0.1), score_window=score_window, **settings)
    assert result.status == status


def test_one_compilation():
    calls = []
    run(lambda h: calls.append(0) or outer_loss(h), num_steps=20)
    assert len(calls) == 1


def test_carry_key_and_info():
    """A warm start through the carry: one inner step per outer step reaches the optimum; keys differ step by step."""

    def loss(h, carry, key):
        state = SOLVER.init(jnp.zeros(3), h) if carry is None else carry
        sol = jaxhpo.solve(SOLVER, jax.lax.stop_gradient(state), h, num_steps=3)
        draw = jax.random.uniform(key)
        return jnp.sum((sol.params - GOAL) ** 2), sol.state, {"info": sol.info, "draw": draw}

    carry = SOLVER.init(jnp.zeros(3), START)
    result = run(loss, num_steps=200, transforms=TRANSFORMS, carry=carry, key=jax.random.key(1))
    info = result.history["info"]
    assert result.best_value < 1e-2
    assert len(np.unique(info["draw"])) == 200
    assert info["info"].num_steps.tolist() == [3] * 200
    again = run(loss, num_steps=5, transforms=TRANSFORMS, carry=carry, key=jax.random.key(1))
    np.testing.assert_array_equal(again.history["value"], result.history["value"][:5])


def test_gradient_replaces_differentiation():
    """A `gradient` function in natural units gives the same run: `tune` applies the chain rule of the transforms."""

    def gradient(h, carry, key):
        value, g = jax.value_and_grad(outer_loss)(h)
        return value, g, carry, None

    want, got = run(transforms=TRANSFORMS), run(None, transforms=TRANSFORMS, gradient=gradient)
    np.testing.assert_allclose(got.history["value"], want.history["value"], rtol=1e-12)


def test_lbfgs_with_line_search():
    result = run(num_steps=15, optimizer=optax.lbfgs())
    assert result.best_value < 1e-8


def test_a_zero_hypergradient_by_chance_is_a_warning():
    """At target = start = 0 the inner gradient is zero, and with it the rate's hypergradient."""
    start = {"target": jnp.zeros(3), "lr": jnp.asarray(0.02)}
    with pytest.warns(jaxhpo.ZeroHypergradientWarning, match=r"`hparams\['lr'\]`.*at this point"):
        result = jaxhpo.tune(outer_loss, start, optax.adam(0.1), num_steps=3, progress=False)
    assert result.hparams["lr"] != 0.02


def test_an_unused_leaf_is_an_error():
    with pytest.raises(jaxhpo.ZeroHypergradientError, match=r"`hparams\['unused'\]`.*Remove it"):
        jaxhpo.tune(lambda h: outer_loss(h), {**START, "unused": 1.0}, optax.adam(0.1), num_steps=3, progress=False)


def test_patience():
    result = run(num_steps=500, transforms=TRANSFORMS, patience=5, min_delta=0.5)
    values = result.history["value"]
    assert result.status == "patience" and len(values) < 500
    assert values[:-5].min() - values[-5:].min() <= 0.5 + values[0]  # the last five gained no more than min_delta each
    assert "5 outer steps" in result.message


def test_callbacks_see_every_step_and_can_stop():
    seen = []

    def callback(step):
        seen.append(step)
        return step.step == 3

    result = run(num_steps=50, callbacks=[callback])
    assert result.status == "callback" and len(seen) == 4 == len(result.history["value"])
    assert [s.step for s in seen] == [0, 1, 2, 3] and seen[-1].best_value == result.best_value
    np.testing.assert_array_equal([s.value for s in seen], result.history["value"])


def test_interrupt_returns_the_partial_result():
    def callback(step):
        if step.step == 2:
            raise KeyboardInterrupt

    result = run(num_steps=50, callbacks=[callback])
    assert result.status == "interrupted" and len(result.history["value"]) == 3
    want = run(num_steps=3)
    np.testing.assert_array_equal(result.hparams["target"], want.hparams["target"])


def test_a_later_step_that_is_not_finite_returns_the_last_finite_state():
    """The rate grows until the inner run diverges."""
    start = {"target": jnp.ones(3), "lr": jnp.asarray(0.9)}

    def loss(h):
        return jnp.where(h["lr"] > 1.25, jnp.nan, 1.0) * (outer_loss({**h, "lr": jnp.asarray(0.1)}) - h["lr"])

    with pytest.warns(RuntimeWarning, match=r"Outer step \d+: The outer loss is nan"):
        result = jaxhpo.tune(loss, start, optax.sgd(0.1), num_steps=50, progress=False)
    assert result.status == "not_finite" and 0 < len(result.history["value"]) < 50
    assert np.isfinite(result.history["value"]).all() and np.isfinite(result.best_value)


def test_progress_is_plain_text_off_a_terminal(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    jaxhpo.tune(outer_loss, START, optax.adam(0.1), num_steps=3)
    lines = out.getvalue().splitlines()  # a slow machine may print more than the first and the last
    assert all(line.startswith("step ") for line in lines) and lines[-1].startswith("step 3/3: loss ")
    assert lines[0] == "step 0/3: compiling ..."


def test_resume_is_bit_identical(tmp_path):
    """Interrupted after 3 and after 7 of 12 steps, the run ends as an uninterrupted one does."""

    def loss(h, carry, key):
        sol = jaxhpo.solve(SOLVER, jax.lax.stop_gradient(carry), h, num_steps=3)
        noise = 0.1 * jax.random.normal(key, (3,))
        return jnp.sum((sol.params - GOAL + noise) ** 2), sol.state, {"optimality": sol.info.optimality, "key": None}

    def interrupt(at):
        def callback(step):
            if step.step == at:
                raise KeyboardInterrupt

        return [callback] if at else []

    settings = {"num_steps": 12, "transforms": TRANSFORMS, "carry": SOLVER.init(jnp.zeros(3), START)}
    whole = run(loss, **settings)
    for at, status in ((2, "interrupted"), (6, "interrupted"), (None, "finished"), (None, "finished")):
        result = run(loss, **settings, run_dir=tmp_path, callbacks=interrupt(at), resume="continue")
        assert result.status == status
    for got, want in zip(jax.tree.leaves(result), jax.tree.leaves(whole), strict=True):
        if not isinstance(want, str) and not any(want is whole.history[name] for name in ("seconds", "peak_bytes")):
            np.testing.assert_array_equal(got, want)
    assert len(result.history["seconds"]) == 12 and (np.diff(result.history["seconds"]) > 0).all()


@pytest.mark.slow
def test_run_dir_of_other_settings_is_refused(tmp_path):
    """The numbers on disk are unconstrained: another transform would change their meaning."""
    run(num_steps=2, run_dir=tmp_path, transforms=TRANSFORMS)
    for changed in ({"transforms": None}, {"transforms": TRANSFORMS, "key": jax.random.key(9)}):
        with pytest.raises(
            jaxhpo.JaxhpoError, match=r"began with another value of \['(key|transforms)'\].*another folder"
        ):
            run(num_steps=4, run_dir=tmp_path, **changed)
    more = run(num_steps=4, run_dir=tmp_path, transforms=TRANSFORMS)
    assert "resumed" in more.message and len(more.history["value"]) == 4
    fewer = run(num_steps=3, run_dir=tmp_path, transforms=TRANSFORMS, resume="continue")
    assert len(fewer.history["value"]) == 4 and "4 outer steps were taken, of 3 asked for" in fewer.message


@pytest.mark.parametrize("settings", [{"run_dir": True}, {"max_inner_steps": 10_000}])
def test_zero_hypergradients_raise_after_an_earlier_trace(settings, tmp_path):
    """The rule ignores the rates of early steps, and warns of it while it is traced."""
    settings = {name: tmp_path if name == "run_dir" else value for name, value in settings.items()}
    solver = jaxhpo.from_optax(lambda p, h, b: jnp.sum((p - 1.0) ** 2), lambda h: optax.sgd(lambda t: h[t]))

    @jax.jit
    def loss(h):
        rule = jaxhpo.Unroll(truncate=2)
        return jnp.sum(jaxhpo.solve(solver, solver.init(jnp.zeros(2), h), h, num_steps=4, adjoint=rule).params ** 2)

    with pytest.raises(jaxhpo.ZeroHypergradientError, match="exactly zero in some entries"):
        jaxhpo.tune(loss, jnp.full(4, 0.1), optax.sgd(0.1), num_steps=3, progress=False, **settings)


def test_resume_reports_changed_settings(tmp_path):
    run(num_steps=2, run_dir=tmp_path, optimizer=optax.sgd(0.002, momentum=0.9))
    more = run(num_steps=4, run_dir=tmp_path, optimizer=optax.sgd(0.001, momentum=0.9))
    assert "num_steps is 4, was 2" in more.message
    assert "scale.step_size is -0.001, was -0.002" in more.message
    assert "momentum" not in more.message


def test_history_file_is_readable_during_the_run(tmp_path):
    """One line of JSON per step; NaN and infinities are strings."""

    def loss(h, carry, key):
        return outer_loss(h), carry, {"odd": jnp.array([jnp.nan, jnp.inf, 1.5]), "half": jnp.ones((), jnp.bfloat16) / 3}

    result = run(loss, num_steps=3, run_dir=tmp_path, save_every=1)
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[0]["info['odd']"] == ["nan", "inf", 1.5] and rows[2]["value"] == result.history["value"][2]
    again = run(loss, num_steps=3, run_dir=tmp_path, resume="continue")
    for got, want in zip(jax.tree.leaves(again.history), jax.tree.leaves(result.history), strict=True):
        np.testing.assert_array_equal(got, want)
        assert got.dtype == want.dtype


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_run_dir_of_short_floats(tmp_path, dtype):
    """NumPy has no bfloat16: on disk it is raw bytes."""
    settings = {"progress": False, "run_dir": tmp_path}
    for steps in (1, 2):
        result = jaxhpo.tune(lambda h: jnp.sum(h**2), jnp.ones(2, dtype), optax.sgd(0.25), num_steps=steps, **settings)
    assert result.hparams.dtype == dtype and result.hparams.tolist() == [0.25, 0.25]  # (1 - 2/4)^2


def test_run_dir_of_empty_leaves(tmp_path):
    """As nested lists, arrays of the shapes (1, 0, 2) and (1, 0) are equal."""
    start = {"empty": jnp.zeros((1, 0, 2)), "one": jnp.ones(())}
    for steps in (1, 2):
        settings = {"num_steps": steps, "progress": False, "run_dir": tmp_path}
        result = jaxhpo.tune(lambda h: h["one"] ** 2 + jnp.sum(h["empty"] ** 2), start, optax.sgd(0.25), **settings)
    assert result.history["hparams"]["empty"].shape == (2, 1, 0, 2)


def test_run_dir_of_another_schema_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SCHEMA", 99)
    run(num_steps=2, run_dir=tmp_path)
    monkeypatch.undo()
    with pytest.raises(jaxhpo.JaxhpoError, match=rf"schema 99, where this one reads {checkpoint.SCHEMA}"):
        run(num_steps=2, run_dir=tmp_path)


def test_run_dir_of_another_precision_is_refused(tmp_path):
    run(num_steps=2, run_dir=tmp_path)
    with enable_x64(False), pytest.raises(jaxhpo.JaxhpoError, match=r"is float64.*but float32.*jax_enable_x64"):
        start = jax.tree.map(lambda x: x.astype(jnp.float32), START)
        jaxhpo.tune(outer_loss, start, optax.adam(0.1), num_steps=3, run_dir=tmp_path, progress=False)


def test_resume_with_a_transform_without_a_repr(tmp_path):
    """The default repr of an object contains its address, which differs in the process that resumes."""

    class Doubled:
        def forward(self, u):
            return 2 * u

        def inverse(self, h):
            return h / 2

    for steps in (2, 4):
        result = run(num_steps=steps, run_dir=tmp_path, transforms={"target": Doubled(), "lr": TRANSFORMS["lr"]})
    assert "resumed" in result.message and len(result.history["value"]) == 4


def test_run_dir_of_a_run_out_of_patience_returns_at_once(tmp_path):
    settings = {"num_steps": 100, "patience": 3, "min_delta": 10.0, "run_dir": tmp_path, "resume": "continue"}
    lengths = {len(run(**settings).history["value"]) for _ in range(3)}
    assert lengths == {4}  # the first value, and three that do not improve on it by 10


def test_run_dir_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(jaxhpo.JaxhpoError, match=r"`run_dir` got .*name a folder"):
        run(num_steps=2, run_dir=tmp_path / "file")


def test_run_dir_of_another_run_is_refused(tmp_path):
    run(num_steps=2, run_dir=tmp_path)
    with pytest.raises(jaxhpo.JaxhpoError, match=r"hparams\['extra'\].* is in one of them only"):
        jaxhpo.tune(
            lambda h: outer_loss(h) + h["extra"] ** 2,
            {**START, "extra": jnp.ones(())},
            optax.adam(0.1),
            num_steps=2,
            run_dir=tmp_path,
            progress=False,
        )
    with pytest.raises(jaxhpo.JaxhpoError, match=r"another optimiser; they differ in run\['state'\]"):
        run(num_steps=3, run_dir=tmp_path, optimizer=optax.sgd(0.1))
