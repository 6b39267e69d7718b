"""A million penalties, one for every weight of a network: what they cost, what they gain, and what they overfit.

MNIST, 100 images to train on and 100 to validate on; 784-1024-256-10 (relu), 1 068 810 weights and biases, with the
penalty ½ Σ_i e^h_i w_i² in the train loss. From a training of 100 steps with every e^h_i = 1e-3, 20 outer steps: ten
more inner steps (full batch, SGD .1, momentum .9) from where the weights are, a hypergradient by
`Implicit(Neumann(5, 0.05))`, a step of Adam (.2) on h (Lorraine, Vicol and Duvenaud, 2020, which has the algorithm).

    million     a penalty a weight
    layers      one for each of the three layers, tuned the same way
    default     1e-3 for all, for as many steps

Losses and accuracies on validation and test images. With the penalties found each network is then trained anew on all
200 images, for 150 steps, as is the default: what tuning by 100 labels gains over training on them. Memory (that of the
compiled outer step, arguments and results included), counted arithmetic and time of an outer step stand beside those of
ten penalties: five bands of pixels of the first matrix, and the five other arrays. Errors are over seeds, of splits and
initial weights. No setting was tuned.

    JAXHPO_DATA_DIR=... python benchmarks/experiments/millions.py [--out DIR] [--quick] [--seeds 5] [--run-dir DIR]
"""

import functools
import sys
import time

import _experiment
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxhpo
from jaxhpo import plot
from jaxhpo._core.cost import count_arithmetic
from jaxhpo.data import mnist

WIDTHS = (784, 1024, 256, 10)
TRAIN, VALIDATION, TEST = 100, 100, 2000
DEFAULT, BEGIN, INNER, OUTER, AFRESH = 1e-3, 100, 10, 20, 150
TERMS, SERIES_STEP, RATE, HYPER_RATE = 5, 0.05, 0.1, 0.2
KINDS, COMPARED, TIMED = ("million", "ten", "layers"), ("million", "layers"), 5
WHAT, PARTS = ("loss", "accuracy"), ("training", "validation", "test", "test, trained on all")


def initial(key, widths=WIDTHS):
    keys = jax.random.split(key, len(widths) - 1)
    shapes = zip(keys, widths[:-1], widths[1:], strict=True)
    return [(jax.random.normal(k, (a, b)) * (2 / a) ** 0.5, jnp.zeros(b)) for k, a, b in shapes]


def logits(layers, inputs):
    for w, b in layers[:-1]:
        inputs = jax.nn.relu(inputs @ w + b[None])
    return inputs @ layers[-1][0] + layers[-1][1][None]


def cross_entropy(layers, part):
    return optax.softmax_cross_entropy_with_integer_labels(logits(layers, part[0]), part[1]).mean()


def start_of(kind, layers):
    full = lambda *shape: jnp.full(shape, np.log(DEFAULT), jnp.float32)  # noqa: E731
    if kind == "million":
        return jax.tree.map(lambda w: full(*w.shape), layers)
    return full(10) if kind == "ten" else full(len(layers))


def expand(kind, h, layers):
    """A log penalty, or what broadcasts to one, for each weight."""
    if kind == "million":
        return h
    if kind == "layers":
        return [(h[i], h[i]) for i in range(len(layers))]
    rows = len(layers[0][0])
    bands = h[jnp.arange(rows) * 5 // rows][:, None]  # of the first matrix
    others = jax.tree.structure(layers).unflatten([bands, *h[5:]])
    return others


def make_solver(kind):
    def loss(layers, h, part):
        penalties = expand(kind, h, layers)
        squares = jax.tree.map(lambda a, w: jnp.sum(jnp.exp(a) * w**2), penalties, layers)
        return cross_entropy(layers, part) + 0.5 * sum(jax.tree.leaves(squares))

    return jaxhpo.from_optax(loss, optax.sgd(RATE, momentum=0.9))


@functools.partial(jax.jit, static_argnames=("kind", "num_steps"))
def train(kind, num_steps, layers, h, part):
    solver = make_solver(kind)
    return jaxhpo.solve(solver, solver.init(layers, h), h, lambda t: part, num_steps=num_steps).params


def make_outer_step(kind):
    """`init(layers, h)`, and `update(h, moments, state, train part, validation part)`."""
    method = jaxhpo.Implicit(jaxhpo.Neumann(TERMS, SERIES_STEP))
    loss = lambda solution, h, part: cross_entropy(solution.params, part)  # noqa: E731
    pair, adam = jaxhpo.hypergradient(method, make_solver(kind), loss, num_steps=INNER), optax.adam(HYPER_RATE)

    def update(h, moments, state, train_part, validation_part):
        gradient, state, info = pair.update(h, state, lambda t: train_part, validation_part)
        change, moments = adam.update(gradient, moments)
        return optax.apply_updates(h, change), moments, state, info.value

    return lambda layers, h: (h, adam.init(h), pair.init(layers, h)), update


@jax.jit
def scores(layers, part):
    """Loss and accuracy."""
    return jnp.stack([cross_entropy(layers, part), jnp.mean(logits(layers, part[0]).argmax(1) == part[1])])


def load(seed, sizes):
    parts = mnist(seed, train=sizes[0], validation=sizes[1], test=sizes[2])
    train_part, validation, test = (tuple(map(jnp.asarray, part)) for part in parts)
    return train_part, validation, test, jax.tree.map(lambda *x: jnp.concatenate(x), train_part, validation)


def measure(seed, _, *, updates, sizes, outer, widths):
    train_part, validation, test, everything = load(seed, sizes)
    key, fresh = initial(jax.random.key(seed), widths), initial(jax.random.key(500 + seed), widths)
    default, row = start_of("layers", key), {}
    begun = train("layers", BEGIN if outer == OUTER else INNER, key, default, train_part)

    def add(method, h, kind, layers, curve):
        afresh = train(kind, AFRESH if outer == OUTER else INNER, fresh, h, everything)
        parts = [*(scores(layers, part) for part in (train_part, validation, test)), scores(afresh, test)]
        found = {name: dict(zip(WHAT, x.tolist(), strict=True)) for name, x in zip(PARTS, parts, strict=True)}
        row[method] = found | curve

    for kind in COMPARED:
        init, update = updates[kind]
        state, curve = init(begun, start_of(kind, key)), {"validation curve": [], "test curve": []}
        for _ in range(outer):
            *state, value = update(*state, train_part, validation)
            curve["validation curve"].append(float(value))
            curve["test curve"].append(float(scores(state[2].inner.params, test)[0]))
        spread = np.concatenate([np.ravel(x) for x in jax.tree.leaves(state[0])])
        curve["penalties, quantiles"] = np.exp(np.quantile(spread, [0.05, 0.25, 0.5, 0.75, 0.95])).tolist()
        add(kind, state[0], kind, state[2].inner.params, curve)
    add("default", default, "layers", train("layers", INNER * outer, begun, default, train_part), {})
    return row


def costs(kind, init, update, sizes, widths) -> dict:
    """Of an outer step: hyperparameters, compiled memory in MiB, operations over those of an inner step, seconds."""
    layers = initial(jax.random.key(0), widths)
    train_part, validation, _, _ = load(0, sizes)
    h = start_of(kind, layers)
    state = init(layers, h)
    compiled = update.lower(*state, train_part, validation).compile()
    memory, seconds = compiled.memory_analysis(), []
    parts = {name: getattr(memory, f"{name}_size_in_bytes") / 2**20 for name in ("argument", "output", "temp")}
    solver = make_solver(kind)
    one = count_arithmetic(lambda w, h, p: solver.step(solver.init(w, h), h, p), layers, h, train_part)
    for _ in range(TIMED):
        began = time.perf_counter()
        *state, _ = jax.block_until_ready(compiled(*state, train_part, validation))
        seconds.append(time.perf_counter() - began)
    print(f"{kind}: {min(seconds):.2f} s an outer step", file=sys.stderr, flush=True)
    return {
        "hyperparameters": sum(leaf.size for leaf in jax.tree.leaves(h)),
        "MiB": sum(parts.values()),
        "MiB temporary": parts["temp"],
        "gradients": count_arithmetic(update, *init(layers, h), train_part, validation) / one,
        "seconds": min(seconds),
    }


def summary(rows) -> dict:
    """Means over seeds, and paired differences to the default, and to the default trained on all labels."""
    of, found = lambda which, part, what: [row[which][part][what] for row in rows], {}
    for method in (*COMPARED, "default"):
        found[method] = {
            part: {
                what: {
                    **_experiment.mean(of(method, part, what)),
                    "minus default": _experiment.paired(of(method, part, what), of("default", part, what)),
                }
                for what in WHAT
            }
            for part in PARTS
        }
        found[method]["minus the default on all labels"] = {
            what: _experiment.paired(of(method, "test", what), of("default", PARTS[-1], what)) for what in WHAT
        }
    return found


def table(report) -> str:
    lines = [f"{'an outer step':13} {'penalties':>10} {'MiB':>7} {'temporary':>10} {'gradients':>10} {'seconds':>8}"]
    for kind, cost in report["costs"].items():
        memory = f"{cost['MiB']:7.1f} {cost['MiB temporary']:10.1f}"
        lines.append(
            f"{kind:13} {cost['hyperparameters']:>10} {memory} {cost['gradients']:10.1f} {cost['seconds']:8.2f}"
        )
    lines.append(f"\n{'loss; accuracy in %':20}" + "".join(f"{part:>26}" for part in PARTS))
    for method, found in report["summary"].items():
        cells = [
            f"{_experiment.text(found[part]['loss'])}; {100 * found[part]['accuracy']['mean']:.1f}" for part in PARTS
        ]
        lines.append(f"{method:20}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines)


COLORS = {"million": plot.BLUE, "layers": plot.VERMILION, "default": "0.5", "ten": plot.GREEN}


def picture(report, rows, path):
    figure, axes = plot.figure(1, 3, width=12.5, height=3.9)
    curves, ends, cost = axes[0]
    for kind in COMPARED:
        for which, style in (("validation curve", "-"), ("test curve", "--")):
            values = np.array([row[kind][which] for row in rows])
            error = _experiment.standard_errors(values)
            look = {"label": f"{kind}, {which.partition(' ')[0]}", "color": COLORS[kind], "ls": style}
            plot.band(curves, range(1, values.shape[1] + 1), values.mean(0), error, **look)
    curves.set(xlabel="outer step", ylabel="loss", yscale="log")
    plot.plain_log_ticks(curves.yaxis)
    curves.legend(**plot.LEGEND | {"fontsize": 8})
    found = report["summary"]
    parts, methods = {"as tuned": "test", "trained anew on all labels": "test, trained on all"}, list(found)
    series = {
        label: tuple([found[m][part]["loss"][k] or 0 for m in methods] for k in ("mean", "error"))
        for label, part in parts.items()
    }
    plot.dots(ends, methods, series, colors=[COLORS[m] for m in methods])
    ends.set_xlabel("test loss")
    ends.legend(**plot.LEGEND)
    for i, kind in enumerate(KINDS):
        size = report["costs"][kind]["MiB"]
        cost.bar(i, size, color=COLORS[kind], width=0.6)
        said = f"{size:.0f} MiB\n{report['costs'][kind]['gradients']:.0f} gradients"
        cost.annotate(said, (i, size), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    counts = [f"{report['costs'][kind]['hyperparameters']:,}".replace(",", " ") for kind in KINDS]
    cost.set_xticks(range(len(KINDS)), [f"{kind}\n{count}" for kind, count in zip(KINDS, counts, strict=True)])
    cost.set(ylabel="memory of an outer step, MiB", ylim=(0, 1.25 * max(c["MiB"] for c in report["costs"].values())))
    less = {part: _experiment.text(found["million"][part]["loss"]["minus default"], "+.3f") for part in PARTS}
    labels = {k: v and 100 * v for k, v in found["million"]["minus the default on all labels"]["accuracy"].items()}
    figure.suptitle(
        f"A million penalties against the default: validation loss {less['validation']}, test loss {less['test']};\n"
        f"against the default trained on all labels: test accuracy {_experiment.text(labels, '+.1f')} points",
        fontsize=11,
    )
    plot.save(figure, path)


def main(arguments=None) -> None:
    given = _experiment.parse(__file__, __doc__, arguments, seeds=5, quick=1)
    sizes, outer, widths = (TRAIN, VALIDATION, TEST), OUTER, WIDTHS
    if given.quick:
        sizes, outer, widths = (50, 50, 200), 3, (784, 32, 16, 10)
    made = {kind: make_outer_step(kind) for kind in KINDS}
    updates = {kind: (init, jax.jit(update)) for kind, (init, update) in made.items()}
    found = {
        kind: _experiment.once(given, f"costs, {kind}", lambda k=kind: costs(k, *updates[k], sizes, widths))
        for kind in KINDS
    }
    settings = {"updates": updates, "sizes": sizes, "outer": outer, "widths": widths}
    rows = _experiment.each_seed(given, functools.partial(measure, **settings))
    report = {"costs": found, "summary": summary(rows), "rows": rows}
    print(table(report))
    _experiment.write(given, report)
    picture(report, rows, given.out / "millions.png")


if __name__ == "__main__":
    main()
