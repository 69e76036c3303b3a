"""Testing on a frozen image backbone: features once, or the images of every episode again."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import torch

from metafit import backbones
from metafit.bench import sources
from metafit.bench.peers import easyfsl
from metafit.bench.race import Contender, Settings, race
from metafit.bench.timing import interleave
from metafit.data import Source, TaskSampler
from metafit.data.features import features
from metafit.evaluation import evaluate
from metafit.learners import GradientLearner, build
from metafit.task import take

WAY, SHOT, QUERY, STEPS, RATE = 5, 1, 15, 5, 0.01
MOST = 100  # images a class
EPISODES, MEASURED = 600, 3  # of which a peer runs so many; its time is scaled


def episodes(settings: Settings) -> list[dict[str, Any]]:
    """ProtoNet, then ANIL, over the same test episodes."""
    source, backbone = _images(settings), backbones.load("efficientnet-lite0")
    total, some = (4, 1) if settings.quick else (EPISODES, MEASURED)
    protonet = build("protonet", backbone.out_dim, WAY, metric="euclidean")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        anil = build("anil", backbone.out_dim, WAY, torch.nn.Identity(), rate=RATE, steps=STEPS)
    assert isinstance(anil, GradientLearner)
    raw = TaskSampler(source, WAY, SHOT, QUERY)
    name, classifier = easyfsl.prototypical(backbone)
    head = anil.model.get_submodule("head")
    assert isinstance(head, torch.nn.Linear)

    def ours() -> list[torch.Tensor]:
        tasks = TaskSampler(features(source, backbone, progress=False), WAY, SHOT, QUERY)
        found = [evaluate(learner, tasks, total, show_progress=False) for learner in (protonet, anil)]
        return [evaluation.score[:some, -1] for evaluation in found]

    def afresh() -> list[torch.Tensor]:
        with _fresh_cache():
            return ours()

    def peer() -> list[torch.Tensor]:
        scores: list[list[torch.Tensor]] = [[], []]
        for support, query in (take(raw.tasks(i, i + 1), 0) for i in range(some)):
            with torch.inference_mode():
                classifier.process_support_set(support.x, support.y)
                scores[0].append((classifier(query.x).argmax(1) == query.y).float().mean())
            logits = easyfsl.anil(backbone, head, (support.x, support.y), query.x, STEPS, RATE)
            scores[1].append((logits.argmax(1) == query.y).float().mean())
        return [torch.stack(part) for part in scores]

    off = max(float((a - b).abs().max()) for a, b in zip(afresh(), peer(), strict=True))
    note = "embeds every episode, once for each learner"
    if some < total:
        note = f"{note}; measured on {some} of {total} episodes and scaled"
    title = f"ProtoNet and ANIL on frozen EfficientNet-Lite0, {total} episodes, {WAY}-way {SHOT}-shot, {QUERY} queries"
    row = race(
        "episodes",
        title,
        50,
        Contender("metafit, features computed in the run", afresh),
        [Contender(name, peer, note, total / some, off)],
        settings,
        data=sources.described(source),
        note=f"embeds {len(source):,} images, the peer {2 * total * WAY * (SHOT + QUERY):,}",
    )
    with _fresh_cache():
        cached = interleave(ours, {name: peer}, rounds=3, seconds=settings.seconds / 3, least=settings.least)[name]
    return [row | {"cached_ratio": round(cached.ratio.median * total / some, 1), "cached_seconds": cached.ours}]


def _images(settings: Settings) -> Source:
    """Classes with examples enough for every query to count; of the packaged source, some hundred images."""
    source = sources.pictures()
    enough = torch.nonzero(source.counts >= SHOT + QUERY)[:, 0].tolist()
    source = source.subset(enough[:WAY] if settings.quick else enough)
    most = SHOT + QUERY if settings.quick else MOST
    rows = torch.cat([torch.nonzero(source.y == c)[:most, 0] for c in range(len(source.classes))])
    return Source(source.name, source.x[rows], source.y[rows], source.classes, source.modality)


@contextlib.contextmanager
def _fresh_cache() -> Iterator[None]:
    """A cache of features that is empty; removed afterwards."""
    before = os.environ.get("METAFIT_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["METAFIT_CACHE"] = folder
        try:
            yield
        finally:
            del os.environ["METAFIT_CACHE"]
            if before is not None:
                os.environ["METAFIT_CACHE"] = before
