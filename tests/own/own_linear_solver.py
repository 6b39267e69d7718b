"""A linear solver of a user's: Richardson iteration."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from jaxhpo import LinearInfo, LinearSolver, LinearStatus


@dataclasses.dataclass(frozen=True)
class Richardson(LinearSolver):
    """x ← x + (b − A x) / curvature, `schedule` times; the other fields have names that once were looked for."""

    curvature: float
    schedule: int
    thins: bool = True
    pair: tuple[str, str] = ("a", "b")
    run: str = "no rule"
    needs_symmetry: ClassVar[bool] = True

    def __call__(self, matvec: Callable, b: Any, x0: Any = None) -> tuple[Any, LinearInfo]:
        def residual(x):
            return jax.tree.map(jnp.subtract, b, matvec(x))

        def body(x, _):
            return jax.tree.map(lambda x, r: x + r / self.curvature, x, residual(x)), None

        x, _ = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, b) if x0 is None else x0, length=self.schedule)
        error = jnp.asarray(optax.tree.norm(residual(x))) / optax.tree.norm(b)
        status = jnp.where(error < 1e-3, LinearStatus.CONVERGED, LinearStatus.MAX_ITERATIONS)
        return x, LinearInfo(error, jnp.asarray(self.schedule), status)
