"""Real episodes for people to look at: the support set, the queries, and each learner's answers."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from metafit.data.sampler import TaskSampler
from metafit.evaluation.evaluate import Evaluation

THUMBNAIL = 96


def gallery(
    tasks: TaskSampler, evaluations: Mapping[str, Evaluation], episodes: int = 4, support: int = 3, queries: int = 3
) -> list[dict[str, Any]]:
    """The first episodes of an evaluation, with up to ``support`` and ``queries`` items of each class."""
    episodes = min([episodes, *(len(e.score) for e in evaluations.values())])
    draw = tasks.indices(0, episodes)
    source = tasks.source
    raw = source.x if source.raw is None else source.raw
    shown = []
    for t in range(episodes):
        classes = [c for c in range(draw.classes.shape[1]) if bool(draw.in_support[t, c].any())]

        def rows(
            part: Tensor, exists: Tensor, most: int, t: int = t, classes: list[int] = classes
        ) -> list[tuple[int, int, int]]:
            """(class, position in the flat set, row of the source)"""
            each = part.shape[2]
            places = [(c, i) for c in classes for i in range(min(most, each)) if exists[t, c, i]]
            return [(c, c * each + i, int(part[t, c, i])) for c, i in places]

        def answers(position: int, t: int = t) -> dict[str, Any]:
            return {
                name: {"class": int(e.answers[t, position]), "confidence": round(float(e.confidence[t, position]), 4)}
                for name, e in evaluations.items()
                if e.answers is not None and e.confidence is not None
            }

        shown.append(
            {
                "classes": [source.classes[int(draw.classes[t, c])] for c in classes],
                "support": [
                    {"class": c, **item(raw[row], source.modality)}
                    for c, _, row in rows(draw.support, draw.in_support, support)
                ],
                "query": [
                    {"class": c, **item(raw[row], source.modality), "answers": answers(position)}
                    for c, position, row in rows(draw.query, draw.in_query, queries)
                ],
            }
        )
    return shown


def item(raw: Any, modality: str) -> dict[str, Any]:
    """One example as JSON: ``{"text"}``, ``{"image"}`` (a data URI) or ``{"values"}``."""
    if isinstance(raw, str):
        return {"text": raw}
    picture = isinstance(raw, os.PathLike) or type(raw).__module__.startswith("PIL.")
    if picture or (isinstance(raw, Tensor) and raw.ndim == 3):
        return {"image": _thumbnail(raw)}
    if isinstance(raw, Tensor):
        return {"values": [round(float(v), 3) for v in raw.flatten()[:8]]}
    return {"text": str(raw)}


def _thumbnail(raw: Any) -> str:
    from PIL import Image

    from metafit.images import open_image

    if isinstance(raw, Tensor):
        pixels = raw.permute(1, 2, 0).cpu().numpy()
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    else:
        image = open_image(raw)
        image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
