"""Features of a frozen backbone, computed once and kept in the user's cache."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from metafit import disk
from metafit.data.source import Source, is_raw
from metafit.errors import BadInput
from metafit.progress import say

SCHEMA = 1  # raise it when the content or the meaning of the cached files changes


def features(source: Source, backbone: Any, progress: bool = True) -> Source:
    """The same examples as feature vectors of a backbone, which is run in evaluation mode and without gradients.

    The features are kept under ``cache_folder("features")``, by the hash of the examples, the weights and the
    preprocessing: the second call reads them, whoever makes it. Take the features of a whole source, then split it.

    Args:
        source: the examples.
        backbone: a ``Backbone`` of the source's modality; None leaves a source of tensors as it is.
        progress: show a bar on standard error.

    Returns:
        The source with ``x`` float32 ``(N, backbone.out_dim)``; ``raw`` keeps what a person can look at.

    Raises:
        BadInput: the backbone reads another modality, or gives a feature that is not finite (the example is named).
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
    if found is None:
        found = backbone.embed(source.x, progress=progress)
        _check_finite(source, backbone.name, found)
        if path is not None:
            _write(path, found)
    return source.with_x(found, "vector")


def _path(digest: str, fingerprint: str) -> Path:
    key = hashlib.sha256(f"metafit features {SCHEMA}\n{digest}\n{fingerprint}".encode()).hexdigest()
    return disk.cache_folder("features") / f"{key}.safetensors"


def _read(path: Path, rows: int) -> Float[Tensor, "n d"] | None:
    """The cached features; None where there are none, or where the file is damaged (it is then written anew)."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            found = file.get_tensor("features")
            written = (file.metadata() or {}).get("sha256")
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        say(f"cached features {path} cannot be read ({error}): computing them again")
        return None
    if written != _sha256(found) or found.ndim != 2 or found.shape[0] != rows:
        say(f"cached features {path} are damaged: computing them again")
        return None
    return found


def _write(path: Path, found: Float[Tensor, "n d"]) -> None:
    """Keeps the features; a cache that cannot be written costs time later, and nothing now."""
    from safetensors.torch import save

    try:
        disk.write_bytes(path, save({"features": found}, metadata={"sha256": _sha256(found)}))
    except BadInput as error:
        say(f"the features are not kept for the next time: {error} (METAFIT_CACHE names the cache)")


def _sha256(found: Tensor) -> str:
    return hashlib.sha256(found.contiguous().numpy().data).hexdigest()


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
