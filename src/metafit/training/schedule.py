"""How the outer rate changes over a training."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def share_of_rate(schedule: Schedule, step: int, steps: int, warmup: int = 0) -> float:
    """The factor of the rate at an outer step, from 0 to 1: the schedule's, which ends at 0, times a linear warm-up.

    >>> [round(share_of_rate("cosine", step, 4), 2) for step in range(4)]
    [1.0, 0.85, 0.5, 0.15]
    >>> [share_of_rate("linear", step, 4, warmup=2) for step in range(4)]
    [0.5, 0.75, 0.5, 0.25]
    """
    done = step / steps
    annealed = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]
    return annealed * min(1.0, (step + 1) / max(1, warmup))
