"""The training tasks of a comparison that reads no labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor

from metafit import backbones
from metafit.apps.packed import packed
from metafit.backbones import Backbone
from metafit.data import Source, TaskSampler
from metafit.data.clusters import cactus
from metafit.data.families import Families
from metafit.data.sampler import Range, Tasks
from metafit.data.umtra import UMTRA
from metafit.data.views import Affine, Erase, Jitter, View, text_views
from metafit.training import Recipe

Unsupervised = Literal["cactus", "umtra", "mixture"]
WAYS = 20  # of a learner that takes any number: few enough that examples of one true class seldom meet
QUERIES = 4  # a class


def pseudo_tasks(
    kind: Unsupervised,
    source: Source,
    recipe: Recipe,
    body: Backbone | None,
    way: Range,
    shot: Range,
    query: int,
    batch: int,
    seed: int,
) -> Tasks:
    """Tasks from the examples alone: of clusters (``"cactus"``), of single examples and their views (``"umtra"``), or
    of these with queries mixed with other examples (``"mixture"``).

    Over frozen features what is clustered are the features, and views are features of the text with words dropped, or
    features with noise. For a network that is trained it is what the network gives before training, and views are
    images turned, shifted and with pixels erased.

    Args:
        recipe: how the source's inputs came about.
        body: the network that is trained; ``None`` over frozen features.
        way, shot, query, batch, seed: of the tasks; fewer ways where there are fewer clusters.
    """
    if kind == "cactus":
        embeddings = None if body is None else body.embed(source.x)
        most = shot if isinstance(shot, int) else shot[1]
        parts = cactus(source, embeddings, least=most + query, seed=seed)
        fewest = min(len(part.classes) for part in parts.values())
        ways = min(way, fewest) if isinstance(way, int) else (min(way[0], fewest), min(way[1], fewest))
        samplers = {name: TaskSampler(part, ways, shot, query, batch, seed) for name, part in parts.items()}
        return Families({name: packed(sampler, body) for name, sampler in samplers.items()}, seed=seed)
    augment, views = _views(source, recipe, body)
    return UMTRA(source, way, shot, query, batch, seed, augment, views, mixed=kind == "mixture")


def _views(source: Source, recipe: Recipe, body: Backbone | None) -> tuple[Sequence[View], Tensor | None]:
    """What changes an example when it is drawn, and views made beforehand."""
    if body is not None:
        return (Affine(), Erase()), None
    if recipe.backbone is None or source.raw is None or not isinstance(source.raw[0], str):
        return (Jitter(),), None
    texts = replace(source, x=source.raw, raw=None, modality="text")
    return (), text_views(texts, backbones.load(recipe.backbone, **recipe.backbone_options))
