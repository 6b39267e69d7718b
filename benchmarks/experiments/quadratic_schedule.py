"""A learning rate for every step by exact hypergradients, beside a thousand draws from each family of schedules.

Linear regression by SGD, d = 500, inputs x ~ N(0, H) whose covariance has the eigenvalues k^-1.5, labels x·w* + ε with
ε ~ N(0, s²), batches of 16 new examples, T = 500 steps η_t, start at a distance of one from w* along every eigenvector;
compared by the expected excess loss ½ E (w_T − w*)ᵀ H (w_T − w*), at s² = .01 and s² = 1. It is the kind of workload of
arXiv:2603.10301, which searches for near-optimal schedules with very many trainings; theirs may differ in these
constants.

No SGD is run, since the loss has an exact recursion. With e = w − w* and the gradient G of a batch of B examples

    e ← e − η G,    E[G | e] = He,    E[GGᵀ | e] = (1/B) E[x xᵀ e eᵀ x xᵀ] + (1 − 1/B) He eᵀH + (s²/B) H,

and E[x xᵀ M x xᵀ] = 2HMH + tr(HM) H for Gaussian x, so that C = E[e eᵀ] obeys

    C ← C − η (HC + CH) + η² [(1 + 1/B) HCH + (tr(HC) + s²)/B · H].

In H's eigenbasis the diagonal c of C goes by itself, and is the loss's all: the inner problem is `fixed_point` of

    c_k ← (1 − ηλ_k)² c_k + η²/B · (λ_k² c_k + λ_k (Σ_j λ_j c_j + s²)),    loss ½ Σ_k λ_k c_k.

    families       constant; two steps down; linear, cosine and power decay, each after a warm-up; warm-up, stable and
                   decay; one cycle: 1000 random draws each (`families` has the ranges)
    hypergradient  seven constant rates, then L-BFGS (SciPy) from the best on the 500 log rates, by `Unroll`: 70
                   trainings in all, a hypergradient counted as its arithmetic over that of a training

The number of evaluations is what the budget allows; nothing else was chosen. Errors are over the seeds of the draws.

    python benchmarks/experiments/quadratic_schedule.py [--out DIR] [--quick] [--seeds 5] [--run-dir DIR]
"""

import _experiment
import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

import jaxhpo
from jaxhpo import plot
from jaxhpo._core.cost import count_arithmetic

DIM, STEPS, BATCH, BUDGET = 500, 500, 16, 70
NOISES = (0.01, 1.0)
CONSTANTS = tuple(np.geomspace(0.03, 1.5, 7))
FURTHER = 200  # evaluations by which L-BFGS goes on, beyond the budget


def eigenvalues(dim=DIM):
    return jnp.arange(1, dim + 1.0) ** -1.5


def make_loss(noise, values, batch=BATCH):
    """The expected excess loss of log rates, one a step."""

    def step(c, log_rates, t):
        rate = jnp.exp(log_rates[t])
        spread = values**2 * c + values * (values @ c + noise)  # B times the covariance of a batch's gradient
        return (1 - rate * values) ** 2 * c + rate**2 / batch * spread

    solver = jaxhpo.fixed_point(step)

    def loss(log_rates):
        start = solver.init(jnp.ones_like(values), log_rates)
        steps = jnp.arange(len(log_rates))
        return 0.5 * values @ jaxhpo.solve(solver, start, log_rates, steps, adjoint=jaxhpo.Unroll()).params

    return loss


def families(draws: int, num_steps: int, rng) -> dict[str, np.ndarray]:
    """Random schedules of each family: rates of shape (draws, num_steps)."""
    u = np.arange(num_steps)[None] / num_steps
    uniform = lambda low, high: rng.uniform(low, high, (draws, 1))  # noqa: E731
    log_uniform = lambda low, high: np.exp(uniform(np.log(low), np.log(high)))  # noqa: E731
    peak = lambda: log_uniform(0.02, 2)  # noqa: E731

    def after(warm_up, decay):  # a linear warm-up, and a function of what share of the rest is done
        ramp = np.minimum(1.0, (u + 1 / num_steps) / np.maximum(warm_up, 1e-9))
        return peak() * ramp * decay(np.clip((u - warm_up) / (1 - warm_up), 0, 1))

    def cosine(share, end):
        return end + (1 - end) * (1 + np.cos(np.pi * share)) / 2

    first, end = np.sort(rng.uniform(0.1, 1, (draws, 2, 1)), 1), log_uniform(1e-3, 1)
    drops, stable, top, low = log_uniform(0.02, 0.9), uniform(0.1, 1), uniform(0.05, 0.6), log_uniform(1e-2, 1)
    exponent, scale = uniform(0.2, 2), log_uniform(1e-3, 1)
    return {
        "constant": peak() * np.ones_like(u),
        "step": peak() * drops ** ((u >= first[:, 0]).astype(int) + (u >= first[:, 1])),
        "linear": after(uniform(0, 0.3), lambda share: 1 - (1 - end) * share),
        "cosine": after(uniform(0, 0.3), lambda share: cosine(share, end)),
        "power": after(uniform(0, 0.3), lambda share: (1 + share / scale) ** -exponent),
        "warm-up, stable, decay": after(
            uniform(0, 0.1), lambda share: 1 - (1 - end) * np.clip((share - stable) / (1 - stable), 0, 1)
        ),
        "one cycle": peak() * np.where(u < top, cosine(1 - u / top, low), cosine((u - top) / (1 - top), low * end)),
    }


def descend(loss, start, evaluations: int):
    """L-BFGS on the logarithm of the loss: its values, and the schedule of the lowest."""
    gradient, values, lowest = jax.jit(jax.value_and_grad(lambda h: jnp.log(loss(h)))), [], (np.inf, start)

    class Spent(Exception):
        pass

    def evaluate(h):
        nonlocal lowest
        if len(values) == evaluations:
            raise Spent
        value, slope = gradient(h)
        value = float(value) if np.isfinite(value) else 1e3  # SGD diverged
        values.append(np.exp(min(value, 700.0)))
        lowest = min(lowest, (value, h.copy()), key=lambda pair: pair[0])
        return value, np.nan_to_num(np.asarray(slope))

    try:
        scipy.optimize.minimize(evaluate, start, jac=True, method="L-BFGS-B", options={"maxcor": 30})
    except Spent:
        pass
    return np.array(values), np.exp(lowest[1])


def by_hypergradient(loss, budget: int, num_steps: int) -> dict:
    log_rates = jnp.zeros(num_steps)
    training, gradient = (count_arithmetic(f, log_rates) for f in (loss, jax.value_and_grad(loss)))
    cost = gradient / training
    flat = np.array([float(loss(jnp.full(num_steps, np.log(rate)))) for rate in CONSTANTS])
    best = CONSTANTS[np.nanargmin(np.where(np.isfinite(flat), flat, np.nan))]
    evaluations = int((budget - len(CONSTANTS)) / cost)
    start = np.full(num_steps, np.log(best))
    values, rates = descend(loss, start, evaluations)
    further, far = descend(loss, start, FURTHER)
    spent = [*range(1, len(flat) + 1), *(len(flat) + cost * (1 + np.arange(evaluations)))]
    return {
        "trainings a hypergradient": cost,
        "trainings": len(CONSTANTS) + cost * evaluations,
        "spent": [float(x) for x in spent],
        "found": np.fmin.accumulate([*flat, *values]).tolist(),
        "loss": float(min(np.nanmin(flat), values.min())),
        f"loss after {FURTHER} hypergradients": float(further.min()),
        "rates": rates.tolist(),
        "rates in the end": far.tolist(),
    }


def by_families(losses, draws: int, num_steps: int, seed: int) -> dict:
    """The lowest loss of each family, its schedule, and the lowest of all draws in random order."""
    rng = np.random.default_rng(seed)
    drawn, found, everything = families(draws, num_steps, rng), {}, []
    for name, rates in drawn.items():
        values = np.asarray(losses(jnp.log(rates)))
        values = np.where(np.isfinite(values), values, np.inf)
        found[name] = {"loss": float(values.min()), "rates": rates[values.argmin()].tolist()}
        everything.append(values)
    order = rng.permutation(np.concatenate(everything))
    at = np.unique([BUDGET, *np.geomspace(10, len(order), 40).astype(int)])
    lowest = np.minimum.accumulate(order)[at - 1]
    return {"families": found, "draws": at.tolist(), "lowest": lowest.tolist()}


def table(report) -> str:
    lines = [f"{'expected excess loss':34}" + "".join(f"{f's² = {noise}':>22}" for noise in report)]
    for name in next(iter(report.values()))["best"]:
        lines.append(f"{name:34}" + "".join(f"{_experiment.text(r['best'][name], '.5f'):>22}" for r in report.values()))
    found = [row["hypergradient"] for row in report.values()]
    lines.append(
        f"{'hypergradient, ' + format(found[0]['trainings'], '.1f') + ' trainings':34}"
        + "".join(f"{x['loss']:>22.5f}" for x in found)
    )
    name = f"loss after {FURTHER} hypergradients"
    lines.append(f"{f'the same, {FURTHER} hypergradients':34}" + "".join(f"{x[name]:>22.5f}" for x in found))
    return "\n".join(lines)


def title(report) -> str:
    said = []
    for noise, row in report.items():
        family = min((k for k in row["best"] if "all" not in k), key=lambda name: row["best"][name]["mean"])
        ratio = row["hypergradient"]["loss"] / row["best"][family]["mean"]
        said.append(f"{100 * abs(ratio - 1):.0f} % {'below' if ratio < 1 else 'above'} (label noise {noise})")
    return (
        f"{BUDGET} trainings by hypergradient end {' and '.join(said)}\n"
        f"the best of seven families with {report[noise]['draws']} draws each"
    )


def picture(report, path):
    figure, axes = plot.figure(len(report), 2, width=11, height=0.6 + 3.1 * len(report))
    for (left, right), (noise, row) in zip(axes, report.items(), strict=True):
        own, shown = row["hypergradient"], row["shown"]
        left.plot(own["rates"], color=plot.BLUE, lw=1, label="hypergradient, a rate per step")
        for (name, rates), color in zip(shown.items(), (plot.VERMILION, plot.GREEN, plot.ORANGE), strict=False):
            left.plot(rates, color=color, lw=1.6, label=f"best: {name}")
        left.set(ylabel=f"label noise {noise}\n\nlearning rate", xlabel="step", yscale="log", ylim=(3e-3, 12))
        left.legend(**plot.LEGEND, loc="lower left")
        right.plot(own["spent"], own["found"], color=plot.BLUE, lw=2, label="hypergradient")
        plot.band(
            right,
            row["at"],
            row["lowest"]["mean"],
            row["lowest"]["error"],
            label="random draws of all families",
            color="0.4",
            lw=2,
        )
        right.set(xscale="log", yscale="log", xlabel="trainings", ylabel="lowest expected loss")
        plot.plain_log_ticks(right.yaxis)
        right.legend(**plot.LEGEND)
    figure.suptitle(title(report), fontsize=11)
    plot.save(figure, path)


def main(arguments=None) -> None:
    given = _experiment.parse(__file__, __doc__, arguments, seeds=5, quick=1)
    jax.config.update("jax_enable_x64", True)
    draws, num_steps = (20, 100) if given.quick else (1000, STEPS)
    report = {}
    for noise in NOISES:
        loss = make_loss(noise, eigenvalues())
        losses = jax.jit(lambda log_rates, loss=loss: jax.lax.map(loss, log_rates, batch_size=20))
        rows = _experiment.each_seed(
            given, lambda seed, _, f=losses: by_families(f, draws, num_steps, seed), f"label noise {noise}"
        )
        names = list(rows[0]["families"])
        best = {name: _experiment.mean([row["families"][name]["loss"] for row in rows]) for name in names}
        best[f"all {len(names) * draws} draws"] = _experiment.mean([row["lowest"][-1] for row in rows])
        at = np.array([row["lowest"] for row in rows])
        fewest = rows[0]["draws"].index(BUDGET)
        best[f"{BUDGET} draws of all"] = _experiment.mean(at[:, fewest])
        ranked = sorted(names, key=lambda name, best=best: best[name]["mean"])[:3]
        report[noise] = {
            "draws": draws,
            "best": best,
            "hypergradient": by_hypergradient(loss, BUDGET, num_steps),
            "at": rows[0]["draws"],
            "lowest": {"mean": at.mean(0).tolist(), "error": _experiment.standard_errors(at).tolist()},
            "shown": {
                name: min((row["families"][name] for row in rows), key=lambda x: x["loss"])["rates"] for name in ranked
            },
        }
    print(table(report))
    _experiment.write(given, {"label noise": report})
    picture(report, given.out / "quadratic_schedule.png")


if __name__ == "__main__":
    main()
