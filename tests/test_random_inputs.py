"""Random inputs: a public function either gives the right result or raises the library's own error."""

import contextlib
import dataclasses
import datetime
import re
import tempfile
import time
import warnings
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import jaxhpo
from jaxhpo import CG, Forward, Identity, Implicit, Neumann, Remedies, Unroll, box, positive, simplex, unit_interval

pytestmark = pytest.mark.slow
KINDS = ("float32", "float64", "bfloat16", "float16")


class Pair(NamedTuple):
    """A named tuple as a node of a pytree."""

    first: Any
    second: Any


def check_all(number, cases, check, capsys, least=1.0):
    """Runs `check` on `number` cases and prints their count; it must accept at least the fraction `least` of them."""
    drawn = taken = 0

    @hypothesis.settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[hypothesis.Phase.generate],  # to shrink what fails would compile hundreds of programs
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(cases)
    def run(case):
        nonlocal drawn, taken
        drawn += 1
        with expected_warnings():
            taken += check(case)

    begun = time.perf_counter()
    run()
    with capsys.disabled():
        print(f"\n{check.__name__}: {drawn} examples, {taken} accepted, in {time.perf_counter() - begun:.0f} s")
    assert drawn >= number and taken >= least * drawn


@contextlib.contextmanager
def expected_warnings():
    """Ignores warnings that random inputs cause: of derivatives that happen to be zero, and of runs that end early."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jaxhpo.ZeroHypergradientWarning)
        warnings.filterwarnings("ignore", "Outer step", RuntimeWarning)
        yield


def outcome(call):
    """Returns the result of the call, or the library's own error, which must name something in backquotes."""
    with expected_warnings():
        try:
            return call()
        except jaxhpo.JaxhpoError as error:
            assert re.search("`[^`]+`", str(error)), str(error)
            return error


def trees(leaves, most=4):
    """Nested dicts, lists, tuples, named tuples and empty nodes."""
    empty = st.sampled_from([{}, (), [], None])

    def nodes(inner):
        several = st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3)
        return several | st.lists(inner, max_size=2) | st.tuples(inner) | st.builds(Pair, inner, inner)

    return st.recursive(leaves | empty, nodes, max_leaves=most)


SHAPES = st.sampled_from([(), (), (1,), (3,), (0,), (2, 1), (2, 3), (1, 0, 2), (2, 1, 3)])


def has_entries(tree):
    return any(np.prod(x.shape) for x in jax.tree.leaves(tree))


# --- hypergradients in closed form ---------------------------------------------------------------------------------

RATE = 1 / 8  # of the inner steps; like all values here exact in every dtype
SHRINK = 1 - 2 * RATE
MOVE = 1 / 4  # of the outer step
BOUND = 0.5  # of the clipped hypergradient
SOLVER = jaxhpo.from_optax(
    lambda a, h, b: sum(jnp.sum((x - y) ** 2) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(h), strict=True)),
    optax.sgd(RATE),
)
TRANSFORMS = (None, None, positive, unit_interval, box(-3.0, 4.0), simplex)
# da_T/dh by each rule, which is the same number for every entry.
RULES = {
    Unroll(): lambda T: 1 - SHRINK**T,
    Unroll(checkpoint=None): lambda T: 1 - SHRINK**T,
    Unroll(truncate=2): lambda T: 1 - SHRINK ** min(2, T),
    Forward(): lambda T: 1 - SHRINK**T,
    Implicit(CG()): lambda T: 1,
    Implicit(Identity(RATE)): lambda T: 2 * RATE,
    Implicit(Neumann(2, RATE)): lambda T: 1 - SHRINK**2,
}
OPTIMIZERS = {"sgd": optax.sgd(MOVE), "momentum": optax.sgd(MOVE, momentum=0.9), "sign": optax.sign_sgd(MOVE)}
REMEDIES = {"none": Remedies(), "clip": Remedies(clip=BOUND), "clip_norm": Remedies(clip_norm=BOUND)}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A hyperparameter, its start, and its inner problem: all values are multiples of 1/8."""

    kind: str
    transform: Any
    project: bool
    start: np.ndarray
    begin: np.ndarray
    goal: np.ndarray

    @property
    def eps(self):
        """Half the distance from 1 to the next larger number."""
        return float(jnp.finfo(self.kind).eps) / 2

    @property
    def shape(self):
        return self.start.shape


@st.composite
def quadratic_leaves(draw):
    shape, transform = draw(SHAPES), draw(st.sampled_from(TRANSFORMS))
    if transform is simplex and (not shape or shape[-1] == 0):
        transform = positive
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    begin, goal = rng.integers(-16, 17, (2, *shape)) / 8
    project = transform is None and draw(st.booleans())
    if transform is simplex:
        ones = np.ones(shape)
        extra = rng.multinomial(8 - shape[-1], np.full(shape[-1], 1 / shape[-1]), shape[:-1])
        start = (ones + extra) / 8
    elif transform is unit_interval:
        start = rng.integers(1, 8, shape) / 8
    else:
        start = rng.integers(1 if transform is positive else 0 if project else -16, 17, shape) / 8
    return Leaf(draw(st.sampled_from(KINDS)), transform, project, start, begin, goal)


class Quadratic(NamedTuple):
    tree: Any
    rule: Any
    inner: int
    optimizer: str
    remedies: str


QUADRATICS = st.builds(
    Quadratic,
    trees(quadratic_leaves()).filter(has_entries),
    st.sampled_from(list(RULES)),
    st.integers(1, 3),
    st.sampled_from(list(OPTIMIZERS)),
    st.sampled_from(list(REMEDIES)),
)


def unconstrained(leaf):
    """u, the product of dh/du with a vector, and a bound of |dh/du| nearby, from the formulas of the docstrings."""
    h = leaf.start
    if leaf.transform is None:
        return h, lambda g: g, 1.0
    if leaf.transform is positive:
        return np.log(h), lambda g: h * g, 2 * np.exp(1.0)
    if leaf.transform is simplex:
        u = np.log(h) - np.log(h).mean(-1, keepdims=True)
        return u, lambda g: h * (g - (h * g).sum(-1, keepdims=True)), 0.5
    low, high = leaf.transform.low, leaf.transform.high
    return np.log(h - low) - np.log(high - h), lambda g: (h - low) * (high - h) / (high - low) * g, (high - low) / 4


def natural(leaf, u):
    if leaf.transform is None:
        return u
    if leaf.transform is positive:
        return np.exp(u)
    if leaf.transform is simplex:
        return np.exp(u) / np.exp(u).sum(-1, keepdims=True)
    low, high = leaf.transform.low, leaf.transform.high
    return low + (high - low) / (1 + np.exp(-u))


def check_quadratic(case):
    """Compares the hypergradient and the first outer step with NumPy."""
    specs = jax.tree.leaves(case.tree)
    array = lambda part: jax.tree.map(lambda leaf: jnp.asarray(getattr(leaf, part), leaf.kind), case.tree)  # noqa: E731
    begin, goal = array("begin"), array("goal")

    def outer_loss(h):
        sol = jaxhpo.solve(SOLVER, SOLVER.init(begin, h), h, num_steps=case.inner, adjoint=case.rule)
        parts = zip(jax.tree.leaves(sol.params), jax.tree.leaves(goal), strict=True)
        return sum(jnp.sum((a - c) ** 2).astype(jnp.float32) for a, c in parts)

    result = jaxhpo.tune(
        outer_loss,
        array("start"),
        OPTIMIZERS[case.optimizer],
        num_steps=1,
        transforms=jax.tree.map(lambda leaf: leaf.transform, case.tree),
        projections=jax.tree.map(
            lambda leaf: optax.projections.projection_non_negative if leaf.project else None, case.tree
        ),
        remedies=REMEDIES[case.remedies],
        progress=False,
    )
    assert jax.tree.structure(result.hparams) == jax.tree.structure(case.tree)
    grads, errors = zip(*[closed_form(leaf, case) for leaf in specs], strict=True)
    length = np.sqrt(sum((g**2).sum() for g in grads))
    # |‖g + e‖ − ‖g‖| ≤ ‖e‖; the norm itself is taken in float32 or wider.
    off = np.sqrt(sum((e**2).sum() for e in errors)) + 2.0**-22 * length
    assert abs(result.history["hypergradient_norm"][0] - length) <= off
    for leaf, g, e, got in zip(specs, grads, errors, jax.tree.leaves(result.hparams), strict=True):
        assert got.dtype == leaf.kind and got.shape == leaf.shape
        check_move(leaf, case, g, e, length, off, np.asarray(got, float))
    return True


def closed_form(leaf, case):
    """The hypergradient in unconstrained units, and a bound of its rounding error."""
    u, pullback, slope = unconstrained(leaf)
    rho = SHRINK**case.inner
    end = (1 - rho) * leaf.start + rho * leaf.begin
    grad = RULES[case.rule](case.inner) * 2 * (end - leaf.goal)
    size = np.abs(leaf.start) + np.abs(leaf.begin) + np.abs(leaf.goal)
    # Four roundings a step forward and backward, of numbers no greater than `size`, doubled by the outer loss; h itself
    # comes back from u with the rounding of u, and more under an ill-conditioned transform.
    back = leaf.eps * (4 + 2 * np.abs(u)) * spread(leaf)
    rounding = 2 * (leaf.eps * 8 * (case.inner + 1) * size + back)
    across = np.abs(pullback(np.ones_like(u))) if leaf.transform is not simplex else 1.0
    return pullback(grad), across * rounding + back * np.abs(grad) + leaf.eps * 8 * slope * np.abs(grad)


def spread(leaf):
    """Magnitude of the numbers from which a transform computes h."""
    if isinstance(leaf.transform, type(box(0.0, 1.0))):
        return abs(leaf.transform.low) + abs(leaf.transform.high)
    return np.abs(leaf.start) if leaf.transform is not simplex else 1.0


def check_move(leaf, case, g, e, length, off, got):
    """Checks h after the outer step."""
    u, _, slope = unconstrained(leaf)
    if case.remedies == "clip":
        g = np.clip(g, -BOUND, BOUND)
    if case.remedies == "clip_norm" and length > BOUND:
        g, e = g * BOUND / length, (e + np.abs(g) * off / length) * BOUND / length
    sure = np.abs(g) > e
    step = -MOVE * (np.sign(g) if case.optimizer == "sign" else g)
    doubt = np.where(sure, 0.0, 2 * MOVE) if case.optimizer == "sign" else MOVE * e
    want = natural(leaf, u + step)
    want = np.maximum(want, 0) if leaf.project else want
    doubt = doubt + leaf.eps * 4 * (np.abs(u) + np.abs(step))
    if leaf.transform is simplex:
        doubt = doubt.max(-1, keepdims=True) * 2 if doubt.size else doubt
    doubt = slope * doubt * (np.abs(want) if leaf.transform is positive else 1) + leaf.eps * 8 * spread(leaf)
    assert np.all(np.abs(got - want) <= doubt), (got, want, doubt)


def test_hypergradients_are_right(capsys):
    check_all(60, QUADRATICS, check_quadratic, capsys)


# --- resuming ------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    tree: Any
    optimizer: str
    stop: int
    more: int
    settings: dict[str, Any]
    broken: bool


STATEFUL = {
    "adam": optax.adam(0.1, eps=1e-3),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "schedule": optax.chain(optax.clip(1.0), optax.sgd(optax.linear_schedule(0.1, 0.0, 4))),
    "injected": optax.inject_hyperparams(optax.rmsprop)(learning_rate=0.01, eps=1e-3),
}
RUNS = st.builds(
    Run,
    trees(quadratic_leaves(), 2).filter(has_entries),
    st.sampled_from(list(STATEFUL)),
    st.integers(1, 2),
    st.integers(1, 2),
    st.fixed_dictionaries(
        {"save_every": st.sampled_from([1, 2, datetime.timedelta(seconds=10)])},
        optional={
            "remedies": st.sampled_from([Remedies(accumulate=2), Remedies(clip=BOUND), Remedies(clip_norm=BOUND)]),
            "patience": st.integers(1, 3),
            "min_delta": st.sampled_from([0.0, 0.5]),
            "monitor": st.just(lambda info: np.sum(info["draw"])),
            "score_window": st.integers(1, 3),
            "key": st.sampled_from([jax.random.key(1), jax.random.key(2, impl="rbg")]),
        },
    ),
    st.booleans(),
)


def check_run(case):
    """A run that is stopped after a few steps, by `num_steps` or a callback, and resumed is bit-identical."""
    start = jax.tree.map(lambda leaf: jnp.asarray(leaf.start, leaf.kind), case.tree)
    goal = jax.tree.map(lambda leaf: jnp.asarray(leaf.goal, leaf.kind), case.tree)
    size = len(jax.tree.leaves(start))

    def outer_loss(h, carry, key):
        draw = jax.random.normal(key, (size,), jnp.float32)
        parts = enumerate(zip(jax.tree.leaves(h), jax.tree.leaves(goal), strict=True))
        value = sum(jnp.sum((a - c) ** 2).astype(jnp.float32) * (1 + 0.1 * draw[i]) for i, (a, c) in parts)
        carry = {"mean": jax.tree.map(lambda m, x: m / 2 + x / 2, carry["mean"], h), "count": carry["count"] + 1}
        value = jnp.where(draw[0] > 1, jnp.nan, value) if case.broken else value
        return value, jax.lax.stop_gradient(carry), {"draw": draw, "none": None}

    def run(num_steps, **more):
        return jaxhpo.tune(
            outer_loss,
            start,
            STATEFUL[case.optimizer],
            num_steps=num_steps,
            transforms=jax.tree.map(lambda leaf: leaf.transform, case.tree),
            carry={"mean": goal, "count": jnp.zeros((), jnp.int32)},
            on_not_finite="skip" if case.broken else "stop",
            progress=False,
            resume="continue",  # also of a run that is out of patience
            **case.settings,
            **more,
        )

    steps = case.stop + case.more
    whole = run(steps)
    with tempfile.TemporaryDirectory() as folder:
        if case.stop == 1:
            run(case.stop, run_dir=folder)
        else:
            run(steps, run_dir=folder, callbacks=[lambda step: step.step + 1 >= case.stop])
        ended = run(steps, run_dir=folder)
    for result in (whole, ended):
        for column in ("seconds", "peak_bytes"):
            result.history.pop(column)
    same = [(r.hparams, r.carry, r.best_hparams, r.best_value, r.best_step, r.history) for r in (whole, ended)]
    assert jax.tree.structure(same[0]) == jax.tree.structure(same[1])
    for a, b in zip(*map(jax.tree.leaves, same), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        np.testing.assert_array_equal(a, b)
    assert ended.status == whole.status and ended.message.endswith(whole.message)
    return True


def test_resumed_run_is_bit_identical(capsys):
    check_all(12, RUNS, check_run, capsys)


# --- arbitrary arguments -------------------------------------------------------------------------------------------

FOREIGN = (
    3,
    True,
    -1,
    0,
    1.5,
    1j,
    "positive",
    None,
    np.nan,
    np.inf,
    -np.inf,
    (),
    {},
    [],
    [1.0, "x"],
    object,
    lambda *args: None,
    np.array(["a"]),
    np.array([1, 2]),
    np.array([None]),
    np.zeros((2, 0)),
    np.float16(0.5),
    np.bool_(True),
    np.array([0.5, np.nan]),
    np.zeros(2, complex),
    np.datetime64("2020-01-01"),
    jnp.arange(3),
    jax.random.key(0),
    jax.random.PRNGKey(0),
    jax.random.split(jax.random.key(0), 2),
    SOLVER,
    optax.adam,
    datetime.timedelta(seconds=-1),
)
foreign = st.sampled_from(FOREIGN)


def often(usual, *others):
    """Draws from `usual` with probability 2/3. (`one_of` merges equal strategies, so repetition adds no weight.)"""
    return st.integers(0, 2).flatmap(lambda i: usual if i < 2 else st.one_of(*others))


def mostly(good):
    """Draws one of `good`, or, with probability 1/3, an arbitrary object."""
    return often(st.sampled_from(good), foreign)


def odd_leaves(draw):
    kind = draw(st.sampled_from([*KINDS, *KINDS, "int32", "bool", "complex64", "object", "<U1"]))
    shape = draw(SHAPES)
    values = np.random.default_rng(0).integers(0, 2, shape) / 2 + 0.25
    return values.astype(kind) if kind in ("object", "<U1") else jnp.asarray(values).astype(kind)


any_leaf = st.composite(odd_leaves)()
quarter = jnp.full((), 0.25, jnp.float32)
good_hparams = st.sampled_from([quarter, {"a": quarter, "b": jnp.full(3, 0.25)}, Pair(quarter, ()), [0.25]])
any_hparams = often(good_hparams, trees(any_leaf, 3), trees(any_leaf | foreign, 3), foreign)


def total(h):
    """A loss of any tree of real arrays."""
    return sum(jnp.sum((x - 0.5) ** 2).astype(jnp.float32) for x in jax.tree.leaves(h))


def carried(h, carry, key):
    return total(h), carry, {"draw": jax.random.uniform(key)}


def by_hand(h, carry, key):
    value, grad = jax.value_and_grad(total)(h)
    return value, grad, carry, None


OUTER = (
    total,
    total,
    carried,
    carried,
    lambda h: h,
    lambda h: 1.0,
    lambda h: None,
    lambda h: "x",
    lambda h: (total(h), None),
    lambda h: jnp.stack([total(h)] * 2),
    lambda h: total(h) * 1j,
    lambda h: jnp.int32(1),
    lambda h: jnp.nan * total(h),
    lambda h: jnp.ones(()),
    lambda h: total(jax.lax.stop_gradient(h)),
    lambda h, carry: total(h),
    lambda h, carry, key: total(h),
    lambda h, carry, key: (total(h), carry, "x"),
    lambda h, carry, key: (total(h), object(), None),
    lambda h, carry, key: (total(h), {"a": carry}, None),
)
TUNE = {
    "optimizer": mostly([optax.sgd(0.1), optax.adam(0.1), optax.adamw(0.1), optax.set_to_zero(), optax.lbfgs()]),
    "num_steps": mostly([1, 2, 3, np.int64(2)]),
    "transforms": mostly([None, positive, unit_interval, box(-3.0, 4.0), simplex, box, {"a": positive, "b": None}]),
    "projections": mostly(
        [
            None,
            optax.projections.projection_non_negative,
            optax.projections.projection_simplex,
            {"a": optax.projections.projection_non_negative, "b": None},
            lambda h: h,
            lambda: 0,
            lambda h: None,
            lambda h: "x",
            lambda h: (h, h),
            lambda h: jnp.zeros(7),
        ]
    ),
    "remedies": mostly([Remedies(), Remedies(clip=0.1, clip_norm=0.1), Remedies(accumulate=2), Remedies(shrink=0.5)]),
    "on_not_finite": mostly(["stop", "skip", "backtrack", "ignore"]),
    "gradient": mostly(
        [
            None,
            None,
            by_hand,
            lambda h, carry, key: h,
            lambda h: by_hand(h, None, None),
            lambda h, carry, key: (total(h), 0.0, carry, None),
            lambda h, carry, key: (total(h), jax.tree.map(lambda x: x[None], h), carry, None),
        ]
    ),
    "key": mostly([None, jax.random.key(1), jax.random.key(2, impl="rbg")]),
    "carry": mostly([None, jnp.zeros(2), {"a": 1, "b": None}, {"a": object()}, [jax.random.key(0)]]),
    "run_dir": mostly([None, "new", "file"]),
    "resume": mostly(["warn", "continue", "new", None]),
    "save_every": mostly([1, 2, datetime.timedelta(0), datetime.timedelta(seconds=10)]),
    "callbacks": mostly([(), [lambda step: None], [lambda step: True], [lambda: None], (lambda s: None for _ in "ab")]),
    "patience": mostly([None, 1, 2]),
    "min_delta": mostly([0.0, 0.5, 1]),
    "monitor": mostly([None, lambda info: 0.5, lambda info: info, lambda: 0.5, lambda info: np.zeros(3)]),
    "max_seconds": mostly([None, 60, 1e-9]),
    "max_inner_steps": mostly([None, 10]),
}
STATUSES = {"finished", "patience", "overfitting", "budget", "callback", "not_finite"}
CALLS = st.tuples(
    often(st.sampled_from([total, carried]), st.sampled_from(OUTER), foreign),
    any_hparams,
    st.lists(st.sampled_from(list(TUNE)), max_size=3, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: TUNE[name] for name in names})
    ),
)


def check_call(case):
    """Calls `tune` with at most three settings that are not its defaults, any of which may be wrong."""
    outer_loss, hparams, settings = case
    settings = {"optimizer": optax.sgd(0.1), "num_steps": 2, **settings}
    with tempfile.TemporaryDirectory() as folder:
        open(f"{folder}/file", "w").close()
        if isinstance(settings.get("run_dir"), str):
            settings["run_dir"] = f"{folder}/{settings['run_dir']}"
        optimizer = settings.pop("optimizer")
        result = outcome(lambda: jaxhpo.tune(outer_loss, hparams, optimizer, progress=False, **settings))
    if isinstance(result, jaxhpo.TuneResult):
        assert result.status in STATUSES and result.message
        assert 1 <= len(result.history["value"]) <= settings["num_steps"]
        assert jax.tree.structure(result.hparams) == jax.tree.structure(hparams)
        assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(result.hparams))
    return isinstance(result, jaxhpo.TuneResult)


def test_tune_succeeds_or_raises_its_own_error(capsys):
    check_all(350, CALLS, check_call, capsys, 0.2)


EASY = jaxhpo.from_optax(lambda p, h, batch: total(p) + total(h) * total(p), optax.sgd(0.1))
SOLVE = {
    "solver": mostly([EASY, jaxhpo.fixed_point(lambda p, h, b: p), jaxhpo.fixed_point(lambda p, h, b: None)]),
    "state": mostly(["made", "made", EASY.init(quarter, quarter)]),
    "batches": mostly(
        [
            None,
            jnp.ones((2, 3)),
            {"x": jnp.ones((2, 3)), "y": jnp.arange(2)},
            lambda t: jnp.ones(3),
            lambda t: None,
            lambda: None,
            lambda t: "x",
            [jnp.ones(3), jnp.ones(3)],
            iter([1, 2]),
            jnp.ones((0, 3)),
            jnp.float32(1.0),
        ]
    ),
    "num_steps": mostly([1, 2, 3, np.int64(2), None]),
    "tol": mostly([None, 1e-3, 0.0]),
    "condition_batch": mostly([None, jnp.ones(3), {"x": jnp.ones(3)}]),
    "key": mostly([None, jax.random.key(1)]),
    "adjoint": mostly(
        [
            Unroll(),
            Unroll(truncate=1),
            Unroll(checkpoint=2),
            Unroll(checkpoint="binomial"),
            Implicit(),
            Implicit(Neumann(1, 0.1)),
            Forward(),
            jaxhpo.Reversible(),
            jaxhpo.ForwardGradient(1),
            CG(),
            Implicit,
        ]
    ),
}
SOLVES = st.tuples(
    any_hparams,
    any_hparams,
    st.lists(st.sampled_from(list(SOLVE)), max_size=3, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: SOLVE[name] for name in names})
    ),
)


def check_solve(case):
    """Evaluates and differentiates `solve`."""
    params, hparams, settings = case
    settings = {"solver": EASY, "state": "made", "num_steps": 2, **settings}
    solver, state = settings.pop("solver"), settings.pop("state")

    def run(h):
        start = EASY.init(params, h) if isinstance(state, str) and state == "made" else state
        return jaxhpo.solve(solver, start, h, **settings)

    of_start = params if isinstance(state, str) else getattr(state, "params", None)
    if solver is SOLVER and jax.tree.structure(of_start) != jax.tree.structure(hparams):
        return False  # the loss itself would raise
    solution = outcome(lambda: run(hparams))
    if isinstance(solution, jaxhpo.Solution):
        assert jax.tree.structure(solution.params) == jax.tree.structure(of_start)
        assert int(solution.info.num_steps) >= 1
        grad = outcome(lambda: jax.grad(lambda h: total(run(h).params))(hparams))
        if not isinstance(grad, jaxhpo.JaxhpoError):
            assert jax.tree.structure(grad) == jax.tree.structure(hparams)
    return isinstance(solution, jaxhpo.Solution)


def test_solve_succeeds_or_raises_its_own_error(capsys):
    check_all(160, SOLVES, check_solve, capsys, 0.1)


CHECKS = st.tuples(
    often(st.just(total), st.sampled_from(OUTER), foreign),
    any_hparams,
    st.fixed_dictionaries(
        {},
        optional={
            "num_directions": mostly([None, 1, 3]),
            "step_size": mostly([None, 0.1, 1e-3]),
            "key": mostly([None, jax.random.key(1)]),
        },
    ),
)


def check_check(case):
    """Calls `check_hypergradient`; differences of a quadratic are exact up to rounding."""
    outer_loss, hparams, settings = case
    result = outcome(lambda: jaxhpo.check_hypergradient(outer_loss, hparams, **settings))
    if isinstance(result, jaxhpo.HypergradientCheck):
        assert str(result) and np.isfinite(result.relative_error)
    return isinstance(result, jaxhpo.HypergradientCheck)


def test_check_succeeds_or_raises_its_own_error(capsys):
    check_all(110, CHECKS, check_check, capsys, 0.1)


bounds = st.floats(-1e6, 1e6, width=32) | foreign
TRANSFORMED = st.tuples(
    st.sampled_from([positive, unit_interval, simplex, box(-3.0, 4.0)]) | st.tuples(bounds, bounds),
    often(any_leaf, foreign),
    st.integers(-200, 200),
)


def check_transform(case):
    """The result of `forward` is inside the domain, and `inverse` accepts it."""
    transform, x, scale = case
    if isinstance(transform, tuple):
        transform = outcome(lambda: box(*case[0]))
        if isinstance(transform, jaxhpo.JaxhpoError):
            return False
    u = x * scale / 10 if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating) else x
    outcome(lambda: transform.inverse(x))
    h = outcome(lambda: transform.forward(u))
    if isinstance(h, jax.Array) and jnp.all(jnp.isfinite(jnp.asarray(u))):
        assert h.shape == jnp.shape(u) and h.dtype == jnp.result_type(u)
        back = transform.inverse(h)
        assert jnp.all(jnp.isfinite(h)) and jnp.all(jnp.isfinite(back)) and back.dtype == h.dtype
    return isinstance(h, jax.Array)


def test_transforms_succeed_or_raise_their_own_error(capsys):
    check_all(400, TRANSFORMED, check_transform, capsys, 0.1)
