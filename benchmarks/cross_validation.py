"""What a penalty per feature, tuned by 5-fold cross-validation, gains on new rows, and how far it overfits.

Ridge regression with 100 rows and ten features on 100 data sets, of which three features or all of them matter. From
the best single penalty of a grid, `tune` goes on with one for each feature. Means over the data sets, and paired
differences to the single penalty with standard errors.

    python benchmarks/cross_validation.py [--out DIR]
"""

import argparse
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxhpo

N, D, K, SETS = 100, 10, 5, 100
GRID = jnp.logspace(-2, 3, 26)
STEPS = (0, 10, 100)  # outer ones


def data_set(key, matter):
    """100 rows to tune and train on, 1000 new ones, and the masks of the rows that each fold holds out."""
    rows, noise, folds = jax.random.split(key, 3)
    x = jax.random.normal(rows, (N + 1000, D))
    y = x[:, :matter].sum(1) + 2 * jax.random.normal(noise, (N + 1000,))
    held_out = jax.nn.one_hot(jax.random.permutation(folds, N) % K, K, axis=0)
    return {"x": x[:N], "y": y[:N], "new_x": x[N:], "new_y": y[N:], "held_out": held_out}


def ridge(penalty, data, weight):
    """The weights that minimise Σ weight (x w − y)² + Σ penalty w²."""
    x, y = data["x"], data["y"]
    return jnp.linalg.solve(x.T @ (weight[:, None] * x) + jnp.diag(penalty), x.T @ (weight * y))


def cross_validation(penalty, data):
    """Mean square over the rows, each predicted by the fold that holds it out."""
    errors = lambda mask: mask @ (data["x"] @ ridge(penalty, data, 1 - mask) - data["y"]) ** 2  # noqa: E731
    return jax.vmap(errors)(data["held_out"]).sum() / N


def on_new_rows(penalty, data):
    """Mean square over new rows, after training on all 100."""
    return jnp.mean((data["new_x"] @ ridge(penalty, data, jnp.ones(N)) - data["new_y"]) ** 2)


def measure(matter):
    """A row for each number of outer steps."""
    data = jax.vmap(functools.partial(data_set, matter=matter))(jax.random.split(jax.random.key(0), SETS))
    grid = jax.vmap(lambda d: jax.vmap(lambda c: cross_validation(jnp.full(D, c), d))(GRID))(data)
    single = jnp.tile(GRID[grid.argmin(1)][:, None], (1, D))
    settings = {"population": SETS, "transforms": jaxhpo.positive, "record": "hparams", "progress": False}
    loss = lambda h, d, key: (cross_validation(h, d), d, None)  # noqa: E731
    result = jaxhpo.tune(loss, single, optax.adam(0.1), num_steps=max(STEPS) + 1, carry=data, **settings)
    base = jax.vmap(on_new_rows)(single, data)
    for steps in STEPS:
        penalty = jnp.asarray(result.history["hparams"][steps])
        value, new = (float(jax.vmap(f)(penalty, data).mean()) for f in (cross_validation, on_new_rows))
        gain = np.asarray(jax.vmap(on_new_rows)(penalty, data) - base)
        row = {"matter": matter, "steps": steps, "cross_validation": value, "new_rows": new}
        yield row | {"difference": float(gain.mean()), "error": float(gain.std(ddof=1) / SETS**0.5)}


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parsed = parser.parse_args(arguments)
    parsed.out.mkdir(parents=True, exist_ok=True)
    rows = [row for matter in (3, 10) for row in measure(matter)]
    for row in rows:
        print(
            f"{row['matter']:2} of {D} features matter, {row['steps']:3} steps: cross-validation "
            f"{row['cross_validation']:.2f}, new rows {row['new_rows']:.2f} "
            f"({row['difference']:+.3f} ± {row['error']:.3f})"
        )
    (parsed.out / "cross_validation.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
