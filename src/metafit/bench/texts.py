"""From a few labelled texts to answers, beside SetFit."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from metafit import backbones
from metafit.apps import FewShotClassifier
from metafit.bench import sources
from metafit.bench.peers import setfit
from metafit.bench.race import Contender, Settings, race
from metafit.data import Source, TaskSampler
from metafit.task import take

WAY, SHOT, QUERY = 5, 8, 20


class Draw(NamedTuple):
    texts: list[str]
    labels: list[int]
    new: list[str]
    right: list[int]


class Repeated:
    """A classifier that gets the next draw at each call; keeps how often it was right."""

    def __init__(self, classify: setfit.Classify, draws: Callable[[int], Draw]):
        self.classify, self.draws, self.index = classify, draws, itertools.count()
        self.accuracy: list[float] = []

    def __call__(self) -> None:
        draw = self.draws(next(self.index))
        answers = self.classify(draw.texts, draw.labels, draw.new)
        self.accuracy.append(sum(a == b for a, b in zip(answers, draw.right, strict=True)) / len(answers))


def texts(settings: Settings) -> list[dict[str, Any]]:
    """Both start with the pretrained model in memory."""
    source = sources.intents()
    way, shot, query = (2, 2, 2) if settings.quick else (WAY, SHOT, QUERY)
    backbone = backbones.load("minilm-l6")

    def classify(texts: Any, labels: Any, new: Any) -> list[int]:
        return FewShotClassifier(backbone=backbone).fit(texts, labels).predict(new).tolist()

    ours = Repeated(classify, lambda index: _draw(source, way, shot, query, index))
    title = f"adapting to {way} classes of {shot} texts and answering {way * query}"
    # one call a draw, so that both see the same draws; SetFit's take long
    settings = replace(settings, least=0, seconds=4 * settings.seconds, rounds=min(settings.rounds, 8))
    with tempfile.TemporaryDirectory() as folder:
        theirs = None
        try:
            theirs = Repeated(setfit.classifier(Path(folder)), ours.draws)
            peer = Contender("setfit", theirs, "default arguments, weights in memory")
        except ImportError:
            peer = Contender("setfit", None, "not installed; the extra bench brings it")
        row = race("texts", title, 20, Contender("metafit", ours), [peer], settings, data=sources.described(source))
    accuracy = {"metafit": ours.accuracy, "setfit": theirs.accuracy if theirs else []}
    draws = min(len(part) for part in accuracy.values() if part)
    means = {name: round(sum(part[:draws]) / draws, 4) for name, part in accuracy.items() if part}
    told = ", ".join(f"{name} {100 * mean:.1f} %" for name, mean in means.items())
    return [row | {"accuracy": means, "draws": draws, "note": f"accuracy over the same {draws} draws: {told}"}]


def _draw(source: Source, way: int, shot: int, query: int, index: int) -> Draw:
    rows = source.with_x(torch.arange(len(source)), "vector")
    support, new = take(TaskSampler(rows, way, shot, query, batch=1, seed=1).draw(index), 0)
    told, asked = ([source.x[row] for row in part.x.tolist()] for part in (support, new))
    return Draw(told, support.y.tolist(), asked, new.y.tolist())
