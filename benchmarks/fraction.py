"""Cost and variance of Hessian products on a part of each minibatch.

`Unroll(hvp_fraction=f)` is unbiased, at the cost of variance. On handwritten digits, a network 64-64-10 under SGD
with momentum, T steps of minibatches of b: the cosine with the exact hypergradient, a mean over draws, and the variance
of a draw relative to the squared norm of the exact one, for the log decays of all weights and the log rates of all
steps. Arithmetic is counted, in units of the plain training.

    python benchmarks/fraction.py [--draws 64] [--out DIR]
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxhpo
import jaxhpo.data
from jaxhpo import plot
from jaxhpo._core.cost import count_arithmetic

FRACTIONS = (0.5, 0.25, 0.125)
STEPS = (5, 20, 100)
BATCHES = (32, 128, 512)


def losses(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(jax.nn.gelu(x @ params["in"]) @ params["out"], y)


def train_loss(params, h, batch):
    decay = jax.tree.map(lambda log, w: jnp.sum(jnp.exp(log) * w**2), h["log_decay"], params)
    return jnp.mean(losses(params, *batch)) + sum(jax.tree.leaves(decay))


def make_problem(num_steps: int, batch: int):
    """Return `outer_loss(h, key, adjoint)` and the hyperparameters."""
    parts = jaxhpo.data.digits(seed=0, train=1000, validation=400)
    (x, y), (x_val, y_val) = parts.train, parts.validation
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"in": jax.random.normal(keys[0], (64, 64)) / 8, "out": jax.random.normal(keys[1], (64, 10)) / 8}
    rows = jax.random.randint(keys[2], (num_steps, batch), 0, len(x))
    batches = jnp.asarray(x)[rows], jnp.asarray(y)[rows]
    solver = jaxhpo.from_optax(train_loss, lambda h: optax.sgd(lambda t: jnp.exp(h["log_rate"][t]), momentum=0.9))

    def outer_loss(h, key, adjoint):
        solution = jaxhpo.solve(solver, solver.init(params, h), h, batches, adjoint=adjoint, key=key)
        return losses(solution.params, x_val, y_val).mean()

    decays = jax.tree.map(lambda w: jnp.full_like(w, -9.0), params)
    return outer_loss, {"log_decay": decays, "log_rate": jnp.full(num_steps, -3.0)}


def flat(tree):
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


def measure(num_steps: int, batch: int, draws: int) -> list[dict]:
    outer_loss, h = make_problem(num_steps, batch)
    gradient = lambda adjoint: jax.grad(functools.partial(outer_loss, adjoint=adjoint))  # noqa: E731
    unit = count_arithmetic(functools.partial(outer_loss, adjoint=jaxhpo.Unroll()), h, None)
    checkpoint = max(1, round(num_steps**0.5))
    exact_rule = jaxhpo.Unroll(checkpoint=checkpoint)
    exact = np.asarray(flat(jax.jit(gradient(exact_rule))(h, None)))
    rows = []
    for fraction in (1.0, *FRACTIONS):
        rule = jaxhpo.Unroll(checkpoint=checkpoint, hvp_fraction=fraction)
        draw = jax.jit(lambda key, rule=rule: flat(gradient(rule)(h, key)))
        found = np.stack([np.asarray(draw(key)) for key in jax.random.split(jax.random.key(1), draws)])
        cosines = found @ exact / np.linalg.norm(found, axis=1) / np.linalg.norm(exact)
        rows.append(
            {
                "num_steps": num_steps,
                "batch": batch,
                "fraction": fraction,
                "cosine": float(cosines.mean()),
                "cosine_error": float(cosines.std(ddof=1) / draws**0.5),
                "relative_variance": float(found.var(0, ddof=1).sum() / (exact @ exact)),
                "arithmetic": count_arithmetic(gradient(rule), h, jax.random.key(0)) / unit,
                "arithmetic_exact": count_arithmetic(gradient(exact_rule), h, None) / unit,
            }
        )
    return rows


def draw_picture(rows, path) -> None:
    figure, axes = plot.figure(1, len(STEPS), width=12, height=4)
    for axis, num_steps in zip(axes.flat, STEPS, strict=True):
        for batch in BATCHES:
            mine = [r for r in rows if (r["num_steps"], r["batch"]) == (num_steps, batch)]
            errors = [2 * r["cosine_error"] for r in mine]
            axis.errorbar([r["fraction"] for r in mine], [r["cosine"] for r in mine], errors, marker="o", capsize=3,
                          label=f"minibatches of {batch}")  # fmt: skip
        axis.set(xscale="log", xlabel="part of the minibatch", ylabel="cosine with the exact one", ylim=(-0.1, 1.05))
        axis.set_xticks([1.0, *FRACTIONS], ["1", "1/2", "1/4", "1/8"])
        axis.minorticks_off()
        axis.set_title(f"T = {num_steps}")
        axis.legend(frameon=False, fontsize=8)
    plot.save(figure, path)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=64)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parsed = parser.parse_args(arguments)
    parsed.out.mkdir(parents=True, exist_ok=True)
    print(f"{'T':>4} {'b':>4} {'f':>6} {'cosine':>16} {'variance':>10} {'arithmetic':>11} {'exact':>7}")
    rows = []
    for num_steps in STEPS:
        for batch in BATCHES:
            for row in measure(num_steps, batch, parsed.draws):
                rows.append(row)
                print(
                    f"{num_steps:4} {batch:4} {row['fraction']:6} {row['cosine']:7.3f} ± {row['cosine_error']:.3f} "
                    f"{row['relative_variance']:12.3g} {row['arithmetic']:11.2f} {row['arithmetic_exact']:7.2f}",
                    flush=True,
                )
    (parsed.out / "fraction.json").write_text(json.dumps({"draws": parsed.draws, "rows": rows}, indent=1) + "\n")
    draw_picture(rows, parsed.out / "fraction.png")


if __name__ == "__main__":
    main()
