"""Classes without labels: clusters of embeddings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from metafit.data.rows import StoredRows
from metafit.data.source import Source
from metafit.errors import BadInput


def cactus(
    source: Source,
    embeddings: Float[Tensor, "n d"] | None = None,
    clusters: int | None = None,
    partitions: int = 10,
    least: int = 6,
    seed: int = 0,
) -> dict[str, Source]:
    """Several partitions of the examples into pseudo-classes by k-means (Hsu et al., 2019, CACTUs, arXiv:1810.02334).

    The first clusters the embeddings as they are, the others after each dimension was scaled by a factor uniform in
    [0, 1), as the authors' code does, so that they differ in what they hold alike. A task takes its classes from one
    partition: give each a sampler, and the samplers to ``Families``.

    Args:
        source: examples; labels are not read.
        embeddings: what is clustered; the source's ``x``, flattened, where ``None``.
        clusters: k of each partition; where ``None`` one for 80 examples, at most 500 (the paper's k on Omniglot).
        partitions: how many.
        least: examples below which a cluster is no class: queries, shots and one to spare. Theirs are left out.
        seed: of the scaling and of k-means.

    Returns:
        By name, a source a partition, its classes the clusters. Each copies the examples it keeps; rows on disk stay
        there.

    Raises:
        BadInput: no numbers to cluster, more clusters than examples, or fewer than two clusters of ``least`` examples.
    """
    from sklearn.cluster import KMeans

    z = _numbers(source) if embeddings is None else embeddings
    if len(z) != len(source):
        raise BadInput(f"cactus: {len(z)} embeddings for the {len(source)} examples of {source.name!r}")
    k = max(2, min(500, len(source) // 80)) if clusters is None else clusters
    if not 2 <= k <= len(source) or partitions < 1:
        raise BadInput(
            f"cactus: {k} clusters of {len(source)} examples, {partitions} partitions: needs 2 or more, and 1"
        )
    points, random = z.flatten(1).numpy(force=True), np.random.default_rng(seed)
    found = {}
    for i in range(partitions):
        scaled = points if i == 0 else points * random.random(points.shape[1], dtype=np.float32)
        labels = KMeans(k, n_init=1, random_state=random.integers(2**31)).fit_predict(scaled)
        found[f"partition {i}"] = _classes(source, torch.from_numpy(labels).long(), least)
    return found


def _numbers(source: Source) -> Tensor:
    if not isinstance(source.x, (Tensor, StoredRows)):
        raise BadInput(f"cactus: {source.name!r} holds no rows of numbers to cluster; give embeddings=, of a backbone")
    return source.x[:].float()


def _classes(source: Source, labels: Int64[Tensor, " n"], least: int) -> Source:
    _, labels, counts = labels.unique(return_inverse=True, return_counts=True)
    names = tuple(f"cluster {c}" for c in range(len(counts)))
    large = torch.nonzero(counts >= least)[:, 0].tolist()
    if len(large) < 2:
        raise BadInput(
            f"cactus: {len(large)} of {len(counts)} clusters of {source.name!r} have {least} examples or more; ask for "
            "fewer clusters"
        )
    return replace(source, y=labels.to(source.y.device), classes=names, domains=None).subset(large)
