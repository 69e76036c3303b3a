"""Times that can be compared on a machine that others use too: contenders in turn, and the ratios of each turn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from statistics import median, quantiles
from typing import Any, NamedTuple

Call = Callable[[], Any]
FEWEST_ROUNDS = 2
LONG = 2.0  # seconds of a call that needs no second look


class Spread(NamedTuple):
    """A median, and the quartiles around it."""

    median: float
    low: float
    high: float


class Duel(NamedTuple):
    """Seconds of one call of ours and of the peer's (medians), and the ratios peer / ours of the rounds."""

    ours: float
    peer: float
    ratio: Spread
    rounds: int


def interleave(
    ours: Call,
    peers: Mapping[str, Call],
    rounds: int = 15,
    seconds: float = 60.0,
    least: float = 0.05,
    clock: Callable[[], float] | None = None,
) -> dict[str, Duel]:
    """Runs ours, a peer, ours, the next peer, ... so that a slow moment of the machine is both sides' slow moment.

    Args:
        ours, peers: what to time; each is called once or twice before anything counts.
        rounds: at most so many.
        seconds: no new round is begun after so long (two rounds are run in any case).
        least: seconds that a measurement takes at least; a faster call is repeated.
        clock: of seconds; waits for the GPU where there is one in use.
    """
    clock = clock or now
    mine = _repeats(ours, least, clock)
    theirs = {name: _repeats(call, least, clock) for name, call in peers.items()}
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in peers}
    begin = clock()
    for turn in range(max(rounds, FEWEST_ROUNDS)):
        if turn >= FEWEST_ROUNDS and clock() - begin > seconds:
            break
        for name, peer in peers.items():
            if turn % 2:  # the other way round, so that a steady drift cancels
                second = _timed(peer, theirs[name], clock)
                pairs[name].append((_timed(ours, mine, clock), second))
            else:
                first = _timed(ours, mine, clock)
                pairs[name].append((first, _timed(peer, theirs[name], clock)))
    return {name: _duel(times) for name, times in pairs.items()}


def now() -> float:
    """Seconds, once the GPU (where one is in use) has done all that it was given."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def spread(values: list[float]) -> Spread:
    """The median and the quartiles.

    >>> spread([1.0, 2.0, 3.0, 4.0, 5.0])
    Spread(median=3.0, low=2.0, high=4.0)
    """
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high)


def _duel(times: list[tuple[float, float]]) -> Duel:
    ours, theirs = zip(*times, strict=True)
    return Duel(median(ours), median(theirs), spread([b / a for a, b in times]), len(times))


def _timed(call: Call, times: int, clock: Callable[[], float]) -> float:
    begin = clock()
    for _ in range(times):
        call()
    return (clock() - begin) / times


def _repeats(call: Call, least: float, clock: Callable[[], float]) -> int:
    first = _timed(call, 1, clock)  # pays for warming up, so that its time says something only where it is long
    if first > LONG or not least:
        return 1
    return max(1, math.ceil(least / max(_timed(call, 1, clock), 1e-9)))
