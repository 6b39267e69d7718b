"""Benchmarks: each has a `--help`; link prediction runs on a small graph; remedies classify searches."""

import importlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhpo
from jaxhpo.data import knowledge_graph

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted([*(ROOT / "benchmarks").glob("[a-z]*.py"), *(ROOT / "benchmarks/experiments").glob("[a-z]*.py")])


EVERY_HELP = """
import contextlib, io, json, runpy, sys
texts = {}
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    sys.path[0] = script.rpartition("/")[0]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            assert not end.code, script
    texts[script] = out.getvalue()
print(json.dumps(texts))
"""


@pytest.mark.slow
def test_every_benchmark_prints_its_help():
    """All in one process, as most of the time goes into importing the libraries."""
    command = [sys.executable, "-c", EVERY_HELP, *map(str, SCRIPTS)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    texts = json.loads(done.stdout)
    assert len(texts) == len(SCRIPTS) and all("--out" in text for text in texts.values())


def test_every_benchmark_is_listed_in_the_readme():
    assert len(SCRIPTS) >= 10
    listed = (ROOT / "benchmarks" / "README.md").read_text()
    names = [script.relative_to(ROOT / "benchmarks") for script in SCRIPTS]
    assert not [name for name in names if f"| `{name}` |" not in listed]


@pytest.fixture
def link_prediction(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("link_prediction")


@pytest.fixture
def graph(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "graph"
    folder.mkdir()
    # Each triple occurs once. Tests add two others: (0, 0, 1) and (0, 1, 8).
    every = [(s, p, o) for s in range(1, 9) for p in range(2) for o in range(9) if s != o]
    drawn = iter(rng.permutation(every))
    for name, count in (("train", 60), ("valid", 12), ("test", 7)):
        triples = [next(drawn) for _ in range(count)]
        lines = "".join(f"e{s}\tr{p}\te{o}\n" for s, p, o in triples)
        if name == "train":  # every entity occurs
            lines += "".join(f"e{i}\tr0\te{i}\n" for i in range(9))
        (folder / f"{name}.txt").write_text(lines)
    return folder


def arguments(module, graph, *more):
    args = module.parse(
        [
            *("--dataset", str(graph), "--rank", "3", "--inner-steps", "4", "--outer-steps", "6", "--seeds", "2"),
            *("--batch-size", "20", "--scale", "0.3", *more),
        ]
    )
    return module.with_defaults(args, knowledge_graph(graph))


def small(module, graph, *more):
    args = arguments(module, graph, *more)
    return args, module.Task(args, knowledge_graph(graph))


def run_main(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["link_prediction.py", *map(str, arguments)])
    module.main()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seeds", "0"], "--seeds got 0, but it is a whole number from 1 on"),
        (["--outer-steps", "0"], "--outer-steps got 0, but it is a whole number from 1 on"),
        (["--inner-steps", "0"], "--inner-steps got 0, but it is a whole number from 1 on"),
        (["--rank", "-1"], "--rank got -1, but it is a whole number from 1 on"),
        (["--truncate", "5"], "--truncate got 5, but it is a whole number from 0 to 4, the inner steps"),
        (["--batch-size", "70"], "--batch-size got 70, but it is a whole number from 0 to 69, the training triples"),
        (["--scale", "0"], "--scale got 0.0, but it is finite and above 0"),
        (["--start", "nan"], "--start got nan, but it is finite and above 0"),
    ],
)
def test_link_prediction_refuses_arguments(link_prediction, graph, capsys, more, message):
    with pytest.raises(SystemExit) as stopped:
        arguments(link_prediction, graph, *more)
    assert stopped.value.code == 2  # argparse's code for invalid arguments
    assert message in capsys.readouterr().err


def test_link_prediction_refuses_data(link_prediction, graph, capsys, monkeypatch):
    (graph / "valid.txt").write_text("e0\tr0\te1\n")
    with pytest.raises(SystemExit, match="2"):
        arguments(link_prediction, graph)
    assert "cannot be halved: write --whole-validation" in capsys.readouterr().err
    arguments(link_prediction, graph, "--whole-validation")
    (graph / "train.txt").unlink()
    with pytest.raises(SystemExit, match="2"):
        run_main(link_prediction, monkeypatch, "--dataset", graph)
    message = capsys.readouterr().err
    assert "lacks train.txt" in message and message.count("\n") == 1


def test_link_prediction_does_not_overwrite_reports_of_other_settings(link_prediction, graph, capsys, tmp_path):
    out = tmp_path / "out"
    given = arguments(link_prediction, graph, "--out", str(out))
    link_prediction.open_out(given)
    settings = link_prediction.settings_of(given)
    (out / "report.json").write_text(json.dumps({"settings": settings}))
    link_prediction.open_out(given)
    del settings["start"]  # a report from before this option existed
    (out / "report.json").write_text(json.dumps({"settings": settings}))
    link_prediction.open_out(given)
    other = ("--out", str(out), "--start", "0.1", "--rank", "4")
    with pytest.raises(SystemExit, match="2"):
        link_prediction.open_out(arguments(link_prediction, graph, *other))
    assert "(rank is 3 there and 4 here, start is 0.005 there and 0.1 here)" in capsys.readouterr().err
    link_prediction.open_out(arguments(link_prediction, graph, *other, "--overwrite"))
    with pytest.raises(SystemExit, match="2"):
        link_prediction.open_out(arguments(link_prediction, graph, "--out", str(out / "report.json")))
    assert "cannot be a folder of reports" in capsys.readouterr().err


def test_link_prediction_default_folder_depends_on_the_data(link_prediction, graph):
    out = lambda *arguments: link_prediction.parse(arguments).out.name  # noqa: E731
    assert out() == "link_prediction" and out("--dataset", "wn18rr") == "link_prediction_wn18rr"
    assert out("--dataset", f"{graph}/") == "link_prediction_graph"


@pytest.mark.parametrize("folder", ["link_prediction", "link_prediction_wn18rr"])
def test_link_prediction_docstring_has_the_commands_of_its_reports(link_prediction, folder):
    """The settings of each command in the docstring are those of the report in its folder."""
    commands = link_prediction.__doc__.replace("\\\n", " ").split("python benchmarks/link_prediction.py")[1:]
    (args,) = [a for a in (link_prediction.parse(c.split()) for c in commands) if a.out.name == folder]
    report = json.loads((args.out / "report.json").read_text())
    given = {k: v for k, v in link_prediction.settings_of(args).items() if v is not None}
    found = {"start": link_prediction.START} | report["settings"]
    assert given == {name: found[name] for name in given}
    assert {row["method"] for row in report["rows"]} == set(
        link_prediction.RETRAINED if args.method == ["all"] else args.method
    )


def test_link_prediction_names_runs_by_settings_and_triples(link_prediction, graph, tmp_path):
    def name(folder, *more):
        args = arguments(link_prediction, folder, *more)
        return link_prediction.run_name(args, knowledge_graph(folder), "online", "scalar")

    first = name(graph)
    assert re.fullmatch("online-scalar-[0-9a-f]{16}", first)
    copy = shutil.copytree(graph, tmp_path / "copy")
    assert name(copy) == first
    assert name(graph, "--rank", "4") != first and name(graph, "--start", "0.1") != first
    for part in ("train", "valid", "test"):
        lines = (graph / f"{part}.txt").read_text().splitlines(keepends=True)
        (copy / f"{part}.txt").write_text("".join([*lines[:-1], "e0\tr1\te8\n"]))
        assert lines[-1] != "e0\tr1\te8\n" and name(copy) != first
        (copy / f"{part}.txt").write_text("".join(lines))
    for path in copy.iterdir():
        path.write_text(path.read_text().replace("e8", "another"))
    assert name(copy) != first


def test_link_prediction_nan_is_never_the_best(link_prediction):
    """Four points of two seeds, with distinct reported losses."""
    tuned = np.array([[np.nan, 3.0], [2.0, np.nan], [np.nan, 4.0], [1.0, 1.0]])
    reported = np.array([[np.nan, 13.0], [12.0, np.nan], [22.0, 14.0], [11.0, 11.0]])
    given = iter(np.stack([tuned, reported], axis=1))
    task = types.SimpleNamespace(
        seeds=2, num_steps=5, weights=lambda kind: jnp.ones(2), evaluate=lambda weights: (next(given), None)
    )
    rows = slice(0, 3)  # the search ends before the best point
    found = link_prediction.sample(task, "grid", "scalar", 3)
    np.testing.assert_array_equal(found.losses, np.stack([tuned[rows], reported[rows]]))
    points = np.random.default_rng(0).permutation(np.geomspace(link_prediction.LOW, link_prediction.HIGH, 3))
    np.testing.assert_allclose(
        found.weights, points[[1, 0]], rtol=1e-6
    )  # the points of least loss have the losses 2 and 3
    best = link_prediction.best_so_far(found)
    np.testing.assert_array_equal(best, [[np.nan, 13.0], [12.0, 13.0], [12.0, 13.0]])


def test_link_prediction_method_all_expands_without_duplicates(link_prediction, graph):
    args = arguments(link_prediction, graph, "--method", "all", "fixed", "grid")
    assert args.method == [*link_prediction.RETRAINED, "fixed"]
    assert arguments(link_prediction, graph, "--method", "fixed", "fixed").method == ["fixed"]


@pytest.mark.slow
def test_link_prediction_in_pieces_equals_the_whole(link_prediction, graph, monkeypatch):
    _, task = small(link_prediction, graph)
    part = task.parts(0)[0]
    whole = jax.value_and_grad(task.judge)(task.start(0), part), task.reciprocal_rank(task.start(0), part)
    monkeypatch.setattr(link_prediction, "MOST_SCORES", 4 * 9)  # six triples: four, then two
    pieces = jax.value_and_grad(task.judge)(task.start(0), part), task.reciprocal_rank(task.start(0), part)
    chex.assert_trees_all_close(whole, pieces, rtol=1e-12)


@pytest.mark.slow
def test_link_prediction_online_training_continues_between_steps(link_prediction, graph, tmp_path):
    _, task = small(link_prediction, graph)
    found = link_prediction.go_on(task, "online", "embedding", 6, tmp_path / "run")
    chex.assert_trees_all_equal(
        found.losses, link_prediction.go_on(task, "online", "embedding", 6, tmp_path / "run").losses
    )
    fixed = link_prediction.go_on(task, "fixed", "scalar", 6, None)
    chex.assert_trees_all_close(fixed.weights, jnp.full(2, link_prediction.START))
    rows = link_prediction.report(task, "online", "embedding", found)
    for seed, row in enumerate(rows):  # ranks of the compiled program, and of the library
        params, start = jax.tree.map(lambda x, seed=seed: x[seed], (found.params, task.starts))
        after, before = (link_prediction.lp.cross_entropy(task.model, p, task.graph.train) for p in (params, start))
        assert after < before  # the training continues
        ranks = link_prediction.lp.ranks(task.model, params, task.ranked.triples[seed], task.graph.triples)
        assert row["valid_mrr"] == ranks.metrics().mrr
        np.testing.assert_allclose(found.losses[2, -1, seed], ranks.metrics("pessimistic").mrr, rtol=1e-12)


@pytest.mark.slow
def test_link_prediction_reports_every_search(link_prediction, graph, tmp_path, monkeypatch, capsys):
    given = ["--dataset", graph, "--rank", "3", "--inner-steps", "4", "--outer-steps", "5", "--seeds", "2"]
    given += ["--method", "all", "--hyperparameters", "embedding", "--out", tmp_path / "out"]
    run_main(link_prediction, monkeypatch, *given)
    printed = capsys.readouterr()
    assert "report_loss" in printed.out and "unroll, embedding: compiling ..." in printed.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    searches = {(row["method"], row["hyperparameters"]) for row in report["rows"]}
    assert len(report["rows"]) == 2 * len(searches) and len(searches) == 5
    wanted = {"method", "hyperparameters", "seed", *link_prediction.COLUMNS, "inner_steps", "seconds"}
    assert all(row.keys() == wanted for row in report["rows"])
    assert (tmp_path / "out" / "link_prediction.png").stat().st_size > 0


@pytest.mark.slow
def test_link_prediction_large_graph_is_trained_online_only(link_prediction, graph, monkeypatch, capsys):
    monkeypatch.setattr(link_prediction, "LARGE", 8)
    args, _ = small(link_prediction, graph)
    assert args.method == ["online"] and args.truncate == 4
    with pytest.raises(SystemExit, match="2"):
        small(link_prediction, graph, "--method", "grid")
    message = capsys.readouterr().err
    assert "9 entities are too many to be trained anew" in message and "write --method online" in message


@pytest.mark.slow
def test_link_prediction_resumes_only_with_the_same_data(link_prediction, graph, tmp_path, monkeypatch, capsys):
    """One seed, tuned by the whole validation part; a second run reads the first one's results and adds its seconds."""
    out = tmp_path / "out"
    given = ["--dataset", graph, "--rank", "3", "--inner-steps", "4", "--outer-steps", "3", "--seeds", "1", "--resume"]
    given += ["--method", "online", "--whole-validation", "--out", out]
    run_main(link_prediction, monkeypatch, *given)
    printed = capsys.readouterr()
    assert "report" not in printed.out and "nan" not in printed.out and "±" not in printed.out
    assert "all of the validation part" in printed.out and "3 of 3, validation MRR" in printed.err
    first = json.loads((out / "report.json").read_text())
    run_main(link_prediction, monkeypatch, *given)
    second = json.loads((out / "report.json").read_text())
    assert "step" not in capsys.readouterr().err.replace("steps", "")  # no step was taken
    assert first["rows"] == second["rows"]  # with their seconds
    (folder,) = (out / "runs").iterdir()
    taken = np.asarray(jaxhpo.history_table(folder)["seconds"])[-1]  # of the first run; the second took no step
    assert second["seconds"] > taken
    with (graph / "test.txt").open("a") as file:
        file.write("e0\tr0\te1\n")
    run_main(link_prediction, monkeypatch, *given)
    assert "online, embedding: step 1 of 3" in capsys.readouterr().err
    assert len(list((out / "runs").iterdir())) == 2


@pytest.fixture
def remedies(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("remedies")


def test_remedies_classify_nonfinite_searches(remedies):
    losses = np.array([[3.0, 3.0, 3.0, 3.0, 3.0, np.nan], [2.0, 3.001, 4.0, np.nan, np.inf, np.nan]])
    found = remedies.judge(losses)
    assert (found["improved"], found["stalled"], found["diverged"], found["lower"]) == (1, 1, 4, 1)


@pytest.mark.parametrize("more", [["--seeds", "0"], ["--out", __file__]])
def test_remedies_refuse_arguments(remedies, monkeypatch, more):
    monkeypatch.setattr(sys, "argv", ["remedies.py", *more])
    monkeypatch.setattr(remedies, "Nations", None)  # arguments are checked before any data are loaded
    with pytest.raises(SystemExit, match="2"):
        remedies.main()


@pytest.fixture
def structure(monkeypatch):
    """Imports one of the benchmarks of structure by name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pruning", "ard", "choices", "stacking"])
def test_benchmarks_of_structure_run_quick(structure, tmp_path, name):
    structure(name).main(["--quick", "--out", str(tmp_path)])
    report = json.loads((tmp_path / f"{name}.json").read_text())
    assert report["summary"] and (tmp_path / f"{name}.png").stat().st_size > 0


@pytest.mark.slow
def test_ard_cost_is_the_evidence_that_leaving_out_a_feature_costs(structure):
    """Savage and Dickey's ratio against the evidence with a precision that leaves the feature out, of two targets."""
    ard = structure("ard")
    keys = jax.random.split(jax.random.key(0), 2)
    x, y = jax.random.normal(keys[0], (30, 3)), jax.random.normal(keys[1], (30, 2))
    h = {"weights": jnp.array([0.3, -1.0, 2.0]), "noise": jnp.array(0.5)}

    def evidence(h):
        return ard.posterior(h, x, y).log_evidence.sum()

    without = [evidence(h | {"weights": h["weights"].at[i].set(30.0)}) for i in range(3)]  # e^30 leaves a weight out
    (cost,) = ard.cost(*jax.tree.map(lambda leaf: leaf[None], (h, x, y)))
    np.testing.assert_allclose(cost, evidence(h) - jnp.stack(without), rtol=1e-7)


def test_benchmarks_of_structure_refuse_no_seeds(structure, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        structure("_arguments").parse("", ["--seeds", "0", "--out", str(tmp_path)], seeds=2, quick=1)
    assert "--seeds got 0: write a whole number from 1 on" in capsys.readouterr().err


@pytest.fixture
def model_selection(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    with jax.numpy_rank_promotion("allow"):
        yield importlib.import_module("model_selection")


@pytest.mark.slow
def test_model_selection_is_quick(model_selection, tmp_path, capsys):
    model_selection.main(["--quick", "--seeds", "2", "--out", str(tmp_path)])
    assert "| polynomial | ELBO | greedy |" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["algorithm"] for row in report["rows"]] == ["random", "greedy"]
    assert all(np.isfinite(row["Q"]).all() and np.shape(row["error"]) == (2, 3) for row in report["rows"])
    gain, _ = report["above random search"]["polynomial, ELBO"]["greedy"]
    np.testing.assert_allclose(gain, np.mean(np.subtract(report["rows"][1]["Q"], report["rows"][0]["Q"])))
    assert (tmp_path / "model_selection.png").stat().st_size > 0


@pytest.mark.slow
def test_model_selection_has_the_diagonal_of_the_gauss_newton_matrix(model_selection):
    rng = np.random.default_rng(0)
    w = {"k1": (5, 4), "b1": (4,), "k2": (4, 3), "b2": (3,)}
    w, x = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in w.items()}, rng.normal(size=(7, 5))
    problem = model_selection.PROBLEMS["digits"]
    flat, unravel = jax.flatten_util.ravel_pytree(w)

    def predict(v):
        return model_selection.predict(problem, unravel(v), x)

    jacobian, p = jax.jacobian(predict)(flat), jax.nn.softmax(predict(flat))
    curvature = jnp.eye(3) * p[:, :, None] - p[:, :, None] * p[:, None, :]
    exact = unravel(jnp.einsum("nip,nij,njp->p", jacobian, curvature, jacobian))
    chex.assert_trees_all_close(model_selection.gauss_newton_diagonal(w, x), exact, rtol=1e-10)


def test_model_selection_counts_steps_to_99_percent(model_selection):
    losses = np.array([[5.0, 1.0, 0.0, 0.0], [5.0, 5.0, 5.0, 5.0], [4.0, 3.0, 0.03, 0.0]])
    np.testing.assert_array_equal(model_selection.steps_to_converge(losses), [3, 1, 3])


def test_model_selection_page_has_the_recorded_table(model_selection):
    rows = json.loads((ROOT / "benchmarks/results/model_selection/report.json").read_text())["rows"]
    assert model_selection.table(rows) in (ROOT / "docs/model_selection.md").read_text()
