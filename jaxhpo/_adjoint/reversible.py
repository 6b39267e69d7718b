"""Run momentum backwards, exactly, instead of remembering where it has been."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core as jex

from jaxhpo._adjoint.exact_arithmetic import (
    BLOCKS,
    DIGIT,
    Buffer,
    D,
    Format,
    Velocity,
    current_format,
    divide,
    empty_buffer,
    is_empty,
    multiply,
    numerator,
)
from jaxhpo._adjoint.pullback import Inputs, run_with_pullback
from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.mesh import cast_varying, varying_axes
from jaxhpo._core.record import report_fault
from jaxhpo._core.trace import closure_convert
from jaxhpo._core.tree import all_finite, cast_like, names, partition
from jaxhpo._core.types import InnerState, PyTree
from jaxhpo._core.validate import check_positive
from jaxhpo._inner.gradient import mixed_value_and_grad
from jaxhpo._inner.inputs import refuse_tol
from jaxhpo._inner.problem import Problem

TRACED_BITS = 1.0  # bits per weight and step where the momentum is traced: a geometric mean of one half
LANE_BITS = 192  # what a lane should hold, next to which the unused bits of its word (16 to 32) and stack (16) are few
WINDOWS = 7  # of as many steps as the run, from 1 to 64 runs on, in which a momentum schedule is looked at
LANES = 256  # no fewer, for the sake of vectorised arithmetic


@dataclasses.dataclass(frozen=True)
class Reversible:
    r"""Exact reverse mode for `momentum_sgd` that runs the training backwards instead of storing it.

    The steps :math:`v \leftarrow m_t v - (1 - m_t) g,\ \theta \leftarrow \theta + \alpha_t v` are taken in fixed point
    (int64 with 52 fractional bits where x64 is on, else int32 with 28), in which adding can be undone; the product
    :math:`m_t v` is taken with a rational :math:`n/d`, :math:`d = 2^{16}`, :math:`n = \lfloor m_t d \rfloor + 1`, and
    what that loses is kept in a buffer. The backward pass recovers each state bit for bit, and there pulls the
    cotangent back through one step, as `Unroll()` does: it sees the loss, data, initial weights and velocity, and the
    schedules of rates and momenta. The value is that of the fixed-point run. Reverse mode and first order only.

    If a weight or a velocity leaves the range (±2045, or ±7.99 in 32 bits), if a gradient is not finite, or a momentum
    is outside [0, 1], the resulting parameters are NaN. If the buffer is too small, or the reversal does not end where
    the run began (a gradient that is not the same when computed again: random, or summed in no fixed order), the
    hypergradient is. `tune` and `check_hypergradient` say which of these it was. (As a function of a momentum the value
    moves in steps of 2⁻¹⁶: central differences must be wider.) What is smaller than the spacing of the numbers (2⁻⁵²,
    or 4e-9 in 32 bits) is lost without a word: scale a loss up whose gradients are that small, and the rate down.

    **Cost and bias**: 3.9 plain trainings (matrix products counted on an MLP 784-256-256-10, T = 1000; by the clock
    several more, since exact products take time that is not counted); memory of about thirteen copies of θ there, and
    :math:`\log_2(d/n)` bits per weight and inner step: 0.15 at a momentum of 0.9, 0.029 at 0.98, where
    `Unroll(checkpoint=1)` stores 64; but 16 at 0. Exact for the fixed-point run, in which a momentum is rounded up by
    at most 2⁻¹⁶.

    Args:
      buffer_bits: memory for the buffer, in bits per weight and inner step: a mean over the steps, in each of which
        the lowest momentum counts. None: what the momentum needs where it depends on nothing but the step, else 1,
        enough for momenta whose geometric mean is one half or more.

    Raises:
      JaxhpoError: a solver other than `momentum_sgd`, a model state, `tol`, a second derivative.

    Example:
      >>> solver = jaxhpo.momentum_sgd(lambda p, h, batch: jnp.sum((p - h) ** 2), learning_rate=0.5, momentum=0.9)
      >>> def outer_loss(h):
      ...     start = solver.init(jnp.zeros(2), h)
      ...     sol = jaxhpo.solve(solver, start, h, num_steps=100, adjoint=jaxhpo.Reversible())
      ...     return jnp.sum((sol.params - 3.0) ** 2)
      >>> print(jax.grad(outer_loss)(jnp.ones(2)).round(1))
      [-4. -4.]

    References:
      Maclaurin, Duvenaud, Adams. Gradient-based Hyperparameter Optimization through Reversible Learning. 2015.
      arXiv:1502.03492
    """

    buffer_bits: float | None = None

    def __post_init__(self):
        if self.buffer_bits is not None:
            check_positive("Reversible(buffer_bits=...)", self.buffer_bits)

    def run(self, problem: Problem) -> tuple[InnerState, jax.Array]:
        """Runs the inner loop in fixed point; the result's derivative comes from running it backwards."""
        self._check(problem)
        plan, problem, consts = make_plan(problem, self.buffer_bits)

        def forward(inputs):
            end = run_forward(plan, inputs)
            broke = (end.broken < plan.num_steps) & all_finite((inputs.state, inputs.inputs))
            report_fault(broke, _OUT_OF_RANGE, limit=plan.format.limit, step=end.broken)
            return _solution(plan, inputs.state, end), end

        def pull(inputs, perturbed, end, cotangent):
            pulled, back = run_backward(plan, inputs, end, perturbed, cotangent)
            fits, held, recovered = end.broken == plan.num_steps, ~end.buffer.full, is_start(back, end)
            report_fault(fits & ~held, _FULL, bits=plan.depth * DIGIT / (plan.layout.rows * plan.num_steps))
            report_fault(fits & held & ~recovered, _NOT_RECOVERED)
            return [jnp.where(fits & held & recovered, c, jnp.nan) for c in pulled]

        return run_with_pullback(problem, self, forward, pull, lambda inputs, perturbed: None, consts)

    def _check(self, problem):
        refuse_tol(problem, self)
        if problem.solver.rates is None:
            raise JaxhpoError(
                f"{self!r} runs the training backwards, and cannot undo a step of `{problem.solver.name}`: an "
                "optimiser's update is opaque, and two forms of momentum with one trajectory have different "
                "hypergradients with respect to the learning rate. Write `momentum_sgd(loss, learning_rate, "
                "momentum)`, whose form is known, or use `Unroll()`."
            )
        model_state = names(problem.state.model_state, "model_state")
        if model_state:
            raise JaxhpoError(
                f"{self!r} recovers the weights by running the training backwards, but not `{model_state[0]}`, which "
                "every step replaces: write a loss without `has_state`, or use `Unroll()`."
            )


_OUT_OF_RANGE = (
    "`Reversible()`: at inner step {step} a weight or a velocity left the range ±{limit:.4g} of its fixed-point "
    "numbers, or the gradient was not finite, or a momentum not in [0, 1]. The likeliest cause is a learning rate that "
    "is too high: lower it, or scale the parameters; with `jax_enable_x64` the range is ±2045."
)
_FULL = (
    "`Reversible()`: the {bits:.3g} bits per weight and inner step that its buffer has do not suffice: write "
    "`Reversible(buffer_bits=...)` with the mean of log2(1/momentum) over the steps, or a little more."
)
_NOT_RECOVERED = (
    "`Reversible()`: running the training backwards did not end where it began, so the gradient of the train loss was "
    "not the same when computed again: use a deterministic loss (on a GPU, "
    "`XLA_FLAGS=--xla_gpu_deterministic_ops=true`), or `Unroll()`."
)


# --- the plan: what is known before anything runs --------------------------------------------------------------------


class Layout(NamedTuple):
    """How the leaves of the parameters lie in one array of shape (rows, lanes), filled up at its end."""

    params: PyTree  # shapes and types
    rows: int
    lanes: int

    def pack(self, tree: PyTree, pad: Any = 0) -> jax.Array:
        """The leaves (of one type, each of its parameter's shape) as one array."""
        flat = jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])
        return jnp.pad(flat, (0, self.rows * self.lanes - flat.size), constant_values=pad).reshape(self.rows, -1)

    def unpack(self, array: jax.Array, cast: bool = True) -> PyTree:
        """The inverse of `pack`, in the parameters' types unless `cast` is False."""
        leaves, structure = jax.tree.flatten(self.params)
        ends = np.cumsum([leaf.size for leaf in leaves])
        parts = [part.reshape(leaf.shape) for part, leaf in zip(jnp.split(array.ravel(), ends), leaves, strict=False)]
        return jax.tree.unflatten(structure, cast_like(parts, leaves) if cast else parts)


class Plan(NamedTuple):
    """The pure functions and the fixed sizes of a reversible run.

    Attributes:
      gradient: `(shared, params, x) -> gradient of the train loss`, like the parameters; shared is the part of `Inputs`
        that all steps share, `(inputs, consts)`.
      rates: `(shared, count) -> (learning rates, momenta)`, like the parameters.
      layout: of the weights, the velocity and the buffer.
      depth: digits that a lane of the buffer can hold besides its word.
      num_steps: inner steps.
      format: of the fixed-point numbers.
    """

    gradient: Callable[[PyTree, PyTree, PyTree], PyTree]
    rates: Callable[[PyTree, jax.Array], tuple[PyTree, PyTree]]
    layout: Layout
    depth: int
    num_steps: int
    format: Format

    def steps(self, inputs: Inputs) -> tuple[jax.Array, PyTree]:
        """What a scan runs over: the step's index and its data."""
        return jnp.arange(self.num_steps, dtype=jnp.int32), inputs.xs


def make_plan(problem: Problem, buffer_bits: float | None) -> tuple[Plan, Problem, PyTree]:
    """The plan, the problem without what only `advance` closes over, and what the plan's functions close over."""
    (hparams, _), state = problem.inputs, problem.state
    solver: Any = problem.solver
    pure, consts = problem.closure_convert(
        lambda s, h, batch: mixed_value_and_grad(solver.loss, s.params, h, batch, s.model_state)[1]
    )
    pure_rates, rate_consts = closure_convert(
        lambda h, count: solver.rates(state.params, h, count), hparams, state.opt_state.count
    )

    def gradient(shared, params, x):
        (hparams, _), (consts, _) = shared
        # The gradient reads no optimiser state; anything of its structure will do.
        opt_state = state.opt_state._replace(velocity=params, count=jnp.zeros((), jnp.int32))
        return pure(consts, InnerState(params, opt_state, state.model_state), hparams, x)

    def rates(shared, count):
        (hparams, _), (_, consts) = shared
        return jax.tree.map(jnp.asarray, pure_rates(consts, hparams, count))

    bits = _static_bits(problem) if buffer_bits is None else buffer_bits
    total = bits * problem.num_steps  # a weight
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.params)
    size = sum(x.size for x in jax.tree.leaves(params))
    rows = max(1, min(BLOCKS * math.ceil(LANE_BITS / BLOCKS / max(total, 1e-3)), size // LANES))
    # A word spills from 32 bits to 16 and begins at 16, so a lane spills ⌊total rows / 16⌋ times. One bit for rounding.
    depth = max(1, math.floor((total * rows + 1) / DIGIT))
    plan = Plan(
        gradient, rates, Layout(params, rows, math.ceil(size / rows)), depth, problem.num_steps, current_format()
    )
    return plan, problem._replace(inputs=(hparams, [])), (consts, rate_consts)


def _static_bits(problem: Problem) -> float:
    """Bits per weight and step, log2(d/n) for the lowest momentum of each step, if that depends on the step alone."""
    hparams, state = problem.inputs[0], problem.state
    solver: Any = problem.solver

    def largest(count, params, hparams):
        momenta = jax.tree.leaves(solver.rates(params, hparams, count)[1])
        bits = [jnp.max(-jnp.log2(numerator(jnp.asarray(m)) / D), initial=0) for m in momenta]
        return jnp.max(jnp.stack(bits))

    count = jax.ShapeDtypeStruct((), jnp.int32)
    closed = jax.make_jaxpr(largest)(count, state.params, hparams)
    needed, eqns = set(closed.jaxpr.outvars), []
    for eqn in reversed(closed.jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            needed.update(v for v in eqn.invars if not isinstance(v, jex.Literal))
            eqns.insert(0, eqn)
    traced = [
        var for var, value in zip(closed.jaxpr.constvars, closed.consts, strict=True) if isinstance(value, Tracer)
    ]
    if needed.intersection([*closed.jaxpr.invars[1:], *traced]):
        return TRACED_BITS
    at = jex.jaxpr_as_fun(jex.ClosedJaxpr(closed.jaxpr.replace(eqns=eqns), closed.consts))
    unread = jax.tree.leaves((state.params, hparams))
    start, steps = state.opt_state.count, problem.num_steps
    # Where a traced count stands is not known: at 0, or in a run that was warm-started. The most of several windows.
    starts = [0, *(steps * 2**k for k in range(WINDOWS))] if isinstance(start, Tracer) else [start]
    with jax.ensure_compile_time_eval():
        if closed.jaxpr.invars[0] not in needed:
            return float(at(jnp.int32(0), *unread)[0])
        counts = jnp.asarray(starts)[:, None] + jnp.arange(steps, dtype=jnp.int32)[None]
        bits = jax.lax.map(lambda count: at(count, *unread)[0], counts.ravel().astype(jnp.int32))
        return float(jnp.max(jnp.mean(bits.reshape(counts.shape), 1)))


# --- the run, and the run backwards ----------------------------------------------------------------------------------


class End(NamedTuple):
    """Where the exact run stands; after the last step, all that the run backwards starts from.

    Attributes:
      weights: fixed-point numbers, shape (rows, lanes).
      velocity: likewise.
      buffer: what the products have lost.
      broken: the first step at which a number did not fit, int32; the number of steps where all did.
      origin: a checksum of the initial weights and velocity.
    """

    weights: jax.Array
    velocity: Velocity
    buffer: Buffer
    broken: jax.Array
    origin: jax.Array


def run_forward(plan: Plan, inputs: Inputs) -> End:
    """The exact run."""
    return jax.lax.scan(
        lambda now, tx: (_step(plan, now, inputs, *tx), None), beginning(plan, inputs.state), plan.steps(inputs)
    )[0]


def run_backward(plan: Plan, inputs: Inputs, end: End, perturbed: Inputs, cotangent: InnerState) -> tuple[list, End]:
    """The cotangents of the moving leaves, and where the run backwards ended."""
    shared, combine = partition(_shared(inputs), _shared(perturbed))

    def body(carry, tx):
        (now, d_params, d_velocity, sums), (t, x) = carry, tx
        now, grad = unstep(plan, now, inputs, t, x)
        data, combine_data = partition(x, perturbed.xs)
        params, velocity = _floats(plan, now, inputs.state)

        def apply(params, velocity, grad, shared):
            return _float_step(plan, params, velocity, grad, combine(shared), inputs.state.opt_state.count + t)

        def gradient(params, shared, data):
            return plan.gradient(combine(shared), params, combine_data(data))

        # Apart, so that the gradient that undid the step is not computed once more: its derivative does without it.
        _, pullback = jax.vjp(apply, params, velocity, grad, shared)
        d_params, d_velocity, d_grad, of_rates = pullback((d_params, d_velocity))
        _, pullback = jax.vjp(gradient, params, shared, data)
        more, of_loss, d_data = pullback(d_grad)
        d_params = jax.tree.map(jnp.add, d_params, more)
        return (now, d_params, d_velocity, [a + b + c for a, b, c in zip(sums, of_rates, of_loss, strict=True)]), d_data

    sums = [cast_varying(jnp.zeros_like(leaf), varying_axes(leaf)) for leaf in shared]
    carry = (end, cotangent.params, cotangent.opt_state.velocity, sums)
    (now, d_params, d_velocity, sums), d_data = jax.lax.scan(body, carry, plan.steps(inputs), reverse=True)
    # In the order of `Inputs`: the state, what all steps share, the data, what the plan's functions close over.
    d_state, _ = partition((d_params, d_velocity), (perturbed.state.params, perturbed.state.opt_state.velocity))
    own = sum(jax.tree.leaves(perturbed.inputs))
    return [*d_state, *sums[:own], *d_data, *sums[own:]], now


def is_start(now: End, end: End) -> jax.Array:
    """Whether a run backwards from `end` that has arrived at `now` is exactly where the run began."""
    return is_empty(now.buffer) & jnp.all(now.velocity.low == 0) & (_checksum(now.weights, now.velocity) == end.origin)


def beginning(plan: Plan, state: InnerState) -> End:
    """Where the exact run starts."""

    def fixed(tree):
        real = plan.layout.pack(jax.tree.map(lambda x: x.astype(plan.format.real), tree))
        return plan.format.encode(real), jnp.all(jnp.abs(real) < plan.format.limit)

    (weights, fit), (high, fits) = fixed(state.params), fixed(state.opt_state.velocity)
    velocity = Velocity(high, jnp.zeros(high.shape, jnp.uint16))
    broken = jnp.where(fit & fits, plan.num_steps, 0).astype(jnp.int32)
    start = End(weights, velocity, empty_buffer(plan.layout.lanes, plan.depth), broken, _checksum(weights, velocity))
    return cast_varying(start, varying_axes(state))


def _step(plan, now: End, inputs, t, x) -> End:
    shared = _shared(inputs)
    alpha, m = _rates(plan, shared, inputs.state.opt_state.count, t)
    velocity, buffer = multiply(now.velocity, _numerators(plan, m), now.buffer, t)
    grad = _gradient(plan, now.weights, shared, t, x)
    high, fits = _added(plan.format, velocity.high, _kick(plan, m, grad))
    weights, fit = _added(plan.format, now.weights, _move(plan, high, alpha))
    allowed = jnp.all(jnp.stack([jnp.all((m >= 0) & (m <= 1)) for m in jax.tree.leaves(m)]))
    broken = jnp.where(allowed & fits & fit, now.broken, jnp.minimum(now.broken, t))
    return End(weights, Velocity(high, velocity.low), buffer, broken, now.origin)


def unstep(plan: Plan, now: End, inputs: Inputs, t: jax.Array, x: PyTree) -> tuple[End, PyTree]:
    """Undoes step t; and the gradient that it took."""
    shared = _shared(inputs)
    alpha, m = _rates(plan, shared, inputs.state.opt_state.count, t)
    weights = now.weights - plan.format.encode(_move(plan, now.velocity.high, alpha))
    grad = _gradient(plan, weights, shared, t, x)
    high = now.velocity.high - plan.format.encode(_kick(plan, m, grad))
    velocity, buffer = divide(Velocity(high, now.velocity.low), _numerators(plan, m), now.buffer, t)
    return now._replace(weights=weights, velocity=velocity, buffer=buffer), grad


def _shared(inputs):
    return inputs.inputs, inputs.consts


def _rates(plan, shared, count, t):
    """Learning rates and momenta in the widest float type."""
    return jax.tree.map(lambda x: x.astype(plan.format.real), _apart(plan.rates, t, shared, count + t))


def _numerators(plan, m):
    return plan.layout.pack(
        jax.tree.map(lambda m, p: jnp.broadcast_to(numerator(m), p.shape), m, plan.layout.params), D
    )


def _gradient(plan, weights, shared, t, x):
    def gradient(weights, shared, x):
        return plan.gradient(shared, plan.layout.unpack(plan.format.decode(weights)), x)

    return _apart(gradient, t, weights, shared, x)


def _kick(plan, m, grad):
    """What is added to the velocity, −(1 − m) g."""
    return plan.layout.pack(jax.tree.map(lambda m, g: (m - 1) * g.astype(plan.format.real), m, grad))


def _move(plan, high, alpha):
    """What is added to the weights, α v."""
    velocity = plan.layout.unpack(plan.format.decode(high), cast=False)
    return plan.layout.pack(jax.tree.map(jnp.multiply, alpha, velocity))


def _apart(fn, t, *args):
    """`fn(*args)`, compiled apart from what surrounds it: a loop of one turn.

    What is added on the way forward must be subtracted on the way back with all its bits. But a compiler merges a
    computation with its neighbours, which are others in each direction, and so may sum in another order. It does not
    merge what is inside a loop with what is outside, if it cannot know the number of turns (t ≥ 0, so one), nor move
    anything out of it that depends on the turn (for all it knows: hence the barrier; alone, it would not suffice).
    """
    out = jax.eval_shape(fn, *args)
    zeros = jax.tree.map(lambda x: cast_varying(jnp.zeros(x.shape, x.dtype), varying_axes(x)), out)

    def turn(carry):
        i = carry[0]
        inner = jax.tree.map(lambda x: jax.lax.optimization_barrier((i, x))[1], args)
        return i + 1, fn(*inner)

    return jax.lax.while_loop(lambda carry: carry[0] <= jnp.minimum(t, 0), turn, (jnp.zeros((), t.dtype), zeros))[1]


def _added(form, fixed, real):
    """A fixed-point number plus a float, and whether both that float and the sum are in range (NaN is not)."""
    fits = (jnp.abs(real) < form.limit) & (jnp.abs(form.decode(fixed) + real) < form.limit)
    return fixed + form.encode(real), jnp.all(fits)


def _float_step(plan, params, velocity, grad, shared, count):
    """The step as a differentiable function: with the momentum n/d that was used, and the derivative of m itself."""
    alpha, m = plan.rates(shared, count)

    def kicked(m, v, g):
        used = m + jax.lax.stop_gradient(numerator(m) / D - m)
        return used * v - (1 - m) * g

    velocity = cast_like(jax.tree.map(kicked, m, velocity, grad), velocity)
    return cast_like(jax.tree.map(lambda p, a, v: p + a * v, params, alpha, velocity), params), velocity


def _floats(plan, now, state):
    """The weights and the velocity as floats."""
    both = [plan.layout.unpack(plan.format.decode(c)) for c in (now.weights, now.velocity.high)]
    return cast_like(both, [state.params, state.opt_state.velocity])


def _solution(plan, start, end) -> InnerState:
    params, velocity = jax.tree.map(
        lambda x: jnp.where(end.broken < plan.num_steps, jnp.nan, x), _floats(plan, end, start)
    )
    opt_state = start.opt_state._replace(velocity=velocity, count=start.opt_state.count + plan.num_steps)
    return InnerState(params, opt_state, start.model_state)


def _checksum(weights, velocity) -> jax.Array:
    """Σ (2k + 1) c_k over all integers, which wraps around: no change of one integer leaves it as it is."""
    c = jnp.stack([weights, velocity.high]).ravel()
    return jnp.sum((2 * jnp.arange(c.size, dtype=c.dtype) + 1) * c)
