"""Error and time of jaxhpo's hypergradients, compared with betty, TorchOpt, higher and jaxopt.

Three inner problems with one log penalty per weight, trained by 100 steps of full-batch gradient descent: ridge and
logistic regression (2000 examples, 500 weights, from zeros) and an MLP 64-64-10 (tanh, 512 examples), whose penalties
apply to the change since its start, which keeps its Hessian positive definite. Two kinds of hypergradient: through the
100 steps, and implicit with 20 iterations of conjugate gradients after them; tolerances are set so low that all 20 are
run. jaxhpo's own CG stops where rounding ends its progress, so a further row has jaxhpo with JAX's CG, which runs all
20; the rows called default run to their own tolerance.

Data, starting points and hyperparameters are drawn once by NumPy, in numbers that float32 holds. The references are
float64, in NumPy: products with the Hessian by complex steps through gradients written by hand, the exact minimiser
(ridge in closed form, logistic by Newton's method) and a dense solve for the implicit kind; for the MLP the
implicit formula at the point that the steps reach. Errors are relative, ‖g − g*‖/‖g*‖.

Times: one worker per float type and number of threads (one thread: pinned to one core), which interleaves all rows in
one process. Compilation is reported separately. The error that 20 iterations leave is the same for all rows, so their
distance from the hand-written torch row is reported too. A ratio is the median over the turns, its unit torch's loop
with `create_graph=True`. A row that cannot run says why.

    python benchmarks/peers.py [--repeats 7] [--quick] [--out DIR]
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.sparse.linalg import LinearOperator, cg

import jaxhpo
from jaxhpo import plot

NUM_STEPS, ITERATIONS = 100, 20
NEVER = 1e-30  # a tolerance that is not reached
KINDS = ("unrolled", "implicit")
PACKAGES = {"torch": "torch", "torchopt": "torchopt", "higher": "higher", "betty": "betty-ml", "jaxopt": "jaxopt"}
UNIT = "torch, by hand"
# What is asked of one thread, ridge and logistic: times faster than the fastest torch row, and errors.
FASTER = {"unrolled": 2.0, "implicit": 3.5}
MOST_ERROR = {"float32": 2.0, "float64": 1e-9}  # times the least of the torch rows; absolute
WRONG = 0.1  # the error from which a row is no hypergradient, and none to be faster than


# --- the problems and their references, in NumPy ----------------------------------------------------------------------


class Problem(NamedTuple):
    """Lists of parameters, and of log penalties like them; (inputs, targets) of the two parts."""

    name: str
    params: list[np.ndarray]
    hparams: list[np.ndarray]
    train: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray]
    step_size: float


def make_problem(name: str, quick: bool) -> Problem:
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32).astype(float)

    if name == "mlp":
        count, shapes = (64, [(8, 8), (8,), (8, 4), (4,)]) if quick else (512, [(64, 64), (64,), (64, 10), (10,)])
        params = [normal(*shape) * (0.125 if len(shape) == 2 else 0.0) for shape in shapes]
        truth = normal(shapes[0][0], shapes[-1][0])
        inputs = [normal(count, shapes[0][0]) for _ in range(2)]
        targets = [(x @ truth + 3 * normal(*(x @ truth).shape)).argmax(1) for x in inputs]
        step_size, centre = 0.3, -1.6
    else:
        counts, dim = ((100, 50), 10) if quick else ((2000, 1000), 500)
        params, truth = [np.zeros(dim)], normal(dim) / dim**0.5
        inputs = [normal(count, dim) for count in counts]
        targets = [(x @ truth + normal(len(x))).astype(np.float32).astype(float) for x in inputs]
        if name == "logistic":
            targets = [np.where(y > 0, 1.0, -1.0) for y in targets]
        step_size, centre = (0.7 if name == "ridge" else 2.5), -2.3
    hparams = [(centre + 0.3 * normal(*p.shape)).astype(np.float32).astype(float) for p in params]
    return Problem(name, params, hparams, (inputs[0], targets[0]), (inputs[1], targets[1]), step_size)


def predict(params, inputs, tanh):
    """Return the outputs, in the library of the arrays."""
    if len(params) == 1:
        return inputs @ params[0]
    weights, bias, last, last_bias = params
    return tanh(inputs @ weights + bias) @ last + last_bias


def from_start(problem: Problem, params, start) -> list:
    """Return the penalised quantity: the weights, or for the MLP their change (at zero its Hessian is indefinite)."""
    return [p - s for p, s in zip(params, start, strict=True)] if problem.name == "mlp" else params


def mean_gradient(name: str, params: list, inputs, targets) -> list:
    """Return the mean loss's gradient, without penalty; it is analytic, for complex steps."""
    if name == "ridge":
        return [inputs.T @ (inputs @ params[0] - targets) / len(targets)]
    if name == "logistic":
        return [inputs.T @ (-targets / (1 + np.exp(targets * (inputs @ params[0])))) / len(targets)]
    hidden = np.tanh(inputs @ params[0] + params[1])
    logits = hidden @ params[2] + params[3]
    exps = np.exp(logits - logits.real.max(1, keepdims=True))
    errors = (exps / exps.sum(1, keepdims=True) - np.eye(logits.shape[1])[targets]) / len(targets)
    inner = errors @ params[2].T * (1 - hidden**2)
    return [inputs.T @ inner, inner.sum(0), hidden.T @ errors, errors.sum(0)]


def references(problem: Problem) -> dict[str, np.ndarray]:
    """The hypergradients of both kinds, flat.

    With D = diag(e^h) the gradient of the inner objective is g = ∇L + D δ, where δ is θ, for the MLP θ − θ₀; so
    H = ∇²L + D and (∂g/∂h)ᵀ v = D δ ∘ v.
    """
    ends = np.cumsum([p.size for p in problem.params])[:-1]
    penalty = np.exp(np.concatenate([h.ravel() for h in problem.hparams]))
    start = np.concatenate([p.ravel() for p in problem.params])

    def move(theta):
        return theta - start if problem.name == "mlp" else theta

    def mean(theta, part):
        params = [x.reshape(p.shape) for x, p in zip(np.split(theta, ends), problem.params, strict=True)]
        return np.concatenate([g.ravel() for g in mean_gradient(problem.name, params, *part)])

    def gradient(theta):
        return mean(theta, problem.train) + penalty * move(theta)

    def product(theta, v):
        return np.imag(gradient(theta + 1e-30j * v)) / 1e-30

    path = [start]
    for _ in range(NUM_STEPS):
        path.append(path[-1] - problem.step_size * gradient(path[-1]))
    back, unrolled = mean(path[-1], problem.validation), np.zeros_like(start)
    for theta in path[-2::-1]:  # a_t = (I − ηH) a_{t+1}, and the sum of −η D δ_t ∘ a_{t+1}
        unrolled -= problem.step_size * penalty * move(theta) * back
        back = back - problem.step_size * product(theta, back)

    theta, inputs = path[-1], problem.train[0]
    if problem.name == "mlp":
        operator = LinearOperator((len(theta),) * 2, matvec=lambda v: product(theta, v), dtype=float)
        right = mean(theta, problem.validation)
        solved, failed = cg(operator, right, rtol=1e-13, maxiter=5000)
        if failed:
            raise RuntimeError("conjugate gradients did not converge for the MLP's reference")
        return {"unrolled": unrolled, "implicit": -penalty * move(theta) * solved}

    def hessian(theta):
        p = 1 / (1 + np.exp(-inputs @ theta))
        curvature = np.ones(len(inputs)) if problem.name == "ridge" else p * (1 - p)
        return inputs.T @ (inputs * curvature[:, None]) / len(inputs) + np.diag(penalty)

    for _ in range(10):  # Newton's method: of a quadratic the first step is the closed form
        theta = theta - np.linalg.solve(hessian(theta), gradient(theta))
    solved = np.linalg.solve(hessian(theta), mean(theta, problem.validation))
    return {"unrolled": unrolled, "implicit": -penalty * move(theta) * solved}


# --- the rows in JAX --------------------------------------------------------------------------------------------------


def jax_losses(problem: Problem):
    """Return `(params, hparams, train) -> scalar` and `(params, validation) -> scalar`."""
    losses = {
        "ridge": lambda out, y: 0.5 * (out - y) ** 2,
        "logistic": lambda out, y: jax.nn.softplus(-y * out),
        "mlp": optax.softmax_cross_entropy_with_integer_labels,
    }

    def val_loss(params, batch):
        return losses[problem.name](predict(params, batch[0], jnp.tanh), batch[1]).mean()

    def train_loss(params, hparams, batch):
        moves = from_start(problem, params, problem.params)
        penalty = sum(jnp.sum(jnp.exp(h) * p**2) for h, p in zip(hparams, moves, strict=True))
        return val_loss(params, batch) + 0.5 * penalty

    return train_loss, val_loss


def compiled(problem: Problem, train: Callable) -> Callable:
    """Return the compiled hypergradient of the validation loss after `train(hparams, params, batch)`."""
    _, val_loss = jax_losses(problem)

    def outer(hparams, params, batch, validation):
        return val_loss(train(hparams, params, batch), validation)

    args = jax.tree.map(jnp.asarray, (problem.hparams, problem.params, problem.train, problem.validation))
    program = jax.jit(jax.grad(outer)).lower(*args).compile()
    return lambda: jax.block_until_ready(program(*args))


def jaxhpo_row(adjoint: Any, problem: Problem) -> Callable:
    solver = jaxhpo.from_optax(jax_losses(problem)[0], optax.sgd(problem.step_size))

    def train(hparams, params, batch):
        start = solver.init(params, hparams)
        return jaxhpo.solve(solver, start, hparams, lambda t: batch, num_steps=NUM_STEPS, adjoint=adjoint).params

    return compiled(problem, train)


def jax_cg(matvec, b, x0=None):
    """JAX's conjugate gradients, with no stop but the last iteration, as a linear solver of jaxhpo.

    Wrapped once more, because `jax.scipy.sparse.linalg.cg` itself cannot be transposed.
    """

    def solve(matvec, b):
        return jax.scipy.sparse.linalg.cg(matvec, b, tol=0.0, maxiter=ITERATIONS)[0]

    return jax.lax.custom_linear_solve(matvec, b, solve, symmetric=True), None


def descend(problem: Problem, params, hparams, batch):
    """Gradient descent in plain JAX."""
    train_loss, _ = jax_losses(problem)

    def step(params, _):
        grads = jax.grad(train_loss)(params, hparams, batch)
        return jax.tree.map(lambda p, g: p - problem.step_size * g, params, grads), None

    return jax.lax.scan(step, params, length=NUM_STEPS)[0]


def jax_unrolled(problem: Problem) -> Callable:
    return compiled(problem, lambda hparams, params, batch: descend(problem, params, hparams, batch))


def jaxopt_unrolled(problem: Problem) -> Callable:
    solver = importlib.import_module("jaxopt").GradientDescent(
        jax_losses(problem)[0],
        stepsize=problem.step_size,
        maxiter=NUM_STEPS,
        tol=0.0,
        acceleration=False,
        implicit_diff=False,
        unroll=True,
    )
    return compiled(problem, lambda hparams, params, batch: solver.run(params, hparams, batch).params)


def jaxopt_implicit(default: bool, problem: Problem) -> Callable:
    jaxopt = importlib.import_module("jaxopt")
    settings = {}
    if not default:
        settings["solve"] = functools.partial(jaxopt.linear_solve.solve_cg, tol=0.0, maxiter=ITERATIONS)

    @jaxopt.implicit_diff.custom_root(jax.grad(jax_losses(problem)[0]), **settings)
    def solve(params, hparams, batch):
        return descend(problem, params, hparams, batch)

    return compiled(problem, lambda hparams, params, batch: solve(params, hparams, batch))


# --- the rows in torch ------------------------------------------------------------------------------------------------


class Torch(NamedTuple):
    """A problem's tensors and losses, `(params, hparams) -> scalar` and `params -> scalar`."""

    torch: Any
    params: list
    hparams: list
    train_loss: Callable
    val_loss: Callable

    def fresh(self) -> tuple[list, list]:
        return [[x.clone().requires_grad_() for x in xs] for xs in (self.params, self.hparams)]

    def module(self, tensors) -> Any:
        made = type("Arrays", (self.torch.nn.Module,), {})()  # higher wants a class of one's own
        for i, x in enumerate(tensors):
            made.register_parameter(f"array_{i}", self.torch.nn.Parameter(x.clone()))
        return made


def in_torch(problem: Problem) -> Torch:
    torch = importlib.import_module("torch")
    functional = torch.nn.functional
    losses = {
        "ridge": lambda out, y: 0.5 * (out - y).square().mean(),
        "logistic": lambda out, y: functional.softplus(-y * out).mean(),
        "mlp": functional.cross_entropy,
    }
    start, hparams, train, validation = (
        [torch.tensor(x) for x in part] for part in (problem.params, problem.hparams, problem.train, problem.validation)
    )

    def mean_loss(params, part):
        return losses[problem.name](predict(params, part[0], torch.tanh), part[1])

    def train_loss(params, hparams):
        moves = from_start(problem, params, start)
        penalty = sum((h.exp() * p.square()).sum() for h, p in zip(hparams, moves, strict=True))
        return mean_loss(params, train) + 0.5 * penalty

    return Torch(torch, start, hparams, train_loss, lambda params: mean_loss(params, validation))


def torch_unrolled(problem: Problem) -> Callable:
    t = in_torch(problem)

    def run():
        params, hparams = t.fresh()
        for _ in range(NUM_STEPS):
            grads = t.torch.autograd.grad(t.train_loss(params, hparams), params, create_graph=True)
            params = [p - problem.step_size * g for p, g in zip(params, grads, strict=True)]
        return t.torch.autograd.grad(t.val_loss(params), hparams)

    return run


def torch_trained(t: Torch, params, hparams, step_size: float) -> list:
    """Gradient descent without a graph of its steps."""
    for _ in range(NUM_STEPS):
        params = [p.detach().requires_grad_() for p in params]
        with t.torch.enable_grad():
            grads = t.torch.autograd.grad(t.train_loss(params, hparams), params)
        params = [p.detach() - step_size * g for p, g in zip(params, grads, strict=True)]
    return params


def torch_implicit(problem: Problem) -> Callable:
    t = in_torch(problem)

    def dot(a, b):
        return sum((x * y).sum() for x, y in zip(a, b, strict=True))

    def add(a, scale, b):
        return [x + scale * y for x, y in zip(a, b, strict=True)]

    def run():
        params, hparams = t.fresh()
        params = [p.requires_grad_() for p in torch_trained(t, params, t.hparams, problem.step_size)]
        grads = t.torch.autograd.grad(t.train_loss(params, hparams), params, create_graph=True)
        r = p = t.torch.autograd.grad(t.val_loss(params), params)
        x, rr = [t.torch.zeros_like(v) for v in r], dot(r, r)
        for _ in range(ITERATIONS):
            ap = t.torch.autograd.grad(grads, params, p, retain_graph=True)
            step = rr / dot(p, ap)
            x, r = add(x, step, p), add(r, -step, ap)
            rr, before = dot(r, r), rr
            p = add(r, rr / before, p)
        return [-g for g in t.torch.autograd.grad(grads, hparams, x)]

    return run


def torchopt_meta(problem: Problem) -> Callable:
    torchopt, t = importlib.import_module("torchopt"), in_torch(problem)

    def run():
        _, hparams = t.fresh()
        net = t.module(t.params)
        optimiser = torchopt.MetaSGD(net, lr=problem.step_size)
        for _ in range(NUM_STEPS):
            optimiser.step(t.train_loss(list(net.parameters()), hparams))
        return t.torch.autograd.grad(t.val_loss(list(net.parameters())), hparams)

    return run


def torchopt_functional(problem: Problem) -> Callable:
    torchopt, t = importlib.import_module("torchopt"), in_torch(problem)

    def run():
        params, hparams = (tuple(xs) for xs in t.fresh())
        optimiser = torchopt.sgd(lr=problem.step_size)
        state = optimiser.init(params)
        for _ in range(NUM_STEPS):
            grads = t.torch.autograd.grad(t.train_loss(params, hparams), params, create_graph=True)
            updates, state = optimiser.update(grads, state, params=params, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
        return t.torch.autograd.grad(t.val_loss(params), hparams)

    return run


def torchopt_implicit(problem: Problem) -> Callable:
    torchopt, t = importlib.import_module("torchopt"), in_torch(problem)
    linear = torchopt.linear_solve.solve_cg(maxiter=ITERATIONS, rtol=0.0, atol=0.0)

    @torchopt.diff.implicit.custom_root(t.torch.func.grad(t.train_loss, argnums=0), argnums=1, solve=linear)
    def solve(params, hparams):
        return tuple(torch_trained(t, params, [h.detach() for h in hparams], problem.step_size))

    def run():
        params, hparams = t.fresh()
        return t.torch.autograd.grad(t.val_loss(solve(tuple(params), tuple(hparams))), hparams)

    return run


def higher_unrolled(problem: Problem) -> Callable:
    higher, t = importlib.import_module("higher"), in_torch(problem)

    def run():
        _, hparams = t.fresh()
        net = t.module(t.params)
        optimiser = t.torch.optim.SGD(net.parameters(), lr=problem.step_size)
        with higher.innerloop_ctx(net, optimiser, copy_initial_weights=False) as (patched, differentiable):
            for _ in range(NUM_STEPS):
                differentiable.step(t.train_loss(list(patched.parameters()), hparams))
            return t.torch.autograd.grad(t.val_loss(list(patched.parameters())), hparams)

    return run


def betty_row(kind: str, problem: Problem) -> Callable:
    """Return betty's hypergradient, caught before its outer optimiser uses it, as betty does not return one."""
    t = in_torch(problem)
    configs, problems = (importlib.import_module(f"betty.{part}") for part in ("configs", "problems"))
    betty_engine = importlib.import_module("betty.engine")
    importlib.import_module("betty.logging").get_logger().setLevel("ERROR")
    if kind == "unrolled":
        base = importlib.import_module("betty.problems.iterative_problem_higher").HigherIterativeProblem
        above = configs.Config(first_order=False, retain_graph=True)
        below = configs.Config(unroll_steps=NUM_STEPS)
    else:
        base = problems.ImplicitProblem
        above = configs.Config(retain_graph=True)
        below = configs.Config(type="cg", cg_iterations=ITERATIONS, cg_alpha=1.0, unroll_steps=NUM_STEPS)

    class Inner(base):
        def training_step(self, batch):
            return t.train_loss(self.trainable_parameters(), self.outer.trainable_parameters())

    class Outer(problems.ImplicitProblem):
        def training_step(self, batch):
            return t.val_loss(self.inner.trainable_parameters())

        def param_callback(self, params):
            self.caught = [p.grad for p in params]

    def run():
        levels = {}
        for name, cls, config, tensors, rate in (
            ("outer", Outer, above, t.hparams, 0.0),
            ("inner", Inner, below, t.params, problem.step_size),
        ):
            net = t.module(tensors)
            optimiser = t.torch.optim.SGD(net.parameters(), lr=rate)
            levels[name] = cls(name, config, module=net, optimizer=optimiser, train_data_loader=[()])
        outer, inner = levels["outer"], levels["inner"]
        links = {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}}
        config = configs.EngineConfig(train_iters=NUM_STEPS, valid_step=NUM_STEPS + 1)
        betty_engine.Engine([outer, inner], config=config, dependencies=links).run()
        return outer.caught

    return run


# --- measuring --------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    library: str
    method: str
    kind: str
    make: Callable[[Problem], Callable]


CG_ROW = f"Implicit(CG({ITERATIONS}))"
ROWS = (
    Row(
        "jaxhpo",
        "Unroll(checkpoint='sqrt')",
        "unrolled",
        functools.partial(jaxhpo_row, jaxhpo.Unroll(checkpoint="sqrt")),
    ),
    Row("jaxhpo", "Unroll(checkpoint=None)", "unrolled", functools.partial(jaxhpo_row, jaxhpo.Unroll(checkpoint=None))),
    Row("jax", "by hand", "unrolled", jax_unrolled),
    Row("jaxopt", "GradientDescent(unroll=True)", "unrolled", jaxopt_unrolled),
    Row("torch", "by hand", "unrolled", torch_unrolled),
    Row("torchopt", "MetaSGD", "unrolled", torchopt_meta),
    Row("torchopt", "sgd, functional", "unrolled", torchopt_functional),
    Row("higher", "innerloop_ctx", "unrolled", higher_unrolled),
    Row("betty", "HigherIterativeProblem", "unrolled", functools.partial(betty_row, "unrolled")),
    Row(
        "jaxhpo",
        CG_ROW,
        "implicit",
        functools.partial(jaxhpo_row, jaxhpo.Implicit(jaxhpo.CG(ITERATIONS, tol=NEVER))),
    ),
    Row("jaxhpo", "Implicit(), default", "implicit", functools.partial(jaxhpo_row, jaxhpo.Implicit())),
    Row("jaxhpo", "Implicit(JAX's CG)", "implicit", functools.partial(jaxhpo_row, jaxhpo.Implicit(jax_cg))),
    Row("jaxopt", "custom_root, solve_cg", "implicit", functools.partial(jaxopt_implicit, False)),
    Row("jaxopt", "custom_root, default", "implicit", functools.partial(jaxopt_implicit, True)),
    Row("torch", "by hand", "implicit", torch_implicit),
    Row("torchopt", "custom_root, solve_cg", "implicit", torchopt_implicit),
    Row("betty", "type='cg'", "implicit", functools.partial(betty_row, "implicit")),
)
IN_TORCH = ("torch", "torchopt", "higher", "betty")


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def iterations_run(problem: Problem) -> int:
    """Return the iterations that jaxhpo's CG takes before it stops."""
    train_loss, val_loss = jax_losses(problem)

    def count(hparams, params, batch, validation):
        theta = descend(problem, params, hparams, batch)
        _, matvec = jax.linearize(lambda p: jax.grad(train_loss)(p, hparams, batch), theta)
        _, info = jaxhpo.CG(ITERATIONS, tol=NEVER)(matvec, jax.grad(val_loss)(theta, validation))
        return info.num_iterations

    args = jax.tree.map(jnp.asarray, (problem.hparams, problem.params, problem.train, problem.validation))
    return int(jax.jit(count)(*args))


def measure(problem: Problem, repeats: int, wanted: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Measure every row of one problem, interleaved, after a first call of each."""
    measured, calls, grads_of = [], [], {}
    for row in ROWS:
        found = {"problem": problem.name, "kind": row.kind, "library": row.library, "method": row.method}
        measured.append(found)
        try:
            start = time.perf_counter()
            call = row.make(problem)
            made = time.perf_counter()
            grads = call()
            first = time.perf_counter() - made
        except Exception as error:
            found["failed"] = reason(error)
            continue
        grad, exact = np.concatenate([np.ravel(np.asarray(g)) for g in grads]), wanted[row.kind]
        found["error"] = float(np.linalg.norm(grad - exact) / np.linalg.norm(exact))
        found["cosine"] = float(grad @ exact / np.linalg.norm(grad) / np.linalg.norm(exact))
        found |= {"prepare_seconds": made - start, "first_seconds": first, "seconds": []}
        if row.method == CG_ROW:
            found["iterations"] = iterations_run(problem)
        grads_of[row] = found, grad
        calls.append((call, found["seconds"]))
    by_hand = {row.kind: grad for row, (_, grad) in grads_of.items() if f"{row.library}, {row.method}" == UNIT}
    for row, (found, grad) in grads_of.items():
        if row.kind in by_hand:
            unit = by_hand[row.kind]
            found["from_by_hand"] = float(np.linalg.norm(grad - unit) / np.linalg.norm(unit))
    for _ in range(repeats):
        for call, seconds in calls:
            gc.collect()
            gc.disable()  # one row's garbage is not another's time
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
            gc.enable()
    return measured


def worker(folder: pathlib.Path, dtype: str, threads: int, repeats: int, quick: bool) -> None:
    """Measure all problems in this process, and write a file into the folder."""
    if threads == 1 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    jax.config.update("jax_enable_x64", dtype == "float64")
    warnings.simplefilter("ignore")
    versions = {}
    for name, package in PACKAGES.items():
        try:
            importlib.import_module(name)
            versions[name] = metadata.version(package)
        except Exception as error:
            versions[name] = reason(error)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    wanted, rows = np.load(folder / "references.npz"), []
    for name in ("ridge", "logistic", "mlp"):
        problem = jax.tree.map(
            lambda x: x.astype(dtype) if isinstance(x, np.ndarray) and x.dtype == float else x,
            make_problem(name, quick),
        )
        exact = {kind: wanted[f"{name} {kind}"] for kind in KINDS}
        rows += [row | {"dtype": dtype, "threads": threads} for row in measure(problem, repeats, exact)]
    (folder / f"{dtype} {threads}.json").write_text(json.dumps({"rows": rows, "versions": versions}))


def measured_apart(dtype: str, threads: int, repeats: int, quick: bool, folder: pathlib.Path) -> dict[str, Any]:
    """Return the measurements of a worker with this number of threads."""
    single = {
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = [sys.executable, __file__, "--worker", folder, "--dtype", dtype, "--threads", threads]
    command += ["--repeats", repeats, *["--quick"] * quick]
    subprocess.run(list(map(str, command)), check=True, env=os.environ | (single if threads == 1 else {}))
    return json.loads((folder / f"{dtype} {threads}.json").read_text())


def quartiles(values) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


def ratios(above: dict, below: dict) -> list[float]:
    """Return quartiles of the interleaved ratios of two rows' seconds."""
    return quartiles([a / b for a, b in zip(above["seconds"], below["seconds"], strict=True)])


def case(row) -> tuple:
    return row["problem"], row["dtype"], row["threads"]


def gates(rows) -> list[dict[str, Any]]:
    """Compare each row of jaxhpo with its target, on one thread, for ridge and logistic regression."""
    judged = []
    for ours in rows:
        if ours["library"] != "jaxhpo" or ours["threads"] != 1 or ours["problem"] == "mlp" or "failed" in ours:
            continue
        theirs = [r for r in rows if case(r) == case(ours) and r["kind"] == ours["kind"] and r["library"] in IN_TORCH]
        theirs = [row for row in theirs if "failed" not in row and row["error"] < WRONG]
        if not theirs:
            continue
        fastest = min(theirs, key=lambda row: statistics.median(row["seconds"]))
        least, dtype = min(row["error"] for row in theirs), ours["dtype"]
        faster, judged_error = ratios(fastest, ours), ours["error"] / (least if dtype == "float32" else 1)
        judged.append(
            {key: ours[key] for key in ("problem", "dtype", "kind", "method")}
            | {
                "fastest": f"{fastest['library']}, {fastest['method']}",
                "times_faster": faster,
                "at_least": FASTER[ours["kind"]],
                "fast_enough": faster[1] >= FASTER[ours["kind"]],
                "error": ours["error"],
                "least_error_in_torch": least,
                "close_enough": judged_error <= MOST_ERROR[dtype],
            }
        )
    return judged


def summarised(rows) -> list[dict[str, Any]]:
    """Replace the seconds of each row by quartiles, after taking their ratios to the unit."""
    out = []
    units = {case(r): r for r in rows if r["kind"] == "unrolled" and f"{r['library']}, {r['method']}" == UNIT}
    for row in rows:
        if "failed" not in row:
            unit = units[case(row)]
            row = (
                row
                | {"seconds": quartiles(row["seconds"]), "repeats": len(row["seconds"])}
                | ({} if "failed" in unit else {"time": ratios(row, unit)})
            )
        out.append(row)
    return out


def table(rows, judged) -> str:
    lines = []
    for row in rows:
        label = f"{row['problem']:9}{row['dtype']:9}{row['threads']:2} {row['kind']:9} {row['library']:9}"
        label += f"{row['method']:29}"
        if "failed" in row:
            lines.append(f"{label} failed: {row['failed']}")
            continue
        low, middle, high = (1e3 * s for s in row["seconds"])
        told = f"{row['error']:9.1e} {row.get('from_by_hand', np.nan):9.1e} "
        told += f"{middle:8.2f} ms ({low:.2f}, {high:.2f}), first {row['prepare_seconds']:.2f} s"
        told += f", {row['time'][1]:.3f} loops" if "time" in row else ""
        lines.append(f"{label} {told}" + (f", {row['iterations']} iterations" if "iterations" in row else ""))
    for gate in judged:
        low, middle, high = gate["times_faster"]
        fast, close = ("yes" if gate[key] else "NO" for key in ("fast_enough", "close_enough"))
        lines.append(
            f"{gate['problem']}, {gate['dtype']}, {gate['method']}: {middle:.2f} ({low:.2f}, {high:.2f}) times faster "
            f"than {gate['fastest']}, asked {gate['at_least']}: {fast}; error {gate['error']:.1e}, theirs "
            f"{gate['least_error_in_torch']:.1e}: {close}"
        )
    return "\n".join(lines)


def draw(rows, path) -> None:
    """Draw a panel per kind and problem: times on one thread and on all, with the errors."""
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    figure, axes = plot.figure(len(KINDS), len(problems), width=17, height=8.5)
    most = max(row["threads"] for row in rows)
    for (i, kind), (j, problem) in ((a, b) for a in enumerate(KINDS) for b in enumerate(problems)):
        axis, methods = axes[i, j], [row for row in ROWS if row.kind == kind]
        for place, method in enumerate(methods):
            mine = (problem, kind, method.library, method.method)
            found = [r for r in rows if (r["problem"], r["kind"], r["library"], r["method"]) == mine]
            color = "C0" if method.library == "jaxhpo" else "C1" if method.library in IN_TORCH else "C2"
            ran = [row for row in found if "failed" not in row]
            for row in ran:
                y = place + (0.17 if row["dtype"] == "float64" else -0.17)
                low, middle, high = (1e3 * s for s in row["seconds"])
                fill = color if row["dtype"] == "float32" else "white"
                if row["threads"] == 1:
                    axis.plot([low, high], [y] * 2, color=color, lw=1.5)
                    axis.plot(middle, y, "o", color=color, mfc=fill, ms=6)
                else:
                    axis.plot(middle, y, "|", color="0.3", ms=8, mew=1.5)
            errors = [f"{row['error']:.0e}" for row in ran if row["threads"] == 1]
            told = ", ".join(errors) or f"failed: {next((r['failed'] for r in found), '').split(':')[0]}"
            axis.text(1.02, place, told, transform=axis.get_yaxis_transform(), va="center", fontsize=8)
        axis.set_yticks(range(len(methods)), [f"{row.library}: {row.method}" for row in methods] if j == 0 else [])
        axis.set(ylim=(len(methods) - 0.5, -0.5), xscale="log", title=f"{problem}, {kind}")
        axis.set_xlabel("milliseconds for one hypergradient")
        limits = axis.get_xlim()
        ticks = [t * 10.0**k for k in range(-2, 5) for t in (1, 2, 5) if limits[0] <= t * 10.0**k <= limits[1]]
        axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axis.minorticks_off()
        axis.set_xlim(limits)
        axis.grid(color="0.9")
        axis.set_axisbelow(True)
        axis.text(1.02, 1.01, "errors", transform=axis.transAxes, fontsize=8, va="bottom", style="italic")
    more = f"; tick: {most} threads" if most > 1 else ""
    figure.suptitle(
        f"{NUM_STEPS} inner steps, and {ITERATIONS} iterations of CG, on one thread: filled float32, hollow float64, "
        f"line between quartiles{more}; compiled before"
    )
    plot.save(figure, path)


def processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor()


def write(out: pathlib.Path, settings, versions, rows) -> None:
    judged, rows = gates(rows), summarised(rows)
    print(table(rows, judged))
    out.mkdir(parents=True, exist_ok=True)
    report = {"settings": settings, "versions": versions, "gates": judged, "rows": rows}
    (out / "peers.json").write_text(json.dumps(report, indent=1, default=float) + "\n")
    draw(rows, out / "peers.png")


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parser.add_argument("--repeats", type=int, default=7, help="timed turns, at least 2")
    parser.add_argument("--quick", action="store_true", help="small problems, few turns, one thread")
    parser.add_argument("--worker", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    if parsed.worker:
        return worker(parsed.worker, parsed.dtype, parsed.threads, parsed.repeats, parsed.quick)
    repeats, cores = (2 if parsed.quick else parsed.repeats), os.cpu_count() or 1
    rows, versions = [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        made = {p: references(make_problem(p, parsed.quick)) for p in ("ridge", "logistic", "mlp")}
        np.savez(folder / "references.npz", **{f"{p} {kind}": made[p][kind] for p in made for kind in KINDS})
        for threads in [1] if parsed.quick else sorted({1, cores}):
            for dtype in ["float32"] if parsed.quick else list(MOST_ERROR):
                found = measured_apart(dtype, threads, repeats, parsed.quick, folder)
                rows, versions = rows + found["rows"], found["versions"]
    versions |= {"jax": jax.__version__, "python": platform.python_version()}
    settings = {"num_steps": NUM_STEPS, "iterations": ITERATIONS, "repeats": repeats, "quick": parsed.quick}
    write(parsed.out, settings | {"processor": processor(), "cores": cores}, versions, rows)


if __name__ == "__main__":
    main()
