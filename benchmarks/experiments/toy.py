"""How much noise a bilevel search survives, by every rule, on a problem whose hypergradient is known in closed form.

Inner loss ‖a − h‖², T = 100 steps from a₀; outer loss ‖a_T(h) − c‖², 100 steps of Adam, each with a training from a₀.
A run has converged when its outer loss is below .02, and stays while it remains there. Two settings,

    scalar    a₀ = .53, h₀ = .5, c = .8; outer rate .005
    vector    16 entries of a₀, h₀ and c uniform on [0, 1), new for each run; outer rate .02

two inner optimisers of rate η = .01, gradient descent and Adam; and two places for noise of standard deviation σ: the
inner loss is multiplied by ξ_t ~ N(1, σ²) at each inner step, the hypergradient by N(1, σ²), entry by entry, at each
outer step. All runs of a setting are one `vmap`. With gradient descent

    a_T = h + (a₀ − h) ∏_t (1 − 2ηξ_t),    dV/dh = (1 − ∏_t (1 − 2ηξ_t)) · 2 (a_T − c),

without noise 1 − ρ with ρ = (1 − 2η)^T. Each rule has such a factor of its own, which the first table compares with
what it returns: truncated after K steps the product of the last K alone; Neumann's series of K terms
1 − (1 − 2ηξ_T)^K, since it sees the last step's loss; the identity (T1-T2) 2ηξ_T; implicit 1. The study is that of the
thesis behind the software kbc-meta (hyperparameters of neural link predictors by their gradient), with its inner and
outer settings; its noise levels are not recorded.

    python benchmarks/experiments/toy.py [--out DIR] [--quick] [--seeds 200] [--run-dir DIR]

`--seeds` are the runs of each cell.
"""

import functools
import itertools
import sys
from typing import NamedTuple

import _experiment
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxhpo
from jaxhpo import plot

RATE, INNER, OUTER, WITHIN = 0.01, 100, 100, 0.02
TRUNCATE, TERMS = 10, 20
SIGMAS = {"inner loss": (0.0, 2.0, 4.0, 8.0, 16.0, 32.0), "hypergradient": (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)}
OUTER_RATE = {"scalar": 0.005, "vector": 0.02}
OPTIMISERS = {"descent": optax.sgd(RATE), "Adam": optax.adam(RATE, eps_root=1e-8)}


class Toy(NamedTuple):
    start: jax.Array  # a₀
    first: jax.Array  # h₀
    target: jax.Array  # c


def draw(setting, key) -> Toy:
    if setting == "scalar":
        return Toy(*jnp.array([[0.53], [0.5], [0.8]]))
    return Toy(*jax.random.uniform(key, (3, 16)))


METHODS = {  # name -> method, and its factor for multipliers ξ_t of the inner loss (None: no closed form)
    "Unroll()": (jaxhpo.Unroll(), lambda xi: 1 - jnp.prod(1 - 2 * RATE * xi)),
    "Forward()": (jaxhpo.Forward(), lambda xi: 1 - jnp.prod(1 - 2 * RATE * xi)),
    f"Unroll(truncate={TRUNCATE})": (
        jaxhpo.Unroll(truncate=TRUNCATE),
        lambda xi: 1 - jnp.prod(1 - 2 * RATE * xi[-TRUNCATE:]),
    ),
    "Implicit()": (jaxhpo.Implicit(), lambda xi: 1.0),
    f"Implicit(Neumann({TERMS}, {RATE}))": (
        jaxhpo.Implicit(jaxhpo.Neumann(TERMS, RATE)),
        lambda xi: 1 - (1 - 2 * RATE * xi[-1]) ** TERMS,
    ),
    f"Implicit(Identity({RATE}))": (jaxhpo.Implicit(jaxhpo.Identity(RATE)), lambda xi: 2 * RATE * xi[-1]),
    f"FiniteDifference({RATE})": (jaxhpo.FiniteDifference(RATE), lambda xi: 2 * RATE * xi[-1]),
    "ForwardGradient(4)": (jaxhpo.ForwardGradient(4), None),
    "EvolutionStrategies(4, 0.1)": (jaxhpo.EvolutionStrategies(4, 0.1), None),
}
STUDIED = {"scalar": ["descent", "Adam"], "vector": ["descent", "Adam"]}  # inner optimisers
QUICK = ("Unroll()", "Forward()", "Implicit()")


def pair_of(method, optimiser):
    """`init` and `update` of a rule; the batch of an inner step is the number that multiplies its loss."""
    solver = jaxhpo.from_optax(lambda a, h, xi: xi * jnp.sum((a - h) ** 2), OPTIMISERS[optimiser])
    outer_loss = lambda solution, h, target: jnp.sum((solution.params - target) ** 2)  # noqa: E731
    return jaxhpo.hypergradient(method, solver, outer_loss, num_steps=INNER, warm_start=False)


def search(method, optimiser, outer_rate, toy, sigma_inner, sigma_outer, key, num_steps=OUTER):
    """The outer losses of one run, of shape (num_steps,)."""
    pair, adam = pair_of(method, optimiser), optax.adam(outer_rate)

    def step(carry, key):
        h, moments = carry
        inner_key, outer_key, own_key = jax.random.split(key, 3)
        xi = 1 + sigma_inner * jax.random.normal(inner_key, (INNER,))
        gradient, _, info = pair.update(h, pair.init(toy.start, h), xi, toy.target, own_key)
        gradient *= 1 + sigma_outer * jax.random.normal(outer_key, h.shape)
        update, moments = adam.update(gradient, moments)
        return (optax.apply_updates(h, update), moments), info.value

    return jax.lax.scan(step, (toy.first, adam.init(toy.first)), jax.random.split(key, num_steps))[1]


def outcome(losses) -> dict:
    """Of (runs, outer steps): who converged, when, and the share of the steps from then on that stay inside."""
    inside = np.asarray(losses) < WITHIN  # False of NaN
    reached, first = inside.any(1), inside.argmax(1)
    stay = [row[i:].mean() if row[i] else 0.0 for row, i in zip(inside, first, strict=True)]
    share = reached.mean()
    needed = np.sort(np.where(reached, first + 1, np.inf))[(len(first) - 1) // 2]  # by half of all runs
    return {
        "converged": {"mean": float(share), "error": float((share * (1 - share) / len(reached)) ** 0.5)},
        "stay": _experiment.mean(np.array(stay)[reached]) if share else None,
        "converge and stay": _experiment.mean(stay),
        "inner steps": int(needed * INNER) if np.isfinite(needed) else None,
    }


def factors(names, draws: int) -> list[dict]:
    """The measured factor of each rule, over problems of 16 entries, without noise and with σ = 4."""
    rows = []
    for name in names:
        method, closed = METHODS[name]
        pair = pair_of(method, "descent")

        def factor(key, sigma, pair=pair, closed=closed):
            keys = jax.random.split(key, 3)
            toy, xi = draw("vector", keys[0]), 1 + sigma * jax.random.normal(keys[1], (INNER,))
            gradient, _, _ = pair.update(toy.first, pair.init(toy.start, toy.first), xi, toy.target, keys[2])
            trained = toy.first + (toy.start - toy.first) * jnp.prod(1 - 2 * RATE * xi)
            direction = 2 * (trained - toy.target)
            error = jnp.nan if closed is None else jnp.max(jnp.abs(gradient / direction - closed(xi)))
            return gradient @ direction / (direction @ direction), error

        of_all = jax.jit(jax.vmap(factor, (0, None)))
        row = {"rule": name}
        for sigma in (0.0, 4.0):
            found, errors = of_all(jax.random.split(jax.random.key(0), draws), sigma)
            error = None if closed is None else float(errors.max())
            row[f"sigma {sigma:g}"] = {"factor": _experiment.mean(found), "largest difference to closed form": error}
        rows.append(row)
    return rows


def cells(given):
    """An outcome for each setting, optimiser, place of noise, σ and rule."""
    rows, runs = [], given.seeds
    for setting, optimisers in ({"vector": ["descent"]} if given.quick else STUDIED).items():
        keys = jax.random.split(jax.random.key(1), runs)
        toys = jax.vmap(lambda key, s=setting: draw(s, key))(jax.random.split(jax.random.key(2), runs))
        for optimiser, name in itertools.product(optimisers, QUICK if given.quick else METHODS):

            def cell(name=name, optimiser=optimiser, setting=setting, toys=toys, keys=keys):
                run = functools.partial(search, METHODS[name][0], optimiser, OUTER_RATE[setting])
                of_all, own = jax.jit(jax.vmap(jax.vmap(run, (0, None, None, 0)), (None, 0, 0, None))), []
                for place, levels in SIGMAS.items():
                    sigmas = np.array(levels[::2] if given.quick else levels)
                    noise = (sigmas, 0 * sigmas) if place == "inner loss" else (0 * sigmas, sigmas)
                    for sigma, losses in zip(sigmas, of_all(toys, *noise, keys), strict=True):
                        where = {"setting": setting, "optimiser": optimiser, "noise": place, "sigma": float(sigma)}
                        own.append({**where, "rule": name, **outcome(losses)})
                print(f"{setting}, inner {optimiser}: {name}", file=sys.stderr, flush=True)
                return own

            rows += _experiment.once(given, f"{runs} runs, {setting}, {optimiser}, {name}", cell)
    return rows


def chosen(rows, **wanted):
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def table(rows, measured) -> str:
    lines = [f"{'factor, measured':32} {'no noise':>10} {'σ = 4':>15}   largest difference to the closed form"]
    for row in measured:
        quiet, noisy = row["sigma 0"], row["sigma 4"]
        apart = [x["largest difference to closed form"] for x in (quiet, noisy)]
        said = "none known" if apart[0] is None else f"{apart[0]:.0e}, {apart[1]:.0e}"
        lines.append(
            f"{row['rule']:32} {quiet['factor']['mean']:10.4f} {_experiment.text(noisy['factor']):>15}   {said}"
        )
    for setting, optimiser, place in dict.fromkeys((r["setting"], r["optimiser"], r["noise"]) for r in rows):
        own = chosen(rows, setting=setting, optimiser=optimiser, noise=place)
        sigmas = list(dict.fromkeys(row["sigma"] for row in own))
        lines.append(f"\n{setting}, inner {optimiser}, noise on the {place}:")
        lines.append(
            "% of runs that converge / % of the steps from then on inside / inner steps until half have converged"
        )
        lines.append(f"{'σ':32}" + "".join(f"{sigma:>18g}" for sigma in sigmas))
        for rule in dict.fromkeys(row["rule"] for row in own):
            line = f"{rule:32}"
            for row in chosen(own, rule=rule):
                stay = "–" if row["stay"] is None else f"{100 * row['stay']['mean']:.0f}"
                line += f"{100 * row['converged']['mean']:6.0f} /{stay:>4} /{row['inner steps'] or '–':>5}"
            lines.append(line)
    return "\n".join(lines)


LINES = {  # rules drawn, and how; the others coincide with one of them
    "Unroll()": (plot.BLUE, "-"),
    f"Unroll(truncate={TRUNCATE})": (plot.SKY, "--"),
    "Implicit()": (plot.VERMILION, "-"),
    f"Implicit(Identity({RATE}))": (plot.ORANGE, "--"),
    "ForwardGradient(4)": (plot.PURPLE, "-."),
    "EvolutionStrategies(4, 0.1)": (plot.GREEN, ":"),
}

SAID = {"Unroll()": "unrolling", "Implicit()": "implicit", f"Implicit(Identity({RATE}))": "T1-T2's identity"}
SAID |= {"EvolutionStrategies(4, 0.1)": "evolution strategies"}


def title(rows) -> str:
    """What the pictures show, from the numbers of the vector setting, in the middle of the noise levels."""
    said = []
    for place in SIGMAS:
        own = chosen(rows, setting="vector", optimiser="descent", noise=place)
        sigmas = sorted({row["sigma"] for row in own if row["sigma"] > 0})
        sigma = sigmas[len(sigmas) // 2]
        share = {row["rule"]: row["converge and stay"]["mean"] for row in chosen(own, sigma=sigma)}
        shares = ", ".join(f"{100 * share[rule]:.0f} % by {name}" for rule, name in SAID.items() if rule in share)
        said.append(f"σ = {sigma:g} on the {place}: {shares}")
    return "Converged and inside, 16 numbers, inner gradient descent\n" + "\n".join(said)


def picture(rows, path):
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    figure, axes = plot.figure(len(settings), 2, width=10.5, height=0.9 + 3.0 * len(settings))
    for line, setting in zip(axes, settings, strict=True):
        for axis, place in zip(line, SIGMAS, strict=True):
            for rule in dict.fromkeys(row["rule"] for row in rows if row["rule"] in LINES):
                color, style = LINES[rule]
                own = chosen(rows, setting=setting, optimiser="descent", noise=place, rule=rule)
                mean, error = (np.array([row["converge and stay"][k] or 0 for row in own]) for k in ("mean", "error"))
                plot.band(
                    axis, range(len(own)), 100 * mean, 100 * error, label=rule, color=color, ls=style, marker="o", ms=4
                )
            axis.set_xticks(range(len(own)), [f"{row['sigma']:g}" for row in own])
            axis.set(ylim=(-4, 104), xlabel=f"σ of the noise on the {place}")
            axis.set_title("one number" if setting == "scalar" else "16 numbers", fontsize=plot.TITLE)
        line[0].set_ylabel("converged and inside,\n% of steps from then on")
    axes[0, 1].legend(**plot.LEGEND, loc="lower left")
    figure.suptitle(title(rows), fontsize=11)
    plot.save(figure, path)


def main(arguments=None) -> None:
    given = _experiment.parse(__file__, __doc__, arguments, seeds=200, quick=20)
    jax.config.update("jax_enable_x64", True)
    measured = factors(QUICK if given.quick else METHODS, given.seeds)
    rows = cells(given)
    print(table(rows, measured))
    _experiment.write(given, {"factors": measured, "cells": rows})
    picture(rows, given.out / "toy.png")


if __name__ == "__main__":
    main()
