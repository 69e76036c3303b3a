"""Features of a frozen backbone, computed once and kept in the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from metafit import disk
from metafit.data.rows import StoredRows
from metafit.data.source import Source, is_raw
from metafit.data.store import Room, fits, load, opened, writing
from metafit.errors import BadInput
from metafit.progress import say

SCHEMA = 1  # raise it when the content or the meaning of the cached files changes


def features(source: Source, backbone: Any, progress: bool = True) -> Source:
    """The same examples as feature vectors of a backbone, which is run in evaluation mode and without gradients.

    The features are kept under ``cache_folder("features")``, by the hash of the examples, the weights and the
    preprocessing: the second call reads them, whoever makes it. Take the features of a whole source, then split it.
    Features of more than 256 MiB go to that file as they are computed, and stay there: tasks read the rows they need.
    Those of a backbone that cannot be cached are held in memory.

    Args:
        source: the examples.
        backbone: a ``Backbone`` of the source's modality; None leaves a source of tensors as it is.
        progress: show a bar on standard error.

    Returns:
        The source with ``x`` float32 ``(N, backbone.out_dim)``, a tensor or ``StoredRows``; ``raw`` keeps what a
        person can look at.

    Raises:
        BadInput: the backbone reads another modality, or gives a feature that is not finite (the example is named);
            or the disk is full, where the features must go there.
    """
    if backbone is None:
        if is_raw(source.x):
            raise BadInput(f"{source.name}: {source.modality} needs a backbone to become numbers; name one")
        return source
    if backbone.modality != source.modality:
        raise BadInput(
            f"{source.name}: its examples are {source.modality}, and the backbone {backbone.name!r} reads "
            f"{backbone.modality}; name a backbone for {source.modality}"
        )
    fingerprint = backbone.fingerprint()
    path = None if fingerprint is None else _path(source.digest(), fingerprint)
    found = None if path is None else _read(path, len(source))
    return source.with_x(_compute(source, backbone, path, progress) if found is None else found, "vector")


def _compute(source: Source, backbone: Any, path: Path | None, progress: bool) -> Tensor | StoredRows:
    """Embeds the examples: into memory, or, where that would be too much, straight into the cache."""
    with contextlib.ExitStack() as until_embedded:

        def room(rows: int, dim: int) -> Tensor | Room:
            if path is None or fits((rows, dim)):
                return torch.empty(rows, dim)
            return until_embedded.enter_context(writing(path, (rows, dim), f"{source.name}: {backbone.name}"))

        found = backbone.embed(source.x, progress=progress, out=room)
    if path is not None and isinstance(found, Room):
        return opened(path)
    _check_finite(source, backbone.name, found)
    if path is not None:
        _write(path, found)
    return found


def _path(digest: str, fingerprint: str) -> Path:
    key = hashlib.sha256(f"metafit features {SCHEMA}\n{digest}\n{fingerprint}".encode()).hexdigest()
    return disk.cache_folder("features") / f"{key}.safetensors"


def _read(path: Path, rows: int) -> Tensor | StoredRows | None:
    """The cached features; None where there are none, or where the file is damaged (it is then written anew)."""
    if not path.exists():
        return None
    try:
        found = load(path)
        if found.ndim == 2 and found.shape[0] == rows:
            return found
        say(f"cached features {path} are of {tuple(found.shape)}, not {rows} rows: computing them again")
    except BadInput as error:
        say(f"cached features {error}: computing them again")
    return None


def _write(path: Path, found: Float[Tensor, "n d"]) -> None:
    """Keeps the features; a cache that cannot be written costs time later, and nothing now."""
    try:
        with writing(path, tuple(found.shape)) as room:
            room[torch.arange(len(found))] = found
    except BadInput as error:
        say(f"the features are not kept for the next time: {error} (METAFIT_CACHE names the cache)")


def _check_finite(source: Source, backbone: str, found: Float[Tensor, "n d"]) -> None:
    bad = torch.nonzero(~torch.isfinite(found).all(1))
    if len(bad):
        index = int(bad[0, 0])
        item = (source.x if source.raw is None else source.raw)[index]
        shown = "" if isinstance(item, Tensor) else f" ({str(item)[:60]!r})"
        raise BadInput(
            f"{source.name}: the backbone {backbone!r} gives a feature that is not finite for example {index}{shown}, "
            f"{len(bad)} such in all; drop the example or use another backbone"
        )
