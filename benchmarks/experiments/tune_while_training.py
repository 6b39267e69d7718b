"""Penalties and noise tuned during one training, beside retraining with the values found.

Digits, 300 images to train on, 300 to validate on; a tanh network 64-64-10, 3000 steps of SGD with momentum (.9, the
rate falls from .1 along half a cosine), batches of 50. Three hyperparameters: the log of a penalty for each layer and
the log of the standard deviation of noise added to the inputs; they start at 1e-4 and .1. After every five steps one
step of Adam on them (.1 for T1-T2, .05 for real time, falling to zero over the first third of the training) by the loss
of 50 validation images without noise:

    T1-T2       `Implicit(Identity(rate))`: the identity in the Hessian's place (Luketina et al., 2016)
    real time   `RealTime()`: forward mode, whose Jacobian goes on from step to step (Franceschi et al., 2017)

Each is compared, on the same initial weights and batches, with a training from scratch by its final values, with the
start's values, and with the best of ten random trainings by validation loss. With these three kinds of values the
network is also trained on all 600 images, in as many steps. Cost is counted arithmetic, in plain trainings. Unlike
`benchmarks/self_tuning.py`, whose network learns a response to its hyperparameters, these tune by a hypergradient, and
train the plain network. Adam's rates (of .01 to .1, by validation loss), and that they fall early, were chosen on seeds
0 to 19 and 100 to 102; the seeds reported are 1000 and on, which nothing was chosen by.

    python benchmarks/experiments/tune_while_training.py [--out DIR] [--quick] [--seeds 16] [--run-dir DIR]
"""

import functools

import _experiment
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxhpo
from jaxhpo import plot
from jaxhpo._core.cost import count_arithmetic
from jaxhpo.data import digits

TRAIN, VALIDATION, BATCH, WIDTH = 300, 300, 50, 64
FIRST = 1000  # seed
STEPS, EVERY, RATE, DRAWS = 3000, 5, 0.1, 10
HYPER_RATE = {"T1-T2": 0.1, "real time": 0.05}
RANGES = {"log_penalty": (1e-6, 1e-2), "log_noise": (0.01, 1.0)}  # of random search
METHODS = {"T1-T2": jaxhpo.Implicit(jaxhpo.Identity(RATE)), "real time": jaxhpo.RealTime()}


def start():
    return {"log_penalty": jnp.full(2, np.log(1e-4)), "log_noise": jnp.array(np.log(0.1))}


def initial(key):
    first, second = jax.random.split(key)
    return {
        "in": jax.random.normal(first, (64, WIDTH)) / 8,
        "shift": jnp.zeros(WIDTH),
        "out": jax.random.normal(second, (WIDTH, 10)) / WIDTH**0.5,
        "bias": jnp.zeros(10),
    }


def cross_entropy(w, inputs, targets):
    hidden = jnp.tanh(inputs @ w["in"] + w["shift"][None])
    logits = hidden @ w["out"] + w["bias"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def train_loss(w, h, batch):
    inputs, targets, noise = batch
    penalties = jnp.exp(h["log_penalty"])
    fit = cross_entropy(w, inputs + jnp.exp(h["log_noise"]) * noise, targets)
    return fit + penalties[0] * jnp.sum(w["in"] ** 2) + penalties[1] * jnp.sum(w["out"] ** 2)


def make_solver(num_steps):
    return jaxhpo.from_optax(train_loss, optax.sgd(optax.cosine_decay_schedule(RATE, num_steps), momentum=0.9))


def draw(part, key, count):
    """`count` batches of images, labels and noise."""
    pick_key, noise_key = jax.random.split(key)
    pick = jax.random.randint(pick_key, (count, BATCH), 0, len(part.targets))
    return part.inputs[pick], part.targets[pick], jax.random.normal(noise_key, (count, BATCH, 64))


def keys_of(key, num_steps):
    """Keys of the initial weights, and of each group of steps."""
    return jax.random.fold_in(key, 0), jax.random.split(jax.random.fold_in(key, 1), num_steps // EVERY)


def tune_while_training(method, h, key, parts, num_steps, hyper_rate):
    """Trained weights, the hyperparameters in the end, and along the way."""
    start_key, keys = keys_of(key, num_steps)
    loss = lambda solution, h, batch: cross_entropy(solution.params, *batch)  # noqa: E731
    pair = jaxhpo.hypergradient(method, make_solver(num_steps), loss, num_steps=EVERY)
    adam = optax.adam(optax.cosine_decay_schedule(hyper_rate, num_steps // EVERY // 3))

    def step(carry, key):
        h, moments, state = carry
        batches = draw(parts.train, key, EVERY)
        pick = jax.random.randint(jax.random.fold_in(key, 1), (BATCH,), 0, len(parts.validation.targets))
        validation = parts.validation.inputs[pick], parts.validation.targets[pick]
        gradient, state, _ = pair.update(h, state, batches, validation)
        change, moments = adam.update(gradient, moments)
        return (optax.apply_updates(h, change), moments, state), h

    (h, _, state), path = jax.lax.scan(step, (h, adam.init(h), pair.init(initial(start_key), h)), keys)
    return state.inner.params, h, path


def train(h, key, parts, num_steps):
    """The same training by constant hyperparameters, on the same weights and batches."""
    start_key, keys = keys_of(key, num_steps)
    solver = make_solver(num_steps)

    def step(state, key):
        return jaxhpo.solve(solver, state, h, draw(parts.train, key, EVERY)).state, None

    return jax.lax.scan(step, solver.init(initial(start_key), h), keys)[0].params


def scores(w, parts):
    """Validation loss, test loss, test accuracy, as in `SCORES`."""
    hidden = jnp.tanh(parts.test.inputs @ w["in"] + w["shift"][None])
    right = (hidden @ w["out"] + w["bias"][None]).argmax(1) == parts.test.targets
    return jnp.stack([cross_entropy(w, *parts.validation), cross_entropy(w, *parts.test), right.mean()])


def random_draws(key, count):
    """Hyperparameters with a leading axis of draws."""
    keys = dict(zip(RANGES, jax.random.split(key, len(RANGES)), strict=True))
    sizes = {"log_penalty": (count, 2), "log_noise": (count,)}
    bounds = {name: (np.log(low), np.log(high)) for name, (low, high) in RANGES.items()}
    return {
        name: jax.random.uniform(keys[name], sizes[name], minval=low, maxval=high)
        for name, (low, high) in bounds.items()
    }


def everything(key, parts, num_steps):
    """All that one seed has: scores by name, those after training on all images, and the hyperparameters' paths."""
    found, constants, paths = {}, {"start's values": start()}, {}
    for name, method in METHODS.items():
        weights, h, paths[name] = tune_while_training(method, start(), key, parts, num_steps, HYPER_RATE[name])
        found[name], constants[f"{name}, retrained"] = scores(weights, parts), h
    draws = random_draws(jax.random.fold_in(key, 2), DRAWS)
    losses = jax.lax.map(lambda h: scores(train(h, key, parts, num_steps), parts)[0], draws)
    best = jnp.argmin(jnp.nan_to_num(losses, nan=jnp.inf))
    constants[f"best of {DRAWS} random"] = jax.tree.map(lambda values: values[best], draws)
    images = jax.tree.map(lambda *both: jnp.concatenate(both), parts.train, parts.validation)
    found |= {name: scores(train(h, key, parts, num_steps), parts) for name, h in constants.items()}
    on_all = {
        name: scores(train(h, key, parts._replace(train=images), num_steps), parts) for name, h in constants.items()
    }
    return found, on_all, paths


def costs(parts, num_steps) -> dict:
    """Trainings that each counts as."""
    key = jax.random.key(0)
    plain = count_arithmetic(lambda h: train(h, key, parts, num_steps), start())
    of = lambda m: count_arithmetic(lambda h: tune_while_training(m, h, key, parts, num_steps, 0.01), start())  # noqa: E731
    found = {}
    for name, method in METHODS.items():
        found[name] = of(method) / plain
        found[f"{name}, retrained"] = 1 + found[name]
    return found | {"start's values": 1.0, f"best of {DRAWS} random": float(DRAWS)}


SCORES = ("validation", "test", "accuracy")


def compared(rows, trainings) -> dict:
    """Means over seeds, and paired differences, the methods in the order of `trainings`."""
    of = lambda name, what, which="scores": np.array([row[which][name][SCORES.index(what)] for row in rows])  # noqa: E731
    summary, less, default = {}, {}, "start's values"
    for name in trainings:
        summary[name] = {what: _experiment.mean(of(name, what)) for what in SCORES}
        for which, more in (("scores", ""), ("on all", ", on all")):
            if name in rows[0][which]:
                values = {what: of(name, what, which) for what in SCORES[1:]}
                less[name + more] = {w: _experiment.paired(x, of(default, w, "on all")) for w, x in values.items()}
                if more:
                    summary[name] |= {what + more: _experiment.mean(x) for what, x in values.items()}
    ratio = lambda name, what: 100 * (of(name, what) / of(f"{name}, retrained", what) - 1)  # noqa: E731
    above = {name: {what: _experiment.mean(ratio(name, what)) for what in SCORES[:2]} for name in METHODS}
    return {
        "trainings": trainings,
        "summary": summary,
        "above retraining, %": above,
        "less the start's values on all": less,
    }


def percent(summary):
    return _experiment.text({k: v and 100 * v for k, v in summary.items()}, ".2f")


def table(report) -> str:
    heads = ("validation loss", "test loss", "test accuracy, %", "loss, on all", "accuracy, on all")
    lines = [f"{'':24} {'trainings':>9}" + "".join(f"{head:>19}" for head in heads)]
    for name, row in report["summary"].items():
        cells = [_experiment.text(row[what], ".4f") for what in ("validation", "test")]
        cells.append(percent(row["accuracy"]))
        if "test, on all" in row:
            cells += [_experiment.text(row["test, on all"], ".4f"), percent(row["accuracy, on all"])]
        lines.append(f"{name:24} {report['trainings'][name]:9.2f}" + "".join(f"{cell:>19}" for cell in cells))
    for name, row in report["less the start's values on all"].items():
        lines.append(f"{name}, less the start's values on all: {_experiment.text(row['test'], '+.4f')} test loss")
    for name, row in report["above retraining, %"].items():
        both = [_experiment.text(row[what], ".2f") for what in ("validation", "test")]
        lines.append(f"{name}, above its retraining: validation loss {both[0]} %, test loss {both[1]} %")
    return "\n".join(lines)


COLORS = {"T1-T2": plot.BLUE, "real time": plot.VERMILION}
STYLES = ("-", "--", ":")


def picture(report, paths, path):
    figure, axes = plot.figure(1, 2, width=11, height=3.9)
    curves, ends = axes[0]
    for name, color in COLORS.items():
        values = np.concatenate([np.exp(paths[name]["log_penalty"]), np.exp(paths[name]["log_noise"])[..., None]], -1)
        for i, (what, style) in enumerate(zip(("penalty, layer 1", "penalty, layer 2", "noise"), STYLES, strict=True)):
            middle, low, high = np.quantile(values[..., i], [0.5, 0.25, 0.75], 0)
            steps = EVERY * np.arange(len(middle))
            curves.plot(steps, middle, color=color, ls=style, label=f"{name}: {what}")
            curves.fill_between(steps, low, high, color=color, alpha=0.15, lw=0)
    curves.set(yscale="log", xlabel="step of the one training", ylabel="hyperparameters")
    curves.set_title("medians and quartiles over seeds", fontsize=plot.TITLE)
    curves.legend(**plot.LEGEND | {"fontsize": 8}, ncols=2, loc="center", bbox_to_anchor=(0.5, 0.58))
    names = list(report["summary"])
    colors = [COLORS.get(name.partition(",")[0], "0.4") for name in names]
    of = lambda what: ([report["summary"][n][what][k] or 0 for n in names] for k in ("mean", "error"))  # noqa: E731
    shown = [f"{name} ({report['trainings'][name]:.1f})" for name in names]
    plot.dots(ends, shown, {part: tuple(of(part)) for part in ("validation", "test")}, colors=colors)
    all_images = report["summary"]["start's values"]["test, on all"]["mean"]
    ends.axvline(all_images, color="0.6", ls=":", label="test, start's values on all 600 images")
    ends.set_xlabel("loss, by method (trainings that it counts as)")
    ends.legend(**plot.LEGEND | {"fontsize": 8}, ncols=3, loc="lower center", bbox_to_anchor=(0.4, 1.0))
    said = ", ".join(
        f"{_experiment.text(row['test'], '+.1f')} % ({name}, {report['trainings'][name]:.1f} trainings)"
        for name, row in report["above retraining, %"].items()
    )
    figure.suptitle(f"Test loss of tuning while training against retraining with what it found:\n{said}", fontsize=11)
    plot.save(figure, path)


def main(arguments=None) -> None:
    given = _experiment.parse(__file__, __doc__, arguments, seeds=16, quick=2)
    num_steps = 100 if given.quick else STEPS
    split = functools.partial(digits, train=TRAIN, validation=VALIDATION)
    paths, program = {}, jax.jit(functools.partial(everything, num_steps=num_steps))

    def measure(seed, _):
        found = program(jax.random.key(FIRST + seed), jax.tree.map(jnp.asarray, split(FIRST + seed)))
        return dict(zip(("scores", "on all", "paths"), jax.tree.map(lambda x: x.tolist(), found), strict=True))

    rows = _experiment.each_seed(given, measure)
    report = compared(rows, costs(jax.tree.map(jnp.asarray, split(0)), num_steps))
    for name in METHODS:
        paths[name] = {what: np.array([row["paths"][name][what] for row in rows]) for what in start()}
    print(table(report))
    kept = [{key: row[key] for key in ("seed", "scores", "on all")} for row in rows]
    _experiment.write(given, report | {"rows": kept})
    picture(report, paths, given.out / "tune_while_training.png")


if __name__ == "__main__":
    main()
