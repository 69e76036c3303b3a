"""The one JSON file that every evaluation writes, and that the report, the web page and scripts read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from metafit._version import __version__
from metafit.data.sampler import Tasks
from metafit.data.source import Source, Splits
from metafit.disk import write_json
from metafit.environment import environment
from metafit.evaluation.evaluate import Evaluation
from metafit.evaluation.statistics import gap, interval
from metafit.learners import Learner, entry

SCHEMA = 1


@dataclass
class Contender:
    """A learner, what meta-training did to it, and what it then did on the test tasks.

    Attributes:
        seen: what it does on tasks of the training classes, for the gauge of its overfitting.
    """

    name: str
    learner: Learner
    evaluation: Evaluation
    history: Sequence[Mapping[str, Any]] = field(default_factory=list)
    seen: Evaluation | None = None

    def about(self) -> dict[str, Any]:
        recipe = getattr(self.learner, "recipe", None)
        line = entry(recipe["name"]) if recipe else None  # a learner of one's own is in no catalogue
        return {
            "title": line.title if line else self.name,
            "family": line.family if line else "own",
            "paper": line.paper if line else "",
            "options": recipe["options"] if recipe else {},
            "parameters": sum(p.numel() for p in self.learner.parameters() if p.requires_grad),
            "meta_trained": bool(self.history),
            "transductive": self.learner.transductive,
        }

    def measured(self) -> dict[str, Any]:
        return {
            "metrics": self.evaluation.metrics(),
            "curve": self.evaluation.curve(),
            "calibration": self.evaluation.calibration(),
            "history": list(self.history),
            "gauge": None if self.seen is None else self._gauge(self.seen),
        }

    def _gauge(self, seen: Evaluation) -> dict[str, Any]:
        """How much better it is on tasks of the classes that it was trained on."""
        known, unseen = seen.score[:, -1], self.evaluation.score[:, -1]
        return {"metric": seen.metric, "seen": interval(known), "unseen": interval(unseen), "gap": gap(known, unseen)}


def result(
    contenders: Sequence[Contender],
    tasks: Tasks,
    *,
    backbone: str | None = None,
    source: dict[str, Any] | None = None,
    gallery: Sequence[Mapping[str, Any]] = (),
    diversity: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The result of the first contender, against the others on the same tasks.

    Args:
        contenders: each with its evaluation on the same episodes of ``tasks``.
        tasks: the test tasks.
        backbone: name of the backbone whose features they saw, if any.
        source: see ``describe``.
        gallery: see ``gallery``.
        diversity: see ``describe_tasks``.
    """
    first, *others = contenders
    function = {"name": type(tasks).__name__.lower(), "modality": "function"}
    return {
        "schema": SCHEMA,
        "metafit": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "learner": {"name": first.name, **first.about()},
        "backbone": backbone,
        "source": source or {**function, "classes": {}, "examples": {}},
        "protocol": {
            "way": tasks.way,
            "shot": tasks.shot,
            "query": tasks.query,
            "episodes": int(first.evaluation.score.shape[0]),
            "seed": tasks.seed,
            "transductive": first.learner.transductive,
        },
        **first.measured(),
        "gallery": list(gallery),
        "diversity": diversity,
        "against": [
            {
                "learner": other.name,
                **other.about(),
                **other.measured(),
                "paired_difference": first.evaluation.minus(other.evaluation),
            }
            for other in others
        ],
        "environment": environment(),
    }


def describe(splits: Splits | Mapping[str, Source | None], name: str, modality: str) -> dict[str, Any]:
    """What the result says of its data: the classes and the number of examples of each part."""
    parts: Mapping[str, Source | None] = splits._asdict() if isinstance(splits, Splits) else splits
    return {
        "name": name,
        "modality": modality,
        "classes": {part: list(source.classes) if source else [] for part, source in parts.items()},
        "examples": {part: len(source) if source else 0 for part, source in parts.items()},
    }


def write_result(result: Mapping[str, Any], folder: str | os.PathLike[str]) -> Path:
    """Writes ``result.json``, whole or not at all."""
    path = Path(folder) / "result.json"
    write_json(path, result)
    return path
