"""The compiled step of one run, or of a population of runs under one `vmap`."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.processes import exchange, whole
from jaxhpo._core.record import traced_anew
from jaxhpo._core.trace import hoisted
from jaxhpo._core.tree import named_leaves
from jaxhpo._core.types import PyTree
from jaxhpo._core.validate import check_arrays, check_hparams, check_key, describe
from jaxhpo._tune.step import OuterReport, OuterState, Step, with_constants


class Compiled:
    """The compiled step.

    Attributes:
      step: the step of one member.
      size: number of members; None for a run without a population.
      shape: of what the step reports of each member: `()` or `(size,)`.
    """

    def __init__(self, step: Step, size: int | None):
        self.step, self.size = step, size
        self.shape = () if size is None else (size,)
        self._over: Any = jax.vmap if self.shape else lambda fn: fn
        self._kinds: list[Any] = []  # of arrays with which the last step was taken, by several processes
        self.renew()
        self.hparams = jax.jit(self._over(step.hparams))
        self._where = jax.jit(jax.vmap(lambda mask, *trees: jax.tree.map(lambda *x: jnp.where(mask, *x), *trees)))

    def renew(self) -> None:
        """Forgets the programs that were traced, as the step takes other rules."""
        self._advance: Any = self._over(lambda state: self.step.advance(state))  # another function to JAX's caches
        self._programs: dict[Any, Any] = {}  # by the state's types, of which a carry may change its own

    def init(self, hparams: PyTree, carry: PyTree, key: jax.Array | None) -> OuterState:
        """Returns the first state; in a population each leaf has a leading axis of members."""
        if self.size is None:
            return self.step.init(hparams, carry, key)
        hparams, carry = check_hparams(hparams), jax.tree.map(jnp.asarray, check_arrays(carry, "carry"))
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
        program, consts = self._program(state)
        if jax.process_count() > 1:
            kinds = [(jax.typeof(x), getattr(x, "sharding", None)) for x in jax.tree.leaves(state)]
            if kinds != self._kinds:  # a process that cannot trace or compile it must not leave the others in it
                program.trace(*consts, state).lower().compile()
                exchange()
                self._kinds = kinds
        after, report = program(*consts, state)
        return with_constants(after, state), report

    def trace(self, state: OuterState) -> tuple[Any, tuple]:
        """Returns the trace of the step, of a step that was taken the same, and the arguments before the state."""
        program, consts = self._program(state)
        return program.trace(*consts, state), consts

    def _program(self, state):
        types = jax.tree.structure(state), *map(jax.typeof, jax.tree.leaves(state))
        if types not in self._programs:
            program, (*consts, _) = hoisted(self._advance, state)
            self._programs[types] = program, consts
        return self._programs[types]

    def select(self, mask: np.ndarray, new: PyTree, old: PyTree) -> PyTree:
        """Returns the members of `new` where the mask is True, those of `old` elsewhere."""
        if mask.all() or not mask.any():
            return new if mask.all() else old
        return self._where(mask, new, old)

    def shapes(self, state: OuterState, placed: bool = False) -> tuple[OuterState, OuterReport, tuple[Any, tuple]]:
        """Returns the shapes of what `update` returns, and the `trace`; counts inner steps, suppresses warnings.

        With `placed` also shardings, which only the compiler knows.
        """
        with warnings.catch_warnings(action="ignore"), traced_anew():
            program, (*consts, _) = hoisted(self._advance, state)
            traced = program.trace(*consts, state)
            after, report = traced.out_info
            if placed:
                places = traced.lower().compile().output_shardings
                struct = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
                after, report = jax.tree.map(struct, (after, report), places)
        # The key itself: a shape does not say of which kind it is.
        return with_constants(after, state), report, (traced, tuple(consts))


def fetched(report: OuterReport) -> OuterReport:
    """Returns the report with its numbers in NumPy; hyperparameters, hypergradient and info stay where they are."""
    left = {name: getattr(report, name) for name in ("hparams", "hypergradient", "info")}
    return whole(report._replace(**dict.fromkeys(left)))._replace(**left)


def member(tree: PyTree, index: int) -> PyTree:
    """Returns one member of a population."""
    return jax.tree.map(lambda x: x[index], tree)
