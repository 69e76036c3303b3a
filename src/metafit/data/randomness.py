"""Counter-based random numbers: a pure function of (seed, index, position), the same on every device and worker.

The generator is SplitMix64's finaliser (Steele, Lea and Flood, 2014, doi:10.1145/2660193.2660195) applied to a
counter, in wrapping int64 arithmetic.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Integers = TypeVar("Integers", np.ndarray, Tensor)  # int64


def _signed(value: int) -> int:
    """The value modulo 2⁶⁴, as an int64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift(z: Integers, bits: int) -> Integers:
    """Logical right shift, which int64 lacks; a new array."""
    z = z >> bits
    z &= (1 << (64 - bits)) - 1
    return z


def mix(z: Integers) -> Integers:
    for bits, factor in ((30, _MIX_1), (27, _MIX_2)):
        mixed = _shift(z, bits)
        mixed ^= z
        mixed *= factor
        z = mixed
    return _shift(z, 31) ^ z


def keys(seed: int, index: Integers) -> Integers:
    """One key a task, from the run's seed and the task's index."""
    seeded = mix(index * 0 + _signed((seed + 1) * _GOLDEN))
    return mix(seeded + index * _GOLDEN)


def derive(key: Integers, stream: int | Integers) -> Integers:
    """A new key for another purpose (a stream number) or another place (an array of numbers that broadcasts)."""
    step = _signed((stream + 1) * _GOLDEN) if isinstance(stream, int) else (stream + 1) * _GOLDEN
    return mix(key + step)


def below(key: Integers, n: int | Integers) -> Integers:
    """Integers in [0, n), n < 2³¹; their bias is below n/2³¹."""
    return (_shift(key, 33) * n) >> 31


def uniform(key: Tensor, low: float, high: float) -> Tensor:
    """Floating-point numbers in [low, high), in the default precision, from 24 bits (exact in float32)."""
    return low + (high - low) * (_shift(key, 40).to(torch.get_default_dtype()) * 2.0**-24)


def normal(key: Tensor, n: int) -> Tensor:
    """Standard normal numbers ``(*shape, n)`` in double precision, after Box and Muller (1958)."""
    places = torch.arange(n)
    radius, angle = (uniform(derive(derive(key, stream)[..., None], places), 0.0, 1.0).double() for stream in (0, 1))
    return (-2 * (1 - radius).log()).sqrt() * (2 * math.pi * angle).cos()


def sample_distinct(key: Any, n: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
    """k distinct integers below n in random order, by Floyd's algorithm (Bentley and Floyd, 1987), whatever n.

    The i-th pick is a number drawn from 0 to n - k + i, or that upper end where an earlier pick has the number.

    Args:
        key: int64, of any shape.
        n: an integer, or one a key.
        k: how many.

    Returns:
        The integers ``(*shape, k)``, and which of them exist: where n < k only the first n do (the others are 0).
    """
    key = np.asarray(key)
    shape = (*key.shape, k)
    n = np.broadcast_to(n, key.shape).reshape(-1, 1)
    place = np.arange(k)
    exists = place < n
    least = np.maximum(n - k, 0)
    top = least + place
    draw, order = derive(key.reshape(-1, 1), np.arange(2 * k).reshape(k, 2).T[:, None])
    drawn = below(draw, top + 1)
    values = np.where(_taken(drawn, least), top, drawn)
    shuffle = np.where(exists, _shift(order, 1), np.iinfo(np.int64).max).argsort()
    shuffle += _first(values)
    return (values.take(shuffle) * exists).reshape(shape), exists.reshape(shape)


def _taken(drawn: np.ndarray, least: np.ndarray) -> np.ndarray:
    """Whether an earlier pick has the number drawn: one that drew it, or one whose upper end it is and who took it.

    The upper end of pick j is ``least + j``; it is taken where the number that j drew is taken.
    """
    bits = drawn.shape[1].bit_length()
    place, first = np.arange(drawn.shape[1]), _first(drawn)
    ordered = np.sort((drawn << bits) + place)  # equal numbers side by side, in the order of the picks
    again = (ordered[:, 1:] ^ ordered[:, :-1]) < 1 << bits
    taken = np.zeros(drawn.shape, dtype=bool)
    taken.put(((ordered[:, 1:] & ((1 << bits) - 1)) + first)[again], True)
    above = np.where(drawn < least, place, drawn - least) + first  # whose upper end it is; itself where nobody's
    while True:  # the paths through ``above`` double their length
        wider = taken | taken.take(above)
        if np.array_equal(wider, taken):
            return taken
        taken, above = wider, above.take(above)


def _first(x: np.ndarray) -> np.ndarray:
    """Where each row begins in the flat array, (rows, 1)."""
    return np.arange(0, x.size, x.shape[1])[:, None]
