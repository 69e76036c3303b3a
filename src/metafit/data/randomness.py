"""Counter-based random numbers: a pure function of (seed, index, position), the same on every device and worker.

The generator is SplitMix64's finaliser (Steele, Lea and Flood, 2014, doi:10.1145/2660193.2660195) applied to a
counter, in wrapping int64 arithmetic.
"""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor


def _signed(value: int) -> int:
    """The value modulo 2⁶⁴, as an int64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift, which int64 lacks."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def mix(z: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return z ^ _shift(z, 31)


def keys(seed: int, index: Int64[Tensor, " t"]) -> Int64[Tensor, " t"]:
    """One key a task, from the run's seed and the task's index."""
    seeded = mix(torch.full_like(index, seed) * _GOLDEN + _GOLDEN)
    return mix(seeded + index * _GOLDEN)


def derive(key: Int64[Tensor, "*shape"], stream: int | Tensor) -> Int64[Tensor, "*shape"]:
    """A new key for another purpose (a stream number) or another place (a tensor of numbers that broadcasts)."""
    step = _signed((stream + 1) * _GOLDEN) if isinstance(stream, int) else (stream + 1) * _GOLDEN
    return mix(key + step)


def below(key: Int64[Tensor, "*shape"], n: int | Tensor) -> Int64[Tensor, "*shape"]:
    """Integers in [0, n), n < 2³¹; their bias is below n/2³¹."""
    return (_shift(key, 33) * n) >> 31


def uniform(key: Int64[Tensor, "*shape"], low: float, high: float) -> Tensor:
    """Floating-point numbers in [low, high), in the default precision, from 24 bits (exact in float32)."""
    return low + (high - low) * (_shift(key, 40).to(torch.get_default_dtype()) * 2.0**-24)


def sample_distinct(
    key: Int64[Tensor, "*shape"], n: int | Int64[Tensor, "*shape"], k: int
) -> tuple[Int64[Tensor, "*shape k"], Tensor]:
    """k distinct integers below n in random order, by Floyd's algorithm (Bentley and Floyd, 1987): O(k²), whatever n.

    Returns:
        The integers, and which of them exist: where n < k only the first n do (the others are 0).
    """
    n = torch.as_tensor(n, device=key.device).expand(key.shape)
    size = n.clamp(max=k)
    chosen: list[Tensor] = []
    for i in range(k):
        top = (n - size + i).clamp(min=0)
        drawn = below(derive(key, 2 * i), top + 1)
        if chosen:
            taken = (torch.stack(chosen, -1) == drawn[..., None]).any(-1)
            drawn = torch.where(taken, top, drawn)
        chosen.append(torch.where(i < size, drawn, -1 - i))
    values = torch.stack(chosen, -1)
    exists = values >= 0
    order = _shift(derive(key[..., None], torch.arange(k, device=key.device) * 2 + 1), 1)
    order = torch.where(exists, order, torch.iinfo(torch.int64).max)
    shuffle = order.argsort(-1)
    return values.gather(-1, shuffle).clamp(min=0), exists.gather(-1, shuffle)
