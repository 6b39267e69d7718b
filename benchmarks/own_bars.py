"""Error bars of rules on the suite: the bar against the true error, and what it costs.

For each problem and rule `error_bar` is held against the truth, in float64: the exact hypergradient of the T steps
(`Unroll()`) or that at the converged inner optimum (L-BFGS from the end of training, then a dense solve), whichever the
bar names as its reference. Errors below a relative 1e-4 count as that. Where there is no minimum, or the outer loss
varies along a manifold of minima, there is no such reference, and a bar that claims to know counts as wrong. Implicit
rules whose bar cannot tell are asked once more, with more products. "fresh" are six exact tangents, against the exact
hypergradient, for five draws. Costs are counted operations beyond the hypergradient's, of those of `Unroll()`. Beside
the bar stands, of quadratic train losses, the bound of the textbooks, with exact constants.

    python benchmarks/own_bars.py [--out DIR] [--quick] [--problems NAME ...]
"""

import warnings
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import suite
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure

import jaxhpo
from jaxhpo import CG, SAMA, ForwardGradient, Implicit, Neumann, Unroll, plot
from jaxhpo._core.cost import count_arithmetic
from jaxhpo._core.record import recording
from jaxhpo._diagnostics.error_bar import OPTIMUM, _by_tangents
from jaxhpo._inner.loop import run

FLOOR = 1e-4  # relative error below which errors are equal
MORE = 160  # products, for a bar that cannot tell with those of a quarter of `Unroll()`
FLAT = 1e-10  # of the largest eigenvalue of a Hessian, up to which a direction has no curvature
FRESH = "SAMA()", "Unroll(truncate=T/10)"
FAMILIES = ("implicit", "truncated", "random")


class Value:
    """The outer loss at given parameters."""

    def __init__(self, params):
        self.params = params

    def run(self, problem):
        return run(problem)[0]._replace(params=self.params), 0


def textbook(problem, h, unravel, rule):
    """The bound of the error of an implicit hypergradient by Lipschitz constants (Pedregosa 2016; Ehrhardt 2021).

    With w the trained parameters, w* the optimum, H the Hessian (constant here), μ its least eigenvalue, B the mixed
    derivative of the train loss, v the gradient of the outer loss with respect to w, and q what the linear solver
    returns: ‖w − w*‖ ≤ e = ‖∇L(w)‖/μ, and

        ĝ − g = [∂ₕV(w) − ∂ₕV(w*)] − Bᵀ(q − H⁻¹v) − BᵀH⁻¹(v − v*) − (B − B*)ᵀH⁻¹v*
        ‖ĝ − g‖ ≤ Lₕ e + ‖B‖ ‖Hq − v‖/μ + ‖B‖ Lᵥ e/μ + L_B e (‖v‖ + Lᵥ e)/μ,

    with Lᵥ the norm of ∂v/∂w, Lₕ that of ∂²V/∂h∂w, and L_B that of ∂B/∂w, as matrices.
    """
    w, parameters = ravel_pytree(jax.jit(problem.train)(unravel(h)))

    def outer(w, h):
        return problem.make_outer_loss(Value(parameters(w)))(unravel(h))

    inner_gradient = jax.grad(lambda w, h: problem.train_loss(parameters(w), unravel(h)))
    mixed = jax.jacfwd(inner_gradient, 1)
    hessian, v = np.asarray(jax.jacfwd(inner_gradient)(w, h)), jax.grad(outer)(w, h)
    least = np.linalg.eigvalsh(hessian)[0]
    solved = rule.linear_solver(lambda x: hessian @ x, v)[0]
    norm = np.linalg.norm
    of_b, of_v = norm(mixed(w, h), 2), norm(jax.hessian(outer)(w, h), 2)
    of_h = norm(jax.jacfwd(jax.grad(outer, 1))(w, h), 2)
    change_of_b = norm(jax.jacfwd(mixed)(w, h).reshape(-1, w.size), 2)
    e = norm(inner_gradient(w, h)) / least
    solver = of_b * norm(hessian @ solved - v) / least
    return float(of_h * e + solver + of_b * of_v * e / least + change_of_b * e * (norm(v) + of_v * e) / least)


def rules(problem):
    """The rules with an error bar of their own, by name, with their family."""
    total, rate = problem.num_steps, problem.step_size
    truncated = {f"Unroll(truncate=T/{n})": Unroll(truncate=max(4, total // n)) for n in (10, 4, 2)}
    implicit = {
        "Implicit(CG())": Implicit(CG()),
        "Implicit(CG(5))": Implicit(CG(maxiter=5)),
        "Implicit(Neumann(10))": Implicit(Neumann(10, rate)),
        "SAMA()": SAMA(),
    }
    random = {"ForwardGradient(16)": ForwardGradient(16)}
    for family, own in zip(FAMILIES, (implicit, truncated, random), strict=True):
        for name, rule in own.items():
            yield family, name, rule


def at_optimum(problem, h):
    """The hypergradient at the converged inner optimum, from the end of training; None without one.

    With w* the optimum, H the Hessian of the train loss there, B its mixed derivative, and v the gradient of the outer
    loss V with respect to w, it is ∂ₕV − Bᵀ H⁺ v. Optima may form a manifold, along which H is zero: any of them will
    do as long as V is constant along it, too.
    """
    flat, unravel = ravel_pytree(jax.jit(problem.train)(h))
    loss = jax.jit(jax.value_and_grad(lambda x: problem.train_loss(unravel(x), h)))

    def fun(x):
        value, grad = loss(jnp.asarray(x))
        return float(value), np.asarray(grad)

    options = {"maxiter": 20_000, "maxfun": 40_000, "ftol": 0.0, "gtol": 1e-11, "maxcor": 30}
    end = scipy.optimize.minimize(fun, np.asarray(flat), jac=True, method="L-BFGS-B", options=options)
    if np.linalg.norm(end.jac) > 1e-6 * max(1e-3, np.linalg.norm(fun(np.asarray(ravel_pytree(problem.params)[0]))[1])):
        return None
    w, (flat_h, unravel_h) = jnp.asarray(end.x), ravel_pytree(h)
    hessian = jax.jit(jax.hessian(lambda x: problem.train_loss(unravel(x), h)))(w)
    values, vectors = np.linalg.eigh(np.asarray(hessian))
    outer = jax.jit(jax.grad(lambda w, h: problem.make_outer_loss(Value(unravel(w)))(unravel_h(h)), (0, 1)))
    v, direct = (np.asarray(x) for x in outer(w, flat_h))
    parts, flat_ones = vectors.T @ v, values <= FLAT * values[-1]
    if values[0] < -FLAT * values[-1] or np.linalg.norm(parts[flat_ones]) > 1e-6 * np.linalg.norm(v):
        return None
    solved = vectors @ (parts * np.where(flat_ones, 0, 1 / np.where(flat_ones, 1, values)))
    inner_gradient = jax.grad(lambda w, h: problem.train_loss(unravel(w), unravel_h(h)))
    return direct - np.asarray(jax.vjp(lambda h: inner_gradient(w, h), flat_h)[1](jnp.asarray(solved))[0])


def counted(fn, h, solves):
    """Operations of `fn(h)`, its linear solves as long as they were."""
    one, two = (count_arithmetic(fn, h, unknown_length=length) for length in (1, 2))
    return one + (two - one) / max(1, len(solves)) * sum(solve.num_iterations - 1 for solve in solves)


def finite(x):
    return float(x) if np.isfinite(x) else None


def measure(name):
    """The rows of a problem."""
    problem = suite.make(name)
    h, unravel = ravel_pytree(problem.hparams)

    def loss(rule):
        outer_loss = problem.make_outer_loss(rule)
        return lambda flat: outer_loss(unravel(flat))

    exact = np.asarray(jax.jit(jax.grad(loss(Unroll())))(h))
    unrolled = count_arithmetic(jax.value_and_grad(loss(Unroll())), h)
    converged = at_optimum(problem, problem.hparams) if ravel_pytree(problem.params)[0].size <= 4000 else None
    rows = []
    for family, rule_name, rule in rules(problem):
        try:
            with warnings.catch_warnings(record=True, action="always") as caught:
                jax.eval_shape(jax.grad(loss(rule)), h)
            blind = any(issubclass(w.category, jaxhpo.ZeroHypergradientWarning) for w in caught)
            solves = []
            with recording(linear_solves=solves):
                bar = jax.jit(jaxhpo.error_bar(loss(rule)))(h)
        except jaxhpo.JaxhpoError as error:
            print(f"{name}, {rule_name}: refused, {str(error)[:80]}", flush=True)
            continue
        grad = np.asarray(bar.hypergradient)
        if not np.isfinite(grad).all() or not grad.any() or (blind and family == "implicit"):
            continue
        reference = converged if bar.reference == OPTIMUM else exact
        floor = FLOOR * np.linalg.norm(grad)
        true = None if reference is None else max(floor, float(np.linalg.norm(grad - reference)))
        plain = []
        with recording(linear_solves=plain), warnings.catch_warnings(action="ignore"):
            jax.block_until_ready(jax.jit(jax.grad(loss(rule)))(h))
        without = counted(jax.value_and_grad(loss(rule)), h, plain)

        def cost(products, solves, rule=rule, without=without):
            return (counted(jaxhpo.error_bar(loss(rule), products=products), h, solves) - without) / unrolled

        longer = None  # of an implicit derivative that cannot tell: with more products
        if family == "implicit" and not bar.known:
            solves_of = []
            with recording(linear_solves=solves_of):
                again = jax.jit(jaxhpo.error_bar(loss(rule), products=MORE))(h)
            longer = {
                "known": bool(again.known),
                "bar": finite(np.maximum(floor, again.error)),
                "cost": cost(MORE, solves_of),
            }
        fresh = []
        if np.linalg.norm(grad - exact) > floor and rule_name in FRESH:
            keys = jax.random.split(jax.random.key(zlib.crc32(f"{name}, {rule_name}".encode())), 5)
            outer_loss, given = loss(rule), bar.hypergradient
            bars = jax.lax.map(lambda k, f=outer_loss, g=given: _by_tangents(f, h, g, 6, k, 0)[0], keys)
            fresh = (np.asarray(bars) / np.linalg.norm(grad - exact)).tolist()
        rows.append(
            {
                "problem": name,
                "family": family,
                "rule": rule_name,
                "convex": problem.convex,
                "converged": problem.converged,
                "known": bool(bar.known),
                "bar": finite(np.maximum(floor, bar.error)),  # NaN stays
                "true": true,
                "norm": float(bar.norm),
                "cost": cost(None, solves),
                "longer": longer,
                "fresh": fresh,
                "textbook": max(floor, textbook(problem, h, unravel, rule))
                if problem.condition and isinstance(rule, Implicit)
                else None,
            }
        )
        print(f"{name}, {rule_name}: {bar}; true {true if true is None else f'{true:.2g}'}", flush=True)
    return rows


def ratio(row):
    return None if row["true"] is None or row["bar"] is None else row["bar"] / row["true"]


def is_wrong(row, bar):
    """Whether a bar that claims to know is not within a factor of two, or there is nothing to know."""
    return row["true"] is None or bar is None or not 0.5 <= bar / row["true"] <= 2


def summary(rows):
    """What `Must show` asks for, by family."""
    found = {}
    for family in FAMILIES:
        own = [row for row in rows if row["family"] == family]
        known = [row for row in own if row["known"]]
        wrong = [row for row in known if is_wrong(row, row["bar"])]
        easy = [row for row in own if row["convex"] or row["converged"]]
        found[family] = {
            "cases": len(own),
            "known": len(known),
            "known, and wrong by more than a factor of two": len(wrong),
            "convex or converged": len(easy),
            "of these, cannot tell": sum(not row["known"] for row in easy),
            "without a reference": sum(row["true"] is None for row in own),
            "median cost, of Unroll()": float(np.median([row["cost"] for row in own])) if own else None,
        }
    longer = [row for row in rows if row["longer"]]
    told = [row for row in longer if row["longer"]["known"]]
    found[f"implicit, cannot tell, with {MORE} products"] = {
        "cases": len(longer),
        "known": len(told),
        "convex or converged": sum(row["convex"] or row["converged"] for row in longer),
        "of these, known": sum(row["convex"] or row["converged"] for row in told),
        "known, and wrong by more than a factor of two": sum(is_wrong(row, row["longer"]["bar"]) for row in told),
        "median cost, of Unroll()": float(np.median([row["longer"]["cost"] for row in longer])) if longer else None,
    }
    quadratic = [row for row in rows if row.get("textbook") and row["true"]]
    if quadratic:
        found["textbook, of quadratic train losses"] = {
            "cases": len(quadratic),
            "median of bound over error": float(np.median([row["textbook"] / row["true"] for row in quadratic])),
            "largest of bound over error": max(row["textbook"] / row["true"] for row in quadratic),
            "below the error": sum(bool(row["textbook"] < row["true"]) for row in quadratic),
            "of bars, between": [
                fold(row["bar"] / row["true"] for row in quadratic if row["bar"]) for fold in (min, max)
            ],
        }
    fresh = np.array([x for row in rows for x in row["fresh"]])
    near = float(((fresh > 0.5) & (fresh < 2)).mean()) if len(fresh) else None
    found["fresh tangents"] = {"cases": len(fresh), "within a factor of two": near}
    return found


def draw(rows, path):
    figure = Figure((6, 5), layout="constrained")
    axis = figure.subplots()
    near = np.mean([not is_wrong(row, row["bar"]) for row in rows if row["known"]])
    rows = [row for row in rows if ratio(row) is not None]  # without a true error, which is a miss, there is no point
    for colour, family in zip(plot.PALETTE, FAMILIES, strict=False):
        for known, marker in ((True, "o"), (False, "x")):
            own = [row for row in rows if row["family"] == family and row["known"] == known]
            x, y = ([row[what] / row["norm"] for row in own] for what in ("true", "bar"))
            label = f"{family}, {'known' if known else 'cannot tell'} ({len(own)})"
            axis.plot(x, y, ls="", marker=marker, color=colour, ms=4, alpha=0.7, label=label)
    ends = np.array([FLOOR / 2, 2 * max(max(row["true"], row["bar"]) / row["norm"] for row in rows)])
    axis.plot(ends, ends, color="0.3", lw=1)
    axis.fill_between(ends, ends / 2, ends * 2, color="0.5", alpha=0.2, linewidth=0)
    axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="true error of the hypergradient, of its norm")
    axis.set(
        ylabel="error bar, of its norm", title=f"{100 * near:.0f} % of known error bars are within a factor of two"
    )
    axis.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=150)


def main(arguments=None) -> None:
    jax.config.update("jax_enable_x64", True)
    suite.run(__doc__, arguments, "own_bars", measure, summary, draw)


if __name__ == "__main__":
    main()
