"""Does a hypergradient through Adam predict what retraining does, and with which `eps_root`?

A network 64-24-10 (tanh) on 200 handwritten digits, 200 steps on minibatches of 50. The hyperparameters are a weight
for each example, of one, and apart from that the logarithm of the learning rate. The exact hypergradient of `Unroll()`
predicts how the validation loss, and each of eight single ones, changes where examples are left out. That is compared
with trainings without them: Spearman's rank correlation over random subsets of a twentieth and a fifth ("loss", and
"single", the mean over the eight), and for examples left out one at a time the cosine. For the rate it is compared with
the change where the rate is 5 % higher or lower. Mean over seeds (data, initial weights, minibatches), ± the standard
error; below it the change from `eps_root=1e-8`, seed by seed.

    python benchmarks/eps_root.py [--out DIR] [--quick]
"""

from __future__ import annotations

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.stats import spearmanr

import jaxhpo
import jaxhpo.data

EPS_ROOTS, RATES = (1e-8, 0.0, 1e-16, 1e-12, 1e-6, 1e-5, 1e-4), (3e-3, 1e-2)
EXAMPLES, BATCH, STEPS, HIDDEN, SINGLE = 200, 50, 200, 24, 8
DRAWS, FRACTIONS, RATE_STEP = 20, (0.05, 0.2), 0.05
FIGURES = ("single 5 %", "single 20 %", "loss 5 %", "loss 20 %", "cosine", "rate", "validation loss")


def losses(params, x, y):
    logits = jnp.tanh(x @ params["in"] + params["bias"]) @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def make_outer_losses(seed: int):
    """Return `(weights, log rate, eps_root) -> the mean validation loss and single ones`, in the default precision."""
    parts = jaxhpo.data.digits(seed=seed, train=EXAMPLES, validation=500)
    (x, y), (x_val, y_val) = ((jnp.asarray(part.inputs, float), jnp.asarray(part.targets)) for part in parts[:2])
    keys = jax.random.split(jax.random.key(seed), 3)
    start = {
        "in": jax.random.normal(keys[0], (64, HIDDEN)) / 8,
        "bias": jnp.zeros(HIDDEN),
        "out": jax.random.normal(keys[1], (HIDDEN, 10)) / HIDDEN**0.5,
    }
    rows = jax.random.randint(keys[2], (STEPS, BATCH), 0, EXAMPLES)

    def outer_losses(weights, log_rate, eps_root):
        tx = optax.adam(jnp.exp(log_rate), eps_root=eps_root)
        solver = jaxhpo.from_optax(lambda p, w, rows: jnp.mean(w[rows] * losses(p, x[rows], y[rows])), tx)
        each = losses(jaxhpo.solve(solver, solver.init(start, weights), weights, rows).params, x_val, y_val)
        return jnp.append(jnp.mean(each), each[:SINGLE])

    return outer_losses


def measure(outer_losses, rate: float, eps_root: float, seed: int) -> dict[str, float]:
    """Return the figures of one training and its hypergradients."""
    one, log_rate = jnp.ones(EXAMPLES), jnp.log(rate)
    values, (by_weight, by_rate) = outer_losses.derivatives(one, log_rate, eps_root)
    rng, figures = np.random.default_rng(seed), {}
    sizes = [1] + [round(f * EXAMPLES) for f in FRACTIONS]
    kept = np.stack([rng.permutation(EXAMPLES) >= size for size in sizes for _ in range(DRAWS)]).astype(float)
    rates = np.full(len(kept) + 2, log_rate)
    rates[-2:] += np.log1p([RATE_STEP, -RATE_STEP])
    trained = outer_losses.trained(jnp.asarray(np.vstack([kept, one, one]), one.dtype), jnp.asarray(rates), eps_root)
    changes, predicted = np.asarray(trained) - np.asarray(values), (kept - 1) @ np.asarray(by_weight).T
    for i, fraction in enumerate(FRACTIONS, 1):
        part = slice(i * DRAWS, (i + 1) * DRAWS)
        ranks = [spearmanr(predicted[part, k], changes[part, k])[0] for k in range(SINGLE + 1)]
        figures |= {f"single {fraction:.0%}".replace("%", " %"): np.mean(ranks[1:])}
        figures |= {f"loss {fraction:.0%}".replace("%", " %"): ranks[0]}
    a, b = predicted[:DRAWS, 0], changes[:DRAWS, 0]
    figures["cosine"] = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    actual = (changes[-2, 0] - changes[-1, 0]) / (rates[-2] - rates[-1])
    figures["rate"] = float(by_rate[0]) / actual  # one, where the prediction is right
    return {name: float(x) for name, x in (figures | {"validation loss": values[0]}).items()}


class Compiled:
    """The outer losses of a seed, compiled once for all settings."""

    def __init__(self, seed: int):
        fn = make_outer_losses(seed)
        self.derivatives = jax.jit(lambda *args: (fn(*args), jax.jacrev(fn, (0, 1))(*args)))
        self.trained = jax.jit(jax.vmap(fn, (0, 0, None)))


def shown(x: np.ndarray) -> str:
    return f"{np.mean(x):.3f} ± {np.std(x, ddof=1) / len(x) ** 0.5:.3f}" if np.isfinite(x).all() else "NaN"


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="two seeds in float32 and two values; nothing is written")
    parser.add_argument("--dtype", choices=("float32", "float64"), help="one precision; nothing is written")
    parsed = parser.parse_args(arguments)
    seeds, eps_roots = (range(2), (1e-8, 1e-5)) if parsed.quick else (range(6), EPS_ROOTS)
    dtypes = [parsed.dtype] if parsed.dtype else ["float32"] if parsed.quick else ["float32", "float64"]
    rows = []
    for dtype in dtypes:
        with jax.enable_x64(dtype == "float64"):
            compiled = [Compiled(seed) for seed in seeds]
            for rate in RATES:
                print(
                    f"{dtype}, rate {rate:g}\n{'eps_root':>9}" + "".join(f"{name:>18}" for name in FIGURES), flush=True
                )
                first = None
                for eps_root in eps_roots:
                    each = [measure(compiled[seed], rate, eps_root, seed) for seed in seeds]
                    found = {name: np.asarray([figures[name] for figures in each]) for name in FIGURES}
                    print(f"{eps_root:9.0e}" + "".join(f"{shown(found[name]):>18}" for name in FIGURES), flush=True)
                    if first is not None:
                        cells = "".join(f"{shown(found[name] - first[name]):>18}" for name in FIGURES)
                        print(f"{'change':>9}" + cells, flush=True)
                    else:
                        first = found
                    figures = {name: x.tolist() if np.isfinite(x).all() else None for name, x in found.items()}
                    rows.append({"dtype": dtype, "learning_rate": rate, "eps_root": eps_root, **figures})
    if not (parsed.quick or parsed.dtype):
        parsed.out.mkdir(parents=True, exist_ok=True)
        (parsed.out / "eps_root.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
