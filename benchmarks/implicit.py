"""What does an implicit hypergradient cost, and how exact is it, by each linear solver, here and in peers?

Three inner problems in float32: ridge regression (1000 examples of 100 features, a log penalty per weight) and logistic
regression (1000 of 200, the same), both at their solution; and an MLP 784-256-256-10 (gelu, 128 examples, a log penalty
per weight and a log weight per example) at random weights, under penalties that make its Hessian positive definite.
Every iteration stops after 20 steps, in the library, in jaxopt and in lineax's CG under optimistix.

Error: of the hypergradient, against a dense solve in float64 (the MLP's 269 322 weights allow none: against conjugate
gradients in float64 to 1e-12). Arithmetic: matrix products that the program, run step by step, executes, in gradients
of the train loss; one of them is the outer loss's own. Memory: what the compiled program allocates, in copies of the
parameters. Time: the processor's on one core, the median of interleaved ratios to a gradient, with the quartiles. Last,
ten outer losses of the MLP, all at once and one of them. A peer that is not installed is a row that says so.
What the file in DIR already holds of other problems is kept.

    python benchmarks/implicit.py [--problems ridge logistic mlp] [--quick] [--repeats 11] [--out DIR]
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import math
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

if hasattr(os, "sched_setaffinity"):  # before JAX counts the cores
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core
from jax.flatten_util import ravel_pytree
from jax.interpreters.partial_eval import dce_jaxpr

import jaxhpo
from jaxhpo import plot

ITERATIONS = 20
NUM_LOSSES = 10
PROBLEMS = ["ridge", "logistic", "mlp"]


class Problem(NamedTuple):
    """`train_loss(params, hparams, data)`, `losses(params, data)`: data closed over would be folded by the compiler.

    `curvature` is about the largest eigenvalue of the train loss's Hessian, `damping` a little of it.
    """

    train_loss: Callable
    losses: Callable
    params: Any
    hparams: Any
    data: Any
    val_data: Any
    curvature: float
    damping: float


def linear(name: str, dim: int) -> Problem:
    """Ridge or logistic regression at its solution, found in float64."""
    rng = np.random.default_rng(0)
    X, Xv = rng.normal(size=(2, 1000, dim)) * np.geomspace(1, 0.1, dim)
    truth = rng.normal(size=dim)
    y, yv = (A @ truth + rng.normal(size=1000) for A in (X, Xv))
    y, yv = (y, yv) if name == "ridge" else (np.sign(y), np.sign(yv))

    def losses(w, data):
        outputs = data[0] @ w
        return (outputs - data[1]) ** 2 / 2 if name == "ridge" else jax.nn.softplus(-data[1] * outputs)

    def train_loss(w, h, data):
        return losses(w, data).mean() + jnp.sum(jnp.exp(h) * w**2) / 2

    h = np.linspace(-6, -4, dim)
    with jax.enable_x64(True):
        w = jnp.zeros(dim)
        for _ in range(20):  # Newton's method; the first step solves the ridge problem
            w = w - jnp.linalg.solve(*(f(train_loss)(w, h, (X, y)) for f in (jax.hessian, jax.grad)))
        largest = float(jnp.linalg.eigvalsh(jax.hessian(train_loss)(w, h, (X, y)))[-1])
    w, h, data, val_data = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float32), (w, h, (X, y), (Xv, yv)))
    return Problem(train_loss, losses, w, h, data, val_data, largest, 0.01 * largest)


def mlp(sizes=(784, 256, 256, 10)) -> Problem:
    batch, rng = 128, np.random.default_rng(0)
    shapes = list(zip(sizes[:-1], sizes[1:], strict=True))
    params = [(jnp.asarray(rng.normal(size=s) / s[0] ** 0.5, jnp.float32), jnp.zeros(s[1])) for s in shapes]

    def draw():
        inputs, labels = rng.normal(size=(batch, sizes[0])), rng.integers(sizes[-1], size=batch)
        return jnp.asarray(inputs, jnp.float32), jnp.asarray(labels, jnp.int32)

    def losses(params, data):
        *hidden, (last, bias) = params
        x, labels = data
        for weights, b in hidden:
            x = jax.nn.gelu(x @ weights + b)
        return optax.softmax_cross_entropy_with_integer_labels(x @ last + bias, labels)

    def train_loss(params, h, data):
        penalty = jax.tree.map(lambda log, w: jnp.sum(jnp.exp(log) * w**2) / 2, h["penalty"], params)
        return jnp.mean(jnp.exp(h["example"]) * losses(params, data)) + sum(jax.tree.leaves(penalty))

    h = {"penalty": jax.tree.map(lambda w: jnp.zeros_like(w), params), "example": jnp.zeros(batch)}
    return Problem(train_loss, losses, params, h, draw(), draw(), 4.0, 0.05)


def val_loss(problem, params, val_data):
    return problem.losses(params, val_data).mean()


def condition(problem, params, args):
    return jax.grad(problem.train_loss)(params, *args)


# --- the methods: each makes of a problem `(hparams, params, data, val_data) -> hypergradient` -----------------------


def ours(linear_solver: Callable, problem: Problem) -> Callable:
    def outer(h, params, data, val_data):
        attached = jaxhpo.implicit(functools.partial(condition, problem), params, (h, data), linear_solver)
        return val_loss(problem, attached, val_data)

    return jax.grad(outer)


def with_jaxopt(solver: str, problem: Problem, **settings) -> Callable:
    jaxopt, solvers = importlib.import_module("jaxopt"), importlib.import_module("jaxopt.linear_solve")
    solve = functools.partial(getattr(solvers, solver), tol=1e-9, **settings)
    rule = jaxopt.implicit_diff.custom_root(functools.partial(condition, problem), solve=solve)
    attach = rule(lambda start, args: start)
    return jax.grad(lambda h, params, data, val_data: val_loss(problem, attach(params, (h, data)), val_data))


def with_optimistix(problem: Problem) -> Callable:
    optimistix, lineax = map(importlib.import_module, ("optimistix", "lineax"))
    # It raises where lineax's iterations run out, so that those are bounded here by a report that is not looked at.
    cg = lineax.CG(rtol=1e-6, atol=1e-6, max_steps=ITERATIONS)

    class Bounded(type(cg)):
        def compute(self, *args):
            x, _, stats = super().compute(*args)
            return x, lineax.RESULTS.successful, stats

    adjoint = optimistix.ImplicitAdjoint(Bounded(rtol=1e-6, atol=1e-6, max_steps=ITERATIONS))
    descent = optimistix.GradientDescent(learning_rate=1.0, rtol=1.0, atol=1.0)

    def outer(h, params, data, val_data):
        found = optimistix.minimise(
            lambda p, args: problem.train_loss(p, *args), descent, params, (h, data), max_steps=0, throw=False,
            adjoint=adjoint, tags=frozenset({lineax.positive_semidefinite_tag}),
        )  # fmt: skip
        return val_loss(problem, found.value, val_data)

    return jax.grad(outer)


METHODS: dict[str, Callable] = {
    "CG": lambda p: ours(jaxhpo.CG(ITERATIONS, tol=1e-9), p),
    "Neumann": lambda p: ours(jaxhpo.Neumann(ITERATIONS + 1, 1 / p.curvature), p),
    "Nystrom": lambda p: ours(functools.partial(jaxhpo.Nystrom(ITERATIONS, p.damping), key=jax.random.key(0)), p),
    "GMRES": lambda p: ours(jaxhpo.GMRES(maxiter=1, restart=ITERATIONS, tol=1e-9), p),
    "jaxopt solve_cg": functools.partial(with_jaxopt, "solve_cg", maxiter=ITERATIONS),
    "jaxopt solve_normal_cg (default)": functools.partial(with_jaxopt, "solve_normal_cg", maxiter=ITERATIONS),
    "jaxopt solve_gmres": functools.partial(with_jaxopt, "solve_gmres", maxiter=1, restart=ITERATIONS),
    "optimistix, lineax CG": with_optimistix,
}


def reference(problem: Problem) -> Any:
    """The hypergradient in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, float) if x.dtype == jnp.float32 else x, problem[2:6])
        params, h, data, val_data = jax.tree.map(jnp.asarray, wide)
        flat, unravel = ravel_pytree(params)
        v = ravel_pytree(jax.grad(functools.partial(val_loss, problem))(params, val_data))[0]

        def gradient(flat, h):
            return ravel_pytree(jax.grad(problem.train_loss)(unravel(flat), h, data))[0]

        if flat.size < 1000:
            q = jnp.linalg.solve(jax.jacfwd(gradient)(flat, h), v)
        else:
            q, residual = jax.jit(functools.partial(_solved, gradient))(flat, h, v)
            assert residual <= 1e-10, f"the reference has a relative residual of {residual}"
        pulled = jax.vjp(lambda h: gradient(flat, h), h)[1](-q)[0]
        return jax.tree.map(np.asarray, pulled)


def _solved(gradient, flat, h, v):
    product = jax.linearize(lambda flat: gradient(flat, h), flat)[1]
    q = jax.scipy.sparse.linalg.cg(product, v, tol=1e-12, maxiter=2000)[0]
    return q, jnp.linalg.norm(product(q) - v) / jnp.linalg.norm(v)


def distance(got, want) -> float:
    """‖got − want‖ / ‖want‖, in float64."""
    got, want = (np.concatenate([np.ravel(x).astype(float) for x in jax.tree.leaves(t)]) for t in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


# --- arithmetic, of loops that end at a condition too ----------------------------------------------------------------


def executed(function: Callable, *args) -> float:
    """Operations of the matrix products that `function(*args)` executes: its open-ended loops are run step by step."""
    closed = jax.make_jaxpr(function)(*args)
    return _run(_needed(closed, [True] * len(closed.jaxpr.outvars)), jax.tree.leaves(args))[1]


def _needed(closed, used):
    """Less what no used result depends on."""
    return core.ClosedJaxpr(dce_jaxpr(closed.jaxpr, used, instantiate=True)[0], closed.consts)


def _run(closed, args) -> tuple[list, float]:
    """The results, and the operations."""
    jaxpr, total = closed.jaxpr, 0.0
    if not _open_ended(jaxpr):
        return _compiled(closed)(*args), _products(jaxpr)
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))
    read = {v for eqn in jaxpr.eqns for v in eqn.invars if not hasattr(v, "val")}
    read |= {v for v in jaxpr.outvars if not hasattr(v, "val")}

    def value(v):
        return v.val if hasattr(v, "val") else values[v]

    for eqn in jaxpr.eqns:
        results, operations = _run_equation(eqn, list(map(value, eqn.invars)), [v in read for v in eqn.outvars])
        values.update(zip(eqn.outvars, results, strict=True))
        total += operations
    return [value(v) for v in jaxpr.outvars], total


@functools.cache  # a loop's body once
def _compiled(closed):
    return jax.jit(core.jaxpr_as_fun(closed))


def _run_equation(eqn, args, used):
    name, settings = eqn.primitive.name, eqn.params
    if name == "while":
        a, b = settings["cond_nconsts"], settings["body_nconsts"]
        carry, total = args[a + b :], 0.0
        while _run(settings["cond_jaxpr"], args[:a] + carry)[0][0]:
            carry, operations = _run(settings["body_jaxpr"], args[a : a + b] + list(carry))
            carry, total = list(carry), total + operations
        return carry, total
    if name == "cond":
        return _run(settings["branches"][int(args[0])], args[1:])
    if name == "custom_linear_solve":  # beside the solve, its transpose and the products with either
        lengths = settings["const_lengths"]
        start, end = lengths.matvec + lengths.vecmat, lengths.matvec + lengths.vecmat + lengths.solve
        solve = _needed(settings["jaxprs"].solve, used)
        results, total = _run(solve, args[start:end] + args[sum(lengths) :])
        results = iter(results)
        return [next(results) if u else None for u in used], total
    if name == "linear_solve":  # lineax's, which holds no program until it runs
        return _run(jax.make_jaxpr(functools.partial(eqn.primitive.impl, **settings))(*args), args)
    if name in ("jit", "closed_call", "checkpoint", "custom_jvp_call", "custom_vjp_call"):
        return _run(_programs(eqn)[0], args)
    if any(_open_ended(inner.jaxpr) for inner in _programs(eqn)):
        raise NotImplementedError(f"a loop that ends at a condition inside of `{name}`")
    results = eqn.primitive.bind(*args, **settings)
    return results if eqn.primitive.multiple_results else [results], _products_of(eqn)


def _open_ended(jaxpr) -> bool:
    return any(
        eqn.primitive.name in ("while", "cond", "custom_linear_solve", "linear_solve")
        or any(_open_ended(inner.jaxpr) for inner in _programs(eqn))
        for eqn in jaxpr.eqns
    )


def _programs(eqn) -> list:
    values = [v for value in eqn.params.values() for v in (value if isinstance(value, (tuple, list)) else (value,))]
    return [v if hasattr(v, "jaxpr") else core.ClosedJaxpr(v, ()) for v in values if hasattr(v, "eqns")]


def _products(jaxpr) -> float:
    return sum(map(_products_of, jaxpr.eqns))


def _products_of(eqn) -> float:
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2.0 * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted) * eqn.outvars[0].aval.size
    times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
    return times * sum(_products(inner.jaxpr) for inner in _programs(eqn))


def arguments(problem: Problem) -> tuple:
    """What every function here takes."""
    return problem.hparams, problem.params, problem.data, problem.val_data


# --- measuring -------------------------------------------------------------------------------------------------------


def compiled(functions: dict[str, Callable], args) -> dict[str, Any]:
    return {name: jax.jit(function).lower(*args).compile() for name, function in functions.items()}


def timed(programs: dict[str, Any], unit: Callable, args, repeats: int) -> dict[str, list[float]]:
    """Quartiles of the ratio to the unit, which is called before and after each turn."""

    def seconds(program):
        calls, start = 0, time.process_time()
        while calls == 0 or time.process_time() - start < 5e-3:
            jax.block_until_ready(program(*args))
            calls += 1
        return (time.process_time() - start) / calls

    ratios: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(1 + repeats):
        for name, program in programs.items():
            before, own, after = seconds(unit), seconds(program), seconds(unit)
            ratios[name].append(own / ((before + after) / 2))
    return {name: statistics.quantiles(values[1:], n=4) for name, values in ratios.items()}  # the first warms up


def measured(functions: dict[str, Callable], problem: Problem, repeats: int) -> dict[str, dict[str, Any]]:
    """Arithmetic, memory and time of each."""
    args = arguments(problem)

    def gradient(h, params, data, val_data):
        return jax.grad(problem.train_loss)(params, h, data)

    operations, size = executed(gradient, *args), sum(x.nbytes for x in jax.tree.leaves(problem.params))
    programs = compiled(functions, args)
    times = timed(programs, jax.jit(gradient).lower(*args).compile(), args, repeats)
    return {
        name: {
            "arithmetic": executed(functions[name], *args) / operations,
            "memory": program.memory_analysis().temp_size_in_bytes / size,
            "time": times[name],
        }
        for name, program in programs.items()
    }


def compare_solvers(name: str, problem: Problem, repeats: int) -> list[dict[str, Any]]:
    functions, rows, want = {}, [], reference(problem)
    for method, make in METHODS.items():
        try:
            function = make(problem)
            jax.block_until_ready(jax.jit(function)(*arguments(problem)))
        except (ImportError, jax.errors.JaxRuntimeError) as error:  # not installed, or it raises as it runs
            found = [line for line in str(error).splitlines() if "linear solver" in line] or str(error).splitlines()
            rows.append({"problem": name, "method": method, "missing": found[0]})
        else:
            functions[method] = function
    for method, row in measured(functions, problem, repeats).items():
        error = distance(jax.jit(functions[method])(*arguments(problem)), want)
        rows.append({"problem": name, "method": method, "error": error} | row)
    return rows


def compare_batching(problem: Problem, repeats: int) -> list[dict[str, Any]]:
    """The losses of the first validation examples: all as one vector-valued outer function, and the first alone."""

    def outer(h, params, data, val_data):
        rule = functools.partial(condition, problem)
        attached = jaxhpo.implicit(rule, params, (h, data), jaxhpo.CG(ITERATIONS, tol=1e-9))
        return problem.losses(attached, jax.tree.map(lambda x: x[:NUM_LOSSES], val_data))

    functions = {"all at once": jax.jacrev(outer), "one of them": jax.grad(lambda *args: outer(*args)[0])}
    batched, single = (jax.jit(function)(*arguments(problem)) for function in functions.values())
    error = distance(jax.tree.map(lambda x: x[0], batched), single)
    name = f"mlp, {NUM_LOSSES} outer losses"
    rows = measured(functions, problem, repeats).items()
    return [{"problem": name, "method": method, "difference": error} | row for method, row in rows]


def draw(rows, path) -> None:
    """A panel for each quantity, a line for each method, a colour for each problem."""
    names = {"error": "relative error", "arithmetic": "arithmetic, gradients", "time": "time, gradients",
             "memory": "memory, copies of θ"}  # fmt: skip
    figure, axes = plot.figure(1, len(names), width=15, height=4.6)
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    problems = list(dict.fromkeys(row["problem"] for row in rows if "error" in row))
    for axis, (key, label) in zip(axes.flat, names.items(), strict=True):
        for i, problem in enumerate(problems):
            mine = [row for row in rows if row["problem"] == problem and key in row]
            at = [methods.index(row["method"]) + 0.22 * (i - 1) for row in mine]
            middle = [row[key][1] if key == "time" else row[key] for row in mine]
            axis.plot(middle, at, "o", color=f"C{i}", label=problem, ms=6)
            if key == "time":
                axis.hlines(at, [row[key][0] for row in mine], [row[key][2] for row in mine], color=f"C{i}", lw=2)
        axis.set(
            xscale="log" if key in ("error", "memory") else "linear", xlabel=label, ylim=(len(methods) - 0.5, -0.5)
        )
        axis.set_yticks(range(len(methods)), methods if key == "error" else [""] * len(methods))
        axis.grid(axis="x", alpha=0.3)
        axis.minorticks_off()
        axis.hlines([k + 0.5 for k in range(len(methods) - 1)], *axis.get_xlim(), color="0.85", lw=0.8)
    axes.flat[0].legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(problems))
    plot.save(figure, path)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small networks, few repetitions")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=PROBLEMS)
    parser.add_argument("--repeats", type=int, default=11, help="turns of each program that are timed")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parsed = parser.parse_args(arguments)
    parsed.out.mkdir(parents=True, exist_ok=True)
    repeats = 3 if parsed.quick else parsed.repeats
    sizes = (64, 32, 32, 10) if parsed.quick else (784, 256, 256, 10)
    makers = {"ridge": lambda: linear("ridge", 100), "logistic": lambda: linear("logistic", 200),
              "mlp": lambda: mlp(sizes)}  # fmt: skip
    file, rows = parsed.out / "implicit.json", []
    if file.exists():
        kept = json.loads(file.read_text())["rows"]
        rows = [row for row in kept if row["problem"].split(",")[0] not in parsed.problems]
    print(f"{'problem':20} {'method':33} {'error':>8} {'arithmetic':>10} {'memory':>7} {'time':>22}", flush=True)
    for name in parsed.problems:
        problem = makers[name]()
        rows += told(compare_solvers(name, problem, repeats))
        rows += told(compare_batching(problem, repeats)) if name == "mlp" else []
    rows.sort(key=lambda row: [*makers].index(row["problem"].split(",")[0]))
    report = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "cores": 1, "iterations": ITERATIONS}
    file.write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n")
    draw(rows, parsed.out / "implicit.png")


def told(rows):
    for row in rows:
        if "missing" in row:
            print(f"{row['problem']:20} {row['method']:33} {row['missing']}", flush=True)
            continue
        quartiles = "{1:.1f} ({0:.1f}, {2:.1f})".format(*row["time"])
        error = row.get("error", row.get("difference"))
        print(
            f"{row['problem']:20} {row['method']:33} {error:8.1e} {row['arithmetic']:10.2f} {row['memory']:7.1f} "
            f"{quartiles:>22}",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    main()
