"""Error of an Adam that is reversed exactly, as `Reversible` reverses momentum.

Its moments are products with rational numbers, as momentum's velocity is, so they can be undone in fixed point. But
the second is a mean of squared gradients: its increments may be smaller than the spacing of the numbers.
Here Adam (network 64-64-10 on handwritten digits, T = 200, float64) has its weights and moments rounded to multiples of
2^-F after each step, as in fixed point, with the derivative of the unrounded step. The error is the
hypergradient's distance from that of the run without rounding.

    python benchmarks/reversible_adam.py [--out DIR]
"""

from __future__ import annotations

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import optax

import jaxhpo.data

NUM_STEPS, BATCH = 200, 64
FORMATS = ((28, None), (28, 28), (28, 36), (28, 44), (52, 52))  # bits of weights and first moment, of the second


def rounded(x: jax.Array, bits: int | None) -> jax.Array:
    return x if bits is None else x + jax.lax.stop_gradient(jnp.round(x * 2.0**bits) / 2.0**bits - x)


def make_outer_loss():
    """Return `(h, bits, bits of the second moment) -> validation loss`, and the hyperparameters."""
    parts = jaxhpo.data.digits(seed=0, train=1000, validation=400)
    (x, y), (x_val, y_val) = parts.train, parts.validation
    x, y, x_val, y_val = jnp.asarray(x, float), jnp.asarray(y), jnp.asarray(x_val, float), jnp.asarray(y_val)
    keys = jax.random.split(jax.random.key(0), 3)
    start = {"in": jax.random.normal(keys[0], (64, 64)) / 8, "out": jax.random.normal(keys[1], (64, 10)) / 8}
    rows = jax.random.randint(keys[2], (NUM_STEPS, BATCH), 0, len(x))

    def losses(p, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(jax.nn.gelu(x @ p["in"]) @ p["out"], y)

    def train_loss(p, h, batch):
        decay = jax.tree.map(lambda log, w: jnp.sum(jnp.exp(log) * w**2), h["log_decay"], p)
        return jnp.mean(losses(p, x[batch], y[batch])) + sum(jax.tree.leaves(decay))

    def outer_loss(h, bits, second_bits):
        def step(carry, t):
            p, m, v = carry
            g = jax.grad(train_loss)(p, h, rows[t])
            m = jax.tree.map(lambda m, g: rounded(0.9 * m + 0.1 * g, bits), m, g)
            v = jax.tree.map(lambda v, g: rounded(0.999 * v + 0.001 * g**2, second_bits), v, g)
            first, second = 1 - 0.9 ** (t + 1.0), 1 - 0.999 ** (t + 1.0)
            rate = jnp.exp(h["log_rate"][t])
            move = jax.tree.map(lambda m, v: rate * (m / first) / (jnp.sqrt(v / second + 1e-8) + 1e-8), m, v)
            return (jax.tree.map(lambda p, d: rounded(p - d, bits), p, move), m, v), None

        zeros = jax.tree.map(jnp.zeros_like, start)
        trained = jax.lax.scan(jax.checkpoint(step), (start, zeros, zeros), jnp.arange(NUM_STEPS))[0][0]
        return jnp.mean(losses(trained, x_val, y_val))

    decays = jax.tree.map(lambda w: jnp.full_like(w, -9.0), start)
    return outer_loss, {"log_decay": decays, "log_rate": jnp.full(NUM_STEPS, jnp.log(3e-3))}


def relative_error(found, exact) -> float:
    difference = jax.tree.map(jnp.subtract, found, exact)
    return float(optax.tree.norm(difference) / optax.tree.norm(exact))


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parsed = parser.parse_args(arguments)
    parsed.out.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_enable_x64", True)
    outer_loss, h = make_outer_loss()
    gradient = jax.jit(jax.grad(outer_loss), static_argnums=(1, 2))
    exact, rows = gradient(h, None, None), []
    print(f"{'bits':>5} {'of the second moment':>21} {'error, decays':>14} {'error, rates':>13}")
    for bits, second_bits in FORMATS:
        found = gradient(h, bits, second_bits)
        errors = {name: relative_error(found[name], exact[name]) for name in h}
        rows.append({"bits": bits, "second_moment_bits": second_bits, **errors})
        print(f"{bits:5} {second_bits!s:>21} {errors['log_decay']:14.1e} {errors['log_rate']:13.1e}", flush=True)
    (parsed.out / "reversible_adam.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
