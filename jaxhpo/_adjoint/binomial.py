"""Binomial checkpointing: reverse mode with a fixed number of stored states and as few recomputed steps as possible.

To reverse n steps from one stored state with s slots in all (that state's own included), split them at m: take m steps
and store the state there, reverse the n − m steps after it with s − 1 slots, then the first m steps with s slots. Let
β(s, r) = C(s + r, s). For n ≤ β(s, r) no step need be taken more than r times, and any split with β(s, r−2) ≤ m ≤
β(s, r−1) and β(s−1, r−1) ≤ n − m ≤ β(s−1, r) takes the fewest steps in all (Griewank & Walther 2000, Algorithm 799:
revolve). The order of the actions depends on n and s alone, so it is a table made while tracing, and one scan runs
through it: compilation takes as long for any number of steps.
"""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo._adjoint.pullback import Pullback, pull_step, varying_zeros
from jaxhpo._core.tree import is_inexact, partition
from jaxhpo._core.types import InnerState
from jaxhpo._inner.loop import scan_slices, step_slice
from jaxhpo._inner.problem import Problem

NO_SLOT = -1  # load: keep the current state; store: store nothing


class Actions(NamedTuple):
    """The actions of the backward scan, one entry an iteration.

    Attributes:
      load: the slot of the state to continue from, or `NO_SLOT` for the current one.
      store: the slot in which to store that state, or `NO_SLOT`.
      step: the index t of the inner step that starts at that state.
      pull: True to pull the cotangent back through step t, False to take step t.
    """

    load: np.ndarray
    store: np.ndarray
    step: np.ndarray
    pull: np.ndarray


def least_slots(num_steps: int, repeats: int) -> int:
    """The fewest slots s with which no step is taken more than r times: β(s, r) = C(s + r, r) ≥ T.

    Args:
      num_steps: T, at least 1.
      repeats: r, at least 1.

    Example:
      >>> least_slots(1000, 3)  # β(17, 3) = 1140, and β(16, 3) = 969
      17
    """
    return next(slots for slots in itertools.count(1) if math.comb(slots + repeats, repeats) >= num_steps)


def least_repeats(num_steps: int, slots: int) -> int:
    """The least r with β(s, r) ≥ T.

    Args:
      num_steps: T, at least 1.
      slots: s, at least 1.
    """
    return next(repeats for repeats in itertools.count() if math.comb(slots + repeats, slots) >= num_steps)


def split(num_steps: int, slots: int) -> int:
    """The least optimal m: m ≥ β(s, r−2), and n − m ≤ β(s−1, r).

    Args:
      num_steps: n, at least 2.
      slots: s, at least 2.
    """
    repeats = least_repeats(num_steps, slots)
    least = math.comb(slots + repeats - 2, slots) if repeats > 1 else 1
    return max(least, num_steps - math.comb(slots - 1 + repeats, slots - 1))


def make_actions(num_steps: int, slots: int) -> tuple[np.ndarray, Actions]:
    """The slot in which the forward pass stores each state (or `NO_SLOT`), and the actions of the backward scan.

    Args:
      num_steps: n, at least 1.
      slots: s in all, that of the first state included; at least 1.

    Returns:
      The slots, int32, an entry for each state before the first pullback, and the `Actions` from that on.

    Example:
      >>> stored, actions = make_actions(3, slots=1)
      >>> stored.tolist(), actions.step.tolist(), actions.pull.tolist()  # from the start again for every step
      ([0, -1, -1], [2, 0, 1, 0], [True, False, True, True])
    """
    actions: list[tuple[int, int, int, bool]] = []

    def reverse(begin, length, slot, load, store, free):
        # Reverses `length` steps from the state at step `begin`, which is the current one, or in `slot` if `load` says
        # so, and is stored there if `store` says so.
        if length == 1:
            actions.append((load, store, begin, True))
            return
        if free == 1:  # no slot to split with: start from `begin` for every step, the last one first
            for step in range(begin + length - 1, begin - 1, -1):
                for at in range(begin, step + 1):
                    first = at == begin
                    actions.append((load if first else NO_SLOT, store if first else NO_SLOT, at, at == step))
                load, store = slot, NO_SLOT
            return
        ahead = split(length, free)  # m
        actions.append((load, store, begin, False))
        actions.extend((NO_SLOT, NO_SLOT, at, False) for at in range(begin + 1, begin + ahead))
        reverse(begin + ahead, length - ahead, slot + 1, NO_SLOT, slot + 1, free - 1)  # the n − m steps after it
        reverse(begin, ahead, slot, slot, NO_SLOT, free)  # the first m steps

    reverse(0, num_steps, 0, NO_SLOT, 0, slots)
    # The actions before the first pullback are the forward pass.
    first = next(i for i, action in enumerate(actions) if action[3])
    stored = np.array([store for _, store, _, _ in actions[: first + 1]], np.int32)
    table = Actions(*(np.array(column, np.int32) for column in zip(*actions[first:], strict=True)))
    table.store[0] = NO_SLOT  # the forward pass has stored it
    return stored, table._replace(pull=table.pull.astype(bool))


def run_binomial(rule: Any, problem: Problem, slots: int) -> InnerState:
    """Takes all steps, and stores `slots` states for the backward pass.

    Args:
      rule: the derivative rule, for messages.
      problem: of which `num_steps` steps are taken.
      slots: states stored at a time, that of the start included.

    Returns:
      The final state, with the derivative of all steps.
    """
    stored, actions = make_actions(problem.num_steps, slots)

    def forward(at):
        return _run_forward(problem, stored, slots, at)

    def pull(at, perturbed, kept, cotangent):
        return _run_backward(problem, actions, at, perturbed, kept, cotangent)

    return Pullback(rule, forward, pull, once=False).run(problem)[0]


def _run_forward(problem, stored, slots, at):
    """The final state; and the residuals: the state before the last step, and the slots."""
    empty = jax.tree.map(lambda x: jnp.broadcast_to(x, (slots, *x.shape)), at.state)

    def body(carry, tx):
        (state, states), (slot, x) = carry, tx
        return (_take(problem, state, at, x), _store(states, slot, state)), None

    before, end = jax.tree.map(lambda x: x[:-1], at.xs), jax.tree.map(lambda x: x[-1], at.xs)
    xs, counts = (stored[:-1], before), (False, problem.counts)
    (last, states), _ = scan_slices(body, (at.state, empty), xs, counts, len(stored) - 1)
    states = _store(states, stored[-1], last)
    return _take(problem, last, at, end), (last, states)


def _run_backward(problem, actions, at, perturbed, kept, cotangent) -> list:
    """The cotangents of the perturbed leaves.

    With the cotangent a_{t+1} of the state after step t, each pullback computes

        a_t = (∂Φ_t/∂θ)ᵀ a_{t+1},      g += (∂Φ_t/∂h)ᵀ a_{t+1},      (∂Φ_t/∂x_t)ᵀ a_{t+1}.
    """
    last, slots = kept
    a, combine = partition(cotangent, jax.tree.map(is_inexact, last))  # a_T

    def take(state, x, a, sums):
        return _take(problem, state, at, x), a, sums, varying_zeros(partition(x, perturbed.xs)[0])

    def pull(state, x, a, sums):
        a, by_shared, by_data = pull_step(problem, at, perturbed, state, x, a)
        return state, a, [g + more for g, more in zip(sums, by_shared, strict=True)], by_data

    def body(carry, action):
        state, states, a, sums, by_xs = carry
        load, slot, t, is_pull = action
        state = jax.tree.map(lambda s, now: jnp.where(load == NO_SLOT, now, s[load]), states, state)
        states = _store(states, slot, state)
        x = step_slice(at.xs, problem.counts, t)
        state, a, sums, by_x = jax.lax.cond(is_pull, pull, take, state, x, a, sums)
        by_xs = [d.at[t].add(more) for d, more in zip(by_xs, by_x, strict=True)]
        return (state, states, a, sums, by_xs), None

    zeros = [varying_zeros(partition(*pair)[0]) for pair in ((at.inputs, perturbed.inputs), (at.xs, perturbed.xs))]
    (_, _, a, sums, by_xs), _ = jax.lax.scan(body, (last, slots, a, *zeros), actions)
    return [*partition(combine(a), perturbed.state)[0], *sums, *by_xs]


def _take(problem, state, at, x):
    """A step, computed as in the forward pass of its own derivative rules: in operations that have any derivative."""
    floats, combine = partition(state, jax.tree.map(is_inexact, state))

    def step(floats):
        after = problem.advance(combine(floats), at.inputs, x)
        return partition(after, jax.tree.map(is_inexact, after))[0], after

    _, _, after = jax.vjp(step, floats, has_aux=True)
    return after


def _store(slots, slot, state):
    # `NO_SLOT` becomes an index out of range, which is dropped.
    return jax.tree.map(lambda s, x: s.at[jnp.where(slot == NO_SLOT, len(s), slot)].set(x, mode="drop"), slots, state)
