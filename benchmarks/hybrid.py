"""Whether Optuna with gradients inside its trials beats Optuna alone, for as many training gradients.

A network of one hidden layer on digits, 100 full-batch steps of SGD with momentum: 200 images to train, 300 to choose
by. Four activations and four widths, and continuous hyperparameters, of two sizes:

    few     a penalty for each layer, a schedule of 5 learning rates, interpolated: 7
    many    a penalty for each pixel and one for the other layer, a schedule of 10 learning rates: 75

    hybrid    Optuna's TPE chooses activation and width; each trial tunes all others by at most twelve outer steps of
              Adam from .001 (penalties) and .1 (rates), and is pruned from the fourth on where it is above the median
    TPE       Optuna's TPE chooses everything, and begins with the same .001 and .1
    random    random search over everything

`jaxhpo.search.tune_trial` is for trials that are programs of their own. Here widths are masks; all trials share one.

Each has 240 trainings; a hypergradient (`Unroll`) counts as three. Compared by the loss on 1297 new images, after a
training on the 500 with what was found. Errors are standard errors over seeds, of splits and initial weights; those of
differences are paired.

    python benchmarks/hybrid.py [--out DIR] [--quick] [--seeds 12]
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna
from _arguments import parse

import jaxhpo
import jaxhpo.data
from jaxhpo import plot

ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu, "sine": jnp.sin, "bump": lambda z: jnp.exp(-(z**2))}
WIDTHS = (4, 8, 16, 32)
STEPS, HYPERGRADIENT, OUTER, WARMUP = 100, 3, 12, 4  # a hypergradient takes as much as three trainings
SPACES = {"few": ((), 5), "many": ((64, 1), 10)}  # shape of the first layer's penalties, learning rates
BOUNDS = {"penalty": (1e-6, 1e-1), "rates": (1e-3, 1.0)}


def start(space):
    shape, knots = SPACES[space]
    return {"penalty": {"in": jnp.full(shape, 1e-3), "out": jnp.array(1e-3)}, "rates": jnp.full(knots, 0.1)}


def initial(seed):
    """Weights of the widest network; `network` takes the first units of the hidden layer."""
    first, second = jax.random.split(jax.random.key(seed))
    return {
        "in": jax.random.normal(first, (64, WIDTHS[-1])) / 8,
        "shift": jnp.zeros(WIDTHS[-1]),
        "out": jax.random.normal(second, (WIDTHS[-1], 10)),
        "bias": jnp.zeros(10),
    }


def cross_entropy(params, kind, part):
    """Of a kind (activation, width), two integers, so that all of them are one program."""
    activation, width = kind
    hidden = jax.lax.switch(activation, list(ACTIVATIONS.values()), part.inputs @ params["in"] + params["shift"][None])
    used = jnp.arange(WIDTHS[-1]) < width
    logits = (hidden * used[None] / jnp.sqrt(width)) @ params["out"] + params["bias"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, part.targets).mean()


def train(h, kind, params, part):
    """Parameters after all steps on a part of the data."""

    def loss(w, h, batch):
        return cross_entropy(w, kind, part) + sum(jnp.sum(h["penalty"][name] * w[name] ** 2) for name in ("in", "out"))

    def rate(step):
        knots = h["rates"]
        return jnp.exp(jnp.interp(step / (STEPS - 1), jnp.linspace(0, 1, len(knots)), jnp.log(knots)))

    solver = jaxhpo.from_optax(loss, lambda h: optax.sgd(rate, momentum=0.9))
    return jaxhpo.solve(solver, solver.init(params, h), h, num_steps=STEPS).params


def validation_loss(h, kind, params, parts):
    return cross_entropy(train(h, kind, params, parts.train), kind, parts.validation)


@jax.jit
def test_loss(h, kind, params, parts):
    both = jax.tree.map(lambda *x: jnp.concatenate(x), parts.train, parts.validation)
    return cross_entropy(train(h, kind, params, both), kind, parts.test)


def make_outer_step():
    """One program for all kinds, data and initial weights of a space, which are in the carry."""
    step = jaxhpo.outer_step(
        lambda h, carry, key: (validation_loss(h, *carry), carry, None), optax.adam(0.2), transforms=jaxhpo.positive
    )
    return step.init, jax.jit(step.update)


def suggest_kind(trial):
    activation = trial.suggest_categorical("activation", list(ACTIVATIONS))
    width = trial.suggest_categorical("width", WIDTHS)
    return jnp.array(list(ACTIVATIONS).index(activation)), jnp.array(width)


def suggest(trial, space):
    """All continuous hyperparameters, log-uniform."""

    def drawn(name, leaf):
        low, high = BOUNDS[name.partition(".")[0]]
        flat = [trial.suggest_float(f"{name}.{i}", low, high, log=True) for i in range(leaf.size)]
        return jnp.array(flat).reshape(leaf.shape)

    h = start(space)
    penalty = {name: drawn(f"penalty.{name}", leaf) for name, leaf in h["penalty"].items()}
    return {"penalty": penalty, "rates": drawn("rates", h["rates"])}


class Spent:
    """What was found so far.

    Attributes:
      curve: trainings spent, and the lowest validation loss then.
      best: its hyperparameters, and its kind.
    """

    def __init__(self, budget):
        self.budget, self.trainings, self.curve, self.best, self.value = budget, 0, [], None, float("inf")

    def affords(self, cost):
        return self.trainings + cost <= self.budget

    def add(self, cost, value, h, kind):
        self.trainings += cost
        if value < self.value:  # never of NaN
            self.value, self.best = value, (h, kind)
        self.curve.append((self.trainings, self.value))


def hybrid(space, carry, seed, budget, steps):
    init, update = steps
    spent = Spent(budget)

    def objective(trial):
        kind = suggest_kind(trial)
        state, lowest = init(start(space), (kind, *carry)), float("inf")
        for i in range(OUTER):
            if not spent.affords(HYPERGRADIENT):
                trial.study.stop()
                break
            state, report = update(state)
            value = float(report.value)
            spent.add(HYPERGRADIENT, value, report.hparams, kind)
            if not report.finite:
                break
            lowest = min(lowest, value)
            trial.report(lowest, i)
            if trial.should_prune():
                raise optuna.TrialPruned
        return lowest if np.isfinite(lowest) else None  # a failed trial

    pruner = optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=WARMUP - 1)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed), pruner=pruner)
    study.optimize(objective)
    return spent, len(study.trials)


def everything(space, carry, sampler, budget, value):
    """Optuna alone."""
    spent = Spent(budget)

    def objective(trial):
        kind, h = suggest_kind(trial), suggest(trial, space)
        loss = float(value(h, kind, *carry))
        spent.add(1, loss, h, kind)
        return loss if np.isfinite(loss) else None

    study = optuna.create_study(sampler=sampler)
    h = start(space)
    leaves = {"rates": h["rates"], "penalty.in": h["penalty"]["in"], "penalty.out": h["penalty"]["out"]}
    study.enqueue_trial({f"{name}.{i}": float(x) for name, leaf in leaves.items() for i, x in enumerate(leaf.ravel())})
    study.optimize(objective, n_trials=budget)
    return spent, budget


METHODS = {"hybrid": plot.BLUE, "TPE": plot.VERMILION, "random": "0.5"}


def measure(space, seeds, budget):
    """A row for each seed and method."""
    steps, value, rows = make_outer_step(), jax.jit(validation_loss), []
    for seed in range(seeds):
        carry = initial(seed), jaxhpo.data.digits(seed)
        samplers = {"TPE": optuna.samplers.TPESampler(seed=seed), "random": optuna.samplers.RandomSampler(seed=seed)}
        for method in METHODS:
            print(f"{space}: {method}, seed {seed}", file=sys.stderr, flush=True)
            if method == "hybrid":
                spent, trials = hybrid(space, carry, seed, budget, steps)
            else:
                spent, trials = everything(space, carry, samplers[method], budget, value)
            h, kind = spent.best
            places, lowest = np.array(spent.curve).T
            at = np.searchsorted(places, range(1, budget + 1), "right") - 1
            rows.append(
                {
                    "space": space,
                    "method": method,
                    "seed": seed,
                    "trials": trials,
                    "trainings": spent.trainings,
                    "activation": list(ACTIVATIONS)[int(kind[0])],
                    "width": int(kind[1]),
                    "validation": spent.value,
                    "test": float(test_loss(h, kind, *carry)),
                    "curve": [float(lowest[i]) if i >= 0 else None for i in at],
                }
            )
    return rows


def mean_and_error(values):
    error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "error": error}


def summary(rows):
    """Mean losses, and paired differences of the hybrid to the others."""
    found = {}
    for space in dict.fromkeys(row["space"] for row in rows):
        of = lambda method, what: np.array([r[what] for r in rows if (r["space"], r["method"]) == (space, method)])  # noqa: E731, B023
        found[space] = {
            method: {what: mean_and_error(of(method, what)) for what in ("validation", "test", "trials")}
            for method in METHODS
        }
        for rival in list(METHODS)[1:]:
            less = of("hybrid", "test") - of(rival, "test")
            found[space][f"hybrid minus {rival}, test"] = mean_and_error(less) | {"seeds below": int((less < 0).sum())}
    return found


def picture(rows, found, path):
    spaces = list(dict.fromkeys(row["space"] for row in rows))
    figure, axes = plot.figure(1, len(spaces) + 1, width=3.7 * (len(spaces) + 1), height=3.5)
    last = axes[0, -1]
    for place, (axis, space) in enumerate(zip(axes[0], spaces, strict=False)):
        for i, (method, color) in enumerate(METHODS.items()):
            own = [row for row in rows if (row["space"], row["method"]) == (space, method)]
            curves = np.array([row["curve"] for row in own], float)
            error = curves.std(0, ddof=1) / len(own) ** 0.5 if len(own) > 1 else np.zeros(curves.shape[1])
            plot.band(axis, range(1, curves.shape[1] + 1), curves.mean(0), error, label=method, color=color, lw=2)
            tests = np.array([row["test"] for row in own])
            at = place + 0.25 * (i - 1)
            last.plot(np.full(len(tests), at), tests, "o", ms=3, color=color, alpha=0.4)
            mean = found[space][method]["test"]
            last.errorbar(at, mean["mean"], mean["error"], fmt="D", ms=6, capsize=3, color=color)
        size = sum(leaf.size for leaf in jax.tree.leaves(start(space)))
        axis.set(xlabel="trainings", ylabel="lowest validation loss", yscale="log", ylim=(0.2, 1))
        axis.set_yticks([0.2, 0.3, 0.5, 0.7, 1], ["0.2", "0.3", "0.5", "0.7", "1"])
        axis.minorticks_off()
        axis.set_title(f"{space}: {size} continuous hyperparameters", fontsize=plot.TITLE)
    axes[0, 0].legend(**plot.LEGEND)
    last.set_xticks(range(len(spaces)), spaces)
    last.set(ylabel="test loss")
    last.set_title("after training on all 500 images", fontsize=plot.TITLE)
    less = {space: found[space]["hybrid minus TPE, test"] for space in spaces}
    by = ", ".join(f"{x['mean']:+.3f} ± {x['error'] or 0:.3f} ({space})" for space, x in less.items())
    title = f"Test loss with gradients inside Optuna's trials, less that of Optuna alone: {by}"
    figure.suptitle(title, fontsize=12)
    plot.save(figure, path)


def main(arguments=None) -> None:
    given = parse(__doc__, arguments, seeds=12, quick=1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # a trial that failed is a warning
    budget = 24 if given.quick else 240
    rows = [row for space in list(SPACES)[: 1 if given.quick else None] for row in measure(space, given.seeds, budget)]
    found = summary(rows)
    for name, values in found.items():
        print(f"{name}: {json.dumps(values)}")
    (given.out / "hybrid.json").write_text(json.dumps({"summary": found, "rows": rows}, indent=1) + "\n")
    picture(rows, found, given.out / "hybrid.png")


if __name__ == "__main__":
    main()
