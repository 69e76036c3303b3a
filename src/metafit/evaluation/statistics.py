"""Means with 95 % intervals, paired differences and calibration."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def interval(values: Float[Tensor, " n"]) -> dict[str, float | None]:
    """``{"mean", "ci95"}``: the mean and the half-width of its 95 % interval by Student's t.

    ``ci95`` is ``None`` for one value; both are where a value is not finite, which JSON could not say.

    >>> interval(torch.tensor([1.0, 2.0, 3.0]))
    {'mean': 2.0, 'ci95': 2.484138}
    """
    from scipy.stats import t

    values = values.double()
    n = len(values)
    if not bool(values.isfinite().all()):
        return {"mean": None, "ci95": None}
    half = None if n < 2 else round(float(t.ppf(0.975, n - 1) * values.std() / math.sqrt(n)), 6)
    return {"mean": round(float(values.mean()), 6), "ci95": half}


def gap(seen: Float[Tensor, " n"], unseen: Float[Tensor, " m"]) -> dict[str, float | None]:
    """``{"mean", "ci95"}`` of mean(seen) − mean(unseen), of tasks that are not paired; by the normal distribution."""
    parts = [values.double() for values in (seen, unseen)]
    if not all(bool(values.isfinite().all()) for values in parts):
        return {"mean": None, "ci95": None}
    mean = round(float(parts[0].mean() - parts[1].mean()), 6)
    if min(map(len, parts)) < 2:
        return {"mean": mean, "ci95": None}
    return {"mean": mean, "ci95": round(1.96 * math.sqrt(sum(float(v.var()) / len(v) for v in parts)), 6)}


def reliability(
    confidence: Float[Tensor, " n"], right: Bool[Tensor, " n"], bins: int = 15
) -> tuple[float, list[dict[str, Any]]]:
    """Expected calibration error and the reliability diagram's rows, by bins of equal width (Guo et al., 2017).

    Returns:
        The mean gap between confidence and accuracy, weighted by the bins' sizes, and each filled bin's mean
        confidence, accuracy and count.
    """
    index = (confidence * bins).long().clamp(0, bins - 1)
    counts = torch.bincount(index, minlength=bins).double()
    filled = counts > 0
    mean = torch.bincount(index, confidence.double(), bins)[filled] / counts[filled]
    accuracy = torch.bincount(index, right.double(), bins)[filled] / counts[filled]
    error = float(((mean - accuracy).abs() * counts[filled]).sum() / counts.sum())
    rows = zip(mean.tolist(), accuracy.tolist(), counts[filled].long().tolist(), strict=True)
    return error, [{"confidence": round(c, 6), "accuracy": round(a, 6), "count": n} for c, a, n in rows]


def coverage(level: Float[Tensor, " n"]) -> tuple[float, list[dict[str, Any]]]:
    """``reliability`` of predicted densities (Kuleshov et al., 2018, arXiv:1807.00263, section 3.5).

    Args:
        level: of each target, the probability of the smallest central interval that holds it.

    Returns:
        The mean gap between the probability of intervals, 5 % to 95 %, and the share of targets that they hold; and
        both of each.
    """
    asked = torch.arange(1, 20, dtype=torch.float64) / 20
    held = (level.double()[:, None] <= asked).double().mean(0)
    rows = zip(asked.tolist(), held.tolist(), strict=True)
    error = float((held - asked).abs().mean())
    return error, [{"confidence": round(c, 6), "accuracy": round(a, 6), "count": len(level)} for c, a in rows]
