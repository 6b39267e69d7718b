"""The one table of derivative rules that drives the contract tests, and the problems they run on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental
import jax.monitoring
import jax.numpy as jnp
import lineax
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache

import jaxhpo
import jaxhpo.testing
from jaxhpo import (
    CG,
    GMRES,
    SAMA,
    BiCGStab,
    Direct,
    DrMAD,
    FiniteDifference,
    Forward,
    General,
    Identity,
    Implicit,
    Neumann,
    NormalCG,
    Nystrom,
    Unroll,
    from_lineax,
)
from jaxhpo.testing import BilevelProblem

PROBLEMS = {
    "ridge": jaxhpo.testing.ridge(),
    "quadratic": jaxhpo.testing.quadratic(),
    "logistic": jaxhpo.testing.logistic(),
}


class Case(NamedTuple):
    """A rule, and what it should give.

    `closed_form(problem, num_steps)` is its own value at `problem.hparams`: for an approximate rule that of its
    approximation (Neumann's partial sum, T1–T2's step size, the truncated sum), not the exact hypergradient.
    """

    name: str
    make: Callable[[BilevelProblem], Any]
    closed_form: Callable[[BilevelProblem, int], np.ndarray] | None
    implicit: bool = False


def _inverse(replaced):
    return lambda p, T: p.partial(p.hparams, lambda H: replaced(H, p.step_size))


def _unrolled(truncate=None):
    def value(p, T):
        return p.unrolled(p.hparams, p.step_size, T, truncate)

    return value


def partial_sum(H, step_size, num_terms):
    """α Σ_{k<K} (I − αH)^k = H⁻¹ (I − (I − αH)^K)."""
    eye = np.eye(len(H))
    return np.linalg.inv(H) @ (eye - np.linalg.matrix_power(eye - step_size * H, num_terms))


def along_the_line(p, T):
    """Reverse mode through w ← Φ(w, h) = w − α∇L, by JAX alone, at w_0 + (t/T)(w_T − w_0) in place of w_t."""

    def step(w, h):
        return w - p.step_size * jax.grad(p.train_loss)(w, h, None)

    def value(w, h):
        end = jax.lax.fori_loop(0, T, lambda t, w: step(w, h), w)

        def back(i, carry):
            a, total = carry
            by_params, by_hparams = jax.jacobian(step, (0, 1))(w + (T - 1 - i) / T * (end - w), h)
            return by_params.T @ a, total + by_hparams.T @ a

        return jax.lax.fori_loop(0, T, back, (jax.grad(p.val_loss)(end), jnp.zeros_like(h)))[1]

    return np.asarray(jax.jit(value)(p.params, p.hparams))


EXACT = _inverse(lambda H, a: np.linalg.inv(H))
RULES = [
    Case("unroll", lambda p: Unroll(), _unrolled()),
    Case("unroll-plain", lambda p: Unroll(checkpoint=None), _unrolled()),
    Case("unroll-every", lambda p: Unroll(checkpoint=1), _unrolled()),
    Case("unroll-7", lambda p: Unroll(checkpoint=7), _unrolled()),
    Case("unroll-binomial", lambda p: Unroll(checkpoint="binomial"), _unrolled()),
    Case("unroll-truncated", lambda p: Unroll(truncate=5), _unrolled(5)),
    Case("unroll-truncated-1", lambda p: Unroll(truncate=1), _unrolled(1)),
    Case("cg", lambda p: Implicit(CG()), EXACT, implicit=True),
    Case("direct", lambda p: Implicit(Direct()), EXACT, implicit=True),
    Case(
        "neumann-5",
        lambda p: Implicit(Neumann(5, p.step_size)),
        _inverse(lambda H, a: partial_sum(H, a, 5)),
        implicit=True,
    ),
    Case(
        "identity",
        lambda p: Implicit(Identity(p.step_size)),
        _inverse(lambda H, a: a * np.eye(len(H))),
        implicit=True,
    ),
]
MORE_RULES = [
    Case("forward", lambda p: Forward(), _unrolled()),
    Case("forward-chunks", lambda p: Forward(chunk_size=2), _unrolled()),
    # ∇_h L is quadratic in the weights in every problem that has an `unrolled`, so the difference has no error.
    Case("finite-difference", lambda p: FiniteDifference(p.step_size), _unrolled(1)),
    Case("sama", lambda p: SAMA(), _unrolled(1)),
    Case("drmad", lambda p: DrMAD(), along_the_line),
    Case("gmres", lambda p: Implicit(GMRES()), EXACT, implicit=True),
    Case("bicgstab", lambda p: Implicit(BiCGStab()), EXACT, implicit=True),
    Case("normal-cg", lambda p: Implicit(NormalCG()), EXACT, implicit=True),
    Case("general", lambda p: Implicit(General()), EXACT, implicit=True),
    Case("lineax", lambda p: Implicit(from_lineax(lineax.GMRES(rtol=1e-7, atol=1e-12))), EXACT, implicit=True),
    Case(
        "nystrom",
        lambda p: Implicit(Nystrom(len(p.params), 0.1)),
        _inverse(lambda H, a: np.linalg.inv(H + 0.1 * np.eye(len(H)))),
        implicit=True,
    ),
]
ALL_RULES = RULES + MORE_RULES
BY_NAME = {case.name: case for case in ALL_RULES}


QUICK = ("unroll", "cg")  # one of each kind


def row(*values, case):
    """One row of the table as a pytest parameter."""
    return pytest.param(*values, case, marks=[] if case.name in QUICK else [pytest.mark.slow])


def rows(condition=lambda case: True):
    """The table as pytest parameters; in the quick suite the other rules are held to their closed forms alone."""
    return pytest.mark.parametrize("case", [row(case=c) for c in ALL_RULES if condition(c)], ids=lambda c: c.name)


def outer_loss(problem: BilevelProblem, adjoint, num_steps: int, dtype=jnp.float64, start=None, tx=None):
    """The validation loss of gradient descent on the problem, as a function of the hyperparameters."""
    solver = jaxhpo.from_optax(problem.train_loss, tx or optax.sgd(problem.step_size))
    params = jnp.asarray(problem.params if start is None else start, dtype)
    key = jax.random.key(0)  # for the rules that draw

    def loss(h):
        sol = jaxhpo.solve(solver, solver.init(params, h), h, num_steps=num_steps, adjoint=adjoint, key=key)
        return problem.val_loss(sol.params)

    return loss


def relative_error(got, want) -> float:
    """‖got − want‖ / ‖want‖."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def grad(fn):
    """The jitted gradient."""
    return jax.jit(jax.grad(fn))


@contextlib.contextmanager
def compile_events(kind=""):
    """A list of the events that happen within of tracing, lowering and compiling, or of those of one kind."""
    _heard.append((f"/jax/core/compile/{kind}", []))
    try:
        yield _heard[-1][1]
    finally:
        _heard.pop()


_heard: list[tuple[str, list[str]]] = []  # of the blocks that are open
# For the whole process, as jax 0.7 cannot take a listener back.
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: [events.append(event) for kind, events in _heard if event.startswith(kind)]
)
# jax 0.7 has it under the old name.
enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64


@contextlib.contextmanager
def compiled_once(folder):
    """Programs are compiled once, also where functions are others that do the same; what is traced is traced anew."""
    settings = {"jax_compilation_cache_dir": str(folder), "jax_persistent_cache_min_compile_time_secs": 0}
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name.upper(), str(value))  # of child processes
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # whether there is one is asked once
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def default_environment() -> dict[str, str]:
    """The environment that users have: for child processes of what they run, without the settings of `conftest.py`."""
    return {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")}


def cheap_environment() -> dict[str, str]:
    """The same, but XLA optimises as little as in the tests themselves."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    return os.environ | {"XLA_FLAGS": " ".join(flags)}
