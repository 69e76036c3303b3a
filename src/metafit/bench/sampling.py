"""Drawing tasks, beside a sampler that goes example by example."""

from __future__ import annotations

import itertools
from typing import Any

from metafit.bench import sources
from metafit.bench.peers.per_item import PerItemSampler
from metafit.bench.race import Contender, Settings, race
from metafit.data import TaskSampler


def sampling(settings: Settings) -> list[dict[str, Any]]:
    source = sources.drawings()
    batch, query = (2 if settings.quick else 32), 15
    ours = TaskSampler(source, way=20, shot=5, query=query, batch=batch)
    theirs = PerItemSampler(source, way=20, shot=5, query=query)
    index = itertools.count()
    title = f"task sampling, {batch} tasks of 20-way 5-shot, {query} queries a class"
    peer = Contender("per-item sampler", lambda: theirs.batch(batch), "torchmeta and learn2learn style, our code")
    me = Contender("metafit", lambda: ours.draw(next(index)))
    return [race("sampling", title, 50, me, [peer], settings, data=sources.described(source))]
