"""`Reversible`: reverse mode for momentum that runs the training backwards exactly, instead of storing it."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core as jex
from jax.interpreters.partial_eval import dce_jaxpr

from jaxhpo._adjoint import exact_arithmetic as exact
from jaxhpo._adjoint.pullback import Inputs, Pullback, varying_zeros
from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.mesh import cast_varying, gathered, sharded_like, varying_axes, whole
from jaxhpo._core.record import report_fault
from jaxhpo._core.trace import closure_convert
from jaxhpo._core.tree import all_finite, cast_like, mixed_types, names, partition
from jaxhpo._core.types import InnerState, PyTree
from jaxhpo._core.validate import check_settings
from jaxhpo._inner.gradient import mixed_value_and_grad
from jaxhpo._inner.loop import scan_slices
from jaxhpo._inner.problem import Problem

TRACED_BITS = 1.0  # bits per weight and step if the momentum is traced: enough for a geometric mean of one half
LANE_BITS = 192  # target for the bits of a lane: its word and stack waste 16 to 32 and up to 16 bits
WINDOWS = 7  # windows of num_steps steps, up to 64 runs ahead, in which a momentum schedule is evaluated
LANES = 256  # minimal number of lanes, so that arithmetic is vectorised


@dataclasses.dataclass(frozen=True)
class Reversible:
    r"""Exact reverse mode for `momentum_sgd`, which runs the training backwards instead of storing it.

    The inner steps

    .. math:: v \leftarrow m_t v - (1 - m_t) g, \qquad \theta \leftarrow \theta + \alpha_t v

    are taken in fixed point (int64 with 52 fractional bits where x64 is on, else int32 with 28). An addition in fixed
    point can be undone. The product :math:`m_t v` is taken with a rational number :math:`n_t/d`, :math:`d = 2^{16}`,
    where :math:`n_t` is :math:`m_t d` rounded down or up, so that :math:`\sum_{s \le t} n_s` is
    :math:`\sum_{s \le t} m_s d` rounded, and the bits that it loses are kept in a buffer. The backward pass recovers
    each state bit for bit, and at each state pulls the cotangent back through one step, as `Unroll()` does. It sees the
    loss, data, initial weights and velocity, and the schedules of rates and momenta. The value is that of the
    fixed-point run. Reverse mode and first order only.

    The resulting parameters are NaN if a weight or a velocity leaves the range (±2045, or ±7.99 in 32 bits), if a
    gradient is not finite, or if a momentum is outside [0, 1]. The hypergradient is NaN if the buffer is too small, or
    if the reversal does not end where the run began (because a gradient differs when it is computed again: it is
    random, or summed in no fixed order). `tune` and `check_hypergradient` report which of these happened. As a function
    of a momentum the value is a step function with steps of 2⁻¹⁶/T, so central differences must be wider. Changes
    smaller than the spacing of the numbers (2⁻⁵², or 4e-9 in 32 bits) are lost without a message: if the gradients are
    that small, scale the loss up and the rate down.

    **Cost and bias**: 3.9 plain trainings (matrix products counted on an MLP 784-256-256-10, T = 1000; several more in
    wall time, since the exact products are not counted); memory of about thirteen copies of θ there, and
    :math:`\log_2(d/n)` bits per weight and inner step: 0.15 at a momentum of 0.9, 0.029 at 0.98, where
    `Unroll(checkpoint=1)` stores 64; but 16 at a momentum of 0. Exact for the fixed-point run, in which the sum of the
    momenta of the steps so far is off by at most 2⁻¹⁷.

    Args:
      buffer_bits: memory for the buffer, in bits per weight and inner step: the mean over the steps of log2(1/m), with
        m the lowest momentum of each step. None computes it if the momentum depends on nothing but the step; otherwise
        None means 1, enough for momenta whose geometric mean is at least one half.

    Raises:
      JaxhpoError: for a solver other than `momentum_sgd`, a model state, `tol`, or a second derivative.

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
        check_settings(self, buffer_bits="positive or None")

    def run(self, problem: Problem) -> tuple[InnerState, jax.Array]:
        """Runs the inner loop in fixed point; the backward pass runs it in reverse."""
        self._check(problem)
        plan, problem, consts = make_plan(problem, self.buffer_bits)

        def forward(inputs):
            end = run_exact(plan, inputs)
            broke = (end.broken < plan.num_steps) & all_finite((inputs.state, inputs.inputs))
            report_fault(broke, _OUT_OF_RANGE, limit=plan.format.limit, step=end.broken)
            return _solution(plan, inputs.state, end), end

        def pull(inputs, perturbed, end, cotangent):
            pulled, back = run_reversed(plan, inputs, end, perturbed, cotangent)
            fits, held, recovered = end.broken == plan.num_steps, ~end.buffer.full, is_start(back, end)
            report_fault(fits & ~held, _FULL, bits=plan.depth * exact.DIGIT / (plan.layout.rows * plan.num_steps))
            report_fault(fits & held & ~recovered, _NOT_RECOVERED)
            return [jnp.where(fits & held & recovered, c, jnp.nan) for c in pulled]

        return Pullback(self, mixed_types()(forward), mixed_types()(pull)).run(problem, consts)

    def _check(self, problem):
        if problem.solver.rates is None:
            raise JaxhpoError(
                f"{self!r} runs the training backwards, and cannot undo a step of `{problem.solver.name}`: its update "
                "is opaque, and two forms of momentum with the same trajectory have different hypergradients in the "
                "rate. Write `momentum_sgd(loss, learning_rate, momentum)`, whose form is known, or use `Unroll()`."
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
    "`Reversible()`: its buffer has {bits:.3g} bits per weight and inner step, which do not suffice: write "
    "`Reversible(buffer_bits=...)` with the mean of log2(1/momentum) over the steps, or a little more."
)
_NOT_RECOVERED = (
    "`Reversible()`: running the training backwards did not end where it began, so the gradient of the train loss was "
    "not the same when computed again: use a deterministic loss (on a GPU, "
    "`XLA_FLAGS=--xla_gpu_deterministic_ops=true`), or `Unroll()`."
)


# --- the plan: functions and sizes that are fixed while tracing ------------------------------------------------------


class Layout(NamedTuple):
    """Layout of the parameters' leaves in one array of shape (rows, lanes), padded at its end."""

    params: PyTree  # shapes, dtypes and shardings
    rows: int
    lanes: int

    def pack(self, tree: PyTree, pad: Any = 0) -> jax.Array:
        """Packs the leaves (all of one dtype, broadcast to the shapes of the parameters) into one array."""
        full = jax.tree.map(lambda x, p: jnp.broadcast_to(gathered(x), p.shape).ravel(), tree, self.params)
        flat = jnp.concatenate(jax.tree.leaves(full))
        return jnp.pad(flat, (0, self.rows * self.lanes - flat.size), constant_values=pad).reshape(self.rows, -1)

    def unpack(self, array: jax.Array, cast: bool = True) -> PyTree:
        """Inverse of `pack`, in the parameters' dtypes unless `cast` is False."""
        leaves, structure = jax.tree.flatten(self.params)
        ends = np.cumsum([leaf.size for leaf in leaves])
        parts = zip(jnp.split(array.ravel(), ends), leaves, strict=False)
        parts = [sharded_like(part.reshape(leaf.shape), leaf) for part, leaf in parts]
        return jax.tree.unflatten(structure, cast_like(parts, leaves) if cast else parts)


class Plan(NamedTuple):
    """Pure functions and fixed sizes of a reversible run.

    Attributes:
      gradient: `(shared, params, x) -> gradient of the train loss`, like the parameters; `shared` is the `Inputs`
        without `state` and `xs`.
      rates: `(shared, count) -> (learning rates, momenta)`, like the parameters.
      layout: of the weights, the velocity and the buffer.
      depth: number of digits that a lane of the buffer can hold in addition to its word.
      momenta: shapes and dtypes of the momenta of a step.
      num_steps: inner steps.
      counts: which of the data are step indices, as in `Problem`.
      format: of the fixed-point numbers.
    """

    gradient: Callable[[Inputs, PyTree, PyTree], PyTree]
    rates: Callable[[Inputs, jax.Array], tuple[PyTree, PyTree]]
    layout: Layout
    depth: int
    momenta: PyTree
    num_steps: int
    counts: PyTree
    format: exact.Format

    def steps(self, inputs: Inputs) -> tuple[jax.Array, PyTree]:
        """The index and the data of each step, to scan over."""
        return jnp.arange(self.num_steps, dtype=jnp.int32), inputs.xs


def make_plan(problem: Problem, buffer_bits: float | None) -> tuple[Plan, Problem, PyTree]:
    """The plan, the problem without the values that only `advance` closes over, and those that the plan closes over."""
    (hparams, _), state = problem.inputs, problem.state
    solver: Any = problem.solver
    pure, consts = problem.closure_convert(
        lambda s, h, batch: mixed_value_and_grad(solver.loss, s.params, h, batch, s.model_state)[1]
    )
    pure_rates, rate_consts = closure_convert(
        lambda h, count: solver.rates(state.params, h, count), hparams, state.opt_state.count
    )

    def gradient(shared, params, x):
        # The gradient reads no optimiser state, so any values of the right structure serve.
        opt_state = state.opt_state._replace(velocity=params, count=jnp.zeros((), jnp.int32))
        return pure(shared.consts[0], InnerState(params, opt_state, state.model_state), shared.inputs[0], x)

    def rates(shared, count):
        return jax.tree.map(jnp.asarray, pure_rates(shared.consts[1], shared.inputs[0], count))

    params = jax.eval_shape(lambda: state.params)
    size = sum(x.size for x in jax.tree.leaves(params))
    if buffer_bits is None:
        with mixed_types():
            buffer_bits = _bits_per_step(pure_rates, rate_consts, hparams, state.opt_state.count, problem.num_steps)
    bits = buffer_bits * problem.num_steps  # of one weight
    # As many rows as a lane needs to hold LANE_BITS, in whole blocks, but no fewer than LANES lanes.
    rows = max(1, min(exact.BLOCKS * math.ceil(LANE_BITS / exact.BLOCKS / max(bits, 1e-3)), size // LANES))
    # A word starts at 16 bits and spills 16 at 32, so a lane spills ⌊bits rows / 16⌋ times. One bit for rounding.
    depth = max(1, math.floor((bits * rows + 1) / exact.DIGIT))
    layout = Layout(params, rows, math.ceil(size / rows))
    momenta = jax.eval_shape(rates, Inputs(None, problem.inputs, None, (consts, rate_consts)), state.opt_state.count)[1]
    plan = Plan(gradient, rates, layout, depth, momenta, problem.num_steps, problem.counts, exact.current_format())
    return plan, problem._replace(inputs=(hparams, [])), (consts, rate_consts)


def _bits_per_step(rates, consts, hparams, start, num_steps) -> float:
    """Mean over the steps of log2(d/n) for the lowest momentum, or TRACED_BITS if it depends on more than the step."""

    def bits(consts, hparams, count):
        momenta = jax.tree.leaves(rates(consts, hparams, count)[1])
        least = [jnp.maximum(exact.whole_and_part(jnp.asarray(m))[0], 1) / exact.D for m in momenta]  # n/d
        return jnp.max(jnp.stack([jnp.max(-jnp.log2(ratio), initial=0) for ratio in least]))

    closed = jax.make_jaxpr(bits)(consts, hparams, jax.ShapeDtypeStruct((), jnp.int32))
    jaxpr, used = dce_jaxpr(closed.jaxpr, [True])
    *of_values, of_count = used
    needed = [c for c, u in zip(consts, of_values, strict=False) if u]
    if any(of_values[len(consts) :]) or any(isinstance(c, Tracer) for c in needed):
        return TRACED_BITS
    at = jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, closed.consts))
    # The value of a traced count is unknown: 0, or more after a warm start. The largest mean over several windows.
    starts = [0, *(num_steps * 2**k for k in range(WINDOWS))] if isinstance(start, Tracer) else [start]
    with jax.ensure_compile_time_eval():
        if not of_count:
            return float(at(*needed)[0])
        counts = jnp.asarray(starts)[:, None] + jnp.arange(num_steps, dtype=jnp.int32)[None]
        each = jax.lax.map(lambda count: at(*needed, count)[0], counts.ravel().astype(jnp.int32))
        return float(jnp.max(jnp.mean(each.reshape(counts.shape), 1)))


# --- the run and its reversal ----------------------------------------------------------------------------------------
#
# Forward, one step:                                    Backward, undoing it:
#   v ← (n/d) v, the lost digits into the buffer          θ ← θ − α v
#   v ← v − (1 − m) g(θ)                                  v ← v + (1 − m) g(θ)
#   θ ← θ + α v                                           v ← (d/n) v, the lost digits from the buffer
#
# Each line changes one of θ, v and the buffer by an amount that depends on the others alone, so it can be undone. The
# amounts added must be the same floats, rounded to the same integers, in both directions: see `_isolated`.


class ExactState(NamedTuple):
    """State of the fixed-point run; after the last step, the start of the reversal.

    Attributes:
      weights: fixed-point numbers, shape (rows, lanes).
      velocity: likewise, with guard bits.
      buffer: the digits that the products have lost.
      phase: what the numerators have rounded away so far, for each momentum, as in `exact.numerator`.
      broken: the first step at which a number did not fit, int32; the number of steps if all did.
      checksum: of the initial weights and velocity.
    """

    weights: jax.Array
    velocity: exact.Velocity
    buffer: exact.Buffer
    phase: PyTree
    broken: jax.Array
    checksum: jax.Array


def run_exact(plan: Plan, inputs: Inputs) -> ExactState:
    """Runs all steps in fixed point."""

    def body(now, tx):
        return _step(plan, now, inputs, *tx), None

    start, counts = exact_start(plan, inputs.state), (True, plan.counts)
    return scan_slices(body, start, plan.steps(inputs), counts, plan.num_steps)[0]


def run_reversed(
    plan: Plan, inputs: Inputs, end: ExactState, perturbed: Inputs, cotangent: InnerState
) -> tuple[list, ExactState]:
    r"""Undoes all steps, and pulls the cotangent back through each.

    With step t the map :math:`(\theta, v) \mapsto U_t(\theta, v, g, h)`, :math:`g = \nabla_\theta L_t(\theta, h)`,
    and a the cotangent of its result:

    .. math:: a_g = (\partial_g U_t)^\top a, \qquad
        \bar h \mathrel{+}= (\partial_h U_t)^\top a + (\partial_h g)^\top a_g, \qquad
        a \leftarrow (\partial_{\theta, v} U_t)^\top a + (\partial_\theta g)^\top a_g

    Returns:
      The cotangents of the perturbed leaves, and the state at which the reversal ended.
    """
    shared, combine = partition(_shared(inputs), _shared(perturbed))

    def body(carry, tx):
        (now, a_params, a_velocity, sums), (t, x) = carry, tx
        now, grad = undo_step(plan, now, inputs, t, x)
        data, combine_data = partition(x, perturbed.xs)
        params, velocity = _floats(plan, now, inputs.state)

        def update(params, velocity, grad, shared):  # U_t
            count = inputs.state.opt_state.count + t
            return _float_step(plan, params, velocity, grad, combine(shared), count, now.phase)

        def gradient(params, shared, data):  # ∇_θ L_t
            return plan.gradient(combine(shared), params, combine_data(data))

        # Two pullbacks, since `undo_step` has computed g already: the pullback of ∇_θ L_t does not need its value.
        _, pullback = jax.vjp(update, params, velocity, grad, shared)
        a_params, a_velocity, a_grad, of_update = pullback((a_params, a_velocity))
        _, pullback = jax.vjp(gradient, params, shared, data)
        more, of_loss, a_data = pullback(a_grad)
        a_params = jax.tree.map(jnp.add, a_params, more)
        sums = [a + b + c for a, b, c in zip(sums, of_update, of_loss, strict=True)]
        return (now, a_params, a_velocity, sums), a_data

    carry = (end, cotangent.params, cotangent.opt_state.velocity, varying_zeros(shared))
    (now, a_params, a_velocity, sums), a_data = scan_slices(
        body, carry, plan.steps(inputs), (True, plan.counts), plan.num_steps, reverse=True
    )
    # In the order of `Inputs`: state, inputs, xs, consts.
    a_state, _ = partition((a_params, a_velocity), (perturbed.state.params, perturbed.state.opt_state.velocity))
    own = sum(jax.tree.leaves(perturbed.inputs))
    return [*a_state, *sums[:own], *a_data, *sums[own:]], now


def is_start(now: ExactState, end: ExactState) -> jax.Array:
    """True where `now`, at which the reversal from `end` has arrived, is exactly the state at which the run began."""
    same = _checksum(now.weights, now.velocity) == end.checksum
    return exact.is_empty(now.buffer) & jnp.all(now.velocity.low == 0) & same


def exact_start(plan: Plan, state: InnerState) -> ExactState:
    """The state at which the fixed-point run begins."""

    def fixed(tree):
        real = plan.layout.pack(jax.tree.map(lambda x: x.astype(plan.format.real), tree))
        return plan.format.encode(real), jnp.all(jnp.abs(real) < plan.format.limit)

    (weights, fit), (high, fits) = fixed(state.params), fixed(state.opt_state.velocity)
    velocity = exact.Velocity(high, jnp.zeros_like(high, jnp.uint16))
    buffer = exact.empty_buffer(plan.layout.lanes, plan.depth)
    broken = jnp.where(fit & fits, plan.num_steps, 0).astype(jnp.int32)
    phase = jax.tree.map(lambda m: jnp.full(m.shape, exact.HALF, jnp.uint32), plan.momenta)
    start = ExactState(weights, velocity, buffer, phase, broken, _checksum(weights, velocity))
    return cast_varying(start, varying_axes(state))


def _step(plan, now: ExactState, inputs, t, x) -> ExactState:
    alpha, m = _rates(plan, inputs, t)
    # v ← (n/d) v
    velocity, buffer = exact.multiply(now.velocity, _numerators(plan, m, now.phase), now.buffer, t)
    phase = jax.tree.map(lambda p, m: p + exact.whole_and_part(m)[1], now.phase, m)
    # v ← v − (1 − m) g
    grad = _gradient(plan, now.weights, inputs, t, x)
    high, fits = _added(plan.format, velocity.high, _kick(plan, m, grad))
    # θ ← θ + α v
    weights, fit = _added(plan.format, now.weights, _move(plan, high, alpha))
    allowed = jnp.all(jnp.stack([jnp.all((m >= 0) & (m <= 1)) for m in jax.tree.leaves(m)]))
    broken = jnp.where(allowed & fits & fit, now.broken, jnp.minimum(now.broken, t))
    return ExactState(weights, velocity._replace(high=high), buffer, phase, broken, now.checksum)


def undo_step(plan: Plan, now: ExactState, inputs: Inputs, t: jax.Array, x: PyTree) -> tuple[ExactState, PyTree]:
    """Undoes step t. Returns the state before it, and the gradient that it took."""
    alpha, m = _rates(plan, inputs, t)
    # θ ← θ − α v
    weights = now.weights - plan.format.encode(_move(plan, now.velocity.high, alpha))
    # v ← v + (1 − m) g
    grad = _gradient(plan, weights, inputs, t, x)
    high = now.velocity.high - plan.format.encode(_kick(plan, m, grad))
    # v ← (d/n) v
    phase = jax.tree.map(lambda p, m: p - exact.whole_and_part(m)[1], now.phase, m)
    velocity, buffer = exact.divide(now.velocity._replace(high=high), _numerators(plan, m, phase), now.buffer, t)
    return now._replace(weights=weights, velocity=velocity, buffer=buffer, phase=phase), grad


def _shared(inputs):
    """The inputs that all steps share."""
    return inputs._replace(state=None, xs=None)


def _rates(plan, inputs, t):
    """Learning rates and momenta of step t, in the widest float type."""
    count = inputs.state.opt_state.count + t
    return jax.tree.map(lambda x: x.astype(plan.format.real), _isolated(plan.rates, t, _shared(inputs), count))


def _gradient(plan, weights, inputs, t, x):
    """The gradient of the train loss at fixed-point weights."""

    # Of another sharding a gradient is summed in another order, and the compiler would choose one for each direction,
    # by what surrounds it: so weights and gradient enter and leave whole, as their packed arrays are on any device.
    def gradient(weights, shared, x):
        params = whole(plan.layout.unpack(plan.format.decode(weights)))
        return whole(plan.gradient(shared, params, x))

    return _isolated(gradient, t, weights, _shared(inputs), x)


def _numerators(plan, m, phase):
    """n for every weight; d, which changes nothing, for the padding."""
    return plan.layout.pack(jax.tree.map(exact.numerator, m, phase), exact.D)


def _kick(plan, m, grad):
    """The change of the velocity, −(1 − m) g."""
    return plan.layout.pack(jax.tree.map(lambda m, g: (m - 1) * g.astype(plan.format.real), m, grad))


def _move(plan, high, alpha):
    """The change of the weights, α v."""
    # Leaf by leaf: a product of packed arrays would be fused with the sum that gives v, and might then be rounded
    # otherwise than when the step is undone.
    velocity = plan.layout.unpack(plan.format.decode(high), cast=False)
    return plan.layout.pack(jax.tree.map(jnp.multiply, alpha, velocity))


def _isolated(fn, t, *args):
    """Computes `fn(*args)` inside a loop of one iteration, so that the compiler does not fuse it with other code.

    The amount that a step adds must be subtracted with all its bits when the step is undone. But the code around the
    computation differs between the two directions, and a compiler that fuses the computation with it may sum in another
    order. It fuses nothing across the boundary of a loop whose number of iterations it does not know (t ≥ 0, so one),
    and moves nothing out of the loop that may depend on the iteration; the barrier makes all arguments depend on it.
    The barrier alone would not suffice.
    """
    zeros = varying_zeros(jax.eval_shape(fn, *args))

    def body(carry):
        i = carry[0]
        inner = jax.tree.map(lambda x: jax.lax.optimization_barrier((i, x))[1], args)
        return i + 1, fn(*inner)

    return jax.lax.while_loop(lambda carry: carry[0] <= jnp.minimum(t, 0), body, (jnp.zeros((), t.dtype), zeros))[1]


def _added(form, fixed, real):
    """Fixed-point number plus a float, and whether that float and the sum are in range (NaN is not)."""
    fits = (jnp.abs(real) < form.limit) & (jnp.abs(form.decode(fixed) + real) < form.limit)
    return fixed + form.encode(real), jnp.all(fits)


def _float_step(plan, params, velocity, grad, shared, count, phase):
    """U_t in floats, to be differentiated: v ← (n/d) v − (1 − m) g, θ ← θ + α v, with ∂(n/d)/∂m = 1."""
    alpha, m = plan.rates(shared, count)

    def kicked(m, phase, v, g):
        used = m + jax.lax.stop_gradient(exact.numerator(m, phase) / exact.D - m)
        return used * v - (1 - m) * g

    velocity = cast_like(jax.tree.map(kicked, m, phase, velocity, grad), velocity)
    return cast_like(jax.tree.map(lambda p, a, v: p + a * v, params, alpha, velocity), params), velocity


def _floats(plan, now, state):
    """The weights and the velocity as floats."""
    both = [plan.layout.unpack(plan.format.decode(c)) for c in (now.weights, now.velocity.high)]
    return cast_like(both, [state.params, state.opt_state.velocity])


def _solution(plan, start, end) -> InnerState:
    broke = end.broken < plan.num_steps
    params, velocity = jax.tree.map(lambda x: jnp.where(broke, jnp.nan, x), _floats(plan, end, start))
    opt_state = start.opt_state._replace(velocity=velocity, count=start.opt_state.count + plan.num_steps)
    return InnerState(params, opt_state, start.model_state)


def _checksum(weights, velocity) -> jax.Array:
    """Σ (2k + 1) c_k over all integers, modulo 2^32 or 2^64: a change of any one integer changes it."""
    c = jnp.stack([weights, velocity.high]).ravel()
    return jnp.sum((2 * jnp.arange(c.size, dtype=c.dtype) + 1) * c)
