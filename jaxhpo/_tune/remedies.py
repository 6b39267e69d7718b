"""Remedies for hypergradients that explode, vanish or are noisy, and projections."""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.transforms import positive, to_natural
from jaxhpo._core.tree import names, norm, scaled, upcast
from jaxhpo._core.types import PyTree
from jaxhpo._core.validate import check_callable, check_count, check_positive, check_residual


@dataclasses.dataclass(frozen=True)
class Remedies:
    r"""Remedies for unstable hypergradients, for `tune(..., remedies=...)`. Each is off unless it is set.

    In the order in which they act, on the hypergradient g in the units of the search:

    1. `accumulate=A`: g is the mean over A outer losses, each with another key (another order of the minibatches, say),
       computed in sequence in constant memory; they start from the same carry, and the last one's is kept. `value` is
       their mean, and each leaf of `info` gets a leading axis of A.
    2. `clip=c`: each entry is clipped to [-c, c].
    3. `clip_norm=c`: g is scaled down to a Euclidean norm of c.
    4. `shrink=s`: a hyperparameter under `positive` whose clipped hypergradient has a norm below `shrink_below` is
       multiplied by s after the step. A penalty so large that the model has collapsed has a hypergradient of zero, and
       would stay there without this.

    `history["remedies"]` counts, for each step, the entries that were clipped, whether the norm was, and the leaves
    that were shrunk (and the entries that a projection moved).

    **Cost and bias**: `accumulate` costs A hypergradients a step, and divides the variance by A; clipped entries are
    biased towards zero, a clipped norm keeps the direction of a single hypergradient.

    Args:
      accumulate: A.
      clip: c; None does not clip entries.
      clip_norm: c; None does not clip the norm.
      shrink: a factor in (0, 1); None does not shrink.
      shrink_below: Euclidean norm over a leaf. The default detects an exact collapse. In float32 rounding noise may
        remain, up to 5e-6 for embeddings of Nations, where 1e-4 recovers ten collapsed searches of ten, the default
        none; but a threshold above the norm at an optimum drives the search away from the optimum.

    Raises:
      JaxhpoError: a setting out of its range.

    Example:
      >>> remedies = jaxhpo.Remedies(clip=0.5, shrink=0.8)

    References:
      Pascanu, Mikolov, Bengio. On the difficulty of training recurrent neural networks. 2013. arXiv:1211.5063
    """

    accumulate: int = 1
    clip: float | None = None
    clip_norm: float | None = None
    shrink: float | None = None
    shrink_below: float = 1e-10

    def __post_init__(self):
        check_count("Remedies(accumulate=...)", self.accumulate)
        for name in ("clip", "clip_norm", "shrink"):
            if getattr(self, name) is not None:
                check_positive(f"Remedies({name}=...)", getattr(self, name))
        check_positive("Remedies(shrink_below=...)", self.shrink_below)
        if self.shrink is not None and self.shrink >= 1:
            raise JaxhpoError(
                f"`Remedies(shrink={self.shrink!r})` would not shrink anything: write a factor below 1, as 0.8."
            )

    def check(self, transforms: PyTree, point: PyTree) -> None:
        """Raises where `shrink` has no hyperparameter to act on."""
        if self.shrink is not None and not any(under_positive(transforms, point)):
            raise JaxhpoError(
                f"{self!r} shrinks hyperparameters under `positive`, and no leaf of `hparams` is: write "
                "`transforms=positive`, or a tree of transforms with `positive` for the penalties."
            )


NO_REMEDIES = Remedies()


def clipped(remedies: Remedies, grad: PyTree) -> tuple[PyTree, dict[str, jax.Array]]:
    """Returns the hypergradient within its bounds, and counts of the changes."""
    none = jnp.zeros((), jnp.int32)
    counts = {"clipped_entries": none, "clipped_norms": none}
    if remedies.clip is not None:
        c = remedies.clip
        over = [jnp.sum(jnp.abs(g) > c, dtype=jnp.int32) for g in jax.tree.leaves(grad)]
        counts["clipped_entries"] = jnp.sum(jnp.stack(over), dtype=jnp.int32)
        grad = jax.tree.map(lambda g: jnp.clip(g, -c, c), grad)
    if remedies.clip_norm is not None:
        length = norm(upcast(grad))
        over = length > remedies.clip_norm
        counts["clipped_norms"] = over.astype(jnp.int32)
        grad = scaled(jnp.where(over, remedies.clip_norm / length, 1.0), grad)
    return grad, counts


def shrunk(remedies: Remedies, transforms: PyTree, grad: PyTree, point: PyTree) -> tuple[PyTree, jax.Array]:
    """Returns the point with positive leaves of vanishing hypergradient multiplied by a factor, and their number."""
    count = jnp.zeros((), jnp.int32)
    if remedies.shrink is None:
        return point, count
    leaves, structure = jax.tree.flatten(point)
    moved = []
    for u, g, is_positive in zip(leaves, jax.tree.leaves(grad), under_positive(transforms, point), strict=True):
        if is_positive:  # h = exp(u), so that u + log s means s h
            vanished = norm(upcast(g)) < remedies.shrink_below
            u = u + jnp.where(vanished, math.log(remedies.shrink), 0.0).astype(u.dtype)  # noqa: PLW2901
            count += vanished.astype(jnp.int32)
        moved.append(u)
    return jax.tree.unflatten(structure, moved), count


def under_positive(transforms: PyTree, point: PyTree) -> list[bool]:
    """Returns for each leaf whether its transform is `positive`."""
    return jax.tree.leaves(_marked(transforms, point, lambda transform: transform is positive))


def _marked(transforms, point, test):
    """Returns for each leaf `test` of its transform; False where it has none."""

    # `to_natural` finds the transform of each leaf: it applies transforms whose value is the mark.
    def marker(transform):
        mark = lambda leaf: test(transform)  # noqa: E731
        return types.SimpleNamespace(forward=mark, inverse=mark)

    marks = jax.tree.map(marker, transforms)
    return to_natural(marks, jax.tree.map(lambda x: False, point))


def projected(projections: PyTree, point: PyTree) -> tuple[PyTree, jax.Array]:
    """Returns the point with the projected parts on their sets, and the number of entries that this moved."""
    count = jnp.zeros((), jnp.int32)
    if projections is None:
        return point, count
    parts = jax.tree.map(lambda f, part: part if f is None else f(part), projections, point, is_leaf=_is_projection)
    moved = jax.tree.map(lambda a, b: jnp.sum(a != b, dtype=jnp.int32), parts, point)
    return parts, jnp.sum(jnp.stack(jax.tree.leaves(moved)), dtype=jnp.int32)


def check_projections(projections: PyTree, transforms: PyTree, point: PyTree) -> None:
    """Raises unless each projection is a function of a part of the hyperparameters that holds the start."""
    if projections is None:
        return
    functions = jax.tree.map(
        lambda f: (lambda part: part) if f is None else f, projections, is_leaf=lambda x: x is None
    )
    for function in jax.tree.leaves(functions):
        check_callable("projections", function, "projection(hparams)", 1)
    marks = _marked(transforms, point, lambda transform: True)
    try:
        both = jax.tree.map(
            lambda f, part: jax.tree.map(lambda m: f is not None and m, part),
            projections,
            marks,
            is_leaf=_is_projection,
        )
    except (ValueError, TypeError) as error:
        raise JaxhpoError(
            f"`projections` got {projections!r}, which does not fit `hparams`: write a function such as "
            f"`optax.projections.projection_non_negative` or None, for all of it or for each part under its own name "
            f"({str(error).splitlines()[0]})."
        ) from error
    after = jax.tree.map(lambda f, part: check_residual(f(part), part, "projections", "hparams"), functions, point)
    leaves = (jax.tree.leaves(tree) for tree in (both, after, point))
    for name, clash, a, b in zip(names(point, "hparams"), *leaves, strict=True):
        if clash:
            raise JaxhpoError(
                f"`{name}` has a transform and a projection, but a projection acts in natural units: keep one of them."
            )
        if not isinstance(a, Tracer) and not jnp.allclose(a, b, rtol=1e-5, atol=1e-6):
            raise JaxhpoError(
                f"`{name}` starts outside the set of its projection, which would move it to {a}: start there."
            )


def _is_projection(x: Any) -> bool:
    return x is None or callable(x)
