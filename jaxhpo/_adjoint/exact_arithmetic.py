"""Exact arithmetic for momentum that is run backwards: fixed-point numbers, and a product with n/d that can be undone.

Fixed-point numbers are integers c for c / 2^F, so adding and subtracting lose nothing. Multiplying c by n/d < 1 does:
about d/n different c end at each product. What is lost, log2(d/n) bits, is pushed onto an integer i as its lowest digit
of base d, and digits of base n are popped from it to fill the product up (Maclaurin et al. 2015; it is a range
asymmetric numeral system, arXiv:1311.2540):

    c = (c div d) d + r,   i d + r = i' n + s,   c' = (c div d) n + s

which is a one-to-one map of (c, i) to (c', i'), with i' ≈ i d/n and c' = c n/d to within d units.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

DIGIT = 16  # bits: d = 2^16
D = 2**DIGIT
LOW = D - 1  # the mask of the lowest digit
BLOCKS = 8  # of rows, if they are a multiple of it
EMPTY = D  # what a lane's word holds at first: below it, the growth of i would not be d/n but what rounding makes of it


class Format(NamedTuple):
    """How numbers are held: `integer` c stands for c / 2^fraction; `real` is the widest float there is."""

    integer: Any
    real: Any
    fraction: int

    @property
    def limit(self) -> float:
        """The largest size that is let in: 1/1000 below the end of the range, so that checks may round."""
        return 0.999 * 2.0 ** (8 * np.dtype(self.integer).itemsize - 1 - self.fraction)

    def encode(self, x: jax.Array) -> jax.Array:
        """The nearest fixed-point number; truncation, which the paper takes, would shorten every step on average."""
        return jnp.round(x.astype(self.real) * 2.0**self.fraction).astype(self.integer)

    def decode(self, c: jax.Array) -> jax.Array:
        """The float of a fixed-point number, rounded."""
        return c.astype(self.real) * 2.0**-self.fraction


def current_format() -> Format:
    """int64 with 52 fractional bits (±2048) where x64 is on, else int32 with 28 (±8)."""
    if jax.dtypes.canonicalize_dtype(np.int64) == np.int64:
        return Format(np.int64, np.float64, 52)
    return Format(np.int32, np.float32, 28)


class Velocity(NamedTuple):
    """A fixed-point number with 16 guard bits, (high + low / 2^16) / 2^F.

    The product replaces the lowest digit r by a digit s that has nothing to do with it. As a guard digit it can, and
    the error of a product is one unit of `high`. (Without it, it would be 2^16 units: 2^-12 in 32 bits.) And since the
    base is 2^16, `high` is c div d, and `low` is c mod d.

    Attributes:
      high: signed integers, shape (rows, lanes).
      low: uint16, the same shape.
    """

    high: jax.Array
    low: jax.Array


class Buffer(NamedTuple):
    """The integers i of all lanes. Their elements, `rows` of them, take turns, so that few bits are unused.

    Each i is a 32-bit word and, below it, digits of 16 bits that were spilled from it. All lanes spill at once, as soon
    as any word would not fit: lanes grow by d/n at each product and so keep step, and one pointer does for all.

    Attributes:
      words: uint32, shape (lanes,).
      stack: uint16, shape (depth, lanes), what was spilled.
      places: int32, shape (depth,), the product (counted over steps and rows) at which each row was spilled.
      size: int32, rows in use; above depth, the buffer was too small.
    """

    words: jax.Array
    stack: jax.Array
    places: jax.Array
    size: jax.Array

    @property
    def full(self) -> jax.Array:
        """Whether more was spilled than the stack could hold, so that nothing can be undone."""
        return self.size > self.stack.shape[0]


def empty_buffer(lanes: int, depth: int) -> Buffer:
    """A buffer that holds nothing, with room for `depth` ≥ 1 spilled digits a lane."""
    stack, places = jnp.zeros((depth, lanes), jnp.uint16), jnp.zeros(depth, jnp.int32)
    return Buffer(jnp.full(lanes, EMPTY, jnp.uint32), stack, places, jnp.zeros((), jnp.int32))


def is_empty(buffer: Buffer) -> jax.Array:
    """Whether everything that was pushed has been popped."""
    return (buffer.size == 0) & jnp.all(buffer.words == EMPTY)


def information(buffer: Buffer) -> jax.Array:
    """Bits a lane that the buffer holds, a mean over lanes."""
    return DIGIT * buffer.size + jnp.mean(jnp.log2(buffer.words.astype(jnp.float32))) - np.log2(EMPTY)


def numerator(momentum: jax.Array) -> jax.Array:
    """n of the rational n/d that stands for a momentum: rounded up by at most 2^-16, and never 0."""
    wide = momentum.astype(current_format().real)
    return jnp.clip(jnp.floor(wide * D) + 1, 1, D).astype(jnp.uint32)


def multiply(v: Velocity, n: jax.Array, buffer: Buffer, step: jax.Array) -> tuple[Velocity, Buffer]:
    """v n/d, and the buffer with what that loses. `n` is uint32 like `v`; `step` counts the calls."""

    def push(low, n, places, buffer):
        def one(i, carry):
            low, buffer = carry
            digit, buffer = _push(low[i], n[i], buffer, places[i])
            return low.at[i].set(digit), buffer

        return jax.lax.fori_loop(0, len(n), one, (low, buffer))

    def block(v, n, places, buffer):
        low, buffer = push(v.low, n, places, buffer)
        # high n + s, with high = a 2^16 + b: both parts of a n 2^16 + (b n + s) fit.
        a, b = v.high >> DIGIT, (v.high & LOW).astype(jnp.uint32)
        rest = b * n + low
        high = a * n.astype(a.dtype) + (rest >> DIGIT).astype(a.dtype)
        return Velocity(high, (rest & LOW).astype(jnp.uint16)), buffer

    return _by_blocks(block, v, n, buffer, step, reverse=False)


def divide(v: Velocity, n: jax.Array, buffer: Buffer, step: jax.Array) -> tuple[Velocity, Buffer]:
    """Undoes `multiply` with the same `n` and `step`."""

    def pop(low, n, places, buffer):
        def one(i, carry):
            low, buffer = carry
            i = len(n) - 1 - i
            digit, buffer = _pop(low[i], n[i], buffer, places[i])
            return low.at[i].set(digit), buffer

        return jax.lax.fori_loop(0, len(n), one, (low, buffer))

    def block(v, n, places, buffer):
        signed = n.astype(v.high.dtype)
        a = v.high // signed
        rest = ((v.high - a * signed).astype(jnp.uint32) << DIGIT) | v.low
        b, s = _divmod(rest, n)
        low, buffer = pop(s.astype(jnp.uint16), n, places, buffer)
        return Velocity((a << DIGIT) | b.astype(a.dtype), low), buffer

    return _by_blocks(block, v, n, buffer, step, reverse=True)


def _by_blocks(block, v, n, buffer, step, reverse):
    """Block of rows by block of rows, so that what is computed on the way takes the memory of one block."""
    num_blocks = math.gcd(len(n), BLOCKS)
    size = len(n) // num_blocks

    def body(i, carry):
        v, buffer = carry
        begin = size * (num_blocks - 1 - i if reverse else i)
        taken, its_n = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, begin, size), (v, n))
        places = step.astype(jnp.int32) * len(n) + begin + jnp.arange(size, dtype=jnp.int32)
        given, buffer = block(taken, its_n, places, buffer)
        return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, begin, 0), v, given), buffer

    return jax.lax.fori_loop(0, num_blocks, body, (v, buffer))


def _push(r, n, buffer, place):
    """i d + r = i' n + s: takes the digit r of base d in, gives the digit s of base n out."""
    # Long division of the three 16-bit digits of i d + r; all that is divided is below n 2^16 ≤ 2^32.
    top, rest = _divmod(buffer.words >> DIGIT, n)
    middle, rest = _divmod((rest << DIGIT) | (buffer.words & LOW), n)
    bottom, s = _divmod((rest << DIGIT) | r, n)
    spill = jnp.any(top > 0)
    words = jnp.where(spill, (top << DIGIT) | middle, (middle << DIGIT) | bottom)
    return s.astype(jnp.uint16), _spilled(buffer, words, bottom.astype(jnp.uint16), place, spill)


def _spilled(buffer, words, digits, place, spill):
    size = buffer.size + spill.astype(jnp.int32)
    # Written in any case, since a branch would copy the stack: back as it was, or above what is in use.
    top = jnp.minimum(buffer.size, buffer.stack.shape[0] - 1)
    write = spill & (buffer.size < buffer.stack.shape[0])
    stack = buffer.stack.at[top].set(jnp.where(write, digits, buffer.stack[top]))
    places = buffer.places.at[top].set(jnp.where(write, place, buffer.places[top]))
    return Buffer(words, stack, places, size)


def _pop(s, n, buffer, place):
    """Undoes `_push`."""
    top = jnp.maximum(buffer.size - 1, 0)
    refill = (buffer.size > 0) & (buffer.places[top] == place)
    # The three digits of i', then those of i' n + s.
    low = jnp.where(refill, buffer.stack[top], buffer.words & LOW)
    middle = jnp.where(refill, buffer.words & LOW, buffer.words >> DIGIT)
    high = jnp.where(refill, buffer.words >> DIGIT, 0)
    low = low * n + s
    middle = middle * n + (low >> DIGIT)
    words = ((high * n + (middle >> DIGIT)) << DIGIT) | (middle & LOW)
    size = buffer.size - refill.astype(jnp.int32)
    return (low & LOW).astype(jnp.uint16), buffer._replace(words=words, size=size)


def _divmod(a, b):
    quotient = a // b
    return quotient, a - quotient * b
