"""1608 hyperparameters of a training: a learning rate and a momentum per step and layer, and scales of initial weights.

MNIST, 2000 images; a tanh network 784-50-50-50-10, batches of 200, T = 100 steps of momentum SGD: for each of the eight
arrays of weights 100 log rates, 100 logit momenta and a log scale of the normal numbers it starts from (Maclaurin,
Duvenaud and Adams, 2015, whose settings these are, with 10 000 images). The outer loss is the training loss of all 2000
images; initial weights and batches are new at each of 50 steps of Adam (.04; .9, .99; eps 1e-4), from rates of e^-1,
momenta of .5 and scales of e^-3.

    learned      by `Unroll`, ten seeds; and in float64, a few steps by `Unroll` and by `Reversible`, side by side
    fixed rate   the best of 30, with the momenta and scales of the start, each by the mean of five: in all
                 more trainings than the 50 hypergradients count as, by arithmetic
    cosine       half a cosine; and
    one cycle    up for 30 % of the steps and down: momentum .9, scales 1/√(fan-in) and a peak tuned over 10 values

What was found is then transferred: to other seeds; to three times as many steps (stretched); and to hidden layers three
times as wide (initial scales of what a hidden layer feeds divided by √3). Peaks are tuned by the same training loss,
once for the training above (then transferred too), and again for the new one. Losses of training and test images, on
initial weights and batches that nothing was tuned with. Runs that end above the loss of equal guesses have diverged:
they are counted, and means and errors are over the other seeds. Nothing was chosen by hand but the sizes.

    JAXHPO_DATA_DIR=... python benchmarks/experiments/schedules.py [--out DIR] [--quick] [--seeds 10] [--run-dir DIR]
"""

import functools
import sys
import time
from typing import Any, NamedTuple

import _experiment
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxhpo
from jaxhpo import plot
from jaxhpo._core.cost import count_arithmetic
from jaxhpo.data import mnist

IMAGES, BATCH, STEPS, OUTER, LAYERS = 2000, 200, 100, 50, 4
SIZES = (784, 50, 50, 50, 10)
RATES = tuple(np.geomspace(0.05, 20, 30))
PEAKS = tuple(np.geomspace(0.3, 15, 10))
EXACT = 8  # outer steps by `Reversible`, beside as many by `Unroll`
LONGER, WIDER = 3, 3
DIVERGED = np.log(10)  # a training loss above that of equal guesses
BUFFER = 2.0  # bits per weight and step for the momenta that are met: their geometric mean stays above a quarter


class Sizes(NamedTuple):
    """What is trained: steps, and widths of the layers."""

    steps: int = STEPS
    widths: tuple = SIZES


class Images(NamedTuple):
    train: Any
    test: Any


def load(images: int) -> Images:
    parts = mnist(0, train=images, validation=1)
    return Images(*(jax.tree.map(jnp.asarray, tuple(part)) for part in (parts.train, parts.test)))


def cross_entropy(layers, part):
    inputs, targets = part
    hidden = inputs.astype(layers[0][0].dtype)
    for w, b in layers[:-1]:
        hidden = jnp.tanh(hidden @ w + b[None])
    logits = hidden @ layers[-1][0] + layers[-1][1][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def initial(h, widths, key):
    """Weights e^scale ∘ z: a list of (matrix, bias); the eight scales are in this order."""
    shapes = [shape for a, b in zip(widths[:-1], widths[1:], strict=True) for shape in ((a, b), (b,))]
    keys = jax.random.split(key, len(shapes))
    arrays = [
        jnp.exp(s) * jax.random.normal(k, shape, s.dtype)
        for s, k, shape in zip(h["log_scale"], keys, shapes, strict=True)
    ]
    return list(zip(arrays[::2], arrays[1::2], strict=True))


def by_layer(values):
    """Eight numbers as a tree like the weights."""
    return [(values[2 * i], values[2 * i + 1]) for i in range(LAYERS)]


SOLVER = jaxhpo.momentum_sgd(
    lambda layers, h, batch: cross_entropy(layers, batch),
    lambda h, step: by_layer(jnp.exp(h["log_rate"][step])),
    lambda h, step: by_layer(jax.nn.sigmoid(h["logit_momentum"][step])),
)


def train(h, key, train_part, sizes: Sizes, adjoint=jaxhpo.Unroll()):  # noqa: B008
    """Weights after a training whose initial weights and batches follow from the key."""
    weights_key, batches_key = jax.random.split(key)
    start = initial(h, sizes.widths, weights_key)

    def batch(step):
        pick = jax.random.randint(jax.random.fold_in(batches_key, step), (BATCH,), 0, len(train_part[1]))
        return train_part[0][pick], train_part[1][pick]

    return jaxhpo.solve(SOLVER, SOLVER.init(start, h), h, batch, num_steps=sizes.steps, adjoint=adjoint).params


def final_loss(h, key, train_part, sizes: Sizes, adjoint=jaxhpo.Unroll()):  # noqa: B008
    return cross_entropy(train(h, key, train_part, sizes, adjoint), train_part)


# --- schedules by hand, as the same hyperparameters ------------------------------------------------------------------


def constant(rate, steps, momentum=0.5, log_scale=None):
    log_scale = jnp.full(2 * LAYERS, -3.0) if log_scale is None else log_scale
    logit = np.log(momentum / (1 - momentum))
    rates = jnp.tile(jnp.broadcast_to(jnp.log(rate), (steps,))[:, None], (1, 2 * LAYERS))
    return {"log_rate": rates, "logit_momentum": jnp.full((steps, 2 * LAYERS), logit), "log_scale": log_scale}


def fan_in_scales(widths):
    """Matrices with a variance of 1/fan-in, and biases of nearly zero."""
    return jnp.array([value for width in widths[:-1] for value in (-0.5 * np.log(width), -9.0)])


def cosine(peak, sizes: Sizes):
    share = (np.arange(sizes.steps) + 0.5) / sizes.steps
    return constant(peak * (1 + np.cos(np.pi * share)) / 2, sizes.steps, 0.9, fan_in_scales(sizes.widths))


def one_cycle(peak, sizes: Sizes, top=0.3, start=1 / 25, end=1e-3):
    share = (np.arange(sizes.steps) + 0.5) / sizes.steps
    bend = lambda low, x: low + (1 - low) * (1 - np.cos(np.pi * x)) / 2  # noqa: E731
    shape = np.where(share < top, bend(start, share / top), bend(end, (1 - share) / (1 - top)))
    return constant(peak * shape, sizes.steps, 0.9, fan_in_scales(sizes.widths))


def transferred(h, old: Sizes, new: Sizes):
    """A schedule stretched to another number of steps, and initial scales for other widths."""
    at = (np.arange(new.steps) + 0.5) / new.steps * old.steps - 0.5
    stretch = jax.vmap(lambda column: jnp.interp(at, jnp.arange(old.steps), column), 1, 1)
    wider = [0.5 * np.log(a / b) for a, b in zip(old.widths[:-1], new.widths[:-1], strict=True) for _ in range(2)]
    scales = h["log_scale"] + jnp.array(wider, h["log_scale"].dtype)
    return {"log_rate": stretch(h["log_rate"]), "logit_momentum": stretch(h["logit_momentum"]), "log_scale": scales}


# --- what is measured ------------------------------------------------------------------------------------------------


def make_step(adjoint, images: Images, sizes: Sizes):
    step = jaxhpo.outer_step(
        lambda h, carry, key: (final_loss(h, key, images.train, sizes, adjoint), carry, None),
        optax.adam(0.04, b1=0.9, b2=0.99, eps=1e-4),
    )
    return step.init, jax.jit(step.update)


def learn(step, start, key, num_steps):
    """The losses of all outer steps, and the hyperparameters in the end."""
    init, update = step
    state, losses = init(start, key=key), []
    for _ in range(num_steps):
        state, report = update(state)
        losses.append(float(report.value))
    return losses, jax.tree.map(np.asarray, state.point)  # no transforms: in natural units


def side_by_side(images, sizes, num_steps):
    """In float64: how far apart what both rules learn is, and what each takes."""
    with jax.enable_x64(True):
        start = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), constant(np.exp(-1.0), sizes.steps))
        found, rows = {}, {}
        for adjoint in (jaxhpo.Unroll(), jaxhpo.Reversible(buffer_bits=BUFFER)):
            name, step = type(adjoint).__name__, make_step(adjoint, images, sizes)
            learn(step, start, jax.random.key(0), 1)  # compiles
            began = time.perf_counter()
            losses, found[name] = learn(step, start, jax.random.key(0), num_steps)
            seconds = (time.perf_counter() - began) / num_steps
            program = jax.jit(jax.value_and_grad(functools.partial(final_loss, sizes=sizes, adjoint=adjoint)))
            memory = program.lower(start, jax.random.key(0), images.train).compile().memory_analysis()
            rows[name] = {"losses": losses, "seconds": seconds, "MiB": memory.temp_size_in_bytes / 2**20}
            print(f"float64, {name}: {seconds:.1f} s a step", file=sys.stderr, flush=True)
    flat = {name: np.concatenate([x.ravel() for x in jax.tree.leaves(h)]) for name, h in found.items()}
    begun = np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(start)])
    first, second = flat.values()
    moved = np.linalg.norm(first - begun)
    rates = [np.exp(h["log_rate"]) for h in found.values()]
    return {
        "outer steps": num_steps,
        "difference over distance moved": float(np.linalg.norm(second - first) / moved),
        "largest relative difference of a rate": float(np.max(np.abs(rates[1] / rates[0] - 1))),
        "rules": rows,
    }


def costs(images, sizes):
    """Trainings that a hypergradient of each rule counts as, in float32."""
    h, key = constant(np.exp(-1.0), sizes.steps), jax.random.key(0)
    of = lambda make, rule: count_arithmetic(  # noqa: E731
        make(functools.partial(final_loss, train_part=images.train, sizes=sizes, adjoint=rule)),
        h,
        key,
        unknown_length=1,
    )
    rules = {"Unroll": jaxhpo.Unroll(), "Reversible": jaxhpo.Reversible(buffer_bits=BUFFER)}
    return {name: of(jax.value_and_grad, rule) / of(lambda f: f, jaxhpo.Unroll()) for name, rule in rules.items()}


def averaged(images, sizes, inits):
    """The hypergradient at the start: its mean over initial weights and batches, and the first."""
    gradient = jax.jit(jax.grad(functools.partial(final_loss, train_part=images.train, sizes=sizes)))
    h = constant(np.exp(-1.0), sizes.steps)
    found = [gradient(h, key) for key in jax.random.split(jax.random.key(7), inits)]
    mean = jax.tree.map(lambda *x: np.mean(x, 0), *found)
    rates = np.array([g["log_rate"] for g in found])
    return {
        "inits": inits,
        "one": rates[0, :, ::2].tolist(),
        "mean": mean["log_rate"][:, ::2].tolist(),
        "noise over signal": float(np.linalg.norm(rates.std(0, ddof=1)) / np.linalg.norm(rates.mean(0)))
        if inits > 1
        else None,
    }


class Scores:
    """Final losses of hyperparameters on given keys; one program for each size."""

    def __init__(self, images):
        self.images, self.programs = images, {}

    def __call__(self, h, keys, sizes):
        """Training and test loss for each key, of shape (keys, 2)."""
        if sizes not in self.programs:

            def both(h, key, images):
                weights = train(h, key, images.train, sizes)
                return jnp.stack([cross_entropy(weights, part) for part in images])

            self.programs[sizes] = jax.jit(both)
        return np.array([self.programs[sizes](h, key, self.images) for key in keys])

    def best(self, make, values, keys, sizes):
        """The value of lowest mean training loss, and those losses."""
        losses = [self(make(value), keys, sizes)[:, 0].mean() for value in values]
        return float(values[int(np.nanargmin(losses))]), [float(x) for x in losses]


def best_fixed_rate(scores, sizes, trainings):
    """Of 30, for at least as many trainings."""
    each = int(np.ceil(trainings / len(RATES)))
    keys = jax.random.split(jax.random.key(101), each)
    rate, losses = scores.best(lambda rate: constant(rate, sizes.steps), RATES, keys, sizes)
    return {"fixed rate": rate, "trainings": each * len(RATES), "losses by rate": losses}


def best_peaks(scores, all_sizes, inits):
    """Of cosine and one cycle, for each size."""
    found = {}
    for name, sizes in all_sizes.items():
        keys = jax.random.split(jax.random.key(102), inits)
        found[name] = {
            shape.__name__: scores.best(functools.partial(shape, sizes=sizes), PEAKS, keys, sizes)[0]
            for shape in (cosine, one_cycle)
        }
        print(f"peaks, {name}: {found[name]}", file=sys.stderr, flush=True)
    return found


def compared(learned, tuned, name, sizes, here):
    """The hyperparameters that are compared at one size."""
    peaks = {"as tuned": tuned["as tuned"]} | ({} if sizes == here else {"tuned again": tuned[name]})
    methods = {"learned": transferred(learned, here, sizes)}
    if sizes == here:
        methods |= {
            "start": constant(np.exp(-1.0), here.steps),
            "fixed rate": constant(tuned["fixed rate"], here.steps),
        }
    for shape in (cosine, one_cycle):
        for where, peak in peaks.items():
            said = shape.__name__.replace("_", " ") + ("" if where == "as tuned" else ", tuned again")
            methods[said] = shape(peak[shape.__name__], sizes)
    return methods


def measure(seed, _, *, step, scores, tuned, all_sizes, outer):
    here = all_sizes["as tuned"]
    losses, learned = learn(step, constant(np.exp(-1.0), here.steps), jax.random.key(1000 + seed), outer)
    row = {"losses": losses, "hparams": jax.tree.map(lambda x: np.round(x, 5).tolist(), learned), "scores": {}}
    key = jax.random.key(5000 + seed)[None]
    for name, sizes in all_sizes.items():
        methods = compared(learned, tuned, name, sizes, here)
        row["scores"][name] = {method: scores(h, key, sizes)[0].tolist() for method, h in methods.items()}
    return row


def summary(rows) -> dict:
    """By size and method: means over the seeds that did not diverge, their number, and paired differences."""
    found = {}
    for name, methods in rows[0]["scores"].items():
        found[name] = {}
        for method in methods:
            own = np.array([row["scores"][name][method] for row in rows])
            learned = np.array([row["scores"][name]["learned"] for row in rows])
            stays, both = own[:, 0] < DIVERGED, (own[:, 0] < DIVERGED) & (learned[:, 0] < DIVERGED)
            found[name][method] = {"diverged": int((~stays).sum())}
            for i, part in enumerate(("training", "test")):
                apart = _experiment.paired(learned[both, i], own[both, i]) if both.any() else None
                lower = int((learned[:, i] < own[:, i]).sum())  # of all seeds
                mean = _experiment.mean(own[stays, i]) if stays.any() else _experiment.mean(own[:, i])
                found[name][method][part] = {**mean, "learned minus it": apart, "learned lower in": lower}
    return found


def table(report) -> str:
    lines = []
    for name, methods in report["summary"].items():
        heads = "".join(
            f"{part:>18} {'learned minus it':>20} {'lower in':>9} " for part in ("training loss", "test loss")
        )
        lines.append(f"\n{name:26} {'diverged':>9} {heads}")
        for method, found in methods.items():
            line = f"  {method:24} {found['diverged']:>9}"
            for part in ("training", "test"):
                own = found[part]
                less = "" if method == "learned" or own["learned minus it"] is None else own["learned minus it"]
                line += f" {_experiment.text(own, '.4f'):>18} {less and _experiment.text(less, '.4f'):>20}"
                line += f" {less and own['learned lower in']:>9}"
            lines.append(line)
    same, cost = report["side by side"], report["trainings a hypergradient"]
    lines.append(
        f"\nUnroll and Reversible, float64, {same['outer steps']} outer steps: apart by "
        f"{same['difference over distance moved']:.1e} of the distance moved; largest difference of a rate "
        f"{same['largest relative difference of a rate']:.1e}"
    )
    for rule, row in same["rules"].items():
        took = f"{row['seconds']:.1f} s and {row['MiB']:.0f} MiB a hypergradient in float64"
        lines.append(f"  {rule:12} {cost[rule]:.2f} trainings, {took}")
    return "\n".join(lines).strip()


NAMES = ("first layer", "second", "third", "top layer")


def picture(report, rows, path):
    figure, axes = plot.figure(2, 3, width=13, height=7.4)
    (rate, momentum, gradient), (descent, training, test) = axes
    learned = {
        name: np.array([row["hparams"][name] for row in rows])[..., ::2] for name in ("log_rate", "logit_momentum")
    }
    error = _experiment.standard_errors
    for i, (layer, color) in enumerate(zip(NAMES, plot.PALETTE, strict=False)):
        for axis, values in (
            (rate, np.exp(learned["log_rate"])),
            (momentum, 1 / (1 + np.exp(-learned["logit_momentum"]))),
        ):
            plot.band(axis, range(values.shape[1]), values.mean(0)[:, i], error(values)[:, i], label=layer, color=color)
        gradient.plot(-np.array(report["averaged"]["mean"])[:, i], color=color, label=layer)
    rate.set(ylabel="learning rate", xlabel="step", yscale="log")
    plot.plain_log_ticks(rate.yaxis)
    momentum.set(ylabel="momentum", xlabel="step")
    gradient.set(ylabel="−d loss / d log rate, at the start", xlabel="step")
    reach = np.quantile(np.abs(report["averaged"]["mean"]), 0.97)
    gradient.set_ylim(-1.5 * reach, 1.5 * reach)  # the last steps of the first layer are out of it
    gradient.set_title(f"mean over {report['averaged']['inits']} initialisations", fontsize=plot.TITLE)
    rate.set_title("learned rates of the weights", fontsize=plot.TITLE)
    momentum.set_title("learned momenta", fontsize=plot.TITLE)
    rate.legend(**plot.LEGEND)
    losses = np.array([row["losses"] for row in rows])
    plot.band(
        descent,
        range(losses.shape[1]),
        losses.mean(0),
        error(losses),
        label="learned, new weights each step",
        color=plot.BLUE,
        lw=2,
    )
    here = report["summary"]["as tuned"]
    for method, color in (("fixed rate", "0.5"), ("cosine", plot.GREEN), ("one cycle", plot.VERMILION)):
        descent.axhline(here[method]["training"]["mean"], color=color, ls="--", label=f"{method}, tuned")
    descent.set(xlabel="outer step", ylabel="final training loss", yscale="log")
    plot.plain_log_ticks(descent.yaxis)
    descent.legend(**plot.LEGEND)
    colors = {
        "learned": plot.BLUE,
        "cosine": plot.GREEN,
        "one cycle": plot.VERMILION,
        "fixed rate": "0.5",
        "start": "0.8",
    }
    for axis, part in ((training, "training"), (test, "test")):
        for i, (_, methods) in enumerate(report["summary"].items()):
            for j, (method, parts) in enumerate((m, p) for m, p in methods.items() if m != "start"):
                base, again = method.partition(",")[0], "," in method
                style = {"color": colors[base], "mfc": "white" if again else colors[base], "ms": 6, "capsize": 3}
                x, y = i + 0.13 * (j - 2), parts[part]["mean"]
                axis.errorbar(x, y, parts[part]["error"], fmt="o", **style)
                if parts["diverged"] and axis is training:
                    lost = f"{parts['diverged']} of {len(rows)}\ndiverged"
                    axis.annotate(lost, (x, y), (6, 0), **plot.BESIDE | {"va": "bottom"})
        axis.set_xticks(range(len(report["summary"])), report["summary"])
        axis.set(ylabel=f"{part} loss", yscale="log")
        plot.plain_log_ticks(axis.yaxis)
    for base, color in list(colors.items())[:4]:
        test.plot([], [], "o", color=color, label=base)
    test.plot([], [], "o", color="0.3", mfc="white", label="peak tuned again")
    test.legend(**plot.LEGEND)
    fixed, best = here["fixed rate"], min(("cosine", "one cycle"), key=lambda m: here[m]["training"]["mean"])
    ratio = here["learned"]["training"]["mean"] / fixed["training"]["mean"]
    tests = here[best]["test"]["learned minus it"]
    less = (
        "as the learned ones diverge"
        if tests is None
        else f"test loss {_experiment.text(tests, '+.3f')} against {best}'s"
    )
    figure.suptitle(
        f"1608 learned hyperparameters: training loss {ratio:.2f} times that of the best fixed rate; {less}",
        fontsize=12,
    )
    plot.save(figure, path)


def main(arguments=None) -> None:
    given = _experiment.parse(__file__, __doc__, arguments, seeds=10, quick=1)
    images = load(300 if given.quick else IMAGES)
    here = Sizes(8) if given.quick else Sizes()
    outer, inits = (3, 1) if given.quick else (OUTER, 2)
    wide = (SIZES[0], *(WIDER * width for width in SIZES[1:-1]), SIZES[-1])
    all_sizes = {"as tuned": here, f"{LONGER} times longer": here._replace(steps=LONGER * here.steps)}
    all_sizes[f"{WIDER} times wider"] = here._replace(widths=wide)
    cost, scores = costs(images, here), Scores(images)
    tuned = _experiment.once(given, "peaks", lambda: best_peaks(scores, all_sizes, inits))
    tuned |= _experiment.once(given, "fixed rate", lambda: best_fixed_rate(scores, here, outer * cost["Unroll"]))
    step = make_step(jaxhpo.Unroll(), images, here)
    settings = {"step": step, "scores": scores, "tuned": tuned, "all_sizes": all_sizes, "outer": outer}
    rows = _experiment.each_seed(given, functools.partial(measure, **settings))
    falls = [row["scores"]["as tuned"]["learned"][0] < row["scores"]["as tuned"]["start"][0] for row in rows]
    report = {
        "images": len(images.train[1]),
        "trainings a hypergradient": cost,
        "seeds in which the training loss falls": int(np.sum(falls)),
        "controls": tuned,
        "summary": summary(rows),
        "averaged": _experiment.once(given, "averaged", lambda: averaged(images, here, 2 if given.quick else 16)),
        "side by side": _experiment.once(
            given, "side by side", lambda: side_by_side(images, here, 2 if given.quick else EXACT)
        ),
        "rows": [{"seed": row["seed"], "losses": row["losses"], "scores": row["scores"]} for row in rows],
    }
    for name in ("log_rate", "logit_momentum", "log_scale"):
        report[name] = np.round(np.mean([row["hparams"][name] for row in rows], 0), 4).tolist()
    print(table(report))
    _experiment.write(given, report)
    picture(report, rows, given.out / "schedules.png")


if __name__ == "__main__":
    main()
