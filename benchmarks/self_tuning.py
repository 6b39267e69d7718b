"""One self-tuning network against the best of 20 random-search trainings, for the same number of gradients.

MNIST, 2000 images to train on and 1000 to validate on, an MLP 784-100-10 (relu), four hyperparameters: the dropout rate
of the inputs and of the hidden units, and a weight decay for each layer. One gradient of a minibatch, of the train or
of the validation loss, counts as one for both. All settings below were chosen by the validation loss on seeds 100 to
102, which the benchmark does not report; the test images are used once, at the end.

    python benchmarks/self_tuning.py [--out DIR] [--seeds N] [--first-seed SEED]
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxhpo
import jaxhpo.data
import jaxhpo.models
from jaxhpo import plot

GRADIENTS = 12_000
TRIALS = 20
BATCH = 100
WIDTH = 100
TRAIN_STEPS = 2  # gradients of the train loss to one of the validation loss, MacKay's ratio
CHECKPOINTS = 20
TRANSFORMS = {"dropout": jaxhpo.box(0.0, 0.9), "decay": jaxhpo.positive}
START = {"dropout": np.float32([0.1, 0.1]), "decay": np.float32([1e-4, 1e-4])}
DECAYS = (1e-5, 1e-2)  # random search draws their logarithms uniformly from here, and dropout rates from (0, 0.9)
RATE = {"random": 16e-3, "self-tuning": 2e-3}  # of Adam on the weights, along half a cosine
HYPER_RATE = 0.02  # of Adam on the unconstrained hyperparameters
SCALE, ENTROPY = 0.5, 1e-3
WARM_UP = 0.05  # of the updates, before the hyperparameters move

MODEL = jaxhpo.models.SelfTuningMLP((WIDTH, 10), jax.nn.relu)
LAYERS = ("SelfTuningDense_0", "SelfTuningDense_1")


class Batch(NamedTuple):
    """Images, labels, and a key for the dropout (None: no dropout)."""

    images: Any
    labels: Any
    key: Any = None


def draw(examples, key) -> Batch:
    pick_key, key = jax.random.split(key)
    pick = jax.random.randint(pick_key, (BATCH,), 0, len(examples.targets))
    return Batch(examples.inputs[pick], examples.targets[pick], key)


def dropped(batch, hparams, layer, x):
    """Apply dropout to a layer's inputs, with rates that may differ between examples."""
    if batch.key is None:
        return x
    rate = hparams["dropout"][..., layer].reshape(-1, 1)
    keep = jax.random.uniform(jax.random.fold_in(batch.key, layer), x.shape) >= rate
    return jnp.where(keep, x / (1 - rate), 0.0)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# --- an ordinary network: weights and biases of two layers ---


def predict(params, hparams, batch):
    (first, b), (second, c) = params
    hidden = jax.nn.relu(dropped(batch, hparams, 0, batch.images) @ first + b)
    return dropped(batch, hparams, 1, hidden) @ second + c


def train_loss(params, hparams, batch):
    penalties = jnp.stack([0.5 * jnp.sum(weights**2) for weights, _ in params])
    return cross_entropy(predict(params, hparams, batch), batch.labels) + hparams["decay"] @ penalties


def val_loss(params, batch):
    return cross_entropy(predict(params, None, batch._replace(key=None)), batch.labels)


# --- a self-tuning one ---


def change(hparams):
    """Return the layers' input: the change of the unconstrained hyperparameters, with a last axis of four."""
    parts = [TRANSFORMS[k].inverse(hparams[k]) - TRANSFORMS[k].inverse(START[k]) for k in START]
    return jnp.concatenate(parts, -1)


def respond(params, hparams, batch):
    """Return the network's logits."""
    images = dropped(batch, hparams, 0, batch.images)
    between = lambda _, hidden: dropped(batch, hparams, 1, hidden)  # noqa: E731
    return MODEL.apply({"params": params}, images, change(hparams), between)


def response_loss(params, hparams, batch):
    penalty = 0.0
    for i, name in enumerate(LAYERS):
        # The squared weights of an example's network, without forming them: column by column, ‖w + g w_h‖².
        plain, response = params[name]["plain"]["kernel"], params[name]["response"]["kernel"]
        gate = change(hparams) @ params[name]["gate"]["rows"]["kernel"]
        columns = jnp.sum(plain**2, 0) + 2 * gate * jnp.sum(plain * response, 0) + gate**2 * jnp.sum(response**2, 0)
        penalty += jnp.mean(hparams["decay"][..., i] * 0.5 * jnp.sum(columns, -1))
    return cross_entropy(respond(params, hparams, batch), batch.labels) + penalty


def response_val_loss(params, hparams, batch):
    return cross_entropy(respond(params, hparams, batch._replace(key=None)), batch.labels)


# --- the searches ---


def adam(rate, num_steps):
    return optax.adam(optax.cosine_decay_schedule(rate, num_steps))


def train(params, hparams, parts, key, num_steps, rate):
    """Train the ordinary network; return the validation loss at each checkpoint, and the final parameters."""
    solver = jaxhpo.from_optax(train_loss, adam(rate, num_steps))

    def segment(state, key):
        batches = lambda t: draw(parts.train, jax.random.fold_in(key, t))  # noqa: E731
        state = jaxhpo.solve(solver, state, hparams, batches, num_steps=num_steps // CHECKPOINTS).state
        return state, val_loss(state.params, Batch(*parts.validation))

    state, values = jax.lax.scan(segment, solver.init(params, hparams), jax.random.split(key, CHECKPOINTS))
    return values, state.params


def random_search(params, parts, key):
    """Return all trainings' validation losses (trials, checkpoints), parameters and hyperparameters."""
    rates, decays, keys = jax.random.split(key, 3)
    low, high = np.log(DECAYS)
    hparams = {
        "dropout": 0.9 * jax.random.uniform(rates, (TRIALS, 2)),
        "decay": jnp.exp(jax.random.uniform(decays, (TRIALS, 2), minval=low, maxval=high)),
    }
    one = lambda h, key: train(params, h, parts, key, GRADIENTS // TRIALS, RATE["random"])  # noqa: E731
    values, trained = jax.vmap(one)(hparams, jax.random.split(keys, TRIALS))
    return values, trained, hparams


def self_tune(params, parts, key):
    """Return validation losses and hyperparameters at the checkpoints, and the final parameters."""
    updates = GRADIENTS // (TRAIN_STEPS + 1)
    solver = jaxhpo.from_optax(response_loss, optax.sgd(0.1))  # its optimiser is not used
    method = jaxhpo.Hypernetwork(
        adam(RATE["self-tuning"], TRAIN_STEPS * updates),
        network=jaxhpo.self_response,
        per_example=True,
        entropy=ENTROPY,
        transforms=TRANSFORMS,
    )
    pair = jaxhpo.hypergradient(
        method, solver, lambda solution, h, batch: response_val_loss(solution.params, h, batch), num_steps=TRAIN_STEPS
    )
    tx = optax.adam(lambda step: HYPER_RATE * (step >= WARM_UP * updates))

    def natural(point):
        value = {name: TRANSFORMS[name].forward(u) for name, u in point.value.items()}
        return jaxhpo.Perturbed(value, jax.tree.map(jnp.exp, point.scale))

    def update(carry, key):
        point, opt_state, state = carry
        train_key, val_key, key = jax.random.split(key, 3)
        hparams, pullback = jax.vjp(natural, point)
        batches = lambda t: draw(parts.train, jax.random.fold_in(train_key, t))  # noqa: E731
        batch = draw(parts.validation, val_key)
        hypergrad, state, _ = pair.update(hparams, state, batches, batch, key)
        steps, opt_state = tx.update(pullback(hypergrad)[0], opt_state)
        return (optax.apply_updates(point, steps), opt_state, state), None

    def segment(carry, key):
        carry, _ = jax.lax.scan(update, carry, jax.random.split(key, updates // CHECKPOINTS))
        hparams, params = natural(carry[0]), carry[2].inner.params
        value = response_val_loss(params, hparams.value, Batch(*parts.validation))
        return carry, (value, hparams)

    value = {name: TRANSFORMS[name].inverse(jnp.asarray(h)) for name, h in START.items()}
    point = jaxhpo.Perturbed(value, jax.tree.map(lambda x: jnp.full_like(x, np.log(SCALE)), value))
    carry = (point, tx.init(point), pair.init(params, natural(point)))
    carry, (values, hparams) = jax.lax.scan(segment, carry, jax.random.split(key, CHECKPOINTS))
    return values, carry[2].inner.params, hparams


# --- the comparison ---


def judge(logits_of, examples) -> tuple[float, float]:
    """Return mean cross-entropy, and errors in per cent."""
    logits = logits_of(Batch(*examples))
    return float(cross_entropy(logits, examples.targets)), 100 * float(jnp.mean(logits.argmax(-1) != examples.targets))


def row(logits_of, parts, hparams, **more) -> dict[str, Any]:
    validation, test = (judge(logits_of, part) for part in (parts.validation, parts.test))
    return {
        "validation": validation[0],
        "test": test[0],
        "validation_errors": validation[1],
        "test_errors": test[1],
        "hparams": jax.tree.map(lambda x: np.asarray(x).tolist(), hparams),
        **more,
    }


def compare(seed: int, searches) -> dict[str, Any]:
    """Run all three methods from the same weights, on the same split."""
    parts = jax.tree.map(jnp.asarray, jaxhpo.data.mnist(seed, train=2000, validation=1000))
    hidden_from_search = parts._replace(test=None)
    params = MODEL.init(jax.random.key(seed), parts.train.inputs[:1], jnp.zeros(4))["params"]
    plain = [(params[name]["plain"]["kernel"], params[name]["plain"]["bias"]) for name in LAYERS]
    timed = lambda name, start: _timed(searches[name], start, hidden_from_search, jax.random.key(seed))  # noqa: E731

    (values, trained, hparams), seconds = timed("random", plain)
    best = int(jnp.argmin(values[:, -1]))
    chosen, h = jax.tree.map(lambda x: x[best], (trained, hparams))
    found = {"random": row(lambda b: predict(chosen, None, b), parts, h, seconds=seconds, best=best)}
    found["random"]["trials"] = values[:, -1].tolist()

    (values, trained, path), seconds = timed("self-tuning", params)
    h = jax.tree.map(lambda x: x[-1], path)
    found["self-tuning"] = row(lambda b: respond(trained, h.value, b), parts, h._asdict(), seconds=seconds)
    found["self-tuning"] |= {"path": jax.tree.map(lambda x: x.tolist(), path.value), "checkpoints": values.tolist()}

    (values, long), seconds = timed("untuned", plain)
    found["untuned"] = row(lambda b: predict(long, None, b), parts, START, seconds=seconds)
    found["untuned"]["checkpoints"] = values.tolist()
    return found


def _timed(search, *args):
    start = time.perf_counter()
    return jax.block_until_ready(search(*args)), time.perf_counter() - start


NAMES = {
    "random": f"best of {TRIALS} random trials",
    "self-tuning": "self-tuning network",
    "untuned": "one long training, not tuned",
}


def summarise(runs) -> dict[str, Any]:
    """Return means and standard errors over the seeds, and the paired differences to random search."""

    def stats(x):
        x = np.asarray(x, float)
        return {"mean": x.mean(), "standard_error": x.std(ddof=1) / len(x) ** 0.5 if len(x) > 1 else float("nan")}

    columns = ("validation", "test", "validation_errors", "test_errors")
    rows = {name: {c: stats([run[name][c] for run in runs]) for c in columns} for name in NAMES}
    paired = {
        name: {c: stats([run[name][c] - run["random"][c] for run in runs]) for c in columns}
        for name in NAMES
        if name != "random"
    }
    return {"methods": rows, "minus_random": paired}


def draw_picture(runs, path):
    figure, axes = plot.figure(2, 2, width=12, height=8)
    mean = lambda x: (np.mean(x, 0), np.std(x, 0, ddof=1) / len(runs) ** 0.5)  # noqa: E731
    spent = np.arange(1, TRIALS + 1) * GRADIENTS / TRIALS
    best = [np.minimum.accumulate(run["random"]["trials"]) for run in runs]
    plot.band(axes[0, 0], spent, *mean(best), label="random search, best trial so far", drawstyle="steps-post")
    spent = np.arange(1, CHECKPOINTS + 1) * GRADIENTS / CHECKPOINTS
    for name in ("self-tuning", "untuned"):
        plot.band(axes[0, 0], spent, *mean([run[name]["checkpoints"] for run in runs]), label=NAMES[name])
    axes[0, 0].set(xlabel="gradients", ylabel="validation loss")
    axes[0, 0].legend(frameon=False)

    summary = summarise(runs)["methods"]
    series = {
        part: tuple([summary[name][part][kind] for name in NAMES] for kind in ("mean", "standard_error"))
        for part in ("validation", "test")
    }
    plot.dots(axes[0, 1], [NAMES[name].replace(", ", ",\n") for name in NAMES], series)
    axes[0, 1].set(xlabel=f"final loss, mean of {len(runs)} seeds")
    axes[0, 1].legend(frameon=False)

    for axis, name, label in ((axes[1, 0], "dropout", "dropout rate"), (axes[1, 1], "decay", "weight decay")):
        for layer, color in enumerate(("#c0392b", "#2c3e50")):
            for run in runs:
                line = np.asarray(run["self-tuning"]["path"][name])[:, layer]
                axis.plot(spent, line, color=color, alpha=0.8, label=f"layer {layer + 1}" if run is runs[0] else None)
        axis.set(xlabel="gradients", ylabel=f"{label}, a line a seed")
        axis.legend(frameon=False)
    axes[1, 0].set_ylim(bottom=0)
    axes[1, 1].set_yscale("log")
    plot.save(figure, path)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parsed = parser.parse_args(arguments)
    parsed.out.mkdir(parents=True, exist_ok=True)

    searches = {
        "random": jax.jit(random_search),
        "self-tuning": jax.jit(self_tune),
        "untuned": jax.jit(lambda params, parts, key: train(params, START, parts, key, GRADIENTS, RATE["self-tuning"])),
    }
    runs = []
    print(f"{'seed':>4}  {'method':30} {'validation':>10} {'test':>7} {'test errors':>12} {'seconds':>8}")
    for seed in range(parsed.first_seed, parsed.first_seed + parsed.seeds):
        runs.append(compare(seed, searches))
        for name, found in runs[-1].items():
            print(
                f"{seed:4}  {NAMES[name]:30} {found['validation']:10.4f} {found['test']:7.4f} "
                f"{found['test_errors']:10.2f} % {found['seconds']:8.1f}",
                flush=True,
            )
    summary = summarise(runs)
    for name, columns in summary["minus_random"].items():
        told = ", ".join(
            f"{c} {columns[c]['mean']:+.4f} ± {columns[c]['standard_error']:.4f}" for c in list(columns)[:2]
        )
        print(f"{NAMES[name]} less random search, paired: {told}")

    settings = {
        "gradients": GRADIENTS,
        "trials": TRIALS,
        "batch": BATCH,
        "width": WIDTH,
        "rate": RATE,
        "hyper_rate": HYPER_RATE,
        "scale": SCALE,
        "entropy": ENTROPY,
        "warm_up": WARM_UP,
        "first_seed": parsed.first_seed,
        "jax": jax.__version__,
    }
    report = {"settings": settings, **summary, "seeds": runs}
    (parsed.out / "self_tuning.json").write_text(json.dumps(report, indent=1) + "\n")
    draw_picture(runs, parsed.out / "self_tuning.png")


if __name__ == "__main__":
    main()
