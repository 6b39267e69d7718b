"""Algorithms against criteria of model selection: the comparison of Bakhteev and Strijov (2020), on four data sets.

A model is trained by T steps of gradient descent on L(θ, h), h the log precisions of a Gaussian prior, and h is chosen
by a criterion Q(θ, h): the likelihood of four held-out folds, the bound of a diagonal Gaussian posterior (ELBO; one
sample a step), or Laplace's evidence. Constants of likelihoods are left out, as in the paper. Random search has as many
trainings as the others have outer steps. Greedy takes a step of h after each step of θ, T of them an outer step. DrMAD,
unrolled and random search train from the start in each outer step, HOAG and Neumann (20 terms) go on. HOAG's tolerances
and conjugate gradients need a deterministic loss with a positive definite Hessian: for the bound and for networks its
row is the implicit hypergradient by 20 conjugate gradients on the Gauss-Newton matrix.

Data: the polynomial is the paper's (40 points x ~ N(0, 1), y = x + N(0, 1); powers up to 9, sine, cosine), its features
of largest absolute value 1. Training is in coordinates of curvature about 1, u = √(e^h + c) w; "plain" trains the
bound in w itself, by one rate that is stable for every h in the range. Diabetes is linear, digits a network
64-16-10 (500 images, 300 steps, 10 outer ones). MNIST is 784-300-10, cut to 500 images, 200 steps, 3 outer ones and two
criteria; its rate of training, of 1, .5, .3, .1, .03, and of .1, .05, .04, .03, .02 for the bound, has the least mean L
at the end on data that are not reported. The prior has a precision for each weight, of networks in cross-validation for
each array.
Networks are trained by minibatches of 50; DrMAD goes back by every tenth of their steps, as in the paper for MNIST (by
all, its derivative of the bound ends in NaN). Their bound draws outputs in place of weights, and their evidence has the
diagonal of the Gauss-Newton matrix: the dense one of 784-300-10 would have 6e10 entries.

h begins uniform in the range (-2 to 10; networks -4 to 5, as a precision of e^10 beside the paper's 60 000 images is
e^5.2 beside 500), and is projected to it, up to a slack of .5 or 1. The rate of h is chosen for each algorithm on the
paper's grid {r 10^s, s ≤ 1, r in 1, 25, 50, 75} by the criterion after a few outer steps on data that are not reported,
of digits among five of it (r = 25, s ≤ 0); MNIST has digits' rates of h. The h of best criterion is judged by training
anew: Q, and the error E on new data (RMSE or accuracy), with noise on the weights, and of trainings on noisy inputs.

    python benchmarks/model_selection.py [--out DIR] [--seeds N] [--quick] [--problems NAME ...] [--criteria NAME ...]
        [--algorithms NAME ...]
"""

import argparse
import functools
import json
import math
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxhpo
import jaxhpo.data
from jaxhpo import criteria, plot

ALGORITHMS = ("random", "greedy", "DrMAD", "HOAG", "unrolled", "Neumann")
CRITERIA = ("cross-validation", "ELBO", "evidence")
FOLDS = 4
GRID = sorted({r * 10.0**s for r in (1, 25, 50, 75) for s in range(-5, 2)}, reverse=True)
COARSE = [25 * 10.0**s for s in range(0, -5, -1)]  # of networks
NOISE = (0.0, 0.25, 0.5)  # on the weights
INPUT_NOISE = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
# Q, steps to converge, E, E.25, E.5 as recorded by Bakhteev and Strijov: RMSE, of MNIST accuracy
PAPER = {
    ("polynomial", "cross-validation", "random"): (-171.6, 26.2, 1.367, 1.410, 1.555),
    ("polynomial", "cross-validation", "greedy"): (-172.5, 30.0, 1.421, 1.439, 1.536),
    ("polynomial", "cross-validation", "DrMAD"): (-174.1, 40.2, 1.403, 1.424, 1.512),
    ("polynomial", "cross-validation", "HOAG"): (-174.7, 29.4, 1.432, 1.463, 1.553),
    ("polynomial", "ELBO", "random"): (-63.5, 32.4, 1.368, 1.426, 1.546),
    ("polynomial", "ELBO", "greedy"): (-25.5, 1.2, 1.161, 1.174, 1.193),
    ("polynomial", "ELBO", "DrMAD"): (-25.1, 10.6, 1.157, 1.163, 1.184),
    ("polynomial", "ELBO", "HOAG"): (-25.8, 10.8, 1.141, 1.149, 1.177),
    ("MNIST", "cross-validation", "random"): (-3236.4, 7.8, 0.981, 0.966, 0.866),
    ("MNIST", "cross-validation", "greedy"): (-3416.7, 10.8, 0.979, 0.962, 0.860),
    ("MNIST", "cross-validation", "DrMAD"): (-3469.0, 17.0, 0.982, 0.962, 0.831),
    ("MNIST", "cross-validation", "HOAG"): (-3748.6, 8.6, 0.980, 0.961, 0.853),
    ("MNIST", "ELBO", "random"): (-1304556.4, 14.2, 0.982, 0.943, 0.814),
    ("MNIST", "ELBO", "greedy"): (-11136.2, 1.0, 0.977, 0.952, 0.884),
    ("MNIST", "ELBO", "DrMAD"): (-1305432.9, 24.6, 0.982, 0.941, 0.813),
    ("MNIST", "ELBO", "HOAG"): (-280061.6, 24.0, 0.981, 0.943, 0.819),
}


class Problem(NamedTuple):
    """What is fixed of a data set.

    Attributes:
      name: of the data set.
      load: seed -> data, a dict of arrays.
      sizes: of the network's layers; of a linear model (features,).
      num_steps: T.
      batch: examples a step.
      outer: outer steps, and trials of random search.
      low: of the range of h at the start.
      slack: by which h may leave it.
      rate: of training, for the likelihood and for the bound, in coordinates of curvature about 1.
      judged: examples by which an outer step is judged.
      calibration: outer steps that choose the rate of h.
      stretch: of the coordinate of log s, which makes its steps smaller by the square: samples are noisy there.
      criteria, algorithms: that are affordable and make sense.
      plain: whether training is in the coordinates w themselves.
      high: end of the range of h at the start.
    """

    name: str
    load: Any
    sizes: tuple
    num_steps: int
    batch: int
    outer: int
    low: float
    slack: float
    rate: tuple
    judged: int
    calibration: int
    stretch: float = 1.0
    criteria: tuple = CRITERIA
    algorithms: tuple = ALGORITHMS
    plain: bool = False
    high: float = 10.0

    @property
    def network(self):
        return len(self.sizes) > 1


# --- data -------------------------------------------------------------------------------------------------------------


def features(x):
    """x⁰ … x⁹, sin x, cos x of an input; of several, themselves and 1."""
    if x.ndim == 1:
        return jnp.stack([x**k for k in range(10)] + [jnp.sin(x), jnp.cos(x)], 1)
    return jnp.concatenate([x, jnp.ones((len(x), 1))], 1)


def polynomial(seed):
    rng = np.random.default_rng(seed)
    x, x_new = rng.normal(size=40), rng.normal(size=1000)
    y, y_new = x + rng.normal(size=40), x_new + rng.normal(size=1000)
    return {"x": x, "y": y, "x_new": x_new, "y_new": y_new, "scale": np.abs(features(x)).max(0)}


def diabetes(seed):
    """Half of the rows; the targets in units of the residuals of least squares."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(y))
    train, new = order[:220], order[220:]
    x = (x - x[train].mean(0)) / x[train].std(0)
    one = np.asarray(features(x))
    residuals = y[train] - one[train] @ np.linalg.lstsq(one[train], y[train], rcond=None)[0]
    y = (y - y[train].mean()) / np.sqrt(np.sum(residuals**2) / (len(train) - one.shape[1]))
    return {"x": x[train], "y": y[train], "x_new": x[new], "y_new": y[new], "scale": np.ones(one.shape[1])}


def images(which, train, new, seed):
    parts = getattr(jaxhpo.data, which)(seed, train=train, validation=1, test=new)
    given = {"x": parts.train.inputs, "y": parts.train.targets}
    return given | {"x_new": parts.test.inputs, "y_new": parts.test.targets}


digits = functools.partial(images, "digits", 500, 1000)
mnist = functools.partial(images, "mnist", 500, 2000)

POLYNOMIAL = Problem("polynomial", polynomial, (12,), 100, 40, 50, -2.0, 0.5, (1.0, 0.1), 40, 50)
DIGITS = Problem("digits", digits, (64, 16, 10), 300, 50, 10, -4.0, 1.0, (0.5, 1.0), 500, 2, 5.0, high=5.0)
PROBLEMS = {
    p.name: p
    for p in (
        POLYNOMIAL,
        POLYNOMIAL._replace(name="polynomial, plain", num_steps=500, rate=(4e-5, 4e-5), criteria=("ELBO",), plain=True),
        Problem("diabetes", diabetes, (11,), 100, 220, 50, -2.0, 0.5, (1.0, 0.1), 220, 20, 3.0),
        DIGITS,
        DIGITS._replace(
            name="MNIST",
            load=mnist,
            sizes=(784, 300, 10),
            num_steps=200,
            outer=3,
            rate=(0.3, 0.04),
            stretch=1.0,
            criteria=CRITERIA[:2],
        ),
    )
}


# --- models and criteria ----------------------------------------------------------------------------------------------


def inputs(problem, data, x):
    return x if problem.network else features(x) / data["scale"]


def predict(problem, w, x):
    if not problem.network:
        return x @ w["w"]
    return jax.nn.relu(x @ w["k1"] + w["b1"]) @ w["k2"] + w["b2"]


def losses(problem, outputs, y):
    """Negative log-likelihoods, of a normal distribution of variance 1 without its constant."""
    if not problem.network:
        return 0.5 * (outputs - y) ** 2
    return -jnp.take_along_axis(jax.nn.log_softmax(outputs), y[..., None], -1)[..., 0]


def initial(problem, key):
    if not problem.network:
        return {"w": jnp.zeros(problem.sizes)}
    d, hidden, classes = problem.sizes
    k1, k2 = jax.random.split(jax.random.fold_in(key, 1))  # not the numbers that the first h is made of
    return {
        "k1": jax.random.normal(k1, (d, hidden)) * (2 / d) ** 0.5,
        "b1": jnp.zeros(hidden),
        "k2": jax.random.normal(k2, (hidden, classes)) * (1 / hidden) ** 0.5,
        "b2": jnp.zeros(classes),
    }


class Criterion(NamedTuple):
    """L and −Q of a problem, for given data.

    Attributes:
      start: (key, h) -> θ in w.
      to_u, to_w: (θ, h) -> θ in the other coordinates.
      predict, output_loss, penalty: of θ in u; their sum is L.
      loss: (θ in w, h, batch) -> −Q, to be minimised.
    """

    start: Any
    to_u: Any
    to_w: Any
    predict: Any
    output_loss: Any
    penalty: Any
    loss: Any

    def train(self, u, h, batch):
        return self.output_loss(self.predict(u, h, batch), batch) + self.penalty(u, h)


def make(problem, kind, data, masks=None) -> Criterion:
    """The criterion; a batch is (indices, key). Cross-validation without masks trains on all."""
    x, y = inputs(problem, data, data["x"]), data["y"]
    n = len(y)
    each = initial(problem, jax.random.key(0))
    if problem.network:
        curvature = jax.tree.map(lambda leaf: jnp.full((), float(n)), each)
    else:
        curvature = {"w": jnp.abs(x.T @ x).sum(0)}  # with it on the diagonal, XᵀX is below it
    bayes, folds = kind == "ELBO", kind == "cross-validation" and masks is not None

    def roots(h):
        if problem.plain:
            return jax.tree.map(jnp.ones_like, curvature)
        return jax.tree.map(lambda a, c: jnp.sqrt(jnp.exp(a) + c), h, curvature)

    def scaled(theta, h, power):
        times = lambda t: jax.tree.map(lambda r, leaf: r**power * leaf, roots(h), t)  # noqa: E731
        if not bayes:
            return jax.vmap(times)(theta) if folds else times(theta)
        by = problem.stretch
        shift = lambda r, s: by * (s + jnp.log(r)) if power > 0 else s / by - jnp.log(r)  # noqa: E731
        return criteria.Posterior(times(theta.mean), jax.tree.map(shift, roots(h), theta.log_scale))

    def start(key, h):
        w = initial(problem, key)
        if bayes:  # the scale that the curvature gives
            root = jax.tree.map(jnp.sqrt, curvature) if problem.plain else roots(h)
            return criteria.Posterior(w, jax.tree.map(lambda leaf, r: jnp.zeros_like(leaf) - jnp.log(r), w, root))
        return jax.tree.map(lambda leaf: jnp.stack([leaf] * FOLDS), w) if folds else w

    def outputs(w, batch):
        at, key = batch
        if not bayes:
            return jax.vmap(lambda w: predict(problem, w, x[at]))(w) if folds else predict(problem, w, x[at])
        if not problem.network:
            return predict(problem, criteria.draw(w, key), x[at])
        first, second = jax.random.split(key)
        layer = lambda i: [criteria.Posterior(w.mean[v + i], w.log_scale[v + i]) for v in "kb"]  # noqa: E731
        hidden = jax.nn.relu(criteria.local_dense(*layer("1"), x[at], first))
        return criteria.local_dense(*layer("2"), hidden, second)

    def fit(values, batch, weights):
        total = jnp.sum(losses(problem, values, jnp.broadcast_to(y[batch[0]], values.shape[: 1 + folds])) * weights)
        return n / len(batch[0]) * total

    def output_loss(values, batch):
        return fit(values, batch, (1 - masks[:, batch[0]]) * FOLDS / (FOLDS - 1) if folds else 1.0)

    def square(w, h):
        return 0.5 * sum(jax.tree.leaves(jax.tree.map(lambda a, leaf: jnp.sum(jnp.exp(a) * leaf**2), h, w)))

    def penalty(u, h):
        w = scaled(u, h, -1)
        if bayes:
            return criteria.kl(w, h)
        return jnp.sum(jax.vmap(lambda w: square(w, h))(w)) if folds else square(w, h)

    def loss(w, h, batch):
        if bayes:
            return output_loss(outputs(w, batch), batch) + criteria.kl(w, h)
        if kind == "cross-validation":
            return fit(outputs(w, batch), batch, masks[:, batch[0]])
        if not problem.network:  # the fit is done: w
            each = lambda w, h: losses(problem, predict(problem, w, x), y)  # noqa: E731
            prior = lambda w, h: square(w, h) - 0.5 * jnp.sum(h["w"]) + h["w"].size * HALF_LOG_2PI  # noqa: E731
            return criteria.laplace_evidence(lambda h, weights: w, each, prior, jnp.ones(n))(h)
        diagonal = jax.tree.map(lambda v: n / len(batch[0]) * v, gauss_newton_diagonal(w, x[batch[0]]))
        volume = jax.tree.map(lambda v, a: 0.5 * jnp.sum(jnp.log1p(v * jnp.exp(-a))), diagonal, h)
        return output_loss(outputs(w, batch), batch) + square(w, h) + sum(jax.tree.leaves(volume))

    return Criterion(
        start,
        lambda w, h: scaled(w, h, 1),
        lambda u, h: scaled(u, h, -1),
        lambda u, h, batch: outputs(scaled(u, h, -1), batch),
        output_loss,
        penalty,
        loss,
    )


HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def gauss_newton_diagonal(w, x):
    """Σ diag(Jᵀ Λ J) over examples of a network of two layers, in closed form.

    Λ = diag(p) − p pᵀ of the softmax is Σ_k s_k s_kᵀ with s_k = √p_k (e_k − p); traced back, s_k is δ_k at a layer, and
    the square of its derivative by a kernel is a² ⊗ δ_k², with a the inputs of the layer.
    """
    hidden = jax.nn.relu(x @ w["k1"] + w["b1"])
    p = jax.nn.softmax(hidden @ w["k2"] + w["b2"])
    top = jnp.sqrt(p)[:, :, None] * (jnp.eye(p.shape[1]) - p[:, None, :])  # example, k, output
    low = top @ w["k2"].T * (hidden > 0)[:, None, :]
    squares = [jnp.sum(delta**2, 1) for delta in (low, top)]
    return {
        "k1": (x**2).T @ squares[0],
        "b1": squares[0].sum(0),
        "k2": (hidden**2).T @ squares[1],
        "b2": squares[1].sum(0),
    }


# --- algorithms -------------------------------------------------------------------------------------------------------


def batches_of(problem, n, key, num_steps):
    """(indices, key) of each step; the indices of all where a batch is all."""
    keys = jax.random.split(key, num_steps)
    if problem.batch >= n:
        return jnp.tile(jnp.arange(n), (num_steps, 1)), keys
    return jax.vmap(lambda k: jax.random.randint(k, (problem.batch,), 0, n))(keys), keys


def draw_hparams(problem, kind, key):
    w = initial(problem, key)
    shapes = jax.tree.map(lambda leaf: () if problem.network and kind == CRITERIA[0] else leaf.shape, w)
    keys = dict(zip(w, jax.random.split(key, len(w)), strict=True))
    return {name: jax.random.uniform(keys[name], shapes[name], minval=problem.low, maxval=problem.high) for name in w}


def solver_of(problem, kind, criterion):
    rate = problem.rate[kind == "ELBO"]
    decay = kind == "ELBO" or problem.network  # the noise of samples and minibatches
    schedule = lambda h, step: rate * (1 - 0.9 * decay * step / problem.num_steps)  # noqa: E731
    return jaxhpo.momentum_sgd(criterion.train, schedule, 0.0)


def rule_of(problem, kind, algorithm, criterion):
    if algorithm == "DrMAD":
        return jaxhpo.DrMAD(problem.num_steps // 10 if problem.network else None)
    if algorithm == "HOAG":
        curvature = jaxhpo.gauss_newton(criterion.predict, criterion.output_loss, criterion.penalty)
        return jaxhpo.Implicit(jaxhpo.CG(maxiter=20), curvature=curvature, on_failure="keep")
    if algorithm == "Neumann":
        return jaxhpo.Implicit(jaxhpo.Neumann(20, problem.rate[kind == "ELBO"]), on_failure="keep")
    return jaxhpo.Unroll()


def exact_hoag(problem, kind):
    return not problem.network and kind != "ELBO"


def first(problem, kind, algorithm, data, masks, h, key):
    """What an algorithm carries: the parameters in w, or the state of `HOAG`."""
    criterion = make(problem, kind, data, masks)
    w = criterion.start(key, h)
    if algorithm == "HOAG" and exact_hoag(problem, kind):
        return pair_of(problem, kind, criterion).init(criterion.to_u(w, h), h)
    return w


def pair_of(problem, kind, criterion):
    outer_loss = lambda solution, h, batch: criterion.loss(criterion.to_w(solution.params, h), h, batch)  # noqa: E731
    solver = solver_of(problem, kind, criterion)
    return jaxhpo.hypergradient(jaxhpo.HOAG(), solver, outer_loss, num_steps=problem.num_steps)


def outer_step(problem, kind, algorithm, data, masks, origin, h, carry, key, rate):
    """One outer step: the next h, what is carried, and −Q with the h that it belongs to."""
    criterion = make(problem, kind, data, masks)
    solver = solver_of(problem, kind, criterion)
    n = len(data["y"])
    take, judge, new = jax.random.split(key, 3)
    batches = batches_of(problem, n, take, problem.num_steps)
    judged = jnp.arange(problem.judged), judge
    low, high = problem.low - problem.slack, problem.high + problem.slack
    descend = lambda h, grad: jax.tree.map(lambda a, g: jnp.clip(a - rate * g, low, high), h, grad)  # noqa: E731

    def trained(h, w, batches, num_steps=None, rule=None):
        u = criterion.to_u(w, h)
        state = solver.init(jax.lax.stop_gradient(u) if isinstance(rule, jaxhpo.Implicit) else u, h)
        rule = {} if rule is None else {"adjoint": rule}
        return criterion.to_w(jaxhpo.solve(solver, state, h, batches, **rule).params, h)

    if algorithm == "random":
        w = trained(h, criterion.start(origin, h), batches)
        return draw_hparams(problem, kind, new), carry, criterion.loss(w, h, judged), h

    if algorithm == "greedy":

        def one(state, batch):
            h, w = state

            def after(h):
                moved = trained(h, w, jax.tree.map(lambda b: b[None], batch), rule=jaxhpo.Unroll(truncate=1))
                return criterion.loss(moved, h, batch), moved

            grad, moved = jax.grad(after, has_aux=True)(h)
            return (descend(h, grad), moved), None

        (h, w), _ = jax.lax.scan(one, (h, carry), batches)
        return h, w, criterion.loss(w, h, judged), h

    if algorithm == "HOAG" and exact_hoag(problem, kind):
        grad, state, info = pair_of(problem, kind, criterion).update(h, carry, batches, judged)
        after = descend(h, grad)
        moved = criterion.to_u(criterion.to_w(state.inner.params, h), after)
        return after, state._replace(inner=state.inner._replace(params=moved)), info.value, h

    warm = algorithm in ("HOAG", "Neumann")
    rule = rule_of(problem, kind, algorithm, criterion)

    def outer_loss(h):
        w = trained(h, carry if warm else criterion.start(origin, h), batches, rule=rule)
        return criterion.loss(w, h, judged), w

    (value, w), grad = jax.value_and_grad(outer_loss, has_aux=True)(h)
    return descend(h, grad), w, value, h


def over_lanes(problem, fn, last=0):
    """Over a leading axis of arguments: at once, but for MNIST one after the other. `last` arguments have none."""

    def many(*args):
        lanes, rest = args[: len(args) - last], args[len(args) - last :]
        if problem.name == "MNIST":
            return jax.lax.map(lambda xs: fn(*xs, *rest), lanes)
        return jax.vmap(lambda *xs: fn(*xs, *rest))(*lanes)

    return jax.jit(many)


def search(problem, kind, algorithm, data, masks, h, key, rate, outer):
    """The h of best criterion, −Q so far at each outer step, and whether it was a number at the end."""

    def step(t, state):
        h, carry, best, least, values, _ = state
        at = jax.random.fold_in(key, t)
        h, carry, value, judged = outer_step(problem, kind, algorithm, data, masks, key, h, carry, at, rate)
        better = value < least  # never where it is NaN
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), judged, best)
        least = jnp.where(better, value, least)
        return h, carry, best, least, values.at[t].set(least), jnp.isfinite(value)

    carry = first(problem, kind, algorithm, data, masks, h, key)
    start = (h, carry, h, jnp.asarray(jnp.inf), jnp.zeros(problem.outer), jnp.asarray(True))
    _, _, best, _, values, finite = jax.lax.fori_loop(0, outer, step, start)
    return best, values, finite


def lane_masks(problem, n, seeds):
    return np.stack([criteria.folds(n, FOLDS, seed=seed) for seed in seeds]).astype(np.float32)


def stacked(problem, seeds):
    data = jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *[problem.load(seed) for seed in seeds])
    data = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype.kind == "f" else x, data)
    return data, jnp.asarray(lane_masks(problem, data["y"].shape[1], seeds))


def calibrate(problem, kind, run, lanes, grid):
    """The rate of best criterion, from the largest on while that improves; None where all end in NaN."""
    seed = 1000  # of data that are not reported
    data, masks = (jax.tree.map(lambda x: jnp.stack([x[0]] * lanes), part) for part in stacked(problem, [seed]))
    key = jax.random.key(seed)
    h = jax.tree.map(lambda x: jnp.stack([x] * lanes), draw_hparams(problem, kind, key))
    found = (np.inf, None)
    for at in range(0, len(grid), lanes):
        rates = np.resize(grid[at : at + lanes], lanes).astype(np.float32)
        _, values, finite = run(data, masks, h, jnp.stack([key] * lanes), rates, problem.calibration)
        last = np.where(finite, values[:, problem.calibration - 1], np.inf)
        if last.min() < found[0]:
            found = (last.min(), float(rates[last.argmin()]))
        elif found[1] is not None:
            break
    return found[1]


# --- what was found ---------------------------------------------------------------------------------------------------


def error(problem, w, x, y):
    outputs = predict(problem, w, x)
    return jnp.mean(outputs.argmax(-1) == y) if problem.network else jnp.sqrt(jnp.mean((outputs - y) ** 2))


def judge(problem, kind, data, masks, h, key):
    """Train anew with h: Q, the errors with noise on the weights, and those of trainings with noise on the inputs."""
    n = len(data["y"])
    take, noisy, shaken, begin = jax.random.split(key, 4)
    batches = batches_of(problem, n, take, problem.num_steps)

    def train(criterion):
        solver = solver_of(problem, kind, criterion)
        state = solver.init(criterion.to_u(criterion.start(begin, h), h), h)
        return criterion.to_w(jaxhpo.solve(solver, state, h, batches).params, h)

    criterion = make(problem, kind, data, masks)
    w = train(criterion)
    every = jax.lax.map(lambda k: criterion.loss(w, h, (jnp.arange(n), k)), jax.random.split(key, 20))
    x_new = inputs(problem, data, data["x_new"])

    def point(data):
        """The parameters that predict: of cross-validation, those of all examples."""
        w = train(make(problem, kind, data))
        return w.mean if kind == "ELBO" else w

    def with_noise(sigma):
        x = data["x"] + sigma * jax.random.normal(noisy, data["x"].shape)
        w = point(data | {"x": x})
        return w, error(problem, w, x_new, data["y_new"])

    ws, noisy_inputs = jax.lax.map(with_noise, jnp.asarray(INPUT_NOISE))
    w, scale = jax.tree.map(lambda x: x[0], ws), jnp.asarray(NOISE)  # of inputs without noise
    structure, leaves = jax.tree.structure(w), jax.tree.leaves(w)

    def shake(sigma, key):
        keys = jax.random.split(key, len(leaves))
        noise = [leaf + sigma * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
        return error(problem, jax.tree.unflatten(structure, noise), x_new, data["y_new"])

    draws = jax.random.split(shaken, 10)
    with_weights = jax.lax.map(lambda s: jnp.mean(jax.lax.map(lambda k: shake(s, k), draws)), scale)
    return -jnp.mean(every), with_weights, noisy_inputs


def steps_to_converge(values):
    """The first outer step, from 1, at which 99 % of the improvement is reached, of each lane."""
    goal = values[:, :1] - 0.99 * (values[:, :1] - values[:, -1:])
    return 1 + (values <= goal).argmax(1)


def measure(problem, kind, seeds, grid, rates, algorithms=ALGORITHMS):
    """A row for each algorithm; `rates` has the rates of h that were chosen before, of (data, criterion, algorithm)."""
    tables = stacked(problem, range(seeds))
    keys = jax.random.split(jax.random.key(0), seeds)
    h = jax.vmap(lambda k: draw_hparams(problem, kind, k))(keys)
    finish = over_lanes(problem, functools.partial(judge, problem, kind))
    for algorithm in algorithms:
        began = time.process_time()
        run = over_lanes(problem, functools.partial(search, problem, kind, algorithm), last=1)
        row: dict[str, Any] = {"data": problem.name, "criterion": kind, "algorithm": algorithm}
        rate = rates.get(("digits", kind, algorithm)) if problem.name == "MNIST" else None
        if algorithm == "random":
            rate = 0.0
        elif rate is None:
            rate = calibrate(problem, kind, run, seeds, grid)
        if rate is None:
            yield row | {"why": "training ended in NaN at every rate of the grid"}
            continue
        rates[problem.name, kind, algorithm] = rate
        best, values, finite = run(*tables, h, keys, jnp.full(seeds, rate), problem.outer)
        q, weights, noisy = map(np.asarray, finish(*tables, best, keys))
        row |= {"rate": rate, "Q": q.tolist(), "steps": steps_to_converge(np.asarray(values)).tolist()}
        row |= {"error": weights.tolist(), "input_noise": noisy.tolist(), "diverged": int((~finite).sum())}
        yield row | {"seconds": time.process_time() - began}


def number(values, digits=3):
    """Mean ± standard error."""
    values = np.asarray(values, float)
    spread = f" ± {values.std(ddof=1) / len(values) ** 0.5:.2g}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}" if abs(values.mean()) < 1e6 else f"{values.mean():.3g}{spread}"


def table(rows):
    """The table in Markdown, the paper's numbers in brackets."""
    heads = ["data", "criterion", "algorithm", "Q", "steps", "E", *(f"E, noise {noise}" for noise in NOISE[1:])]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        lost = f" ({row['diverged']} ended in NaN)" if row.get("diverged") else ""
        cells = [row["data"], row["criterion"], row["algorithm"] + lost]
        if "why" in row:
            cells += [row["why"], *[""] * (len(heads) - 4)]
        else:
            paper = PAPER.get((row["data"].partition(",")[0], row["criterion"], row["algorithm"]), ())
            ours = [number(row["Q"], 1), number(row["steps"], 1), *(number(e) for e in np.transpose(row["error"]))]
            cells += [f"{a} ({b})" if paper else a for a, b in zip(ours, paper or ours, strict=True)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gaps(rows):
    """Q of each algorithm beyond that of random search, paired, by (data, criterion): mean and standard error."""
    of = {(row["data"], row["criterion"], row["algorithm"]): np.array(row["Q"]) for row in rows if "Q" in row}
    found = {}
    for (data, kind, algorithm), q in of.items():
        if algorithm != "random" and (data, kind, "random") in of:
            gain = q - of[data, kind, "random"]
            error = float(gain.std(ddof=1) / len(gain) ** 0.5) if len(gain) > 1 else None
            found.setdefault(f"{data}, {kind}", {})[algorithm] = [float(gain.mean()), error]
    return found


def draw(rows, path):
    """A panel for each data set and criterion that is recorded."""
    panels = list(dict.fromkeys((row["data"], row["criterion"]) for row in rows if "Q" in row))
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plot.figure(lines, columns, width=3.6 * columns, height=1 + 2.9 * lines)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (name, kind) in zip(axes.flat, panels, strict=False):
        for row in (row for row in rows if (row["data"], row["criterion"]) == (name, kind) and "Q" in row):
            k, values = ALGORITHMS.index(row["algorithm"]), np.array(row["input_noise"])
            sem = values.std(0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
            x = np.array(INPUT_NOISE) + 0.008 * (k - 2.5)  # beside each other
            axis.errorbar(x, values.mean(0), sem, label=row["algorithm"], color=plot.PALETTE[k], lw=1.2, capsize=2)
        what = "accuracy" if PROBLEMS[name].network else "RMSE"
        axis.set(xlabel="noise on the training inputs", ylabel=f"{what} on new data")
        axis.set_title(f"{name}: {kind}", fontsize=plot.TITLE)
    handles = {h.get_label(): h for axis in axes.flat for h in axis.containers}
    chosen = [handles[name] for name in ALGORITHMS if name in handles]
    figure.legend(handles=chosen, loc="outside lower center", ncols=len(ALGORITHMS), **plot.LEGEND)
    figure.suptitle(headline(rows), fontsize=12)
    plot.save(figure, path)


def headline(rows):
    """The finding: how often an algorithm's Q is above that of random search by two standard errors."""
    found, told = gaps(rows), []
    for kind in CRITERIA:
        gains = [gain for name in PROBLEMS for gain in found.get(f"{name}, {kind}", {}).values() if gain[1] is not None]
        told += [f"{sum(gain > 2 * error for gain, error in gains)} of {len(gains)} by {kind}"] if gains else []
    return "Cases where gradients beat random search by two standard errors: " + ", ".join(told)


def order(row):
    return list(PROBLEMS).index(row["data"]), CRITERIA.index(row["criterion"]), ALGORITHMS.index(row["algorithm"])


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results/model_selection")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="repeats")
    parser.add_argument("--quick", action="store_true", help="the polynomial's bound with few steps, by two algorithms")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, metavar="NAME", help="the others' rows are kept")
    parser.add_argument("--criteria", nargs="+", choices=CRITERIA, metavar="NAME", help="the others' rows are kept")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, metavar="NAME", help="the others' rows are kept")
    parsed = parser.parse_args(arguments)
    if parsed.seeds < 1:
        parser.error(f"--seeds got {parsed.seeds}, but it is a whole number from 1 on")
    parsed.out.mkdir(parents=True, exist_ok=True)
    path, rates, rows = parsed.out / "report.json", {}, []
    chosen, asked = parsed.problems or list(PROBLEMS), parsed.criteria or CRITERIA
    wanted = parsed.algorithms or ALGORITHMS
    if (parsed.problems or parsed.criteria or parsed.algorithms) and path.exists():
        kept = json.loads(path.read_text())["rows"]
        renewed = [(name, kind, algorithm) for name in chosen for kind in asked for algorithm in wanted]
        rows = [row for row in kept if (row["data"], row["criterion"], row["algorithm"]) not in renewed]
    rates |= {(row["data"], row["criterion"], row["algorithm"]): row["rate"] for row in rows if row.get("rate")}
    for problem in [PROBLEMS[name] for name in PROBLEMS if name in chosen]:
        kinds = [kind for kind in asked if kind in problem.criteria]
        algorithms = [name for name in problem.algorithms if name in wanted]
        grid = COARSE if problem.network else GRID
        if parsed.quick:
            kinds, grid, algorithms = CRITERIA[1:2], [1.0], ALGORITHMS[:2]
            problem = problem._replace(num_steps=5, outer=3, calibration=2)
        for kind in kinds:
            for row in measure(problem, kind, parsed.seeds, grid, rates, algorithms):
                print({k: v for k, v in row.items() if k not in ("input_noise", "error")}, flush=True)
                rows.append(row)
                rows.sort(key=order)
                seeds = {row["data"]: len(row["Q"]) for row in rows if "Q" in row}
                report = {"seeds": seeds, "above random search": gaps(rows), "rows": rows}
                path.write_text(json.dumps(report, indent=1) + "\n")  # what is measured is kept
        if parsed.quick:
            break
    print(table(rows))
    draw(rows, parsed.out / "model_selection.png")


if __name__ == "__main__":
    main()
