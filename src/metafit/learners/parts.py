"""Functions of many rows in parts, so that memory does not grow with what each row makes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

HELD = 1 << 22  # numbers that are held at once, of many rows with many: 16 MB


def in_parts(function: Callable[..., Tensor], each: int, *sets: Tensor) -> Tensor:
    """A function of many rows in parts, each row of which makes ``each`` numbers: memory does not grow with the
    product."""
    size = at_once(each)
    return torch.cat([function(*part) for part in zip(*(one.split(size) for one in sets), strict=True)])


def at_once(each: int) -> int:
    """How many may be held at once of what makes ``each`` numbers: one at least."""
    return max(1, HELD // max(1, each))
