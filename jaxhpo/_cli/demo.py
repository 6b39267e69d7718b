"""`jaxhpo demo`: five thousand hyperparameters tuned by their gradient, against a grid and random search."""

from __future__ import annotations

import functools
import math
import pathlib
import sys
import time

import jax
import numpy as np

from jaxhpo import plot
from jaxhpo._cli import demo_experiment, demo_picture, demo_report
from jaxhpo._cli.demo_experiment import Settings as Settings
from jaxhpo._core.cost import count_arithmetic, fastest


def run(settings: Settings, out: pathlib.Path) -> dict:
    """Runs every method, prints the table, and writes `report.json` and `demo.png`.

    Args:
      settings: what to run.
      out: an existing folder.

    Returns:
      What was written into `report.json`.

    Raises:
      ImportError: without scikit-learn or matplotlib, before anything is trained.
    """
    began = time.perf_counter()
    plot.figure()  # a missing matplotlib is to be known now, not after the training
    problems, test = demo_experiment.make_problems(settings)
    start = _untuned(problems, settings)
    size = sum(leaf[0].size for leaf in jax.tree.leaves(start))
    _say(f"{settings.seeds} seeds, {size} hyperparameters, {settings.num_steps} inner steps a training; compiling ...")

    evaluate, gradient, cost = _prepare(start, problems, settings)
    trials = math.ceil(settings.outer_steps * cost["hypergradient_in_trainings"])
    searches = _search(evaluate, gradient, start, problems, settings, trials)
    scores = demo_experiment.score(
        {name: search.hparams for name, search in searches.items()}, problems, test, settings.momentum
    )
    report = demo_report.make(settings, searches, scores, cost, trials, size)
    print(demo_report.render(report), flush=True)
    demo_picture.draw(report, searches, scores, problems, out / "demo.png")
    report["seconds"] = round(time.perf_counter() - began, 1)
    demo_report.write(report, out / "report.json")
    print(f"\nWritten: {out / 'report.json'}, {out / 'demo.png'}. Took {report['seconds']:.0f} s.")
    return report


def _untuned(problems, settings):
    constant = functools.partial(demo_experiment.constant_hparams, knots=settings.knots)
    logs = math.log(settings.penalty), math.log(settings.rate)
    return jax.vmap(lambda params: constant(params, *logs))(problems.params)


def _prepare(start, problems, settings):
    """The compiled outer loss and hypergradient of all seeds, and what the second costs in units of the first."""
    outer_loss = functools.partial(demo_experiment.validation_loss, momentum=settings.momentum)
    with_gradient = jax.value_and_grad(outer_loss)
    first = jax.tree.map(lambda leaf: leaf[0], (start, problems))
    ratio = count_arithmetic(with_gradient, *first) / count_arithmetic(outer_loss, *first)

    began = time.perf_counter()
    evaluate = jax.jit(jax.vmap(outer_loss)).lower(start, problems).compile()
    gradient = jax.jit(jax.vmap(with_gradient)).lower(start, problems).compile()
    compiled = time.perf_counter()
    seconds = fastest([evaluate, gradient], start, problems)
    cost = {
        "hypergradient_in_trainings": round(ratio, 3),
        "how": "floating-point operations of the traced programs, one hypergradient over one training",
        "hypergradient_in_trainings_by_time": round(seconds[1] / seconds[0], 2),
        "compile_seconds": round(compiled - began, 2),
    }
    return evaluate, gradient, cost


def _search(evaluate, gradient, start, problems, settings, trials):
    """Every method's choice of hyperparameters; none sees the test part."""
    points = np.log([[settings.penalty, settings.rate]]).astype(np.float32)
    untuned = np.repeat(points[None], settings.seeds, axis=1)
    try_points = functools.partial(demo_experiment.try_points, evaluate, problems=problems, knots=settings.knots)
    descend = functools.partial(demo_experiment.descend, gradient, start, problems, settings)
    return {
        "untuned": try_points(untuned, name="untuned"),
        "grid": try_points(demo_experiment.grid_points(trials, settings.seeds, settings.seed), name="grid"),
        "random": try_points(demo_experiment.random_points(trials, settings.seeds, settings.seed), name="random"),
        "hypergradient": descend(demo_experiment.EVERYTHING, "hypergradient"),
        "penalties-only": descend(("log_penalty",), "penalties-only"),
        "schedule-only": descend(("log_rate",), "schedule-only"),
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
