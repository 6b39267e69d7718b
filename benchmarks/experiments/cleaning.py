"""Whether one weight per training image, learned by its hypergradient, cleans random labels, and whether that pays.

MNIST, 5000 training images of which 2500 have a label drawn at random (a tenth of these by chance the right one), and
5000, 1000, 200 or 50 clean images; softmax regression on pixels less their mean, 150 full-batch steps of SGD with
momentum, 10 000 test images.

    clean alone                 trained on the clean images only: what papers on cleaning leave out
    noisy + clean               on all images alike, without a penalty, as papers do, and with one
    agreeing labels + clean     on the clean images, and those whose label a model of the clean images predicts
    learned weights             on the noisy images, each with a weight in [0, 1] that lowers the loss of the clean ones
    learned weights + clean     with these weights, and the clean images with weight 1
    right labels + clean        without the wrong labels: what no method knows

The weights, .5 to begin with, take 20 steps of Adam (5 with 200 or 50 clean images: more fit the clean images, and lose
accuracy), between which training goes on for 20 steps; the hypergradient is implicit, with 10 iterations of conjugate
gradients. Labels with a weight below .5 are flagged; F1 is of flagged against wrong labels. The penalty of each method
and number of clean images, the number of outer steps and their rate were chosen on seed 100, by 5000 other images.

Setting and recorded figures: Franceschi, Donini, Frasconi, Pontil, Forward and Reverse Gradient-Based Hyperparameter
Optimization, 2017, arXiv:1703.01785, section 5.1: test accuracy 87.74 for noisy + clean, 90.07 to 90.09 cleaned, F1
.91 to .92.

    python benchmarks/experiments/cleaning.py [--out DIR] [--quick] [--seeds 3] [--run-dir DIR]
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _experiment import each_seed, mean, paired, parse, text, write

import jaxhpo
import jaxhpo.data
from jaxhpo import plot

NOISY, SIZES = 5000, (5000, 1000, 200, 50)
STEPS, INNER, OUTER_RATE = 150, 20, 0.3
METHODS = {
    "clean alone": plot.VERMILION,
    "noisy + clean, no penalty": "0.75",
    "noisy + clean": "0.45",
    "agreeing labels + clean": plot.ORANGE,
    "learned weights": plot.SKY,
    "learned weights + clean": plot.BLUE,
    "right labels + clean": plot.GREEN,
}
CLEANED = "learned weights + clean"
# By the number of clean images, as in SIZES
OUTER = (20, 20, 5, 5)
PENALTY = {
    "clean alone": (3e-4, 3e-3, 1e-4, 1e-3),
    "noisy + clean, no penalty": (0.0, 0.0, 0.0, 0.0),
    "noisy + clean": (3e-3, 1e-2, 1e-2, 1e-2),
    "agreeing labels + clean": (1e-4, 3e-4, 1e-3, 3e-3),
    "learned weights": (1e-3, 1e-3, 1e-2, 1e-2),
    "learned weights + clean": (1e-3, 1e-3, 1e-2, 1e-2),
    "right labels + clean": (1e-4, 1e-3, 1e-3, 1e-3),
}


def corrupt(labels, seed):
    """Labels of which half are drawn anew, and which of them are wrong."""
    rng, noisy = np.random.default_rng(seed), labels.copy()
    drawn = rng.permutation(len(labels))[: len(labels) // 2]
    noisy[drawn] = rng.integers(0, 10, len(drawn))
    return noisy, noisy != labels


def load(seed, noisy, clean, test=None):
    """Noisy, clean and test images, less the mean of the first, and which labels are wrong."""
    parts = jaxhpo.data.mnist(seed, train=noisy, validation=clean, test=test)
    labels, wrong = corrupt(parts.train.targets, seed)
    centre = parts.train.inputs.mean(0)
    images = [(jnp.asarray(part.inputs - centre), jnp.asarray(part.targets)) for part in parts]
    return (images[0][0], jnp.asarray(labels)), images[1], images[2], wrong


def initial():
    return {"w": jnp.zeros((784, 10)), "b": jnp.zeros(10)}


def cross_entropies(params, images):
    x, y = images
    return optax.softmax_cross_entropy_with_integer_labels(x @ params["w"] + params["b"][None], y)


def train_loss(params, weights, batch):
    """Weighted mean over images; only the ratios of weights matter."""
    images, penalty = batch
    fit = jnp.sum(weights * cross_entropies(params, images)) / jnp.sum(weights)
    return fit + penalty * jnp.sum(params["w"] ** 2)


def clean_loss(solution, weights, clean):
    return cross_entropies(solution.params, clean).mean()


SOLVER = jaxhpo.from_optax(train_loss, optax.sgd(0.3, momentum=0.9))


@jax.jit
def train(images, weights, penalty):
    start = SOLVER.init(initial(), weights)
    return jaxhpo.solve(SOLVER, start, weights, lambda t: (images, penalty), num_steps=STEPS).params


@jax.jit
def predict(params, x):
    return jnp.argmax(x @ params["w"] + params["b"][None], 1)


@functools.cache
def make_cleaner(rule=jaxhpo.Implicit(jaxhpo.CG(maxiter=10))):  # noqa: B008 (a frozen dataclass)
    """Outer steps on weights of images: training goes on between them."""
    pair = jaxhpo.hypergradient(rule, SOLVER, clean_loss, num_steps=INNER)

    def gradient(weights, carry, key):
        state, noisy, clean, penalty = carry
        slope, state, info = pair.update(weights, state, lambda t: (noisy, penalty), clean)
        return info.value, slope, (state, noisy, clean, penalty), None

    step = jaxhpo.outer_step(None, optax.adam(OUTER_RATE), transforms=jaxhpo.unit_interval, gradient=gradient)
    return pair.init, step.init, jax.jit(step.update), step.hparams


def learn_weights(noisy, clean, penalty, num_steps):
    """Weights of noisy images that lower the loss of clean ones, and that loss at each step."""
    start, init, update, weights_of = make_cleaner()
    weights = jnp.full(len(noisy[1]), 0.5)
    state, losses = init(weights, (start(initial(), weights), noisy, clean, penalty)), []
    for _ in range(num_steps):
        state, report = update(state)
        losses.append(float(report.value))
    return np.asarray(weights_of(state)), losses


def flagged(flags, wrong):
    """Precision, recall and F1 of flagged labels."""
    right = int((flags & wrong).sum())
    precision, recall = right / max(int(flags.sum()), 1), right / max(int(wrong.sum()), 1)
    return {"precision": precision, "recall": recall, "F1": 2 * right / max(int(flags.sum() + wrong.sum()), 1)}


def together(first, second):
    return tuple(jnp.concatenate(pair) for pair in zip(first, second, strict=True))


def measure(seed, sizes, noisy_images, most_steps, test):
    """Test accuracies of all methods, and how well labels are flagged, by the number of clean images."""
    noisy, clean, new, wrong = load(seed, noisy_images, max(sizes), test)
    rows = {}
    for size in sizes:
        some = tuple(part[:size] for part in clean)
        penalty = {method: values[SIZES.index(size)] for method, values in PENALTY.items()}
        num_steps = min(OUTER[SIZES.index(size)], most_steps)
        of_clean = train(some, jnp.ones(size), penalty["clean alone"])
        agree = np.asarray(predict(of_clean, noisy[0]) == noisy[1])
        learned, losses = learn_weights(noisy, some, penalty["learned weights"], num_steps)
        weights = {
            "noisy + clean, no penalty": np.ones(noisy_images),
            "noisy + clean": np.ones(noisy_images),
            "agreeing labels + clean": agree,
            "learned weights + clean": learned,
            "right labels + clean": ~wrong,
        }
        models = {
            method: train(together(noisy, some), jnp.asarray([*values, *np.ones(size)], jnp.float32), penalty[method])
            for method, values in weights.items()
        }
        models["clean alone"] = of_clean
        models["learned weights"] = train(noisy, jnp.asarray(learned), penalty["learned weights"])
        rows[str(size)] = {
            "accuracy": {method: 100 * float((predict(models[method], new[0]) == new[1]).mean()) for method in METHODS},
            "learned weights": flagged(learned < 0.5, wrong),
            "agreeing labels": flagged(~agree, wrong),
            "clean loss": [losses[0], losses[-1]],
        }
    return {"sizes": rows, "wrong labels": int(wrong.sum())}


def summary(rows, sizes):
    found = {}
    for size in map(str, sizes):
        own = [row["sizes"][size] for row in rows]
        accuracy = {method: [row["accuracy"][method] for row in own] for method in METHODS}
        found[size] = {
            "accuracy": {method: mean(values) for method, values in accuracy.items()},
            "cleaned less": {m: paired(accuracy[CLEANED], accuracy[m]) for m in METHODS if m != CLEANED},
            "flags": {
                how: {what: mean([row[how][what] for row in own]) for what in ("precision", "recall", "F1")}
                for how in ("learned weights", "agreeing labels")
            },
        }
    return found


def sentence(size, found):
    """Whether cleaning beats training on the clean images alone, and the simplest filter: by two standard errors."""

    def verdict(difference):
        if difference["error"] is None:
            return "is not told by one seed from"
        if abs(difference["mean"]) <= 2 * difference["error"]:
            return "is no better or worse than"
        return "beats" if difference["mean"] > 0 else "loses to"

    parts = [
        f"{verdict(found['cleaned less'][rival])} {name} ({text(found['cleaned less'][rival], '.2f')} points)"
        for rival, name in (
            ("clean alone", "training on them alone"),
            ("noisy + clean", "all images alike"),
            ("agreeing labels + clean", "keeping labels that a model of them predicts"),
        )
    ]
    return f"With {size} clean images cleaning {parts[0]}, {parts[1]}, and {parts[2]}."


def picture(found, path):
    sizes = [int(size) for size in found]
    figure, axes = plot.figure(1, 2, width=10, height=4)
    for axis, key, names in ((axes[0, 0], "accuracy", METHODS), (axes[0, 1], "flags", ("learned", "agreeing"))):
        for name in names:
            full = name if key == "accuracy" else next(how for how in found[str(sizes[0])]["flags"] if name in how)
            of = [found[str(size)][key][full] for size in sizes]
            of = of if key == "accuracy" else [each["F1"] for each in of]
            color = METHODS[full] if key == "accuracy" else METHODS[f"{full} + clean"]
            label = {"agreeing labels": "label is not what a model\nof the clean images predicts"}.get(full, full)
            middle, error = [each["mean"] for each in of], [each["error"] or 0 for each in of]
            plot.band(axis, sizes, middle, error, label=label, color=color, marker="o", lw=2)
        axis.set(xscale="log", xlabel="clean images")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.legend(**plot.LEGEND, loc="lower right")
    axes[0, 0].set(ylabel="test accuracy, %", ylim=(55, 92))
    axes[0, 1].set(ylabel="F1 of flagged labels", ylim=(0.5, 1))
    less = {
        rival: ", ".join(f"{each['cleaned less'][rival]['mean']:+.1f} ({size})" for size, each in found.items())
        for rival in ("clean alone", "noisy + clean", "agreeing labels + clean")
    }
    title = (
        "Points of accuracy, learned weights + clean less clean alone: {}\nless noisy + clean: {}\nless agreeing: {}"
    )
    figure.suptitle(title.format(*less.values()), fontsize=11)
    plot.save(figure, path)


def table(found):
    print("| clean images | " + " | ".join(METHODS) + " | F1 learned | precision | recall | F1 agreeing |")
    print("|" + "---|" * (len(METHODS) + 5))
    for size, each in found.items():
        accuracies = [text(each["accuracy"][method], ".2f") for method in METHODS]
        flags = [text(each["flags"]["learned weights"][what]) for what in ("F1", "precision", "recall")]
        print("| " + " | ".join([size, *accuracies, *flags, text(each["flags"]["agreeing labels"]["F1"])]) + " |")


def main(arguments=None) -> None:
    given = parse(__file__, __doc__, arguments, seeds=3, quick=1)
    sizes, noisy, steps, test = ((200, 50), 1000, 3, 2000) if given.quick else (SIZES, NOISY, max(OUTER), None)
    rows = each_seed(given, lambda seed, run_dir: measure(seed, sizes, noisy, steps, test))
    found = summary(rows, sizes)
    sentences = [sentence(size, each) for size, each in found.items()]
    table(found)
    print(*sentences, sep="\n")
    write(given, {"summary": found, "sentences": sentences, "rows": rows})
    picture(found, given.out / "cleaning.png")


if __name__ == "__main__":
    main()
