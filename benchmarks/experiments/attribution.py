"""What does each training image do to each test image, and does retraining without images confirm it?

`jaxhpo.attribution` differentiates the margins of ten test images by the weights of all training images. Tested by the
linear datamodeling score (LDS): Spearman's correlation, over 20 retrainings without random 1, 5 or 20 % of the images,
of foretold and real margins, mean over the test images. Two data sets: 400 of scikit-learn's digits, a network
64-32-10 (tanh), batches of 50, 500 steps of SGD (rate .1, momentum .9, cosine decay, an L2 penalty of 3e-3); and
500 images of MNIST, 784-32-10, 300 steps of Adam (rate 3e-3, cosine decay, an L2 penalty of 1.5e-2). Methods,
all on the same retrainings:

    metagradient       one derivative of the whole training, by `Unroll()`
    mean of 8          of 8 of them, each without a random tenth of the images
    last 50 steps      `Unroll(truncate=50)`
    influence          influence functions: `Implicit(CG())` with the Gauss-Newton matrix, at the end of training
    T1-T2              products of gradients at the end: `Implicit(Identity(1.0))`
    datamodel          ridge regression of margins on which images were trained on, from as many trainings without a
                       random fifth as the metagradient costs, and from 400 (MNIST: 100); penalties by leave-one-out
    random             normal numbers
    other seeds        the retrainings themselves, with other initial weights and batches

On the digits besides: other trainings (twice the penalty, none, a constant rate, Adam, relu), which may be rougher,
or better on test data; the effect averaged over seeds (16 derivatives with keys of their own, against retrainings
with 16 others); and the margin after retraining without the images that score highest or lowest. Costs are in plain
trainings, by counted operations. Settings were chosen by accuracy and LDS on validation images of seed 100 (twice the
penalty after the results of the first were known); reported are test images and seeds 0 to 4 (MNIST: 0 to 2).
(Ilyas, Engstrom, MAGIC, 2025, arXiv:2504.16430; Park et al., TRAK, 2023, arXiv:2303.14186)

    python benchmarks/experiments/attribution.py [--out DIR] [--quick] [--seeds 5] [--run-dir DIR]
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _experiment import each_seed, mean, parse, text, write
from sklearn.linear_model import RidgeCV

import jaxhpo
import jaxhpo.data
from jaxhpo import CG, Identity, Implicit, Unroll, plot

IMAGES, BATCH, DRAWS, DROPS = 10, 50, 20, (0.01, 0.05, 0.2)
CURVE = (0.02, 0.05, 0.1, 0.2, 0.4)
CHOSEN = "SGD, cosine, L2"
# Activation, L2 penalty, and the optimiser for a number of steps.
TRAININGS = {
    CHOSEN: (jnp.tanh, 3e-3, lambda steps: optax.sgd(optax.cosine_decay_schedule(0.1, steps), momentum=0.9)),
    "SGD, cosine, L2 6e-3": (
        jnp.tanh,
        6e-3,
        lambda steps: optax.sgd(optax.cosine_decay_schedule(0.1, steps), momentum=0.9),
    ),
    "SGD, cosine": (jnp.tanh, 0.0, lambda steps: optax.sgd(optax.cosine_decay_schedule(0.1, steps), momentum=0.9)),
    "SGD": (jnp.tanh, 0.0, lambda steps: optax.sgd(0.1, momentum=0.9)),
    "Adam": (jnp.tanh, 0.0, lambda steps: optax.adam(1e-2, eps_root=1e-8)),
    "SGD, cosine, L2, relu": (
        jax.nn.relu,
        3e-3,
        lambda steps: optax.sgd(optax.cosine_decay_schedule(0.03, steps), momentum=0.9),
    ),
    "Adam, cosine, L2": (
        jnp.tanh,
        1.5e-2,
        lambda steps: optax.adam(optax.cosine_decay_schedule(3e-3, steps), eps_root=1e-5),
    ),
}


class Problem:
    """A data set, and a training of it whose derivative rule is chosen.

    Args:
      parts: `(inputs, targets)` to train on and to measure on.
      training: a name in `TRAININGS`.
      steps: of the training.
    """

    def __init__(self, parts, training: str, steps: int):
        (self.x, self.y), (self.x_test, self.y_test) = (tuple(map(jnp.asarray, part)) for part in parts)
        self.activation, self.penalty, optimiser = TRAININGS[training]
        self.n, self.steps = len(self.x), steps
        self.solver = jaxhpo.from_optax(self.train_loss, optimiser(steps))
        matrix = jaxhpo.gauss_newton(
            lambda p, w, rows: self.logits(p, self.x[rows]),
            lambda z, rows: jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, self.y[rows])),
            lambda p, w: self.penalty * optax.tree.norm(p, squared=True),
        )
        self.influence = Implicit(CG(maxiter=200), curvature=matrix)

    def logits(self, p, x):
        return self.activation(x @ p["in"] + p["hidden"]) @ p["out"] + p["bias"]

    def train_loss(self, p, weights, rows):
        losses = optax.softmax_cross_entropy_with_integer_labels(self.logits(p, self.x[rows]), self.y[rows])
        return jnp.mean(weights[rows] * losses) + self.penalty * optax.tree.norm(p, squared=True)

    def train(self, weights, key, adjoint=Unroll()):  # noqa: B008
        """Parameters of a training; the key is for initial weights and batches."""
        first, second, order = jax.random.split(key, 3)
        wide, hidden = self.x.shape[1], 32
        start = {
            "in": jax.random.normal(first, (wide, hidden)) / wide**0.5,
            "hidden": jnp.zeros(hidden),
            "out": jax.random.normal(second, (hidden, 10)) / hidden**0.5,
            "bias": jnp.zeros(10),
        }
        epochs = -(-self.steps * BATCH // self.n)
        rows = jax.vmap(lambda key: jax.random.permutation(key, self.n))(jax.random.split(order, epochs))
        batches = rows.reshape(-1)[: self.steps * BATCH].reshape(self.steps, BATCH)
        # An implicit rule differentiates the condition of all images.
        last = {"condition_batch": jnp.arange(self.n)} if isinstance(adjoint, Implicit) else {}
        state = self.solver.init(start, weights)
        return jaxhpo.solve(self.solver, state, weights, batches, adjoint=adjoint, **last).params

    def margins(self, p):
        """The logit of the right class, less the log-sum-exp of the others, of the first test images."""
        logits, right = self.logits(p, self.x_test[:IMAGES]), jax.nn.one_hot(self.y_test[:IMAGES], 10, dtype=bool)
        others = jax.nn.logsumexp(jnp.where(right, -jnp.inf, logits), axis=1)
        return jnp.sum(jnp.where(right, logits, 0.0), axis=1) - others

    def accuracy(self, key):
        p = jax.jit(self.train)(jnp.ones(self.n), key)
        return float(jnp.mean(self.logits(p, self.x_test).argmax(1) == self.y_test))

    def attribution(self, adjoint=Unroll(), **settings):  # noqa: B008
        train = functools.partial(self.train, adjoint=adjoint)
        return jaxhpo.attribution(train, self.margins, self.n, checks=0, progress=False, **settings)

    def lds(self, scores, **settings):
        more = {"drops": DROPS, "draws": DRAWS, "batch_size": DRAWS, "progress": False, **settings}
        return jaxhpo.lds(self.train, self.margins, scores, **more)


def datamodels(problem, counts, key, seed):
    """Scores by ridge regression from so many trainings, by their number."""
    rng = np.random.default_rng(seed)
    kept = np.stack([rng.permutation(problem.n) >= problem.n // 5 for _ in range(max(counts))]).astype(np.float32)
    retrain = jax.jit(
        lambda kept: jax.lax.map(lambda w: problem.margins(problem.train(w, key)), kept, batch_size=DRAWS)
    )
    margins = np.asarray(retrain(kept))
    found = {}
    for count in counts:
        ridge = RidgeCV(np.logspace(-2, 5, 22), alpha_per_target=True).fit(kept[:count], margins[:count])
        found[count] = ridge.coef_
    return found


def by_fraction(result, name):
    return dict(zip(map(str, DROPS), result.mean(name).tolist(), strict=True))


def compared(problem, seed, mean_of, rules, many):
    """LDS and cost of each method on one problem."""
    key = jax.random.key(1000 + seed)
    found = {"metagradient": problem.attribution(key=key)}
    if mean_of > 1:
        found[f"mean of {mean_of}"] = problem.attribution(key=key, repeats=mean_of)
    for name, rule in rules.items():
        found[name] = problem.attribution(rule, key=key)
    costs = {name: attributed.trainings for name, attributed in found.items()}
    scores = {name: attributed.scores for name, attributed in found.items()}
    for count, coefficients in datamodels(problem, [round(costs["metagradient"]), many], key, seed).items():
        name = f"datamodel, {many}" if count == many else "datamodel, equal cost"
        scores[name], costs[name] = coefficients, count
    scores["random"] = np.random.default_rng(seed).normal(size=found["metagradient"].scores.shape)
    result = problem.lds(scores, key=key)
    rows = {name: {"lds": by_fraction(result, name), "trainings": costs.get(name, 0)} for name in scores}
    rows["other seeds"] = {"lds": by_fraction(result, "ceiling")}
    return rows, found["metagradient"]


def on_digits(seed, quick, tuning=False):
    parts = jaxhpo.data.digits(seed=seed, train=400, validation=300)
    used, steps = (parts.train, parts.validation if tuning else parts.test), 60 if quick else 500
    problem, key = Problem(used, CHOSEN, steps), jax.random.key(1000 + seed)
    rules = {"influence": problem.influence, "T1-T2": Implicit(Identity(1.0)), "last 50 steps": Unroll(truncate=50)}
    if quick:
        rules = {"T1-T2": rules["T1-T2"]}
    rows, attributed = compared(problem, seed, 1, rules, 40 if quick else 400)
    row = {"methods": rows, "trainings": {}}
    for name in list(TRAININGS)[: 1 if quick else None]:
        other = Problem(used, name, steps)
        row["trainings"][name] = {"accuracy": other.accuracy(key), "lds": rows["metagradient"]["lds"]}
        if name != CHOSEN:
            result = other.lds(other.attribution(key=key), key=key, ceiling=False)
            row["trainings"][name]["lds"] = by_fraction(result, "scores")
    curves = jaxhpo.drop_curves(
        problem.train,
        problem.margins,
        attributed,
        drops=CURVE,
        key=key,
        batch_size=IMAGES,
        draws=IMAGES,
        progress=False,
    )
    row["curves"] = {
        way: (getattr(curves, way) - curves.base).mean(1).tolist() for way in ("highest", "random", "lowest")
    }
    row["averaged"] = {} if quick else averaged_over_seeds(problem, attributed, seed)
    return row


def averaged_over_seeds(problem, one, seed, number=16):
    """LDS for the mean of retrainings over so many seeds, of as many derivatives with other seeds, and of one."""
    averaged = problem.attribution(repeats=number, new_seeds=True, key=jax.random.key(2000 + seed))
    found = {f"mean of {number}, other seeds": averaged, "one seed's": one}
    result = problem.lds(found, seeds=number, ceiling=False, key=jax.random.key(3000 + seed))
    costs = averaged.trainings, one.trainings
    return {n: {"lds": by_fraction(result, n), "trainings": cost} for n, cost in zip(found, costs, strict=True)}


def on_mnist(seed, quick, tuning=False):
    parts = jaxhpo.data.mnist(seed=seed, train=500, validation=2000)
    used, steps = (parts.train, parts.validation if tuning else parts.test), 20 if quick else 300
    problem, key = Problem(used, "Adam, cosine, L2", steps), jax.random.key(1000 + seed)
    rules = {} if quick else {"influence": problem.influence}
    rows, _ = compared(problem, seed, 1 if quick else 8, rules, 40 if quick else 100)
    names = ("Adam, cosine, L2", CHOSEN, "Adam")[: 1 if quick else None]
    return {"methods": rows, "accuracy": {name: Problem(used, name, steps).accuracy(key) for name in names}}


def over_seeds(rows, path, key):
    """The mean over rows of `row[path][name][key]`, by name."""
    return {
        name: {drop: mean([row[path][name][key][drop] for row in rows]) for drop in map(str, DROPS)}
        for name in rows[0][path]
    }


def table(title, summary, extra):
    print(f"\n{title:32}" + "".join(f"{float(drop):>15.0%}" for drop in DROPS))
    for name, values in summary.items():
        print(f"{name:32}" + "".join(f"{text(values[str(drop)]):>15}" for drop in DROPS) + f"  {extra.get(name, '')}")


def picture(report, path):
    figure, axes = plot.figure(1, 3, width=13, height=4.4)
    methods = report["digits"]["methods"]
    colors = [plot.BLUE if name == "metagradient" else "0.45" for name in methods]
    middle = {"5 % dropped": np.array([[m["0.05"]["mean"], m["0.05"]["error"] or 0] for m in methods.values()]).T}
    plot.dots(axes[0, 0], list(methods), middle, colors=colors)
    axes[0, 0].set_title("digits: LDS, 5 % left out", fontsize=plot.TITLE)
    trainings = report["digits"]["trainings"]
    for name, row in trainings.items():
        x, y = row["accuracy"]["mean"], row["lds"]["0.05"]["mean"]
        errors = {"xerr": row["accuracy"]["error"], "yerr": row["lds"]["0.05"]["error"]}
        color = plot.BLUE if name == CHOSEN else "0.45"
        axes[0, 1].errorbar(x, y, **errors, fmt="o", color=color, capsize=3)
        axes[0, 1].annotate(name, (x, y), (6, -9 if name == "SGD" else 9), **plot.BESIDE | {"color": color})
    axes[0, 1].set(xlabel="test accuracy", ylabel="LDS of one metagradient, 5 % left out")
    axes[0, 1].margins(x=0.35, y=0.12)
    axes[0, 1].locator_params(axis="x", nbins=5)
    axes[0, 1].set_title("other trainings of the digits", fontsize=plot.TITLE)
    for way, color in (("lowest", plot.GREEN), ("random", "0.45"), ("highest", plot.VERMILION)):
        values = report["digits"]["curves"][way]
        band = [[v[part] or 0 for v in values] for part in ("mean", "error")]
        label = "random images" if way == "random" else f"the {way} scores"
        plot.band(axes[0, 2], 100 * np.array(CURVE), *band, label=label, color=color, marker="o")
    axes[0, 2].set(xlabel="% of the images left out", ylabel="change of the margin")
    axes[0, 2].legend(**plot.LEGEND)
    axes[0, 2].set_title("digits: retrained without images", fontsize=plot.TITLE)
    found = {name: methods[name]["0.05"]["mean"] for name in ("metagradient", "influence") if name in methods}
    title = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
    figure.suptitle(f"Correlation of foretold and real margins, retrained without 5 %: {title}", fontsize=12)
    plot.save(figure, path)


def main(arguments=None) -> None:
    given = parse(__file__, __doc__, arguments, seeds=5, quick=1)
    digits = each_seed(given, lambda seed, folder: on_digits(seed, given.quick), "digits")
    given.seeds, seeds = min(given.seeds, 3), given.seeds
    mnist = each_seed(given, lambda seed, folder: on_mnist(seed, given.quick), "mnist")
    given.seeds = seeds
    report = {"digits": {}, "mnist": {}}
    for name, rows in (("digits", digits), ("mnist", mnist)):
        report[name]["methods"] = over_seeds(rows, "methods", "lds")
        costs = {m: r["trainings"] for m, r in rows[0]["methods"].items() if r.get("trainings")}
        report[name]["cost in trainings"] = costs
        table(f"LDS, {name}", report[name]["methods"], {m: f"{cost:.3g} trainings" for m, cost in costs.items()})
    report["digits"]["trainings"] = {
        name: {
            "accuracy": mean([row["trainings"][name]["accuracy"] for row in digits]),
            "lds": over_seeds(digits, "trainings", "lds")[name],
        }
        for name in digits[0]["trainings"]
    }
    found = report["digits"]["trainings"]
    accuracies = {name: f"accuracy {text(row['accuracy'])}" for name, row in found.items()}
    table("one metagradient, digits", {name: row["lds"] for name, row in found.items()}, accuracies)
    report["digits"]["averaged"] = over_seeds(digits, "averaged", "lds")
    table("effect averaged over seeds", report["digits"]["averaged"], {})
    report["digits"]["curves"] = {
        way: [mean(values) for values in zip(*(row["curves"][way] for row in digits), strict=True)]
        for way in digits[0]["curves"]
    }
    names = mnist[0]["accuracy"]
    report["mnist"]["accuracy"] = {name: mean([row["accuracy"][name] for row in mnist]) for name in names}
    print("\nMNIST, accuracy:", {name: text(value) for name, value in report["mnist"]["accuracy"].items()})
    write(given, {**report, "rows": {"digits": digits, "mnist": mnist}})
    picture(report, given.out / "attribution.png")


if __name__ == "__main__":
    main()
