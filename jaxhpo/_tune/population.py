"""The compiled step of one run, or of a population of runs under one `vmap`."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.record import traced_anew
from jaxhpo._core.tree import named_leaves
from jaxhpo._core.types import PyTree
from jaxhpo._core.validate import check_arrays, check_key, check_params, describe
from jaxhpo._tune.step import OuterReport, OuterState, Step, with_constants


class Compiled:
    """The compiled step.

    Attributes:
      step: the step of one member.
      size: number of members; None for a run without a population.
      shape: of what the step reports of each member: `()` or `(size,)`.
      trace: `state -> traced step`; of a step that `update` has taken nothing is traced again.
    """

    def __init__(self, step: Step, size: int | None):
        self.step, self.size = step, size
        self.shape = () if size is None else (size,)
        self._over: Any = jax.vmap if self.shape else lambda fn: fn
        self._advance = jax.jit(self._over(step.advance))
        self.trace = self._advance.trace
        self.hparams = jax.jit(self._over(step.hparams))
        self._where = jax.jit(jax.vmap(lambda mask, *trees: jax.tree.map(lambda *x: jnp.where(mask, *x), *trees)))

    def init(self, hparams: PyTree, carry: PyTree, key: jax.Array | None) -> OuterState:
        """Returns the first state; in a population each leaf has a leading axis of members."""
        if self.size is None:
            return self.step.init(hparams, carry, key)
        hparams, carry = check_params(hparams, "hparams"), jax.tree.map(jnp.asarray, check_arrays(carry, "carry"))
        for name, leaf in named_leaves(hparams, "hparams") + named_leaves(carry, "carry"):
            if leaf.shape[:1] != self.shape:
                raise JaxhpoError(
                    f"`{name}` is {describe(leaf)}, but `population={self.size}` needs a leading axis of {self.size}, "
                    "one entry per member: stack the members' values; for one value in all of them, write "
                    f"`jnp.broadcast_to(x, ({self.size}, *x.shape))`."
                )
        key = jax.random.key(0) if key is None else key
        keys = key if jnp.shape(key) == self.shape else jax.random.split(check_key(key), self.size)
        if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(hparams)):
            values = jax.tree.map(np.asarray, hparams)  # transforms check concrete values only
            for i in range(self.size):
                try:
                    self.step.checked_point(member(values, i))
                except JaxhpoError as error:
                    raise JaxhpoError(f"Member {i}: {error}") from None
        return jax.vmap(self.step.init)(hparams, carry, keys)

    def update(self, state: OuterState) -> tuple[OuterState, OuterReport]:
        """Takes an outer step of every member."""
        after, report = self._advance(state)
        return with_constants(after, state), report

    def select(self, mask: np.ndarray, new: PyTree, old: PyTree) -> PyTree:
        """Returns the members of `new` where the mask is True, those of `old` elsewhere."""
        if mask.all() or not mask.any():
            return new if mask.all() else old
        if jax.tree.structure(new) != jax.tree.structure(old):
            raise JaxhpoError(
                "`outer_loss` returned a carry of another structure than it was given, so that members cannot be held "
                "while others go on: give `tune` a `carry` of the structure that `outer_loss` returns."
            )
        return self._where(mask, new, old)

    def shapes(self, state: OuterState, placed: bool = False) -> tuple[OuterState, OuterReport, Any]:
        """Returns the shapes of what `update` returns, and the trace; counts inner steps, suppresses warnings.

        With `placed` also shardings, which only the compiler knows.
        """
        with warnings.catch_warnings(action="ignore"), traced_anew():
            traced = self.trace(state)
            after, report = traced.out_info
            if placed:
                places = traced.lower().compile().output_shardings
                struct = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
                after, report = jax.tree.map(struct, (after, report), places)
        return with_constants(after, state), report, traced  # the key itself: a shape does not say of which kind


def member(tree: PyTree, index: int) -> PyTree:
    """Returns one member of a population."""
    return jax.tree.map(lambda x: x[index], tree)
