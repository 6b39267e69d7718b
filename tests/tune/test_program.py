"""Digests of the outer loss: what changes them, what does not, and what a run that is resumed says of them."""

import functools
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

import jaxhpo
from jaxhpo._tune import program
from jaxhpo._tune.population import Compiled
from jaxhpo._tune.remedies import NO_REMEDIES
from jaxhpo._tune.step import Step

DATA = jnp.linspace(0.0, 1.0, 90_000).reshape(30_000, 3)
SGD = optax.sgd(0.1)
RULES = {
    "unroll": jaxhpo.Unroll(),
    "binomial": jaxhpo.Unroll(checkpoint="binomial"),
    "forward": jaxhpo.Forward(),
    "cg": jaxhpo.Implicit(),
    "gmres": jaxhpo.Implicit(jaxhpo.GMRES()),
    "nystrom": jaxhpo.Implicit(jaxhpo.Nystrom(2, 0.1)),
    "smoothing": jaxhpo.Smoothing(2, 0.1),
    "reversible": jaxhpo.Reversible(),
    "sama": jaxhpo.SAMA(),
}


@jax.custom_jvp
def square(x):
    return x**2


square.defjvp(lambda primals, tangents: (square(*primals), 2 * primals[0] * tangents[0]))


def by_rule(rule, data=DATA[:9], num_steps=2, rate=0.1, target=1.0):
    def train_loss(p, h, batch):
        return jnp.mean((data @ p - 1) ** 2) + jnp.sum(h * square(p))

    solver = jaxhpo.from_optax(train_loss, optax.sgd(rate))
    if rule == "reversible":
        solver = jaxhpo.momentum_sgd(train_loss, lambda h, t: rate, lambda h, t: 0.5)

    def loss(h, carry, key):
        start = solver.init(jnp.zeros(3, h.dtype), h)
        sol = jaxhpo.solve(solver, start, h, num_steps=num_steps, adjoint=RULES[rule], key=key)
        return jnp.sum((sol.params - target) ** 2), carry, sol.info

    return loss


def network(h, carry, key):
    """Of flax, with what JAX keeps beside equations: a custom rule, a callback, options that are enumerations."""
    net = linen.Dense(2)
    params = net.init(jax.random.key(0), DATA[:9])
    out = net.apply(params, DATA[:9]) * h[0] + jax.nn.relu(square(h[1]))
    label = jax.pure_callback(np.sign, jax.ShapeDtypeStruct((), h.dtype), jax.lax.stop_gradient(h[2]))
    return jnp.mean(out**2) + jnp.sum(jnp.sort(h) ** 2) * label, carry, {"b": out, "a": None}


@functools.cache
def found(loss, optimizer=SGD, remedies=NO_REMEDIES):
    compiled = Compiled(Step(loss, optimizer, None, None, remedies, None), None)
    state = compiled.init(jnp.full(3, 0.1), None, None)
    return program.digests(*compiled.trace(state), state)


def closing_over(data, target=1.0):
    return lambda h, carry, key: (jnp.sum((data @ h - target) ** 2), carry, None)


def all_found():
    return [found(loss) for loss in [*map(by_rule, RULES), network]]


@pytest.mark.slow
def test_digests_are_equal_in_every_process():
    """Sets and hashes of strings have another order, objects another address."""
    paths = os.pathsep.join([os.path.dirname(__file__), os.path.dirname(os.path.dirname(jaxhpo.__file__))])
    environment = os.environ | {"PYTHONHASHSEED": "5", "PYTHONPATH": paths, "JAX_ENABLE_X64": "1"}
    script = "import json, test_program; print(json.dumps(test_program.all_found()))"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    here = all_found()
    assert json.loads(done.stdout) == here
    assert len({each["program"] for each in here}) == len(RULES) + 1


def edited(data, row, by=1e-6):
    return data.at[row, 0].add(by)


FEW, MANY, UNROLLED = closing_over(DATA[:4]), closing_over(DATA), by_rule("unroll")


@pytest.mark.parametrize(
    ("before", "after", "differs"),
    [
        (FEW, closing_over(DATA[:4]), set()),
        (FEW, closing_over(edited(DATA[:4], 2)), {"constants"}),
        (FEW, closing_over(DATA[:5]), {"program", "constants"}),
        (MANY, closing_over(np.asarray(DATA)), set()),
        (MANY, closing_over(DATA[::-1]), {"constants"}),
        (MANY, closing_over(edited(DATA, 0)), {"constants"}),
        (MANY, closing_over(DATA, 1.0 + 1e-9), {"program"}),
        (MANY, closing_over(DATA, jnp.asarray(1.0)), {"program", "constants"}),
        (UNROLLED, by_rule("unroll", num_steps=3), {"program"}),
        (UNROLLED, by_rule("unroll", rate=0.2), {"program"}),
        (UNROLLED, by_rule("unroll", data=edited(DATA[:9], 1)), {"constants"}),
    ],
)
def test_what_changes_the_digests(before, after, differs):
    before, after = found(before), found(after)
    assert {name for name in before if before[name] != after[name]} == (differs and differs | {"step"})


def test_another_optimiser_has_the_same_loss():
    schedule = optax.sgd(lambda count: jnp.asarray([0.1, 0.2])[count])
    for settings in ((optax.adam(0.1),), (schedule,), (SGD, jaxhpo.Remedies(clip=0.5))):
        want, got = found(FEW), found(FEW, *settings)
        assert {name for name in want if got[name] != want[name]} == {"step"}


# --- what a run says of them ------------------------------------------------------------------------------------------


def tuned(folder, target, num_steps, data=DATA[:4], **settings):
    loss = lambda h: jnp.sum((h - target) ** 2) + 0 * jnp.sum(data)  # noqa: E731
    return jaxhpo.tune(loss, jnp.zeros(2), SGD, num_steps=num_steps, run_dir=folder, progress=False, **settings)


def test_another_loss_is_said_and_nothing_changes(tmp_path):
    first = tuned(tmp_path, 1.0, 3)
    match = r"the outer loss is another; no step is taken \(3 outer steps.*new `run_dir`.*`resume='continue'`"
    for resume in ("warn", "continue"):
        with pytest.warns(RuntimeWarning, match=match):
            result = tuned(tmp_path, 5.0, 3, resume=resume)
        np.testing.assert_array_equal(result.best_hparams, first.best_hparams)
    with pytest.warns(RuntimeWarning, match="closes over are others; the run goes on, and its best step"):
        assert len(tuned(tmp_path, 1.0, 4, edited(DATA[:4], 0)).history["value"]) == 4


def test_continue_goes_on_with_the_new_loss(tmp_path):
    """The best step of the old loss, whose value the new one never reaches, is forgotten, and so is its patience."""
    first = tuned(tmp_path, 1.0, 50, patience=5, min_delta=1e-3)
    result = tuned(tmp_path, 5.0, 60, resume="continue", patience=5, min_delta=1e-3)
    np.testing.assert_allclose(result.best_hparams, 5.0, atol=0.1)
    assert "the outer loss is another" in result.message
    steps = len(first.history["value"])
    again = tuned(tmp_path, 5.0, 70, resume="continue", patience=5, min_delta=1e-3)
    for later in (jaxhpo.load(tmp_path), again):
        assert re.search(f"since step {steps}: [^.]*the outer loss is another", later.message)


def test_a_run_that_had_ended_says_so(tmp_path, monkeypatch):
    calls = []

    def loss(h, carry, key):
        calls.append(0)
        return jnp.sum((h - carry) ** 2), carry, None

    def run(carry=0.0, **settings):
        settings = {"num_steps": 2, "run_dir": tmp_path, "progress": False} | settings
        return jaxhpo.tune(loss, jnp.ones(2), SGD, carry=carry, **settings)

    first = run()
    assert len(calls) == 1
    with pytest.warns(
        RuntimeWarning, match=r"had ended before \(2 outer steps were.*'continue'` silences this"
    ) as told:
        assert run().best_value == first.best_value
    assert told[0].filename == __file__  # the user's line
    assert run(resume="continue").best_value == first.best_value
    with pytest.warns(RuntimeWarning, match="carry is another .that of the checkpoint is taken.; the run goes on"):
        run(1.0, num_steps=3)
    monkeypatch.setattr(jax, "__version__", "99.0")
    with pytest.warns(RuntimeWarning, match=rf"saved, jax is 99.0, was {jax.version.__version__}; the run goes on"):
        run(1.0, num_steps=4)


def test_another_version_of_jax_may_be_the_reason():
    before = {"program": "a", "constants": "b", "carry": "c", "jax": "0.10.0"}
    said, another = program.changes(before, before | {"program": "d", "jax": "0.11.0"})
    assert said.endswith("jax is 0.11.0, was 0.10.0, which alone may be the reason") and not another


@pytest.mark.parametrize("kind", list(jax.sharding.AxisType)[:2])
def test_digest_of_a_sharded_array(kind):
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(kind,))
    spread = jax.device_put(DATA, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows")))
    assert program.digest(spread) == program.digest(DATA) != program.digest(DATA.T)
