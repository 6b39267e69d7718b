"""Stochastic bilevel methods on three problems of the field's benchmark, at equal oracle calls.

benchmark_bilevel (Dagréou, Ablin, Vaiter, Moreau 2022; github.com/benchopt/benchmark_bilevel):

    quadratic   4096 and 1024 samples whose Hessians have rank one, spectra from .1 to 1; 100 inner and 10 outer
                variables, whose value function is known in closed form
    ijcnn1      logistic regression on 49 990 rows with a log penalty for each of 22 features, validated on 91 701 rows
    cleaning    softmax regression on 19 968 images of MNIST, half of whose labels are drawn anew, with a weight for
                each image and a penalty of .2, validated on 4992; "cleaning .7" and "cleaning .9" draw more labels

All take minibatches of 64, drawn with replacement. A call is a gradient or a product on one sample, as the benchmark
counts: SOBA makes 5 · 64 of them an update, what takes means over all samples counts those. What is measured is h(x),
the outer loss at the exact inner solution for the hyperparameters x of the moment, computed in float64 (by Newton's
method on ijcnn1, by L-BFGS to a gradient of 1e-7 in cleaning), less the lowest known, and on the quadratic |∇h|². Of
cleaning no lowest is known: h itself, and the errors of that solution on the validation images and on 10 000 of MNIST's
test images, beside trainings without weights, on the right labels alone, on the validation images alone, and on both
parts, all with the penalty of the problem. (The benchmark's own curves are of |∇h|², which on ijcnn1 rises while h
falls, of one sample's loss on the quadratic, and in cleaning of the errors of whatever parameters the method has.)

The two steps of each method, of (θ, v) and of h, are those of lowest h at the end on other seeds (five from 100 on, of
cleaning two), among 48 pairs (12 of cleaning); a pair that diverges for one of them is out. They are constant but for
some whose steps fall with the updates t: SOBA, FSLA and BSA t^-1/2; TTSA t^-2/5 and t^-3/5; MRBO and SUSTAIN t^-1/3;
F2SA t^-4/7 (its second copy t^-5/7); F3SA t^-2/5 (t^-3/5). AmIGO, StocBiO, BSA, F2SA and BOME take ten inner steps an
update, and VRBO moves h at each tenth; a series has ten terms. SingleLoop's methods move θ and h at once: VRBO's h
moves together with the last of ten steps of θ, not after it.

Not here: covtype, which no folder of `JAXHPO_DATA_DIR` has; and the published code, which is in no package: where it
ends is compared in `tests/single_loop/test_published.py`, on the same minibatches. Methods that it has not (F3SA), or
whose chance is drawn otherwise (BSA, TTSA, SUSTAIN, VRBO), are compared with their updates written out, of one
minibatch, in `test_compositions.py`.

    python benchmarks/bilevel.py [--out DIR] [--quick] [--seeds 5] [--problems NAME ...] [--methods NAME ...]

Rows of other problems and methods stay as the folder has them.
"""

import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
import scipy.special
from _arguments import parse

import jaxhpo
import jaxhpo.data
from jaxhpo import plot, single_loop
from jaxhpo.single_loop import (
    F2SA,
    MASOBA,
    SABA,
    SARAH,
    SOBA,
    SPABA,
    STORM,
    AmIGO,
    FiniteSum,
    InTurn,
    PerVariable,
    Point,
    SingleLoop,
    StocBiO,
    penalty_sums,
    series_sums,
)

BATCH, INNER, TERMS, POINTS = 64, 10, 10, 20
FIRST_TUNED_ON = 100


class Problem(NamedTuple):
    """A bilevel problem with an exact value function.

    Attributes:
      train: arrays of the inner sum.
      validation: arrays of the outer sum.
      train_loss: `(z, x, batch)`.
      outer_loss: `(z, x, batch)`.
      start: `key -> (z, x)`.
      value: `(x, rough) -> numbers`, in float64 unless rough; steps are chosen by the first.
      names: of these numbers.
      calls: the budget.
      points: moments at which they are measured.
      steps: of θ and v, to choose from.
      ratios: of the step of h to that, to choose from.
      tuned_on: number of seeds by which steps are chosen.
      limit: of |x|, beyond which a run diverged.
      controls: `() -> {name: numbers}` of trainings without hyperparameters.
      own: `z -> number`, of the parameters that a method has in the end; the error on test images.
    """

    train: tuple
    validation: tuple
    train_loss: Callable
    outer_loss: Callable
    start: Callable
    value: Callable
    names: tuple[str, ...] = ("suboptimality", "gradient")
    calls: float = 1e6
    points: int = POINTS
    steps: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    ratios: tuple[float, ...] = (0.02, 0.1, 0.5, 2.0, 10.0, 50.0)
    tuned_on: int = 5
    limit: float = 100.0
    controls: Callable = dict
    own: Callable | None = None


# --- problems ---------------------------------------------------------------------------------------------------------


def spread(rng, size, low, high, null=0):
    """The symmetric root of a matrix with eigenvalues from low to high, and some of zero."""
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
    roots = np.r_[np.zeros(null), np.logspace(math.log10(low) / 2, math.log10(high) / 2, size - null)]
    return basis * roots @ basis.T


def samples(rng, num, inner, outer):
    """Vectors a, b, c, d, p, q of samples ½ (a·z)² + ½ (b·x)² + (c·x)(d·z) + p·z + q·x."""
    a = rng.normal(size=(num, inner)) @ spread(rng, inner, 0.1, 1.0)
    b = rng.normal(size=(num, outer)) @ spread(rng, outer, 0.1, 1.0, null=1)
    left, _, right = np.linalg.svd(rng.normal(size=(outer, inner)))
    scales = np.zeros((outer, inner))
    np.fill_diagonal(scales, np.logspace(-1, -1, min(outer, inner)))
    noise = rng.normal(size=(num, inner))
    return (
        a,
        b,
        noise @ (left @ scales).T,
        noise @ right.T,
        rng.normal(size=(num, inner)),
        rng.normal(size=(num, outer)),
    )


def matrices(rows):
    """The means of Hessians, mixed derivatives and linear terms over all samples."""
    a, b, c, d, p, q = (np.asarray(x, float) for x in rows)
    n = len(a)
    return a.T @ a / n, b.T @ b / n, c.T @ d / n, p.mean(0), q.mean(0)


def quadratic(quick: bool) -> Problem:
    rng = np.random.default_rng(2442)
    while True:  # until the value function is convex
        train, validation = samples(rng, 1024 if quick else 4096, 100, 10), samples(rng, 1024, 100, 10)
        (zz, _, xz, p, _), (f_zz, f_xx, f_xz, f_p, f_q) = matrices(train), matrices(validation)
        slope = -np.linalg.solve(zz, xz.T)  # z* = slope x + offset
        offset = -np.linalg.solve(zz, p)
        hessian = slope.T @ f_zz @ slope + f_xx + f_xz @ slope + (f_xz @ slope).T
        if np.linalg.eigvalsh(hessian)[0] > 1e-3:
            break

    def value(x, rough=False):
        x = np.asarray(x, float)
        z = slope @ x + offset
        by_z = f_zz @ z + f_xz.T @ x + f_p
        h = 0.5 * z @ f_zz @ z + 0.5 * x @ f_xx @ x + x @ f_xz @ z + f_p @ z + f_q @ x
        return h - lowest, float(np.sum((slope.T @ by_z + f_xx @ x + f_xz @ z + f_q) ** 2))

    def loss(z, x, batch):
        a, b, c, d, p, q = batch
        return jnp.mean(0.5 * (a @ z) ** 2 + 0.5 * (b @ x) ** 2 + (c @ x) * (d @ z) + p @ z + q @ x)

    gradient = slope.T @ (f_zz @ offset + f_p) + f_xz @ offset + f_q  # of h at x = 0
    lowest = 0.0
    lowest, _ = value(-np.linalg.solve(hessian, gradient))
    start = lambda key: (jnp.zeros(100), jnp.full(10, -2.0))  # noqa: E731
    as_arrays = lambda rows: tuple(np.asarray(x, np.float32) for x in rows)  # noqa: E731
    parts = as_arrays(train), as_arrays(validation)
    return Problem(*parts, loss, loss, start, value, calls=5e4 if quick else 1.1e6)


def ijcnn1(quick: bool) -> Problem:
    rows = jaxhpo.data.ijcnn1()
    if quick:
        rows = type(rows)(*(jaxhpo.data.Examples(part.inputs[:6400], part.targets[:6400]) for part in rows))
    (x_in, y_in), (x_out, y_out) = (tuple(np.asarray(a, float) for a in part) for part in rows)

    def logistic(z, x, y):
        """Loss, gradient and the weights of the Hessian, in float64."""
        margin = -y * (x @ z)
        weight = 1 / (1 + np.exp(-margin))
        return np.mean(np.logaddexp(0, margin)), -(x.T @ (y * weight)) / len(y), weight * (1 - weight) / len(y)

    warm = {"z": np.zeros(22)}

    def newton(x):
        """(h, ∇h)."""
        penalty, z = np.exp(np.asarray(x, float)), warm["z"]
        for _ in range(50):  # Newton's method, from the last solution
            _, grad, weight = logistic(z, x_in, y_in)
            hessian = (x_in.T * weight) @ x_in + np.diag(penalty)
            step = np.linalg.solve(hessian, grad + penalty * z)
            z = z - step
            if np.linalg.norm(step) < 1e-10 * (1 + np.linalg.norm(z)):
                break
        else:
            warm["z"] = np.zeros(22)
            return math.nan, np.full(22, math.nan)
        warm["z"] = z
        h, by_z, _ = logistic(z, x_out, y_out)
        return h, -penalty * z * np.linalg.solve(hessian, by_z)

    def value(x, rough=False):
        h, grad = newton(x)
        return h - lowest, float(grad @ grad)

    def loss(z, batch):
        return jnp.mean(jnp.logaddexp(0.0, -batch[1] * (batch[0] @ z)))

    def start(key):
        first, second = jax.random.split(key)
        return jax.random.normal(first, (22,)), jnp.log(jax.random.uniform(second, (22,), minval=1e-3))

    # h is not convex: L-BFGS from -4, -6, -8 and -10 ends at .20363, .20479, .20350 and .20350.
    options = {"ftol": 0.0, "gtol": 1e-9, "maxcor": 30, "maxiter": 1000}
    found = scipy.optimize.minimize(newton, np.full(22, -8.0), jac=True, bounds=[(-30, 30)] * 22, options=options)
    lowest = float(found.fun)
    cut = lambda part: tuple(a[: len(a) - len(a) % BATCH] for a in part)  # noqa: E731
    train_loss = lambda z, x, batch: loss(z, batch) + 0.5 * jnp.sum(jnp.exp(x) * z**2)  # noqa: E731
    outer = lambda z, x, batch: loss(z, batch)  # noqa: E731
    return Problem(cut(rows.train), cut(rows.test), train_loss, outer, start, value, calls=1e5 if quick else 3e7)


class Softmax:
    """Weighted softmax regression with the penalty reg |z|², solved in float64."""

    def __init__(self, images, labels, reg):
        self.images, self.labels, self.reg = np.asarray(images, float), labels, reg
        self.rough = np.asarray(images, np.float32)

    def loss(self, z, weights, images):
        """The mean loss and its gradient."""
        n = len(images)
        logits = images @ z
        logits -= logits.max(1, keepdims=True)
        of_label = logits[np.arange(n), self.labels]
        total = np.exp(logits).sum(1)
        residual = np.exp(logits) / total[:, None]
        residual[np.arange(n), self.labels] -= 1
        slope = images.T @ ((weights / n)[:, None].astype(images.dtype) * residual)
        return float(np.mean(weights * (np.log(total) - of_label))), slope

    def solve(self, weights, start=None, rough=False):
        """The minimiser for these weights; NaN where the gradient stays above 1e-6."""
        images, tol = (self.rough, 1e-4) if rough else (self.images, 1e-7)
        shape = images.shape[1], 10
        if not rough:  # for less than half of the time
            start = self.solve(weights, start, rough=True)

        def objective(flat):
            z = flat.reshape(shape)
            loss, slope = self.loss(z.astype(images.dtype), weights, images)
            return loss + self.reg * np.sum(z**2), np.ravel(slope + 2 * self.reg * z)

        start, options = np.zeros(shape) if start is None else start, {"maxcor": 20, "ftol": 0.0, "gtol": tol}
        found = scipy.optimize.minimize(objective, start.ravel(), jac=True, method="L-BFGS-B", options=options)
        solved = rough or np.abs(found.jac).max() < 1e-6
        return found.x.reshape(shape) if solved else np.full(shape, np.nan)

    def error(self, z):
        """The share of wrong predictions."""
        return float(np.mean((self.images @ z).argmax(1) != self.labels))


def cleaning(quick: bool, drawn: float = 0.5) -> Problem:
    sizes = (1280, 320) if quick else (20_000, 5_000)
    parts = jaxhpo.data.mnist(32, train=sizes[0], validation=sizes[1], test=1000 if quick else 10_000)
    center, scale = parts.train.inputs.mean(0), parts.train.inputs.std(0)
    scale = np.where(scale == 0, 1, scale)
    cut = lambda a: a[: len(a) - len(a) % BATCH]  # noqa: E731
    (x_in, right), (x_out, y_out), (x_test, y_test) = (
        (cut(np.asarray((part.inputs - center) / scale, np.float32)), cut(np.asarray(part.targets))) for part in parts
    )
    rng = np.random.default_rng(32)
    given = np.where(redrawn := rng.random(len(right)) < drawn, rng.integers(0, 10, len(right)), right)
    n, reg = len(given), 0.2
    train, validation, test = (Softmax(*part, reg) for part in ((x_in, given), (x_out, y_out), (x_test, y_test)))
    warm = {}

    def measures(z):
        return validation.loss(z, np.ones(len(y_out)), validation.images)[0], validation.error(z), test.error(z)

    def value(x, rough=False):
        weights = scipy.special.expit(np.asarray(x, float))
        z = train.solve(weights, warm.get(rough), rough)
        warm[rough] = z if np.isfinite(z).all() else None
        return measures(z)

    def controls():
        both = Softmax(np.concatenate([x_in, x_out]), np.concatenate([given, y_out]), reg)
        trainings = {
            "no weights": (train, np.ones(n)),
            "right labels alone": (Softmax(x_in[~redrawn], right[~redrawn], reg), np.ones(np.sum(~redrawn))),
            "validation images alone": (validation, np.ones(len(y_out))),
            "both parts": (both, np.ones(n + len(y_out))),
        }
        return {name: measures(part.solve(weights)) for name, (part, weights) in trainings.items()}

    def cross_entropy(z, images, labels):
        return optax.softmax_cross_entropy_with_integer_labels(images @ z, labels)

    def train_loss(z, x, batch):
        images, labels, index = batch
        return jnp.mean(jax.nn.sigmoid(x[index]) * cross_entropy(z, images, labels)) + reg * jnp.sum(z**2)

    return Problem(
        (x_in, given, np.arange(n)),
        (x_out, y_out),
        train_loss,
        lambda z, x, batch: jnp.mean(cross_entropy(z, *batch)),
        lambda key: (jnp.zeros((784, 10)), jnp.full(n, -2.0)),
        value,
        ("outer loss", "validation error", "test error"),
        calls=5e4 if quick else 1e6,
        points=3,
        steps=(0.01, 0.03, 0.1),
        ratios=(1e3, 1e4, 1e5, 1e6),
        tuned_on=2,
        limit=math.inf,
        controls=controls,
        own=test.error,
    )


PROBLEMS = {
    "quadratic": quadratic,
    "ijcnn1": ijcnn1,
    "cleaning": cleaning,
    "cleaning .7": functools.partial(cleaning, drawn=0.7),
    "cleaning .9": functools.partial(cleaning, drawn=0.9),
}


# --- methods ----------------------------------------------------------------------------------------------------------


def power(first, exponent, every=1):
    return lambda count: first * (count // every + 1.0) ** -exponent


@dataclasses.dataclass(frozen=True)
class BOME(jaxhpo.StatefulMethod):
    """BOME (arXiv:2209.08709): of all samples at once, as its λ is a ratio of products of mean gradients, no mean.

    q = L(θ, h) - L(y, h), with y after T steps of descent from θ; then θ and h go along ∇F + λ ∇q, with
    λ = max(η - ⟨∇F, ∇q⟩ / |∇q|², 0). No composition: the vocabulary has directions alone, and no products of them.
    """

    train: FiniteSum
    validation: FiniteSum
    eta: float = 0.5

    def pair(self, solver, outer_loss, num_steps, warm_start):
        problem = single_loop.Problem(self, solver, outer_loss, whole(self.train), whole(self.validation))

        def update(h, state, batches, outer_batch, key):
            y = problem.train_on(state, h, jnp.zeros(num_steps, int)).params
            (value, metrics), outer = problem.evaluate(Point(state.params, None, h), 0)
            by_hparams = optax.tree.sub(problem.by_hparams(state.params, h, 0), problem.by_hparams(y, h, 0))
            q = problem.train_gradient(state.params, h, 0)[1], by_hparams
            weight = jnp.maximum(self.eta - optax.tree.vdot(outer, q) / optax.tree.vdot(q, q), 0.0)
            by_params, by_hparams = optax.tree.add_scale(outer, weight, q)
            info = jaxhpo.Info(optax.tree.norm(q[0]), jnp.asarray(num_steps), jnp.isfinite(weight))
            after = problem.step(state, h, 0, by_params)
            return by_hparams, after, jaxhpo.HypergradientInfo(value, metrics, info)

        return jaxhpo.Hypergradient(solver.init, update)


def whole(rows: FiniteSum) -> FiniteSum:
    """All its samples as one minibatch."""
    batches = jax.vmap(rows.batch)(jnp.arange(rows.num_batches))
    arrays = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), batches)
    return FiniteSum(1, lambda i: arrays, lambda n: 0 * n)


class Method(NamedTuple):
    """A method of the comparison.

    Attributes:
      make: `(train, validation, step of θ) -> method`.
      calls: of one update, per sample of a minibatch.
      num_steps: inner steps an update.
      exponents: of the steps of θ and of h.
      whole: calls of each train sample and of each validation sample, where all are taken.
      period: updates from one time to the next; None is n + m over 2 b.
      held: updates from one step of h to the next.
    """

    make: Callable
    calls: float
    num_steps: int | None = None
    exponents: tuple[float, float] = (0.0, 0.0)
    whole: tuple[int, int] = (0, 0)
    period: int | None = None
    held: int = 1


def period(train, validation):
    return max((train.num_batches + validation.num_batches) // 2, 1)


METHODS = {
    "SOBA": Method(lambda a, b, step: SOBA(a, b), 5, None, (1 / 2, 1 / 2)),
    "SOBA, constant steps": Method(lambda a, b, step: SOBA(a, b), 5),
    "MA-SOBA": Method(lambda a, b, step: MASOBA(a, b, weight=0.1), 5),
    "SABA": Method(lambda a, b, step: SABA(a, b), 5),
    "SRBA": Method(lambda a, b, step: SingleLoop(a, b, SARAH(period(a, b))), 10, whole=(3, 2)),
    "SPABA": Method(lambda a, b, step: SPABA(a, b), 10, whole=(3, 2)),
    "FSLA": Method(
        lambda a, b, step: InTurn(a, b, PerVariable(hparams=STORM(power(0.5, 1 / 2)))), 7, None, (1 / 2, 1 / 2)
    ),
    "AmIGO": Method(lambda a, b, step: AmIGO(a, b), 2 * INNER + 3, INNER),
    "StocBiO": Method(lambda a, b, step: StocBiO(a, b, step, TERMS), INNER + TERMS + 3, INNER),
    "BSA": Method(
        lambda a, b, step: StocBiO(a, b, step, TERMS, random_length=True),
        INNER + (TERMS - 1) / 2 + 3,
        INNER,
        (1 / 2, 1 / 2),
    ),
    "TTSA": Method(
        lambda a, b, step: StocBiO(a, b, step, TERMS, random_length=True), 4 + (TERMS - 1) / 2, 1, (2 / 5, 3 / 5)
    ),
    "MRBO": Method(
        lambda a, b, step: SingleLoop(a, b, STORM(power(0.5, 2 / 3)), series_sums(TERMS, step)),
        8 + 2 * TERMS,
        None,
        (1 / 3, 1 / 3),
    ),
    "SUSTAIN": Method(
        lambda a, b, step: SingleLoop(a, b, STORM(power(0.5, 2 / 3)), series_sums(TERMS, step, random_length=True)),
        8 + TERMS - 1,
        None,
        (1 / 3, 1 / 3),
    ),
    "VRBO": Method(
        lambda a, b, step: SingleLoop(a, b, SARAH(period(a, b)), series_sums(TERMS, step)),
        8 + 2 * TERMS,
        whole=(TERMS + 3, 2),
        held=INNER,
    ),
    "F2SA": Method(
        lambda a, b, step: F2SA(a, b, optax.sgd(power(step, 5 / 7, INNER)), growth=power(0.1, 1 / 7)),
        3 * INNER + 3,
        INNER,
        (4 / 7, 4 / 7),
    ),
    "F3SA": Method(
        lambda a, b, step: SingleLoop(
            a,
            b,
            STORM(power(1.0, 4 / 5)),
            penalty_sums(power(10.0, -1 / 5)),
            linear=optax.sgd(power(step / 10, 3 / 5)),
            begin=lambda params: params,
        ),
        12,
        None,
        (2 / 5, 2 / 5),
    ),
    "BOME": Method(lambda a, b, step: BOME(a, b), 0, INNER, whole=(INNER + 4, 2), period=1),
}


def runner(problem: Problem, method: Method):
    """`(steps (k, 2), key) -> x` at some moments, of shape (k, points + 1, ...), and the last z; calls of a stretch."""
    train, validation = (FiniteSum.of(part, BATCH) for part in (problem.train, problem.validation))
    samples = BATCH * train.num_batches, BATCH * validation.num_batches
    calls = BATCH * method.calls + np.dot(method.whole, samples) / (method.period or period(train, validation))
    points = min(problem.points, max(round(problem.calls / calls), 1))
    updates = max(round(problem.calls / calls / points), 1)

    def run(steps, key):
        inner, outer = steps[0], steps[0] * steps[1]
        every = method.num_steps or 1
        solver = jaxhpo.from_optax(problem.train_loss, optax.sgd(power(inner, method.exponents[0], every)))
        own = method.make(train, validation, inner)
        pair = jaxhpo.hypergradient(
            own, solver, lambda s, x, batch: problem.outer_loss(s.params, x, batch), num_steps=method.num_steps
        )
        rate = power(outer, method.exponents[1])

        def update(carry, key):
            x, state, count = carry
            grad, state, _ = pair.update(x, state, key=key)
            moves = (count + 1) % method.held == 0
            return (x - jnp.where(moves, rate(count), 0.0) * grad, state, count + 1), None

        def stretch(carry, key):
            carry, _ = jax.lax.scan(update, carry, jax.random.split(key, updates))
            return carry, carry[0]

        first, rest = jax.random.split(key)
        z, x = problem.start(first)
        (_, state, _), found = jax.lax.scan(
            stretch, (x, pair.init(z, x), jnp.zeros(())), jax.random.split(rest, points)
        )
        return jnp.concatenate([x[None], found]), getattr(state, "inner", state).params

    return jax.jit(jax.vmap(run, (0, None))), calls * updates


def evaluate(problem, xs, rough=False) -> np.ndarray:
    """(moments, numbers): the measures at each x; infinite where the run diverged."""
    nothing = (np.nan,) * len(problem.names)
    found = np.array(
        [problem.value(x, rough) if np.isfinite(x).all() and np.abs(x).max() < problem.limit else nothing for x in xs]
    )
    return np.where(np.isfinite(found), found, np.inf)


def measure(problem: Problem, method: Method, seeds: int, quick: bool) -> dict[str, Any]:
    begun = time.process_time()
    run, calls = runner(problem, method)
    grids = problem.steps, problem.ratios
    steps, ratios = ((values[(len(values) - 1) // 2],) if quick else values for values in grids)
    grid = np.array([(inner, ratio) for inner in steps for ratio in ratios])
    scores = [
        evaluate(problem, np.asarray(run(grid, jax.random.key(seed))[0])[:, -1], rough=True)[:, 0]
        for seed in range(FIRST_TUNED_ON, FIRST_TUNED_ON + (1 if quick else problem.tuned_on))
    ]
    best = grid[int(np.argmin(np.mean(scores, 0)))]
    runs = [[np.asarray(a)[0] for a in run(best[None], jax.random.key(seed))] for seed in range(seeds)]
    curves = np.array([evaluate(problem, xs) for xs, _ in runs])
    with np.errstate(invalid="ignore"):  # of a run that diverged
        error = curves.std(0, ddof=1) / seeds**0.5 if seeds > 1 else np.zeros_like(curves[0])
    row: dict[str, Any] = {
        "steps": [float(best[0]), float(best[0] * best[1])],
        "at the edge": bool(best[0] in (steps[0], steps[-1]) or best[1] in (ratios[0], ratios[-1])),
        "calls": [calls * k for k in range(curves.shape[1])],
        "ends": curves[:, -1, 0].tolist(),
        "seconds": time.process_time() - begun,
    }
    for k, name in enumerate(problem.names):
        mean = np.exp(np.log(curves[:, :, k]).mean(0)) if name == "gradient" else curves[:, :, k].mean(0)
        row |= {name: mean.tolist(), f"{name}_error": error[:, k].tolist()}
    if problem.own is not None:
        own = [problem.own(z) if np.isfinite(z).all() else math.inf for _, z in runs]
        row["test error of its own θ"] = float(np.mean(own))
    return row


# --- report -----------------------------------------------------------------------------------------------------------


def first(row: dict[str, Any]) -> str:
    """The name of what steps are chosen by."""
    return "suboptimality" if "suboptimality" in row else "outer loss"


def told(row, name, at) -> str:
    value, error = row[name][at], row[f"{name}_error"][at]
    if math.isfinite(value):
        return f"{value:.3g} ± {error:.1g}"
    ends = row["ends"]
    return f"diverges for {sum(not math.isfinite(end) for end in ends)} of {len(ends)} seeds"


def table(name: str, rows: dict[str, Any], controls: dict[str, Any]) -> str:
    """The rows of one problem in Markdown, best first."""
    clean = first(next(iter(rows.values()))) == "outer loss"
    more = ["validation error", "test error", "of its own θ"] if clean else ["&#124;∇h&#124;²"]
    columns = ["method", "steps of θ, h", "h at a third" if clean else "h − h* at a third", "at the end", *more]
    lines = [" | ".join(["", *columns, ""]).strip(), "|---" * len(columns) + "|"]
    for method, row in sorted(rows.items(), key=lambda item: item[1][first(item[1])][-1]):
        cells = [", ".join(f"{x:.3g}" for x in row["steps"])]
        cells += [told(row, first(row), at) for at in (len(row["calls"]) // 3, -1)]
        if clean:
            cells += [told(row, key, -1) for key in ("validation error", "test error")]
            cells += [f"{row['test error of its own θ']:.3g}"]
        else:
            cells += [f"{row['gradient'][-1]:.1g}"]
        lines.append(" | ".join(["", method, *cells, ""]).strip())
    for control, numbers in controls.items():
        lines.append(" | ".join(["", f"*{control}*", "", "", *(f"{x:.3g}" for x in numbers), "", ""]).strip())
    return "\n".join([f"{name}:", "", *lines, ""])


def picture(report, path):
    figure, axes = plot.figure(1, len(report), width=5.4 * len(report) + 1.6, height=4.6)
    styles = [{"color": plot.PALETTE[i % 6], "ls": ("-", "--", ":")[i // 6]} for i in range(len(METHODS))]
    styles = dict(zip(METHODS, styles, strict=True))
    for axis, (name, rows) in zip(axes[0], report.items(), strict=True):
        for method in (method for method in METHODS if method in rows):
            row = rows[method]
            axis.plot(row["calls"], np.maximum(row[first(row)], 1e-16), label=method, **styles[method])
        clean = first(next(iter(rows.values()))) == "outer loss"
        axis.set(xlabel="oracle calls", title=name, ylabel="h" if clean else "h − h*")
        axis.set_yscale("linear" if clean else "log")
    axes[0, -1].legend(fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    lowest = [min(rows, key=lambda name: rows[name][first(rows[name])][-1]) for rows in report.values()]
    figure.suptitle("Lowest at equal calls: " + ", ".join(map("{} ({})".format, lowest, report)), fontsize=plot.TITLE)
    plot.save(figure, path)


def chosen(parser) -> None:
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=["quadratic", "ijcnn1", "cleaning"])
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, help="all, or with --quick four a problem, if not given"
    )


def main(arguments=None) -> None:
    given = parse(__doc__, arguments, seeds=5, quick=1, more=chosen)
    path = given.out / "bilevel.json"
    report = json.loads(path.read_text()) if path.exists() else {"problems": {}}
    report = {"seeds": given.seeds, "problems": report["problems"], "controls": report.get("controls", {})}
    for number, name in enumerate(given.problems):
        problem = PROBLEMS[name](given.quick)
        rows = report["problems"].setdefault(name, {})
        report["controls"][name] = problem.controls()
        for title in given.methods or (list(METHODS)[number + 1 :: 4] if given.quick else METHODS):
            rows[title] = row = measure(problem, METHODS[title], given.seeds, given.quick)
            value, seconds = row[first(row)][-1], row["seconds"]
            print(f"{name}, {title}: {value:.3g}, {seconds:.0f} s", file=sys.stderr)
            path.write_text(json.dumps(report, indent=1) + "\n")
        print(table(name, rows, report["controls"][name]))
    picture(
        {name: rows for name, rows in report["problems"].items() if name in list(PROBLEMS)[:3]},
        given.out / "bilevel.png",
    )


if __name__ == "__main__":
    main()
