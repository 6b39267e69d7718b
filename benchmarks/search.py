"""Searches against hypergradients, with the same number of training gradients: penalties of networks on few images.

N images, 60 % to train on and 40 % to validate on; the test images are others, and used once. The train loss is the
cross-entropy plus Σ e^h w²/2n over the kernels, n the number of training images, with one h, one for each layer, or one
for each weight. A training is T steps along half a cosine, of the MLP 784-100-10 (relu) by SGD with Nesterov's
momentum .9, all images in each step, of LeNet by Adam, minibatches of 100. The MLP's settings, and the methods' own for
it, were chosen by the validation loss on seeds 100 to 102, which are not reported; LeNet has the same rates of h.

Every method may spend B·T training gradients, B = 16 and T = 200 for the MLP, 8 and 300 for LeNet. A training counts as
T, a step of a hypergradient method as the counted arithmetic of all that it does (inner steps, products, a gradient of
the validation loss) over that of a training gradient. Grid, random, TPE, Gaussian process (GP): B trainings; the first
one of all but grid has the default penalties. With more hyperparameters than two the grid is over a common penalty.
Hyperband: of T/8 steps to T, halved. The value function: trainings on a design, then moves. The others go on from one
training with the default penalties, and move h by Adam after every K steps: unrolled (K = 20, differentiated exactly),
implicit by conjugate gradients on the Gauss-Newton matrix (K = 10, ten products) or Neumann's series (K = 10, ten
terms), greedy (K = 1). Neumann and CG see the last minibatch. Their last three trainings are spent on candidates: the
step of lowest validation loss, where the network may be passing through, the last step, and the mean of the second
half; of these and the default the best training decides.

"validation" is the lowest loss that the method itself saw, of those that go on: of warm-started networks. Judged are
the hyperparameters: "fresh" is the validation loss of a training with them, "test" that of a training on all N labels,
as some methods have seen those of the validation part. "untuned" has the default penalties (a weight decay of 5e-4),
"no penalty" none. "surface" is a grid of 30 × 30 for the two layers of the MLP, seed 0, and the hypergradient methods
with a twentieth of its gradients.

    python benchmarks/search.py [--out DIR] [--seeds N] [--quick] [--model mlp|lenet] [--data mnist|cifar10]
        [--size N] [--penalties one|layer|weight ...] [--methods NAME ...] [--file FILE] [--surface]

The report keeps the rows of other runs.
"""

import argparse
import json
import math
import pathlib
import time
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats.qmc

import jaxhpo
import jaxhpo.data
import jaxhpo.search
from jaxhpo import CG, Implicit, Neumann, Unroll, plot
from jaxhpo._core.cost import count_arithmetic
from jaxhpo.data import Examples
from jaxhpo.models import MLP, LeNet

LOW, HIGH = -5.0, 5.0  # of h
DECAY = 5e-4  # the default: e^h/n
NONE = -30.0
CANDIDATES = 3  # of a hypergradient method, which are trained anew
RUNGS = 8  # parts of a training, for Hyperband
RESOLUTION = 30
SEARCHES = ("grid", "random", "TPE", "GP", "Hyperband", "value function")
GRADIENTS = ("unrolled", "implicit, CG", "implicit, Neumann", "greedy")
CONTROLS = ("untuned", "no penalty")
METHODS = SEARCHES + GRADIENTS
PENALTIES = ("one", "layer", "weight")
TITLES = {"mlp": "MLP", "lenet": "LeNet", "mnist": "MNIST", "cifar10": "CIFAR-10"}


class Recipe(NamedTuple):
    """How a model is trained.

    Attributes:
      trainings: B.
      steps: T.
      batch: images a step; None takes all.
      optimizer: of a training.
      rate: of SGD, where a training goes on.
      neumann: the series' step.
      design: trainings of the value function before its first move, and moves.
      together: trainings of a search that are batched.
    """

    trainings: int
    steps: int
    batch: int | None
    optimizer: Any
    rate: float
    neumann: float
    design: tuple[int, int]
    together: int


COSINE = optax.cosine_decay_schedule


def momentum(rate):
    return optax.sgd(rate, 0.9, nesterov=True)


RATES = dict(zip(GRADIENTS, (0.15, 0.1, 0.1, 0.02), strict=True))  # of Adam on h
RECIPES = {
    "mlp": Recipe(16, 200, None, momentum(COSINE(0.3, 200)), 0.1, 0.05, (11, 3), 8),
    "lenet": Recipe(8, 300, 100, optax.adam(COSINE(0.003, 300)), 0.02, 0.01, (5, 2), 1),
}


# --- data and models --------------------------------------------------------------------------------------------------


def load(data: str, seed: int, size: int, model: str, file=None) -> jaxhpo.data.Split:
    sizes = {"train": 6 * size // 10, "validation": size - 6 * size // 10}
    if data == "mnist":
        parts, shape = jaxhpo.data.mnist(seed, **sizes), (28, 28, 1)
    else:
        parts, shape = jaxhpo.data.cifar10(seed, **sizes, file=file), (32, 32, 3)
        # Mean and deviation of its pixels.
        parts = type(parts)(*(part._replace(inputs=(part.inputs - 0.47) / 0.25) for part in parts))
    shape = shape if model == "lenet" else (-1,)
    return type(parts)(*(Examples(jnp.asarray(x.reshape(len(x), *shape)), jnp.asarray(y)) for x, y in parts))


def lenet(params, images):
    """`LeNet()` by products of matrices: XLA's convolutions on processors are ten times slower within loops."""
    x = jax.lax.optimization_barrier(images)  # the compiler would compute the patches of given images, for minutes
    for name in ("Conv_0", "Conv_1"):
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        rows, columns, _, features = kernel.shape
        height, width = x.shape[1] - rows + 1, x.shape[2] - columns + 1
        patches = [x[:, i : i + height, j : j + width] for i in range(rows) for j in range(columns)]
        x = jax.nn.relu(jnp.concatenate(patches, -1) @ kernel.reshape(-1, features) + bias)
        x = x.reshape(len(x), height // 2, 2, width // 2, 2, features).mean((2, 4))
    x = x.reshape(len(x), -1)
    for name in ("Dense_0", "Dense_1"):
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["Dense_2"]["kernel"] + params["Dense_2"]["bias"]


def network(model: str, seed: int, images):
    """The initial parameters, and `(params, images) -> logits`."""
    module = LeNet() if model == "lenet" else MLP((100, 10), jax.nn.relu)
    params = module.init(jax.random.key(seed), images[:1])["params"]
    return params, lenet if model == "lenet" else lambda params, x: module.apply({"params": params}, x)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class Learner:
    """A network that is trained on given images, with penalties."""

    def __init__(self, recipe, predict, params, examples):
        self.recipe, self.predict, self.params, self.examples = recipe, predict, params, examples
        self.total = len(examples.targets)
        self.size = recipe.batch or self.total
        self.solver = jaxhpo.from_optax(self.train_loss, recipe.optimizer)
        self.warm = jaxhpo.from_optax(self.train_loss, momentum(recipe.rate))
        self.unit = count_arithmetic(jax.grad(self.train_loss), params, jnp.zeros(()), self.batch(0))

    def loss(self, params, data):
        return cross_entropy(self.predict(params, data.inputs), data.targets)

    def penalty(self, params, h):
        kernels = {name: layer["kernel"] for name, layer in params.items()}
        terms = jax.tree.map(lambda h, w: jnp.sum(jnp.exp(h) * w**2), jax.tree.broadcast(h, kernels), kernels)
        return sum(jax.tree.leaves(terms)) / (2 * self.total)

    def train_loss(self, params, h, batch):
        return self.loss(params, batch) + self.penalty(params, h)

    def batch(self, step):
        if self.recipe.batch is None:
            return self.examples
        each = self.total // self.size
        order = jax.random.permutation(jax.random.fold_in(jax.random.key(0), step // each), self.total)
        pick = jax.lax.dynamic_slice(order, (step % each * self.size,), (self.size,))
        return jax.tree.map(lambda x: x[pick], self.examples)

    def go_on(self, solver, state, h, at, num_steps, adjoint=jaxhpo.Unroll()):  # noqa: B008 (a frozen dataclass)
        """The solution after more steps, of which the first is step `at`."""
        batches = lambda t: self.batch(at + t)  # noqa: E731
        return jaxhpo.solve(solver, state, h, batches, num_steps=num_steps, adjoint=adjoint)

    def fit(self, h):
        state = self.solver.init(self.params, h)
        return self.go_on(self.solver, state, h, 0, self.recipe.steps).params


class Task:
    """Learners on the training part and on both, and the start of h."""

    def __init__(self, model, data, size, penalties, seed, file, recipe):
        self.recipe, self.penalties = recipe, penalties
        self.parts = load(data, seed, size, model, file)
        params, predict = network(model, seed, self.parts.train.inputs)
        both = jax.tree.map(lambda *x: jnp.concatenate(x), self.parts.train, self.parts.validation)
        self.learner, self.refit = (Learner(recipe, predict, params, x) for x in (self.parts.train, both))
        kernels = {name: layer["kernel"] for name, layer in params.items()}
        default = jnp.asarray(math.log(DECAY * self.learner.total), jnp.float32)
        self.start = {
            "one": default,
            "layer": {name: default for name in kernels},
            "weight": jax.tree.map(lambda w: jnp.full_like(w, default), kernels),
        }[penalties]
        self.key = jax.random.key(seed)
        self.judge = jax.jit(self._judge)

    def validation(self, params):
        return self.learner.loss(params, self.parts.validation)

    def outer_loss(self, h):
        return self.validation(self.learner.fit(h))

    def _judge(self, h):
        fresh, refit = self.learner.fit(h), self.refit.fit(h)

        def on_test(params):
            logits = jax.lax.map(
                lambda x: self.learner.predict(params, x[None])[0], self.parts.test.inputs, batch_size=500
            )
            wrong = jnp.mean(logits.argmax(-1) != self.parts.test.targets)
            return cross_entropy(logits, self.parts.test.targets), 100 * wrong

        return {"fresh": self.validation(fresh), "fresh_test": on_test(fresh)[0], "test": on_test(refit)}

    def judged(self, h) -> dict[str, Any]:
        found = jax.tree.map(float, self.judge(h))
        test, errors = found.pop("test")
        return {**found, "test": test, "errors": errors}


# --- methods: each returns h and the path, (gradients spent, validation loss) -----------------------------------------


def search(task, method, trainings):
    """A search by trainings."""
    recipe, learner = task.recipe, task.learner
    budget, many = trainings * recipe.steps, len(jax.tree.leaves(task.start)) > 2
    given: dict[str, Any] = {"low": LOW, "high": HIGH, "key": task.key, "progress": False}
    if method == "Hyperband":
        chunk, calls = recipe.steps // RUNGS, []

        def part(h, carry, key):
            state, at = carry
            solution = learner.go_on(learner.solver, state, h, at, chunk)
            at = at + chunk
            return task.validation(solution.params), (solution.state, at), at

        def spent_all(step):
            calls.append(int(step.info))
            return sum(calls) >= budget

        carry = (learner.solver.init(learner.params, task.start), jnp.zeros((), jnp.int32))
        more = {
            "carry": carry,
            "max_calls": RUNGS,
            "reduction": 2,
            "callbacks": [spent_all],
            "batch": min(4, recipe.together),
        }
        result = jaxhpo.search.hyperband(part, task.start, num_trials=RUNGS * trainings, **given, **more)
        cost = result.history["calls"] * chunk
    else:
        if method == "grid":
            start = task.start if not many else jnp.zeros(())
            count = trainings if many or task.penalties == "one" else math.isqrt(trainings)
            result = jaxhpo.search.grid(task.outer_loss, start, resolution=count, batch=recipe.together, **given)
        elif method == "random":
            result = jaxhpo.search.random(
                task.outer_loss, task.start, num_trials=trainings, batch=recipe.together, **given
            )
        else:
            result = jaxhpo.search.bayes(
                task.outer_loss, task.start, num_trials=trainings, sampler=method.lower(), **given
            )
        cost = np.full(len(result.history["value"]), recipe.steps)
    spent, score = np.cumsum(cost), np.asarray(result.history["score"])
    within = spent <= budget
    best = int(np.nanargmin(np.where(within, score, np.nan)))
    h = jax.tree.map(lambda x: jnp.asarray(x[best], jnp.float32), result.history["hparams"])
    return h, spent[within], score[within], {"trainings": int(within.sum())}


def value_function(task, trainings):
    """Trainings on a design, then moves that share what is left."""
    recipe, learner = task.recipe, task.learner
    number, moves = recipe.design
    leaves, structure = jax.tree.flatten(task.start)
    if len(leaves) == 1:
        points = np.linspace(LOW, HIGH, number)[:, None]
    else:
        cube = scipy.stats.qmc.LatinHypercube(
            len(leaves), optimization="random-cd", seed=int(jax.random.bits(task.key))
        )
        points = LOW + (HIGH - LOW) * cube.random(number)
    design = jax.tree.unflatten(structure, list(jnp.asarray(points.T, jnp.float32)))
    train_loss = lambda params, h: learner.train_loss(params, h, learner.examples)  # noqa: E731
    both = lambda params, h: train_loss(params, h) + task.validation(params)  # noqa: E731
    step = count_arithmetic(jax.grad(both, (0, 1)), learner.params, task.start) / learner.unit
    inner = int((trainings - number - moves) * recipe.steps / moves / step)
    rates = {"params": optax.adam(1e-3), "hparams": optax.adam(0.05)}
    result = jaxhpo.search.value_function(
        train_loss,
        task.validation,
        learner.fit,
        design,
        optax.partition(rates, ("params", "hparams")),
        num_steps=number + moves,
        inner_steps=inner,
        tol=0.05,
        key=task.key,
        progress=False,
    )
    count = len(result.history["value"])
    # A move comes after each training from the design's last on; the last move is not followed by a training.
    spent = recipe.steps * np.arange(1, count + 1) + inner * step * np.maximum(0, np.arange(count) - number + 1)
    info = result.history["info"]  # `trained` is the validation loss of each training
    more = {"trainings": count, "inner steps of a move": inner, "status": result.status}
    more |= {name: np.asarray(info[name]).tolist() for name in ("gap", "multiplier", "surprise")}
    trained = np.asarray(info["trained"])
    best = int(np.nanargmin(trained))
    more["h of the best training"] = jax.tree.map(lambda x: jnp.asarray(x[best]), result.history["hparams"])
    return result.best_hparams, spent, trained, more


def adjoint(task, method):
    """The rule of a hypergradient method, and the inner steps between two steps of h."""
    learner = task.learner
    if method == "implicit, CG":
        curvature = jaxhpo.gauss_newton(
            lambda params, h, batch: learner.predict(params, batch.inputs),
            lambda logits, batch: cross_entropy(logits, batch.targets),
            learner.penalty,
        )
        return Implicit(CG(maxiter=10), curvature=curvature, on_failure="keep"), 10
    if method == "implicit, Neumann":
        return Implicit(Neumann(10, task.recipe.neumann), on_failure="keep"), 10
    return Unroll(), 20 if method == "unrolled" else 1


def within(h):
    return jnp.clip(h, LOW, HIGH)


def hypergradient(task, method, trainings):
    """One training with the default penalties, and on from there."""
    recipe, learner = task.recipe, task.learner
    rule, inner = adjoint(task, method)

    def outer(h, carry, key):
        state, at, mean, _ = carry  # the mean of h over the second half
        solution = learner.go_on(learner.warm, state, h, at, inner, rule)
        counted = jnp.maximum((at - recipe.steps) // inner - steps // 2, 0)
        mean = jax.tree.map(lambda m, h: jnp.where(counted > 0, m + (h - m) / (counted + 1), h), mean, h)
        return task.validation(solution.params), (solution.state, at + inner, mean, h), None

    steps = 0
    trained = jax.jit(learner.fit)(task.start)
    carry = (learner.warm.init(trained, task.start), jnp.asarray(recipe.steps), task.start, task.start)
    first = float(task.validation(trained))
    cost = count_arithmetic(jax.grad(lambda h: outer(h, carry, None)[0]), task.start, unknown_length=10) / learner.unit
    steps = int((trainings - 1 - CANDIDATES) * recipe.steps / cost)
    result = jaxhpo.tune(
        outer,
        task.start,
        optax.adam(RATES[method]),
        num_steps=steps,
        carry=carry,
        projections=jax.tree.map(lambda _: within, task.start),
        on_not_finite="skip",
        progress=False,
    )
    candidates = [result.best_hparams, result.carry[3], result.carry[2]]
    anew = jax.jit(task.outer_loss)
    trained_anew = [float(anew(h)) for h in candidates]
    values = np.concatenate([[first], result.history["value"], trained_anew])
    spent = recipe.steps + cost * np.arange(len(result.history["value"]) + 1)
    spent = np.append(spent, spent[-1] + recipe.steps * np.arange(1, CANDIDATES + 1))
    more = {"gradients a step": cost, "candidates": trained_anew, "status": result.status}
    best = int(np.nanargmin([*trained_anew, first]))
    return [*candidates, task.start][best], spent, values, more


def measure(task, method, trainings) -> dict[str, Any]:
    """One row."""
    began = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if method in CONTROLS:
            h = task.start if method == "untuned" else jax.tree.map(lambda x: jnp.full_like(x, NONE), task.start)
            spent, values, more = (
                np.array([float(task.recipe.steps)]),
                np.array([float(jax.jit(task.outer_loss)(h))]),
                {},
            )
        elif method == "value function":
            h, spent, values, more = value_function(task, trainings)
        else:
            run = search if method in SEARCHES else hypergradient
            h, spent, values, more = run(task, method, trainings)
    seconds = {"seconds": time.perf_counter() - began[0], "processor_seconds": time.process_time() - began[1]}
    best = np.fmin.accumulate(values)
    change = np.append(True, best[1:] < best[:-1])
    change[-1] = True
    if "h of the best training" in more:
        more["best training"] = task.judged(more.pop("h of the best training"))
    entries = np.concatenate([np.ravel(x) for x in jax.tree.leaves(h)])
    few = len(entries) <= 10
    chosen = {"h": entries.tolist()} if few else {"quantiles": np.quantile(entries, [0, 0.25, 0.5, 0.75, 1]).tolist()}
    return {
        "spent": float(spent[-1]),
        "validation": float(best[-1]),
        **task.judged(h),
        **chosen,
        **more,
        **seconds,
        "path": [np.round(spent[change], 1).tolist(), np.round(best[change], 5).tolist()],
    }


# --- the surface of two penalties -------------------------------------------------------------------------------------


def surface(task, resolution) -> dict[str, Any]:
    """The grid of both layers, and hypergradient methods with a twentieth of its gradients."""
    grid = jaxhpo.search.grid(
        task.outer_loss, task.start, resolution=resolution, low=LOW, high=HIGH, batch=resolution, progress=False
    )
    trainings = resolution**2
    values = np.asarray(grid.history["value"])
    goal = float(np.nanmin(values))
    rows = {}
    for method in GRADIENTS:
        row = measure(task, method, max(9, trainings // 20))
        spent, path = map(np.asarray, row["path"])
        reached = spent[path <= goal]
        rows[method] = row | {"reached": float(reached[0]) if len(reached) else None}
        print(
            f"{method:20} {row['validation']:.4f}, fresh {row['fresh']:.4f}, reached {rows[method]['reached']}",
            flush=True,
        )
    h = jax.tree.map(lambda x: jnp.asarray(x), grid.best_hparams)
    return {
        "resolution": resolution,
        "grid": {
            "validation": goal,
            "spent": trainings * task.recipe.steps,
            "h": [float(x) for x in jax.tree.leaves(h)],
        }
        | task.judged(h),
        "values": np.round(values.reshape(resolution, resolution), 4).tolist(),
        "methods": rows,
    }


# --- the report -------------------------------------------------------------------------------------------------------


def grouped(rows) -> dict[tuple, dict[str, list]]:
    """Rows of all seeds by problem, then by method; the smaller problems first."""
    found: dict[tuple, dict[str, list]] = {}
    for row in rows:
        problem = row["model"], row["data"], row["size"], row["penalties"]
        found.setdefault(problem, {}).setdefault(row["method"], []).append(row)

    def place(problem):
        model, data, size, penalties = problem
        return [*RECIPES].index(model), data != "mnist", size, PENALTIES.index(penalties)

    return {problem: found[problem] for problem in sorted(found, key=place)}


def told(values, digits=3) -> str:
    """Mean, and standard error where there are several."""
    values = np.asarray(values, float)
    error = f" ± {values.std(ddof=1) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{error}"


def table(rows) -> str:
    lines = []
    for (model, data, size, penalties), methods in grouped(rows).items():
        lines += ["", f"{model}, {data}, N = {size}, penalties: {penalties}"]
        names = f"{'validation':>15} {'fresh':>15} {'test':>15} {'errors, %':>14}"
        lines += [f"{'method':20} {'seeds':>5} {'gradients':>9} {names}"]
        for method in (*METHODS, *CONTROLS):
            if found := methods.get(method):
                column = lambda name, digits=3: told([row[name] for row in found], digits)  # noqa: B023, E731
                spent = np.mean([row["spent"] for row in found])
                lines.append(
                    f"{method:20} {len(found):5} {spent:9.0f} {column('validation'):>15} {column('fresh'):>15} "
                    f"{column('test'):>15} {column('errors', 1):>14}"
                )
    return "\n".join(lines[1:])


def save(report, path) -> None:
    """A line for each row."""
    rows = ",\n".join(map(json.dumps, report["rows"]))
    path.write_text(f'{{"rows": [\n{rows}\n],\n"surface": {json.dumps(report["surface"])}}}\n')


def draw(rows, path) -> None:
    """The best validation loss against gradients spent, a panel for each problem, of seeds that all have."""
    problems = grouped(rows)
    columns = min(3, len(problems))
    lines = -(-len(problems) // columns)
    figure, axes = plot.figure(lines, columns, width=1 + 4.6 * columns, height=0.6 + 3.6 * lines)
    for axis, ((model, data, size, penalties), methods) in zip(axes.flat, problems.items(), strict=False):
        seeds = [{row["seed"] for row in found} for found in methods.values()]
        shared = set.intersection(*seeds) or set.union(*seeds)
        methods = {name: [row for row in found if row["seed"] in shared] for name, found in methods.items()}
        methods = {name: found for name, found in methods.items() if found}
        longest = max(row["spent"] for found in methods.values() for row in found)
        at = np.linspace(0, longest, 400)
        for i, method in enumerate(METHODS):
            if method not in methods:
                continue
            curves = []
            for row in methods[method]:
                spent, best = map(np.asarray, row["path"])
                index = np.searchsorted(spent, at, "right") - 1
                curves.append(np.where(index >= 0, best[np.maximum(index, 0)], np.nan))
            color = plot.PALETTE[(i if method in SEARCHES else i - len(SEARCHES)) % len(plot.PALETTE)]
            style = "--" if method in SEARCHES else "-"
            axis.plot(at, np.mean(curves, 0), style, color=color, label=method, drawstyle="steps-post", linewidth=1.4)
        ends = {name: np.mean([row["validation"] for row in found]) for name, found in methods.items()}
        low, top = min(ends.values()), max(ends.values())
        if "untuned" in ends:  # half way up to it, where the methods differ, and all searches
            top = max(low + 0.5 * (ends["untuned"] - low), *(ends.get(name, low) for name in SEARCHES))
        room = 0.1 * (top - low) + 1e-3
        axis.set_ylim(low - room, top + room)
        name = {"one": "one penalty", "layer": "a penalty a layer", "weight": "a penalty a weight"}[penalties]
        axis.set_title(f"{TITLES[model]}, {TITLES[data]}, N = {size}, {name}", fontsize=plot.TITLE)
        axis.set(xlabel="training gradients", ylabel="best validation loss")
    for axis in axes.flat[len(problems) :]:
        axis.set_axis_off()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=6, loc="outside lower center", fontsize=9)
    plot.save(figure, path, dpi=130)


def draw_surface(found, path) -> None:
    """The validation loss over both penalties, and where the methods ended."""
    figure, axes = plot.figure(width=6.5, height=5)
    axis, values = axes[0, 0], np.asarray(found["values"])
    spots = np.linspace(LOW, HIGH, found["resolution"])
    # Rows are the first layer's penalties; values above the untuned loss are of no interest.
    mesh = axis.pcolormesh(spots, spots, values.T, cmap="viridis", vmax=np.nanquantile(values, 0.6), shading="nearest")
    figure.colorbar(mesh, ax=axis, label="validation loss", extend="max")
    grid = found["grid"]
    axis.plot(
        *grid["h"],
        "*",
        color="white",
        markeredgecolor="black",
        markersize=13,
        label=f"best of the grid, {grid['spent']:,} gradients",
    )
    for (method, row), marker in zip(found["methods"].items(), "osD^", strict=True):
        label = f"{method}, {row['spent']:,.0f} gradients"
        axis.plot(*row["h"], marker, markeredgecolor="black", markersize=7, label=label)
    axis.set(xlabel="h of the first layer", ylabel="h of the second layer")
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=2)
    plot.save(figure, path, dpi=130)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results" / "search")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a small run, whose figures mean nothing")
    parser.add_argument("--model", choices=RECIPES, default="mlp")
    parser.add_argument("--data", choices=("mnist", "cifar10"), default="mnist")
    parser.add_argument("--size", type=int, default=1000)
    parser.add_argument("--penalties", nargs="+", choices=PENALTIES)
    parser.add_argument("--methods", nargs="+", choices=(*METHODS, *CONTROLS), default=(*CONTROLS, *METHODS))
    parser.add_argument("--file", help="an npz file of CIFAR-10 in place of the archive")
    parser.add_argument("--surface", action="store_true", help="the grid of two penalties, and nothing else")
    given = parser.parse_args(arguments)
    if (given.model, given.data) == ("mlp", "cifar10"):
        parser.error("--data cifar10 is of LeNet: the MLP's rates were chosen on MNIST, and it diverges on CIFAR-10")
    given.out.mkdir(parents=True, exist_ok=True)
    recipe = RECIPES[given.model]
    given.penalties = given.penalties or (PENALTIES[1:2] if given.quick else PENALTIES)
    if given.quick:
        given.seeds, given.size = 1, min(given.size, 200)
        recipe = recipe._replace(trainings=9, steps=16, design=(2, 1), batch=recipe.batch and 40)
    path = given.out / "report.json"
    report = json.loads(path.read_text()) if path.exists() else {"rows": [], "surface": None}
    rows = report["rows"]
    key = lambda row: tuple(row[name] for name in ("model", "data", "size", "penalties", "seed", "method"))  # noqa: E731
    for seed in range(given.first_seed, given.first_seed + given.seeds):
        for penalties in ["layer"] if given.surface else given.penalties:
            task = Task(given.model, given.data, given.size, penalties, seed, given.file, recipe)
            if given.surface:
                report["surface"] = surface(task, 3 if given.quick else RESOLUTION)
                save(report, path)
                draw_surface(report["surface"], given.out / "surface.png")
                return
            for method in given.methods:
                if penalties == "weight" and method in SEARCHES:
                    continue  # 79 400 hyperparameters
                problem = given.model, given.data, given.size, penalties, seed, method
                row = dict(zip(("model", "data", "size", "penalties", "seed", "method"), problem, strict=True))
                row |= measure(task, method, recipe.trainings)
                print(*problem, {k: v for k, v in row.items() if isinstance(v, float)}, flush=True)
                rows[:] = [old for old in rows if key(old) != problem] + [row]
                save(report, path)  # what is measured is kept
    print(table(rows))
    draw(rows, given.out / "search.png")


if __name__ == "__main__":
    main()
