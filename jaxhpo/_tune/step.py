"""The compiled outer step."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.record import SolveLog, recording, traced_anew
from jaxhpo._core.trace import differentiable_inputs
from jaxhpo._core.transforms import to_natural
from jaxhpo._core.tree import add_scaled, all_finite, is_inexact, norm, upcast
from jaxhpo._core.types import Info, PyTree
from jaxhpo._diagnostics.not_finite import diagnose
from jaxhpo._diagnostics.origin import find_origin
from jaxhpo._tune.inputs import Evaluator
from jaxhpo._tune.remedies import Remedies, clipped, projected, shrunk


class State(NamedTuple):
    """All that an outer step depends on, and where the last one stood, to go back to where it led nowhere."""

    point: PyTree  # unconstrained hyperparameters
    opt_state: PyTree
    carry: PyTree
    key: Any
    step: Any
    before: PyTree


class Report(NamedTuple):
    """What an outer step tells the host."""

    value: jax.Array
    hparams: PyTree
    hypergradient: PyTree
    hypergradient_norm: jax.Array
    finite: jax.Array
    remedies: dict[str, jax.Array]
    info: PyTree


class Search:
    """The compiled outer step.

    Attributes:
      inner_steps: those of all solves that were traced for a step; under `vmap` or a scan each counts once.
    """

    def __init__(
        self, evaluate: Evaluator, optimizer: Any, transforms: PyTree, projections: PyTree, remedies: Remedies
    ):
        self.evaluate, self.transforms, self.projections, self.remedies = evaluate, transforms, projections, remedies
        self.optimizer = optax.with_extra_args_support(optimizer)
        self._compiled = jax.jit(self._step)
        self.inner_steps = 0

    def start(self, point: PyTree, carry: PyTree, key: jax.Array) -> State:
        """The state of no steps."""
        point, opt_state, carry = _strong((point, self.optimizer.init(point), carry))
        return State(point, opt_state, carry, key, jnp.zeros((), jnp.int32), point)

    def step(self, state: State) -> tuple[State, Report]:
        """Takes an outer step."""
        after, report = self._compiled(state)
        # What does not change need not come back from the device.
        return after._replace(key=state.key, before=state.point), report

    def objective(self, point, carry, key):
        """`(point, carry, key) -> (value, (carry, info))` where it can be differentiated."""
        loss: Any = self.evaluate.loss
        value, carry, info = loss(to_natural(self.transforms, point), carry, key)
        return value, (carry, info)

    def _value_and_grad(self, point, carry, key):
        if self.evaluate.gradient is None:
            (value, (carry, info)), grad = jax.value_and_grad(self.objective, has_aux=True)(point, carry, key)
            return value, grad, carry, info
        hparams, pullback = jax.vjp(lambda u: to_natural(self.transforms, u), point)
        value, grad, carry, info = self.evaluate.gradient(hparams, carry, key)
        return value, pullback(grad)[0], carry, info

    def _counted(self, point, carry, key):
        log = SolveLog(schedules=False)
        with recording(solves=log):
            out = self._value_and_grad(point, carry, key)
        if log.num_steps:  # none is seen of a function that the user jitted, and has called before
            self.inner_steps = self.remedies.accumulate * log.num_steps
        return out

    def _accumulated(self, point, carry, key):
        """The mean over several outer losses, one after the other."""
        times = self.remedies.accumulate
        if times == 1:
            return self._counted(point, carry, key)

        def body(sums, key):
            value, grad, after, info = self._counted(point, carry, key)
            return add_scaled(sums, 1 / times, (value, grad)), (after, info)

        shapes = jax.eval_shape(self._value_and_grad, point, carry, key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[:2])
        (value, grad), (carries, infos) = jax.lax.scan(body, zeros, jax.random.split(key, times))
        return value, grad, jax.tree.map(lambda x: x[-1], carries), infos

    def _step(self, state):
        key = jax.random.fold_in(state.key, state.step)
        value, grad, carry, info = self._accumulated(state.point, state.carry, key)
        safe, counts = clipped(self.remedies, grad)
        updates, opt_state = self.optimizer.update(
            safe,
            state.opt_state,
            state.point,
            value=value,
            grad=safe,
            value_fn=lambda u: self.objective(u, state.carry, key)[0],
        )
        point = optax.apply_updates(state.point, updates)
        point, counts["shrunk_leaves"] = shrunk(self.remedies, self.transforms, safe, point)
        point, counts["projected_entries"] = projected(self.projections, point)
        after = _strong(State(point, opt_state, carry, None, state.step + 1, None))
        grad_norm = norm(upcast(grad))  # squares of float16 overflow
        finite = jnp.isfinite(value) & all_finite((grad, point)) & ~_has_nan(carry) & _solves_finite(info)
        hparams = to_natural(self.transforms, state.point)
        return after, Report(value, hparams, grad, grad_norm, finite, counts, info)

    def retreat(self, state: State) -> State:
        """The state half of its last move back."""
        point = jax.tree.map(lambda now, before: (now + before) / 2, state.point, state.before)
        return state._replace(point=point)

    def shapes(self, state: State, placed: bool = False) -> tuple[State, Report]:
        """Shapes of what `step` returns, and the count of inner steps; the first step traces, and warns, itself.

        With `placed` also shardings, which only the compiler knows.
        """
        with warnings.catch_warnings(), traced_anew():
            warnings.simplefilter("ignore")
            after, report = jax.eval_shape(self._step, state)
            if placed:
                places = self._compiled.lower(state).compile().output_shardings
                struct = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
                after, report = jax.tree.map(struct, (after, report), places)
        # A shape does not tell which kind of key.
        return after._replace(key=state.key, before=state.point), report

    def structure(self, state):
        """A function that tells for each leaf whether its derivative can be non-zero; None where that is unknown."""
        if self.evaluate.gradient is not None:
            return None
        leaves, tree = jax.tree.flatten(state.point)

        def value(leaves):
            return self.objective(jax.tree.unflatten(tree, leaves), state.carry, state.key)[0]

        return lambda: differentiable_inputs(value, leaves)

    def diagnosis(self, state) -> str:
        """Where the step from `state` ceases to be finite."""
        if self.evaluate.gradient is not None:
            return "It comes from the `gradient` function that was given."
        key = jax.random.fold_in(state.key, state.step)
        keys = [key] if self.remedies.accumulate == 1 else list(jax.random.split(key, self.remedies.accumulate))

        run = jax.jit(lambda u, key: jax.value_and_grad(self.objective, has_aux=True)(u, state.carry, key))
        for key in keys:
            (value, (carry, info)), grad = run(state.point, key)
            if not bool(jnp.isfinite(value) & all_finite(grad) & _solves_finite(info)):
                try:
                    return diagnose(lambda u, key=key: self.objective(u, state.carry, key)[0], state.point)
                except JaxhpoError as error:  # of values that are only met outside compiled code
                    return str(error)
            if bool(_has_nan(carry)):
                return self._origin_of(carry, state, key)
        return "Loss and hypergradient are finite: look at the optimiser's rate and schedule at this step."

    def _origin_of(self, carry, state, key) -> str:
        bad = [bool(_has_nan(leaf)) for leaf in jax.tree.leaves(carry)]

        def made(point):
            leaves = jax.tree.leaves(self.objective(point, state.carry, key)[1][0])
            return [leaf for leaf, is_bad in zip(leaves, bad, strict=True) if is_bad]

        origin = find_origin(made, state.point)
        return f"It began {origin}" if origin else "Look for an overflow, or 0/0, in what makes the carry."


def _strong(tree):
    """Without JAX's weak types, which a Python number gives its arrays, and no file keeps."""

    def strong(x):
        return x.astype(x.dtype) if is_inexact(x) or jnp.issubdtype(getattr(x, "dtype", object), jnp.integer) else x

    return jax.tree.map(strong, tree)


def _has_nan(tree) -> jax.Array:
    # An infinity may be meant, as the least so far.
    found = [jnp.any(jnp.isnan(x)) for x in jax.tree.leaves(tree) if is_inexact(x)]
    return jnp.any(jnp.stack([jnp.asarray(False), *found]))


def _solves_finite(info) -> jax.Array:
    """What the reports of inner solves say, where they are among what is recorded."""
    is_report = lambda x: isinstance(x, Info)  # noqa: E731
    reports = [x for x in jax.tree.leaves(info, is_leaf=is_report) if is_report(x)]
    return jnp.all(jnp.stack([jnp.asarray(True), *(jnp.all(jnp.asarray(report.finite)) for report in reports)]))
