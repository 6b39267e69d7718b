"""Does HOAG find the best penalty of logistic regression with fewer gradients than a grid search?

Two data sets that come with scikit-learn, cut into thirds (train, validation, test), standardised by the training
part; one log penalty h for all weights but the bias, starting at h = 0. HOAG makes 30 updates with `hoag_step`. The
grid has 20 points on h in [-10, 4], each trained to HOAG's last tolerance (quadratic schedule), from zero (cold), or in
falling h from the last point's solution (warm). Both train with the same optimiser. The reference optimum is that
of a 200-point grid trained by Newton's method to rounding, and a method's result is judged by its exact validation
loss. Nothing is chosen on the test part.

Counted in gradients of the train loss: an inner step is two (one to step, one to test for the end), a Hessian product
and the mixed product are three each, the validation loss or its gradient is one. For this linear model a Hessian
product takes no more operations than one gradient; the column "at 1" counts it so.

    python benchmarks/hoag.py [--out DIR] [--seeds N]
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxhpo
from jaxhpo import plot

SCHEDULES = ("quadratic", "cubic", "exponential", "exact")
LOW, HIGH = -10.0, 4.0
UPDATES = 30
MOST = 5000  # inner steps
PRODUCT = 3  # gradients a Hessian product counts for


class Task(NamedTuple):
    """Arrays with a leading axis of splits: inputs with a column of ones, targets ±1."""

    train: tuple[Any, Any]
    validation: tuple[Any, Any]
    test: tuple[Any, Any]


def make_task(name: str, seeds: int) -> Task:
    from sklearn.datasets import load_breast_cancer, load_digits

    inputs, classes = (load_digits if name == "digits" else load_breast_cancer)(return_X_y=True)
    targets = np.where(classes % 2 == 1, 1.0, -1.0)  # odd or even; benign or malignant
    third = len(targets) // 3

    def split(seed):
        order = np.random.default_rng(seed).permutation(len(targets))
        train, validation, test = order[:third], order[third : 2 * third], order[2 * third : 3 * third]
        mean, spread = inputs[train].mean(0), inputs[train].std(0)
        scaled = (inputs - mean) / np.where(spread > 0, spread, 1.0)
        scaled = np.concatenate([scaled, np.ones((len(scaled), 1))], axis=1)
        return tuple((scaled[part], targets[part]) for part in (train, validation, test))

    return Task(*jax.tree.map(lambda *x: np.stack(x), *map(split, range(seeds))))


# --- what is minimised, and how --------------------------------------------------------------------------------------


def mean_loss(w, data):
    inputs, targets = data
    return jnp.mean(jax.nn.softplus(-targets * (inputs @ w)))


def train_loss(w, h, data):
    return mean_loss(w, data) + 0.5 * jnp.exp(h) * jnp.sum(w[:-1] ** 2)


def validation_loss(solution, h, data):
    return mean_loss(solution.params, data)


def make_solver(optimiser: str, train) -> jaxhpo.Solver:
    if optimiser == "L-BFGS":
        return jaxhpo.from_optax(train_loss, optax.lbfgs(1.0, linesearch=None))
    # 1 over a bound of the curvature. A momentum of 0.95 serves the grid better than 0.9, which serves HOAG better.
    curvature = jnp.linalg.norm(train[0], 2) ** 2 / (4 * len(train[1]))
    return jaxhpo.from_optax(
        train_loss, lambda h: optax.sgd(1 / (curvature + jnp.exp(h)), momentum=0.95, nesterov=True)
    )


class Trace(NamedTuple):
    """One row per update of HOAG, or per point of the grid."""

    hparams: Any
    value: Any  # as the method sees it
    num_steps: Any
    products: Any
    gradients: Any  # all that this row cost
    tolerance: Any


@functools.partial(jax.jit, static_argnames=("optimiser", "schedule"))
def run_hoag(tasks: Task, optimiser: str, schedule: str) -> Trace:
    """Run HOAG on each split in sequence."""
    return jax.lax.map(lambda task: _run_hoag(task, optimiser, schedule), tasks)


def _run_hoag(task, optimiser, schedule):
    solver = make_solver(optimiser, task.train)
    pair = jaxhpo.hypergradient(jaxhpo.HOAG(schedule), solver, validation_loss, num_steps=MOST)
    tx = jaxhpo.hoag_step(schedule)

    def update(carry, k):
        h, state, step = carry
        grad, state, info = pair.update(h, state, lambda t: task.train, task.validation)
        updates, step = tx.update(grad, step, h, value=info.value)
        # From its start conjugate gradients take one product more; the mixed product counts as one.
        products = info.linear.num_iterations + 2
        gradients = 2 * info.solution.num_steps + 1 + PRODUCT * products + 1 + (k == 0)
        row = Trace(h, info.value, info.solution.num_steps, products, gradients, info.tolerance)
        return (optax.apply_updates(h, updates), state, step), row

    h = jnp.zeros(())
    start = (h, pair.init(jnp.zeros(task.train[0].shape[1]), h), tx.init(h))
    (h, _, _), trace = jax.lax.scan(update, start, jnp.arange(UPDATES))
    return trace._replace(hparams=jnp.append(trace.hparams, h))


@functools.partial(jax.jit, static_argnames=("optimiser", "warm"))
def run_grid(tasks: Task, optimiser: str, tolerance, warm: bool) -> Trace:
    """Run 20 trainings on each split in sequence, from the largest penalty to the smallest."""
    return jax.lax.map(lambda task: _run_grid(task, optimiser, tolerance, warm), tasks)


def _run_grid(task, optimiser, tolerance, warm):
    solver = make_solver(optimiser, task.train)
    zeros = jnp.zeros(task.train[0].shape[1])
    scale = jnp.linalg.norm(jax.grad(train_loss)(zeros, 0.0, task.train))

    def train(state, h):
        start = state if warm else solver.init(zeros, h)
        solution = jaxhpo.solve(
            solver,
            start,
            h,
            lambda t: task.train,
            num_steps=MOST,
            tol=tolerance * scale,
            adjoint=jaxhpo.Implicit(),
        )
        steps = solution.info.num_steps
        return solution.state, Trace(h, mean_loss(solution.params, task.validation), steps, 0, 2 * steps + 2, tolerance)

    grid = jnp.linspace(HIGH, LOW, 20)
    return jax.lax.scan(train, solver.init(zeros, grid[0]), grid)[1]


# --- the exact loss, by Newton's method in NumPy ----------------------------------------------------------------------


class Exact:
    """Validation and test loss of the exact solution, for one split."""

    def __init__(self, train, validation, test):
        self.train, self.parts = train, {"validation": validation, "test": test}
        self.grid, self.known = np.linspace(HIGH, LOW, 200), []
        w = np.zeros(train[0].shape[1])
        for h in self.grid:
            w = self._solve(h, w)
            self.known.append(w)

    def _solve(self, h, w):
        inputs, targets = self.train
        penalty = np.full(len(w), np.exp(h))
        penalty[-1] = 0.0
        for _ in range(100):
            p = 1 / (1 + np.exp(targets * (inputs @ w)))
            gradient = -inputs.T @ (targets * p) / len(targets) + penalty * w
            if np.linalg.norm(gradient) <= 1e-12:
                return w
            hessian = inputs.T @ (inputs * (p * (1 - p))[:, None]) / len(targets) + np.diag(penalty)
            w = w - np.linalg.solve(hessian, gradient)
        raise RuntimeError(f"Newton's method did not converge at h = {h}")

    def __call__(self, h, part: str = "validation") -> float:
        inputs, targets = self.parts[part]
        w = self._solve(h, self.known[int(np.argmin(np.abs(self.grid - h)))])
        return float(np.mean(np.logaddexp(0, -targets * (inputs @ w))))

    def on_grid(self) -> float:
        """Return the lowest of the 200 points."""
        return min(map(self, self.grid))

    def lowest(self) -> float:
        """Return the minimum between the neighbours of the best point."""
        best = self.grid[int(np.argmin([self(h) for h in self.grid]))]
        return min(map(self, np.linspace(best - 0.07, best + 0.07, 101)))


# --- the comparison --------------------------------------------------------------------------------------------------


def compare(name: str, optimiser: str, seeds: int, schedules: tuple[str, ...] = SCHEDULES) -> dict[str, Any]:
    """Measure one data set with one optimiser; lists have one entry per split."""
    task = make_task(name, seeds)
    exact = [Exact(*jax.tree.map(lambda x, i=i: x[i], tuple(task))) for i in range(seeds)]
    on_grid = np.array([e.on_grid() for e in exact])
    lowest = np.minimum(on_grid, [e.lowest() for e in exact])
    report: dict[str, Any] = {"data": name, "optimiser": optimiser, "grid_200": on_grid, "methods": {}}
    tolerance = None
    for schedule in schedules:
        trace = jax.tree.map(np.asarray, run_hoag(task, optimiser, schedule))
        tolerance = trace.tolerance[0, -1] if schedule == "quadratic" else tolerance
        values = np.array([[e(h) for h in row] for e, row in zip(exact, trace.hparams, strict=True)])
        tests = [e(row[-1], "test") for e, row in zip(exact, trace.hparams, strict=True)]
        report["methods"][f"HOAG, {schedule}"] = _row(trace, values[:, -1], values[:, 1:], tests, on_grid, lowest)
    for warm in (False, True):
        trace = jax.tree.map(np.asarray, run_grid(task, optimiser, tolerance, warm))
        picks = trace.value.argmin(1)
        chosen = trace.hparams[np.arange(seeds), picks]
        # What the search would return after each of its points, judged exactly too.
        so_far = np.array([[np.argmin(row[: k + 1]) for k in range(len(row))] for row in trace.value])
        values = np.array([[e(trace.hparams[i, k]) for k in so_far[i]] for i, e in enumerate(exact)])
        tests = [e(h, "test") for e, h in zip(exact, chosen, strict=True)]
        label = f"grid of 20, {'warm' if warm else 'cold'}"
        report["methods"][label] = _row(trace, values[:, -1], values, tests, on_grid, lowest)
    return report


def _row(trace, final, values, tests, on_grid, lowest):
    late = np.cumsum((values / on_grid[:, None] - 1 > 1e-3)[:, ::-1], 1)[:, ::-1] > 0  # some later gap is above 1e-3
    spent = np.cumsum(trace.gradients, 1)
    reached = [row[k.sum()] if not k[-1] else np.inf for row, k in zip(spent, late, strict=True)]
    return {
        "gap": final / on_grid - 1,
        "gradients": spent[:, -1],
        "gradients_at_1": spent[:, -1] - (PRODUCT - 1) * trace.products.sum(1),
        "gradients_to_1e-3": np.array(reached),
        "inner_steps": trace.num_steps.sum(1),
        "products": trace.products.sum(1),
        "test": np.array(tests),
        "spent": spent,
        "suboptimality": values / lowest[:, None] - 1,
    }


def mean_and_error(x, form: str = ".0f") -> str:
    return f"{np.mean(x):{form}} ± {np.std(x, ddof=1) / len(x) ** 0.5:{form}}"


def table(reports) -> str:
    lines = []
    for report in reports:
        seeds = len(report["grid_200"])
        lines.append(f"\n{report['data']}, {report['optimiser']}: mean ± standard error over {seeds} splits")
        heads = ("gap to 200 points", "largest", "gradients", "at 1", "share of warm grid", "to 1e-3 for good")
        lines.append(" " * 20 + "".join(f"{head:>21}" for head in (*heads, "inner steps", "products", "test loss")))
        warm = report["methods"]["grid of 20, warm"]["gradients"]
        for label, row in report["methods"].items():
            to = row["gradients_to_1e-3"][np.isfinite(row["gradients_to_1e-3"])]
            cells = (
                mean_and_error(row["gap"], ".1e"),
                f"{row['gap'].max():.1e}",
                mean_and_error(row["gradients"]),
                mean_and_error(row["gradients_at_1"]),
                mean_and_error(row["gradients"] / warm, ".2f"),
                f"{to.mean():.0f} ({len(to)} of {seeds})" if len(to) else "never",
                mean_and_error(row["inner_steps"]),
                mean_and_error(row["products"]),
                mean_and_error(row["test"], ".4f"),
            )
            lines.append(f"{label:20}" + "".join(f"{cell:>21}" for cell in cells))
    return "\n".join(lines)


def draw(reports, path) -> None:
    """Draw median and quartiles over the splits of each method's best loss against the number of gradients."""
    figure, axes = plot.figure(2, 2, width=12, height=9)
    colors = {"quadratic": "C0", "cubic": "C1", "exponential": "C2", "exact": "C3", "cold": "0.6", "warm": "0.2"}
    for axis, report in zip(axes.flat, reports, strict=True):
        for label, row in report["methods"].items():
            x = np.geomspace(20, 5e4, 400)
            # A method that has returned nothing yet has no suboptimality; one that has ended keeps its last.
            seen = [np.searchsorted(spent, x, side="right") - 1 for spent in row["spent"]]
            y = np.array([np.where(k >= 0, s[k], np.nan) for k, s in zip(seen, row["suboptimality"], strict=True)])
            last = x <= np.median(row["spent"][:, -1])
            shown = last & ~np.isnan(y).any(0)
            low, middle, high = np.quantile(np.maximum(y[:, shown], 1e-7), [0.25, 0.5, 0.75], axis=0)
            color = colors[label.split()[-1]]
            axis.plot(x[shown], middle, color=color, label=label, drawstyle="steps-post")
            axis.fill_between(x[shown], low, high, color=color, alpha=0.15, linewidth=0, step="post")
        axis.axhline(1e-3, color="0.4", lw=0.8, ls=":")
        axis.set(
            xscale="log", yscale="log", ylim=(1e-7, 20), xlabel="gradients of the train loss (a product counts as 3)"
        )
        axis.set_ylabel("relative suboptimality of the exact validation loss")
        axis.set_title(f"{report['data']}, trained with {report['optimiser']}")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle("One penalty of logistic regression: median and quartiles over splits; dotted: 1e-3")
    plot.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parser.add_argument("--seeds", type=int, default=10)
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    cases = [(data, optimiser) for optimiser in ("Nesterov", "L-BFGS") for data in ("cancer", "digits")]
    reports = [compare(*case, args.seeds) for case in cases]
    print(table(reports))
    args.out.mkdir(parents=True, exist_ok=True)
    draw(reports, args.out / "hoag.png")
    settings = {"seeds": args.seeds, "updates": UPDATES, "grid": [LOW, HIGH, 20], "gradients_a_product": PRODUCT}
    for report in reports:
        for row in report["methods"].values():
            del row["spent"], row["suboptimality"]  # in the picture
    text = json.dumps({"settings": settings, "results": reports}, indent=1, default=_plain)
    (args.out / "hoag.json").write_text(text + "\n")


def _plain(x):
    return [float(f"{v:.6g}") if np.isfinite(v) else None for v in x]


if __name__ == "__main__":
    main()
