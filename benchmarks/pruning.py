"""What pruning by the posterior density at zero leaves of a network's accuracy, beside pruning by magnitude.

A network 64-100-10 on handwritten digits: 1000 to train, 297 to choose settings by, 500 to test. Graves's variational
inference: a Gaussian posterior for every weight, trained by the bound, and every 50 steps the prior's variance of each
weight set to its best value in closed form. Then the weights of largest density at zero relative to that at the mean
are set to zero. "tempered" weighs the divergence in the bound by less than one.

Rivals are trained in as many steps without noise, and lose their smallest weights: without penalty, with a penalty
Σ w² or Σ |w|. The weight of the divergence and the penalties are those of the highest validation accuracy at 90 and
95 %, a mean over seeds. Controls: the means of the tempered posterior by magnitude, and at random.

    python benchmarks/pruning.py [--out DIR] [--quick] [--seeds 5]
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _arguments import parse
from jax.flatten_util import ravel_pytree

import jaxhpo
import jaxhpo.data
from jaxhpo import criteria, plot
from jaxhpo.criteria import Posterior

FRACTIONS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98)
TRAIN, WIDTH, BATCH, BLOCK = 1000, 100, 100, 50
TEMPERS = (0.3, 0.1, 0.03)
PENALTIES = {"Σ w²": (1e-5, 1e-4, 3e-4, 1e-3), "Σ |w|": (1e-4, 3e-4, 1e-3, 3e-3)}  # of the mean loss of an example
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def initial(key):
    first, second = jax.random.split(key)
    kernels = jax.random.normal(first, (64, WIDTH)) / 8, jax.random.normal(second, (WIDTH, 10)) / WIDTH**0.5
    return tuple({"kernel": kernel, "bias": jnp.zeros(kernel.shape[1])} for kernel in kernels)


def network(dense, params, x, keys=(None, None)):
    """The logits; `dense(layer, x, key)` is a layer."""
    return dense(params[1], jnp.tanh(dense(params[0], x, keys[0])), keys[1])


def plain(layer, x, key):
    return x @ layer["kernel"] + layer["bias"][None]


def drawn(layer, x, key):
    """A layer of the posterior: its outputs are drawn, for each example on their own."""
    kernel, bias = (Posterior(layer.mean[name], layer.log_scale[name]) for name in ("kernel", "bias"))
    return criteria.local_dense(kernel, bias, x, key)


def minibatches(key, data, num_steps):
    rows, noise = jax.random.split(key)
    row = jax.random.randint(rows, (num_steps, BATCH), 0, TRAIN)
    return data[0][row], data[1][row], jax.random.split(noise, (num_steps, 2))


def variational(key, data, weight, blocks):
    """The posterior: `weight` is the divergence's, relative to the bound's."""

    def train_loss(q, prior, batch):
        x, y, keys = batch
        layers = tuple(map(Posterior, q.mean, q.log_scale))
        fit = cross_entropy(network(drawn, layers, x, keys), y).mean()
        return fit + weight * criteria.kl(q, *prior) / TRAIN

    def block(carry, key):
        state, prior = carry
        state = jaxhpo.solve(solver, state, prior, minibatches(key, data, BLOCK)).state
        return (state, criteria.closest_prior(state.params)), None

    solver = jaxhpo.from_optax(train_loss, optax.adam(1e-2))
    mean = initial(key)
    q = Posterior(mean, jax.tree.map(lambda w: jnp.full_like(w, -4.0), mean))
    prior = criteria.closest_prior(q)
    (state, _), _ = jax.lax.scan(block, (solver.init(q, prior), prior), jax.random.split(key, blocks))
    return state.params


def ordinary(key, data, penalties, blocks):
    """Trained parameters; penalties of Σ w² and Σ |w|."""

    def train_loss(params, penalties, batch):
        x, y, _ = batch
        sizes = [sum(jnp.sum(norm(w)) for w in jax.tree.leaves(params)) for norm in (jnp.square, jnp.abs)]
        return cross_entropy(network(plain, params, x), y).mean() + penalties @ jnp.stack(sizes)

    solver = jaxhpo.from_optax(train_loss, optax.adam(3e-3))
    batches = minibatches(key, data, blocks * BLOCK)
    return jaxhpo.solve(solver, solver.init(initial(key), penalties), penalties, batches).params


def by_magnitude(params):
    """A posterior of one scale, of which `pruned` takes the smallest means."""
    return Posterior(params, jax.tree.map(jnp.zeros_like, params))


def at_random(params):
    """Scales that put the weights into a random order."""
    flat, unravel = ravel_pytree(params)
    return Posterior(params, unravel(jnp.log(jnp.abs(flat)) + jax.random.normal(jax.random.key(1), flat.shape)))


@jax.jit
def curves(posteriors, data):
    """Test accuracies, of shape (fractions, seeds)."""

    def accuracies(q, data):
        x, y = data
        kept = [criteria.pruned(q, fraction) for fraction in FRACTIONS]
        return jnp.stack([jnp.mean(network(plain, params, x).argmax(1) == y) for params in kept])

    return jax.vmap(accuracies, out_axes=1)(posteriors, data)


def measure(seeds, blocks):
    """Curves on the test part by name, and the settings chosen."""
    splits = [jaxhpo.data.digits(seed, train=TRAIN, validation=297) for seed in range(seeds)]
    train, validation, test = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[tuple(map(tuple, s)) for s in splits])
    keys = jax.random.split(jax.random.key(0), seeds)
    vary, plainly = (
        jax.jit(jax.vmap(functools.partial(method, blocks=blocks), (0, 0, None))) for method in (variational, ordinary)
    )
    high = jnp.array([FRACTIONS.index(0.9), FRACTIONS.index(0.95)])

    def best(trained):
        """The setting and posterior of the highest validation accuracy."""
        return max(trained.items(), key=lambda item: curves(item[1], validation)[high].mean())

    def rival(*penalties):
        return by_magnitude(plainly(keys, train, jnp.array(penalties)))

    temper, tempered = best({weight: vary(keys, train, weight) for weight in TEMPERS})
    squared = best({penalty: rival(penalty, 0.0) for penalty in PENALTIES["Σ w²"]})
    absolute = best({penalty: rival(0.0, penalty) for penalty in PENALTIES["Σ |w|"]})
    posteriors = {
        "posterior density": vary(keys, train, 1.0),
        "the same, tempered": tempered,
        "its means by magnitude": by_magnitude(tempered.mean),
        "its means at random": jax.vmap(at_random)(tempered.mean),
        "magnitude, no penalty": rival(0.0, 0.0),
        "magnitude, Σ w²": squared[1],
        "magnitude, Σ |w|": absolute[1],
    }
    chosen = {"weight of the divergence": temper, "Σ w²": squared[0], "Σ |w|": absolute[0]}
    return {name: np.asarray(curves(q, test)) for name, q in posteriors.items()}, chosen


def summary(found):
    """Points of test accuracy lost, and seeds that are not below a rival."""
    own = {name: found[name] for name in ("posterior density", "the same, tempered")}
    rivals = {name: curve for name, curve in found.items() if name.startswith("magnitude")}
    at = FRACTIONS.index
    return {
        name: {
            "points lost": {f"{f:.0%}": 100 * float((curve[0] - curve[at(f)]).mean()) for f in (0.7, 0.9, 0.95)},
            "points below the unpruned network without penalty": {
                f"{f:.0%}": 100 * float((rivals["magnitude, no penalty"][0] - curve[at(f)]).mean())
                for f in (0.0, 0.7, 0.9, 0.95)
            },
            "seeds not below": {
                rival: {f"{f:.0%}": int((curve[at(f)] >= other[at(f)]).sum()) for f in (0.9, 0.95)}
                for rival, other in rivals.items()
            },
        }
        for name, curve in own.items()
    }


def picture(found, path):
    figure, axes = plot.figure(width=7, height=4.2)
    axis, left = axes[0, 0], 100 * (1 - np.array(FRACTIONS))
    colors, styles = (*plot.PALETTE, "0.3"), ("-", "-", ":", ":", "--", "--", "--")
    for (name, curve), color, style in zip(found.items(), colors, styles, strict=True):
        error = curve.std(1) / max(1, curve.shape[1] - 1) ** 0.5
        plot.band(axis, left, curve.mean(1), error, label=name, color=color, ls=style, marker=".")
    axis.set(xlabel="% of the weights left", ylabel="test accuracy", ylim=(0, 1), xscale="log", xlim=(105, 1.8))
    axis.set_xticks([100, 50, 20, 10, 5, 2], ["100", "50", "20", "10", "5", "2"])
    axis.minorticks_off()
    lost = 100 * (found["the same, tempered"][0] - found["the same, tempered"][FRACTIONS.index(0.95)]).mean()
    axis.set_title(
        f"Pruned by a tempered posterior, 95 % of the weights go for {max(0.0, lost):.1f} points", fontsize=11
    )
    axis.legend(**plot.LEGEND | {"fontsize": 8})
    plot.save(figure, path)


def main(arguments=None) -> None:
    given = parse(__doc__, arguments, seeds=5, quick=2)
    found, chosen = measure(given.seeds, 2 if given.quick else 40)
    for name, curve in found.items():
        print(f"{name:26}", *(f"{f:.0%}: {100 * mean:.1f}" for f, mean in zip(FRACTIONS, curve.mean(1), strict=True)))
    report = {"fractions": FRACTIONS, "chosen": chosen, "summary": summary(found), "test accuracy": found}
    text = json.dumps(report, indent=1, default=lambda x: np.round(x, 4).tolist())
    (given.out / "pruning.json").write_text(text + "\n")
    print(json.dumps(report["summary"], indent=1, ensure_ascii=False))
    picture(found, given.out / "pruning.png")


if __name__ == "__main__":
    main()
