"""Cost and error of an implicit hypergradient, for each linear solver, in this library and in peers.

Three inner problems in float32: ridge regression (1000 examples of 100 features, a log penalty per weight) and logistic
regression (1000 of 200, the same), both at their solution; and an MLP 784-256-256-10 (gelu, 128 random examples, a log
penalty per weight and a log weight per example) after 300 steps of Adam under half of its penalty. The other half makes
the Hessian positive definite there, and ill-conditioned enough that conjugate gradients are far from converged.

Every solver gets 20 iterations, and tolerances that it does not reach: relative ones of 1e-9 (lineax's CG: rtol 1e-9,
atol 1e-12). The step of Neumann's series and the damping of Nyström's sketch are tuned, for the least error on
another seed's problem.

Error: of the hypergradient, against a dense solve in float64 (the MLP's 269 322 weights allow none: against conjugate
gradients in float64 to 1e-12). Iterations: those of the longest loop, counted as it runs (Nyström's products are one
batch). Arithmetic: matrix products that the program executes, in gradients of the train loss; one of them is the outer
loss's own. Memory: what the compiled program allocates, in copies of the parameters. Time: wall-clock on one core and
one thread, in gradients timed before and after, the median of interleaved turns with the quartiles. `CG / it`: the time
of `CG` over that of a row, turn by turn, by the wall clock and by the processor's, which other work on the machine
disturbs less. Last, ten outer losses of the MLP, all at once and one of them; there `CG` is the first row. A peer that
is not installed, or that fails, has a row that says so. Rows of other problems in the file in DIR are kept.

    python benchmarks/implicit.py [--problems ridge logistic mlp] [--quick] [--repeats 11] [--out DIR]
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import logging
import math
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

if hasattr(os, "sched_setaffinity"):  # before JAX counts the cores
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

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

    `curvature` is about the largest eigenvalue of the train loss's Hessian.
    """

    train_loss: Callable
    losses: Callable
    params: Any
    hparams: Any
    data: Any
    val_data: Any
    curvature: float


def linear(name: str, dim: int, seed: int) -> Problem:
    """Ridge or logistic regression at its solution, found in float64."""
    rng = np.random.default_rng(seed)
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
        gradient, hessian = (jax.jit(f(train_loss)) for f in (jax.grad, jax.hessian))
        w = jnp.zeros(dim)
        for _ in range(20):  # Newton's method; the first step solves the ridge problem
            w = w - jnp.linalg.solve(hessian(w, h, (X, y)), gradient(w, h, (X, y)))
        largest = float(jnp.linalg.eigvalsh(hessian(w, h, (X, y)))[-1])
    w, h, data, val_data = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float32), (w, h, (X, y), (Xv, yv)))
    return Problem(train_loss, losses, w, h, data, val_data, largest)


def mlp(sizes: tuple[int, ...], seed: int) -> Problem:
    batch, decay, rng = 128, 0.01, np.random.default_rng(seed)
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

    def hparams(penalty):
        logs = jax.tree.map(lambda w: jnp.full_like(w, math.log(penalty)), params)
        return {"penalty": logs, "example": jnp.zeros(batch)}

    data, h = draw(), hparams(2 * decay)
    params = trained(train_loss, params, hparams(decay), data)
    largest = float(largest_eigenvalue(train_loss, params, h, data))
    return Problem(train_loss, losses, params, h, data, draw(), largest)


@functools.partial(jax.jit, static_argnums=0)
def trained(loss: Callable, params, *args):
    """The MLP after 300 steps of Adam."""
    optimizer = optax.adam(1e-3)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, *args), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), length=300)[0][0]


@functools.partial(jax.jit, static_argnums=0)
def largest_eigenvalue(loss: Callable, params, *args) -> jax.Array:
    """Estimate the Hessian's largest eigenvalue by 50 power iterations."""

    def multiply(v):
        return jax.jvp(lambda params: jax.grad(loss)(params, *args), (params,), (v,))[1]

    def normalised(v):
        return jax.tree.map(lambda x: x / optax.global_norm(v), v)

    v = jax.grad(loss)(params, *args)
    return optax.global_norm(multiply(jax.lax.fori_loop(0, 50, lambda _, v: normalised(multiply(v)), normalised(v))))


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

    class Bounded(lineax.CG):  # as it is, it raises where its iterations run out
        def compute(self, *args):
            x, _, stats = super().compute(*args)
            return x, lineax.RESULTS.successful, stats

    adjoint = optimistix.ImplicitAdjoint(Bounded(rtol=1e-9, atol=1e-12, max_steps=ITERATIONS))
    descent = optimistix.GradientDescent(learning_rate=1.0, rtol=1.0, atol=1.0)

    def outer(h, params, data, val_data):
        found = optimistix.minimise(
            lambda p, args: problem.train_loss(p, *args), descent, params, (h, data), max_steps=0, throw=False,
            adjoint=adjoint, tags=frozenset({lineax.positive_semidefinite_tag}),
        )  # fmt: skip
        return val_loss(problem, found.value, val_data)

    return jax.grad(outer)


METHODS: dict[str, Callable] = {
    "CG": functools.partial(ours, jaxhpo.CG(ITERATIONS, tol=1e-9)),
    "jaxopt solve_cg": functools.partial(with_jaxopt, "solve_cg", maxiter=ITERATIONS),
    "jaxopt solve_normal_cg (default)": functools.partial(with_jaxopt, "solve_normal_cg", maxiter=ITERATIONS),
    "optimistix, lineax CG": with_optimistix,
    "GMRES": functools.partial(ours, jaxhpo.GMRES(maxiter=1, restart=ITERATIONS, tol=1e-9)),
    "jaxopt solve_gmres": functools.partial(with_jaxopt, "solve_gmres", maxiter=1, restart=ITERATIONS),
}


def neumann(setting: float, problem: Problem) -> Callable:
    return ours(jaxhpo.Neumann(ITERATIONS + 1, setting / problem.curvature), problem)


def nystrom(setting: float, problem: Problem) -> Callable:
    solver = jaxhpo.Nystrom(ITERATIONS, setting * problem.curvature)
    return ours(functools.partial(solver, key=jax.random.key(0)), problem)


# Relative to the curvature, and to be tuned: the step's inverse must exceed half of it.
TUNED: dict[str, tuple[Callable, list[float]]] = {
    "Neumann": (neumann, [0.5, 1.0, 1.5, 1.9]),
    "Nystrom": (nystrom, [1e-4, 1e-3, 1e-2, 1e-1, 1.0]),
}


def tuned(problem: Problem) -> dict[str, float]:
    """Return, for each method with a setting, the one with the least error on this problem."""
    want = reference(problem)

    def error(make, setting):
        return distance(jax.jit(make(setting, problem))(*arguments(problem)), want)

    return {name: min(grid, key=functools.partial(error, make)) for name, (make, grid) in TUNED.items()}


def reference(problem: Problem) -> Any:
    """Return the hypergradient in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, float) if x.dtype == jnp.float32 else x, arguments(problem))
        found, residual = jax.jit(functools.partial(_reference, problem))(*wide)
        assert residual <= 1e-10, f"the reference has a relative residual of {residual}"
        return jax.tree.map(np.asarray, found)


def _reference(problem, h, params, data, val_data):
    """Return the hypergradient in float64 and the relative residual of its linear system."""
    flat, unravel = ravel_pytree(params)
    v = ravel_pytree(jax.grad(functools.partial(val_loss, problem))(params, val_data))[0]

    def gradient(flat, h):
        return ravel_pytree(jax.grad(problem.train_loss)(unravel(flat), h, data))[0]

    product = jax.linearize(lambda flat: gradient(flat, h), flat)[1]
    if flat.size < 1000:
        q = jnp.linalg.solve(jax.vmap(product)(jnp.eye(flat.size, dtype=flat.dtype)), v)
    else:
        q = jax.scipy.sparse.linalg.cg(product, v, tol=1e-12, maxiter=2000)[0]
    residual = jnp.linalg.norm(product(q) - v) / jnp.linalg.norm(v)
    return jax.vjp(lambda h: gradient(flat, h), h)[1](-q)[0], residual


def distance(got, want) -> float:
    """Return ‖got − want‖ / ‖want‖, in float64."""
    got, want = (np.concatenate([np.ravel(x).astype(float) for x in jax.tree.leaves(t)]) for t in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


# --- arithmetic, of loops that end at a condition too ----------------------------------------------------------------


class Run(NamedTuple):
    """Results, operations of matrix products, and iterations of the longest loop."""

    results: list
    operations: float
    turns: int


def executed(function: Callable, *args) -> Run:
    """Run `function(*args)`, stepping through its open-ended loops, and count what it executes."""
    closed = jax.make_jaxpr(function)(*args)
    return _run(_needed(closed, [True] * len(closed.jaxpr.outvars)), jax.tree.leaves(args))


def _needed(closed, used):
    """Remove the equations that no used result depends on."""
    return core.ClosedJaxpr(dce_jaxpr(closed.jaxpr, used, instantiate=True)[0], closed.consts)


def _run(closed, args) -> Run:
    jaxpr, total, turns = closed.jaxpr, 0.0, 0
    if not _open_ended(jaxpr):
        return Run(_compiled(closed)(*args), _products(jaxpr), _longest(jaxpr))
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))
    read = {v for eqn in jaxpr.eqns for v in eqn.invars if not hasattr(v, "val")}
    read |= {v for v in jaxpr.outvars if not hasattr(v, "val")}

    def value(v):
        return v.val if hasattr(v, "val") else values[v]

    for eqn in jaxpr.eqns:
        ran = _run_equation(eqn, list(map(value, eqn.invars)), [v in read for v in eqn.outvars])
        values.update(zip(eqn.outvars, ran.results, strict=True))
        total, turns = total + ran.operations, max(turns, ran.turns)
    return Run([value(v) for v in jaxpr.outvars], total, turns)


@functools.cache  # a loop's body once
def _compiled(closed):
    return jax.jit(core.jaxpr_as_fun(closed))


def _run_equation(eqn, args, used) -> Run:
    name, settings = eqn.primitive.name, eqn.params
    if name == "while":
        return _run_loop(settings, args)
    if name == "cond":
        return _run(settings["branches"][int(args[0])], args[1:])
    if name == "custom_linear_solve":  # beside the solve, its transpose and the products with either
        lengths = settings["const_lengths"]
        start, end = lengths.matvec + lengths.vecmat, lengths.matvec + lengths.vecmat + lengths.solve
        ran = _run(_needed(settings["jaxprs"].solve, used), args[start:end] + args[sum(lengths) :])
        results = iter(ran.results)
        return ran._replace(results=[next(results) if u else None for u in used])
    if name == "linear_solve":  # lineax's, which holds no program until it runs
        return _run(jax.make_jaxpr(functools.partial(eqn.primitive.impl, **settings))(*args), args)
    if name in ("jit", "closed_call", "checkpoint", "custom_jvp_call", "custom_vjp_call"):
        return _run(_programs(eqn)[0], args)
    if any(_open_ended(inner.jaxpr) for inner in _programs(eqn)):
        raise NotImplementedError(f"a loop that ends at a condition inside of `{name}`")
    results = eqn.primitive.bind(*args, **settings)
    return Run(results if eqn.primitive.multiple_results else [results], _products_of(eqn), _longest_of(eqn))


def _run_loop(settings, args) -> Run:
    a, b = settings["cond_nconsts"], settings["body_nconsts"]
    carry, total, turns, inner = args[a + b :], 0.0, 0, 0
    while np.any(on := np.asarray(_run(settings["cond_jaxpr"], args[:a] + carry).results[0])):
        ran = _run(settings["body_jaxpr"], args[a : a + b] + carry)
        carry = [_where(on, *pair) for pair in zip(ran.results, carry, strict=True)] if on.ndim else list(ran.results)
        total, turns, inner = total + ran.operations, turns + 1, max(inner, ran.turns)
    return Run(carry, total, max(turns, inner))


def _where(on, new, old):
    """Keep the values of those loops of a batch that have ended."""
    return jnp.where(on.reshape(on.shape + (1,) * (new.ndim - on.ndim)), new, old)


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


def _longest(jaxpr) -> int:
    return max(map(_longest_of, jaxpr.eqns), default=0)


def _longest_of(eqn) -> int:
    own = eqn.params["length"] if eqn.primitive.name == "scan" else 0
    return max([own, *(_longest(inner.jaxpr) for inner in _programs(eqn))])


def arguments(problem: Problem) -> tuple:
    """Return the arguments that every function here takes."""
    return problem.hparams, problem.params, problem.data, problem.val_data


# --- measuring -------------------------------------------------------------------------------------------------------


def timed(programs: dict[str, Any], unit: Callable, args, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Return quartiles of the time in units, called before and after, and of the first program's time over it.

    Programs take turns, every other time in the opposite order.
    """

    def clocks():
        return np.array([time.perf_counter(), time.process_time()])

    def seconds(program):
        calls, start = 0, clocks()
        while calls == 0 or (clocks() - start)[0] < 2e-2:
            jax.block_until_ready(program(*args))
            calls += 1
        return (clocks() - start) / calls

    turns = []
    for turn in range(1 + repeats):
        order = list(programs)[:: 1 - 2 * (turn % 2)]
        turns.append({name: (seconds(unit), seconds(programs[name]), seconds(unit)) for name in order})
    del turns[0]  # it warms up
    first = next(iter(programs))

    def quartiles(values):
        return [statistics.quantiles(column, n=4, method="inclusive") for column in zip(*values, strict=True)]

    rows = {}
    for name in programs:
        units = quartiles([own / ((before + after) / 2) for before, own, after in (turn[name] for turn in turns)])
        ratios = quartiles([turn[first][1] / turn[name][1] for turn in turns])
        rows[name] = {"time": units[0], "cg_over_it": ratios[0], "time_cpu": units[1], "cg_over_it_cpu": ratios[1]}
    return rows


def measured(functions: dict[str, Callable], problem: Problem, repeats: int) -> dict[str, dict[str, Any]]:
    """Measure arithmetic, iterations, memory and time of each program."""
    args = arguments(problem)

    def gradient(h, params, data, val_data):
        return jax.grad(problem.train_loss)(params, h, data)

    operations, size = executed(gradient, *args).operations, sum(x.nbytes for x in jax.tree.leaves(problem.params))
    programs: dict[str, Any] = {name: jax.jit(function).lower(*args).compile() for name, function in functions.items()}
    times = timed(programs, jax.jit(gradient).lower(*args).compile(), args, repeats)
    rows = {}
    for name, program in programs.items():
        ran = executed(functions[name], *args)
        memory = program.memory_analysis().temp_size_in_bytes / size
        row = {"iterations": ran.turns, "arithmetic": ran.operations / operations, "memory": memory}
        rows[name] = row | times[name]
    return rows


def compare_solvers(name: str, problem: Problem, settings: dict[str, float], repeats: int) -> list[dict[str, Any]]:
    makers = METHODS | {method: functools.partial(TUNED[method][0], settings[method]) for method in TUNED}
    functions, rows, want = {}, {}, reference(problem)
    for method, make in makers.items():
        rows[method] = {"problem": name, "method": method}
        try:
            functions[method] = make(problem)
            found = jax.jit(functions[method])(*arguments(problem))
            rows[method]["error"] = distance(found, want)
        except (ImportError, RuntimeError) as error:  # not installed, or it raises as it runs
            functions.pop(method, None)
            lines = str(error).splitlines() or [repr(error)]
            found = next((line for line in lines if "linear solver" in line), lines[0])
            rows[method]["missing"] = found.split(". ")[0]
    for method, row in measured(functions, problem, repeats).items():
        rows[method] |= row | ({"setting": settings[method]} if method in settings else {})
    return list(rows.values())


def compare_batching(problem: Problem, repeats: int) -> list[dict[str, Any]]:
    """Time the losses of the first validation examples, all as one vector-valued function, and the first alone."""

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
    """Draw a panel per quantity, a line per method, a colour per problem."""
    names = {"error": "relative error", "arithmetic": "arithmetic, gradients", "time": "time, gradients",
             "memory": "memory, copies of θ"}  # fmt: skip
    figure, axes = plot.figure(1, len(names), width=15, height=4.6)
    methods = [method for method in [*METHODS, *TUNED] if any(row["method"] == method for row in rows)]
    problems = list(dict.fromkeys(row["problem"] for row in rows if "error" in row))
    for axis, (key, label) in zip(axes.flat, names.items(), strict=True):
        for i, problem in enumerate(problems):
            mine = [row for row in rows if row["problem"] == problem and key in row]
            at = [methods.index(row["method"]) + 0.22 * (i - 1) for row in mine]
            middle = [row[key][1] if key == "time" else row[key] for row in mine]
            axis.plot(middle, at, "o", color=f"C{i}", label=problem, ms=6)
            if key == "time":
                axis.hlines(at, [row[key][0] for row in mine], [row[key][2] for row in mine], color=f"C{i}", lw=2)
        ticks = {"arithmetic": [20, 30, 40, 60], "time": [5, 10, 20, 50, 100], "memory": [10, 30, 100, 300]}.get(key)
        axis.set(xscale="log", xlabel=label, ylim=(len(methods) - 0.5, -0.5))
        axis.minorticks_off()
        if ticks:
            axis.set_xticks(ticks, map(str, ticks))
        axis.set_yticks(range(len(methods)), methods if key == "error" else [""] * len(methods))
        axis.grid(axis="x", alpha=0.3)
        axis.hlines([k + 0.5 for k in range(len(methods) - 1)], *axis.get_xlim(), color="0.85", lw=0.8)
    for row in (row for row in rows if "missing" in row):
        at = methods.index(row["method"]) + 0.22 * (problems.index(row["problem"]) - 1)
        axes.flat[0].annotate("fails", (0.5, at), xycoords=("axes fraction", "data"), va="center", fontsize=8,
                              color=f"C{problems.index(row['problem'])}")  # fmt: skip
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
    logging.getLogger("jax").setLevel(logging.CRITICAL)  # a peer that raises would log pages; its row says so
    repeats = 3 if parsed.quick else parsed.repeats
    sizes = (64, 32, 32, 10) if parsed.quick else (784, 256, 256, 10)
    makers = {"ridge": functools.partial(linear, "ridge", 100), "logistic": functools.partial(linear, "logistic", 200),
              "mlp": functools.partial(mlp, sizes)}  # fmt: skip
    file, rows = parsed.out / "implicit.json", []
    if file.exists():
        kept = json.loads(file.read_text())["rows"]
        rows = [row for row in kept if row["problem"].split(",")[0] not in parsed.problems]
    print(HEADER, flush=True)
    for name in parsed.problems:
        problem, settings = makers[name](seed=0), tuned(makers[name](seed=1))
        rows += told(compare_solvers(name, problem, settings, repeats))
        rows += told(compare_batching(problem, repeats)) if name == "mlp" else []
    rows.sort(key=lambda row: [*makers].index(row["problem"].split(",")[0]))
    report = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "cores": 1, "iterations": ITERATIONS}
    file.write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n")
    draw(rows, parsed.out / "implicit.png")


HEADER = (
    f"{'problem':20} {'method':33} {'error':>8} {'iterations':>10} {'arithmetic':>10} {'memory':>7} "
    f"{'time':>22} {'CG / it':>18} {'by processor':>18}"
)


def told(rows):
    for row in rows:
        if "missing" in row:
            print(f"{row['problem']:20} {row['method']:33} {row['missing']}", flush=True)
            continue
        quartiles = ("{1:.2f} ({0:.2f}, {2:.2f})".format(*row[key]) for key in ("time", "cg_over_it", "cg_over_it_cpu"))
        error, turns = row.get("error", row.get("difference")), row["iterations"] or "-"
        print(
            f"{row['problem']:20} {row['method']:33} {error:8.1e} {turns:>10} {row['arithmetic']:10.2f} "
            f"{row['memory']:7.1f} {next(quartiles):>22} {next(quartiles):>18} {next(quartiles):>18}",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    main()
