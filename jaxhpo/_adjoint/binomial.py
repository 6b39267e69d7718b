"""Binomial checkpointing: a fixed number of states, from which the others are redone as seldom as can be.

Reversing n steps from one stored state, with s slots in all (that state's own included), splits them at m: go m steps
ahead and store, reverse the n − m steps beyond with s − 1 slots, and then the first m with s. Of n ≤ β(s, r) =
C(s + r, s) steps none need be taken more than r times, and any split with β(s, r−2) ≤ m ≤ β(s, r−1) and β(s−1, r−1) ≤
n − m ≤ β(s−1, r) takes the fewest in all (Griewank & Walther 2000, Algorithm 799: revolve). The order of things depends
on the number of steps alone, so it is a table made while tracing, and one scan runs through it: compilation takes as
long for any number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo._core.mesh import cast_varying, varying_axes
from jaxhpo._core.tree import is_inexact, partition
from jaxhpo._core.types import InnerState, PyTree

KEEP = -1  # no slot: stay with the state in hand, or store nothing


class Actions(NamedTuple):
    """What the scan of the backward pass does, one entry an iteration.

    Attributes:
      load: the slot whose state to take up first, or `KEEP`.
      store: the slot to put that state into, or `KEEP`.
      step: the inner step t at which the state stands.
      pull: whether to pull the cotangent back through step t, or to take it.
    """

    load: np.ndarray
    store: np.ndarray
    step: np.ndarray
    pull: np.ndarray


def least_slots(num_steps: int, repeats: int) -> int:
    """The fewest states with which no step need be taken more than `repeats` times: C(s + r, r) ≥ T."""
    slots = 1
    while math.comb(slots + repeats, repeats) < num_steps:
        slots += 1
    return slots


def count_redone(num_steps: int, slots: int) -> int:
    """Steps that the backward pass takes forward again: r T − C(s + r, r − 1), less those of the first sweep."""
    repeats = 0
    while math.comb(slots + repeats, repeats) < num_steps:
        repeats += 1
    sweep = num_steps - 1
    return repeats * num_steps - math.comb(slots + repeats, repeats - 1) - sweep if repeats else 0


def split(num_steps: int, slots: int) -> int:
    """How far ahead to store the next state."""
    repeats = 0
    while math.comb(slots + repeats, slots) < num_steps:
        repeats += 1
    least = math.comb(slots + repeats - 2, slots) if repeats > 1 else 1
    return max(least, num_steps - math.comb(slots - 1 + repeats, slots - 1))


def make_actions(num_steps: int, slots: int) -> tuple[np.ndarray, Actions]:
    """The slot into which each state is stored on the way forward (or `KEEP`), and what the way back does."""
    actions: list[tuple[int, int, int, bool]] = []

    def reverse(begin, length, slot, load, store, free):
        # The state at `begin` is in hand, or in `slot` where `load` says so; it is stored there if `store` says so.
        if length == 1:
            actions.append((load, store, begin, True))
            return
        if free == 1:
            for step in range(begin + length - 1, begin - 1, -1):
                for at in range(begin, step + 1):
                    actions.append((load if at == begin else KEEP, store if at == begin else KEEP, at, at == step))
                load, store = slot, KEEP
            return
        ahead = split(length, free)
        actions.append((load, store, begin, False))
        actions.extend((KEEP, KEEP, at, False) for at in range(begin + 1, begin + ahead))
        reverse(begin + ahead, length - ahead, slot + 1, KEEP, slot + 1, free - 1)
        reverse(begin, ahead, slot, slot, KEEP, free)

    reverse(0, num_steps, 0, KEEP, 0, slots)
    first = next(i for i, action in enumerate(actions) if action[3])
    stored = np.array([store for _, store, _, _ in actions[: first + 1]], np.int32)
    table = Actions(*(np.array(column, np.int32) for column in zip(*actions[first:], strict=True)))
    table.store[0] = KEEP  # the way forward has done so
    return stored, table._replace(pull=table.pull.astype(bool))


class Kept(NamedTuple):
    """What the forward pass hands over: the slots, and the state before the last step."""

    slots: InnerState
    last: InnerState


def run_forward(advance: Callable, state: InnerState, inputs: PyTree, xs: PyTree, slots: int) -> tuple[Any, Kept]:
    """All steps, and what is kept of them.

    Args:
      advance: `(state, inputs, x) -> state`.
      state: the initial state.
      inputs: what all steps depend on.
      xs: with a leading axis of T steps.
      slots: the number of states that are kept.
    """
    num_steps = jax.tree.leaves(xs)[0].shape[0]
    stored, _ = make_actions(num_steps, slots)
    empty = jax.tree.map(lambda x: jnp.broadcast_to(x, (slots, *x.shape)), state)

    def body(carry, tx):
        (state, kept), (slot, x) = carry, tx
        return (_taken(advance, state, inputs, x), _stored(kept, slot, state)), None

    before, end = jax.tree.map(lambda x: x[:-1], xs), jax.tree.map(lambda x: x[-1], xs)
    (last, kept), _ = jax.lax.scan(body, (state, empty), (stored[:-1], before))
    kept = _stored(kept, stored[-1], last)
    return _taken(advance, last, inputs, end), Kept(kept, last)


def run_backward(
    advance: Callable, kept: Kept, inputs: PyTree, xs: PyTree, perturbed: tuple[PyTree, PyTree], cotangent: list
) -> tuple[list, list, list]:
    """The cotangents of the initial state's floating-point leaves, of the moving inputs, and of the moving data.

    Args:
      advance: as for `run_forward`.
      kept: what that kept.
      inputs: as before.
      xs: as before.
      perturbed: for each leaf of `inputs` and of `xs`, whether its cotangent is wanted.
      cotangent: of the final state's floating-point leaves.
    """
    num_steps, slots = (jax.tree.leaves(tree)[0].shape[0] for tree in (xs, kept.slots))
    _, actions = make_actions(num_steps, slots)
    shared, combine_shared = partition(inputs, perturbed[0])
    floats = jax.tree.map(is_inexact, kept.last)

    def take(state, x, d_state, sums):
        return _taken(advance, state, inputs, x), d_state, sums, zeros_of_data(x)

    def pull(state, x, d_state, sums):
        data, combine_data = partition(x, perturbed[1])
        moved, combine = partition(state, floats)

        def step(moved, shared, data):
            return partition(advance(combine(moved), combine_shared(shared), combine_data(data)), floats)[0]

        _, pullback = jax.vjp(step, moved, shared, data)
        d_state, more, d_data = pullback(d_state)
        return state, d_state, [a + b for a, b in zip(sums, more, strict=True)], d_data

    def zeros_of_data(x):
        return _zeros(partition(x, perturbed[1])[0])

    def body(carry, action):
        state, kept_states, d_state, sums, d_data = carry
        load, slot, t, backwards = action
        state = jax.tree.map(lambda s, now: jnp.where(load == KEEP, now, s[load]), kept_states, state)
        kept_states = _stored(kept_states, slot, state)
        x = jax.tree.map(lambda x: x[t], xs)
        state, d_state, sums, d_x = jax.lax.cond(backwards, pull, take, state, x, d_state, sums)
        d_data = [d.at[t].add(more) for d, more in zip(d_data, d_x, strict=True)]
        return (state, kept_states, d_state, sums, d_data), None

    start = (kept.last, kept.slots, cotangent, _zeros(shared), _zeros(partition(xs, perturbed[1])[0]))
    (_, _, d_state, sums, d_data), _ = jax.lax.scan(body, start, actions)
    return d_state, sums, d_data


def _taken(advance, state, inputs, x):
    """A step as its own derivative rules compute it on their way forward: in operations that have any derivative."""
    floats, combine = partition(state, jax.tree.map(is_inexact, state))

    def step(floats):
        after = advance(combine(floats), inputs, x)
        return partition(after, jax.tree.map(is_inexact, after))[0], after

    _, _, after = jax.vjp(step, floats, has_aux=True)
    return after


def _stored(slots, slot, state):
    # Out of range where nothing is to be stored: dropped.
    return jax.tree.map(lambda s, x: s.at[jnp.where(slot == KEEP, len(s), slot)].set(x, mode="drop"), slots, state)


def _zeros(leaves):
    return [cast_varying(jnp.zeros_like(leaf), varying_axes(leaf)) for leaf in leaves]
