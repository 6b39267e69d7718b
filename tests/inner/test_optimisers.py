"""Every public optax transformation as the inner optimiser, against central differences; `momentum_sgd`; schedules.

`pytest -s -n 0 -m "" tests/inner/test_optimisers.py` prints the table of agreement.
"""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from helpers import grad, relative_error

import jaxhpo
from jaxhpo import Unroll

# The tolerance for every optimiser. Differences of step 2e-4 are more accurate, even where an update turns within 1e-2.
TOLERANCE, DIFFERENCE_STEP = 1e-6, 2e-4
NUM_STEPS = 8

rng = np.random.default_rng(0)
inputs, targets = jnp.asarray(rng.normal(size=(12, 3))), jnp.asarray(rng.normal(size=(12, 2)))
PARAMS = {"bias": jnp.asarray(0.1 * rng.normal(size=2)), "kernel": jnp.asarray(0.5 * rng.normal(size=(3, 2)))}
HPARAMS = {"log_penalty": jnp.log(0.1), "log_rate": jnp.log(0.05)}


def train_loss(params, h, batch, inputs=inputs):
    outputs = jnp.tanh(inputs @ params["kernel"] + params["bias"][None])
    penalty = sum(jnp.sum(p**2) for p in jax.tree.leaves(params))
    return jnp.mean((outputs - targets) ** 2) + jnp.exp(h["log_penalty"]) * penalty


def outer_loss(tx):
    """A smooth function of the parameters after eight steps; `tx` maps the hyperparameters to an optimiser."""

    def outer(h, start=PARAMS, inputs=inputs):
        solver = jaxhpo.from_optax(functools.partial(train_loss, inputs=inputs), tx)
        params = jaxhpo.solve(solver, solver.init(start, h), h, num_steps=NUM_STEPS, adjoint=Unroll()).params
        return jnp.sum((params["kernel"] - 0.3) ** 2) + jnp.sum((params["bias"] - 1.0) ** 2)

    return outer


def differences(fn, h):
    """Derivatives in each scalar hyperparameter, by central differences of fourth order."""

    def along(name):
        value = lambda steps: fn(h | {name: h[name] + steps * DIFFERENCE_STEP})  # noqa: E731
        return (8 * (value(1) - value(-1)) - (value(2) - value(-2))) / (12 * DIFFERENCE_STEP)

    return {name: along(name) for name in h}


def error_of(outer, h) -> float:
    """The relative error of the hypergradient; optax's own arithmetic may promote ranks and warn of deprecation."""
    with jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return jaxhpo.check_hypergradient(outer, h, step_size=DIFFERENCE_STEP).relative_error


# --- every optax transformation ---------------------------------------------------------------------------------------

RATES = ("learning_rate", "max_learning_rate")
# Starting points (those of optax would move parameters by 1e-6 in eight steps), and arguments that optax requires.
SETTINGS = {
    "optax.contrib.dadapt_adamw": {"estim_lr0": 0.1},
    "optax.contrib.prodigy": {"estim_lr0": 0.1},
    "optax.contrib.dog": {"init_step": ("distance", 0.1)},
    "optax.contrib.dowg": {"init_estim_sq_dist": 0.1},
    "optax.scale_by_distance_over_gradients": {"reps_rel": 0.1},
    "optax.noisy_sgd": {"key": jax.random.key(0)},
}


def is_transformation(tx) -> bool:
    return callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))


def public_functions():
    """`(name, function, signature)` of everything in optax's two public namespaces."""
    for prefix, namespace in (("optax", optax), ("optax.contrib", optax.contrib)):
        for name in sorted(vars(namespace)):
            fn = getattr(namespace, name)
            if name.startswith("_") or inspect.isclass(fn) or not callable(fn):
                continue
            try:
                yield f"{prefix}.{name}", fn, inspect.signature(fn)
            except ValueError:
                pass  # a type alias


def makers() -> dict[str, Callable]:
    """All functions that need at most a learning rate and return a transformation, as functions of the rate."""
    out = {}
    for name, fn, signature in public_functions():
        needed = [p.name for p in signature.parameters.values() if p.default is p.empty]
        rate_name = next((p for p in signature.parameters if p in RATES), None)
        if not set(needed) <= set(RATES):
            continue
        settings = dict(SETTINGS.get(name, {}))
        if "eps_root" in signature.parameters:
            settings["eps_root"] = 1e-8

        def make(rate, fn=fn, rate_name=rate_name, settings=settings):
            if rate_name:
                return fn(**{rate_name: rate}, **settings)
            return optax.chain(fn(**settings), optax.scale_by_learning_rate(rate))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if is_transformation(fn(**({rate_name: 0.1} if rate_name else {}), **settings)):
                out[name] = make
    return out


def adam(rate):
    return optax.adam(rate, eps_root=1e-8)


def before(*transformations):
    """Gradient descent after other transformations of the gradient."""
    return lambda rate: optax.chain(*transformations, optax.sgd(rate))


def with_obj_fn(tx):
    """Passes the `value_fn` of `from_optax` as `obj_fn`, its name in sophia."""

    def update(updates, state, params, *, value_fn, **_):
        return tx.update(updates, state, params, obj_fn=value_fn)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def on_kernel(tx, rate):
    return optax.chain(optax.masked(tx, {"bias": False, "kernel": True}), optax.scale_by_learning_rate(rate))


BIAS_ONLY = {"bias": True, "kernel": False}
LABELS = {"bias": "a", "kernel": "b"}
# What takes other transformations, or arguments of its own.
WRAPPERS = {
    "optax.MultiSteps": lambda rate: optax.MultiSteps(adam(rate), 2).gradient_transformation(),
    "optax.MultiSteps, float64": lambda rate: optax.MultiSteps(
        adam(rate), 2, accumulator_dtype=float
    ).gradient_transformation(),
    "optax.adafactor, factored": lambda rate: optax.adafactor(rate, min_dim_size_to_factor=2),
    "optax.adaptive_grad_clip": before(optax.adaptive_grad_clip(0.05)),
    "optax.add_noise": before(optax.add_noise(0.01, 0.5, jax.random.key(0))),
    "optax.apply_if_finite": lambda rate: optax.apply_if_finite(adam(rate), 3),
    "optax.chain": lambda rate: optax.chain(optax.clip_by_global_norm(0.5), adam(rate)),
    "optax.clip": before(optax.clip(0.2)),
    "optax.clip_by_block_rms": before(optax.clip_by_block_rms(0.2)),
    "optax.clip_by_global_norm": before(optax.clip_by_global_norm(0.5)),
    "optax.conditionally_mask": lambda rate: optax.conditionally_mask(adam(rate), lambda step: step % 2 == 0),
    "optax.conditionally_transform": lambda rate: optax.conditionally_transform(adam(rate), lambda step: step < 9),
    "optax.contrib.differentially_private_aggregate": before(
        optax.contrib.differentially_private_aggregate(1.0, 0.1, jax.random.key(0))
    ),
    "optax.contrib.dpsgd": lambda rate: optax.contrib.dpsgd(rate, 1.0, 0.1, 0),
    "optax.contrib.mechanize": lambda rate: optax.contrib.mechanize(optax.sgd(rate), s_init=0.1),
    "optax.contrib.sam": lambda rate: optax.contrib.sam(
        optax.sgd(rate), optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    ),
    "optax.contrib.scale_by_muon": lambda rate: on_kernel(
        optax.contrib.scale_by_muon(
            weight_dimension_numbers=lambda p: jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), p)
        ),
        rate,
    ),
    "optax.contrib.schedule_free": lambda rate: optax.contrib.schedule_free(optax.sgd(rate), rate),
    "optax.contrib.sophia, obj_fn": lambda rate: with_obj_fn(
        optax.contrib.sophia(rate, eps=1e-2, clip_threshold=1e6)  # clipped everywhere, it would be a sign
    ),
    "optax.contrib.split_real_and_imaginary": lambda rate: optax.contrib.split_real_and_imaginary(adam(rate)),
    "optax.ema": before(optax.ema(0.9)),
    "optax.flatten": lambda rate: optax.flatten(adam(rate)),
    "optax.freeze": before(optax.freeze(BIAS_ONLY)),
    "optax.inject_hyperparams": lambda rate: optax.inject_hyperparams(optax.adam)(rate, eps_root=1e-8),
    "optax.inject_stateful_hyperparams": lambda rate: optax.inject_stateful_hyperparams(optax.adam)(
        rate, eps_root=1e-8
    ),
    "optax.lbfgs, no line search": lambda rate: optax.lbfgs(rate, linesearch=None),
    "optax.lookahead": lambda rate: optax.lookahead(optax.sgd(rate), 2, 0.5),
    "optax.masked": lambda rate: on_kernel(optax.scale_by_adam(eps_root=1e-8), rate),
    "optax.multi_transform": lambda rate: optax.multi_transform({"a": optax.sgd(rate), "b": adam(rate)}, LABELS),
    "optax.named_chain": lambda rate: optax.named_chain(("trace", optax.trace(0.9)), ("sgd", optax.sgd(rate))),
    "optax.partition": lambda rate: optax.partition({"a": optax.sgd(rate), "b": adam(rate)}, LABELS),
    "optax.scale": lambda rate: optax.scale(-rate),
    # A hundred times the rate, so that it has to backtrack.
    "optax.scale_by_backtracking_linesearch": lambda rate: optax.chain(
        optax.sgd(100 * rate), optax.scale_by_backtracking_linesearch(20)
    ),
    "optax.scale_by_schedule": lambda rate: optax.scale_by_schedule(lambda step: -rate / (1 + step)),
    "optax.scale_by_zoom_linesearch": lambda rate: optax.chain(optax.sgd(rate), optax.scale_by_zoom_linesearch(5)),
    "optax.selective_transform": lambda rate: optax.selective_transform(adam(rate), freeze_mask=BIAS_ONLY),
    "optax.sgd, momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "optax.sgd, nesterov": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    "optax.snapshot": before(optax.snapshot("norm", optax.tree.norm)),
    "optax.stateless": before(optax.stateless(lambda updates, params: jax.tree.map(jnp.tanh, updates))),
    "optax.stateless_with_tree_map": before(optax.stateless_with_tree_map(lambda update, param: update + 0.1 * param)),
    "optax.trace": before(optax.trace(0.9)),
    "optax.with_extra_args_support": lambda rate: optax.with_extra_args_support(adam(rate)),
}
if hasattr(optax, "monitor"):
    WRAPPERS["optax.monitor"] = before(optax.monitor({"norm": optax.tree.norm}))
MAKERS = makers()
OPTIMISERS = MAKERS | WRAPPERS
NOT_OPTIMISERS = {
    "optax.measure_with_ema": "its updates are a measurement, not a tree like the parameters",
}


# --- the known exceptions, each with its reason -----------------------------------------------------------------------


class Raises(NamedTuple):
    """Cannot be differentiated, or called by `from_optax`: raises an exception that says so."""

    reason: str
    match: str
    kind: type[Exception] = ValueError


class NotFinite(NamedTuple):
    """The run is finite, but the hypergradient of the penalty is not."""

    reason: str


class Zero(NamedTuple):
    """The hypergradient of the penalty is exactly zero. That of the rate is right, or zero too."""

    reason: str


class Coarse(NamedTuple):
    """Agrees, but only to a precision coarser than `TOLERANCE`."""

    reason: str
    tolerance: float


SIGN = Zero("the update is the sign of the gradient, whose derivative is zero almost everywhere")
ZOOM = Raises("its line search is a loop of data-dependent length", "Reverse-mode differentiation does not work for")
RECTIFIED = NotFinite("the rectification of the first steps is the root of a negative number, masked afterwards")
FLOAT32_SVD = Coarse("computes its projection in float32", 1e-2)
PER_EXAMPLE = Raises("takes one gradient per example", "expects `grads` to have a batch dimension")
OBJ_FN = Raises("needs the loss as `obj_fn`; `from_optax` passes `value_fn`", "obj_fn must be provided")

EXCEPTIONS = {
    "optax.MultiSteps": Coarse("accumulates gradients in float32 by default", 1e-4),
    "optax.contrib.differentially_private_aggregate": PER_EXAMPLE,
    "optax.contrib.dpsgd": PER_EXAMPLE,
    "optax.contrib.galore": FLOAT32_SVD,
    "optax.contrib.hutchinson_estimator_diag_hessian": OBJ_FN,
    "optax.contrib.mechanize": NotFinite("its first step takes the root of a second moment that starts at zero"),
    "optax.contrib.scale_by_galore": FLOAT32_SVD,
    "optax.contrib.sophia": OBJ_FN,
    "optax.lbfgs": ZOOM,
    "optax.lion": SIGN,
    "optax.lookahead": Raises("trains a pair of copies of the parameters", "has no attribute 'fast'", AttributeError),
    "optax.monitor": Raises("its state changes its tree at the first step", "changed the tree of the state"),
    "optax.radam": RECTIFIED,
    "optax.rprop": SIGN,
    "optax.scale_by_lion": SIGN,
    "optax.scale_by_radam": RECTIFIED,
    "optax.scale_by_rprop": SIGN,
    "optax.scale_by_sign": SIGN,
    "optax.scale_by_zoom_linesearch": ZOOM,
    "optax.set_to_zero": Zero("does not change the parameters"),
    "optax.sign_sgd": SIGN,
    "optax.signum": SIGN,
}

# In none of the versions before 0.2.7.
SINCE = {"optax.contrib.galore", "optax.contrib.scale_by_galore", "optax.monitor", "optax.signum"}
QUICK = {
    "optax.adamw",
    "optax.chain",
    "optax.contrib.sam",
    "optax.inject_hyperparams",
    "optax.lion",
    "optax.radam",
    "optax.sgd, momentum",
}


def optimisers(names):
    """One test per optimiser: one of each kind in the quick suite, the others slow."""
    return pytest.mark.parametrize(
        "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in sorted(names)]
    )


@optimisers(OPTIMISERS)
def test_optimiser(name):
    """The hypergradient of a penalty in the loss and of the learning rate is right, or fails in the known way.

    For optimisers that need at most a learning rate, the hypergradient is also finite where an input and its weights
    are always zero, with `eps_root` where the optimiser has it. One compiled program computes all, with differences.
    """
    with jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        check_optimiser(name, EXCEPTIONS.get(name))


def check_optimiser(name, known):
    outer = outer_loss(lambda h: OPTIMISERS[name](jnp.exp(h["log_rate"])))
    if isinstance(known, Raises):
        print(f"\n{name:50} {type(known).__name__}: {known.reason}", end="")
        with pytest.raises(known.kind, match=known.match):
            jax.grad(outer)(HPARAMS)
        return
    program = jax.jit(jax.value_and_grad(outer))
    value, hypergrad = program(HPARAMS, PARAMS, inputs)
    assert jnp.isfinite(value)
    if isinstance(known, NotFinite):
        print(f"\n{name:50} {type(known).__name__}: {known.reason}", end="")
        assert not jnp.isfinite(hypergrad["log_penalty"])
        return
    want = differences(lambda h: program(h, PARAMS, inputs)[0], HPARAMS)
    if isinstance(known, Zero):
        print(f"\n{name:50} {type(known).__name__}: {known.reason}", end="")
        assert hypergrad["log_penalty"] == 0
        assert hypergrad["log_rate"] == 0 or relative_error(hypergrad["log_rate"], want["log_rate"]) <= TOLERANCE
        return
    error = relative_error(*(jnp.stack([tree[name] for name in HPARAMS]) for tree in (hypergrad, want)))
    print(f"\n{name:50} {error:.1e}" + (f"  {known.reason}" if known else ""), end="")
    if known:
        assert TOLERANCE < error <= known.tolerance
        return
    assert error <= TOLERANCE
    if name in MAKERS:
        start = PARAMS | {"kernel": PARAMS["kernel"].at[2].set(0.0)}
        _, hypergrad = program(HPARAMS, start, inputs.at[:, 2].set(0.0))
        assert all(jnp.isfinite(g) for g in hypergrad.values()) == (name not in NAN_AT_ZERO_GRADIENT)


def test_no_transformation_is_missing():
    """Every function annotated to return a transformation is in the table; a new alias is added automatically."""
    annotated = {
        name
        for name, _, signature in public_functions()
        if "GradientTransformation" in str(signature.return_annotation)
    }
    missing = annotated - set(OPTIMISERS) - set(NOT_OPTIMISERS)
    assert not missing, f"add a row to WRAPPERS, which says how to call them, for {sorted(missing)}"
    assert {"optax.adam", "optax.nadam", "optax.contrib.dog", "optax.scale_by_adam"} <= set(MAKERS)
    assert len(MAKERS) >= 80  # 83 in optax 0.2.8
    assert set(EXCEPTIONS) | QUICK <= set(OPTIMISERS) | SINCE


# These take the square root of the second moment of an entry whose gradient is always zero, and have no `eps_root`.
NAN_AT_ZERO_GRADIENT = {
    "optax.contrib.adopt",
    "optax.contrib.dadapt_adamw",
    "optax.contrib.madgrad",
    "optax.contrib.momo_adam",
    "optax.contrib.prodigy",
    "optax.contrib.scale_by_adopt",
    "optax.contrib.scale_by_madgrad",
    "optax.contrib.schedule_free_adamw",
}


# --- every setting of an optimiser can be a hyperparameter ------------------------------------------------------------


def schedule(h):
    """Three steps of warm-up, then a cosine decay."""
    peak = jnp.exp(h["log_rate"])
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, 3), optax.cosine_decay_schedule(peak, NUM_STEPS - 3, h["alpha"])], [3]
    )


SETTINGS_AS_HPARAMS = {
    "rate per step": (
        {"rates": jnp.linspace(0.05, 0.2, NUM_STEPS)},
        lambda h: optax.sgd(lambda step: h["rates"][step], momentum=0.9),
    ),
    "cosine schedule": (
        {"log_rate": jnp.log(0.2), "alpha": 0.1},
        lambda h: optax.sgd(optax.cosine_decay_schedule(jnp.exp(h["log_rate"]), NUM_STEPS, h["alpha"])),
    ),
    "warm-up schedule": (
        {"log_rate": jnp.log(0.2), "alpha": 0.1},
        lambda h: optax.adam(schedule(h), eps_root=1e-8),
    ),
    "injected schedule": (
        {"log_rate": jnp.log(0.2), "alpha": 0.1},
        lambda h: optax.inject_hyperparams(optax.adam)(schedule(h), eps_root=1e-8),
    ),
    "weight decay": ({"decay": 0.3}, lambda h: optax.adamw(0.05, weight_decay=h["decay"], eps_root=1e-8)),
    "momentum": ({"rate": 0.1, "momentum": 0.8}, lambda h: optax.sgd(h["rate"], momentum=h["momentum"])),
    "betas": ({"b1": 0.85, "b2": 0.95}, lambda h: optax.adam(0.05, b1=h["b1"], b2=h["b2"], eps_root=1e-8)),
    "clipping norm": (
        {"norm": 0.5},
        lambda h: optax.chain(optax.clip_by_global_norm(h["norm"]), optax.adam(0.1, eps_root=1e-8)),
    ),
    "rate per layer": (
        {"rates": {"bias": 0.3, "kernel": 0.1}},
        lambda h: optax.multi_transform(
            {"a": optax.sgd(h["rates"]["bias"]), "b": optax.sgd(h["rates"]["kernel"], momentum=0.9)}, LABELS
        ),
    ),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "rate per step" else pytest.mark.slow) for name in SETTINGS_AS_HPARAMS],
)
def test_settings_are_hyperparameters(name):
    settings, tx = SETTINGS_AS_HPARAMS[name]
    assert error_of(outer_loss(tx), settings | {"log_penalty": jnp.log(0.1)}) <= TOLERANCE


def test_warmup_cosine_decay_schedule():
    """It branches in Python on its peak, so the peak cannot be tuned under `jit`; `schedule` above can be."""
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.jit(lambda peak: optax.warmup_cosine_decay_schedule(0.0, peak, 3, NUM_STEPS)(4))(0.1)


# --- momentum_sgd -----------------------------------------------------------------------------------------------------

LAYERS = {"first": PARAMS, "second": {"bias": jnp.zeros(2), "kernel": 0.5 * jnp.eye(2)}}
STEPS = jnp.linspace(0.1, 0.3, NUM_STEPS)
DECAYS = jnp.linspace(0.5, 0.9, NUM_STEPS)
PER_LAYER = {"first": STEPS, "second": 0.5 * STEPS}


@pytest.mark.parametrize(
    ("rates", "momenta"),
    [
        pytest.param(STEPS, DECAYS, marks=pytest.mark.slow),
        pytest.param(PER_LAYER, {"first": DECAYS, "second": DECAYS[::-1]}, marks=pytest.mark.slow),
        # a prefix of another depth in each layer: one rate per leaf in the first, one for all of the second
        ({"first": {"bias": 2 * STEPS, "kernel": STEPS}, "second": STEPS}, DECAYS),
    ],
    ids=["one schedule", "one per layer", "mixed prefix"],
)
def test_momentum_sgd(rates, momenta):
    """Schedules of rate and momentum for all parameters, per layer, and per leaf."""

    def loss(params, h, batch):
        hidden = jnp.tanh(inputs @ params["first"]["kernel"] + params["first"]["bias"][None])
        outputs = hidden @ params["second"]["kernel"] + params["second"]["bias"][None]
        penalty = sum(jnp.sum(p**2) for p in jax.tree.leaves(params))
        return jnp.mean((outputs - targets) ** 2) + jnp.exp(h["log_penalty"]) * penalty

    def now(tree, step):
        return jax.tree.map(lambda x: x[step], tree)

    solver = jaxhpo.momentum_sgd(loss, lambda h, t: now(h["rates"], t), lambda h, t: now(h["momenta"], t))

    def outer(h):
        params = jaxhpo.solve(solver, solver.init(LAYERS, h), h, num_steps=NUM_STEPS).params
        return sum(jnp.sum((p - 0.3) ** 2) for p in jax.tree.leaves(params))

    h = {"log_penalty": jnp.log(0.01), "rates": rates, "momenta": momenta}
    assert jaxhpo.check_hypergradient(outer, h).relative_error <= 1e-9  # the differences reach about 1e-11 here


def rate_outside(loss, m) -> jaxhpo.Solver:
    """v ← m v − (1−m) g, p ← p + α_t v."""
    return jaxhpo.momentum_sgd(loss, lambda h, t: h[t], m)


def rate_inside(loss, m) -> jaxhpo.Solver:
    """u ← m u − (1−m) α_t g, p ← p + u, as a chain of optax transformations."""
    return jaxhpo.from_optax(
        loss, lambda h: optax.chain(optax.scale_by_schedule(lambda t: -(1 - m) * h[t]), optax.trace(m))
    )


def end(solver, rates):
    return jaxhpo.solve(solver, solver.init(jnp.zeros(()), rates), rates, num_steps=len(rates)).params


def test_two_forms_of_momentum_linear_loss():
    r"""One trajectory, two hypergradients: a rate outside the velocity, and a rate inside it.

    With a constant gradient g and no velocity at first, the velocity after step t is :math:`v_t = -(1 - m^{t+1}) g`.

    Outside, :math:`p_T = \sum_t \alpha_t v_t`: the rate of step t scales the whole velocity of that step, so
    :math:`\partial p_T / \partial\alpha_t = v_t = -(1 - m^{t+1}) g`.

    Inside, the rate of step t scales one gradient, which later velocities keep:
    :math:`\partial p_T / \partial\alpha_t = -(1-m) g \sum_{s=t}^{T-1} m^{s-t} = -(1 - m^{T-t}) g`.

    At a constant rate α both end at :math:`\alpha \sum_t v_t`; each list of derivatives is the reverse of the other, so
    their sums, the derivatives with respect to the constant rate, are equal.
    """
    m, g, T = 0.7, 3.0, 6
    rates, t = jnp.full(T, 0.1), np.arange(T)
    outside, inside = (form(lambda p, h, b: g * p, m) for form in (rate_outside, rate_inside))
    assert end(outside, rates) == pytest.approx(float(end(inside, rates)), rel=1e-14)
    got_outside, got_inside = (grad(lambda r, s=s: end(s, r))(rates) for s in (outside, inside))
    np.testing.assert_allclose(got_outside, -(1 - m ** (t + 1)) * g, rtol=1e-13)
    np.testing.assert_allclose(got_inside, -(1 - m ** (T - t)) * g, rtol=1e-13)


@pytest.mark.slow
def test_two_forms_of_momentum():
    """With curvature too, ends and derivatives in a constant rate are equal, derivatives in a step's rate differ."""
    rates = jnp.full(10, 0.2)
    ends, hypergrads = [], []
    for form in (rate_outside, rate_inside):
        solver = form(lambda p, h, b: (p - 1.0) ** 2, 0.8)
        ends.append(end(solver, rates))
        hypergrads.append(grad(lambda r, s=solver: end(s, r))(rates))
        assert jaxhpo.check_hypergradient(lambda r, s=solver: end(s, r), rates).relative_error <= 1e-9
    chex.assert_trees_all_close(*ends, rtol=1e-14)
    chex.assert_trees_all_close(*(g.sum() for g in hypergrads), rtol=1e-12)
    assert relative_error(*hypergrads) > 0.1


def test_momentum_sgd_and_optax_sgd():
    """`optax.sgd` has its rate outside: v ← m v + g, p ← p − α v is the form above at α/(1−m), schedules included."""
    m, rates = 0.8, jnp.linspace(0.05, 0.2, 10)

    def loss(p, h, b):
        return (p - 1.0) ** 2

    ours = rate_outside(loss, m)
    theirs = jaxhpo.from_optax(loss, lambda h: optax.sgd(lambda t: h[t], momentum=m))
    np.testing.assert_allclose(end(ours, rates), end(theirs, (1 - m) * rates), rtol=1e-13)
    want = (1 - m) * grad(lambda r: end(theirs, r))((1 - m) * rates)
    np.testing.assert_allclose(grad(lambda r: end(ours, r))(rates), want, rtol=1e-12)
