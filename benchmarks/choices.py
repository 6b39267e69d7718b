"""Whether the gradient chooses the right one of four activations, and what rounding its relaxed choice costs.

Networks of one hidden layer, with tanh, relu, sine or a bump. Probabilities p = softmax(h) of the four are tuned by
the gradient of a validation loss, after ten more steps of Adam from where the last outer step left the network; they
begin to move after half of the steps, so that what learns fastest is not chosen before the others have learned:

    softmax     each unit is the mixture of the four, with weights p (one network)
    concrete    the same, its weights drawn at each outer step from the Concrete distribution, at a temperature that
                falls from 2 to 0.2
    expected    each activation has networks of its own, as many as below; train and validation loss are the expected
                ones, with probabilities p

The largest h is the choice; a choice at random is the control.

    made      data made by a network with one of the four, and noise; five sets of each: which one was it?
    digits    handwritten digits, 200 images to train, 300 to choose by: which is best?

Enumeration trains networks with each activation alone, from three (made) or ten (digits) other initial weights: the
best one is that of the lowest mean validation loss, and the regret of a choice is its mean less that of the best one;
"error of enumeration" is the standard error of the best one's mean. "gap" is the loss of networks with the choice alone
less the relaxed one, trained alike from the same initial weights.

    python benchmarks/choices.py [--out DIR] [--quick] [--seeds 10]
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _arguments import parse

import jaxhpo
import jaxhpo.data
from jaxhpo import criteria, plot

ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu, "sine": jnp.sin, "bump": lambda z: jnp.exp(-(z**2))}
INNER = 10
METHODS = ("softmax", "concrete", "expected")


def network(params, activation, x):
    hidden = activation(x @ params["in"] + params["shift"][None])
    return hidden @ params["out"] + params["bias"][None]


def mixture(p):
    return lambda z: sum(weight * f(z) for weight, f in zip(p, ACTIVATIONS.values(), strict=True))


def mixed_loss(loss, params, p, data):
    return loss(network(params, mixture(p), data[0]), data[1])


def expected_loss(loss, params, p, data):
    """Over activations, each with networks of its own."""
    outputs = [jax.vmap(network, (0, None, None))(params[name], f, data[0]) for name, f in ACTIVATIONS.items()]
    return sum(weight * jax.vmap(loss, (0, None))(y, data[1]).mean() for weight, y in zip(p, outputs, strict=True))


def initial(key, sizes):
    first, second = jax.random.split(key)
    d, units, outputs = sizes
    return {
        "in": jax.random.normal(first, (d, units)) * (2 / d) ** 0.5,
        "shift": jnp.zeros(units),
        "out": jax.random.normal(second, (units, outputs)) / units**0.5,
        "bias": jnp.zeros(outputs),
    }


def squared(outputs, y):
    return jnp.mean((outputs[:, 0] - y) ** 2)


def cross_entropy(outputs, y):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()


def made(seed):
    """Data of a network of six units with the activation `seed % 4`: 400 points to train, 400 to choose by."""
    rng = np.random.default_rng(seed)
    w, v = 1.2 * rng.standard_normal((3, 6)), rng.choice([-1, 1], 6) * rng.uniform(0.5, 1.5, 6)
    shift, x = rng.uniform(-1, 1, 6), rng.standard_normal((800, 3))
    y = np.asarray(list(ACTIVATIONS.values())[seed % 4](x @ w + shift)) @ v
    y = (y - y.mean()) / y.std() + 0.05 * rng.standard_normal(800)
    return (x[:400], y[:400]), (x[400:], y[400:])


def digits(seed):
    split = jaxhpo.data.digits(seed, train=200, validation=300)
    return tuple(split.train), tuple(split.validation)


def choose(data, method, starts, loss, sizes, rate, outer_steps):
    """The h at the end, of each of several data sets."""
    judge = functools.partial(expected_loss if method == "expected" else mixed_loss, loss)

    def start(key):
        if method != "expected":
            return initial(key, sizes)
        keys = jax.random.split(key, (len(ACTIVATIONS), starts))
        return {
            name: jax.vmap(lambda key: initial(key, sizes))(own) for name, own in zip(ACTIVATIONS, keys, strict=True)
        }

    def outer_loss(h, carry, key):
        state, (train, validation), step = carry
        temperature = 2 * 0.1 ** (step / outer_steps)
        p = criteria.concrete(key, h, temperature) if method == "concrete" else jax.nn.softmax(h)
        state = jaxhpo.solve(solver, state, p, lambda t: train, num_steps=INNER).state
        return judge(state.params, p, validation), (state, (train, validation), step + 1), None

    solver = jaxhpo.from_optax(judge, optax.adam(rate, eps_root=1e-8))
    runs = len(data[0][0])
    states = jax.vmap(lambda key: solver.init(start(key), jnp.zeros(4)))(jax.random.split(jax.random.key(0), runs))
    how = {"population": runs, "carry": (states, data, jnp.zeros(runs)), "progress": False}
    h = jnp.zeros((runs, len(ACTIVATIONS)))
    late = optax.adam(
        lambda step: jnp.where(step < outer_steps // 2, 0.0, 0.2), b2=0.9
    )  # what learns fast is not what is best
    return jaxhpo.tune(outer_loss, h, late, num_steps=outer_steps, **how).hparams


def losses_of(p, data, starts, loss, sizes, rate, steps):
    """Validation losses of networks trained with given mixtures, of shape (data sets, mixtures, initial weights)."""

    def one(p, data, key):
        train, validation = data
        solver = jaxhpo.from_optax(lambda w, p, batch: mixed_loss(loss, w, p, train), optax.adam(rate))
        params = jaxhpo.solve(solver, solver.init(initial(key, sizes), p), p, num_steps=steps).params
        return mixed_loss(loss, params, p, validation)

    keys = jax.random.split(jax.random.key(1), starts)
    over_starts = jax.vmap(one, (None, None, 0))
    return np.asarray(jax.jit(jax.vmap(jax.vmap(over_starts, (0, None, None)), (0, 0, None)))(p, data, keys))


def measure(name, seeds, quick):
    load, starts, loss, sizes, rate = {
        "made": (made, 3, squared, (3, 8, 1), 0.03),
        "digits": (digits, 10, cross_entropy, (64, 32, 10), 0.005),
    }[name]
    outer_steps = 3 if quick else 60
    runs = seeds * (2 if name == "made" else 1)
    data = jax.tree.map(lambda *leaves: jnp.stack(list(map(jnp.asarray, leaves))), *map(load, range(runs)))
    each = jnp.tile(jnp.eye(len(ACTIVATIONS))[None], (runs, 1, 1))
    steps = outer_steps * INNER
    enumerated = losses_of(each, data, starts, loss, sizes, rate, steps)
    means = enumerated.mean(2)
    best = means.argmin(1)
    right = np.arange(runs) % len(ACTIVATIONS) if name == "made" else best
    rng = np.random.default_rng(0)
    rows, h = [], {method: choose(data, method, starts, loss, sizes, rate, outer_steps) for method in METHODS}
    h["random"] = jnp.asarray(rng.standard_normal((runs, len(ACTIVATIONS))))
    for method, logits in h.items():
        pick = np.asarray(logits.argmax(1))
        p = np.asarray(jax.nn.softmax(logits))
        if method == "expected":
            relaxed = np.einsum("rk,rks->rs", p, enumerated)
        else:
            relaxed = losses_of(p[:, None], data, starts, loss, sizes, rate, steps)[:, 0]
        for run in range(runs):
            more = enumerated[run, pick[run]] - enumerated[run, best[run]]
            rows.append(
                {
                    "data": name,
                    "seed": run,
                    "method": method,
                    "chosen": list(ACTIVATIONS)[pick[run]],
                    "right": list(ACTIVATIONS)[right[run]],
                    "probability": float(p[run].max()),
                    "regret": float(more.mean()),
                    "error": float(more.std(ddof=1) / starts**0.5),
                    "error of enumeration": float(enumerated[run, best[run]].std(ddof=1) / starts**0.5),
                    "gap": float((enumerated[run, pick[run]] - relaxed[run]).mean()),
                }
            )
    return rows


def summary(rows):
    groups = {}
    for row in rows:
        groups.setdefault(f"{row['data']}, {row['method']}", []).append(row)
    return {
        name: {
            "runs": len(own),
            "right": sum(row["chosen"] == row["right"] for row in own),
            "of lowest loss": sum(row["regret"] == 0 for row in own),
            "right, of each": {
                f: f"{sum(r['chosen'] == f for r in mine)} of {len(mine)}"
                for f in ACTIVATIONS
                if (mine := [r for r in own if r["right"] == f])
            },
            "regret": float(np.mean([row["regret"] for row in own])),
            "regret within one standard error of enumeration": sum(
                r["regret"] <= r["error of enumeration"] for r in own
            ),
            "gap": float(np.mean([row["gap"] for row in own])),
            "probability of the choice": float(np.mean([row["probability"] for row in own])),
        }
        for name, own in groups.items()
    }


def picture(rows, found, path):
    figure, axes = plot.figure(1, 2, width=10, height=3.6)
    made, digits = axes.flat
    names = [*METHODS, "random"]
    for place, name in enumerate(names):
        values = found[f"made, {name}"]
        made.bar(place, 100 * values["right"] / values["runs"], color=plot.BLUE if name != "random" else "0.6")
        own = [row for row in rows if row["data"] == "digits" and row["method"] == name]
        of_error = np.array([row["regret"] / row["error of enumeration"] for row in own])
        digits.plot(np.full(len(own), place), of_error, "o", ms=4, color=plot.BLUE, alpha=0.4)
        if own:
            digits.plot(place, of_error.mean(), "D", ms=7, color=plot.VERMILION)
    digits.axhline(1, color="0.6", lw=1)
    for axis in (made, digits):
        axis.set_xticks(range(len(names)), names)
    made.set(ylabel="% of data sets", ylim=(0, 105))
    made.set_title("The activation that made the data is chosen", fontsize=plot.TITLE)
    digits.set(ylabel="regret, standard errors")
    digits.set_title("Digits: regret of the choice", fontsize=plot.TITLE)
    rights = [found[f"made, {name}"] for name in ("expected", "softmax")]
    title = "Networks of their own choose right in {} of {} runs, mixtures in {}"
    figure.suptitle(title.format(rights[0]["right"], rights[0]["runs"], rights[1]["right"]), fontsize=12)
    plot.save(figure, path)


def main(arguments=None) -> None:
    given = parse(__doc__, arguments, seeds=10, quick=1)
    rows = []
    for name in ("made", "digits")[: 1 if given.quick else None]:
        rows += measure(name, given.seeds, given.quick)
    found = summary(rows)
    for name, values in found.items():
        print(f"{name}: {json.dumps(values)}")
    (given.out / "choices.json").write_text(json.dumps({"summary": found, "rows": rows}, indent=1) + "\n")
    picture(rows, found, given.out / "choices.png")


if __name__ == "__main__":
    main()
