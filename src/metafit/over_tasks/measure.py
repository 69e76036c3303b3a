"""Times ways to do the same work, and picks one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch

Way = TypeVar("Way", bound=Hashable)
log = logging.getLogger("metafit.over_tasks")

CLEARLY = 0.95  # a way must be faster by more than the noise to be preferred to the first
LONG = 2.0  # seconds: what takes longer is timed once


def fastest(ways: Mapping[Way, Callable[[], Any]], devices: list[torch.device]) -> dict[Way, float]:
    """Seconds of each way that works, the one to take first; the first of ``ways`` unless another is clearly faster.

    Each runs twice, in turn, from the same random state, which is left as it was; the shorter time counts, since the
    first run also pays for what is made once.
    """
    seconds: dict[Way, float] = {}
    for attempt in range(2):
        for way, work in ways.items():
            if attempt and seconds.get(way, LONG) >= LONG:
                continue
            with torch.random.fork_rng(devices=devices):
                begin = time.perf_counter()
                work()
                for device in devices:
                    torch.cuda.synchronize(device)
                taken = time.perf_counter() - begin
            seconds[way] = min(taken, seconds.get(way, taken))
    first = next(iter(ways))
    best = min(seconds, key=seconds.__getitem__)
    chosen = best if seconds[best] < CLEARLY * seconds[first] else first
    log.info("%s: %s", chosen, ", ".join(f"{way} {1e3 * taken:.1f} ms" for way, taken in seconds.items()))
    return {chosen: seconds.pop(chosen), **seconds}
