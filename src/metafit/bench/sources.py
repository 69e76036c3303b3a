"""The real data that workloads run on: the benchmark data where ``METAFIT_DATA`` names it, else packaged sources."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from metafit.data import Source, from_arrays, from_csv, packaged


def drawings() -> Source:
    """Images of 28×28: Omniglot, 1,623 characters; else the packaged animals and digits, 20 classes."""
    path = _file("vision", "omniglot_28.npz")
    if path is not None:
        archive = np.load(path)
        x = torch.from_numpy(archive["images"].reshape(-1, 1, 28, 28))
        y = torch.arange(len(archive["names"])).repeat_interleave(archive["images"].shape[1])
        return Source("Omniglot", x, y, tuple(map(str, archive["names"])), "image")
    animals, digits = packaged.load("animals"), packaged.load("digits")
    larger = F.interpolate(digits.x.float(), (28, 28), mode="bilinear").round().to(torch.uint8)
    names = (*animals.classes, *(f"digit {name}" for name in digits.classes))
    y = torch.cat([animals.y, digits.y + len(animals.classes)])
    return Source("animals and digits", torch.cat([animals.x, larger]), y, names, "image")


def pictures() -> Source:
    """Images for a pretrained backbone: the test classes of GTSRB, one frame a track; else the packaged animals."""
    path = _file("vision", "gtsrb_tracks_32.npz")
    if path is None:
        return packaged.load("animals")
    return signs(path, "GTSRB test classes").split(seed=0).test


def signs(path: Path, name: str) -> Source:
    """Traffic signs of GTSRB, one frame of each track: frames of one track are nearly copies."""
    archive = np.load(path)
    labels = archive["labels"]
    _, first = np.unique(np.stack([labels, archive["tracks"]]), axis=1, return_index=True)
    x = torch.from_numpy(archive["images"][first]).permute(0, 3, 1, 2).contiguous()
    y = torch.from_numpy(np.unique(labels[first], return_inverse=True)[1])
    return Source(name, x, y, tuple(f"sign {label:02d}" for label in np.unique(labels)), "image")


def intents() -> Source:
    """Texts by intent: BANKING77's test queries; else the packaged home-intents."""
    path = _file("text", "banking77", "test.csv")
    if path is None:
        return packaged.load("home-intents")
    source = from_csv(path, text="text", label="category")
    return from_arrays(source.x, [source.classes[c] for c in source.y.tolist()], name="BANKING77")


def described(source: Source) -> str:
    return f"{source.name}, {len(source):,} examples of {len(source.classes):,} classes"


def _file(*parts: str) -> Path | None:
    root = os.environ.get("METAFIT_DATA")
    path = Path(root).joinpath(*parts) if root else None
    return path if path is not None and path.exists() else None
