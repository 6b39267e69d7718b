"""Exact arithmetic for momentum that runs backwards: fixed-point numbers, and an invertible product with n/d.

A fixed-point number is an integer c that stands for c / 2^F, so addition and subtraction lose nothing. The product of c
with n/d < 1 is not one-to-one: about d/n different c have the same product. It loses log2(d/n) bits. They are the
remainder r of c div d, a digit of base d, which is pushed onto an integer i, the buffer. A digit s of base n is popped
from i to become the lowest digit of the product (Maclaurin et al. 2015; a range asymmetric numeral system,
arXiv:1311.2540):

    c = (c div d) d + r,   i d + r = i' n + s,   c' = (c div d) n + s

This maps (c, i) to (c', i') one-to-one, with i' ≈ i d/n and |c' − c n/d| ≤ d.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

DIGIT = 16  # bits of a digit: d = 2^16
D = 2**DIGIT
LOW = D - 1  # bit mask of the lowest digit
BLOCKS = 8  # number of blocks of rows, if it divides the number of rows
HALF = 2**31  # the phase of a first numerator: one half, so that it is rounded to the nearest
EMPTY = D  # initial word of a lane; below it, rounding would make i grow by more than d/n


class Format(NamedTuple):
    """Fixed-point format: an `integer` c stands for c / 2^fraction; `real` is the widest float type available."""

    integer: Any
    real: Any
    fraction: int

    @property
    def limit(self) -> float:
        """Largest magnitude that is accepted: 1/1000 below the end of the range, so that checks may round."""
        return 0.999 * 2.0 ** (8 * np.dtype(self.integer).itemsize - 1 - self.fraction)

    def encode(self, x: jax.Array) -> jax.Array:
        """Rounds to the nearest fixed-point number; truncation, as in the paper, shortens every step on average."""
        return jnp.round(x.astype(self.real) * 2.0**self.fraction).astype(self.integer)

    def decode(self, c: jax.Array) -> jax.Array:
        """Rounds a fixed-point number to a float."""
        return c.astype(self.real) * 2.0**-self.fraction


def current_format() -> Format:
    """int64 with 52 fractional bits (±2048) where x64 is on, else int32 with 28 (±8)."""
    if jax.dtypes.canonicalize_dtype(np.int64) == np.int64:
        return Format(np.int64, np.float64, 52)
    return Format(np.int32, np.float32, 28)


class Velocity(NamedTuple):
    """Fixed-point number with 16 guard bits, (high + low / 2^16) / 2^F.

    The product replaces the lowest digit r of c by an unrelated digit s. As that digit is a guard digit, the error of a
    product is one unit of `high`. (Without guard bits it would be 2^16 units, which is 2^-12 in 32 bits.) Since
    d = 2^16, `high` is c div d and `low` is c mod d.

    Attributes:
      high: signed integers, shape (rows, lanes).
      low: uint16, the same shape.
    """

    high: jax.Array
    low: jax.Array


class Buffer(NamedTuple):
    """The integers i, one per lane. The elements of a lane, one per row, use its integer in turn, to waste few bits.

    Each i consists of a 32-bit word and, below it, 16-bit digits that were spilled from the word. As soon as any word
    would overflow, all lanes spill: they grow at about the same rate, d/n at each product, so one pointer serves all.

    Attributes:
      words: uint32, shape (lanes,).
      stack: uint16, shape (depth, lanes), the spilled digits.
      places: int32, shape (depth,), the product (counted over steps and rows) at which each row was spilled.
      size: int32, number of rows in use; more than depth if the buffer was too small.
    """

    words: jax.Array
    stack: jax.Array
    places: jax.Array
    size: jax.Array

    @property
    def full(self) -> jax.Array:
        """True where more digits were spilled than the stack can hold, so that no product can be undone."""
        return self.size > self.stack.shape[0]


def empty_buffer(lanes: int, depth: int) -> Buffer:
    """An empty buffer, with room for `depth` ≥ 1 spilled digits per lane."""
    stack, places = jnp.zeros((depth, lanes), jnp.uint16), jnp.zeros(depth, jnp.int32)
    return Buffer(jnp.full(lanes, EMPTY, jnp.uint32), stack, places, jnp.zeros((), jnp.int32))


def is_empty(buffer: Buffer) -> jax.Array:
    """True where every digit that was pushed has been popped."""
    return (buffer.size == 0) & jnp.all(buffer.words == EMPTY)


def information(buffer: Buffer) -> jax.Array:
    """Number of bits per lane that the buffer holds, as a mean over lanes."""
    return DIGIT * buffer.size + jnp.mean(jnp.log2(buffer.words.astype(jnp.float32))) - np.log2(EMPTY)


def whole_and_part(momentum: jax.Array) -> tuple[jax.Array, jax.Array]:
    """⌊m d⌋ and the fraction m d − ⌊m d⌋ in units of 2^-32, both uint32."""
    wide = momentum.astype(current_format().real) * D
    whole = jnp.floor(wide)
    return jnp.clip(whole, 0, D).astype(jnp.uint32), ((wide - whole) * 2.0**32).astype(jnp.uint32)


def numerator(momentum: jax.Array, phase: jax.Array) -> jax.Array:
    """The n of the rational number n/d that stands for a momentum in one step: m d rounded down or up, and never 0.

    The phase is the sum of the fractions of all earlier steps, modulo 2^32, and n is rounded up where it overflows:

        n_t = ⌊½ + Σ_{s ≤ t} m_s d⌋ − ⌊½ + Σ_{s < t} m_s d⌋

    So the sum of the momenta, and the logarithm of their product, are right at every step, to 2^-17.
    """
    whole, part = whole_and_part(momentum)
    return jnp.clip(whole + (phase + part < part).astype(jnp.uint32), 1, D)


def multiply(v: Velocity, n: jax.Array, buffer: Buffer, step: jax.Array) -> tuple[Velocity, Buffer]:
    """v n/d, and the buffer with the digits that the product loses. `n` is uint32 like `v`; `step` counts the calls."""

    def block(v, n, places, buffer):
        # v.low holds r; the buffer takes it and returns s.
        buffer, s = jax.lax.scan(_push, buffer, (v.low, n, places))
        # c' = high n + s. With high = a 2^16 + b it is a n 2^16 + (b n + s), both parts of which fit.
        a, b = v.high >> DIGIT, (v.high & LOW).astype(jnp.uint32)
        rest = b * n + s
        high = a * n.astype(a.dtype) + (rest >> DIGIT).astype(a.dtype)
        return Velocity(high, (rest & LOW).astype(jnp.uint16)), buffer

    return _by_blocks(block, v, n, buffer, step, reverse=False)


def divide(v: Velocity, n: jax.Array, buffer: Buffer, step: jax.Array) -> tuple[Velocity, Buffer]:
    """Undoes `multiply` with the same `n` and `step`."""

    def block(v, n, places, buffer):
        # c' = (a n + rest div 2^16) 2^16 + rest mod 2^16, so c' div n = a 2^16 + rest div n and s = rest mod n.
        signed = n.astype(v.high.dtype)
        a = v.high // signed
        rest = ((v.high - a * signed).astype(jnp.uint32) << DIGIT) | v.low
        b, s = _divmod(rest, n)
        # The buffer takes s back and returns r: c = (c' div n) d + r.
        buffer, r = jax.lax.scan(_pop, buffer, (s.astype(jnp.uint16), n, places), reverse=True)
        return Velocity((a << DIGIT) | b.astype(a.dtype), r), buffer

    return _by_blocks(block, v, n, buffer, step, reverse=True)


def _by_blocks(block, v, n, buffer, step, reverse):
    """Applies `block` to one block of rows after another, so that intermediate arrays have the size of one block."""
    num_blocks = math.gcd(len(n), BLOCKS)
    size = len(n) // num_blocks

    def body(i, carry):
        v, buffer = carry
        begin = size * (num_blocks - 1 - i if reverse else i)
        rows, rows_n = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, begin, size), (v, n))
        places = step.astype(jnp.int32) * len(n) + begin + jnp.arange(size, dtype=jnp.int32)
        rows, buffer = block(rows, rows_n, places, buffer)
        return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, begin, 0), v, rows), buffer

    return jax.lax.fori_loop(0, num_blocks, body, (v, buffer))


def _push(buffer, row):
    """i d + r = i' n + s for one row of lanes: pushes the digit r of base d, pops the digit s of base n."""
    r, n, place = row
    # Long division of the three 16-bit digits of i d + r by n. Every dividend is below n 2^16 ≤ 2^32.
    top, rest = _divmod(buffer.words >> DIGIT, n)
    middle, rest = _divmod((rest << DIGIT) | (buffer.words & LOW), n)
    bottom, s = _divmod((rest << DIGIT) | r, n)
    # i' has the digits (top, middle, bottom). If any lane has a top digit, all lanes spill their bottom digit.
    spill = jnp.any(top > 0)
    words = jnp.where(spill, (top << DIGIT) | middle, (middle << DIGIT) | bottom)
    # Written in any case, as a branch would copy the stack: unless a digit spills, the row gets its own values.
    depth = len(buffer.stack)
    at, write = jnp.minimum(buffer.size, depth - 1), spill & (buffer.size < depth)
    stack = buffer.stack.at[at].set(jnp.where(write, bottom.astype(jnp.uint16), buffer.stack[at]))
    places = buffer.places.at[at].set(jnp.where(write, place, buffer.places[at]))
    return Buffer(words, stack, places, buffer.size + spill.astype(jnp.int32)), s.astype(jnp.uint16)


def _pop(buffer, row):
    """Undoes `_push`: i' n + s = i d + r, so it pushes s and pops r."""
    s, n, place = row
    top = jnp.maximum(buffer.size - 1, 0)
    refill = (buffer.size > 0) & (buffer.places[top] == place)
    # The three digits of i', then those of i' n + s, of which the lowest is r.
    low = jnp.where(refill, buffer.stack[top], buffer.words & LOW)
    middle = jnp.where(refill, buffer.words & LOW, buffer.words >> DIGIT)
    high = jnp.where(refill, buffer.words >> DIGIT, 0)
    low = low * n + s
    middle = middle * n + (low >> DIGIT)
    words = ((high * n + (middle >> DIGIT)) << DIGIT) | (middle & LOW)
    size = buffer.size - refill.astype(jnp.int32)
    return buffer._replace(words=words, size=size), (low & LOW).astype(jnp.uint16)


def _divmod(a, b):
    quotient = a // b
    return quotient, a - quotient * b
