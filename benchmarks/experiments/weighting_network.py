"""Whether a small network that turns an example's loss into its weight, learned while training once, pays.

MNIST, a network 784-32-10 (relu), 1000 steps of SGD with momentum on batches of 100, 100 balanced clean images
("meta-images"), 10 000 test images, two kinds of training images:

    long tail    1242 images, 500 of the most frequent class and 5 of the rarest, in an order that the seed draws
    noisy        2000 images, of which 60 % have a label drawn at random

    uniform                   every image weighs the same
    class-balanced            weights inverse to the number of images with this label
    meta-images alone         trained on the 100 clean images
    weighting network         1-16-1, loss to weight, as below
    ... + meta-images         the same with the clean images among the training images

The weighting network (Shu et al., Meta-Weight-Net, 2019, arXiv:1902.07379) is trained in a single loop. At each step
the classifier takes one step on a weighted batch, `hypergradient(Unroll(), ..., num_steps=1)` differentiates the loss
of 50 clean images through it, and the network takes one step of Adam. Its input is a constant of that derivative, as in
the paper; the training step is the one that is differentiated, so there is no second, virtual one. The network's rate
was chosen among .001, .003 and .01 on seed 100, by other images. Uniform and class-balanced weights have the penalty,
among .001, .01 and .03, with which uniform ones come to the lowest loss on the meta-images; the others .001.

    python benchmarks/experiments/weighting_network.py [--out DIR] [--quick] [--seeds 5] [--run-dir DIR]
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

MOST, LEAST, NOISY, NOISE = 500, 5, 2000, 0.6
META, BATCH, META_BATCH, HIDDEN, UNITS = 10, 100, 50, 32, 16  # meta-images of each class
STEPS, RATE, OUTER_RATE = 1000, 0.02, 1e-3
PENALTIES = (1e-3, 1e-2, 3e-2)
KINDS = ("long tail", "noisy")
COLORS = {
    "uniform": "0.5",
    "class-balanced": plot.ORANGE,
    "weighting network": plot.BLUE,
    "meta-images alone": plot.VERMILION,
}
LOSSES = np.linspace(0, 8, 81)  # at which the learned weights are shown


def counts():
    """Images of each class from the most frequent to the rarest, in a geometric series."""
    return np.round(MOST * (LEAST / MOST) ** (np.arange(10) / 9)).astype(int)


def first_of_each(labels, numbers):
    """Indices of the first `numbers[c]` images of each class c."""
    return np.concatenate([np.flatnonzero(labels == c)[:number] for c, number in enumerate(numbers)])


def load(kind, seed, test=None):
    """Training images, balanced clean ones, test images, and the order of the classes by frequency."""
    parts = jaxhpo.data.mnist(seed, train=10_000, validation=1000, test=test)
    rng = np.random.default_rng(seed)
    order, pixels, labels = rng.permutation(10), parts.train.inputs, parts.train.targets.copy()
    if kind == "long tail":
        pick = first_of_each(labels, counts()[np.argsort(order)])  # class order[i] is the i-th most frequent
    else:
        pick = np.arange(NOISY)
        drawn = rng.permutation(NOISY)[: int(NOISE * NOISY)]
        labels[drawn] = rng.integers(0, 10, len(drawn))
    meta = first_of_each(parts.validation.targets, [META] * 10)
    chosen = (pixels[pick], labels[pick]), (parts.validation.inputs[meta], parts.validation.targets[meta]), parts.test
    return *((jnp.asarray(x), jnp.asarray(y)) for x, y in chosen), order


def initial(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "in": jax.random.normal(keys[0], (784, HIDDEN)) / 784**0.5,
        "shift": jnp.zeros(HIDDEN),
        "out": jax.random.normal(keys[1], (HIDDEN, 10)) / HIDDEN**0.5,
        "bias": jnp.zeros(10),
    }
    network = {
        "in": jax.random.normal(keys[2], (UNITS,)),
        "shift": jnp.linspace(-2, 2, UNITS),
        "out": jnp.zeros(UNITS),
        "bias": jnp.array(0.0),
    }
    return params, network


def logits(params, x):
    return jax.nn.relu(x @ params["in"] + params["shift"][None]) @ params["out"] + params["bias"][None]


def cross_entropies(params, images):
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, images[0]), images[1])


def weigh(network, losses):
    """Weights in (0, 1) of losses; all .5 at first."""
    hidden = jnp.tanh(losses[:, None] * network["in"][None] - network["shift"][None])
    return jax.nn.sigmoid(hidden @ network["out"] + network["bias"])


def weighted(params, losses, weights, penalty):
    decay = jnp.sum(params["in"] ** 2) + jnp.sum(params["out"] ** 2)
    return jnp.sum(weights * losses) / jnp.sum(weights) + penalty * decay


def network_loss(params, network, images):
    losses = cross_entropies(params, images)
    return weighted(params, losses, weigh(network, jax.lax.stop_gradient(losses)), PENALTIES[0])


def fixed_loss(params, penalty, batch):
    images, weights = batch
    return weighted(params, cross_entropies(params, images), weights, penalty)


def draw(key, arrays, size):
    """So many entries of each array, the same of all."""
    index = jax.random.randint(key, (size,), 0, len(jax.tree.leaves(arrays)[0]))
    return jax.tree.map(lambda array: array[index], arrays)


OPTIMISER = optax.sgd(RATE, momentum=0.9)


@functools.partial(jax.jit, static_argnames="num_steps")
def train(params, images, weights, penalty, key, num_steps):
    """With a weight for each image that stays."""
    solver = jaxhpo.from_optax(fixed_loss, OPTIMISER)
    start = solver.init(params, penalty)
    batches = lambda t: draw(jax.random.fold_in(key, t), (images, weights), BATCH)  # noqa: E731
    return jaxhpo.solve(solver, start, penalty, batches, num_steps=num_steps).params


def best_penalty(params, images, meta, key, num_steps):
    """That of equal weights with the lowest loss on the meta-images."""
    losses = []
    for penalty in PENALTIES:
        model = train(params, images, jnp.ones(len(images[1])), penalty, key, num_steps)
        losses.append(float(cross_entropies(model, meta).mean()))
    return PENALTIES[int(np.argmin(losses))]


@functools.partial(jax.jit, static_argnames="num_steps")
def train_with_network(params, network, images, meta, key, num_steps):
    """Both, in a single loop: the parameters, and the network."""
    solver = jaxhpo.from_optax(network_loss, OPTIMISER)
    pair = jaxhpo.hypergradient(
        jaxhpo.Unroll(),
        solver,
        lambda solution, network, images: cross_entropies(solution.params, images).mean(),
        num_steps=1,
    )

    def data(key):
        first, second = jax.random.split(key)
        one = jax.tree.map(lambda part: part[None], draw(first, images, BATCH))
        return one, draw(second, meta, META_BATCH)

    step = jaxhpo.outer_step(None, optax.adam(OUTER_RATE), gradient=jaxhpo.from_pair(pair, data))
    state = step.init(network, pair.init(params, network), key)
    state, _ = jax.lax.scan(lambda state, _: (step.update(state)[0], None), state, length=num_steps)
    return state.carry.inner.params, step.hparams(state)


def balanced(labels):
    """Weights inverse to the number of images with the same label."""
    number = np.bincount(labels, minlength=10)
    return jnp.asarray(1 / number[labels], jnp.float32)


@jax.jit
def accuracies(params, images):
    """Of each class, in percent."""
    right = jnp.argmax(logits(params, images[0]), 1) == images[1]
    of_class = jax.nn.one_hot(images[1], 10)
    return 100 * (right @ of_class) / of_class.sum(0)


def measure(kind, seed, num_steps, test):
    """Accuracy on test images, of a long tail that of the three rarest classes, and the learned weights by the loss."""
    images, meta, new, order = load(kind, seed, test)
    (params, network), key = initial(seed), jax.random.key(1000 + seed)
    both = tuple(jnp.concatenate(pair) for pair in zip(images, meta, strict=True))
    penalty, models, learned = best_penalty(params, images, meta, key, num_steps), {}, {}
    for more, parts in {"": images, " + meta-images": both}.items():
        ones = jnp.ones(len(parts[1]))
        models["uniform" + more] = train(params, parts, ones, penalty, key, num_steps)
        models["class-balanced" + more] = train(params, parts, balanced(np.asarray(parts[1])), penalty, key, num_steps)
        name = "weighting network" + more
        models[name], learned[more] = train_with_network(params, network, parts, meta, key, num_steps)
    models["meta-images alone"] = train(params, meta, jnp.ones(len(meta[1])), PENALTIES[0], key, num_steps)
    of_classes = {name: np.asarray(accuracies(model, new)) for name, model in models.items()}
    size = np.bincount(np.asarray(new[1]), minlength=10)
    tail = {name: float(values[order[-3:]].mean()) for name, values in of_classes.items()}
    return {
        "penalty": penalty,
        "test": {name: float(values @ size / size.sum()) for name, values in of_classes.items()},
        **({"rarest": tail} if kind == "long tail" else {}),
        "weights": {name: np.asarray(weigh(each, jnp.asarray(LOSSES))).tolist() for name, each in learned.items()},
    }


def summary(rows):
    """Of one kind of training images."""
    found = {"weights": {}}
    for key in (key for key in ("test", "rarest") if key in rows[0]):
        columns = {name: [row[key][name] for row in rows] for name in rows[0][key]}
        found[key] = {name: mean(values) for name, values in columns.items()}
        found[f"{key}, network less"] = {}
        for more in ("", " + meta-images"):
            own = columns["weighting network" + more]
            for rival in (f"uniform{more}", f"class-balanced{more}", "meta-images alone"):
                found[f"{key}, network less"][f"{rival}, of network{more}"] = paired(own, columns[rival])
    for name in rows[0]["weights"]:
        found["weights"][name] = [mean(column) for column in np.array([row["weights"][name] for row in rows]).T]
    return found


def table(found):
    for kind, each in found.items():
        rarest = "rarest" in each
        print(f"\n{kind}\n| | test, % |" + (" rarest three classes, % |" if rarest else ""))
        print("|---|---|" + ("---|" if rarest else ""))
        for name in each["test"]:
            cells = [name, text(each["test"][name], ".1f"), *([text(each["rarest"][name], ".1f")] if rarest else [])]
            print("| " + " | ".join(cells) + " |")
        for rival, less in each["test, network less"].items():
            print(f"network less {rival}: {text(less, '.2f')}")


def picture(found, path):
    figure, axes = plot.figure(1, 3, width=12, height=3.8)
    for axis, (kind, each) in zip(axes[0], found.items(), strict=False):
        for more, marker, offset in (("", "o", 0.12), (" + meta-images", "s", -0.12)):
            for place, (name, color) in enumerate(COLORS.items()):
                if name + more in each["test"]:
                    value = each["test"][name + more]
                    style = {"fmt": marker, "ms": 6, "capsize": 3, "color": color, "mfc": color if more else "w"}
                    axis.errorbar(value["mean"], -place + offset, xerr=value["error"] or 0, **style)
        axis.set_yticks([-place for place in range(len(COLORS))], list(COLORS))
        axis.set(xlabel="test accuracy, %", ylim=(0.5 - len(COLORS), 0.5))
        axis.set_title(f"{kind}; filled: meta-images trained on too", fontsize=plot.TITLE)
        style = {"color": plot.BLUE if kind == "long tail" else plot.VERMILION, "lw": 2}
        middle = np.array([value["mean"] for value in each["weights"][""]])
        error = np.array([value["error"] or 0 for value in each["weights"][""]])
        plot.band(axes[0, 2], LOSSES, middle, error, label=kind, **style)
    axes[0, 2].set(xlabel="loss of an example", ylabel="learned weight", ylim=(0, 1))
    axes[0, 2].legend(**plot.LEGEND)
    parts = []
    for kind, each in found.items():
        less = each["test, network less"]
        more = " + meta-images"
        own = [text(less[f"{rival}{more}, of network{more}"], ".1f") for rival in ("uniform", "class-balanced")]
        parts.append(f"{kind}: {own[0]} points to uniform, {own[1]} to class-balanced")
    figure.suptitle("Weighting network, all with meta-images\n" + "; ".join(parts), fontsize=11)
    plot.save(figure, path)


def main(arguments=None) -> None:
    given = parse(__file__, __doc__, arguments, seeds=5, quick=1)
    steps, test = (20, 1000) if given.quick else (STEPS, None)
    rows = {
        kind: each_seed(given, lambda seed, run_dir, kind=kind: measure(kind, seed, steps, test), kind)
        for kind in KINDS
    }
    found = {kind: summary(of_kind) for kind, of_kind in rows.items()}
    table(found)
    write(given, {"summary": found, "rows": rows})
    picture(found, given.out / "weighting_network.png")


if __name__ == "__main__":
    main()
