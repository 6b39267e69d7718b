"""Whether a network learns to augment images better than random transformations of tuned strength do.

100 digits (8×8) train a classifier 64-32-10 by 100 full-batch steps; each step warps each image anew, by an affine map
near the identity: entries of the matrix and two shifts in pixels. 300 other digits choose how:

    none       no warp
    random     Gaussian entries and shifts, of the best of seven strengths by the validation loss
    strengths  a standard deviation for each of the six, learned by the hypergradient
    network    64 pixels and 4 Gaussian numbers → 24 → the six: 1800 weights, learned by the hypergradient (`Unroll`)

The latter two begin at the strength of .1, and take 60 outer steps of Adam, each with new warps and initial weights.
`both` trains on all 400 images with what was chosen, as one would. All have the best of four penalties on the
classifier's weights, by the validation loss (`random` of two, with each strength: zero, and that of `none`). Accuracy
and loss are those on the other 1397 digits, means of four initial weights. The inner and the outer rate were set once,
and not tuned. (Lorraine, Vicol, Duvenaud, Optimizing Millions of Hyperparameters by Implicit Differentiation, 2020,
where a U-Net transforms CIFAR-10.)

    python benchmarks/experiments/augmentation.py [--out DIR] [--quick] [--seeds 5] [--run-dir DIR]
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

SIDE, NOISE, HIDDEN, STEPS, OUTER, REPEATS = 8, 4, 24, 100, 60, 4
STRENGTHS, PENALTIES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4), (0.0, 1e-3, 3e-3, 1e-2)
SHIFT = 4.0  # pixels of a shift of strength 1
PLACES = np.stack(np.meshgrid(*[np.arange(SIDE) - (SIDE - 1) / 2] * 2, indexing="ij"), -1).reshape(-1, 2)


def warp(images, changes):
    """Images (n, 64) seen through the affine maps I + `changes[:, :4]`, shifted, by linear interpolation."""
    matrix = jnp.eye(2)[None] + changes[:, :4].reshape(-1, 2, 2)
    where = jnp.einsum("nij,pj->npi", matrix, PLACES) + SHIFT * changes[:, None, 4:] + (SIDE - 1) / 2
    # The weight of each row, and of each column, at each place: zero outside the image.
    rows, columns = jnp.moveaxis(jax.nn.relu(1 - abs(where[..., None] - jnp.arange(SIDE)[None, None, None])), 2, 0)
    return jnp.einsum("npr,npc,nrc->np", rows, columns, images.reshape(-1, SIDE, SIDE))


def changes(h, images, key):
    """The affine maps (n, 6) of an augmentation: none, strengths, or a network."""
    if "strengths" in h:
        return h["strengths"][None] * jax.random.normal(key, (len(images), 6))
    x = jnp.concatenate([images, jax.random.normal(key, (len(images), NOISE))], 1)
    x = jnp.tanh(x @ h["first"] + h["shift"][None])
    return 0.5 * jnp.tanh(x @ h["last"] + h["bias"][None])


def begin(kind, key):
    if kind == "strengths":
        return {"strengths": jnp.full(6, 0.1)}
    first, last = jax.random.split(key)
    h = {"first": jax.random.normal(first, (64 + NOISE, HIDDEN)) / 2, "shift": jnp.zeros(HIDDEN)}
    h["first"] = h["first"].at[:64].multiply(0.5)
    return h | {"last": 0.05 * jax.random.normal(last, (HIDDEN, 6)), "bias": jnp.zeros(6)}


def initial(key):
    first, second = jax.random.split(key)
    weights = {"in": jax.random.normal(first, (64, 32)) / 8, "out": jax.random.normal(second, (32, 10)) / 6}
    return weights | {"shift": jnp.zeros(32), "bias": jnp.zeros(10)}


def logits(w, x):
    return jnp.tanh(x @ w["in"] + w["shift"][None]) @ w["out"] + w["bias"][None]


def cross_entropy(w, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits(w, images), labels).mean()


def train(h, penalty, part, key):
    """The classifier that the augmentation h, or None, leads to."""
    start, warps = jax.random.split(key)

    def loss(w, h, key):
        images = part.inputs if h is None else warp(part.inputs, changes(h, part.inputs, key))
        return cross_entropy(w, images, part.targets) + penalty * (jnp.sum(w["in"] ** 2) + jnp.sum(w["out"] ** 2))

    solver = jaxhpo.from_optax(loss, optax.sgd(0.3, momentum=0.9))
    anew = lambda step: jax.random.fold_in(warps, step)  # noqa: E731
    state = solver.init(initial(start), h)
    return jaxhpo.solve(solver, state, h, anew, num_steps=STEPS, adjoint=jaxhpo.Unroll()).params


@jax.jit
def score(h, penalty, part, new, key):
    """Loss and accuracy on new images, means over initial weights and warps."""

    def of(key):
        w = train(h, penalty, part, key)
        right = jnp.argmax(logits(w, new.inputs), -1) == new.targets
        return jnp.stack([cross_entropy(w, *new), right.mean()])

    return jax.lax.map(of, jax.random.split(key, REPEATS)).mean(0)


def learn(kind, penalty, parts, seed, num_steps, run_dir=None):
    def outer_loss(h, carry, key):
        return cross_entropy(train(h, penalty, parts.train, key), *parts.validation), None, None

    start, run = jax.random.split(jax.random.key(seed))
    settings = {"num_steps": num_steps, "key": run, "run_dir": run_dir and run_dir / f"{kind}-{penalty}"}
    transforms = jaxhpo.positive if kind == "strengths" else None
    return jaxhpo.tune(outer_loss, begin(kind, start), optax.adam(0.02), transforms=transforms, **settings).hparams


def measure(given, seed, run_dir=None):
    parts = jaxhpo.data.digits(seed, train=100, validation=300)
    both = jaxhpo.data.Examples(*(np.concatenate(x) for x in zip(parts.train, parts.validation, strict=True)))
    choose, report = jax.random.split(jax.random.key(1000 + seed))
    loss = lambda h, penalty: float(score(h, penalty, parts.train, parts.validation, choose)[0])  # noqa: E731
    random = [{"strengths": jnp.full(6, s)} for s in STRENGTHS]
    plain = min((loss(None, p), p) for p in PENALTIES)[1]
    candidates = {"none": [(None, p) for p in PENALTIES], "random": [(h, p) for h in random for p in (0.0, plain)]}
    for kind in ("strengths", "network"):
        h = learn(kind, 0.0, parts, seed, 2 if given.quick else OUTER, run_dir)
        candidates[kind] = [(h, p) for p in PENALTIES]
    row = {}
    for name, tried in candidates.items():
        values = [loss(*each) for each in tried]
        h, penalty = tried[int(np.argmin(values))]
        row[name] = {"validation loss": min(values), "penalty": penalty}
        for said, part in (("", parts.train), (", both", both)):
            found = score(h, penalty, part, parts.test, report)
            row[name] |= {f"loss{said}": float(found[0]), f"accuracy{said}": float(found[1])}
        if h is not None and "strengths" in h:
            row[name]["strengths"] = np.asarray(h["strengths"], float).round(3).tolist()
    h, shown = candidates["network"][0][0], parts.train.inputs[:5]
    warped = [warp(shown, changes(h, shown, jax.random.key(i))) for i in range(3)]
    return row | {"images": np.asarray([shown, *warped], float).round(2).tolist()}


COLORS = {"none": "0.5", "random": plot.VERMILION, "strengths": plot.ORANGE, "network": plot.BLUE}
RIVALS = [name for name in COLORS if name != "network"]


def picture(found, rows, path):
    figure, axes = plot.figure(1, 3, width=11.5, height=3.6)
    for axis, said, title in ((axes[0, 0], "", "trained on 100"), (axes[0, 1], ", both", "trained on all 400")):
        for i, (name, color) in enumerate(COLORS.items()):
            values, value = [row[name][f"loss{said}"] for row in rows], found[f"loss{said}"][name]
            axis.plot(values, [i] * len(values), "o", ms=3, color=color, alpha=0.4)
            axis.errorbar(value["mean"], i, xerr=value["error"], fmt="D", ms=6, capsize=3, color=color)
            axis.annotate(text(value), (value["mean"], i), (0, 8), textcoords="offset points", ha="center", fontsize=9)
        axis.set_yticks(range(len(COLORS)), COLORS)
        axis.set(xlabel="test loss", ylim=(len(COLORS) - 0.5, -0.7))
        axis.set_title(title, fontsize=plot.TITLE)
    images = np.array(rows[0]["images"]).reshape(4, 5, SIDE, SIDE)
    tiles = np.pad(images, ((0, 0), (0, 0), (1, 0), (1, 0)), constant_values=1.0)
    axis = axes[0, 2]
    axis.imshow(tiles.transpose(0, 2, 1, 3).reshape(4 * (SIDE + 1), -1), cmap="gray_r", vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[4.5 + 9 * i for i in range(4)])
    axis.set_yticklabels(["digit", *["warped"] * 3])
    axis.set_title("by the network", fontsize=plot.TITLE)
    axis.spines[:].set_visible(False)
    less = found["loss: random minus network"]
    won = f"in {less['n'] - less['lower in']} of {less['n']} seeds"
    both = found["loss, both: random minus network"]
    title = f"Learned augmentation: test loss {text(less)} below tuned random warps' of 100, lower {won}"
    figure.suptitle(f"{title};\n{text(both)} trained on all 400", fontsize=12)
    plot.save(figure, path, dpi=130)


def main(arguments=None) -> None:
    given = parse(__file__, __doc__, arguments, seeds=5, quick=1)
    rows = each_seed(given, functools.partial(measure, given))
    found = {}
    for what in ("loss", "accuracy", "loss, both", "accuracy, both"):
        of = {name: [row[name][what] for row in rows] for name in COLORS}
        found[what] = {name: mean(values) for name, values in of.items()}
        print(f"{what}: " + ", ".join(f"{name} {text(value)}" for name, value in found[what].items()))
        for rival in RIVALS:
            found[f"{what}: {rival} minus network"] = paired(of[rival], of["network"])
            less = found[f"{what}: {rival} minus network"]
            print(f"  {rival} minus network {text(less)}, lower in {less['lower in']} of {less['n']}")
    write(given, {"outer steps": 2 if given.quick else OUTER, "summary": found, "rows": rows})
    picture(found, rows, given.out / "augmentation.png")


if __name__ == "__main__":
    main()
