"""What a dynamic part (a meta-optimizer, a dynamic loss) may look at while it adapts to a task."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Context(NamedTuple):
    """Attributes:
    step: index of the inner step, from 0.
    steps: how many inner steps this adaptation takes.
    outputs: the model's outputs on the support set at this step ``(N, way)`` or ``(N, D)``, for losses.
    features: what the head saw of the support set ``(N, dim)``, for losses.
    means: the mean of each adapting parameter tensor ``(L,)``, for losses.
    unlabelled: outputs on the query inputs ``(Q, way)``, only for losses that declare ``transductive = True``.
    unlabelled_weight: ``(Q,)``, 0 for padding of the query set; beside ``unlabelled``.
    """

    step: int = 0
    steps: int = 1
    outputs: Tensor | None = None
    features: Tensor | None = None
    means: Tensor | None = None
    unlabelled: Tensor | None = None
    unlabelled_weight: Tensor | None = None
