"""Every benchmark starts; the one of link prediction runs, small."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhpo.data import knowledge_graph

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help(script):
    done = subprocess.run(
        [sys.executable, script, "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "--out" in done.stdout


def test_each_is_listed():
    listed = (ROOT / "benchmarks" / "README.md").read_text()
    assert not [script.name for script in SCRIPTS if f"| `{script.name}` |" not in listed]


@pytest.fixture
def link_prediction(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("link_prediction")


@pytest.fixture
def graph(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "graph"
    folder.mkdir()
    for name, count in (("train", 60), ("valid", 12), ("test", 7)):
        triples = rng.integers((9, 2, 9), size=(count, 3))
        lines = "".join(f"e{s}\tr{p}\te{o}\n" for s, p, o in triples)
        if name == "train":  # so that each entity occurs
            lines += "".join(f"e{i}\tr0\te{i}\n" for i in range(9))
        (folder / f"{name}.txt").write_text(lines)
    return folder


def small(module, graph, *more):
    args = module.parse(
        [
            *("--dataset", str(graph), "--rank", "3", "--inner-steps", "4", "--outer-steps", "6", "--seeds", "2"),
            *("--batch-size", "20", "--scale", "0.3", *more),
        ]
    )
    loaded = knowledge_graph(graph)
    args = module.with_defaults(args, loaded)
    return args, module.Task(args, loaded)


@pytest.mark.slow
def test_link_prediction_in_pieces_is_the_whole(link_prediction, graph, monkeypatch):
    _, task = small(link_prediction, graph)
    part = task.parts(0)[0]
    whole = jax.value_and_grad(task.judge)(task.start(0), part), task.reciprocal_rank(task.start(0), part)
    monkeypatch.setattr(link_prediction, "MOST_SCORES", 4 * 9)  # of six triples four, then two
    pieces = jax.value_and_grad(task.judge)(task.start(0), part), task.reciprocal_rank(task.start(0), part)
    chex.assert_trees_all_close(whole, pieces, rtol=1e-12)


@pytest.mark.slow
def test_link_prediction_goes_on_from_step_to_step(link_prediction, graph, tmp_path):
    _, task = small(link_prediction, graph)
    found = link_prediction.go_on(task, "online", "embedding", 6, tmp_path / "run")
    chex.assert_trees_all_equal(
        found.losses, link_prediction.go_on(task, "online", "embedding", 6, tmp_path / "run").losses
    )
    assert np.all(found.losses[0, -1] < found.losses[0, 0])  # a training that goes on
    fixed = link_prediction.go_on(task, "fixed", "scalar", 6, None)
    chex.assert_trees_all_close(fixed.weights, jnp.full(2, link_prediction.START))
    rows = link_prediction.report(task, "online", "embedding", found)
    for seed, row in enumerate(rows):  # ranked while compiled, and by the library
        params = jax.tree.map(lambda x, seed=seed: x[seed], found.params)
        ranks = link_prediction.lp.ranks(task.model, params, task.ranked.triples[seed], task.graph.triples)
        assert row["valid_mrr"] == ranks.metrics().mrr
        np.testing.assert_allclose(found.losses[2, -1, seed], ranks.metrics("pessimistic").mrr, rtol=1e-12)


@pytest.mark.slow
def test_link_prediction_reports_every_search(link_prediction, graph, tmp_path, monkeypatch):
    arguments = ["--dataset", str(graph), "--rank", "3", "--inner-steps", "4", "--outer-steps", "5", "--seeds", "2"]
    arguments += ["--method", "all", "--hyperparameters", "embedding", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["link_prediction.py", *arguments])
    link_prediction.main()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    searches = {(row["method"], row["hyperparameters"]) for row in report["rows"]}
    assert len(report["rows"]) == 2 * len(searches) and len(searches) == 5
    wanted = {"method", "hyperparameters", "seed", *link_prediction.COLUMNS, "inner_steps", "seconds"}
    assert all(row.keys() == wanted for row in report["rows"])
    assert (tmp_path / "out" / "link_prediction.png").stat().st_size > 0


@pytest.mark.slow
def test_link_prediction_trains_a_large_graph_once(link_prediction, graph, monkeypatch):
    monkeypatch.setattr(link_prediction, "LARGE", 8)
    args, _ = small(link_prediction, graph)
    assert args.method == ["online"] and args.truncate == 4
    with pytest.raises(SystemExit, match="9 entities are too many to be trained anew.*write --method online"):
        small(link_prediction, graph, "--method", "grid")
