"""How right answers are, where the inputs came with labels after all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from metafit.errors import some


def accuracy_told(labels: Sequence[Any], answers: Sequence[Any], classes: Sequence[Any]) -> str:
    """The share of right answers with its Wilson interval, in words; empty where no input has a label.

    Args:
        labels: of each input, as its file has it; ``None`` or blank where it has none.
        answers: of each input.
        classes: that were learned; labels of others can only be answered wrongly, and are told.
    """
    from scipy.stats import binomtest

    pairs = [(str(label), str(answer)) for label, answer in zip(labels, answers, strict=True) if _given(label)]
    if not pairs:
        return ""
    right = sum(label == answer for label, answer in pairs)
    low, high = binomtest(right, len(pairs)).proportion_ci(method="wilson")
    strange = sorted({label for label, _ in pairs} - {str(name) for name in classes})
    return (
        f"{right} of {len(pairs)} answers are as labelled, {right / len(pairs):.1%} (95 % interval {low:.1%} to "
        f"{high:.1%}; too good where it learned from the same inputs)"
        + (f"; it has not learned {some(list(map(repr, strange)), 3)}" if strange else "")
    )


def error_told(targets: Sequence[Any], answers: Sequence[float]) -> str:
    """The mean distance of the answers from the targets, in words; empty where no input has a target."""
    pairs = [(float(target), answer) for target, answer in zip(targets, answers, strict=True) if _number(target)]
    if not pairs:
        return ""
    distance = np.mean([abs(target - answer) for target, answer in pairs])
    return (
        f"answers are off by {distance:.4g} on average, over {len(pairs)} inputs with a target (too good where it "
        "learned from the same inputs)"
    )


def _given(label: Any) -> bool:
    return label is not None and bool(str(label).strip())


def _number(target: Any) -> bool:
    try:
        return bool(np.isfinite(float(target)))
    except (TypeError, ValueError):
        return False
