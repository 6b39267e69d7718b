"""Remedies for hypergradients that explode, vanish or are noisy, and projections."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.transforms import apply_transforms, positive
from jaxhpo._core.tree import named_leaves, norm, scaled, upcast
from jaxhpo._core.types import PyTree
from jaxhpo._core.validate import check_callable, check_residual, check_settings


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
        maybe = "positive or None"
        check_settings(self, accumulate="count", clip=maybe, clip_norm=maybe, shrink=maybe, shrink_below="positive")
        if self.shrink is not None and self.shrink >= 1:
            raise JaxhpoError(
                f"`Remedies(shrink={self.shrink!r})` would not shrink anything: write a factor below 1, as 0.8."
            )

    def check(self, transforms: PyTree, point: PyTree) -> None:
        """Raises where `shrink` has no hyperparameter to act on."""
        if self.shrink is not None and not any(has_transform(transforms, point, positive)):
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
        counts["clipped_entries"] = sum(over, none)
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
    marks = has_transform(transforms, point, positive)
    for u, g, is_positive in zip(leaves, jax.tree.leaves(grad), marks, strict=True):
        if is_positive:  # h = exp(u), so that u + log s means s h
            vanished = norm(upcast(g)) < remedies.shrink_below
            u = u + jnp.where(vanished, math.log(remedies.shrink), 0.0).astype(u.dtype)  # noqa: PLW2901
            count += vanished.astype(jnp.int32)
        moved.append(u)
    return jax.tree.unflatten(structure, moved), count


def has_transform(transforms: PyTree, point: PyTree, which: Any = None) -> list[bool]:
    """Returns for each leaf whether it has a transform, or the one that is asked for."""
    none = jax.tree.map(lambda x: False, point)
    return jax.tree.leaves(apply_transforms(lambda found, _: which is None or found is which, transforms, none))


def projected(projections: PyTree, point: PyTree) -> tuple[PyTree, jax.Array]:
    """Returns the point with the projected parts on their sets, and the number of entries that this moved."""
    count = jnp.zeros((), jnp.int32)
    if projections is None:
        return point, count
    parts = _project(lambda f, part: f(part), projections, point)
    moved = jax.tree.map(lambda a, b: jnp.sum(a != b, dtype=jnp.int32), parts, point)
    return parts, sum(jax.tree.leaves(moved), count)


def check_projections(projections: PyTree, transforms: PyTree, point: PyTree) -> None:
    """Raises unless each projection is a function of a part of the hyperparameters that holds the start."""
    if projections is None:
        return
    for function in jax.tree.leaves(projections, is_leaf=callable):
        check_callable("projections", function, "projection(hparams)", 1)
    try:
        none = jax.tree.map(lambda x: False, point)
        has_projection = _project(lambda f, part: jax.tree.map(lambda x: True, part), projections, none)
    except (ValueError, TypeError) as error:
        raise JaxhpoError(
            f"`projections` got {projections!r}, which does not fit `hparams` ({str(error).splitlines()[0]}): write a "
            "function as `optax.projections.projection_non_negative`, or None, for all of it or each part by its name."
        ) from error
    after = _project(lambda f, part: check_residual(f(part), part, "projections", "hparams"), projections, point)
    leaves = (jax.tree.leaves(tree) for tree in (has_projection, has_transform(transforms, point), after))
    for (name, start), projection, transform, end in zip(named_leaves(point, "hparams"), *leaves, strict=True):
        if projection and transform:
            raise JaxhpoError(
                f"`{name}` has a transform and a projection, but a projection acts in natural units: keep one of them."
            )
        if not isinstance(end, Tracer) and not jnp.allclose(end, start, rtol=1e-5, atol=1e-6):
            raise JaxhpoError(
                f"`{name}` starts outside the set of its projection, which would move it to {end}: start there."
            )


def _project(function, projections, tree):
    """Returns `function(projection, part)` in place of each part that has a projection."""
    is_projection = lambda x: x is None or callable(x)  # noqa: E731
    return jax.tree.map(lambda f, x: x if f is None else function(f, x), projections, tree, is_leaf=is_projection)
