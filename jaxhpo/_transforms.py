r"""Hyperparameters in natural units, searched without constraints.

A transform is any object with `forward` (unconstrained to natural) and `inverse` (natural to unconstrained). Those here
keep to one rule: what `forward` returns is always strictly inside the domain, finite, and accepted by `inverse`, for
every finite input. Overflow, underflow and rounding onto the boundary are ruled out by clipping in the unconstrained
space, at bounds that every floating-point type holds exactly (small integers).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxhpo._errors import JaxhpoError
from jaxhpo._types import PyTree


class _Transform:
    """The shared outside: leaf by leaf, with checks. A subclass gives `_forward`, `_inverse` and `_check`."""

    def forward(self, unconstrained: PyTree) -> PyTree:
        """Maps unconstrained values to natural ones, for an array or each array of a pytree.

        Args:
          unconstrained: floating-point array or pytree of such.

        Returns:
          Natural values of the same shapes and dtypes.

        Raises:
          JaxhpoError: a leaf is not a floating-point array.
        """
        return jax.tree_util.tree_map_with_path(
            lambda path, x: self._forward(_floating(x, f"{self}.forward", path)), unconstrained
        )

    def inverse(self, natural: PyTree) -> PyTree:
        """Maps natural values to unconstrained ones, for an array or each array of a pytree.

        Args:
          natural: floating-point array or pytree of such, inside the domain. Concrete values are checked; traced ones
            cannot be, and give NaN or infinity outside it.

        Returns:
          Unconstrained values of the same shapes and dtypes.

        Raises:
          JaxhpoError: a leaf is not a floating-point array, or a concrete value is outside the domain.
        """
        return jax.tree_util.tree_map_with_path(self._checked_inverse, natural)

    def _checked_inverse(self, path, x):
        array = _floating(x, f"{self}.inverse", path)
        if not isinstance(x, Tracer) and getattr(x, "is_fully_addressable", True):
            with np.errstate(over="ignore", under="ignore"):
                values = np.asarray(x).astype(array.dtype)
            self._check(values, f"`{self}.inverse`{_at(path)}")
        return self._inverse(array)

    def _forward(self, u: jax.Array) -> jax.Array:
        raise NotImplementedError

    def _inverse(self, h: jax.Array) -> jax.Array:
        raise NotImplementedError

    def _check(self, values: np.ndarray, where: str) -> None:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class _Positive(_Transform):
    r"""Positive hyperparameters, searched in their logarithm.

    `forward` is :math:`h = e^u` and `inverse` is :math:`u = \log h`, so that dF/du = h dF/dh: a step in u is a relative
    step in h, which suits penalties and learning rates.

    The exponent is clipped to what the dtype holds (float32 and bfloat16: -87 to 88; float64: -708 to 709), so value
    and derivative are finite for every finite u; beyond the clip the value stays and the derivative is zero.

    `forward(unconstrained)` and `inverse(natural)` take an array or a pytree of arrays and keep shapes and dtypes.
    `inverse` raises `JaxhpoError` for concrete values that are not positive and finite.

    Example:
      >>> jaxhpo.positive.forward(jaxhpo.positive.inverse({"l2": jnp.float32(0.5)}))
      {'l2': Array(0.5, dtype=float32)}
    """

    def _forward(self, u):
        return jnp.exp(jnp.clip(u, *_exponents(u.dtype)))

    def _inverse(self, h):
        return jnp.log(h)

    def _check(self, values, where):
        low, high = (math.exp(e) for e in _exponents(values.dtype))
        wide = values.astype(np.float64)
        # An ulp of slack: forward's clip returns the rounded end points themselves.
        slack = 1 + 4 * float(jnp.finfo(values.dtype).eps)
        _require(
            (wide >= low / slack) & (wide <= high * slack),
            wide,
            f"{where} needs values greater than 0 (in {values.dtype}: from {low:.2g} to {high:.2g})",
            "as it takes their logarithm",
            "Start from a small positive value such as 1e-6; for a value that may be zero or negative use "
            "`box(low, high)`, or no transform (None)",
        )

    def __repr__(self):
        return "positive"


@dataclasses.dataclass(frozen=True)
class _UnitInterval(_Transform):
    r"""Hyperparameters strictly between 0 and 1, searched in their logit.

    `forward` is the logistic sigmoid :math:`h = 1 / (1 + e^{-u})` and `inverse` is :math:`u = \log h - \log(1 - h)`, so
    that dF/du = h (1 - h) dF/dh. It suits momenta, dropout rates and mixing weights.

    The logit is clipped so that h is neither 0 nor 1 after rounding (float32: -87 to 16; float64: -708 to 36; bfloat16:
    -87 to 5); beyond the clip the value stays and the derivative is zero.

    `forward(unconstrained)` and `inverse(natural)` take an array or a pytree of arrays and keep shapes and dtypes.
    `inverse` raises `JaxhpoError` for concrete values that are not strictly between 0 and 1.

    Example:
      >>> jaxhpo.unit_interval.forward({"momentum": jnp.float32(0.0)})
      {'momentum': Array(0.5, dtype=float32)}
    """

    def _forward(self, u):
        # The largest number below 1 is 1 - eps/2, and 1 - σ(u) ≈ exp(-u).
        greatest = math.floor(math.log(2 / float(jnp.finfo(u.dtype).eps)))
        return jax.nn.sigmoid(jnp.clip(u, _exponents(u.dtype)[0], greatest))

    def _inverse(self, h):
        return jnp.log(h) - jnp.log1p(-h)

    def _check(self, values, where):
        tiny = jnp.finfo(values.dtype).tiny
        _require(
            (values >= tiny) & (values < 1),
            values,
            f"{where} needs values strictly between 0 and 1 (in {values.dtype}: at least {float(tiny):.2g})",
            "as 0 and 1 themselves lie infinitely far away in the unconstrained space",
            "Start inside, say from 0.001 or 0.999; for other bounds use `box(low, high)`",
        )

    def __repr__(self):
        return "unit_interval"


@dataclasses.dataclass(frozen=True, repr=False)
class box(_Transform):  # noqa: N801  (reads, and prints, as the function that the user calls)
    r"""Hyperparameters strictly between two bounds.

    `forward` is :math:`h = a + (b - a)\,\sigma(u)` with the logistic sigmoid, and `inverse` is
    :math:`u = \log(h - a) - \log(b - h)`, so that dF/du = (h - a)(b - h) / (b - a) dF/dh. u = 0 is the middle.

    The result is kept strictly inside the bounds after rounding, too; where it would round onto one, the value stays at
    the nearest number inside and the derivative is zero.

    `forward(unconstrained)` and `inverse(natural)` take an array or a pytree of arrays and keep shapes and dtypes.
    Boxes of numbers are equal and hash equal when their bounds are; boxes of arrays are compared by identity.

    Args:
      low: lower bound, a number or an array that broadcasts against each leaf without enlarging it.
      high: upper bound, greater than `low` everywhere; the same forms.

    Raises:
      JaxhpoError: a bound is not a finite real number or array of them, `low` is not below `high`, or (in `forward` and
        `inverse`) the leaf's dtype has no number between them, or a concrete value is not strictly inside.

    Example:
      >>> jaxhpo.box(0.0, 0.9)
      box(0.0, 0.9)
      >>> jaxhpo.box(0.0, 0.9).forward(jnp.float32(0.0))
      Array(0.45, dtype=float32)
    """

    low: Any
    high: Any

    def __post_init__(self):
        low, high = (_bound(value, name) for name, value in (("low", self.low), ("high", self.high)))
        if low is None or high is None:
            return
        if _broadcast(low.shape, high.shape) is None:
            raise JaxhpoError(
                f"`box`: low has shape {low.shape} and high has shape {high.shape}, which do not broadcast against "
                "each other. Give numbers, or arrays of the hyperparameter's shape."
            )
        if not np.all(low < high):
            raise JaxhpoError(
                f"`box({self.low!r}, {self.high!r})` holds no value, as low must be below high everywhere. "
                f"Write the smaller bound first: `box(low, high)`."
            )

    def _forward(self, u):
        low, high, least, greatest = self._bounds(u)
        limit = -_exponents(u.dtype)[0]
        u = jnp.clip(u, -limit, limit)
        # Not low + (high - low) σ(u): this form is accurate at both ends, even where a bound is 0.
        return jnp.clip(low * jax.nn.sigmoid(-u) + high * jax.nn.sigmoid(u), least, greatest)

    def _inverse(self, h):
        low, high, _, _ = self._bounds(h)
        return jnp.log(h - low) - jnp.log(high - h)

    def _check(self, values, where):
        _, _, least, greatest = self._bounds(values)
        if not isinstance(least, np.ndarray):
            return
        _require(
            (values >= least) & (values <= greatest),
            values,
            f"{where} needs values strictly between the bounds",
            "as the bounds themselves lie infinitely far away in the unconstrained space",
            "Start inside, or widen the box",
        )

    def _bounds(self, x):
        """The bounds in the dtype of `x`, and the outermost numbers strictly between them: NumPy unless traced."""
        traced = isinstance(self.low, Tracer) or isinstance(self.high, Tracer)
        xp, constant = (jnp, jax.lax.stop_gradient) if traced else (np, lambda bound: bound)
        with np.errstate(over="ignore"):
            low, high = xp.asarray(self.low).astype(x.dtype), xp.asarray(self.high).astype(x.dtype)
        if _broadcast(x.shape, low.shape, high.shape) != x.shape:
            raise JaxhpoError(
                f"`box`: bounds of shapes {low.shape} and {high.shape} do not broadcast against a hyperparameter of "
                f"shape {x.shape}. Give numbers, or arrays of the hyperparameter's shape."
            )
        low, high = (bound if bound.ndim == 0 else xp.broadcast_to(bound, x.shape) for bound in (low, high))
        with np.errstate(over="ignore"):
            width = high - low
        tiny = np.asarray(jnp.finfo(x.dtype).tiny, x.dtype)  # next to zero come subnormals, which devices may flush
        least = xp.where(low == 0, tiny, xp.nextafter(constant(low), constant(high)))
        greatest = xp.where(high == 0, -tiny, xp.nextafter(constant(high), constant(low)))
        if not traced and not (np.all(np.isfinite(width)) and np.all(least < greatest)):
            raise JaxhpoError(
                f"`{self}` does not fit a hyperparameter of type {x.dtype}, in which its bounds or their difference "
                "overflow, or no two numbers lie between them. Change the bounds, or use a wider type."
            )
        return low, high, least, greatest

    def __eq__(self, other):
        if not isinstance(other, box):
            return NotImplemented
        return self._key == other._key

    def __hash__(self):
        return hash(self._key)

    @property
    def _key(self):
        return tuple(x if _is_number(x) else ("array", id(x)) for x in (self.low, self.high))

    def __repr__(self):
        return f"box({self.low!r}, {self.high!r})"


@dataclasses.dataclass(frozen=True)
class _Simplex(_Transform):
    r"""Rows of positive hyperparameters that sum to one, searched in their logits.

    `forward` is the softmax over the last axis, :math:`h_i = e^{u_i} / \sum_j e^{u_j}`, and `inverse` is
    :math:`u_i = \log h_i - \frac1n \sum_j \log h_j`, the logits of mean zero. Shapes are preserved: adding a constant
    to a row of u changes nothing, so the search has one idle direction per row. It suits mixing weights.

    A logit is clipped where it lies so far below its row's largest that h would round to zero (float32: about 87).

    `forward(unconstrained)` and `inverse(natural)` take an array or a pytree of arrays, each with at least one axis,
    and keep shapes and dtypes. `inverse` raises `JaxhpoError` for concrete rows that are not positive or do not sum
    to one.

    Example:
      >>> jaxhpo.simplex.forward(jnp.zeros(4, jnp.float32))
      Array([0.25, 0.25, 0.25, 0.25], dtype=float32)
    """

    def _forward(self, u):
        self._check_shape(u.shape, f"`{self}.forward`")
        # h_i >= e^(floor) / n must not be subnormal.
        floor = _exponents(u.dtype)[0] + math.ceil(math.log(u.shape[-1]))
        below_largest = u - jnp.max(u, axis=-1, keepdims=True)
        return jax.nn.softmax(jnp.maximum(below_largest, floor), axis=-1)

    def _inverse(self, h):
        self._check_shape(h.shape, f"`{self}.inverse`")
        logits = jnp.log(h)
        return logits - jnp.mean(logits, axis=-1, keepdims=True)

    def _check(self, values, where):
        self._check_shape(values.shape, where)
        wide = values.astype(np.float64)
        _require(
            wide > 0,
            wide,
            f"{where} needs values greater than 0",
            "as it takes their logarithm",
            "Start from a small positive share such as 1e-6",
        )
        sums = wide.sum(axis=-1)
        _require(
            abs(sums - 1) <= float(jnp.finfo(values.dtype).eps) ** 0.5,
            sums,
            f"{where} needs rows (last axis) that sum to 1",
            "as only those lie on the simplex",
            "Divide by the sum: `h / h.sum(-1, keepdims=True)`",
            got="a sum of ",
        )

    def _check_shape(self, shape, where):
        if not shape or shape[-1] == 0:
            raise JaxhpoError(
                f"{where} got an array of shape {shape}, but shares are taken over the last axis, which must exist and "
                "not be empty. Give an array of shape (..., number of shares); for a single share use `unit_interval`."
            )

    def __repr__(self):
        return "simplex"


positive = _Positive()
unit_interval = _UnitInterval()
simplex = _Simplex()


# --- prefix trees of transforms -------------------------------------------------------------------------------------


def to_natural(transforms: PyTree, unconstrained: PyTree) -> PyTree:
    """Applies each transform's `forward` to its subtree.

    Args:
      transforms: a prefix tree of `unconstrained` whose leaves are transforms (objects with `forward` and `inverse`) or
        None, which leaves the subtree as it is.
      unconstrained: pytree of unconstrained values.

    Returns:
      The pytree in natural units.

    Raises:
      JaxhpoError: the prefix does not fit, or one of its leaves is neither None nor a transform; names the path.

    Example:
      >>> to_natural({"l2": positive, "w": None}, {"l2": jnp.zeros(2, jnp.float32), "w": 3.0})
      {'l2': Array([1., 1.], dtype=float32), 'w': 3.0}
    """
    return _apply("forward", transforms, unconstrained)


def to_unconstrained(transforms: PyTree, hparams: PyTree) -> PyTree:
    """Applies each transform's `inverse` to its subtree.

    Args:
      transforms: a prefix tree of `hparams` whose leaves are transforms (objects with `forward` and `inverse`) or None,
        which leaves the subtree as it is.
      hparams: pytree of values in natural units.

    Returns:
      The pytree of unconstrained values.

    Raises:
      JaxhpoError: the prefix does not fit, one of its leaves is neither None nor a transform, or a concrete value is
        outside its transform's domain; names the path.

    Example:
      >>> to_unconstrained(positive, {"l2": jnp.ones(2, jnp.float32)})
      {'l2': Array([0., 0.], dtype=float32)}
    """
    return _apply("inverse", transforms, hparams)


def _apply(direction, transforms, tree):
    pairs = _match(transforms, tree, ())
    return jax.tree.unflatten(jax.tree.structure(tree), [_apply_one(direction, *pair) for pair in pairs])


def _apply_one(direction, transform, path, leaf):
    if transform is None:
        return leaf
    try:
        return getattr(transform, direction)(leaf)
    except JaxhpoError as error:
        raise JaxhpoError(f"`hparams{jax.tree_util.keystr(path)}`: {error}") from None


def _match(transforms, tree, path):
    """Lists (transform or None, path, leaf) for every leaf of `tree`, in its order."""
    if transforms is None or _is_transform(transforms):
        return [(transforms, path + below, leaf) for below, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    wanted, given = _children(transforms), _children(tree)
    name = jax.tree_util.keystr(path)
    if wanted is None:
        raise JaxhpoError(
            f"`transforms{name}` is {transforms!r}, which is neither None nor a transform (an object with `forward` "
            "and `inverse`). Write `positive`, `unit_interval`, `box(low, high)`, `simplex`, or None to leave "
            f"`hparams{name}` as it is."
        )
    if given is None:
        raise JaxhpoError(
            f"`transforms{name}` has the parts {_listed(wanted)}, but `hparams{name}` is a single value. Give one "
            "transform, or None, for it."
        )
    if missing := given.keys() - wanted.keys():
        raise JaxhpoError(
            f"`transforms{name}` has no entry for {_listed(missing)} of `hparams{name}`, so it does not fit. Add a "
            "transform for it, or None to leave it as it is."
        )
    if extra := wanted.keys() - given.keys():
        raise JaxhpoError(
            f"`transforms{name}` has {_listed(extra)}, which `hparams{name}` has not (it has {_listed(given)}). Remove "
            "it, or correct its name."
        )
    return [row for key, (step, child) in given.items() for row in _match(wanted[key][1], child, path + step)]


def _children(tree):
    """The children of a pytree node, one level down, as {key in print: (path step, child)}; None for a leaf."""
    rows = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is not tree)
    if len(rows) == 1 and rows[0][0] == ():
        return None
    return {jax.tree_util.keystr(step): (step, child) for step, child in rows}


def _listed(keys):
    return ", ".join(f"`{key}`" for key in sorted(keys)) or "nothing"


def _is_transform(x):
    return callable(getattr(x, "forward", None)) and callable(getattr(x, "inverse", None))


# --- checks and bounds ----------------------------------------------------------------------------------------------


def _exponents(dtype):
    """Whole numbers between which exp(u) is a normal number of the dtype: (-87, 88) for float32."""
    info = jnp.finfo(dtype)
    return math.ceil(math.log(float(info.tiny))), math.floor(math.log(float(info.max)))


def _floating(x, where, path):
    """`x` as a floating-point array of its own dtype; an error for anything else."""
    try:
        array = jnp.asarray(x)
    except (TypeError, ValueError):
        array = None
    if array is not None and jnp.issubdtype(array.dtype, jnp.floating):
        return jnp.asarray(array, array.dtype)  # not weakly typed: the next step must see the same type
    given = f"{x!r}" if array is None else f"an array of type {array.dtype}"
    raise JaxhpoError(
        f"`{where}`{_at(path)} got {given}, which has no derivative: a hyperparameter must be a floating-point number "
        "or array. Write `1.0` for `1`, or convert with `.astype(float)`."
    )


def _require(inside, values, needs, reason, remedy, got=""):
    if not np.all(inside):
        worst = np.asarray(values)[~np.asarray(inside)].flat[0]
        raise JaxhpoError(f"{needs}, {reason}; got {got}{float(worst):g}. {remedy}.")


def _at(path):
    return f" at `{jax.tree_util.keystr(path)}`" if path else ""


def _broadcast(*shapes):
    """The shape that the given ones broadcast to; None where they do not."""
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError:
        return None


def _is_number(x):
    return isinstance(x, (int, float, np.number)) and not isinstance(x, bool)


def _bound(value, name):
    """A bound of `box` as a NumPy array; None where it is traced and so has no value yet."""
    if isinstance(value, Tracer):
        return None
    is_array = isinstance(value, (np.ndarray, jax.Array)) and (
        jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)
    )
    if not (_is_number(value) or is_array) or np.iscomplexobj(value):
        raise JaxhpoError(
            f"`box`: {name} is {value!r}, but a bound is a real number or an array of them. Write `box(0.0, 0.9)`."
        )
    array = np.asarray(value)
    if not np.all(np.isfinite(array)):
        raise JaxhpoError(
            f"`box`: {name} is {value!r}, but both bounds must be finite. For values bounded on one side only shift "
            "`positive`: `low + h` with h under `positive`."
        )
    return array
