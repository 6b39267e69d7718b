"""Reverse-mode differentiation through the inner steps."""

import dataclasses
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp

from jaxhpo._adjoint.binomial import run_binomial
from jaxhpo._adjoint.checkpointing import choose, sizes_of
from jaxhpo._adjoint.fraction import nan_unless_mean, subsample
from jaxhpo._adjoint.model_state import warn_of_stopped
from jaxhpo._adjoint.pullback import in_condition, input_names, refuse_tol
from jaxhpo._core.cost import UNKNOWN_LENGTH, count_and_peak
from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.record import UnrolledSolve, report_schedule
from jaxhpo._core.stop_gradient import stop_gradient_with_warning
from jaxhpo._core.tree import is_inexact, names, partition
from jaxhpo._core.types import InnerState, Schedule
from jaxhpo._core.validate import check_count, check_settings
from jaxhpo._inner.gradient import mixed_value_and_grad
from jaxhpo._inner.loop import scan_steps
from jaxhpo._inner.problem import Problem


@dataclasses.dataclass(frozen=True)
class Unroll:
    r"""Reverse-mode differentiation through the inner steps, with checkpoints.

    With :math:`\theta_{t+1} = \Phi_t(\theta_t, h)` and the cotangent :math:`a_T = v`, going back
    :math:`g \mathrel{+}= (\partial_h \Phi_t)^\top a_{t+1}`, :math:`a_t = (\partial_\theta \Phi_t)^\top a_{t+1}`.
    Sees everything: losses, learning rates, momenta, schedules, initial parameters, data. With `truncate=K` only the
    last K steps are differentiated: initial parameters and earlier steps get no hypergradient.

    **Cost and bias**: three plain trainings and the activations of T steps where those take little memory; else four to
    five (what is not stored is recomputed once) with every state, or with 2√T of them, and six with `"binomial"` and
    1.8 T^⅓ states; always the activations of one step. `memory_plan` predicts both for your problem. Exact for the
    T-step map. The truncated sum is biased, by :math:`O((1-\alpha\mu)^K)` at a strongly convex solution.

    If inner gradients are stored (`checkpoint=1`, or if they are smaller than the activations of a step), and under
    `"binomial"`, a step is differentiated in mixed mode: the Hessian product and the mixed product in one
    forward-over-reverse pass, unless the train loss contains a user-defined `jax.custom_vjp`.

    With `hvp_fraction=f` these products are taken on a random part of each minibatch, round(f b) of b examples, drawn
    anew at each step. The backward recursion is linear in each product and the parts are independent, so the
    hypergradient stays unbiased for a train loss that is a mean over the examples (plus terms that depend on no
    example). For any other loss, recognised by comparing two halves of the first minibatch with the whole, it is NaN,
    as `tune` and `check_hypergradient` explain. An example's weight gets its hypergradient from the steps that drew it.

    Args:
      checkpoint: what is stored for the backward pass. `"auto"`: the fastest schedule whose predicted memory is below
        1 GiB, on every machine, where a byte beyond the first 32 MiB counts as 64 operations, as was measured on a CPU
        (where memory is faster, None may be); where there is none, as `"sqrt"`. `"sqrt"`: the least memory in two
        levels, about √T states and as many in flight; but everything that plain autodiff stores below 16 MiB, and every
        state and gradient below 16 MiB or for T ≤ 16. An integer k: one state every k steps, 1 all. `"binomial"`: the
        fewest states with which no step is taken more than three times. None: everything that plain autodiff stores.
        Under `vmap` the sizes of one member decide: for a population write `memory_limit`, or `"sqrt"`.
      truncate: the number K of last steps that are differentiated; None for all.
      memory_limit: upper bound on the predicted bytes of run and backward pass (of one member under `vmap`), in the
        place of 1 GiB: of what fits, the schedule with the fewest operations is taken; raises if nothing does.
        `"device"`: four fifths of what the device, or the machine, has free. With `checkpoint="auto"`.
      hvp_fraction: the fraction f in (0, 1]; needs `solve(..., key=key)`, and batches with a leading axis of examples.

    Raises:
      JaxhpoError: a setting out of its range; nothing fits the limit; no key, or no examples, for `hvp_fraction`.

    Example:
      >>> adjoint = jaxhpo.Unroll(checkpoint=20, truncate=100)

    References:
      Domke. Generic Methods for Optimization-Based Modeling. 2012.
      Franceschi, Donini, Frasconi, Pontil. Forward and Reverse Gradient-Based Hyperparameter Optimization. 2017.
      arXiv:1703.01785
      Shaban, Cheng, Hatch, Boots. Truncated Back-propagation for Bilevel Optimization. 2019. arXiv:1810.10667
      Griewank, Walther. Algorithm 799: Revolve. 2000.
      Kemaev et al. Scalable Meta-Learning via Mixed-Mode Differentiation. 2025. arXiv:2505.00793
    """

    checkpoint: int | str | None = "auto"
    truncate: int | None = None
    memory_limit: float | str | None = None
    hvp_fraction: float | None = None

    def __post_init__(self):
        if self.checkpoint not in ("auto", "sqrt", "binomial", None):
            if isinstance(self.checkpoint, str):
                raise JaxhpoError(
                    f"`Unroll(checkpoint=...)` got {self.checkpoint!r}, which is not a schedule: write 'auto', 'sqrt', "
                    "'binomial', an integer (steps between stored states), or None (what plain autodiff stores)."
                )
            check_count("Unroll(checkpoint=...)", self.checkpoint)
        check_settings(self, truncate="count or None", hvp_fraction="positive or None")
        if isinstance(self.memory_limit, str):
            if self.memory_limit != "device":
                raise JaxhpoError(
                    f"`Unroll(memory_limit=...)` got {self.memory_limit!r}, which is no limit: write a number of "
                    "bytes, or 'device', for four fifths of what is free."
                )
        else:
            check_settings(self, memory_limit="positive or None")
        if self.memory_limit is not None and self.checkpoint != "auto":
            raise JaxhpoError(
                f"`Unroll(memory_limit={self.memory_limit!r})` chooses the fastest schedule that fits, but "
                f"`checkpoint={self.checkpoint!r}` has chosen one already: pass only one of them."
            )
        if self.hvp_fraction is not None and self.hvp_fraction > 1:
            raise JaxhpoError(f"`Unroll(hvp_fraction={self.hvp_fraction!r})` is a part of each batch: write at most 1.")

    def run(self, problem: Problem) -> tuple[InnerState, jax.Array]:
        """Runs the inner loop; the result is differentiable through the last `truncate` steps."""
        refuse_tol(problem, self)
        schedule = self._choose_schedule(problem)
        own = self._with_gradient(problem, schedule.mixed)
        if self._subsamples:
            own = nan_unless_mean(own)
        return warn_of_stopped(problem, self._run(own, schedule)), jnp.asarray(problem.num_steps, jnp.int32)

    @property
    def _subsamples(self) -> bool:
        return self.hvp_fraction is not None and self.hvp_fraction < 1

    def _choose_schedule(self, problem) -> Schedule:
        """Chooses the checkpoint schedule, from the sizes of states, gradients and activations."""

        def adjusted(schedule):
            if self._subsamples:
                # Only the Hessian products use a part of the batch: the gradient of the whole batch is stored (under
                # "binomial", recomputed).
                schedule = schedule._replace(gradients=schedule.slots is None)
            return schedule._replace(gradients=schedule.gradients and problem.solver.apply is not None)

        cost = functools.cache(lambda schedule: self._cost(problem, schedule))
        sizes = sizes_of(problem, lambda schedule: cost(adjusted(schedule)))
        steps = problem.num_steps - self._num_constant(problem)
        schedule = adjusted(choose(self.checkpoint, steps, sizes, self.memory_limit))
        report_schedule(lambda: UnrolledSolve(self, problem.num_steps, schedule, *sizes.measured()))
        return schedule

    def _num_constant(self, problem) -> int:
        """The number of first steps that are not differentiated."""
        return max(0, problem.num_steps - (self.truncate or problem.num_steps))

    def _with_gradient(self, problem, mixed) -> Problem:
        """The problem with the train loss's gradient in mixed mode, if so, and its products on parts of minibatches."""
        fraction: Any = self.hvp_fraction
        if self._subsamples:
            if problem.solver.apply is None:
                raise JaxhpoError(
                    f"{self!r} estimates Hessian products of a train loss, and `{problem.solver.name}` has none: write "
                    "`from_optax(loss, tx)`, or omit `hvp_fraction`."
                )
            keys = jax.random.split(problem.require_key(self), problem.num_steps)

            def subsampled(loss, params, hparams, batch, model_state, key):
                part = functools.partial(subsample, key=key, fraction=fraction)
                return mixed_value_and_grad(loss, params, hparams, batch, model_state, part)

            return problem.with_gradient(subsampled, keys)
        if mixed:
            return problem.with_gradient(lambda *args: mixed_value_and_grad(*args[:-1]))  # less the key
        return problem

    def _cost(self, problem, schedule) -> tuple[float, int]:
        """Predicts the operations and the bytes that the run and its backward pass take."""

        def pulled(state, inputs):
            values, combine = partition((state, inputs), jax.tree.map(is_inexact, (state, inputs)))

            def run(values):
                state, (hparams, _) = combine(values)
                prepared = self._with_gradient(problem, schedule.mixed)
                inputs = (hparams, prepared.inputs[1])
                return self._run(prepared._replace(state=state, inputs=inputs), schedule).params

            params, pullback = jax.vjp(run, values)
            return pullback(params)

        with warnings.catch_warnings(action="ignore"):  # the real run will warn
            return count_and_peak(pulled, problem.state, problem.inputs, unknown_length=UNKNOWN_LENGTH)

    def _run(self, problem, schedule) -> InnerState:
        if early := self._num_constant(problem):
            problem = self._after_constant_steps(problem, early)
        if schedule.slots is not None:
            return run_binomial(self, problem, schedule.slots)
        return scan_steps(problem, schedule)

    def _after_constant_steps(self, problem, early) -> Problem:
        """Runs the steps that are not differentiated, with a warning for each input whose derivative is lost there."""
        lost = f"{self!r} differentiates only the last {self.truncate} of {problem.num_steps} inner steps"
        instead = "`Unroll()` without `truncate` sees"
        state = stop_gradient_with_warning(
            problem.state,
            names(problem.state, "state"),
            f"is an initial value, and {lost}, so its hypergradient through this solve is exactly zero. {instead} it.",
        )
        head = jax.tree.map(lambda x: x[:early], problem.xs)
        head = stop_gradient_with_warning(
            head,
            # With parts of minibatches a slice is (batch, key).
            [*names(head[0], "batches"), "key"] if self._subsamples else names(head, "batches"),
            f"is being differentiated, and {lost}: the hypergradient of the first {early} batches is exactly zero. "
            f"{instead} them.",
            partial=True,
        )
        through_optimiser = (
            f"acts through the optimiser alone, and {lost}: its effect in the first {early} steps is not in its "
            f"hypergradient (an entry of a schedule used only there gets exactly zero). {instead} all steps."
        )

        def cut(leaf, name, in_loss):
            # What the loss uses is used in every step; an entry of a schedule may be used in the early steps alone.
            if in_loss or not leaf.ndim:
                return jax.lax.stop_gradient(leaf)
            return stop_gradient_with_warning(leaf, [name], through_optimiser, partial=True)

        leaves, structure = jax.tree.flatten(problem.inputs)
        rows = zip(leaves, input_names(problem.inputs), in_condition(problem), strict=True)
        inputs = jax.tree.unflatten(structure, [cut(*row) for row in rows])
        state = scan_steps(problem._replace(state=state, inputs=inputs, xs=head, num_steps=early))
        rest = jax.tree.map(lambda x: x[early:], problem.xs)
        return problem._replace(state=jax.lax.stop_gradient(state), xs=rest, num_steps=problem.num_steps - early)
