"""Searches by Optuna: the space, the trials, what ends them, and what goes on."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from wsgiref.util import setup_testing_defaults

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna
import pytest

import jaxhpo
import jaxhpo.search
from jaxhpo.search import _storage, _trials
from jaxhpo.search._samplers import _most_promising
from jaxhpo.search._space import Space

LOW, HIGH = {"penalty": 1e-6, "momentum": 0.0}, {"penalty": 1.0, "momentum": 0.9}
TRANSFORMS = {"penalty": jaxhpo.positive, "momentum": None}
START = {"penalty": 1e-2, "momentum": 0.5}
SPACE = {"low": LOW, "high": HIGH, "transforms": TRANSFORMS, "progress": False}
CURVE = {"low": -1.0, "high": 1.0, "carry": 0.0, "progress": False}
FAIL = optuna.trial.TrialState.FAIL
HERE = pathlib.Path(__file__).parent


def outer_loss(h):
    return (jnp.log10(h["penalty"]) + 3.0) ** 2 + (h["momentum"] - 0.3) ** 2


def curve(h, w, key):
    """A noisy step towards h."""
    w = w - 0.3 * (w - h) + 0.01 * jax.random.normal(key, ())
    return jnp.abs(w), w, {"w": w}


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y, equal_nan=True), a, b))


def without_times(result):
    return {name: column for name, column in result.history.items() if name not in ("seconds", "state")}


# --- the space ---


def test_the_space_is_uniform_in_the_units_of_the_search():
    result = jaxhpo.search.random(outer_loss, START, num_trials=200, batch=50, **SPACE)
    found = result.history["hparams"]
    assert found["penalty"][0] == 1e-2 and found["momentum"][0] == 0.5  # the start, in float64
    for x, low, high in ((np.log10(found["penalty"]), -6.0, 0.0), (found["momentum"], 0.0, 0.9)):
        assert low <= x.min() and x.max() <= high
        # A mean of 199 uniform numbers: four standard errors of 1 / √12 √199.
        assert abs((x[1:].mean() - low) / (high - low) - 0.5) < 4 / np.sqrt(12 * 199)
    best = np.argmin(result.history["value"])
    assert result.best_step == best and result.best_value == result.history["value"].min()
    assert result.best_hparams["penalty"] == found["penalty"][best]


def test_other_transforms_and_shapes_of_leaves():
    start = {"mix": jnp.full((2, 2), 0.5), "rate": jnp.array([0.1, 0.2], jnp.bfloat16)}
    space = Space(start, {"mix": 0.1, "rate": np.array([0.01, 0.02])}, 0.9, {"mix": jaxhpo.unit_interval, "rate": None})
    assert list(space.distributions)[:2] == ["mix[0, 0]", "mix[0, 1]"] and "rate[1]" in space.distributions
    logit = space.distributions["mix[0, 0]"]
    assert np.isclose(logit.low, np.log(0.1 / 0.9), atol=1e-6) and not logit.log  # in the units of the search
    assert space.distributions["rate[1]"].low == 0.02
    assert jax.tree.all(jax.tree.map(lambda a, b: jnp.allclose(a, b, atol=1e-2), space.tree(space.start), start))
    point = space.to_unit(space.start)
    back = space.to_unit(space.from_unit(point))
    np.testing.assert_allclose(back, point, atol=1e-12)
    assert space.tree(space.start)["rate"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"low": {"penalty": 1e-6}}, "`low` got .* does not fit `hparams`"),
        ({"low": {"penalty": 0.0, "momentum": 0.0}}, r"`low\['penalty'\]`.*must be greater than 0"),
        ({"high": {"penalty": np.inf, "momentum": 0.9}}, "needs an end: write a finite number"),
        ({"high": {"penalty": 1.0, "momentum": np.array([0.9, 1.0])}}, r"`high\['momentum'\]` has the shape \(2,\)"),
        (
            {"high": {"penalty": 1e-3, "momentum": 0.9}},
            r"`hparams\['penalty'\]` got low=1e-06, hparams=0.01, high=0.001",
        ),
        ({"high": {"penalty": 1.0, "momentum": -1.0}}, "write low below high"),
        ({"num_trials": 0}, "`num_trials`"),
        ({"batch": 1.5}, "`batch`"),
        ({"max_calls": 0}, "`max_calls`"),
        ({"callbacks": print}, r"write `callbacks=\[callback\]`"),
    ],
)
def test_what_cannot_work_is_refused(changed, said):
    with pytest.raises(jaxhpo.JaxhpoError, match=said):
        jaxhpo.search.random(outer_loss, START, **{"num_trials": 3, **SPACE, **changed})


def test_searches_refuse_what_they_cannot_do():
    with pytest.raises(jaxhpo.JaxhpoError, match="1e.12 trials"):
        jaxhpo.search.grid(lambda h: h.sum(), jnp.zeros(12), resolution=10, low=-1.0, high=1.0)
    with pytest.raises(jaxhpo.JaxhpoError, match="one hyperparameter"):
        jaxhpo.search.cmaes(lambda h: h**2, 0.0, num_trials=3, low=-1.0, high=1.0)
    with pytest.raises(jaxhpo.JaxhpoError, match="'tpe' or 'gp'"):
        jaxhpo.search.bayes(outer_loss, START, num_trials=3, sampler="botorch", **SPACE)
    with pytest.raises(TypeError, match="bacth"):
        jaxhpo.search.random(outer_loss, START, num_trials=3, bacth=2, **SPACE)


# --- the searches ---


def test_a_grid_has_every_point_once():
    result = jaxhpo.search.grid(outer_loss, START, resolution=4, batch=3, **SPACE)
    x, y = np.meshgrid(np.linspace(0.0, 0.9, 4), 10.0 ** np.linspace(-6, 0, 4), indexing="ij")
    np.testing.assert_allclose(result.history["hparams"]["momentum"].reshape(4, 4), x, rtol=1e-6)
    np.testing.assert_allclose(result.history["hparams"]["penalty"].reshape(4, 4), y, rtol=1e-5)
    assert "at the edge" not in result.message
    edge = jaxhpo.search.grid(lambda h: h**2, 0.5, resolution=3, low=0.0, high=1.0, progress=False)
    assert "at the edge of the space, in hparams = 0 (low)" in edge.message


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_trials"), [("bayes", 60), ("cmaes", 80)])
def test_samplers_of_optuna_learn(name, num_trials):
    """Below the best of so many random trials."""
    searches = (getattr(jaxhpo.search, name), jaxhpo.search.random)
    learned, chance = (
        np.median(
            [
                search(outer_loss, START, num_trials=num_trials, key=jax.random.key(i), **SPACE).best_value
                for i in range(3)
            ]
        )
        for search in searches
    )
    assert learned < chance


def branin(h):
    """Branin's function, whose least value is 0.397887."""
    x, y = h["x"], h["y"]
    a = y - 5.1 / (4 * jnp.pi**2) * x**2 + 5 / jnp.pi * x - 6
    return a**2 + 10 * (1 - 1 / (8 * jnp.pi)) * jnp.cos(x) + 10


@pytest.mark.slow
def test_the_gaussian_process_finds_the_least_of_branin():
    """Within 0.01 in 22 trials; and what its sampler says of a parabola."""
    result = jaxhpo.search.bayes(
        branin,
        {"x": 5.0, "y": 5.0},
        num_trials=22,
        low={"x": -5.0, "y": 0.0},
        high={"x": 10.0, "y": 15.0},
        sampler="gp",
        progress=False,
    )
    assert result.best_value < 0.397887 + 0.01
    # Of a parabola that is known at 25 points; a running trial, which counts as the median, pushes the next away.
    points, least = np.zeros((32, 2)), np.array([0.32, 0.6])
    points[:25] = np.stack(np.meshgrid(*[np.linspace(0.0, 1.0, 5)] * 2), -1).reshape(25, 2)
    values = np.where(np.arange(32) < 25, ((points - least) ** 2).sum(1), 0.0)
    first = _most_promising(points, values, 25, jax.random.key(0))
    assert np.linalg.norm(first - least) < 0.03
    points[25], values[25] = first, np.median(values[:25])
    assert np.linalg.norm(_most_promising(points, values, 26, jax.random.key(0)) - first) > 0.01


def test_batches_have_the_same_trials_in_one_program():
    traced = []

    def counted(h, w, key):
        traced.append(1)
        return curve(h, w, key)

    one = jaxhpo.search.random(counted, 0.5, num_trials=7, max_calls=3, **CURVE)
    four = jaxhpo.search.random(counted, 0.5, num_trials=7, max_calls=3, batch=4, **CURVE)
    assert len(traced) == 4  # for the types of its results, and for the program, of each search
    for a, b in zip(*(jax.tree.leaves(without_times(r)) for r in (one, four)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert one.history["calls"].tolist() == [3] * 7 and one.history["info"]["w"].shape == (7,)


@pytest.mark.parametrize("name", ["hyperband", "asha"])
@pytest.mark.parametrize("batch", [1, 3])
def test_worse_trials_are_stopped_at_rungs(name, batch):
    def halved(h, w, key):  # the distance to h, halved
        w = (w + h) / 2
        return jnp.abs(w), w, None

    result = getattr(jaxhpo.search, name)(halved, 0.9, num_trials=40, max_calls=9, batch=batch, **CURVE)
    calls, state = result.history["calls"], result.history["state"]
    assert set(calls) <= {1, 3, 9} and (calls[state == "complete"] == 9).all() and (calls[state == "pruned"] < 9).all()
    assert calls.sum() < 40 * 9 * (0.7 if name == "hyperband" else 0.5)
    assert np.isnan(result.history["score"][state == "pruned"]).all()
    assert state[result.best_step] == "complete" and f"{(state == 'pruned').sum()} stopped early" in result.message
    # |w| after k calls is |h| (1 − 2⁻ᵏ): trials that went on are the ones nearer to 0.
    assert np.median(abs(result.history["hparams"][calls == 9])) < np.median(abs(result.history["hparams"][calls == 1]))


# --- ends ---


def test_trials_that_fail_are_told_and_named(tmp_path):
    def negative(h):
        return jnp.where(h > 0.0, jnp.nan, h)

    storage = f"sqlite:///{tmp_path / 'study.db'}"
    result = jaxhpo.search.grid(negative, 0.0, resolution=5, low=-1.0, high=1.0, storage=storage, progress=False)
    assert result.message.startswith("5 trials: 3 complete, 2 failed: 3 (nan at call 1), 4 (nan at call 1)")
    assert result.best_value == -1.0 and np.isnan(result.history["value"][3:]).all()
    with _storage.quiet():
        study = optuna.load_study(study_name="search", storage=storage)
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 3 + ["FAIL"] * 2  # and they are not begun again


def test_a_search_without_a_finite_loss_says_so():
    with pytest.warns(RuntimeWarning, match="no trial has a finite outer loss.*inf at call 1"):
        result = jaxhpo.search.random(lambda h: 1 / (0.0 * h), 0.5, num_trials=3, low=0.1, high=1.0, progress=False)
    assert result.status == "not_finite" and result.best_step == -1 and result.best_value == np.inf
    assert result.best_hparams == 0.5 and result.exit_code == 1


def test_callbacks_see_each_trial_and_may_stop():
    steps = []
    result = jaxhpo.search.random(outer_loss, START, num_trials=9, callbacks=[steps.append], **SPACE)
    assert [s.step for s in steps] == list(range(9)) and [s.value for s in steps] == result.history["value"].tolist()
    assert steps[-1].best_value == result.best_value and steps[4].hparams["momentum"] == steps[4].hparams["momentum"]
    result = jaxhpo.search.random(outer_loss, START, num_trials=9, callbacks=[lambda s: s.step == 3], **SPACE)
    assert result.status == "callback" and len(result.history["value"]) == 4
    result = jaxhpo.search.random(outer_loss, START, num_trials=9, max_seconds=1e-6, **SPACE)
    assert result.status == "budget" and result.history["calls"].tolist() == [1]  # one call in any case


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "preempted")])
def test_a_signal_ends_the_search_and_the_same_call_goes_on(number, status, tmp_path):
    """To the bit, from within a trial."""
    settings = {"num_trials": 5, "max_calls": 6, "batch": 2, "run_dir": tmp_path, **CURVE}
    before = signal.signal(signal.SIGTERM, lambda *_: None)

    def strike(h, w, key):
        value, w, info = curve(h, w, key)
        jax.debug.callback(lambda w: calls.append(float(w)) or len(calls) == 7 and os.kill(os.getpid(), number), w)
        return value, w, info

    try:
        calls = []
        result = jaxhpo.search.random(strike, 0.5, **settings)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.status == status and len(result.history["value"]) == 0
    went_on = jaxhpo.search.random(strike, 0.5, **settings)
    assert went_on.status == "finished" and not list((tmp_path / "trials").iterdir())
    undisturbed = jaxhpo.search.random(curve, 0.5, **(settings | {"run_dir": None}))
    assert same(without_times(went_on), without_times(undisturbed))
    with _storage.quiet():
        states = [
            t.state.name
            for t in optuna.load_study(storage=f"sqlite:///{tmp_path / 'study.db'}", study_name=None).trials
        ]
    assert states.count("COMPLETE") == 5 and states.count("FAIL") == 2


def test_more_trials_go_on_and_another_search_is_refused(tmp_path):
    first = jaxhpo.search.random(outer_loss, START, num_trials=3, run_dir=tmp_path, **SPACE)
    again = {"num_trials": 3, "run_dir": tmp_path, **SPACE}
    more = jaxhpo.search.random(outer_loss, START, num_trials=5, run_dir=tmp_path, **SPACE)
    whole = jaxhpo.search.random(outer_loss, START, num_trials=5, **SPACE)
    assert len(first.history["value"]) == 3 and same(without_times(more), without_times(whole))
    for what, call in {
        "of `random`, where this is `cmaes`": lambda: jaxhpo.search.cmaes(outer_loss, START, **again),
        "with another space": lambda: jaxhpo.search.random(outer_loss, START, **(again | {"high": 2.0})),
        "with another start": lambda: jaxhpo.search.random(outer_loss, START | {"momentum": 0.3}, **again),
        "with another `key`": lambda: jaxhpo.search.random(outer_loss, START, key=jax.random.key(1), **again),
        "outer loss is another": lambda: jaxhpo.search.random(lambda h: outer_loss(h) + 100, START, **again),
    }.items():
        with pytest.raises(jaxhpo.JaxhpoError, match=f"a study 'search' .*{what}.*cannot be compared"):
            call()


def test_studies_that_are_not_of_this_search_are_refused(tmp_path):
    settings = {"low": 0.0, "high": 1.0, "progress": False}
    with _storage.quiet():
        storage = f"sqlite:///{tmp_path / 'study.db'}"
        optuna.create_study(storage=storage, study_name="up", direction="maximize")
        optuna.create_study(storage=storage, study_name="other").optimize(
            lambda t: t.suggest_float("z", 0, 1), n_trials=1
        )
    with pytest.raises(jaxhpo.JaxhpoError, match="does not minimise"):
        jaxhpo.search.random(jnp.abs, 0.5, num_trials=2, storage=storage, name="up", **settings)
    with pytest.raises(jaxhpo.JaxhpoError, match=r"of another program, with parameters \['z'\]"):
        jaxhpo.search.random(jnp.abs, 0.5, num_trials=2, storage=storage, name="other", **settings)
    jaxhpo.search.grid(jnp.abs, 0.5, resolution=3, storage=storage, **settings)
    with pytest.raises(jaxhpo.JaxhpoError, match=r"of `grid\(resolution=3\)`, where this is `grid\(resolution=5\)`"):
        jaxhpo.search.grid(jnp.abs, 0.5, resolution=5, storage=storage, **settings)
    scale = np.ones(3)  # closed over, as data are
    jaxhpo.search.random(lambda h: jnp.sum(scale * h), 0.5, num_trials=1, storage=storage, name="data", **settings)
    scale = 2 * scale
    with pytest.raises(jaxhpo.JaxhpoError, match="data that the outer loss closes over are others"):
        jaxhpo.search.random(lambda h: jnp.sum(scale * h), 0.5, num_trials=2, storage=storage, name="data", **settings)


def keyed(h, carry, key):
    return h, carry, {"key": key}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"max_calls": 3}, "`max_calls=3`, but every call of `outer_loss.hparams.` is the same"),
        ({"carry": 0.0}, "a `carry`, but every call"),
        ({"outer_loss": keyed}, "`info` has a key"),
        ({"hparams": 1}, "let Optuna suggest integers"),
        ({"storage": "study.db"}, "`storage` got 'study.db', which is no address: write \"sqlite"),
        ({"storage": 3}, "`storage` got 3, which is no address"),
        ({"storage": "sqllite:///study.db"}, "cannot be opened: .*sqllite"),
        ({"storage": "sqlite:////nowhere/at/all/study.db"}, "cannot be opened: unable to open"),
    ],
    ids=["calls", "carry", "key", "integer", "path", "number", "driver", "folder"],
)
def test_what_cannot_work_is_said(settings, problem, monkeypatch):
    monkeypatch.setattr(_storage, "ATTEMPTS", 1)
    given = {"outer_loss": jnp.abs, "hparams": 0.5, "num_trials": 2, "low": 0.0, "high": 1.0, "progress": False}
    with pytest.raises(jaxhpo.JaxhpoError, match=problem):
        jaxhpo.search.random(**(given | settings))


def test_unknown_arguments_and_folders_that_are_files(tmp_path):
    with pytest.raises(TypeError, match="`random` got unexpected arguments: num_steps"):
        jaxhpo.search.random(jnp.abs, 0.5, num_trials=2, low=0.0, high=1.0, num_steps=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(jaxhpo.JaxhpoError, match="`run_dir` is no folder"):
        jaxhpo.search.random(jnp.abs, 0.5, num_trials=2, low=0.0, high=1.0, run_dir=tmp_path / "file")


def test_a_search_is_drawn():
    result = jaxhpo.search.random(outer_loss, START, num_trials=4, **SPACE)
    labels = [axis.get_ylabel() for axis in jaxhpo.plot.run(result).axes]
    assert labels == ["loss", "value, in natural units"]
    # Every point is drawn, also beside one that was stopped: a line would show those without a neighbour alone.
    stopped = result._replace(history=result.history | {"score": np.array([1.0, 0.5, np.nan, 0.7])})
    lines = {line.get_label(): line for line in jaxhpo.plot.run(stopped).axes[0].lines}
    assert lines["of complete trials"].get_markevery() is None and lines["of complete trials"].get_marker() == "."


def test_an_exception_gives_the_trials_back(tmp_path):
    def stop(step):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        jaxhpo.search.random(curve, 0.5, num_trials=4, batch=3, run_dir=tmp_path, callbacks=[stop], **CURVE)
    result = jaxhpo.search.random(curve, 0.5, num_trials=4, batch=3, run_dir=tmp_path, **CURVE)
    assert result.message.startswith("4 trials: 4 complete")


def test_a_trial_that_was_killed_before_its_end_was_told_is_not_called_again(tmp_path, monkeypatch):
    """The other one in hand is."""
    settings = {"num_trials": 2, "max_calls": 3, "batch": 2, **CURVE}
    tell, told = optuna.Study.tell, []

    def fails_once(self, trial, values=None, state=None, **more):
        if not told and state == optuna.trial.TrialState.COMPLETE:
            told.append(trial)
            raise ConnectionError("mine")
        return tell(self, trial, values, state, **more)

    with monkeypatch.context() as patch, pytest.raises(ConnectionError, match="mine"):
        patch.setattr(optuna.Study, "tell", fails_once)
        jaxhpo.search.random(curve, 0.5, run_dir=tmp_path, save_every=1, **settings)
    shutil.rmtree(tmp_path / "trials" / "1")
    result = jaxhpo.search.random(curve, 0.5, run_dir=tmp_path, **settings)
    assert same(without_times(result), without_times(jaxhpo.search.random(curve, 0.5, **settings)))


# --- several processes ---


def opened(folder):
    storage = jaxhpo.search.open_storage(f"sqlite:///{folder / 'study.db'}")
    storage.heartbeat_interval, storage.grace_period = 1, 3
    return storage


def test_what_another_process_left_is_mended(tmp_path, monkeypatch):
    """A trial killed before its first sign of life, one failed but not put back, one put back twice, one too many."""
    monkeypatch.setattr(_trials, "PAUSE", 0.6)
    storage, distributions = opened(tmp_path), Space(0.5, -1.0, 1.0, None).distributions
    with _storage.quiet():
        study = optuna.create_study(storage=storage, study_name="search")
        study.ask(distributions)
        failed = study.ask(distributions)
        study.tell(failed, state=FAIL)
        twice = study.ask(distributions)
        study.tell(twice, state=FAIL)
        for _ in range(2):
            _storage.put_back(storage, study, twice.number)
        for _ in range(3):  # of 5 trials the last two, and one that another process was faster with
            study.ask(distributions)
    result = jaxhpo.search.random(curve, 0.5, num_trials=5, storage=storage, **CURVE)
    assert result.status == "finished" and result.message.startswith("5 trials: 5 complete")
    states = [t.state.name for t in study.trials]
    assert states.count("COMPLETE") == 5 and "RUNNING" not in states and "WAITING" not in states


def test_a_trial_that_another_process_took_over_is_let_go(tmp_path, monkeypatch):
    """Here the other process is the same one: it waits for the folder until the trial is let go."""
    monkeypatch.setattr(_trials, "PAUSE", 0.1)
    storage, call = opened(tmp_path), _trials.Search._call

    def late(self):
        if len(self.study.trials) == 2:  # the process sleeps, and another one takes it for dead
            self.study.tell(0, state=FAIL)
            _storage.put_back(storage, self.study, 0)
        call(self)

    monkeypatch.setattr(_trials.Search, "_call", late)
    with pytest.warns(RuntimeWarning, match="trial 0 gave no sign of life for too long"):
        result = jaxhpo.search.random(
            curve, 0.5, num_trials=2, max_calls=3, batch=2, storage=storage, run_dir=tmp_path, **CURVE
        )
    assert result.message == "2 trials: 2 complete"


def kills(folder, url, kills, trials, workers=4):
    counts = f"--kills {kills} --trials {trials} --workers {workers}".split()
    command = [sys.executable, str(HERE / "killed.py"), str(folder), url, *counts]
    out = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert out.returncode == 0, out.stderr
    told = json.loads(out.stdout.splitlines()[-1])
    print(told)
    assert told["trials killed"] >= kills and told["begun again"] >= kills
    assert told["lost"] == told["left running"] == told["other results"] == 0
    return told


def test_no_trial_is_lost_where_processes_are_killed(tmp_path):
    """A process that is killed, and the next; the results are those of one that nobody disturbs, to the bit."""
    kills(tmp_path, f"sqlite:///{tmp_path / 'study.db'}", 1, 4, workers=1)


@pytest.mark.slow
def test_no_trial_is_lost_in_fifty_kills(tmp_path):
    """Four processes, fifty trials killed: none is lost and none left running."""
    assert kills(tmp_path, f"sqlite:///{tmp_path / 'study.db'}", 50, 30)["from a checkpoint"] > 0


@pytest.fixture
def postgresql(tmp_path):
    """The address of a server of its own."""
    pytest.importorskip("psycopg2", reason="the driver of PostgreSQL is not installed")
    pgserver = pytest.importorskip("pgserver", reason="pgserver, which brings a PostgreSQL, is not installed")
    server = pgserver.get_server(tmp_path / "server")
    yield server.get_uri().replace("postgresql:", "postgresql+psycopg2:")
    server.cleanup()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:XDG_RUNTIME_DIR")
def test_no_trial_is_lost_in_fifty_kills_on_postgresql(tmp_path, postgresql):
    assert kills(tmp_path, postgresql, 50, 30)["from a checkpoint"] > 0


@pytest.mark.slow
def test_the_dashboard_shows_a_study(tmp_path):
    dashboard = pytest.importorskip("optuna_dashboard", reason="optuna-dashboard is not installed")
    address = f"sqlite:///{tmp_path / 'study.db'}"
    jaxhpo.search.random(curve, 0.5, num_trials=2, max_calls=3, storage=address, name="curves", **CURVE)
    app = dashboard.wsgi(optuna.storages.RDBStorage(address))

    def asked(path):
        environ = {}
        setup_testing_defaults(environ)
        return json.loads(b"".join(app(environ | {"PATH_INFO": path}, lambda *_: None)))

    (study,) = asked("/api/studies")["study_summaries"]
    trials = asked(f"/api/studies/{study['study_id']}")["trials"]
    assert study["study_name"] == "curves" and [t["state"] for t in trials] == ["Complete", "Complete"]
    assert [len(t["intermediate_values"]) for t in trials] == [3, 3] and trials[0]["params"][0]["name"] == "hparams"


# --- gradients within trials of Optuna ---


def hybrid(trial, run_dir, num_steps=8, **more):
    power = trial.suggest_categorical("power", [2, 4])
    return jaxhpo.search.tune_trial(
        trial,
        lambda h: jnp.abs(h - 3.0) ** power + power,
        2.0,
        optax.adam(0.2),
        num_steps=num_steps,
        run_dir=run_dir,
        progress=False,
        **more,
    )


def test_a_trial_tunes_reports_and_is_pruned(tmp_path):
    study = optuna.create_study(pruner=optuna.pruners.ThresholdPruner(upper=3.5, n_warmup_steps=2))
    study.enqueue_trial({"power": 4})
    study.enqueue_trial({"power": 2})
    study.optimize(lambda trial: hybrid(trial, tmp_path).best_value, n_trials=2)
    stopped, ended = study.trials
    assert stopped.state.name == "PRUNED" and sorted(stopped.intermediate_values) == [0, 1, 2]
    assert ended.state.name == "COMPLETE" and sorted(ended.intermediate_values) == list(range(8))
    found = jaxhpo.load(ended.user_attrs["run_dir"])
    assert found.best_value == ended.value and len(found.history["value"]) == 8


def test_a_trial_tunes_once_in_a_folder_and_downwards(tmp_path):
    def twice(trial):
        return hybrid(trial, tmp_path).best_value + hybrid(trial, tmp_path).best_value

    with pytest.raises(jaxhpo.JaxhpoError, match="called twice in trial 0.*`runs/fold0`"):
        optuna.create_study().optimize(twice, n_trials=1)
    with pytest.raises(jaxhpo.JaxhpoError, match="`tune_trial` minimises"):
        optuna.create_study(direction="maximize").optimize(lambda trial: hybrid(trial, tmp_path).best_value, n_trials=1)
    with pytest.raises(jaxhpo.JaxhpoError, match="`trial` got"):
        hybrid(optuna.trial.FixedTrial({"power": 2}), tmp_path)


def test_a_trial_tunes_a_population(tmp_path):
    def several(trial):
        starts = jnp.array([0.0, 2.0])
        run = {"num_steps": 3, "population": 2, "run_dir": tmp_path, "progress": False}
        return jaxhpo.search.tune_trial(trial, lambda h: (h - 3.0) ** 2, starts, optax.sgd(0.1), **run).best_value.min()

    study = optuna.create_study()
    study.optimize(several, n_trials=1)
    assert [*study.trials[0].intermediate_values.values()][-1] == study.best_value


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_trial_that_was_ended_goes_on_when_it_is_retried(number, tmp_path):
    with _storage.quiet():
        study = optuna.create_study(storage=opened(tmp_path), sampler=optuna.samplers.RandomSampler(0))
    before = signal.signal(signal.SIGTERM, lambda *_: None)

    def strike(step):
        if step.step == 3:
            os.kill(os.getpid(), number)

    try:
        with pytest.raises((KeyboardInterrupt, SystemExit)), _storage.quiet():
            study.optimize(lambda trial: hybrid(trial, tmp_path, callbacks=[strike]).best_value, n_trials=1)
    finally:
        signal.signal(signal.SIGTERM, before)
    begun = []
    with _storage.quiet():
        study.optimize(
            lambda t: hybrid(t, tmp_path, callbacks=[lambda s: begun.append(s.step) or False]).best_value, n_trials=1
        )
    first, second = study.trials
    assert first.state.name == "FAIL" and second.state.name == "COMPLETE" and first.params == second.params
    assert begun[0] == 4 and second.user_attrs["run_dir"] == first.user_attrs["run_dir"]
    alone = jaxhpo.tune(
        lambda h: jnp.abs(h - 3.0) ** first.params["power"] + first.params["power"],
        2.0,
        optax.adam(0.2),
        num_steps=8,
        progress=False,
    )
    assert second.value == alone.best_value
