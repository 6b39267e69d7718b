"""Whether ten learned images, one a class, train a classifier as ten real ones do not.

Softmax regression from zero weights on ten images with fixed labels, one a class. Pixels and a penalty on the weights
are learned through the loss on 10 000 real images (of a part of CIFAR-10: 2000), by 100 steps of Adam, from pixels of
N(0, .01²):

    unrolled    20 full-batch steps of rate 1 and momentum .9, `Unroll`
    implicit    training to the optimum, warm-started, `Implicit` by conjugate gradients

and, on the same real images,

    real        ten of them, one a class, drawn at random: mean of 20 draws
    means       the mean image of each class
    everything  all of them, in 150 full-batch steps, their penalty chosen by 5000 (500) more

These have the better of both trainings, and the best of four penalties, by the loss on the 10 000 images. Each set of
learned images is also trained on in the way of the other one, with its own penalty. All images are less the mean
pixel. Accuracy is that on the test images, which nothing has seen; settings were chosen on seeds from 100 on, by images
that are neither. (Maclaurin, Duvenaud, Adams, Gradient-based Hyperparameter Optimization through Reversible Learning,
2015; Lorraine, Vicol, Duvenaud, Optimizing Millions of Hyperparameters by Implicit Differentiation, 2020.)

    python benchmarks/experiments/distillation.py [--data mnist fashion_mnist cifar10] [--file PART_OF_CIFAR10.npz]
        [--out DIR] [--quick] [--seeds 5] [--run-dir DIR]
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _experiment import each_seed, mean, paired, parse, text, write

import jaxhpo
import jaxhpo.data
from jaxhpo import plot

TITLES = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}
CLASSES, DRAWS, PENALTIES = 10, 20, (1e-3, 1e-2, 1e-1, 1.0)
LABELS = jnp.arange(CLASSES)


class Recipe(NamedTuple):
    """A training: its rate and steps, how it is differentiated, and how its images are learned."""

    rate: float
    num_steps: int
    adjoint: jaxhpo.Adjoint
    outer_rate: float


RECIPES = {
    "unrolled": Recipe(1.0, 20, jaxhpo.Unroll(), 0.01),
    "implicit": Recipe(0.1, 100, jaxhpo.Implicit(jaxhpo.CG(maxiter=30)), 0.01),
}
OUTER = 100


def load(name, seed, file=None):
    """`Split` of flat images; `train` are the real images to learn from, `validation` those to choose settings by."""
    sizes = {"train": 10_000, "validation": 5000}
    if name == "cifar10" and file:
        sizes = {"train": 2000, "validation": 500}
    parts = getattr(jaxhpo.data, name)(seed, **sizes, **({"file": file} if name == "cifar10" else {}))
    middle = parts.train.inputs.mean()
    return jaxhpo.data.Split(
        *(jaxhpo.data.Examples(p.inputs.reshape(len(p.inputs), -1) - middle, p.targets) for p in parts)
    )


def loss(w, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(images @ w["weights"] + w["bias"][None], labels).mean()


def accuracy(w, examples):
    return jnp.mean(jnp.argmax(examples.inputs @ w["weights"] + w["bias"][None], -1) == examples.targets)


def untrained(pixels):
    return {"weights": jnp.zeros((pixels, CLASSES)), "bias": jnp.zeros(CLASSES)}


def train(h, recipe, labels=LABELS, start=None, num_steps=None):
    """The solution of a training on the images h["images"] with the penalty exp(h["log_penalty"])."""

    def train_loss(w, h, batch):
        return loss(w, h["images"], labels) + jnp.exp(h["log_penalty"]) * jnp.sum(w["weights"] ** 2)

    solver = jaxhpo.from_optax(train_loss, optax.sgd(recipe.rate, momentum=0.9))
    state = solver.init(untrained(h["images"].shape[1]) if start is None else start, h)
    return jaxhpo.solve(solver, state, h, num_steps=num_steps or recipe.num_steps, adjoint=recipe.adjoint)


def learn(name, real, seed, num_steps, run_dir=None):
    """The result of learning ten images and a penalty on `real`."""
    recipe, pixels = RECIPES[name], real.inputs.shape[1]
    x, y = jnp.asarray(real.inputs), jnp.asarray(real.targets)

    def outer_loss(h, start, key):
        solution = train(h, recipe, start=start if name == "implicit" else None)
        end = jax.lax.stop_gradient(solution.params) if name == "implicit" else start
        return loss(solution.params, x, y), end, solution.info

    images = 0.01 * jax.random.normal(jax.random.key(seed), (CLASSES, pixels))
    return jaxhpo.tune(
        outer_loss,
        {"images": images, "log_penalty": jnp.log(0.01)},
        optax.adam(recipe.outer_rate),
        num_steps=num_steps,
        carry=untrained(pixels),
        score_window=1,
        run_dir=run_dir and run_dir / name,
    )


@functools.partial(jax.jit, static_argnums=1)
def trained(h, name):
    """A cold start: to the optimum takes more steps."""
    steps = {"unrolled": None, "implicit": 500}[name]
    return train(h, RECIPES[name], num_steps=steps).params


def control(sets, real, test):
    """Mean test accuracy over sets (n, 10, pixels) of images, of the best way to train on them."""

    def measure(images, penalty, name):
        w = trained({"images": images, "log_penalty": jnp.log(penalty)}, name)
        return loss(w, *real), accuracy(w, test)

    found = [
        (*np.mean(jax.lax.map(lambda images: jnp.stack(measure(images, p, name)), sets), 0), name, p)  # noqa: B023
        for name in RECIPES
        for p in PENALTIES
    ]
    lowest = min((x for x in found if np.isfinite(x[0])), key=lambda x: x[0])
    return {"accuracy": float(lowest[1]), "training": lowest[2], "penalty": lowest[3]}


def everything(real, chooser, test, num_steps):
    """Test accuracy of a training on all real images, of the best penalty on the images to choose by."""
    recipe = Recipe(0.1, num_steps, jaxhpo.Unroll(), 0.0)

    @jax.jit
    def measure(penalty):
        h = {"images": jnp.asarray(real.inputs), "log_penalty": jnp.log(penalty)}
        w = train(h, recipe, jnp.asarray(real.targets)).params
        return loss(w, *chooser), accuracy(w, test)

    _, best, penalty = min((*map(float, measure(p)), p) for p in (1e-4, 1e-3, 1e-2, 1e-1))
    return {"accuracy": best, "penalty": penalty}


def measure(name, given, seed, run_dir=None):
    real, chooser, test = load(name, seed, given.file)
    rng = np.random.default_rng(seed)
    of_class = [np.flatnonzero(real.targets == k) for k in range(CLASSES)]
    draws = np.stack([real.inputs[[rng.choice(i) for i in of_class]] for _ in range(2 if given.quick else DRAWS)])
    means = np.stack([real.inputs[i].mean(0) for i in of_class])
    row = {"real": control(jnp.asarray(draws), real, test), "means": control(jnp.asarray(means)[None], real, test)}
    row["everything"] = everything(real, chooser, test, 20 if given.quick else 150)
    for method, other in zip(RECIPES, reversed(RECIPES), strict=True):
        result = learn(method, real, seed, 20 if given.quick else OUTER, run_dir)
        h = result.best_hparams
        values = np.asarray(result.history["value"], float)
        row[method] = {
            "accuracy": float(accuracy(trained(h, method), test)),
            "accuracy of the other training": float(accuracy(trained(h, other), test)),
            "loss on the real images": float(result.best_value),
            "penalty": float(jnp.exp(h["log_penalty"])),
            "curve": values[:: max(1, len(values) // 30)].round(4).tolist(),
        }
        row[method]["images"] = np.asarray(h["images"], float).round(3).tolist()
    row["real"]["images"], row["means"]["images"] = (x.round(3).tolist() for x in (draws[0], means))
    return row


METHODS = {
    "unrolled": plot.BLUE,
    "implicit": plot.GREEN,
    "real": plot.VERMILION,
    "means": plot.ORANGE,
    "everything": "0.4",
}


def summary(rows):
    """Accuracies, and by how much each set of learned images is ahead of each control."""
    of = {method: [row[method]["accuracy"] for row in rows] for method in METHODS}
    found = {"accuracy": {method: mean(values) for method, values in of.items()}}
    for learned in RECIPES:
        found[f"{learned}, the other training"] = mean([row[learned]["accuracy of the other training"] for row in rows])
        for rival in ("real", "means", "everything"):
            found[f"{rival} minus {learned}"] = paired(of[rival], of[learned])
    return found


def mosaic(images):
    """(n, 10, pixels) as one picture, each image on a scale of its own."""
    side = 28 if images.shape[-1] == 784 else 32
    channels = images.shape[-1] // side**2
    images = images / abs(images).max(-1, keepdims=True)
    tiles = np.ones((len(images), CLASSES, side + 2, side + 2, channels))
    tiles[:, :, 1:-1, 1:-1] = 0.5 + 0.5 * images.reshape(len(images), CLASSES, side, side, channels)
    picture = tiles.transpose(0, 2, 1, 3, 4).reshape(len(images) * (side + 2), CLASSES * (side + 2), channels)
    return np.broadcast_to(picture, (*picture.shape[:2], 3))


def picture(found, images, path):
    figure, axes = plot.figure(len(found), 2, width=11.5, height=2.8 * len(found) + 0.4)
    for (left, right), (name, values) in zip(axes, found.items(), strict=True):
        shown = list(METHODS)[:4]
        left.imshow(mosaic(np.array([images[name][method] for method in shown])), interpolation="nearest")
        size = left.get_ylim()[0] / len(shown)
        left.set_yticks([(i + 0.5) * size for i in range(len(shown))], shown)
        left.set(xticks=[], xlabel=f"{TITLES[name]}: one image a class, less the mean pixel")
        left.spines[:].set_visible(False)
        for i, (method, color) in enumerate(METHODS.items()):
            accuracy = values["accuracy"][method]
            right.errorbar(accuracy["mean"], i, xerr=accuracy["error"], fmt="o", ms=8, capsize=3, color=color)
            right.annotate(text(accuracy), (accuracy["mean"], i), (0, 8), textcoords="offset points", ha="center")
        right.set_yticks(range(len(METHODS)), METHODS)
        right.set(xlabel="test accuracy", ylim=(len(METHODS) - 0.5, -0.7), xlim=(0, 1))
        right.grid(axis="x", color="0.9")
    percent = lambda values, method: f"{100 * values['accuracy'][method]['mean']:.0f} %"  # noqa: E731
    said = [f"{TITLES[name]} {percent(v, 'unrolled')} against {percent(v, 'real')}" for name, v in found.items()]
    figure.suptitle(
        f"Test accuracy after training on ten learned images, against ten real ones: {', '.join(said)}", fontsize=12
    )
    plot.save(figure, path, dpi=130)


def main(arguments=None) -> None:
    def more(parser):
        parser.add_argument("--data", nargs="+", choices=TITLES, default=["mnist"])
        parser.add_argument(
            "--file", help="an npz file of CIFAR-10 in place of the archive, as of `jaxhpo.data.cifar10`"
        )

    given = parse(__file__, __doc__, arguments, seeds=5, quick=1, more=more)
    found, rows, images = {}, {}, {}
    for name in given.data:
        measured = each_seed(given, functools.partial(measure, name, given), name)
        images[name] = {method: measured[0][method]["images"] for method in list(METHODS)[:4]}
        strip = lambda x: {k: v for k, v in x.items() if k != "images"} if isinstance(x, dict) else x  # noqa: E731
        rows[name] = [{key: strip(value) for key, value in row.items()} for row in measured]
        found[name] = summary(rows[name])
        print(f"{TITLES[name]}, test accuracy")
        for method, accuracy in found[name]["accuracy"].items():
            other = found[name].get(f"{method}, the other training")
            print(f"  {method:<12}{text(accuracy)}{'' if other is None else f'   by the other training {text(other)}'}")
        for learned in RECIPES:
            for rival in ("real", "means", "everything"):
                print(f"  {rival} minus {learned}: {text(found[name][f'{rival} minus {learned}'])}")
    write(given, {"outer steps": 20 if given.quick else OUTER, "summary": found, "rows": rows})
    picture(found, images, given.out / "distillation.png")


if __name__ == "__main__":
    main()
