"""What ``torchrun`` tells a process of the others that it runs beside."""

from __future__ import annotations

import os


def first() -> bool:
    """Whether this is the first of the processes, or the only one; Lightning Fabric tells those that it starts, too."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def together() -> tuple[int, int]:
    """How many of them run here, and on how many machines like this one: (1, 1) without ``torchrun``."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return here, int(os.environ.get("WORLD_SIZE", "1")) // here
