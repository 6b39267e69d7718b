"""Reports of a run: the table, the picture, `jaxhpo show` and `jaxhpo plot`, callbacks that log."""

import builtins
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxhpo
from jaxhpo import plot
from jaxhpo._cli.main import main
from jaxhpo._tune import history

START = {"scale": jnp.asarray(1.0), "vector": jnp.ones(12), "matrix": jnp.ones((4, 5)), "many": jnp.ones(2000)}


def outer_loss(h, carry, key):
    """Returns NaN in one step of seven, on average."""
    value = sum(jnp.sum(x**2) for x in jax.tree.leaves(h))
    return jnp.where(jax.random.bernoulli(key, 1 / 7), jnp.nan, value), carry, {"held_out": value + 1.0}


def run(**settings):
    settings = {"num_steps": 20, "on_not_finite": "skip", "progress": False} | settings
    return jaxhpo.tune(outer_loss, START, optax.sgd(0.1), **settings)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return run(run_dir=folder, monitor=lambda info: info["held_out"], remedies=jaxhpo.Remedies(clip=0.5)), folder


def test_table(result, monkeypatch):
    """The table of a result equals that of its folder, with pandas and without."""
    result, folder = result
    frames = [jaxhpo.history_table(source) for source in (result, folder)]

    def no_pandas(name, *args, **kwargs):
        if name == "pandas":
            raise ImportError
        return found(name, *args, **kwargs)

    found = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", no_pandas)
    plain = jaxhpo.history_table(folder)
    assert list(plain) == list(frames[0].columns) == list(frames[1].columns)
    for name, column in plain.items():
        np.testing.assert_array_equal(column, frames[0][name])
        np.testing.assert_array_equal(column, frames[1][name])
    assert {"value", "hparams['vector'][11]", "hparams['matrix'][3, 4]", "hparams['many'].maximum"} <= set(plain)
    assert np.isnan(plain["value"]).sum() == plain["remedies['skipped_steps']"].sum() > 0


def test_large_leaves_are_kept_as_quantiles_and_norm():
    """For 0, 1, …, 1999: minimum, quartiles, maximum; the norm is sqrt(n (n + 1) (2n + 1) / 6)."""
    n = 1999
    result = jaxhpo.tune(
        lambda h: jnp.sum(h**2),
        jnp.arange(n + 1.0),
        optax.sgd(0.1),
        num_steps=1,
        record=["hypergradient"],
        progress=False,
    )
    want = [0, n // 4, n // 2, 3 * n // 4, n, (n * (n + 1) * (2 * n + 1) / 6) ** 0.5]
    np.testing.assert_allclose([x[0] for x in result.history["hparams"]], want, rtol=1e-14)
    np.testing.assert_array_equal(result.history["hypergradient"][0], 2 * np.arange(n + 1.0))


@pytest.mark.parametrize(
    ("sizes", "whole"),
    [
        ([1000] * 4, [1000] * 4),  # 4000 numbers
        ([1000] * 5, [6] * 5),  # equal leaves are treated alike
        ([1000] * 200, [6] * 200),
        ([2000, 1024, 1000, 3], [6, 1024, 1000, 3]),
        ([600, 700, 800, 900, 1000, 1024], [600, 700, 800, 900, 1000, 6]),  # 5024 without the last, 4018 + 6 with it
        ([5] * 1000, [5] * 1000),  # no summary is shorter
        ([0, 7], [0, 7]),
        ([], []),
    ],
)
def test_a_row_has_4096_numbers(sizes, whole):
    largest = history.largest_whole(sizes)
    rows = [history.summary(np.zeros(size), largest) for size in sizes]
    assert [sum(x.size for x in jax.tree.leaves(row)) for row in rows] == whole


def test_many_leaves_are_summed_up(tmp_path):
    """Five leaves of 1000 are more than 4096 numbers; with `record="hparams"` they are whole."""
    start = {i: jnp.zeros(1000) for i in range(5)}
    settings = {"optimizer": optax.sgd(0.1), "num_steps": 1, "progress": False}
    loss = lambda h: sum(jnp.sum((x - 1.0) ** 2) for x in h.values())  # noqa: E731
    small = jaxhpo.tune(loss, start, run_dir=tmp_path, **settings)
    assert all(isinstance(x, history.Summary) for x in small.history["hparams"].values())
    assert (tmp_path / "history.jsonl").stat().st_size < 2_000
    whole = jaxhpo.tune(loss, start, record="hparams", **settings)
    assert {x.shape for x in whole.history["hparams"].values()} == {(1, 1000)}


@pytest.mark.parametrize("run_dir", [False, True])
def test_record(tmp_path, run_dir):
    """Each step solves once by CG, for a quadratic of curvatures 2, 4 and 6; in memory and on disk."""
    curvature = jnp.array([1.0, 2.0, 3.0])
    solver = jaxhpo.from_optax(lambda p, h, b: jnp.sum(curvature * (p - h) ** 2), optax.sgd(0.1))

    def loss(h):
        start = solver.init(jnp.zeros(3), h)
        sol = jaxhpo.solve(solver, start, h, num_steps=10, adjoint=jaxhpo.Implicit(jaxhpo.CG(maxiter=2)))
        return jnp.sum((sol.params - curvature) ** 2)

    settings = {
        "record": history.EXTRAS,
        "progress": False,
        "run_dir": tmp_path / "run" if run_dir else None,
    }
    steps = (3, 4) if run_dir else (3,)
    for num_steps in steps:
        with pytest.warns(RuntimeWarning, match=f"in {num_steps} of {num_steps} steps linear solves ended before"):
            result = jaxhpo.tune(loss, jnp.asarray(0.5), optax.sgd(0.1), num_steps=num_steps, **settings)
    assert f"{result.history['linear_solves']['residual'].max():.1e}" in result.message
    solves = result.history["linear_solves"]
    assert solves["num_iterations"].tolist() == [2] * len(result.history["value"])
    assert (solves["residual"] > 1e-3).all() and (solves["not_converged"] == 1).all()
    np.testing.assert_allclose(np.abs(result.history["hypergradient"]), result.history["hypergradient_norm"])
    assert (np.diff(result.history["peak_bytes"]) >= 0).all() and result.history["peak_bytes"][0] > 1e6


QUADRATIC = jaxhpo.from_optax(lambda p, h, b: jnp.sum(jnp.array([1.0, 2.0, 3.0]) * (p - h) ** 2), optax.sgd(0.1))


def message_of(adjoint, tol, num_steps=30, **settings):
    """The message of two outer steps of two members, of which each inner run takes at most so many steps."""

    def loss(h, carry, key):
        sol = jaxhpo.solve(QUADRATIC, QUADRATIC.init(jnp.zeros(3), h), h, num_steps=num_steps, tol=tol, adjoint=adjoint)
        return jnp.sum(sol.params**2), carry, sol.info

    start = jnp.array([1.0, 2.0])
    return jaxhpo.tune(loss, start, optax.sgd(0.1), num_steps=2, population=2, progress=False, **settings).message


@pytest.mark.parametrize(
    ("adjoint", "tol"),
    [
        (jaxhpo.Implicit(), 0.1),
        # Its number of terms is what is wanted.
        pytest.param(jaxhpo.Implicit(jaxhpo.Neumann(2, 0.1)), None, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_converged_solves_are_not_spoken_of(adjoint, tol):
    assert message_of(adjoint, tol, record="linear_solves").endswith("of 2 asked for")


def test_inner_runs_that_end_before_their_tol_are_named():
    """The error 2 · 0.8⁵ + ... of five steps is above 1e-3."""
    with pytest.warns(RuntimeWarning, match=r"in 2 of 2 steps inner runs ended .* raise `num_steps`"):
        message = message_of(jaxhpo.Implicit(), 1e-3, num_steps=5)
    assert "linear" not in message


@pytest.mark.slow
def test_linear_solves_of_a_pair_that_end_before_their_tolerance_are_named():
    """Its info holds their reports: without `record`."""
    rule = jaxhpo.Implicit(jaxhpo.CG(maxiter=1))
    pair = jaxhpo.hypergradient(rule, QUADRATIC, lambda s, h, b: (jnp.sum(s.params**2), None), num_steps=5)
    settings = {"gradient": jaxhpo.from_pair(pair), "carry": pair.init(jnp.zeros(3), 1.0), "progress": False}
    with pytest.warns(RuntimeWarning, match="in 1 of 1 steps linear solves"):
        jaxhpo.tune(None, jnp.asarray(1.0), optax.sgd(0.1), num_steps=1, **settings)


def test_record_refuses_an_unknown_name():
    with pytest.raises(jaxhpo.JaxhpoError, match=r"`record` got .*weights.*'hypergradient'"):
        run(record=["weights"])


def test_table_refuses_a_folder_without_a_history(tmp_path):
    with pytest.raises(jaxhpo.JaxhpoError, match="name the `run_dir`"):
        jaxhpo.history_table(tmp_path)
    (tmp_path / "history.jsonl").write_text('{"value": 1')  # in the middle of its first line
    with pytest.raises(jaxhpo.JaxhpoError, match="no outer step has ended yet"):
        jaxhpo.history_table(tmp_path)
    with pytest.raises(jaxhpo.JaxhpoError, match="give the result of `tune`"):
        jaxhpo.history_table(3.0)


def test_picture(result, tmp_path):
    """Three panels, and one each for the vector, the matrix and the metric; larger leaves are in the paths only."""
    figure = plot.run(result[0], tmp_path / "run.png")
    axes = [axis for axis in figure.axes if axis.get_title()]
    starts = [
        "Best loss: ",
        "Norm of the hypergradient: ",
        "Hyperparameters: ",
        "matrix, 20",
        "vector, 12",
        "info.held_out",
    ]
    assert all(axis.get_title().startswith(start) for axis, start in zip(axes, starts, strict=True))
    assert all(axis.get_xlabel() and axis.get_ylabel() for axis in axes)
    end = f"to {result[0].best_value:.4g}, at step 19"
    assert axes[0].get_title() == f"Best loss: 2034 {end}"  # squares of 2033 ones, and one more
    assert (tmp_path / "run.png").stat().st_size > 10_000


def made(hparams, steps=1):
    """A result as of a run that stood still, whose monitor was NaN."""
    constant = {"value": 1.0, "score": np.nan, "hypergradient_norm": 0.0, "seconds": 1.0, "peak_bytes": 1}
    row = constant | {
        "hparams": jax.tree.map(lambda x: history.summary(x, history.LARGE), hparams),
        "info": {"metric": 3, "inf": np.inf},
    }
    row |= {"remedies": {"skipped_steps": 0}}
    stacked = jax.tree.map(lambda x: np.stack([x] * steps), row)
    return jaxhpo.TuneResult(hparams, None, hparams, np.inf, 0, stacked, "finished", "")


ODD = {"$\\bad$": np.zeros(()), "$5 to $9": np.zeros(2), "empty": np.zeros((0, 3)), "_": np.full(1, 0.2)}


@pytest.mark.parametrize("steps", [1, 3])
def test_picture_of_an_odd_run(tmp_path, steps):
    """A score that is NaN, a norm of zero; one step; names that are no formula; a leaf without entries."""
    figure = plot.run(made(ODD, steps), tmp_path / "run.png")
    titles, metric = [axis.get_title() for axis in figure.axes], steps == 1  # later on it has not changed
    assert titles[0] == "Best loss: no finite value"
    assert titles[3:] == ["info.inf: no finite value", "info.metric: 3"][: 1 + metric]
    finite = [True, False, True, False, True]
    assert [axis.get_yticks().size > 0 for axis in figure.axes] == finite[: 4 + metric]
    assert {axis.get_xlim() for axis in figure.axes} == {(-0.5, 0.5) if steps == 1 else (-0.08, 2.08)}
    drawn = [line for axis in figure.axes for line in axis.lines if np.isfinite(line.get_ydata()).any()]
    assert len(drawn) == 5 + metric and {line.get_marker() for line in drawn} == {"o" if steps == 1 else "None"}
    labels = [text.get_text() for text in figure.axes[2].get_legend().get_texts()]
    assert labels == [r"\$5 to \$9", r"\$\\bad\$", "['_']"]  # what begins with _ would not be drawn


def test_picture_of_a_run_without_hyperparameters(tmp_path):
    figure = plot.run(made(()), tmp_path / "run.png")
    assert figure.axes[2].get_title() == "No hyperparameters"


def test_picture_draws_many_entries_as_bands():
    """500 unordered numbers are bands, and a sorted curve; a schedule is drawn over its index; no norm is drawn."""
    start = {"large": np.full(20000, 0.2), "noise": np.random.default_rng(0).normal(size=500), "rate": np.arange(50.0)}
    _, _, paths, noise, rate, *_ = plot.run(made(start)).axes
    assert len(paths.lines) == 3 and len(paths.collections) == 3  # medians, and the bands between quartiles
    assert [line.get_ydata()[0] for line in paths.lines] == [np.median(start["noise"]), 24.5, 0.2]
    assert (np.diff(noise.lines[0].get_ydata()) >= 0).all() and "sorted" in noise.get_xlabel()
    np.testing.assert_array_equal(rate.lines[0].get_ydata(), start["rate"])


def test_picture_of_a_leaf_has_one_scale():
    """From 0.01 to 1, over the steps and sorted; the legend is below the bands."""
    figure = plot.run(made({"layer": [{"rate": np.geomspace(1.0, 0.01, 12)[::5].repeat(4), "bias": np.ones(3)}]}))
    figure.draw_without_rendering()
    _, _, paths, large, *_ = figure.axes
    assert [axis.get_yscale() for axis in (paths, large)] == ["log", "log"]
    assert paths.get_legend().get_window_extent().y1 < paths.get_window_extent().y0
    labels = [text.get_text() for text in paths.get_legend().get_texts()]
    assert labels == ["layer[0].bias", "layer[0].rate, 12 entries: median, quartiles, extremes"]


@pytest.mark.parametrize("name", ["a.b", "x" * 19 + "y" + "x" * 41])
def test_picture_draws_leaves_whose_names_read_alike(name):
    other = {"a": {"b": np.zeros(2)}} if name == "a.b" else {name.replace("y", "z"): np.zeros(2)}
    labels = [text.get_text() for text in plot.run(made({name: np.ones(2)} | other)).axes[2].get_legend().get_texts()]
    assert len(set(labels)) == 2


def test_picture_of_a_population_says_which_member_it_is(tmp_path):
    loss = lambda h: jnp.sum(h**2)  # noqa: E731
    settings = {"num_steps": 2, "population": 2, "progress": False, "run_dir": tmp_path}
    result = jaxhpo.tune(loss, jnp.array([1.0, 0.5]), optax.sgd(0.1), **settings)
    assert plot.run(result).get_suptitle() == "member 1, the best of 2; `plot.run(result.member(i))` draws another"
    assert "load(" in plot.run(tmp_path).get_suptitle()
    of_member = plot.run(jaxhpo.load(tmp_path).member(0))
    assert of_member.get_suptitle() == "" and of_member.axes[0].lines[0].get_ydata()[0] == 1.0


def test_picture_of_many_leaves_is_one_band():
    figure = plot.run(made({f"layer{i}": np.asarray(float(i)) for i in range(24)}))
    (label,) = [text.get_text() for text in figure.axes[2].get_legend().get_texts()]
    assert label == "24 small leaves, 24 entries: median, quartiles, extremes"


def test_picture_with_long_names_has_its_legend_below_the_lines():
    """Four names of 24 letters, and one of 44; the title of a large leaf then has two lines."""
    figure = plot.run(made({f"block_{i}": {"attention": np.zeros(2)} for i in range(4)} | {"b" * 40: np.arange(11.0)}))
    figure.draw_without_rendering()
    _, _, paths, large, *_ = figure.axes
    assert paths.get_legend().get_window_extent().y1 < paths.get_window_extent().y0
    assert large.get_title().count("\n") == 1


@pytest.fixture(scope="module")
def folder_of_nan(tmp_path_factory):
    """A run whose monitor is NaN, in a folder; its integer settings are NumPy's."""
    folder, settings = tmp_path_factory.mktemp("nan"), {"num_steps": np.int64(2), "min_delta": np.float32(0)}

    def loss(h, carry, key):
        return sum(jnp.sum((x - 0.1) ** 2) for x in jax.tree.leaves(h)), carry, {"nan": jnp.nan}

    settings |= {"monitor": lambda info: info["nan"], "progress": False, "run_dir": folder}
    with pytest.warns(RuntimeWarning, match="gave NaN"):
        jaxhpo.tune(loss, ODD, optax.adam(0.001), **settings)
    with pytest.warns(RuntimeWarning, match="gave NaN"):
        result = jaxhpo.tune(loss, ODD, optax.adam(0.001), resume="continue", **settings)
    assert "is 2" not in result.message  # no setting is said to differ
    return result, folder


def test_table_and_show_of_an_odd_run(folder_of_nan, capsys):
    result, folder = folder_of_nan
    assert list(jaxhpo.history_table(result)) == list(jaxhpo.history_table(folder))
    assert main(["show", str(folder)]) == 0 and "no step had a score" in capsys.readouterr().out


def test_picture_is_written_to_the_file_that_is_named(folder_of_nan, tmp_path, capsys):
    _, folder = folder_of_nan
    for name in ("picture", "picture.SVG"):
        assert main(["plot", str(folder), "--out", str(tmp_path / name)]) == 0
        assert capsys.readouterr().out == f"Written: {tmp_path / name}.\n" and (tmp_path / name).stat().st_size
    assert main(["plot", str(folder), "--out", str(tmp_path / "a.xyz")]) == 1
    assert "a.xyz': end it in one of" in capsys.readouterr().err


def test_damaged_folder_is_named(folder_of_nan, tmp_path, capsys):
    """Bytes that are not UTF-8, in the history and in the status; a file of the user's beside the checkpoints."""
    folder = shutil.copytree(folder_of_nan[1], tmp_path / "run")
    (folder / "state-new-mine.npz").touch()
    (folder / "status.json").write_bytes(b"[\xff]")
    assert main(["show", str(folder)]) == 0 and "unknown" in capsys.readouterr().out
    history = folder / "history.jsonl"
    history.write_bytes(history.read_bytes().replace(b"seconds", b"s\xffconds", 1))
    assert main(["show", str(folder)]) == 0 == main(["plot", str(folder)])  # the checkpoint holds the row, too
    for path in folder.glob("state-????????-*"):
        path.unlink()
    history.write_bytes(b"\xff\n")
    assert main(["show", str(folder)]) == 1 == main(["plot", str(folder)])
    assert "history.jsonl is no history of a run" in capsys.readouterr().err


def test_show_and_plot(result, capsys):
    """The commands read the folder only."""
    result, folder = result
    assert main(["show", str(folder), "--rows", "3"]) == 0
    out = capsys.readouterr().out
    assert f"20 outer steps in {result.history['seconds'][-1]:.3g} s; best: {result.best_value:.6g} at step" in out
    assert len(out.split("\n\n")[0].splitlines()) == 2 + 3 and "skipped steps" in out
    assert "finished: 20 outer steps were taken, of 20 asked for" in out
    assert max(map(len, out.split("\n\n")[0].splitlines())) <= 80  # the width of a terminal, where none tells its own
    assert main(["plot", str(folder)]) == 0 and (folder / "run.png").exists()
    assert main(["show", str(folder / "no")]) == 1
    assert "name the `run_dir`" in capsys.readouterr().err


def test_agreement_of_predicted_and_actual_change(tmp_path):
    """SGD of rate r on h² predicts −4 r h² and gets −4 r (1 − r) h²; of each member, and of a run that goes on."""
    starts, carry = {"a": jnp.array([2.0, 3.0])}, jnp.array([0.1, 0.6])

    def outer_loss(h, rate, key):  # a member's own rate scales its loss: (h √rate)² under SGD of rate 1
        return rate * jnp.sum(h["a"] ** 2), rate, None

    settings = {"num_steps": 4, "record": "agreement", "progress": False}
    result = jaxhpo.tune(outer_loss, starts, optax.sgd(1.0), population=2, carry=carry, **settings)
    got, want = result.history["agreement"], np.tile(1 - np.array([0.1, 0.6]), (3, 1))
    np.testing.assert_allclose(got[1:], want, rtol=1e-12)
    assert np.isnan(got[0]).all()
    values = result.history["value"]
    np.testing.assert_allclose(result.history["predicted_change"][:-1], np.diff(values, axis=0) / got[1:], rtol=1e-12)
    settings |= {"run_dir": tmp_path}
    alone = lambda steps: jaxhpo.tune(lambda h: 0.1 * h**2, 2.0, optax.sgd(1.0), **settings | {"num_steps": steps})  # noqa: E731
    alone(2)
    np.testing.assert_allclose(alone(4).history["agreement"][1:], 0.9, rtol=1e-12)


def truncated_and_exact():
    """A loss of 40 hyperparameters whose rule sees two of 20 steps, and the same differentiated exactly."""
    solver = jaxhpo.from_optax(lambda p, h, b: jnp.sum(jnp.exp(h) * p**2 + (p - 1) ** 2), optax.sgd(0.05))

    def loss(rule, h):
        start = solver.init(jnp.zeros(h.shape), h)
        return jnp.sum((jaxhpo.solve(solver, start, h, num_steps=20, adjoint=rule).params - 0.3) ** 2)

    return functools.partial(loss, jaxhpo.Unroll(truncate=2)), functools.partial(loss, jaxhpo.Unroll())


def distances(history):
    """The true errors of the hypergradients in a history."""
    truncated, exact = truncated_and_exact()
    distance = lambda x: jnp.linalg.norm(jax.grad(truncated)(x) - jax.grad(exact)(x))  # noqa: E731
    return jax.vmap(distance)(history["hparams"])


def test_error_bar_of_a_run(tmp_path):
    """Exact at every fourth step, and held until the next; the same when the run goes on."""
    truncated, _ = truncated_and_exact()
    h = jnp.linspace(-1.0, 1.0, 40)
    settings = {"record": ("error", "hparams"), "progress": False, "run_dir": tmp_path}
    jaxhpo.tune(truncated, h, optax.adam(0.05), num_steps=6, **settings)
    history = jaxhpo.tune(truncated, h, optax.adam(0.05), num_steps=10, **settings).history
    np.testing.assert_allclose(history["measured_error"][::4], distances(history)[::4], rtol=1e-12)
    assert np.isnan(np.delete(history["measured_error"], [0, 4, 8])).all()
    np.testing.assert_array_equal(history["error"], np.repeat(history["measured_error"][::4], 4)[:10])
    other = jaxhpo.tune(truncated, h, optax.adam(0.05), num_steps=10, **settings | {"run_dir": None}).history
    np.testing.assert_array_equal(other["error"], history["error"])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_error_bar_of_sharded_hyperparameters(kind):
    solver = jaxhpo.from_optax(lambda p, h, b: jnp.sum(jnp.exp(h) * p**2 + (p - 1) ** 2), optax.sgd(0.05))

    def loss(h):
        start = solver.init(jnp.zeros_like(h), h)
        sol = jaxhpo.solve(solver, start, h, num_steps=20, adjoint=jaxhpo.Unroll(truncate=2))
        return jnp.sum((sol.params - 0.3) ** 2)

    h, mesh = jnp.linspace(-1.0, 1.0, 40), jax.make_mesh((8,), ("d",), axis_types=(kind,))
    settings = {"num_steps": 3, "on_error": "tighten", "progress": False}
    want = jaxhpo.tune(loss, h, optax.adam(0.05), **settings).history
    with jax.set_mesh(mesh):
        placed = jax.device_put(h, NamedSharding(mesh, PartitionSpec("d")))
        got = jaxhpo.tune(loss, placed, optax.adam(0.05), **settings).history
    for name in ("error", "measured_slope", "measured_norm"):
        np.testing.assert_allclose(got[name], want[name], rtol=1e-12)  # sums in another order


@pytest.mark.slow
def test_error_bar_by_tangents_where_memory_is_short(monkeypatch):
    monkeypatch.setattr("jaxhpo._diagnostics.tangents.available_bytes", lambda: 0)
    settings = {"num_steps": 40, "record": ("error", "hparams"), "progress": False}
    history = jaxhpo.tune(truncated_and_exact()[0], jnp.linspace(-1.0, 1.0, 40), optax.adam(0.05), **settings).history
    ratio = (history["error"] / distances(history))[::4]
    # √(χ² / n): 99.9 % lie between 0.22 and 2.00 for six directions; corrected by 1.09.
    assert (ratio > 0.22).all() and (ratio < 2.2).all() and len(set(ratio.tolist())) == 10


@pytest.mark.slow
def test_error_bar_of_adam_where_a_gradient_is_zero():
    """Past a user's rules roots have a derivative of their own, which has no reverse mode: here they keep JAX's."""
    solver = jaxhpo.from_optax(lambda p, h, b: jnp.sum(jnp.exp(h) * p[:3] ** 2 + (p[:3] - 1) ** 2), optax.adam(0.1))

    def loss(rule, h):
        start = solver.init(jnp.zeros(4), h)
        return jnp.sum((jaxhpo.solve(solver, start, h, num_steps=20, adjoint=rule).params[:3] - 0.3) ** 2)

    h, settings = jnp.array([-1.0, 0.0, 1.0]), {"num_steps": 1, "record": ("error", "hypergradient")}
    truncated, plain = (functools.partial(loss, rule) for rule in (jaxhpo.Unroll(truncate=2), jaxhpo.Unroll()))
    history = jaxhpo.tune(truncated, h, optax.sgd(0.1), progress=False, **settings).history
    want = jnp.array([(plain(h + e) - plain(h - e)) / 2e-5 for e in 1e-5 * jnp.eye(3)])
    distance = jnp.linalg.norm(history["hypergradient"][0] - want)
    np.testing.assert_allclose(history["error"], [distance], rtol=1e-7)  # differences are off by 1e-10 / 1e-5


def test_error_bar_of_a_run_to_a_tolerance():
    """Which has no reverse mode: of three hyperparameters three tangents say all."""
    solver = jaxhpo.from_optax(lambda p, h, b: jnp.sum(jnp.exp(h) * p**2 + (p - 1) ** 2), optax.sgd(0.05))

    def loss(rule, h, num_steps=200, tol=1e-2):
        start = solver.init(jnp.zeros(3), h)
        sol = jaxhpo.solve(solver, start, h, num_steps=num_steps, tol=tol, adjoint=rule)
        return jnp.sum((sol.params - 0.3) ** 2), sol.info.num_steps

    h, rule = jnp.array([-1.0, 0.0, 1.0]), jaxhpo.Implicit(jaxhpo.Neumann(2, 0.05))
    steps = int(loss(rule, h)[1])
    exact = jax.grad(lambda h: loss(jaxhpo.Unroll(), h, steps, None)[0])(h)
    want = jnp.linalg.norm(jax.grad(lambda h: loss(rule, h)[0])(h) - exact)
    settings = {"num_steps": 1, "record": "error", "progress": False}
    history = jaxhpo.tune(lambda h: loss(rule, h)[0], h, optax.sgd(0.1), **settings).history
    np.testing.assert_allclose(history["error"], [want], rtol=1e-10)


def test_error_bar_without_a_derivative_is_refused():
    def loss(h):
        return jnp.sum(jaxhpo.implicit(lambda w, h: w - h, h, h) ** 2)

    with pytest.raises(jaxhpo.JaxhpoError, match="record='error'.*solver of your own"):
        jaxhpo.tune(loss, jnp.ones(2), optax.sgd(0.1), num_steps=1, record="error", progress=False)
    with pytest.raises(jaxhpo.JaxhpoError, match="tune a member alone"):
        jaxhpo.tune(loss, jnp.ones(2), optax.sgd(0.1), num_steps=1, record="error", progress=False, population=2)
