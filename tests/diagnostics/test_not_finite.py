"""NaN and infinity are found and named in every part of a run, at its first, a middle and its last step."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhpo
from jaxhpo._diagnostics import not_finite
from jaxhpo._diagnostics.not_finite import diagnose
from jaxhpo._diagnostics.origin import find_origin

slow = pytest.mark.slow
STEPS, INNER = 5, 3
BAD_INNER = 1  # the inner step at which the loss, the gradient or the data break
HPARAMS = {"goal": jnp.array([0.5, 1.0]), "penalty": jnp.asarray(0.1)}
# The place of the number, and the leaf and the inner step that the message must name.
PLACES = {
    "inner loss": f"train loss is not finite at inner step {BAD_INNER}",
    "gradient": rf"`state\.params\['w'\]` is not finite after inner step {BAD_INNER}",
    "parameters": r"`state\.params\['w'\]` is not finite before inner step 0",
    "data": rf"`batches\['x'\]` is not finite before inner step {BAD_INNER}",
    "hyperparameters": r"`hparams\['goal'\]` is not finite before inner step 0",
    "outer loss": r"The outer loss is (nan|inf)\. No inner step is at fault",
}


@jax.custom_vjp
def spoil(params, add):
    """The identity, whose gradient is off by `add`."""
    return params


spoil.defvjp(lambda params, add: (params, add), lambda add, g: (jax.tree.map(lambda x: x + add, g), jnp.zeros(())))


def outer_loss(place, when, number, adjoint):
    """The validation loss of a short training, with `number` in `place` at the outer step `when`."""

    def loss(h, step, key):
        def put(where, t=BAD_INNER):
            return jnp.where((step == when) & (t == BAD_INNER), number, 0.0) if place == where else 0.0 * t

        def train_loss(params, h, batch):
            w = spoil(params["w"], put("gradient", batch["t"])) if place == "gradient" else params["w"]
            residual = w - h["goal"] * batch["x"]
            return jnp.sum(residual**2) + h["penalty"] * jnp.sum(w**2) + put("inner loss", batch["t"])

        solver = jaxhpo.from_optax(train_loss, optax.sgd(0.1))
        turns = jnp.arange(INNER)
        batches = {"x": 1.0 + put("data", turns), "t": turns}
        h = {"goal": h["goal"] + put("hyperparameters"), "penalty": h["penalty"]}
        start = solver.init({"w": jnp.zeros(2) + put("parameters")}, h)
        sol = jaxhpo.solve(solver, start, h, batches, adjoint=adjoint)
        return jnp.sum((sol.params["w"] - 2.0) ** 2) + put("outer loss"), step + 1, None

    return loss


def check(place, when, number, adjoint):
    def run():
        return jaxhpo.tune(
            outer_loss(place, when, number, adjoint),
            HPARAMS,
            optax.sgd(0.01),
            num_steps=STEPS,
            carry=jnp.zeros((), jnp.int32),
            progress=False,
        )

    message = rf"Outer step {when}: .*{PLACES[place]}"
    if when == 0:
        with pytest.raises(jaxhpo.NonFiniteError, match=message):
            run()
        return
    with pytest.warns(RuntimeWarning, match=message):
        result = run()
    assert result.status == "not_finite" and len(result.history["value"]) == when
    assert re.search(message, result.message)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(result.hparams))


QUICK = [("inner loss", 2, np.inf), ("outer loss", 0, np.nan)]


@pytest.mark.parametrize(("place", "when", "number"), [QUICK[0], pytest.param(*QUICK[1], marks=pytest.mark.slow)])
def test_place_and_step_are_named(place, when, number):
    check(place, when, number, jaxhpo.Unroll())


def every_place():
    """The first step, which raises, and a later one, which warns, for each place; every pair of other values."""
    numbers, rules, later = (np.nan, np.inf), (jaxhpo.Unroll(), jaxhpo.Implicit()), (STEPS // 2, STEPS - 1)
    for i, place in enumerate(PLACES):
        number, rule = i % 2, i // 2 % 2
        yield place, 0, numbers[number], rules[rule]
        yield place, later[(i + 1) // 2 % 2], numbers[1 - number], rules[1 - rule]


@slow
@pytest.mark.filterwarnings("ignore:The train loss holds `spoil`:RuntimeWarning")
@pytest.mark.parametrize(
    ("place", "when", "number", "adjoint"),
    [*every_place()],
    ids=lambda value: type(value).__name__.lower() if isinstance(value, (jaxhpo.Unroll, jaxhpo.Implicit)) else None,
)
def test_every_place_and_step_is_named(place, when, number, adjoint):
    check(place, when, number, adjoint)


def training(loss, optimizer=lambda h: optax.sgd(0.1), num_steps=3, outer=jnp.sum, **settings):
    solver = jaxhpo.from_optax(loss, optimizer)

    def value(h):
        sol = jaxhpo.solve(solver, solver.init(jnp.ones(2), h), h, num_steps=num_steps, **settings)
        return outer(sol.params)

    return value


def test_operation_is_named_with_its_line():
    fn = training(lambda p, h, b: jnp.sum((p - h) ** 2) + jnp.sum(jnp.log(p - 0.9)))
    said = diagnose(fn, jnp.asarray(0.5))
    # The first step, of gradient 2 (1 - .5) + 1 / .1 = 11, leads to 1 - .1 * 11 = -.1, and -.1 - .9 = -1.
    assert "train loss is not finite at inner step 1" in said
    assert re.search(r"`log` \(test_not_finite\.py:\d+, in .*<lambda>\) took the logarithm of -1:", said)


QUADRATIC = {"penalty": jnp.asarray(30.0), "shift": jnp.asarray(0.1), "rate": jnp.asarray(0.1)}


@pytest.mark.parametrize("adjoint", [jaxhpo.Unroll(), pytest.param(jaxhpo.Unroll(checkpoint=20), marks=slow)])
@pytest.mark.slow
def test_divergence_names_curvature_and_driver(adjoint):
    """Rate 0.1 and curvature 2 * 30: a step multiplies an error by 1 - 6."""
    fn = training(
        lambda p, h, b: h["penalty"] * jnp.sum(p**2) + jnp.sum(h["shift"] * p), num_steps=500, adjoint=adjoint
    )
    said = diagnose(fn, QUADRATIC)
    assert "multiplies an error along the worst direction by -5 " in said
    assert "learning rate x curvature is 6, above 2" in said
    assert "driven by `hparams['penalty']` = 30:" in said


@slow
def test_divergence_does_not_blame_what_could_not_prevent_it():
    """Rate 10 and curvature 2 (1 + 1e-6): without the penalty a step would still multiply an error by 1 - 20."""
    fn = training(lambda p, h, b: jnp.sum((p - h["shift"]) ** 2) + h["penalty"] * jnp.sum(p**2), optax.sgd(10.0), 500)
    said = diagnose(fn, QUADRATIC | {"penalty": jnp.asarray(1e-6)})
    assert "by -19 " in said and "driven by" not in said


@slow
def test_divergence_names_a_tuned_rate_too():
    fn = training(
        lambda p, h, b: h["penalty"] * jnp.sum(p**2) + jnp.sum(h["shift"] * p), lambda h: optax.sgd(h["rate"]), 500
    )
    assert "driven by `hparams['penalty']` = 30 and `hparams['rate']` = 0.1:" in diagnose(fn, QUADRATIC)


def descent(grad):
    """A step of gradient descent at the rate `h["rate"]`, as `measure_growth` takes it."""
    return lambda w, inputs, x: w - inputs[0]["rate"] * grad(w, inputs[0])


def momentum(state, inputs, x):
    h, (w, v) = inputs[0], state
    v = h["momentum"] * v + w
    return w - h["rate"] * v, v


GOAL = jnp.array([1.0, 4.0])
PENALISED = descent(lambda w, h: 2 * (1 + h["penalty"]) * w)
CONCAVE = descent(lambda w, h: -w + h["penalty"] * w)
LAYERS = descent(lambda w, h: w * jnp.array([h["a"], h["b"]]))
BOTH = lambda w, inputs, x: w - w * jnp.stack([inputs[0]["a"], inputs[0]["b"]])  # noqa: E731
POSITIVE = {"hparams['rate']": jaxhpo.positive, "hparams['penalty']": jaxhpo.positive}
LOGIT = {"hparams['momentum']": jaxhpo.unit_interval}
CULPRITS = {
    # The step, the hyperparameters, what is known of their range, and which of them could prevent the divergence.
    "rate": (PENALISED, {"rate": 10.0, "penalty": 1e-6}, {}, "rate"),
    "rate under transforms": (PENALISED, {"rate": 1e3, "penalty": 1e-6}, POSITIVE, "rate"),
    "penalty": (PENALISED, {"rate": 0.1, "penalty": 30.0}, POSITIVE, "penalty rate"),
    "momentum": (momentum, {"rate": 0.1, "momentum": 1.1}, {}, "momentum"),
    "rate with momentum": (
        momentum,
        {"rate": 10.0, "momentum": 0.9},
        {"hparams['momentum']": jaxhpo.unit_interval},
        "rate",
    ),
    "scale": (descent(lambda w, h: h["scale"] ** 2 * w), {"rate": 0.1, "scale": 10.0}, {}, "rate scale"),
    "start": (descent(lambda w, h: w**3 + 0 * h["start"]), {"rate": 1.0, "start": 10.0}, {}, "rate"),
    "one layer": (
        descent(lambda w, h: w * jnp.array([h["a"], h["b"]])),
        {"rate": 0.1, "a": 1.0, "b": 40.0},
        {},
        "b rate",
    ),
    "both layers": (BOTH, {"a": 7.0, "b": 10.0}, {}, "a b"),
    "examples": (descent(lambda w, h: jnp.sum(h["w"]) * w), {"rate": 0.1, "w": np.full(60, 0.5)}, {}, "rate w"),
    "logarithm of the rate": (lambda w, i, x: w - jnp.exp(i[0]["log"]) * 3 * w, {"log": 2.3}, {}, "log"),
    "flat direction": (descent(lambda w, h: GOAL * (GOAL @ w)), {"rate": 10.0, "penalty": 1e-3}, {}, "rate"),
    # Lower rates make the error grow more slowly, but do not end it; a penalty of .5 above the curvature does.
    "not convex": (CONCAVE, {"rate": 0.1, "penalty": 1e-3}, POSITIVE, ""),
    "penalty too low": (
        descent(lambda w, h: -w + h["penalty"] * w),
        {"rate": 0.1, "penalty": 0.5},
        POSITIVE,
        "penalty",
    ),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in ("rate", "not convex") else slow) for c in CULPRITS])
def test_a_leaf_is_blamed_where_it_could_prevent_the_divergence(case):
    step, h, transforms, culprits = CULPRITS[case]
    h, start = jax.tree.map(jnp.asarray, h), GOAL if step is not momentum else (GOAL, GOAL)
    factor, drivers = not_finite.measure_growth(step, start, (h,), None, transforms)
    assert abs(factor) > 1 and re.findall(r"\['(\w+)'\]", "".join(drivers)) == culprits.split()


@slow
@pytest.mark.parametrize(
    ("fn", "at", "said"),
    [
        (lambda x: jnp.sqrt(x), -1.0, "square root of -1"),
        (lambda x: jnp.sqrt(x * x), 0.0, "derivative of a square root at zero"),
        (lambda x: jnp.linalg.norm(x * jnp.ones(2)), 0.0, "derivative of a square root at zero"),
        (lambda x: jnp.where(x > 0, jnp.log(x), 0.0), 0.0, "divided by zero.*put one around its argument"),
        (lambda x: x**0.5, 0.0, r"raised 0 to the power -0\.5"),
        (lambda x: x**-2, 0.0, "raised zero to a negative power"),
        (lambda x: jnp.exp(1000 * x), 1.0, "exponential of 1000"),
        (lambda x: x**300, 1e3, r"overflowed"),
        (lambda x: jnp.sum(jax.nn.softmax(jnp.where(jnp.zeros(2, bool), x, -jnp.inf))), 1.0, "infinities that cancel"),
        (lambda x: x + jnp.array([1.0, jnp.nan])[1], 1.0, "a constant of the program.*data"),
        (lambda x: jax.lax.fori_loop(0, 4, lambda i, y: jnp.log(y), x), 2.0, "logarithm of -0.3665"),  # log log 2
        (lambda x: jax.lax.cond(x > 0, jnp.log, jnp.sin, x - 1.0), 0.5, "logarithm of -0.5"),
        (jax.jit(jax.checkpoint(lambda x: jnp.log(x))), -1.0, "logarithm of -1"),
        (lambda x: jax.vmap(jnp.log)(jnp.array([1.0, -3.0]) * x).sum(), 1.0, "logarithm of -3"),
    ],
)
def test_origin_is_explained(fn, at, said):
    assert re.search(said, str(find_origin(jax.value_and_grad(fn), jnp.asarray(at))))


def test_finite_result_has_no_origin():
    assert find_origin(jnp.log, 2.0) is None


@slow
@pytest.mark.parametrize(
    "adjoint", [jaxhpo.Unroll(), jaxhpo.Unroll(checkpoint=1), jaxhpo.Unroll(checkpoint=2), jaxhpo.Forward()]
)
def test_training_stops_at_a_loss_that_is_not_finite(adjoint):
    """The logarithm has the derivative -1 at -1: without a check the parameters would stay finite."""
    fn = training(lambda p, h, b: jnp.sum(jnp.log(h * p)), num_steps=2, adjoint=adjoint)
    assert not np.isfinite(fn(jnp.asarray(-1.0)))


QUADRATIC_LOSS = lambda p, h, b: h["penalty"] * jnp.sum(p**2)  # noqa: E731


@pytest.mark.slow
def test_divergence_within_a_scan_of_solves_is_attributed_to_the_solve():
    """Rate .1 and curvature 2 * 1e6 multiply parameters by 1 - 2e5 at each step of every solve."""
    solver = jaxhpo.from_optax(QUADRATIC_LOSS, optax.sgd(0.1))

    def fn(h):
        def body(params, _):
            return jaxhpo.solve(solver, solver.init(params, h), h, num_steps=6).params, None

        return jnp.sum(jax.lax.scan(body, jnp.ones(2), None, 20)[0])

    said = diagnose(fn, {"penalty": jnp.asarray(1e6)})
    # The train loss 1e6 * 2 * (2e5)**(2 t) passes 1.8e308 at t = 29, the fifth step of the fifth solve.
    assert said.startswith("The train loss is not finite at inner step 5. It began where `mul` (test_not_finite.py:")
    assert "overflowed: its largest operand is 5.76e+307" in said  # 2 (2e5)**(2 * 29)


@slow
def test_many_diverging_runs_are_measured_once(monkeypatch):
    """The values that a run closes over come to the host once."""
    kept, measured = [], []

    class Counting(dict):
        def setdefault(self, key, value):
            kept.append(key)
            return super().setdefault(key, value)

    class CountingLog(not_finite.StepLog):
        def __init__(self):
            super().__init__()
            self.first = Counting()

    growth = not_finite.measure_growth
    monkeypatch.setattr(not_finite, "StepLog", CountingLog)
    monkeypatch.setattr(not_finite, "measure_growth", lambda *args: measured.append(1) or growth(*args))
    data = jnp.ones(1000)
    fn = training(lambda p, h, b: QUADRATIC_LOSS(p, h, b) + 0 * data[0], num_steps=400)
    assert "learning rate x curvature is 6" in diagnose(fn, {"penalty": jnp.asarray(30.0)})
    assert len(kept) == 1 and len(measured) == 1
    tasks = jnp.array([30.0, 40.0, 50.0])
    said = diagnose(lambda h: jnp.sum(jax.vmap(lambda p: fn({"penalty": p}))(h["tasks"])), {"tasks": tasks})
    assert "The inner run diverges" in said and len(measured) == 2


@slow
def test_forward_fault_is_found_under_drmad():
    solver = jaxhpo.momentum_sgd(
        lambda p, h, b: jnp.sum((p - h) ** 2) + jnp.sum(jnp.log(p + 0.3)), learning_rate=0.3, momentum=0.5
    )

    def fn(h):
        sol = jaxhpo.solve(solver, solver.init(jnp.zeros(2), h), h, num_steps=9, adjoint=jaxhpo.DrMAD())
        return jnp.sum(sol.params)

    said = diagnose(fn, jnp.array([-2.0, 1.0]))
    assert "`log` (test_not_finite.py:" in said and "took the logarithm of -" in said


@slow
@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("state", "`state.params` is not finite before inner step 0: it was passed to `solve` that way. Correct"),
        ("hparams", "`hparams` is not finite before inner step 0: it was passed to `solve` that way. Correct"),
        ("batches", "`Reversible()`: at inner step 3 a weight or a velocity left the range"),
        ("earlier solve", "Inner problem 0: The train loss is not finite at inner step 0."),
    ],
)
def test_reversible_is_named_only_for_its_own_overflow(place, said):
    def fn(h):
        def start_at(x, wanted):
            return x + jnp.log(-h) if place == wanted else x

        start = start_at(jnp.ones(3), "state")
        if place == "earlier solve":
            bad = jaxhpo.from_optax(lambda p, h, b: jnp.sum(p**2 + jnp.log(p - 9)), optax.sgd(0.1))
            start = jaxhpo.solve(bad, bad.init(start, h), h, num_steps=2).params
        solver = jaxhpo.momentum_sgd(lambda p, h, b: jnp.sum(h * (p - b) ** 2), 0.1, 0.9)
        batches = jnp.zeros((5, 3)).at[3].add(start_at(0.0, "batches"))
        given = start_at(h, "hparams")
        sol = jaxhpo.solve(solver, solver.init(start, given), given, batches, adjoint=jaxhpo.Reversible())
        return jnp.sum(sol.params)

    assert diagnose(fn, jnp.ones(())).startswith(said)


@slow
def test_key_that_broke_is_followed_among_several():
    def loss(h, carry, key):
        sign = jnp.where(jax.random.uniform(key) < 0.25, -1.0, 1.0)
        return jnp.sum(h**2) + jnp.log(sign * (1 + 0 * h[0])), carry, None

    def said(seed):
        with pytest.raises(jaxhpo.NonFiniteError) as error:
            jaxhpo.tune(
                *(loss, jnp.ones(2), optax.sgd(0.1)),
                **{"num_steps": 1, "remedies": jaxhpo.Remedies(accumulate=8), "key": jax.random.key(seed)},
                progress=False,
            )
        return str(error.value)

    assert all("`log` (test_not_finite.py:" in said(seed) for seed in range(2))


def test_carry_and_update_that_are_not_finite_are_named():
    def loss(h, carry, key):
        return jnp.sum(h**2), jnp.log(carry - 1.0), None

    settings = {"num_steps": 4, "progress": False}
    with pytest.warns(
        RuntimeWarning, match=r"but `carry` is not\. It began where `log` \(test_not_finite.py:\d+, in test_carry"
    ):
        jaxhpo.tune(loss, jnp.ones(2), optax.sgd(0.1), carry=jnp.asarray(8.0), **settings)
    rate = lambda step: 0.1 / jnp.where(step == 2, 0.0, 1.0)  # noqa: E731
    with pytest.warns(RuntimeWarning, match="update of `hparams` is not.*look at the optimiser's rate and schedule"):
        jaxhpo.tune(lambda h: jnp.sum(h**2), jnp.ones(2), optax.sgd(rate), **settings)
