r"""Hyperparameters in natural units, searched without constraints.

A transform is any object with `forward` (unconstrained to natural) and `inverse` (natural to unconstrained). The
transforms of this file guarantee that for every finite input the result of `forward` is finite, strictly inside the
domain, and accepted by `inverse`. To exclude overflow, underflow and rounding onto the boundary, `forward` clips the
unconstrained value, at integers, which every floating-point dtype represents exactly; beyond the clip the result is
constant and its derivative is zero.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.types import PyTree, Transform
from jaxhpo._core.validate import describe, is_array


class _Transform:
    """Checks that all transforms share. A subclass has `_forward`, `_inverse` and `_check_domain`."""

    _forward: Callable[[jax.Array], jax.Array]
    _inverse: Callable[[jax.Array], jax.Array]
    _check_domain: Callable[[np.ndarray], None]

    def forward(self, unconstrained) -> jax.Array:
        """Returns the natural values of an unconstrained floating-point array, in its shape and dtype."""
        return self._forward(self._floating(unconstrained, "forward"))

    def inverse(self, natural) -> jax.Array:
        """Returns the unconstrained values of a natural array; raises for concrete values outside the domain."""
        array = self._floating(natural, "inverse")
        if not isinstance(natural, Tracer) and getattr(natural, "is_fully_addressable", True):
            with np.errstate(all="ignore"):
                self._check_domain(np.asarray(natural).astype(array.dtype))
        return self._inverse(array)

    def _floating(self, x, direction):
        if not is_array(x) or not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise JaxhpoError(
                f"`{self}.{direction}` got {describe(x)}, but it takes one floating-point number or array. "
                "Write `1.0` for `1`, convert with `.astype(float)`, or map over a tree with `jax.tree.map`."
            )
        return jnp.asarray(x, jnp.result_type(x))  # not weakly typed: the next outer step must see the same dtype

    def _check(self, ok, values, needs, remedy, got="got"):
        if not np.all(ok):
            raise JaxhpoError(f"`{self}.inverse` {got} {float(values[~ok][0]):g}, but {needs}. {remedy}.")


def _exponents(dtype):
    """The integers between which exp(u) is a normal number of the dtype: (-87, 88) for float32."""
    info = jnp.finfo(dtype)
    return math.ceil(math.log(float(info.tiny))), math.floor(math.log(float(info.max)))


@dataclasses.dataclass(frozen=True)
class _Positive(_Transform):
    r"""Positive hyperparameters, searched in their logarithm.

    `forward` is :math:`h = e^u` and `inverse` is :math:`u = \log h`, so that dF/du = h dF/dh: a step in u is a relative
    step in h, which suits penalties and learning rates. u is clipped to the range of the dtype (float32: -87 to 88).

    Example:
      >>> jaxhpo.positive.inverse(jnp.float32(1.0))
      Array(0., dtype=float32)
    """

    def _forward(self, u):
        return jnp.exp(jnp.clip(u, *_exponents(u.dtype)))

    def _inverse(self, h):
        return jnp.log(h)

    def _check_domain(self, h):
        low, high = _exponents(h.dtype)
        u, rounding = np.log(h.astype(np.float64)), float(jnp.finfo(h.dtype).eps)
        needs = f"must be greater than 0 (in {h.dtype}: from {math.exp(low):.2g} to {math.exp(high):.2g})"
        remedy = "Start from a small positive value such as 1e-6; for others use `box(low, high)`, or None"
        self._check((u >= low - rounding) & (u <= high + rounding), h, needs, remedy)

    def __repr__(self):
        return "positive"


@dataclasses.dataclass(frozen=True, repr=False)
class box(_Transform):  # noqa: N801  (called, and printed, like a function)
    r"""Hyperparameters strictly between two bounds.

    `forward` is :math:`h = a + (b - a)\,\sigma(u)` with the logistic sigmoid, and `inverse` is
    :math:`u = \log(h - a) - \log(b - h)`, so that dF/du = (h - a)(b - h) / (b - a) dF/dh. u = 0 is the middle.
    Where the result would round onto a bound, it is the nearest number inside instead, and the derivative is zero.

    Args:
      low: lower bound a, a number, or a concrete array of the hyperparameter's shape.
      high: upper bound b, greater than `low` everywhere, in the same forms.

    Example:
      >>> jaxhpo.box(0.0, 0.9).forward(jnp.float32(0.0))
      Array(0.45, dtype=float32)
    """

    low: Any
    high: Any

    def __post_init__(self):
        try:
            real = all(is_array(bound) and np.isrealobj(bound) for bound in (self.low, self.high))
            low, high = np.asarray(self.low), np.asarray(self.high)
            ok = real and np.all(np.isfinite(low) & np.isfinite(high) & (low < high))
        except (TypeError, ValueError):  # not numbers, traced, or of two shapes
            ok = False
        if not ok:
            raise JaxhpoError(
                f"`{self}` is not valid: bounds are finite numbers, or concrete arrays of one shape, with low below "
                "high. Write the smaller bound first, as in `box(0.0, 0.9)`; for a lower bound alone, write `low + h` "
                "in the loss, with h under `positive`."
            )

    def _forward(self, u):
        low, high, least, greatest = self._bounds(u)
        u = jnp.clip(u, _exponents(u.dtype)[0], -_exponents(u.dtype)[0])
        # With σ(−u) = 1 − σ(u): a + (b − a) σ(u) = a σ(−u) + b σ(u). The right-hand side is accurate at both ends, even
        # where a bound is 0, as both sigmoids have a small relative error however small they are.
        return jnp.clip(low * jax.nn.sigmoid(-u) + high * jax.nn.sigmoid(u), least, greatest)

    def _inverse(self, h):
        low, high, _, _ = self._bounds(h)
        # (h − a) / (b − h) = σ(u) / σ(−u) = e^u
        return jnp.log(h - low) - jnp.log(high - h)

    def _check_domain(self, h):
        _, _, least, greatest = self._bounds(h)
        needs = f"must be strictly between {self.low} and {self.high} (after rounding to {h.dtype})"
        self._check((h >= least) & (h <= greatest), h, needs, "Start inside, or widen the box: `box(low, high)`")

    def _bounds(self, x):
        """The bounds in the dtype of `x`, and the outermost numbers strictly between them, as NumPy arrays."""
        with np.errstate(over="ignore", invalid="ignore"):
            low, high = (np.asarray(bound).astype(x.dtype) for bound in (self.low, self.high))
            finite = np.isfinite(high - low)
        # Next to zero, the nearest number inside is the least normal one: devices may flush subnormals to zero.
        tiny = np.asarray(jnp.finfo(x.dtype).tiny, x.dtype)
        least = np.where(low == 0, tiny, np.nextafter(low, high))
        greatest = np.where(high == 0, -tiny, np.nextafter(high, low))
        if finite.shape not in ((), x.shape) or not np.all(finite & (least < greatest)):
            raise JaxhpoError(
                f"`{self}` does not fit a hyperparameter of type {x.dtype}{list(x.shape)}: it needs the shape of the "
                "bounds, and a dtype that holds them, their difference and two numbers between. Change the bounds, or "
                "use a wider dtype."
            )
        return low, high, least, greatest

    def __repr__(self):
        return f"box({self.low!r}, {self.high!r})"


class _UnitInterval(box):
    r"""Hyperparameters strictly between 0 and 1, searched in their logit.

    `forward` is the logistic sigmoid :math:`h = 1 / (1 + e^{-u})` and `inverse` is :math:`u = \log h - \log(1 - h)`, so
    that dF/du = h (1 - h) dF/dh. It suits momenta, dropout rates and mixing weights.

    Example:
      >>> jaxhpo.unit_interval.forward(jnp.float32(0.0))
      Array(0.5, dtype=float32)
    """

    def __repr__(self):
        return "unit_interval"


@dataclasses.dataclass(frozen=True)
class _Simplex(_Transform):
    r"""Rows of positive hyperparameters that sum to one, searched in their logits.

    `forward` is the softmax over the last axis, :math:`h_i = e^{u_i} / \sum_j e^{u_j}`, and `inverse` is
    :math:`u_i = \log h_i - \frac1n \sum_j \log h_j`, the logits of mean zero. Adding a constant to a row of u changes
    nothing, so the search has one idle direction per row. It suits mixing weights.

    Example:
      >>> jaxhpo.simplex.forward(jnp.zeros(4, jnp.float32))
      Array([0.25, 0.25, 0.25, 0.25], dtype=float32)
    """

    def _forward(self, u):
        # h_i ≥ e^(floor) / n with floor = log(tiny) + log(n), so every share is a normal number.
        floor = _exponents(u.dtype)[0] + math.ceil(math.log(u.shape[-1]))
        return jax.nn.softmax(jnp.maximum(u - jnp.max(u, axis=-1, keepdims=True), floor), axis=-1)

    def _inverse(self, h):
        return jnp.log(h) - jnp.mean(jnp.log(h), axis=-1, keepdims=True)

    def _floating(self, x, direction):
        x = super()._floating(x, direction)
        if x.ndim == 0 or x.shape[-1] == 0:
            raise JaxhpoError(
                f"`{self}.{direction}` got shape {x.shape}, but a row of shares lies along the last axis: give the "
                "shape (..., number of shares); for a single share use `unit_interval`."
            )
        return x

    def _check_domain(self, h):
        self._check(h > 0, h, "shares must be greater than 0", "Start from a small positive share such as 1e-6")
        sums, tolerance = h.astype(np.float64).sum(axis=-1), float(jnp.finfo(h.dtype).eps) ** 0.5
        remedy = "Divide by the sum: `h / h.sum(-1, keepdims=True)`"
        self._check(abs(sums - 1) <= tolerance, sums, "each row (last axis) must sum to 1", remedy, "got a sum of")

    def __repr__(self):
        return "simplex"


positive, unit_interval, simplex = _Positive(), _UnitInterval(0.0, 1.0), _Simplex()


def to_natural(transforms: PyTree, unconstrained: PyTree) -> PyTree:
    """Applies the `forward` of every transform of a prefix tree to the leaves below it. None is the identity."""
    return apply_transforms(lambda transform, leaf: transform.forward(leaf), transforms, unconstrained)


def to_unconstrained(transforms: PyTree, hparams: PyTree) -> PyTree:
    """Inverse of `to_natural`: applies the `inverse` of every transform."""
    return apply_transforms(lambda transform, leaf: transform.inverse(leaf), transforms, hparams)


def apply_transforms(fn: Callable[[Any, Any], Any], transforms: PyTree, tree: PyTree, path: str = "") -> PyTree:
    """Returns `fn(transform, leaf)` in place of each leaf that has a transform; leaves others unchanged."""
    if transforms is None:
        return tree
    if isinstance(transforms, Transform) and not isinstance(transforms, type):  # not `box` for `box(low, high)`
        return tree_map_with_path(lambda below, leaf: _apply_one(fn, transforms, leaf, path + keystr(below)), tree)
    wanted, given = _children(transforms), _children(tree)
    if "" in wanted or wanted.keys() != given.keys():  # "" is a leaf
        has = ", ".join(f"`{key}`" for key in given if key) or "no parts"
        raise JaxhpoError(
            f"`transforms{path}` is {transforms!r}, but `hparams{path}` has {has}. Write a transform (`positive`, "
            "`unit_interval`, `box(low, high)`, `simplex`, any object with `forward` and `inverse`) or None, for all "
            "of it or for each of its parts under its own name."
        )
    parts = [apply_transforms(fn, wanted[key], child, path + key) for key, child in given.items()]
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=lambda x: x is not tree), parts)


def _apply_one(fn, transform, leaf, path):
    try:
        return fn(transform, leaf)
    except JaxhpoError as error:
        raise JaxhpoError(f"`hparams{path}`: {error}") from None


def _children(tree):
    """The children of a pytree node, one level down, by their printed key: `['l2']`, `.lr`, `[0]`; "" for a leaf."""
    return {keystr(key): child for key, child in tree_leaves_with_path(tree, is_leaf=lambda x: x is not tree)}
