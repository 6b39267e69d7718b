"""Differentiate through the inner steps."""

from __future__ import annotations

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp

from jaxhpo._adjoint.binomial import run_backward, run_forward
from jaxhpo._adjoint.checkpointing import choose, sizes_of
from jaxhpo._adjoint.fraction import check_fraction, is_mean, subsample
from jaxhpo._adjoint.pullback import in_condition, run_with_pullback
from jaxhpo._core.cost import predicted_peak_bytes
from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.record import UnrolledSolve, report_fault, report_schedule
from jaxhpo._core.stop_gradient import constant
from jaxhpo._core.tree import is_inexact, names, partition
from jaxhpo._core.types import InnerState, Schedule
from jaxhpo._core.validate import check_count, check_positive, describe
from jaxhpo._inner.gradient import mixed_value_and_grad
from jaxhpo._inner.inputs import refuse_tol
from jaxhpo._inner.loop import scan_steps
from jaxhpo._inner.problem import Problem


@dataclasses.dataclass(frozen=True)
class Unroll:
    r"""Reverse-mode differentiation through the inner steps, with checkpoints.

    With :math:`\theta_{t+1} = \Phi_t(\theta_t, h)` and the cotangent :math:`a_T = v`, going back
    :math:`g \mathrel{+}= (\partial_h \Phi_t)^\top a_{t+1}`, :math:`a_t = (\partial_\theta \Phi_t)^\top a_{t+1}`.
    Sees everything: losses, learning rates, momenta, schedules, initial parameters, data. With `truncate=K` only the
    last K steps are differentiated (the sum is cut off), so initial parameters and earlier steps get nothing.

    **Cost and bias**: three to five plain trainings (forward, one more redone between saved states, and per step a
    Hessian product, with or without the gradient), six with `"binomial"`; memory of 2√T inner states, T with
    `checkpoint=1`, 1.8 T^⅓ with `"binomial"`, T steps' activations with None, and in every case what one step takes.
    `memory_plan` tells what each takes on your problem. Exact for the T-step map. The truncated sum errs by
    :math:`O((1-\alpha\mu)^K)` at a strongly convex solution, and is biased.

    Where inner gradients are kept (`checkpoint=1`, and others where the activations of a step outweigh them) and under
    `"binomial"`, a step is differentiated in mixed mode: the Hessian product and the mixed product in one
    forward-over-reverse pass, unless the train loss holds a derivative rule of the user's (`jax.custom_vjp`).

    With `hvp_fraction=f` these products are taken on a random part of each minibatch, :math:`\lceil fb \rfloor` of b
    examples, another part at each step. Steps are linear in their products and the parts independent, so the
    hypergradient stays unbiased for a train loss that is a mean over the examples (plus what depends on none). Another
    loss, as two halves of the first minibatch tell, gives NaN, and `tune` and `check_hypergradient` say why. The value
    is exact; weights of examples get theirs from the steps that drew them.

    Args:
      checkpoint: what the backward pass finds stored. `"auto"`: all that plain autodiff stores, if that is below 16
        MiB; else every state and gradient if they are, or T ≤ 16; beyond that two levels with as many steps between
        states as take the least memory. An integer k: one state every k steps (it need not divide the number of steps);
        1 is every state. `"sqrt"`: k = √T for T > 16, else 1. `"binomial"`: the fewest states with which no step is
        taken more than three times. None: whatever plain autodiff stores, all activations of all steps. Under `vmap`
        the sizes of one member decide.
      truncate: K above, or None for all steps.
      memory_limit: bytes that run and backward pass may take (estimated, of one member under `vmap`): the fastest
        schedule that fits is taken, with `checkpoint="auto"`.
      hvp_fraction: f above, in (0, 1]; needs `solve(..., key=key)` and batches whose leaves lead with the examples.

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
    memory_limit: float | None = None
    hvp_fraction: float | None = None

    def __post_init__(self):
        if isinstance(self.checkpoint, str):
            if self.checkpoint not in ("auto", "sqrt", "binomial"):
                raise JaxhpoError(
                    f"`Unroll(checkpoint=...)` got {self.checkpoint!r}, which is no schedule: write 'auto', 'sqrt', "
                    f"'binomial', an integer (steps between saved states), or None (what plain autodiff keeps)."
                )
        elif self.checkpoint is not None:
            check_count("Unroll(checkpoint=...)", self.checkpoint)
        if self.truncate is not None:
            check_count("Unroll(truncate=...)", self.truncate)
        if self.memory_limit is not None:
            check_positive("Unroll(memory_limit=...)", self.memory_limit)
            if self.checkpoint != "auto":
                raise JaxhpoError(
                    f"`Unroll(memory_limit={self.memory_limit!r})` chooses the cheapest schedule that fits, but "
                    f"`checkpoint={self.checkpoint!r}` has chosen one already: write either."
                )
        if self.hvp_fraction is not None:
            check_positive("Unroll(hvp_fraction=...)", self.hvp_fraction)
            if self.hvp_fraction > 1:
                raise JaxhpoError(
                    f"`Unroll(hvp_fraction={self.hvp_fraction!r})` is a part of each minibatch: write a number up to 1."
                )

    def run(self, problem: Problem) -> tuple[InnerState, jax.Array]:
        """Runs the inner loop; the result is differentiable through the last `truncate` steps."""
        refuse_tol(problem, self)
        schedule = self._choose_schedule(problem)
        problem = self._with_gradient(problem, schedule)
        if self._subsamples:
            problem = _nan_unless_mean(problem)
        return self._run(problem, schedule), jnp.asarray(problem.num_steps, jnp.int32)

    @property
    def _subsamples(self) -> bool:
        return self.hvp_fraction is not None and self.hvp_fraction < 1

    def _choose_schedule(self, problem) -> Schedule:
        """What is kept of the steps that are differentiated, by the sizes of what there is to keep."""

        def own(schedule):
            if self._subsamples:
                # A part of a minibatch gives the gradient's derivative, not the gradient: that is kept, or redone.
                schedule = schedule._replace(gradients=schedule.slots is None)
            return schedule._replace(gradients=schedule.gradients and problem.solver.apply is not None)

        sizes = sizes_of(problem, lambda schedule: self._peak(problem, own(schedule)))
        steps = min(problem.num_steps, self.truncate or problem.num_steps)
        schedule = own(choose(self.checkpoint, steps, sizes, self.memory_limit))
        report_schedule(
            lambda: UnrolledSolve(
                self, problem.num_steps, schedule, sizes.state, sizes.gradient, sizes.activations(), sizes.residuals()
            )
        )
        return schedule

    def _with_gradient(self, problem, schedule):
        """The problem whose steps take the train loss's gradient in the way that the schedule calls for."""
        fraction = self.hvp_fraction
        if fraction is not None and self._subsamples:
            check_fraction(self, problem.solver)
            keys = jax.random.split(problem.require_key(self), problem.num_steps)

            def subsampled(loss, params, hparams, batch, model_state, key):
                part = functools.partial(subsample, key=key, fraction=fraction)
                return mixed_value_and_grad(loss, params, hparams, batch, model_state, part)

            return problem.with_gradient(subsampled if schedule.mixed else None, keys)
        if schedule.mixed:
            return problem.with_gradient(lambda *args: mixed_value_and_grad(*args[:-1]))
        return problem

    def _peak(self, problem, schedule):
        """Bytes that run and backward pass take."""

        def pulled(state, inputs):
            moved, combine = partition((state, inputs), jax.tree.map(is_inexact, (state, inputs)))

            def run(moved):
                state, (hparams, _) = combine(moved)
                own = self._with_gradient(problem, schedule)
                return self._run(own._replace(state=state, inputs=(hparams, own.inputs[1])), schedule).params

            params, pullback = jax.vjp(run, moved)
            return pullback(params)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the real run will warn
            return predicted_peak_bytes(pulled, problem.state, problem.inputs)

    def _run(self, problem, schedule):
        steps = problem.num_steps
        early = max(0, steps - self.truncate) if self.truncate is not None else 0
        state, inputs, xs = problem.state, problem.inputs, problem.xs
        if early:
            state, inputs_early = self._cut(problem, early)
            head = constant(
                jax.tree.map(lambda x: x[:early], xs),
                names(xs[0], "batches") + ["key"] if self._subsamples else names(xs, "batches"),
                f"is being differentiated, and {self!r} differentiates only the last {self.truncate} of {steps} inner "
                f"steps: the hypergradient of the first {early} batches is exactly zero. `Unroll()` without `truncate` "
                "sees them.",
                partial=True,
            )
            state = scan_steps(lambda s, x: problem.advance(s, inputs_early, x), state, head, early)
            state = jax.lax.stop_gradient(state)
            xs = jax.tree.map(lambda x: x[early:], xs)
        if schedule.slots is not None:
            rest = problem._replace(state=state, inputs=inputs, xs=xs, num_steps=steps - early)
            return _run_binomial(self, rest, schedule.slots)
        return scan_steps(lambda s, x: problem.advance(s, inputs, x), state, xs, steps - early, schedule)

    def _cut(self, problem, early):
        """The state and inputs of the steps that are not differentiated, with a warning where that loses something."""
        state = constant(
            problem.state,
            names(problem.state, "state"),
            f"is an initial value, and {self!r} differentiates only the last {self.truncate} of {problem.num_steps} "
            "inner steps, so its hypergradient through this solve is exactly zero. `Unroll()` without `truncate` sees "
            "it.",
        )
        hparams, closed_over = problem.inputs
        leaves, structure = jax.tree.flatten(hparams)

        def cut(leaf, name, in_condition):
            # An entry of a schedule may be used in the early steps alone; what the loss uses is used in every step.
            if in_condition or not leaf.ndim:
                return jax.lax.stop_gradient(leaf)
            return constant(
                leaf,
                [name],
                f"acts through the optimiser alone, and {self!r} differentiates only the last {self.truncate} of "
                f"{problem.num_steps} inner steps: what it did in the first {early} steps is not in its hypergradient "
                f"(an entry of a schedule used only there gets exactly zero). `Unroll()` without `truncate` sees all "
                "steps.",
                partial=True,
            )

        seen = in_condition(problem)
        every = [*names(hparams, "hparams"), *(f"a {describe(c)} that is closed over" for c in closed_over)]
        marked = [cut(*row) for row in zip([*leaves, *closed_over], every, seen, strict=True)]
        return state, (jax.tree.unflatten(structure, marked[: len(leaves)]), marked[len(leaves) :])


def _run_binomial(rule, problem, slots) -> InnerState:
    def forward(inputs):
        return run_forward(problem.advance, inputs.state, inputs.inputs, inputs.xs, slots)

    def pull(inputs, perturbed, kept, cotangent):
        floats = partition(cotangent, jax.tree.map(is_inexact, inputs.state))[0]
        of_state, *of_rest = run_backward(
            problem.advance, kept, inputs.inputs, inputs.xs, (perturbed.inputs, perturbed.xs), floats
        )
        of_state = partition(inputs.state, jax.tree.map(is_inexact, inputs.state))[1](of_state)
        return [*partition(of_state, perturbed.state)[0], *of_rest[0], *of_rest[1]]

    return run_with_pullback(problem, rule, forward, pull, lambda inputs, perturbed: None, once=False)[0]


def _nan_unless_mean(problem) -> Problem:
    """The problem, begun at NaN if its train loss is no mean over the examples: there no part stands for the whole."""
    solver = problem.solver

    def holds(state, hparams, batch):
        precision = max(float(jnp.finfo(p.dtype).eps) for p in jax.tree.leaves(state.params))

        def holds_at(params):
            loss = lambda batch: solver.loss(params, hparams, batch, state.model_state)[0]  # noqa: E731
            return is_mean(loss, batch, precision)

        # Weights that are all zero may hide what the batch has to do with the loss.
        return holds_at(state.params) & holds_at(_moved(state.params))

    pure, consts = problem.closure_convert(holds)
    first = jax.tree.map(lambda x: x[0], problem.xs)
    good = pure(consts, *jax.lax.stop_gradient((problem.state, problem.inputs[0])), first)
    report_fault(~good, _NO_MEAN)
    params = jax.tree.map(lambda p: jnp.where(good, p, jnp.nan), problem.state.params)
    return problem._replace(state=problem.state._replace(params=params))


def _moved(params):
    """Parameters in a place like any other: a tenth of a standard normal number away."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    moved = [x + 0.1 * jax.random.normal(key, x.shape, x.dtype) for x, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, moved)


_NO_MEAN = (
    "`Unroll(hvp_fraction=...)`: on two halves of the first minibatch the train loss is not, on average, what it is on "
    "the whole: it is no mean over the examples (but a sum, or contrastive, or it normalises over the batch, or draws "
    "random numbers for the batch as a whole), and a part of them would give another Hessian. Write a mean, with a key "
    "for each example where there is dropout, or omit `hvp_fraction`."
)
