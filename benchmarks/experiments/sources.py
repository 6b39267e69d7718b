"""Whether the share of each source of a mixture, learned by its hypergradient, finds the sources that are spoilt.

Digits (8×8 pixels), 750 training images from five sources, 100 clean validation images, 947 test images:

    small            60 images as they are
    large            140 images as they are
    random labels    200 images, each label drawn anew
    permuted         200 images whose labels are renamed, all in the same way
    noise            150 right labels of images that are noise

A network 64-32-10 (tanh), 100 full-batch steps of SGD with momentum. The train loss is the mean of each source times
its share; the five shares sum to one. How they are chosen:

    uniform          all images alike: shares proportional to sizes
    stratified       a fifth each
    random search    the best of 90 draws, by validation loss: as many trainings as the next takes
    learned          30 steps of Adam from a fifth each, by `Unroll`, whose hypergradient counts as three trainings
    oracle           small and large, all images alike

Each is also trained with the validation images added, in whose presence nothing can be chosen any more: the mixture and
they weigh in proportion to the numbers of images in them, that of a mixture being (Σ w)² / Σ w², the size of as many
equal weights. `validation alone` is trained on these only. Rates, steps and penalty were not searched for; seeds 100
and 101 were looked at first. Errors are standard errors over seeds, of splits, sources and initial weights; those of
differences are paired.

The form that large models need: Pan et al., ScaleBiO: Scalable Bilevel Optimization for LLM Data Reweighting, 2024,
arXiv:2406.19976.

    python benchmarks/experiments/sources.py [--out DIR] [--quick] [--seeds 8] [--run-dir DIR]
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _experiment import each_seed, mean, paired, parse, standard_errors, text, write

import jaxhpo
import jaxhpo.data
from jaxhpo import plot

SIZES = {"small": 60, "large": 140, "random labels": 200, "permuted": 200, "noise": 150}
CLEAN = ("small", "large")
VALIDATION, HIDDEN, STEPS, PENALTY = 100, 32, 100, 1e-3
OUTER, HYPERGRADIENT, OUTER_RATE = 30, 3, 0.3
COLORS = {
    "uniform": "0.5",
    "stratified": plot.ORANGE,
    "random search": plot.VERMILION,
    "learned": plot.BLUE,
    "oracle": plot.GREEN,
}
COUNTS = np.array(list(SIZES.values()))
SOURCE = np.repeat(np.arange(len(SIZES)), COUNTS)  # of each training image


def mixture(part, seed):
    """Training images in the order of their sources, three of which are spoilt."""
    rng = np.random.default_rng(seed)
    x, y = part.inputs.copy(), part.targets.copy()
    of = {name: np.flatnonzero(SOURCE == place) for place, name in enumerate(SIZES)}
    y[of["random labels"]] = rng.integers(0, 10, len(of["random labels"]))
    y[of["permuted"]] = (y[of["permuted"]] + rng.integers(1, 10)) % 10  # no label stays
    noise = rng.normal(x.mean(), x.std(), x[of["noise"]].shape)
    x[of["noise"]] = np.clip(noise, 0, 1)
    return jnp.asarray(x), jnp.asarray(y)


def load(seed):
    parts = jaxhpo.data.digits(seed, train=len(SOURCE), validation=VALIDATION)
    others = [(jnp.asarray(part.inputs), jnp.asarray(part.targets)) for part in (parts.validation, parts.test)]
    return mixture(parts.train, seed), *others


def initial(seed):
    first, second = jax.random.split(jax.random.key(seed))
    return {
        "in": jax.random.normal(first, (64, HIDDEN)) / 8,
        "shift": jnp.zeros(HIDDEN),
        "out": jax.random.normal(second, (HIDDEN, 10)) / HIDDEN**0.5,
        "bias": jnp.zeros(10),
    }


def logits(params, x):
    return jnp.tanh(x @ params["in"] + params["shift"][None]) @ params["out"] + params["bias"][None]


def cross_entropies(params, images):
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, images[0]), images[1])


def train_loss(params, weights, images):
    """Of weights of images that sum to one."""
    decay = sum(jnp.sum(params[name] ** 2) for name in ("in", "out"))
    return jnp.sum(weights * cross_entropies(params, images)) + PENALTY * decay


SOLVER = jaxhpo.from_optax(train_loss, optax.sgd(0.1, momentum=0.9))


def of_images(shares):
    """Weights of images, of the shares of their sources."""
    return (shares / COUNTS)[SOURCE]


def train(weights, params, images):
    return jaxhpo.solve(SOLVER, SOLVER.init(params, weights), weights, lambda t: images, num_steps=STEPS).params


def validation_loss(shares, params, mixed, validation):
    return cross_entropies(train(of_images(shares), params, mixed), validation).mean()


def with_validation(shares):
    """Weights of the mixture's images and of the validation images after them."""
    weights = of_images(shares)
    worth = weights.sum() ** 2 / (weights**2).sum()
    both = jnp.concatenate([worth * weights / weights.sum(), jnp.ones(VALIDATION)])
    return both / both.sum()


@jax.jit
def judge(weights, params, images, new):
    """Accuracy on new images, in percent."""
    return 100 * jnp.mean(jnp.argmax(logits(train(weights, params, images), new[0]), 1) == new[1])


STEP = jaxhpo.outer_step(
    lambda shares, carry, key: (validation_loss(shares, *carry), carry, None),
    optax.adam(OUTER_RATE),
    transforms=jaxhpo.simplex,
)
UPDATE = jax.jit(STEP.update)
LOSSES = jax.jit(jax.vmap(validation_loss, (0, None, None, None)))


def learn(shares, params, mixed, validation, num_steps):
    """Shares after so many outer steps, and those at each step."""
    state, path = STEP.init(shares, (params, mixed, validation)), []
    for _ in range(num_steps):
        state, report = UPDATE(state)
        path.append(report.hparams)
    return STEP.hparams(state), path


def search(seed, params, mixed, validation, trainings):
    """The best of random shares, by validation loss."""
    drawn = jax.random.dirichlet(jax.random.key(seed), jnp.ones(len(SIZES)), (trainings,))
    return drawn[jnp.argmin(LOSSES(drawn, params, mixed, validation))]


def measure(seed, num_steps):
    mixed, validation, new = load(seed)
    params, even = initial(seed), jnp.full(len(SIZES), 1 / len(SIZES))
    clean = np.array([SIZES[name] if name in CLEAN else 0 for name in SIZES])
    learned, path = learn(even, params, mixed, validation, num_steps)
    shares = {
        "uniform": jnp.asarray(COUNTS / COUNTS.sum(), jnp.float32),
        "stratified": even,
        "random search": search(seed, params, mixed, validation, HYPERGRADIENT * num_steps),
        "learned": learned,
        "oracle": jnp.asarray(clean / clean.sum(), jnp.float32),
    }
    both = tuple(jnp.concatenate(pair) for pair in zip(mixed, validation, strict=True))
    alone = jnp.concatenate([jnp.zeros(len(SOURCE)), jnp.full(VALIDATION, 1 / VALIDATION)])
    return {
        "shares": {how: each.tolist() for how, each in shares.items()},
        "path": np.asarray(path).tolist(),
        "test": {how: float(judge(of_images(each), params, mixed, new)) for how, each in shares.items()},
        "test with validation": {
            **{how: float(judge(with_validation(each), params, both, new)) for how, each in shares.items()},
            "validation alone": float(judge(alone, params, both, new)),
        },
    }


def summary(rows):
    found = {"shares": {}, "test": {}, "test with validation": {}, "learned less": {}}
    for how in COLORS:
        found["shares"][how] = {
            name: mean([row["shares"][how][place] for row in rows]) for place, name in enumerate(SIZES)
        }
    for key in ("test", "test with validation"):
        columns = {how: [row[key][how] for row in rows] for how in rows[0][key]}
        found[key] = {how: mean(values) for how, values in columns.items()}
        others = [how for how in columns if how != "learned"]
        found["learned less"][key] = {how: paired(columns["learned"], columns[how]) for how in others}
    spoilt = [
        sum(x for x, name in zip(row["shares"]["learned"], SIZES, strict=True) if name not in CLEAN) for row in rows
    ]
    found["share of spoilt sources"] = mean(spoilt)
    return found


def table(found):
    print("| | " + " | ".join(SIZES) + " | test, % | with validation images |")
    print("|" + "---|" * (len(SIZES) + 3))
    for how in COLORS:
        shares = [text(found["shares"][how][name], ".2f") for name in SIZES]
        tests = [text(found[key][how], ".1f") for key in ("test", "test with validation")]
        print("| " + " | ".join([how, *shares, *tests]) + " |")
    alone = text(found["test with validation"]["validation alone"], ".1f")
    print("| validation alone |" + " |" * (len(SIZES) + 1) + f" {alone} |")


def picture(rows, found, path):
    figure, axes = plot.figure(1, 2, width=10, height=3.8)
    paths = np.array([row["path"] for row in rows])  # (seeds, steps, sources)
    error = standard_errors(paths)
    for place, name in enumerate(SIZES):
        style = {"lw": 2, "ls": "-" if name in CLEAN else "--", "color": plot.PALETTE[place]}
        plot.band(axes[0, 0], range(paths.shape[1]), paths.mean(0)[:, place], error[:, place], label=name, **style)
    axes[0, 0].set(xlabel="outer step", ylabel="share of the train loss", ylim=(0, None))
    axes[0, 0].legend(**plot.LEGEND)
    hows = list(found["test with validation"])
    for key, offset, color in (("test", 0.13, plot.SKY), ("test with validation", -0.13, plot.BLUE)):
        own = [how for how in hows if how in found[key]]
        values = [found[key][how] for how in own]
        places = [-hows.index(how) + offset for how in own]
        errors = [value["error"] or 0 for value in values]
        label = "mixture" if key == "test" else "and validation images"
        style = {"fmt": "o", "ms": 6, "capsize": 3, "color": color, "label": label}
        axes[0, 1].errorbar([value["mean"] for value in values], places, xerr=errors, **style)
    axes[0, 1].set_yticks([-place for place in range(len(hows))], hows)
    axes[0, 1].set(xlabel="test accuracy, %")
    axes[0, 1].legend(**plot.LEGEND, loc="lower left")
    less, spoilt = found["learned less"], found["share of spoilt sources"]
    title = "Spoilt sources keep {:.1%} of the train loss; points to the oracle {}, to validation images alone {}"
    oracle, alone = (text(less["test with validation"][how], ".1f") for how in ("oracle", "validation alone"))
    figure.suptitle(title.format(spoilt["mean"], oracle, alone), fontsize=11)
    plot.save(figure, path)


def main(arguments=None) -> None:
    given = parse(__file__, __doc__, arguments, seeds=8, quick=2)
    rows = each_seed(given, lambda seed, run_dir: measure(seed, 4 if given.quick else OUTER))
    found = summary(rows)
    table(found)
    for key, rivals in found["learned less"].items():
        print(f"learned less, {key}: " + ", ".join(f"{how} {text(each, '.2f')}" for how, each in rivals.items()))
    write(given, {"summary": found, "rows": rows})
    picture(rows, found, given.out / "sources.png")


if __name__ == "__main__":
    main()
