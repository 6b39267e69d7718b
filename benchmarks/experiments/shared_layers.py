"""How much of a network ten tasks should share: learned, for each layer, by the hypergradient.

Five alphabets of Omniglot (small1) and the same turned by 90°: ten tasks, each a classification of the first 8
characters of its alphabet by a tanh network 100-32-24-8 on 10×10 pixels (in the source 784-400-200-55, all
characters). Each task has weights z of its own; its network uses, in layer l,

    w_l = M_l z_l,    a product over tasks, with a 10×10 matrix M_l

All tasks begin at the same z; the rows of M sum to one, at first. 50 full-batch steps, momentum .9, penalty e⁻⁴ on z.

    separate    M_l = I: ten trainings
    tied        M_1 = 1/10 everywhere, the others I: one first layer for all
    scaled      either of these times a number for each layer, learned like M: what of a gain is a better step size
    learned     all entries of M_l, from ½ I + ½ · 1/10

M is learned by 60 steps of Adam through the loss on 2 of the 12 training drawings of each character, drawn anew at
each step; then ten networks are trained on all 12, and tested on the other 8. The loss is the mean over tasks.
The rates were chosen on seeds from 100 on, which deal the drawings otherwise, by held-out training drawings.
(Maclaurin, Duvenaud, Adams, Gradient-based Hyperparameter Optimization through Reversible Learning, 2015, figure 10:
test losses 1.34 separate, 1.25 tied, 1.13 learned.)

    python benchmarks/experiments/shared_layers.py [--out DIR] [--quick] [--seeds 5] [--run-dir DIR]
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _experiment import mean, once, paired, parse, text, write

import jaxhpo
import jaxhpo.data
from jaxhpo import plot

SIZE, CHARACTERS, WIDTHS = 10, 8, (100, 32, 24, 8)
TRAINING, HELD_OUT = 12, 2  # drawings, of 20; those of the first that measure the outer loss
TASKS, LAYERS, STEPS, PENALTY = 10, 3, 50, float(np.exp(-4.0))
OUTER, RATE, OUTER_RATE = 60, 0.2, 0.01
EYE, SHARED = np.eye(TASKS), np.full((TASKS, TASKS), 1 / TASKS)
SEPARATE, TIED = np.stack([EYE] * LAYERS), np.stack([SHARED, *[EYE] * (LAYERS - 1)])
BEGIN = 0.5 * SEPARATE + 0.5 * SHARED


def load(seed):
    """(tasks, characters, drawings, pixels), less the mean, the drawings in the order of this seed."""
    upright = np.stack([images[:CHARACTERS] for images in jaxhpo.data.omniglot("small1", size=SIZE).values()])
    images = np.concatenate([upright, np.rot90(upright, 1, (3, 4))])
    order = np.random.default_rng(seed).permutation(images.shape[2])
    images = images[:, :, order].reshape(TASKS, CHARACTERS, len(order), -1)
    return jnp.asarray((images - images.mean()) / images.std())


def initial(seed):
    """The same weights for each task."""
    keys = jax.random.split(jax.random.key(seed), LAYERS)
    layers = [
        jax.random.normal(k, (m + 1, n)) / jnp.sqrt(m) for k, m, n in zip(keys, WIDTHS[:-1], WIDTHS[1:], strict=True)
    ]
    return [jnp.broadcast_to(w, (TASKS, *w.shape)) for w in layers]


def mixed(z, mix):
    """Σ_j M_ij z_j of each layer."""
    return [jnp.tensordot(m, layer, 1) for m, layer in zip(mix, z, strict=True)]


def cross_entropy(w, images):
    """Mean over tasks, characters and drawings; the last row of each layer is its bias."""
    tasks, characters, drawings, _ = images.shape
    x = images.reshape(tasks, characters * drawings, -1)
    for i, layer in enumerate(w):
        x = x @ layer[:, :-1] + layer[:, -1:]
        x = jnp.tanh(x) if i < LAYERS - 1 else x
    labels = jnp.broadcast_to(jnp.repeat(jnp.arange(characters), drawings)[None], x.shape[:2])
    return optax.softmax_cross_entropy_with_integer_labels(x, labels).mean()


def train(mix, images, z):
    """The networks of all tasks after training, with the matrices `mix` of shape (layers, tasks, tasks)."""

    def loss(z, mix, batch):  # the sum over tasks: separate ones do not notice each other
        return TASKS * cross_entropy(mixed(z, mix), images) + PENALTY * sum(jnp.sum(layer**2) for layer in z)

    solver = jaxhpo.from_optax(loss, optax.sgd(RATE, momentum=0.9))
    return mixed(jaxhpo.solve(solver, solver.init(z, mix), mix, num_steps=STEPS).params, mix)


def learn(make, h, data, num_steps):
    """h of the last step of each seed; `make(h)` are the matrices, `data` is (images, z), each of all seeds."""

    def outer_loss(h, carry, key):
        images, z = carry
        order = jax.random.permutation(key, TRAINING)
        held_out, rest = images[:, :, order[:HELD_OUT]], images[:, :, order[HELD_OUT:]]
        return cross_entropy(train(make(h), rest, z), held_out), carry, None

    seeds = len(data[0])
    starts, keys = jnp.broadcast_to(h, (seeds, *h.shape)), jax.random.split(jax.random.key(0), seeds)
    settings = {"num_steps": num_steps, "population": seeds, "carry": data, "key": keys}
    return jaxhpo.tune(outer_loss, starts, optax.adam(OUTER_RATE), **settings).hparams


def scaled(base, h):
    return h[:, None, None] * base


@jax.jit
def losses(mix, training, new, z):
    """Training and test loss of each seed."""

    def of(x):
        mix, training, new, z = x
        w = train(mix, training, z)
        return cross_entropy(w, training), cross_entropy(w, new)

    return jax.lax.map(of, (mix, training, new, z))


def measure(seeds, num_steps, first=0, kept=lambda name, make: make()):
    """The matrices of each way, of all seeds, and their (training, test) losses.

    `kept(name, make)` is `make()`, lists of numbers, or what an earlier run has kept of it.
    """
    images = jnp.stack([load(first + seed) for seed in range(seeds)])
    z = jax.tree.map(lambda *layers: jnp.stack(layers), *[initial(first + seed) for seed in range(seeds)])
    training, new = images[..., :TRAINING, :], images[..., TRAINING:, :]
    bases = {"separate": jnp.asarray(SEPARATE), "tied": jnp.asarray(TIED)}
    mixes = {name: jnp.broadcast_to(base, (seeds, *base.shape)) for name, base in bases.items()}
    if num_steps:
        ways = {f"{name}, scaled": (functools.partial(scaled, b), jnp.ones(LAYERS)) for name, b in bases.items()}
        ways["learned"] = (lambda mix: mix), jnp.asarray(BEGIN)
        for name, (make, h) in ways.items():
            found = kept(name, lambda make=make, h=h: learn(make, h, (training, z), num_steps).tolist())
            mixes[name] = jax.vmap(make)(jnp.asarray(found))
    return mixes, {name: np.asarray(losses(mix, training, new, z)) for name, mix in mixes.items()}


COLORS = {"separate": "0.5", "separate, scaled": "0.3", "tied": plot.ORANGE, "tied, scaled": plot.VERMILION}
COLORS["learned"] = plot.BLUE


def picture(found, mix, path):
    figure, axes = plot.figure(1, 1 + LAYERS, width=12.0, height=3.4)
    axis = axes[0, 0]
    for i, (name, color) in enumerate(COLORS.items()):
        value = found["test"][name]
        axis.errorbar(value["mean"], i, xerr=value["error"], fmt="o", ms=8, capsize=3, color=color)
        axis.annotate(text(value), (value["mean"], i), (0, 8), textcoords="offset points", ha="center", fontsize=9)
    axis.set_yticks(range(len(COLORS)), COLORS)
    axis.set(xlabel="test loss, mean of ten tasks", ylim=(len(COLORS) - 0.5, -0.7))
    axis.margins(x=0.25)
    for layer, axis in enumerate(axes[0, 1:]):
        plot.image(axis, mix[layer], label="M", center=0.0)
        axis.set_title(f"layer {layer + 1}", fontsize=plot.TITLE)
        axis.set(xlabel="z of 5 alphabets, and turned", ylabel="w of 5 alphabets, and turned")
    gain = found["tied minus learned"]
    title = (
        f"Sharing learned for each layer: test loss of a tied first layer, less that of learned sharing, {text(gain)}"
    )
    figure.suptitle(title, fontsize=12)
    plot.save(figure, path, dpi=130)


def main(arguments=None) -> None:
    given = parse(__file__, __doc__, arguments, seeds=5, quick=1)
    num_steps = 2 if given.quick else OUTER
    kept = lambda name, make: once(given, f"{name}, {given.seeds} seeds", make)  # noqa: E731
    mixes, rows = measure(given.seeds, num_steps, kept=kept)
    of = {part: {name: rows[name][i].tolist() for name in COLORS} for i, part in enumerate(("train", "test"))}
    found = {part: {name: mean(values) for name, values in of[part].items()} for part in of}
    for name in COLORS:
        if name != "learned":
            found[f"{name} minus learned"] = paired(of["test"][name], of["test"]["learned"])
    found["separate minus tied"] = paired(of["test"]["separate"], of["test"]["tied"])
    for name in COLORS:
        print(f"{name:<18}train {text(found['train'][name])}   test {text(found['test'][name])}")
    for name, value in found.items():
        if "minus" in name:
            print(f"{name}, test: {text(value)}")
    mix = np.asarray(mixes["learned"].mean(0), float)
    write(given, {"outer steps": num_steps, "summary": found, "losses": of, "mean of learned": mix.round(3).tolist()})
    picture(found, mix, given.out / "shared_layers.png")


if __name__ == "__main__":
    main()
