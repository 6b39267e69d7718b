"""Cost of unrolled hypergradients in arithmetic, memory and time, for each checkpoint schedule.

Three inner problems: an MLP 784-256-256-10 (gelu, minibatches of 128), a causal transformer language model (4 layers by
a scan, width 128, 4 heads, vocabulary 256, 8 sequences of 128, 0.87 million parameters) and a small one (2 layers,
width 32, 2 heads, vocabulary 128, 8 sequences of 32, 34 thousand parameters), trained by SGD with momentum or Adam.
Hyperparameters: a log decay per weight, a log learning rate per step, a log weight per example, alone or all together.
The library's schedules are compared with plain JAX: `jax.grad` through a hand-written scan of the same step, and the
same with `jax.checkpoint` around the step.

Arithmetic: matrix products of the traced program, loops multiplied, in units of T plain steps. Memory: what the
compiled program allocates, in copies of the parameters P. Neither is noisy. Time (`--repeats`): the median of
interleaved ratios to the plain training in the same run, with the quartiles. Other cases in the file in DIR are kept.

    python benchmarks/unroll.py [--models mlp lm small] [--optimisers sgd adam] [--steps 10 50 200 1000]
        [--hyperparameters decay rate example all] [--schedules default checkpoint=1 ...] [--repeats 0] [--out DIR]
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxhpo
from jaxhpo import plot
from jaxhpo._core.cost import count_arithmetic

KEY = jax.random.key(3)  # of random parts of minibatches
RATE, BATCHES = {"sgd": 1e-2, "adam": 1e-3, "momentum": 1e-1}, 20
MOMENTUM = 0.9
RULES = {
    "plain JAX": None,
    "jax.checkpoint a step": None,
    "checkpoint=None": jaxhpo.Unroll(checkpoint=None),
    "checkpoint=1": jaxhpo.Unroll(checkpoint=1),
    "checkpoint='sqrt'": jaxhpo.Unroll(checkpoint="sqrt"),
    "default": jaxhpo.Unroll(),
    "checkpoint='binomial'": jaxhpo.Unroll(checkpoint="binomial"),
    "'sqrt', hvp_fraction=0.25": jaxhpo.Unroll(checkpoint="sqrt", hvp_fraction=0.25),
}
KEYS = ("model", "optimiser", "num_steps", "hyperparameters", "schedule")
# Beyond this many gigabytes a schedule is compiled for its memory, but neither timed nor run.
MOST = 4.0


class Model(NamedTuple):
    """Parameters, `(params, inputs, labels) -> a loss per example`, and `(key, leading axes) -> (inputs, labels)`."""

    params: Any
    losses: Callable
    draw: Callable
    batch: int


def mlp() -> Model:
    sizes, batch = (784, 256, 256, 10), 128
    keys = jax.random.split(jax.random.key(0), len(sizes))
    shapes = zip(keys[1:], sizes[:-1], sizes[1:], strict=True)
    params = [(jax.random.normal(key, (a, b)) / a**0.5, jnp.zeros(b)) for key, a, b in shapes]

    def losses(params, inputs, labels):
        *hidden, (last, bias) = params
        for weights, b in hidden:
            inputs = jax.nn.gelu(inputs @ weights + b)
        return optax.softmax_cross_entropy_with_integer_labels(inputs @ last + bias, labels)

    def draw(key, *lead):
        return jax.random.normal(key, (*lead, batch, 784)), jax.random.randint(key, (*lead, batch), 0, 10)

    return Model(params, losses, draw, batch)


def language_model(
    layers: int = 4,
    width: int = 128,
    heads: int = 4,
    vocabulary: int = 256,
    length: int = 128,
    batch: int = 8,
    dtype: Any = jnp.float32,
) -> Model:
    """Weights and activations have type `dtype`, the losses float32."""
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def weights(*shape):
        return 0.02 * jax.random.normal(next(keys), shape, dtype)

    params = {
        "embedding": weights(vocabulary, width),
        "position": weights(length, width),
        "output": weights(width, vocabulary),
        "layers": {
            "qkv": weights(layers, width, 3 * width),
            "out": weights(layers, width, width),
            "up": weights(layers, width, 4 * width),
            "down": weights(layers, 4 * width, width),
        },
    }
    causal = jnp.tril(jnp.ones((length, length), bool))

    def normalised(x):
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5)

    def block(x, w):
        q, k, v = jnp.moveaxis((normalised(x) @ w["qkv"]).reshape(*x.shape[:2], 3, heads, -1), 2, 0)
        scores = jnp.einsum("bshd,bthd->bhst", q, k) / (width / heads) ** 0.5
        scores = jax.nn.softmax(jnp.where(causal, scores, -1e9))
        x = x + jnp.einsum("bhst,bthd->bshd", scores, v).reshape(x.shape) @ w["out"]
        return x + jax.nn.gelu(normalised(x) @ w["up"]) @ w["down"], None

    def losses(params, tokens, labels):
        x, _ = jax.lax.scan(block, params["embedding"][tokens] + params["position"], params["layers"])
        logits = (normalised(x) @ params["output"]).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(-1)

    def draw(key, *lead):
        return tuple(jax.random.randint(k, (*lead, batch, length), 0, vocabulary) for k in jax.random.split(key))

    return Model(params, losses, draw, batch)


def small_language_model() -> Model:
    """A transformer of two layers: plain autodiff through 100 steps takes less than 1 GiB."""
    return language_model(layers=2, width=32, heads=2, vocabulary=128, length=32)


MODELS = {"mlp": mlp, "lm": language_model, "small": small_language_model}


class Case(NamedTuple):
    """`(hparams, params, batches, val_batch) -> validation loss`, by schedule, and its arguments."""

    losses: dict[str, Callable]
    training: Callable
    args: tuple


def make_case(model: Model, optimiser: str, num_steps: int, which: str, rules: Mapping[str, Any] = RULES) -> Case:
    """`optimiser`: "sgd" or "adam" of optax, or "momentum", the same as "sgd" by `momentum_sgd`, for `Reversible`."""
    hparams = {
        "decay": jax.tree.map(lambda x: jnp.full_like(x, -9.0), model.params),
        "rate": jnp.full(num_steps, jnp.log(RATE[optimiser])),
        "example": jnp.zeros((BATCHES, model.batch)),
    }
    tuned = {name: h for name, h in hparams.items() if which in (name, "all")}

    def train_loss(params, h, batch):
        data, weights = batch
        decay = jax.tree.map(lambda log, x: jnp.sum(jnp.exp(log) * x**2, dtype=jnp.float32), h["decay"], params)
        return jnp.mean(jnp.exp(weights) * model.losses(params, *data)) + sum(jax.tree.leaves(decay))

    def make_tx(h):
        schedule = lambda step: jnp.exp(h["rate"][step])  # noqa: E731
        if optimiser == "momentum":
            return optax.sgd(lambda step: (1 - MOMENTUM) * schedule(step), MOMENTUM)
        return optax.adam(schedule, eps_root=1e-8) if optimiser == "adam" else optax.sgd(schedule, MOMENTUM)

    def rate(h, step):
        return jnp.exp(h["rate"][step])

    reversible = optimiser == "momentum"
    solver = jaxhpo.momentum_sgd(train_loss, rate, MOMENTUM) if reversible else jaxhpo.from_optax(train_loss, make_tx)

    def batch_at(h, batches, t):
        return jax.tree.map(lambda x: x[t % BATCHES], (batches, h["example"]))

    def trained(adjoint, h, params, batches):
        start = solver.init(params, h)
        by_step = lambda t: batch_at(h, batches, t)  # noqa: E731
        return jaxhpo.solve(solver, start, h, by_step, num_steps=num_steps, adjoint=adjoint, key=KEY).params

    def by_hand(wrap, h, params, batches, scan=jax.lax.scan):
        tx = make_tx(h)

        def step(carry, t):
            params, state = carry
            grad = jax.grad(train_loss)(params, h, batch_at(h, batches, t))
            updates, state = tx.update(grad, state, params)
            return (optax.apply_updates(params, updates), state), None

        return scan(wrap(step), (params, tx.init(params)), jnp.arange(num_steps))[0][0]

    def with_all(train, given, params, batches, val_batch):
        return model.losses(train({**hparams, **given}, params, batches), *val_batch).mean()

    def outer(train):
        return lambda *args: with_all(train, *args)

    trainings = {
        "plain JAX": lambda *args: by_hand(lambda step: step, *args),
        "a Python loop": lambda *args: by_hand(lambda step: step, *args, scan=python_loop),
        "jax.checkpoint a step": lambda *args: by_hand(lambda step: jax.checkpoint(step, prevent_cse=False), *args),
    }
    for name, rule in rules.items():
        if rule is not None:
            trainings[name] = lambda *args, rule=rule: trained(rule, *args)
    args = (tuned, model.params, model.draw(jax.random.key(1), BATCHES), model.draw(jax.random.key(2)))
    return Case({name: outer(train) for name, train in trainings.items()}, outer(trainings["plain JAX"]), args)


def python_loop(step, carry, xs):
    for x in xs:
        carry, _ = step(carry, x)
    return carry, None


def matrix_operations(function, *args) -> float:
    """Count multiplications and additions in matrix products that the results depend on."""
    return count_arithmetic(function, *args, elementwise=False)


def measure(case: Case, name: str, unit: dict[str, Any], repeats: int) -> dict[str, Any]:
    function = jax.value_and_grad(case.losses[name])
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*case.args).compile()
    size = sum(x.nbytes for x in jax.tree.leaves(case.args[1]))
    memory = compiled.memory_analysis().temp_size_in_bytes
    row = {
        "arithmetic": matrix_operations(function, *case.args) / unit["operations"],
        "memory": memory / size,
        "compile_seconds": time.perf_counter() - start,
    }
    if repeats and memory / 2**30 < MOST:
        ratios = []
        for _ in range(1 + repeats):
            seconds = []
            for program in (compiled, unit["program"]):
                start = time.perf_counter()
                jax.block_until_ready(program(*case.args))
                seconds.append(time.perf_counter() - start)
            ratios.append(seconds[0] / seconds[1])
        row["time"] = statistics.quantiles(ratios[1:], n=4) if repeats > 1 else ratios[1:] * 3  # the first warms up
    return row


def draw(rows, path) -> None:
    """Draw memory against arithmetic, a panel per model and optimiser, a line per schedule over T."""
    cases = list(dict.fromkeys((row["model"], row["optimiser"]) for row in rows))
    columns = min(3, len(cases))
    lines = -(-len(cases) // columns)
    figure, axes = plot.figure(lines, columns, width=5.5 * columns, height=4.5 * lines)
    for axis in axes.flat[len(cases) :]:
        axis.remove()
    by_hand, default = (
        {"marker": "s", "ms": 10, "mfc": "none", "lw": 1},
        {"marker": "D", "ms": 9, "mfc": "none", "lw": 0},
    )
    for axis, case in zip(axes.flat, cases, strict=False):
        for i, name in enumerate(RULES):
            mine = [r for r in rows if (r["model"], r["optimiser"]) == case and r["schedule"] == name]
            mine = sorted((r for r in mine if r["hyperparameters"] == "all"), key=lambda r: r["num_steps"])
            axis.plot(
                [r["memory"] for r in mine],
                [r["arithmetic"] for r in mine],
                color=f"C{i}",
                label=name,
                **(by_hand if RULES[name] is None else default if name == "default" else {"marker": "o", "lw": 1}),
            )
            for row in mine:
                at, offset = (row["memory"], row["arithmetic"]), (3, -13 if name == "default" else 4)
                style = {"fontsize": 7, "textcoords": "offset points", "color": f"C{i}"}
                axis.annotate(f"{row['num_steps']}", at, offset, **style)
        axis.set(xscale="log", xlabel="memory, copies of the parameters", ylabel="arithmetic, units of T plain steps")
        axis.set_title(f"{case[0]}, {case[1]}; labels: T")
        axis.legend(frameon=False, fontsize=8)
    plot.save(figure, path)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--optimisers", nargs="+", choices=["sgd", "adam"], default=["sgd", "adam"])
    parser.add_argument("--steps", nargs="+", type=int, default=[10, 50, 200, 1000])
    parser.add_argument("--hyperparameters", nargs="+", choices=["decay", "rate", "example", "all"], default=["all"])
    parser.add_argument("--schedules", nargs="+", choices=list(RULES), default=list(RULES), metavar="SCHEDULE")
    parser.add_argument("--repeats", type=int, default=0, help="timed calls of each program (default: none)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parsed = parser.parse_args(arguments)
    parsed.out.mkdir(parents=True, exist_ok=True)
    file, device = parsed.out / "unroll.json", jax.devices()[0].device_kind
    rows = {key(row): row for row in json.loads(file.read_text())["rows"]} if file.exists() else {}
    print(f"{'model':5} {'by':5} {'T':>5} {'tuned':8} {'schedule':22} {'arithmetic':>10} {'memory':>9} {'time':>20}")
    asked = itertools.product(parsed.models, parsed.optimisers, parsed.steps, parsed.hyperparameters)
    for name, optimiser, num_steps, which in asked:
        case = make_case(MODELS[name](), optimiser, num_steps, which)
        program = jax.jit(case.training).lower(*case.args).compile()
        unit = {"operations": matrix_operations(case.training, *case.args), "program": program}
        for schedule in parsed.schedules:
            row = dict(zip(KEYS, (name, optimiser, num_steps, which, schedule), strict=True))
            row |= measure(case, schedule, unit, parsed.repeats) | {"device": device, "jax": jax.__version__}
            rows[key(row)] = row
            file.write_text(json.dumps({"rows": [rows[k] for k in sorted(rows, key=str)]}, indent=1) + "\n")
            told = "{1:.2f} ({0:.2f}, {2:.2f})".format(*row["time"]) if "time" in row else ""
            print(
                f"{name:5} {optimiser:5} {num_steps:5} {which:8} {schedule:22} {row['arithmetic']:10.3f} "
                f"{row['memory']:9.1f} {told:>20}",
                flush=True,
            )
    draw([rows[k] for k in sorted(rows, key=str)], parsed.out / "unroll.png")


def key(row) -> tuple:
    return tuple(row[k] for k in KEYS)


if __name__ == "__main__":
    main()
