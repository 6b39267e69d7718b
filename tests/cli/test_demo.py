"""`jaxhpo demo`, run in this process: its report, its text, its picture, and its command line."""

import builtins
import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhpo
from jaxhpo import plot
from jaxhpo._cli import demo, demo_experiment
from jaxhpo._cli.main import QUICK, main
from jaxhpo._core import cost

SMALL = {"seeds": 2, "outer_steps": 3, "num_steps": 30}
METHODS = ["untuned", "grid", "random", "hypergradient", "penalties-only", "schedule-only"]
FIGURES = ["test_accuracy", "test_loss", "refit_test_loss", "refit_test_accuracy"]


def test_report_of_the_demo_is_complete_and_consistent(tmp_path, capsys):
    out = tmp_path / "folder"  # one test, as several workers would each repeat a fixture
    out.mkdir()
    demo.run(demo.Settings(**SMALL), out)
    printed = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    check_names(report)
    check_means_and_standard_errors(report)
    check_paired_differences(report)
    check_equal_inner_steps(report)
    check_the_gradient_lowers_the_validation_loss(report)
    check_text(report, printed, out)
    check_picture(out / "demo.png")


@pytest.mark.slow
def test_quick_demo_is_a_win(tmp_path, capsys):
    """In test loss, it beats the searches of the same cost in each of its seeds."""
    assert main(["demo", "--quick", "--out", str(tmp_path)]) == 0
    assert "is worse than" not in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["settings"]["outer_steps"] == demo.Settings().outer_steps  # the full budget
    assert [row["name"] for row in report["methods"]] == METHODS[:4]
    for difference in report["paired_differences"]:
        assert difference["test_loss_seeds_better"] == difference["seeds"] == QUICK["seeds"]


def check_names(report):
    assert [row["name"] for row in report["methods"]] == METHODS
    for row in report["methods"]:
        for name in ["validation_loss", *(f"{figure}_{end}" for figure in FIGURES for end in ("mean", "sem"))]:
            assert isinstance(row[name], float) and math.isfinite(row[name]), name
        assert isinstance(row["inner_steps"], int) and row["inner_steps"] > 0
        assert row["seconds"] > 0
        assert 0 <= row["test_accuracy_mean"] <= 1
    assert {"settings", "seeds", "versions", "cost", "paired_differences", "conclusions", "seconds"} <= set(report)
    assert {"jax", "jaxhpo", "numpy", "python"} <= set(report["versions"])
    assert report["versions"]["jaxhpo"] == jaxhpo.__version__
    assert report["num_hyperparameters"] == 64 * 64 + 64 * 10 + 8  # one penalty per weight, and 8 knots


def check_means_and_standard_errors(report):
    assert report["seeds"] == list(range(SMALL["seeds"]))
    for row in report["methods"]:
        for figure in FIGURES:
            values = np.array(row["per_seed"][figure])
            assert values.shape == (SMALL["seeds"],)
            assert row[f"{figure}_mean"] == pytest.approx(values.mean(), abs=2e-6)  # the report has six decimals
            assert row[f"{figure}_sem"] == pytest.approx(values.std(ddof=1) / math.sqrt(len(values)), abs=2e-6)


def check_paired_differences(report):
    rows = {row["name"]: row["per_seed"] for row in report["methods"]}
    assert [d["against"] for d in report["paired_differences"]] == [name for name in METHODS if name != "hypergradient"]
    for difference in report["paired_differences"]:
        each = np.subtract(rows["hypergradient"]["test_loss"], rows[difference["against"]]["test_loss"])
        assert difference["test_loss_mean"] == pytest.approx(each.mean(), abs=3e-6)
        assert difference["test_loss_seeds_better"] == (each < 0).sum()


def check_equal_inner_steps(report):
    steps = {row["name"]: row["inner_steps"] for row in report["methods"]}
    cost = report["cost"]["hypergradient_in_trainings"]
    assert 2 < cost < 6  # per step: forward, recomputed once or twice, and one Hessian product: about four
    assert steps["untuned"] == SMALL["num_steps"]
    assert steps["hypergradient"] == round(SMALL["outer_steps"] * cost * SMALL["num_steps"])
    assert steps["penalties-only"] == steps["schedule-only"] == steps["hypergradient"]
    for name in ("grid", "random"):  # rounded up, so never fewer
        assert steps["hypergradient"] <= steps[name] <= 1.5 * steps["hypergradient"]


def check_the_gradient_lowers_the_validation_loss(report):
    losses = {row["name"]: row["validation_loss"] for row in report["methods"]}
    for name in ("hypergradient", "penalties-only", "schedule-only"):
        assert losses[name] < losses["untuned"]


def check_text(report, printed, out):
    table = demo.render(report)
    assert table in printed and str(out / "report.json") in printed
    assert all(f"\n{name} " in table for name in METHODS)
    assert max(map(len, table.splitlines())) <= 120


def check_picture(path):
    from PIL import Image

    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG" and min(picture.size) > 800
        assert len(set(picture.convert("L").resize((64, 48)).tobytes())) > 20  # something is drawn


# --- the pieces -------------------------------------------------------------------------------------------------------


def settings(**changes):
    return dataclasses.replace(demo.Settings(seeds=2, num_steps=12, batch_size=16), **changes)


def test_parts_of_each_seed_are_disjoint():
    tasks, test = demo_experiment.make_tasks(settings())
    for seed in range(2):
        parts = [np.asarray(part.inputs[seed]) for part in (tasks.train, tasks.validation, test)]
        assert len(np.unique(np.concatenate(parts), axis=0)) == 1797 == sum(map(len, parts))


def test_minibatches_visit_every_image_equally_often():
    order = demo_experiment._minibatches(np.random.default_rng(0), 32, settings(num_steps=8))
    assert order.shape == (8, 16)
    assert (np.bincount(order.ravel()) == 4).all()  # 8 × 16 / 32


def test_schedule_interpolates_between_its_knots():
    log_rate = jnp.log(jnp.array([0.1, 0.4, 0.2]))
    rates = jax.vmap(lambda step: demo_experiment.learning_rate(log_rate, step, 9))(jnp.arange(9))
    np.testing.assert_allclose(rates[jnp.array([0, 2, 4, 8])], [0.1, 0.2, 0.4, 0.2], rtol=1e-6)  # step 2: √(.1 × .4)


def test_searches_cover_their_range_with_enough_trials():
    for trials in (1, 2, 7, 82):
        grid = np.exp(demo_experiment.grid_points(trials, 2, 0))
        assert len(demo_experiment.random_points(trials, 2, 0)) == trials <= len(grid)
        assert len(np.unique(grid[:, 0], axis=0)) == len(grid)
    corners = np.array([*demo_experiment.RANGES.values()]).T
    np.testing.assert_allclose([grid.min((0, 1)), grid.max((0, 1))], corners, rtol=1e-5)


def test_diverged_training_is_never_the_best():
    values = np.array([[np.nan, 0.3], [0.5, np.inf], [0.4, 0.2]])
    assert demo_experiment.best_steps(values).tolist() == [2, 2]


def test_count_arithmetic_counts_through_loops():
    def repeated(matrix):
        return jax.lax.scan(lambda x, _: (jnp.dot(matrix, x), None), matrix, None, length=5)[0]

    assert cost.count_arithmetic(repeated, jnp.ones((3, 3))) == 5 * 2 * 27

    def convolved(image, filters):  # of 6 channels in two groups, to 4
        return jax.lax.conv_general_dilated(image, filters, (1, 1), "SAME", feature_group_count=2)

    found = cost.count_arithmetic(convolved, jnp.ones((2, 6, 8, 9)), jnp.ones((4, 3, 5, 7)))
    assert found == (2 * 4 * 8 * 9) * 2 * (3 * 5 * 7)
    with pytest.raises(jaxhpo.JaxhpoError, match="while"):
        cost.count_arithmetic(lambda x: jax.lax.while_loop(lambda y: y < 3, lambda y: y + 1, x), 0.0)


@pytest.mark.parametrize(
    "column, mean, sem, expected",
    [
        ("test_loss", -0.1, 0.01, "better"),
        ("test_loss", 0.1, 0.01, "worse"),
        ("test_accuracy", 0.1, 0.01, "better"),
        ("refit_test_accuracy", -0.1, 0.01, "worse"),
        ("refit_test_loss", -0.1, 0.06, "no clear difference"),
        ("test_loss", None, 0.06, "no clear difference"),
    ],
)
def test_verdicts(column, mean, sem, expected):
    assert demo.verdict(column, mean, sem) == expected


def test_conclusions_name_a_better_method():
    ours = {"name": "hypergradient", "validation_loss": 0.1, "test_loss_mean": 0.2}
    difference = {"against": "random", "seeds": 6}
    for column in demo.COLUMNS:
        sign = 1 if column == "refit_test_loss" else -1 if column.endswith("loss") else 1
        difference |= {f"{column}_mean": sign * 0.1, f"{column}_sem": 0.01, f"{column}_seeds_better": 1}
    text = demo.conclusions([ours], [difference])
    expected = "In test loss refitted the hypergradient is worse than random (+0.100 ± 0.010, better in 1 of 6 seeds)."
    assert text[0] == expected


def test_outliers_are_pointed_out():
    def row(name, values):
        return {"name": name, "per_seed": {"refit_test_loss": values}}

    rows = [row("random", [0.15, 0.16, 0.7]), row("grid", [0.2, 0.2, 0.3]), row("hypergradient", [0.1, 0.2, 0.3])]
    (text,) = demo._outliers(rows)
    assert text.startswith("Refitted, random is unstable: its worst seed has test loss 0.700, its median seed 0.160")


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["COMMAND"]),
        (["trial"], ["demo"]),
        (["shwo", "run"], ["'shwo'", "Did you mean show?"]),
        (["demo", "--seeds", "0"], ["--seeds", "got '0'", "2 or more"]),
        (["demo", "--seeds", "1"], ["--seeds", "standard errors", "2 or more"]),
        (["demo", "--seeds", "six"], ["--seeds", "'six'", "integer"]),
        (["demo", "--outer-steps", "0"], ["--outer-steps", "1 or more"]),
        (["demo", "--seed", "-1"], ["--seed", "0 or more"]),
        (["demo", "--steps", "3"], ["--steps"]),
    ],
)
def test_invalid_arguments_are_named(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert all(word in text for word in words), text


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["--version"]])
def test_help_and_version(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    text = capsys.readouterr().out
    if arguments[0] == "--version":
        assert text.strip() == f"jaxhpo {jaxhpo.__version__}"
    if arguments[0] == "demo":
        assert all(option in text for option in ("--seeds", "--outer-steps", "--seed ", "--out ", "--quick"))


def test_options_reach_the_demo(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(demo, "run", lambda settings, out: seen.append((settings, out)))
    assert main(["demo", "--quick", "--seeds", "4", "--seed", "9", "--out", str(tmp_path)]) == 0
    assert main(["demo", "--outer-steps", "7", "--out", str(tmp_path)]) == 0
    assert seen[0] == (demo.Settings(**(QUICK | {"seeds": 4, "seed": 9})), tmp_path)
    assert seen[1] == (demo.Settings(outer_steps=7), tmp_path)


def test_out_must_not_be_a_file(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    assert main(["demo", "--out", str(file)]) == 1
    assert "name a folder" in capsys.readouterr().err


def test_interrupt_exits_with_code_130(monkeypatch, tmp_path, capsys):
    def interrupted(settings, out):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    assert main(["demo", "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_missing_extra_is_named(monkeypatch, tmp_path, capsys):
    def missing():
        raise ImportError("... pip install 'jaxhpo[demo]'")

    monkeypatch.setattr(plot, "figure", missing)
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "pip install 'jaxhpo[demo]'" in capsys.readouterr().err


def test_missing_matplotlib_says_what_to_install(monkeypatch):
    original = builtins.__import__

    def refuse(name, *rest, **more):
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install 'jaxhpo\[demo\]'"):
        plot.figure()
