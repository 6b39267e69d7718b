"""The demo's experiment: the inner problem, the searches, and the one look at the test part."""

from __future__ import annotations

import dataclasses
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
from jaxhpo._core.progress import Progress
from jaxhpo._core.validate import check_count, check_positive

MODEL = jaxhpo.models.MLP((64, 10))
PENALTY_RANGE = (1e-5, 1e-1)
RATE_RANGE = (1e-2, 1.0)
EVERYTHING = ("log_penalty", "log_rate")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the demo runs.

    The defaults were settled on the validation and held-out images of seeds 100 to 111, which the demo does not use.

    Args:
      seeds: how many repetitions, each with its own split, initial weights and minibatches; trained together by `vmap`.
      outer_steps: steps on the hyperparameters.
      seed: the first repetition's seed; the others follow it.
      num_steps: inner training steps T.
      batch_size: images in a minibatch.
      train: training images.
      validation: validation images; all others are test images.
      penalty: the untuned penalty of every weight, and where the gradient starts.
      rate: the untuned learning rate, and where the gradient starts.
      momentum: of the inner SGD.
      knots: of the learning-rate schedule.
      outer_rate: of the outer Adam.
    """

    seeds: int = 6
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

    def __post_init__(self):
        check_count("seeds", self.seeds, 2)  # one seed has no standard error
        check_count("seed", self.seed, 0)
        for name in ("outer_steps", "num_steps", "batch_size", "train", "validation", "knots"):
            check_count(name, getattr(self, name))
        for name in ("penalty", "rate", "outer_rate"):
            check_positive(name, getattr(self, name))


class Problem(NamedTuple):
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


def make_problems(settings: Settings) -> tuple[Problem, jaxhpo.data.Examples]:
    """All repetitions, stacked, and apart from them their test parts."""
    seeds = range(settings.seed, settings.seed + settings.seeds)
    splits = [jaxhpo.data.digits(seed, train=settings.train, validation=settings.validation) for seed in seeds]
    initialise = jax.jit(jax.vmap(lambda seed: MODEL.init(jax.random.key(seed), jnp.zeros((1, 64)))["params"]))
    orders = [
        np.stack([_minibatches(np.random.default_rng([seed, size]), size, settings) for seed in seeds])
        for size in (settings.train, settings.train + settings.validation)
    ]
    train, validation, test = jax.tree.map(lambda *arrays: np.stack(arrays), *splits)
    problems = Problem(initialise(np.array(seeds)), train, validation, *orders)
    return jax.tree.map(jnp.asarray, (problems, test))


def _minibatches(rng: np.random.Generator, size: int, settings: Settings) -> np.ndarray:
    """Indices of T minibatches: one shuffled pass over the examples after another, cut into batches."""
    wanted = settings.num_steps * settings.batch_size
    passes = [rng.permutation(size) for _ in range(math.ceil(wanted / size))]
    return np.concatenate(passes)[:wanted].reshape(settings.num_steps, settings.batch_size)


# --- the inner problem ------------------------------------------------------------------------------------------------


def predict(params, images) -> Any:
    """The model's logits, (images, 10)."""
    return MODEL.apply({"params": params}, images)


def cross_entropy(params, images, labels):
    """Mean cross-entropy of the model."""
    return optax.softmax_cross_entropy_with_integer_labels(predict(params, images), labels).mean()


def train_loss(params, hparams, batch):
    """Cross-entropy plus ½ Σ exp(log_penalty) w², with a penalty of its own for every weight w of every layer."""
    penalties = [
        jnp.sum(jnp.exp(log_penalty) * params[layer]["kernel"] ** 2)
        for layer, log_penalty in hparams["log_penalty"].items()
    ]
    return cross_entropy(params, *batch) + 0.5 * sum(penalties)


def learning_rate(log_rate, step, num_steps: int):
    """A schedule through knots spread evenly over training, linear in the logarithm."""
    return jnp.exp(jnp.interp(step, jnp.linspace(0, num_steps - 1, len(log_rate)), log_rate))


def fit(hparams, params, examples, order, momentum: float):
    """T steps of SGD with momentum, from `params`; differentiable with respect to `hparams`."""
    num_steps = len(order)

    def optimiser(hparams):
        return optax.sgd(lambda step: learning_rate(hparams["log_rate"], step, num_steps), momentum=momentum)

    solver = jaxhpo.from_optax(train_loss, optimiser)
    batches = jax.tree.map(lambda array: array[order], tuple(examples))
    adjoint = jaxhpo.Unroll(checkpoint="sqrt")
    return jaxhpo.solve(solver, solver.init(params, hparams), hparams, batches, adjoint=adjoint).params


def validation_loss(hparams, problem: Problem, momentum: float):
    """The outer loss: how well the weights that these hyperparameters lead to do on the validation part."""
    params = fit(hparams, problem.params, problem.train, problem.order, momentum)
    return cross_entropy(params, *problem.validation)


def constant_hparams(params, log_penalty, log_rate, knots: int) -> dict:
    """One penalty for every weight and one rate for every step, in the shape of the full hyperparameters."""
    kernels = {layer: leaves["kernel"] for layer, leaves in params.items()}
    return {
        "log_penalty": jax.tree.map(lambda kernel: jnp.full(kernel.shape, log_penalty, jnp.float32), kernels),
        "log_rate": jnp.full(knots, log_rate, jnp.float32),
    }


# --- the searches -----------------------------------------------------------------------------------------------------


class Search(NamedTuple):
    """What a method found, for each seed.

    Attributes:
      hparams: those of the lowest validation loss.
      values: (evaluations, seeds) validation losses, in order.
      seconds: wall time, all seeds together, without compilation.
      best_point: (seeds, 2) log-penalty and log-rate, for methods that try points.
    """

    hparams: dict
    values: np.ndarray
    seconds: float
    best_point: np.ndarray | None = None


def best(values: np.ndarray) -> np.ndarray:
    """For each seed the index of the lowest value; a diverged training never wins."""
    return np.where(np.isfinite(values), values, np.inf).argmin(axis=0)


def _told(values: list[np.ndarray], began: float) -> str:
    lowest = np.min(np.where(np.isfinite(values), values, np.inf), axis=0)
    return f"validation loss {lowest.mean():.4f}, {time.perf_counter() - began:.1f} s"


def try_points(evaluate: Callable, points: np.ndarray, problems: Problem, knots: int, name: str) -> Search:
    """Trains every seed with each of its (log-penalty, log-rate) points, an array (trials, seeds, 2)."""
    start = time.perf_counter()
    spread = jax.jit(jax.vmap(lambda params, point: constant_hparams(params, point[0], point[1], knots)))
    values = []
    with Progress(len(points), name) as progress:
        for point in points:
            values.append(np.asarray(evaluate(spread(problems.params, point), problems)))
            progress.update(_told(values, start))
    values = np.stack(values)
    chosen = points[best(values), np.arange(points.shape[1])]
    return Search(spread(problems.params, chosen), values, time.perf_counter() - start, chosen)


def random_points(trials: int, seeds: int, seed: int) -> np.ndarray:
    """Log-uniform (log-penalty, log-rate) pairs, other ones for every seed."""
    low, high = np.log([PENALTY_RANGE, RATE_RANGE]).T
    return np.random.default_rng([seed, 7]).uniform(low, high, (trials, seeds, 2)).astype(np.float32)


def grid_points(trials: int, seeds: int, seed: int) -> np.ndarray:
    """An even grid of at least `trials` points in logarithms, visited in shuffled order (other ones for every seed)."""
    rates = max(1, math.isqrt(trials))
    penalties = math.ceil(trials / rates)
    grid = np.stack(np.meshgrid(_even(PENALTY_RANGE, penalties), _even(RATE_RANGE, rates)), axis=-1).reshape(-1, 2)
    rng = np.random.default_rng([seed, 8])
    return np.stack([rng.permutation(grid) for _ in range(seeds)], axis=1).astype(np.float32)


def _even(limits: tuple[float, float], count: int) -> np.ndarray:
    low, high = np.log(limits)
    return np.linspace(low, high, count) if count > 1 else np.array([(low + high) / 2])


def descend(gradient: Callable, start: dict, problems: Problem, settings: Settings, tuned, name: str) -> Search:
    """Adam on the hyperparameters named in `tuned`, all seeds at once; for each seed the best iterate is kept."""
    began = time.perf_counter()
    tx = optax.chain(optax.clip(1.0), optax.adam(settings.outer_rate))  # elementwise, so seeds do not mix

    @jax.jit
    def update(hparams, opt_state, hypergrad):
        for name in set(hparams) - set(tuned):
            hypergrad = hypergrad | {name: jax.tree.map(jnp.zeros_like, hypergrad[name])}
        updates, opt_state = tx.update(hypergrad, opt_state)
        return optax.apply_updates(hparams, updates), opt_state

    hparams, opt_state, visited, values = start, tx.init(start), [], []
    with Progress(settings.outer_steps, name) as progress:
        for _ in range(settings.outer_steps):
            value, hypergrad = gradient(hparams, problems)
            visited.append(hparams)
            values.append(np.asarray(value))
            hparams, opt_state = update(hparams, opt_state, hypergrad)
            progress.update(_told(values, began))
    chosen, seeds = best(np.stack(values)), np.arange(settings.seeds)
    selected = jax.tree.map(lambda *leaves: jnp.stack(leaves)[chosen, seeds], *visited)
    return Search(selected, np.stack(values), time.perf_counter() - began)


# --- the end ----------------------------------------------------------------------------------------------------------


class Scores(NamedTuple):
    """Test figures of one method, each (seeds,): as selected, and refitted on training + validation."""

    test_loss: Any
    test_accuracy: Any
    refit_test_loss: Any
    refit_test_accuracy: Any


def score(selected: dict, problems: Problem, test: jaxhpo.data.Examples, momentum: float) -> dict[str, Scores]:
    """Looks at the test part: the only function that does, called once, after every choice has been made.

    Both figures train for the same T steps, from the same initial weights, with the selected hyperparameters: "as
    selected" on the training part, "refitted" on training + validation.
    """

    def scores(hparams, problem, test):
        both = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), problem.train, problem.validation)
        as_selected = fit(hparams, problem.params, problem.train, problem.order, momentum)
        refitted = fit(hparams, problem.params, both, problem.refit_order, momentum)
        return Scores(*_loss_and_accuracy(as_selected, test), *_loss_and_accuracy(refitted, test))

    compiled = jax.jit(jax.vmap(scores))
    found = {}
    with Progress(len(selected), "test part, all methods") as progress:
        for name, hparams in selected.items():
            found[name] = jax.tree.map(np.asarray, compiled(hparams, problems, test))
            progress.update(name)
    return found


def _loss_and_accuracy(params, examples):
    predicted = predict(params, examples.inputs).argmax(axis=-1)
    return cross_entropy(params, *examples), jnp.mean(predicted == examples.targets)
