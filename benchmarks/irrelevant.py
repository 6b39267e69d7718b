"""What hyperparameters that do not matter cost a grid, random search, and the gradient.

Ridge regression on 60 rows: one penalty for 30 features that matter, and one more for each of up to five features that
are a hundredth as large. Log penalties lie in a box of twelve, somewhere around where the best one may be; 64
trainings for each method:

    grid        64, 8, 4 or 2 values for each of 1, 2, 3 or 6 penalties, in the middle of equal parts of the box
    random      64 points
    gradient    21 steps of Adam from the middle of the box, each of which counts as three trainings; and 5 steps of it

Regret is the lowest validation loss found less the lowest known, in units of the noise: that of 300 more steps and of
everything else that was tried with these penalties. (Bergstra and Bengio, Random Search for Hyper-Parameter
Optimization, 2012)

    python benchmarks/irrelevant.py [--out DIR] [--quick] [--seeds 200]
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _arguments import parse

import jaxhpo
from jaxhpo import plot

ROWS, FEATURES, TRAININGS = 60, 30, 64
OTHERS = (0, 1, 2, 5)  # so that 64 is a power with that exponent, and one more
HALF = 6.0  # of the box
STEPS = {"gradient": TRAININGS // 3, "gradient, a quarter": TRAININGS // 12}


def draw(key, others):
    """Rows to train and to validate on, and the middle of the box."""
    rows, weights, noise, middle = jax.random.split(key, 4)
    x = jax.random.normal(rows, (3 * ROWS, FEATURES + max(OTHERS)))[:, : FEATURES + others]
    x = x.at[:, FEATURES:].multiply(0.01)
    w = 0.3 * jax.random.normal(weights, (FEATURES + max(OTHERS),))[: FEATURES + others]
    y = x @ w + jax.random.normal(noise, (3 * ROWS,))
    return (x[:ROWS], y[:ROWS]), (x[ROWS:], y[ROWS:]), jax.random.uniform(middle, minval=1.0, maxval=5.0)


def validation_loss(h, data):
    """Of penalties exp(middle + h): h is zero in the middle of the box."""
    (x, y), (new_x, new_y), middle = data
    penalties = jnp.exp(middle + jnp.concatenate([jnp.full(FEATURES, h[0]), h[1:]]))
    w = jnp.linalg.solve(x.T @ x + jnp.diag(penalties), x.T @ y)
    return jnp.mean((new_x @ w - new_y) ** 2)


def by_gradient(data, seeds, others, num_steps, rate):
    """The losses of each step, of shape (seeds, num_steps)."""
    found = jaxhpo.tune(
        lambda h, data, key: (validation_loss(h, data), data, None),
        jnp.zeros((seeds, 1 + others)),
        optax.adam(rate),
        num_steps=num_steps,
        population=seeds,
        carry=data,
        projections=lambda h: jnp.clip(h, -HALF, HALF),
        progress=False,
    )
    return found.history["value"].T


def measure(others, seeds):
    """Regrets by method, of shape (seeds,), and how far each hyperparameter moves the loss."""
    keys = jax.random.split(jax.random.key(0), seeds)
    data = jax.vmap(lambda key: draw(key, others))(keys)
    losses = jax.jit(jax.vmap(jax.vmap(validation_loss, (0, None)), (0, 0)))
    resolution = round(TRAININGS ** (1 / (1 + others)))
    axis = HALF * (2 * (np.arange(resolution) + 0.5) / resolution - 1)
    points = np.stack(np.meshgrid(*[axis] * (1 + others)), -1).reshape(-1, 1 + others)
    drawn = np.random.default_rng(0).uniform(-HALF, HALF, (seeds, TRAININGS, 1 + others))
    descent = by_gradient(data, seeds, others, max(STEPS.values()), 0.5)
    lowest = {
        "grid": losses(jnp.tile(points, (seeds, 1, 1)), data).min(1),
        "random": losses(drawn, data).min(1),
        **{method: descent[:, :steps].min(1) for method, steps in STEPS.items()},
    }
    known = np.min([*lowest.values(), by_gradient(data, seeds, others, 300, 0.1).min(1)], 0)
    line = np.linspace(-HALF, HALF, 25)[:, None]
    moved = [np.ptp(losses(np.tile(line * np.eye(1 + others)[i], (seeds, 1, 1)), data), 1) for i in range(1 + others)]
    return {method: np.asarray(values) - known for method, values in lowest.items()}, np.mean(moved, 1)


def summary(regrets, seeds):
    """Mean regrets with their standard errors."""
    return {
        method: {
            "mean": float(values.mean()),
            "error": float(values.std(ddof=1) / seeds**0.5) if seeds > 1 else None,
        }
        for method, values in regrets.items()
    }


COLORS = {"grid": plot.VERMILION, "random": "0.5", "gradient": plot.BLUE, "gradient, a quarter": plot.BLUE}


def picture(rows, path):
    figure, axes = plot.figure(1, 1, width=7.2, height=3.8)
    axis, others = axes[0, 0], [row["others"] for row in rows]
    for method, color in COLORS.items():
        mean, error = (np.array([row["regret"][method][key] or 0 for row in rows]) for key in ("mean", "error"))
        label = f"{method}\n{STEPS[method]} steps" if method in STEPS else f"{method}\n{TRAININGS} points"
        style = {"ls": "--" if "quarter" in method else "-", "marker": "o", "lw": 2}
        plot.band(axis, others, mean, error, label=label, color=color, **style)
        axis.annotate(label, (others[-1], mean[-1]), (9, 0), **plot.BESIDE | {"fontsize": 9, "color": color})
    axis.set(yscale="log", xlabel="hyperparameters that do not matter", ylabel="regret, of the noise's variance")
    axis.set_xlim(-0.2, 1.3 * others[-1] + 0.1)
    axis.set_xticks(others)
    grid = [row["regret"]["grid"]["mean"] / row["regret"]["random"]["mean"] for row in (rows[0], rows[-1])]
    title = "What does not matter costs a grid most: {:.1g} → {:.2g} times random search's regret"
    figure.suptitle(title.format(*grid), fontsize=11)
    plot.save(figure, path)


def main(arguments=None) -> None:
    given = parse(__doc__, arguments, seeds=200, quick=4)
    jax.config.update("jax_enable_x64", True)
    rows = []
    for others in OTHERS[: 2 if given.quick else None]:
        regrets, moved = measure(others, given.seeds)
        rows.append({"others": others, "regret": summary(regrets, given.seeds), "moves the loss by": moved.tolist()})
        print(json.dumps(rows[-1]))
    (given.out / "irrelevant.json").write_text(json.dumps({"seeds": given.seeds, "rows": rows}, indent=1) + "\n")
    picture(rows, given.out / "irrelevant.png")


if __name__ == "__main__":
    main()
