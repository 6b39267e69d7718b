"""The outer step as two pure functions, `init` and `update`; `tune` is a loop over them."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.outer import in_one_form, is_deterministic
from jaxhpo._core.record import SolveLog, active, recording
from jaxhpo._core.transforms import to_natural, to_unconstrained
from jaxhpo._core.tree import add_scaled, all_finite, is_inexact, mixed_types, norm, upcast, without_weak_types
from jaxhpo._core.types import Info, PyTree
from jaxhpo._core.validate import check_arrays, check_hparams, check_key, describe
from jaxhpo._tune.inputs import check_optimizer, check_policies
from jaxhpo._tune.remedies import NO_REMEDIES, Remedies, check_projections, clipped, projected, shrunk


class OuterState(NamedTuple):
    """State of the outer loop; `before` is the previous point, for backtracking.

    Attributes:
      point: the hyperparameters, unconstrained.
      opt_state: the optimiser's state.
      carry: what `outer_loss` carries from step to step.
      key: the key of the loop; step i draws `jax.random.fold_in(key, i)`.
      step: steps taken.
      before: the previous point.

    Example:
      >>> step = jaxhpo.outer_step(lambda h, target, key: ((h - target) ** 2, target, None), optax.sgd(0.5))
      >>> state, _ = step.update(step.init(0.0, carry=1.0))
      >>> state, _ = step.update(state._replace(carry=jnp.array(2.0)))  # other data for the next step
      >>> print(state.step, state.point)  # h ← target
      2 2.0
    """

    point: PyTree
    opt_state: PyTree
    carry: PyTree
    key: Any
    step: Any
    before: PyTree


class OuterReport(NamedTuple):
    """Report of an outer step.

    Attributes:
      value: the outer loss at `hparams`.
      hparams: the hyperparameters at which it was evaluated, in natural units.
      hypergradient: in unconstrained units, before any remedy.
      hypergradient_norm: its Euclidean norm.
      finite: whether value, hypergradient, new point, carry and the inner solves in `info` are finite.
      remedies: counts of what each remedy changed.
      info: what the outer loss reported, or None.

    Example:
      >>> step = jaxhpo.outer_step(lambda h: (h - 3.0) ** 2, optax.sgd(0.25))
      >>> state, report = step.update(step.init(1.0))
      >>> print(report.value, report.hparams, report.hypergradient, report.finite)
      4.0 1.0 -4.0 True
    """

    value: jax.Array
    hparams: PyTree
    hypergradient: PyTree
    hypergradient_norm: jax.Array
    finite: jax.Array
    remedies: dict[str, jax.Array]
    info: PyTree


class OuterStep(NamedTuple):
    """An outer step as pure functions, as in optax.

    Attributes:
      init: `(hparams, carry=None, key=None) -> state`, an `OuterState`.
      update: `state -> (state, report)`, with an `OuterReport`.
      hparams: `state -> hparams`, in natural units.

    Example:
      >>> step = jaxhpo.outer_step(lambda h: (h - 3.0) ** 2, optax.sgd(0.25))
      >>> state, update = step.init(1.0), jax.jit(step.update)
      >>> for _ in range(3):
      ...     state, report = update(state)
      >>> print(step.hparams(state))  # 3 − 2 · 0.5³
      2.75
    """

    init: Callable[..., OuterState]
    update: Callable[[OuterState], tuple[OuterState, OuterReport]]
    hparams: Callable[[OuterState], PyTree]


def outer_step(
    outer_loss: Callable | None,
    optimizer: optax.GradientTransformation,
    *,
    transforms: PyTree = None,
    projections: PyTree = None,
    remedies: Remedies = NO_REMEDIES,
    gradient: Callable | None = None,
) -> OuterStep:
    r"""The step of `tune` as a pair of pure functions, for a loop of your own.

    With h = forward(u), an update is
    :math:`u \leftarrow u + \mathrm{optimizer}(\nabla_u F(\mathrm{forward}(u)))`.
    `jit`, `vmap` and `scan` apply to both functions; without `jit`, `update` traces the outer loss at every call:

    .. code-block:: python

        step = outer_step(outer_loss, optax.adam(0.1), transforms=positive)
        state = step.init(hparams, carry, key)
        update = jax.jit(step.update)
        for _ in range(100):
            state, report = update(state)

    `update` takes every step, finite or not. To leave out those that are not, keep the old state with the number of
    the new one, which draws another key: `jax.tree.map(partial(jnp.where, report.finite), new,
    old._replace(step=new.step))`. `state._replace(carry=...)` hands other data to the next step.

    **Cost and bias**: one hypergradient an update, and whatever bias its rule has; memory of the hyperparameters (three
    copies) and of the optimiser's state. Nothing is recorded, checked against zero or diagnosed: `tune` does that.

    Args:
      outer_loss: as for `tune`; None where `gradient` is given.
      optimizer: any optax transformation.
      transforms: as for `tune`.
      projections: as for `tune`.
      remedies: as for `tune`.
      gradient: as for `tune`.

    Returns:
      An `OuterStep(init, update, hparams)`.

    Raises:
      JaxhpoError: an input that cannot work.

    Example:
      >>> step = jaxhpo.outer_step(lambda h: jnp.sum((h - 3.0) ** 2), optax.sgd(0.1), transforms=jaxhpo.positive)
      >>> starts = jnp.array([[1.0], [2.0]])
      >>> states = jax.vmap(step.init)(starts)
      >>> states, reports = jax.lax.scan(lambda s, _: jax.vmap(step.update)(s), states, length=20)
      >>> print(step.hparams(states).round(2).tolist(), reports.value.shape)
      [[3.0], [3.0]] (20, 2)

    References:
      Pedregosa. Hyperparameter optimization with approximate gradient. 2016. arXiv:1602.02355
    """
    step = Step(outer_loss, optimizer, transforms, projections, remedies, gradient)
    return OuterStep(step.init, step.update, step.hparams)


class Step:
    """The functions of an `OuterStep`, and those that explain one of its steps.

    Attributes:
      inner_steps: those of all solves that were traced for a step; under `vmap` or a scan each counts once.
      truncated: whether linear solvers of a fixed number of terms were among them, which have no tolerance.
      steps_per_call: steps that `advance` takes, in one program.
      place: gives the rule that a solve takes in the place of the one that it asks for.
    """

    def __init__(self, outer_loss, optimizer, transforms, projections, remedies, gradient, steps_per_call=1):
        check_optimizer(optimizer, transforms)
        self.loss, self.gradient = in_one_form(outer_loss, gradient)
        check_policies(remedies, is_deterministic(outer_loss, gradient))
        self.optimizer = optax.with_extra_args_support(optimizer)
        self.transforms, self.projections, self.remedies = transforms, projections, remedies
        self.inner_steps, self.truncated, self.steps_per_call = 0, False, steps_per_call
        self.place: Callable[[Any], Any] = lambda rule: rule

    def init(self, hparams: PyTree, carry: PyTree = None, key: jax.Array | None = None) -> OuterState:
        """Returns the state before the first step."""
        point = self.checked_point(hparams)
        key = jax.random.key(0) if key is None else check_key(key)
        carry = jax.tree.map(jnp.asarray, check_arrays(carry, "carry"))
        opt_state = self.optimizer.init(point) if jax.tree.leaves(point) else None  # nothing to optimise
        point, opt_state, carry = without_weak_types((point, opt_state, carry))
        return OuterState(point, opt_state, carry, key, jnp.zeros((), jnp.int32), point)

    def restarted(self, state: OuterState) -> OuterState:
        """Returns the state after a rule that misled: the optimiser's as at the start, but for its schedules.

        Moments hold hypergradients of another direction, and of another length: those of one random direction are √m
        times as long, and Adam's steps would be shorter by nearly as much for some hundred steps.
        """
        first = without_weak_types(self.optimizer.init(state.point))
        return state._replace(opt_state=_with_schedules(first, state.opt_state))

    def checked_point(self, hparams: PyTree) -> PyTree:
        """Returns the hyperparameters unconstrained; raises where a transform, remedy or projection rejects them."""
        point = to_unconstrained(self.transforms, check_hparams(hparams))
        self.remedies.check(self.transforms, point)
        check_projections(self.projections, self.transforms, point)
        return point

    def update(self, state: OuterState) -> tuple[OuterState, OuterReport]:
        """Takes an outer step."""
        after, report = self.advance(state)
        return with_constants(after, state), report

    def hparams(self, state: OuterState) -> PyTree:
        """Returns the hyperparameters in natural units."""
        return to_natural(self.transforms, state.point)

    def advance(self, state: OuterState) -> tuple[OuterState, OuterReport]:
        """Takes the steps of a call, without what `with_constants` puts back: the device need not return it.

        The report is that of the last step, with the remedies of all. A step that is not finite is the last: the state
        is then that before it.
        """
        if self.steps_per_call == 1:
            return self._step(state, jax.random.fold_in(state.key, state.step))
        # All keys at once, as a tenth of a short step's time goes into one; not of generators that vectorise to others.
        exact = "unsafe" not in str(jax.random.key_impl(state.key))
        fold = (
            jax.vmap(jax.random.fold_in, (None, 0))
            if exact
            else lambda key, i: jax.lax.map(lambda i: jax.random.fold_in(key, i), i)
        )
        keys = fold(state.key, state.step + jnp.arange(self.steps_per_call, dtype=jnp.int32))

        def body(carry):
            count, state, before = carry
            after, report = self._step(state, keys[count])
            remedies = jax.tree.map(jnp.add, before.remedies, report.remedies)
            return count + 1, with_constants(after, state), report._replace(remedies=remedies)

        with warnings.catch_warnings(action="ignore"):  # tracing the loop issues them again
            shapes = jax.eval_shape(self._step, state, state.key)[1]
        none = jax.tree.map(jnp.zeros_like, shapes)._replace(finite=jnp.asarray(True))

        def attempt(carry):
            # To keep the state before each step would cost a copy of it in every one. A call that meets a step that is
            # not finite takes those before it once more, by the same program, so to the same bits.
            tries, limit, _, before = carry
            going = lambda carry: (carry[0] < limit) & carry[2].finite  # noqa: E731
            count, after, report = jax.lax.while_loop(going, body, (jnp.zeros((), jnp.int32), state, none))
            report = jax.tree.map(lambda new, old: jnp.where(tries == 0, new, old), report, before)
            return tries + 1, count - 1, after, report

        unsettled = lambda carry: (carry[0] == 0) | ((carry[0] == 1) & ~carry[3].finite)  # noqa: E731
        start = jnp.zeros((), jnp.int32), jnp.asarray(self.steps_per_call, jnp.int32), state, none
        _, _, after, report = jax.lax.while_loop(unsettled, attempt, start)
        return without_constants(after), report

    def _step(self, state: OuterState, key: Any) -> tuple[OuterState, OuterReport]:
        """Takes one outer step with its key."""
        value, grad, carry, info, noise = self._accumulated(state.point, state.carry, key)
        safe, counts = clipped(self.remedies, grad)
        more = {"value": value, "grad": safe, "value_fn": lambda u: self.objective(u, state.carry, key)[0]}
        more |= {} if noise is None else {"noise": noise}
        point, opt_state = state.point, state.opt_state
        if jax.tree.leaves(point):
            with mixed_types():  # optax mixes types of numbers
                updates, opt_state = self.optimizer.update(safe, opt_state, point, **more)
                point = optax.apply_updates(point, updates)
        point, counts["shrunk_leaves"] = shrunk(self.remedies, self.transforms, safe, point)
        point, counts["projected_entries"] = projected(self.projections, point)
        after = without_weak_types(OuterState(point, opt_state, carry, None, state.step + 1, None))
        hparams = to_natural(self.transforms, state.point)
        grad_norm = norm(upcast(grad))  # squares of float16 overflow
        finite = jnp.isfinite(value) & all_finite((grad, point)) & ~has_nan(carry) & solves_finite(info)
        return after, OuterReport(value, hparams, grad, grad_norm, finite, counts, info)

    def objective(self, point, carry, key):
        """Returns `(value, (carry, info))`, to be differentiated with respect to the point."""
        around = active().rule
        with recording(rule=lambda rule: around(self.place(rule))):
            value, carry, info = self.loss(to_natural(self.transforms, point), carry, key)
        return value, (carry, info)

    def _value_and_grad(self, point, carry, key):
        if self.gradient is None:
            (value, (carry, info)), grad = jax.value_and_grad(self.objective, has_aux=True)(point, carry, key)
            return value, grad, carry, info, None
        # The chain rule: with h = forward(u), dF/du = forward'(u)^T dF/dh.
        hparams, pullback = jax.vjp(lambda u: to_natural(self.transforms, u), point)
        value, grad, carry, info = self.gradient(hparams, carry, key)
        return value, pullback(grad)[0], carry, info, relative_variance(grad, info)

    def _counted(self, point, carry, key):
        log = SolveLog(schedules=False)
        with recording(solves=log):
            out = self._value_and_grad(point, carry, key)
        self.inner_steps, self.truncated = self.remedies.accumulate * log.num_steps, log.truncated
        check_carry(carry, out[2])
        return out

    def _accumulated(self, point, carry, key):
        """Returns the mean over several outer losses of different keys, computed in sequence."""
        times = self.remedies.accumulate
        if times == 1:
            return self._counted(point, carry, key)

        def body(sums, key):
            value, grad, after, info, noise = self._counted(point, carry, key)
            return add_scaled(sums, 1 / times, (value, grad, noise)), (after, info)

        value, grad, _, _, noise = jax.eval_shape(self._value_and_grad, point, carry, key)
        zeros = jax.tree.map(jnp.zeros_like, (value, grad, noise))
        (value, grad, noise), (carries, infos) = jax.lax.scan(body, zeros, jax.random.split(key, times))
        noise = None if noise is None else noise / times
        return value, grad, jax.tree.map(lambda x: x[-1], carries), infos, noise


def relative_variance(grad: PyTree, info: PyTree) -> jax.Array | None:
    """Returns (s / ‖D‖)² of a hypergradient D whose method reports the standard error s; None of others."""
    error = getattr(info, "standard_error", None)
    if error is None:
        return None
    squared = norm(upcast(grad)) ** 2
    return jnp.where(squared > 0, error**2 / jnp.where(squared > 0, squared, 1), 1.0)


def check_carry(before, after):
    """Raises where an outer step changes the tree of the carry, or the shape or type of a leaf."""
    want, got = (jax.tree.map(lambda x: describe(jnp.asarray(x)), carry) for carry in (before, after))
    if got != want:
        raise JaxhpoError(
            f"An outer step changed the carry from {want} to {got}, but every step must take what the last one "
            "returned: start from a `carry` of the structure, shapes and types that the outer loss returns."
        )


def with_constants(after: OuterState, state: OuterState) -> OuterState:
    """Completes the state that `Step.advance` returned."""
    return after._replace(key=state.key, before=state.point)


def without_constants(state: OuterState) -> OuterState:
    """The state as `Step.advance` returns it."""
    return state._replace(key=None, before=None)


def backtracked(state: OuterState) -> OuterState:
    """Returns the state with the point halfway back to the previous one."""
    point = jax.tree.map(lambda now, before: (now + before) / 2, state.point, state.before)
    return state._replace(point=point)


def has_nan(tree: PyTree) -> jax.Array:
    """Returns whether an entry is NaN; an infinity may be meant, as the smallest value so far."""
    found = [jnp.any(jnp.isnan(x)) for x in jax.tree.leaves(tree) if is_inexact(x)]
    return jnp.any(jnp.stack([jnp.asarray(False), *found]))


def solves_finite(info: PyTree) -> jax.Array:
    """Returns whether every inner solve whose `Info` is recorded is finite."""
    finite = [jnp.all(jnp.asarray(report.finite)) for report in reports_in(info, Info)]
    return jnp.all(jnp.stack([jnp.asarray(True), *finite]))


def reports_in(info: PyTree, kind: type) -> list[Any]:
    """Returns the reports of a kind, `Info` or `LinearInfo`, that are recorded."""
    is_report = lambda x: isinstance(x, kind)  # noqa: E731
    return [x for x in jax.tree.leaves(info, is_leaf=is_report) if is_report(x)]


_SCHEDULED = (  # that hold other numbers than counts, or the state of another optimiser
    optax.ConditionallyMaskState,
    optax.ConditionallyTransformState,
    optax.InjectHyperparamsState,
    optax.InjectStatefulHyperparamsState,
    optax.MultiStepsState,
    optax.contrib.ReduceLROnPlateauState,
)


def _with_schedules(first: PyTree, now: PyTree) -> PyTree:
    """The first state of an optimiser, with the present one of what counts steps for a schedule, and holds no moments.

    That is each named tuple of counts and keys alone, and those of `_SCHEDULED`. A count that belongs to moments, as
    for Adam's correction of their bias, begins anew with them. So do parts that an optimiser makes up on the way.
    """
    children, structure = jax.tree.flatten(now, is_leaf=lambda x: x is not now)
    fresh, same = jax.tree.flatten(first, is_leaf=lambda x: x is not first)
    if structure != same or jax.tree_util.treedef_is_leaf(structure):
        return first
    if isinstance(now, _SCHEDULED):
        anew = {name: getattr(first, name) for name in {"mini_step", "acc_grads"} & set(now._fields)}
        inner = {"inner_state", "inner_opt_state"} & set(now._fields)
        return now._replace(
            **anew, **{name: _with_schedules(getattr(first, name), getattr(now, name)) for name in inner}
        )
    if hasattr(now, "_fields") and children and not any(map(is_inexact, jax.tree.leaves(now))):
        return now
    return jax.tree.unflatten(structure, map(_with_schedules, fresh, children))
