"""What a dynamic part (a meta-optimizer, a dynamic loss) may look at while it adapts to a task."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Context(NamedTuple):
    """Attributes:
    step: index of the inner step, from 0.
    steps: how many inner steps this adaptation takes.
    outputs: the model's outputs on the support set at this step ``(N, way)`` or ``(N, D)``, for losses.
    """

    step: int = 0
    steps: int = 1
    outputs: Tensor | None = None
