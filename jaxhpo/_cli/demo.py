"""`jaxhpo demo`: about 5000 hyperparameters tuned by their gradient, compared with a grid and random search."""

from __future__ import annotations

import functools
import json
import math
import pathlib
import sys
import time

import jax
import numpy as np

from jaxhpo import plot
from jaxhpo._cli import demo_experiment, demo_picture, demo_report
from jaxhpo._cli.demo_experiment import Settings as Settings
from jaxhpo._core.cost import count_arithmetic


def run(settings: Settings, out: pathlib.Path) -> dict:
    """Run every method, print the table, and write `report.json` and `demo.png`.

    Args:
      settings: of the demo.
      out: an existing folder.

    Returns:
      The contents of `report.json`.

    Raises:
      ImportError: without scikit-learn or matplotlib, before anything is trained.
    """
    began = time.perf_counter()
    plot.figure()  # raises now, not after the training, if matplotlib is missing
    tasks, test = demo_experiment.make_tasks(settings)
    untuned = np.log([settings.penalty, settings.rate]).astype(np.float32)
    spread = functools.partial(demo_experiment.constant_hparams, point=untuned, knots=settings.knots)
    start = jax.vmap(spread)(tasks.params)
    size = sum(leaf[0].size for leaf in jax.tree.leaves(start))
    _say(f"{settings.seeds} seeds, {size} hyperparameters, {settings.num_steps} inner steps per training")

    results, cost = _search(start, tasks, settings, untuned)
    selected = {name: result.best_hparams for name, result in results.items()}
    scores = demo_experiment.score(selected, tasks, test, settings.momentum)
    report = demo_report.make(settings, results, scores, cost, size)
    print(demo_report.render(report), flush=True)
    demo_picture.draw(report, results, scores, tasks, out / "demo.png")
    report["seconds"] = round(time.perf_counter() - began, 1)
    (out / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(f"\nWritten: {out / 'report.json'}, {out / 'demo.png'}. Took {report['seconds']:.0f} s.")
    return report


def _search(start, tasks, settings, untuned) -> tuple[dict, dict]:
    """Each method's result, without a look at the test part, and the cost of a hypergradient in trainings."""
    outer_loss = functools.partial(demo_experiment.validation_loss, momentum=settings.momentum)
    first = jax.tree.map(lambda leaf: leaf[0], (start, tasks))
    ratio = count_arithmetic(jax.value_and_grad(outer_loss), *first) / count_arithmetic(outer_loss, *first)
    trials = math.ceil(settings.outer_steps * round(ratio, 3))  # as many inner steps as the hypergradient takes

    _say("compiling ...")
    began = time.perf_counter()
    evaluate = jax.jit(jax.vmap(outer_loss)).lower(start, tasks).compile()
    compile_seconds = time.perf_counter() - began
    points = {
        "untuned": np.tile(untuned, (1, settings.seeds, 1)),
        "grid": demo_experiment.grid_points(trials, settings.seeds, settings.seed),
        "random": demo_experiment.random_points(trials, settings.seeds, settings.seed),
    }
    tuned = {
        demo_report.OURS: ("log_penalty", "log_rate"),
        "penalties-only": ("log_penalty",),
        "schedule-only": ("log_rate",),
    }
    results = {name: demo_experiment.try_points(evaluate, p, tasks, settings.knots, name) for name, p in points.items()}
    for name, names in tuned.items():
        _say(f"{name}: compiling ...")
        results[name] = demo_experiment.descend(start, tasks, settings, names)
        compile_seconds += demo_experiment.time_of(results[name])[1]
    training, hypergradient = (
        demo_experiment.time_of(results[name])[0] / len(results[name].history["value"])
        for name in ("random", demo_report.OURS)
    )
    cost = {
        "hypergradient_in_trainings": round(ratio, 3),
        "how": "floating-point operations of the traced programs, one hypergradient over one training",
        "hypergradient_in_trainings_by_time": round(hypergradient / training, 2),
        "compile_seconds": round(compile_seconds, 2),
        "trials": trials,
    }
    return results, cost


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
