"""The demo's experiment: the inner problem, the searches, and the single evaluation on the test part."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxhpo
import jaxhpo.data
import jaxhpo.models
from jaxhpo._core.cost import count_arithmetic
from jaxhpo._core.progress import Progress, say

MODEL = jaxhpo.models.MLP((64, 10))
RANGES = {"penalty": (1e-5, 1e-1), "rate": (1e-2, 1.0)}  # of the searches
BASELINES = ("untuned", "grid", "random")
OURS = "hypergradient"
# What is tuned by its gradient, in each of the methods that do so.
TUNED = {OURS: ("log_penalty", "log_rate"), "penalties-only": ("log_penalty",), "schedule-only": ("log_rate",)}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the demo.

    The defaults were chosen on the validation and held-out images of seeds 100 to 111, which the demo does not use.

    Args:
      seeds: number of repetitions, each with its own split, initial weights and minibatches; `vmap` trains them
        together.
      outer_steps: steps on the hyperparameters.
      seed: the first repetition's seed; the others follow it.
      num_steps: inner training steps T.
      batch_size: images per minibatch.
      train: number of training images.
      validation: number of validation images; all others are test images.
      penalty: the untuned penalty of every weight, where the gradient starts.
      rate: the untuned learning rate, where the gradient starts.
      momentum: of the inner SGD.
      knots: of the learning-rate schedule.
      outer_rate: learning rate of the outer Adam.
      ablations: whether the penalties and the schedule are also tuned alone.
    """

    seeds: int = 12
    outer_steps: int = 20
    seed: int = 0
    num_steps: int = 100
    batch_size: int = 64
    train: int = 200
    validation: int = 300
    penalty: float = 5e-3
    rate: float = 0.05
    momentum: float = 0.9
    knots: int = 8
    outer_rate: float = 0.1
    ablations: bool = True


class Task(NamedTuple):
    """One repetition, without its test part; with a leading axis, all of them.

    Attributes:
      params: initial weights.
      train: training images and labels.
      validation: validation images and labels.
      order: (T, batch) indices into `train`.
      refit_order: (T, batch) indices into `train` followed by `validation`.
    """

    params: Any
    train: jaxhpo.data.Examples
    validation: jaxhpo.data.Examples
    order: Any
    refit_order: Any


def make_tasks(settings: Settings) -> tuple[Task, jaxhpo.data.Examples]:
    """All repetitions, stacked, and separately their test parts."""
    seeds = range(settings.seed, settings.seed + settings.seeds)
    splits = [jaxhpo.data.digits(seed, train=settings.train, validation=settings.validation) for seed in seeds]
    # A loop: under `vmap` the bits of random numbers take twice as long to compile.
    initial = lambda seed: MODEL.init(jax.random.key(seed), jnp.zeros((1, 64)))["params"]  # noqa: E731
    params = jax.jit(functools.partial(jax.lax.map, initial))(np.array(seeds))
    orders = [
        np.stack([_minibatches(np.random.default_rng([seed, size]), size, settings) for seed in seeds])
        for size in (settings.train, settings.train + settings.validation)
    ]
    train, validation, test = jax.tree.map(lambda *arrays: np.stack(arrays), *splits)
    return jax.tree.map(jnp.asarray, (Task(params, train, validation, *orders), test))


def _minibatches(rng: np.random.Generator, size: int, settings: Settings) -> np.ndarray:
    """Indices of T minibatches: shuffled passes over the examples, concatenated and cut into batches."""
    wanted = settings.num_steps * settings.batch_size
    passes = [rng.permutation(size) for _ in range(math.ceil(wanted / size))]
    return np.concatenate(passes)[:wanted].reshape(settings.num_steps, settings.batch_size)


# --- the inner problem ------------------------------------------------------------------------------------------------


def cross_entropy(model, params, images, labels):
    """Mean cross-entropy of a model."""
    logits: Any = model.apply({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train_loss(params, hparams, batch):
    """Cross-entropy plus ½ Σ exp(log_penalty) w², with a penalty of its own for every weight w of every layer."""
    penalties = [jnp.sum(jnp.exp(p) * params[layer]["kernel"] ** 2) for layer, p in hparams["log_penalty"].items()]
    return cross_entropy(MODEL, params, *batch) + 0.5 * sum(penalties)


def learning_rate(log_rate, step, num_steps: int):
    """A schedule through knots spread evenly over training, linear in the logarithm."""
    return jnp.exp(jnp.interp(step, jnp.linspace(0, num_steps - 1, len(log_rate)), log_rate))


def fit(hparams, params, examples, order, momentum: float):
    """T steps of SGD with momentum from `params`, differentiable with respect to `hparams`."""

    def optimiser(hparams):
        return optax.sgd(lambda step: learning_rate(hparams["log_rate"], step, len(order)), momentum=momentum)

    solver = jaxhpo.from_optax(train_loss, optimiser)
    batches = jax.tree.map(lambda array: array[order], tuple(examples))
    adjoint = jaxhpo.Unroll(checkpoint="sqrt")
    return jaxhpo.solve(solver, solver.init(params, hparams), hparams, batches, adjoint=adjoint).params


def validation_loss(hparams, task: Task, momentum: float):
    """The outer loss: cross-entropy on the validation part after training with these hyperparameters."""
    params = fit(hparams, task.params, task.train, task.order, momentum)
    return cross_entropy(MODEL, params, *task.validation)


def constant_hparams(params, point, knots: int) -> dict:
    """The same log-penalty for every weight and log-rate for every step, in the shape of the full hyperparameters."""
    penalties = {layer: jnp.full(leaves["kernel"].shape, point[0], jnp.float32) for layer, leaves in params.items()}
    return {"log_penalty": penalties, "log_rate": jnp.full(knots, point[1], jnp.float32)}


# --- the searches -----------------------------------------------------------------------------------------------------


def search(tasks: Task, settings: Settings) -> tuple[dict[str, jaxhpo.TuneResult], dict]:
    """Each method's result, without a look at the test part, and the cost of a hypergradient in trainings."""
    untuned = np.log([settings.penalty, settings.rate]).astype(np.float32)
    start = jax.vmap(functools.partial(constant_hparams, point=untuned, knots=settings.knots))(tasks.params)
    num_hparams = sum(leaf[0].size for leaf in jax.tree.leaves(start))
    say(f"{settings.seeds} seeds, {num_hparams} hyperparameters, {settings.num_steps} inner steps per training")
    outer_loss = functools.partial(validation_loss, momentum=settings.momentum)
    first = jax.tree.map(lambda leaf: leaf[0], (start, tasks))
    ratio = count_arithmetic(jax.value_and_grad(outer_loss), *first) / count_arithmetic(outer_loss, *first)
    trials = math.ceil(settings.outer_steps * round(ratio, 3))  # as many inner steps as the hypergradient takes

    say("compiling ...")
    began = time.perf_counter()
    evaluate = jax.jit(jax.vmap(outer_loss)).lower(start, tasks).compile()
    compile_seconds = time.perf_counter() - began
    points = {
        "untuned": np.tile(untuned, (1, settings.seeds, 1)),
        "grid": grid_points(trials, settings.seeds, settings.seed),
        "random": random_points(trials, settings.seeds, settings.seed),
    }
    results = {name: try_points(evaluate, p, tasks, settings.knots, name) for name, p in points.items()}
    for name in TUNED if settings.ablations else (OURS,):
        say(name)
        results[name] = descend(start, tasks, settings, TUNED[name])
        compile_seconds += time_of(results[name])[1]
    training, hypergradient = (
        time_of(results[name])[0] / len(results[name].history["value"]) for name in ("random", OURS)
    )
    return results, {
        "hypergradient_in_trainings": round(ratio, 3),
        "how": "floating-point operations of the traced programs, one hypergradient over one training",
        "hypergradient_in_trainings_by_time": round(hypergradient / training, 2),
        "compile_seconds": round(compile_seconds, 2),
        "trials": trials,
    }


def descend(start: dict, tasks: Task, settings: Settings, tuned: tuple[str, ...]) -> jaxhpo.TuneResult:
    """Adam on the hyperparameters named in `tuned`, for all seeds at once; the others stay at `start`."""
    fixed = {name: leaf for name, leaf in start.items() if name not in tuned}

    def outer_loss(hparams, carry, key):
        del key
        fixed, task = carry
        return validation_loss(fixed | hparams, task, settings.momentum), carry, {}

    result = jaxhpo.tune(
        outer_loss,
        {name: start[name] for name in tuned},
        optax.chain(optax.clip(1.0), optax.adam(settings.outer_rate)),
        num_steps=settings.outer_steps,
        population=settings.seeds,
        carry=(fixed, tasks),
        score_window=1,  # the loss does not depend on the key
    )
    return result._replace(best_hparams=fixed | result.best_hparams)


def try_points(evaluate: Callable, points: np.ndarray, tasks: Task, knots: int, name: str) -> jaxhpo.TuneResult:
    """Train every seed with each of its (log-penalty, log-rate) points, an array (trials, seeds, 2)."""
    began = time.perf_counter()
    spread = jax.jit(jax.vmap(functools.partial(constant_hparams, knots=knots)))
    values, seconds = [], []
    with Progress(len(points), name) as progress:
        for point in points:
            values.append(np.asarray(evaluate(spread(tasks.params, point), tasks)))
            seconds.append(time.perf_counter() - began)
            progress.update(f"{seconds[-1]:.1f} s")
    history = {"value": np.stack(values), "seconds": np.array(seconds)}
    best, seeds = best_steps(history["value"]), np.arange(points.shape[1])
    hparams = spread(tasks.params, points[best, seeds])
    return jaxhpo.TuneResult(hparams, None, hparams, history["value"][best, seeds], best, history, "finished", name)


def best_steps(values: np.ndarray) -> np.ndarray:
    """For each seed the index of the lowest value; a diverged training is never the best."""
    return np.where(np.isfinite(values), values, np.inf).argmin(axis=0)


def random_points(trials: int, seeds: int, seed: int) -> np.ndarray:
    """Log-uniform (log-penalty, log-rate) pairs, different for every seed."""
    low, high = np.log([*RANGES.values()]).T
    return np.random.default_rng([seed, 7]).uniform(low, high, (trials, seeds, 2)).astype(np.float32)


def grid_points(trials: int, seeds: int, seed: int) -> np.ndarray:
    """An even grid of at least `trials` points in logarithms, shuffled differently for every seed."""
    rates = max(1, math.isqrt(trials))
    counts = math.ceil(trials / rates), rates
    axes = [
        np.linspace(low, high, count) if count > 1 else np.array([(low + high) / 2])
        for (low, high), count in zip(np.log([*RANGES.values()]), counts, strict=True)
    ]
    grid, rng = np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2), np.random.default_rng([seed, 8])
    return np.stack([rng.permutation(grid) for _ in range(seeds)], axis=1).astype(np.float32)


def time_of(result: jaxhpo.TuneResult) -> tuple[float, float]:
    """Seconds of a search without compilation, and those of compilation.

    The first step compiles. Its own time is taken to be the mean of the others.
    """
    elapsed = result.history["seconds"]
    if len(elapsed) == 1:
        return elapsed[0], 0.0
    each = (elapsed[-1] - elapsed[0]) / (len(elapsed) - 1)
    return each * len(elapsed), max(0.0, elapsed[0] - each)


# --- the test part ----------------------------------------------------------------------------------------------------


def score(selected: dict[str, dict], tasks: Task, test: jaxhpo.data.Examples, momentum: float) -> dict[str, dict]:
    """Evaluate on the test part: the only function that does, called once, after every choice has been made.

    All figures come from T training steps, from the same initial weights, with the selected hyperparameters: "as
    selected" on the training part, "refitted" on training + validation. Each is an array (seeds,).
    """

    def scores(hparams, task, test):
        both = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), task.train, task.validation)

        def after_training(order):
            params = fit(hparams, task.params, both, order, momentum)
            predicted = jnp.argmax(MODEL.apply({"params": params}, test.inputs), axis=-1)  # type: ignore[arg-type]
            return cross_entropy(MODEL, params, *test), jnp.mean(predicted == test.targets)

        # A loop: two trainings of one shape are compiled once. `order` is of the training part, the first of both.
        losses, accuracies = jax.lax.map(after_training, jnp.stack([task.order, task.refit_order]))
        names = ("test_loss", "refit_test_loss"), ("test_accuracy", "refit_test_accuracy")
        return dict(zip(names[0], losses, strict=True)) | dict(zip(names[1], accuracies, strict=True))

    compiled = jax.jit(jax.vmap(scores))
    return {name: jax.tree.map(np.asarray, compiled(hparams, tasks, test)) for name, hparams in selected.items()}
