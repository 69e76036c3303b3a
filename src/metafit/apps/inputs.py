"""From what people pass (texts, images, rows of numbers) to what a learner reads."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metafit import backbones
from metafit.backbones.base import Backbone
from metafit.errors import BadInput
from metafit.images import SUFFIXES

BATCH = 256  # inputs that a learner predicts at once, so that memory stays bounded
TOGETHER = 1024  # where an answer depends on the others


@dataclass
class Inputs:
    """What inputs go through before a learner sees them; the same in ``fit`` and in ``predict``.

    Attributes:
        modality: of the inputs: "text", "image" or "vector".
        backbone: its name, or the backbone itself where no name can load it, or where it is a part of the learner.
        options: what a named backbone is loaded with.
        trained: whether the backbone is a part of the learner, which then reads preprocessed inputs, not features.
        dtype: of numeric inputs.
        mean, scale: ``(F,)``, numeric features x become (x − mean) / scale; ``None`` leaves them as they are.
    """

    modality: str
    backbone: str | Backbone | None = None
    options: dict[str, Any] = field(default_factory=dict)
    trained: bool = False
    dtype: torch.dtype = torch.float32
    mean: Tensor | None = None
    scale: Tensor | None = None

    @property
    def transductive(self) -> str:
        """Why the features of one input depend on the others; empty where they do not."""
        if self.backbone is None or self.trained:
            return ""
        return "batch statistics of the backbone" if load_backbone(self.backbone, self.options).transductive else ""

    def standardise(self, x: np.ndarray) -> None:
        """Learns mean and scale from rows ``(N, F)``: their squared lengths then average 1, whatever F is.

        A penalty then weighs the same on 4 features as on 400.
        """
        from sklearn.preprocessing import StandardScaler

        scaler = StandardScaler().fit(x)
        self.mean = torch.tensor(scaler.mean_, dtype=self.dtype)
        self.scale = torch.tensor(scaler.scale_, dtype=self.dtype) * x.shape[1] ** 0.5

    def rescale(self, mean: Tensor, variance: Tensor) -> None:
        """Takes mean and scale from the moments ``(F,)`` of rows, as ``standardise`` does from the rows."""
        spread = variance.sqrt()
        varies = spread > 1e-12 * mean.abs()  # what a constant column has is rounding
        self.mean, self.scale = mean, torch.where(varies, spread, 1.0) * len(mean) ** 0.5

    def kept(self, x: Any) -> Any:
        """The form to remember inputs in: frozen features; rows as they are; texts, or what an image becomes, for a
        network that is trained."""
        if not self.trained:
            return self._embedded(x)
        return list(x) if self.modality == "text" else self._preprocess(x)

    def read(self, kept: Any) -> Any:
        """What is remembered, as one batch for the learner."""
        if not self.trained:
            return kept if self.mean is None or self.scale is None else (kept - self.mean) / self.scale
        return self._preprocess(kept) if self.modality == "text" else kept

    def batches(self, x: Any, together: bool) -> Iterator[Any]:
        """The inputs as batches for the learner, in order: see ``parts``."""
        whole = x if self.trained else self._embedded(x)
        for part in parts(len(whole), together):
            yield self._preprocess(whole[part]) if self.trained else self.read(whole[part])

    def _embedded(self, x: Any) -> Tensor:
        """Frozen features of all inputs ``(N, F)``."""
        if self.backbone is None:
            return _tensor(x, self.dtype)
        items = _tensor(x, torch.float32) if self.modality == "vector" else x
        z = load_backbone(self.backbone, self.options).embed(items)
        bad = torch.nonzero(~torch.isfinite(z).all(1))
        if len(bad):
            raise BadInput(f"X: the backbone gives a feature that is not finite for index {int(bad[0, 0])}; drop it")
        return z

    def _preprocess(self, x: Any) -> Any:
        if isinstance(self.backbone, Backbone):
            return self.backbone.preprocess(x)
        return _tensor(x, self.dtype)


def parts(count: int, together: bool) -> Iterator[slice]:
    """Parts of so many inputs that are near-equal, as few inputs say little of each other: of up to ``TOGETHER``,
    where answers depend on each other, else of up to ``BATCH``."""
    number = max(1, math.ceil(count / (TOGETHER if together else BATCH)))
    for i in range(number):
        yield slice(i * count // number, (i + 1) * count // number)


def _tensor(x: Any, dtype: torch.dtype) -> Tensor:
    return torch.tensor(np.ascontiguousarray(x), dtype=dtype)  # a view may run backwards, which torch takes no array of


def load_backbone(backbone: str | Backbone, options: dict[str, Any]) -> Backbone:
    """A backbone by name; estimators share the one that is loaded."""
    return backbone if isinstance(backbone, Backbone) else _loaded(backbone, json.dumps(options, sort_keys=True))


@lru_cache(maxsize=4)
def _loaded(name: str, options: str) -> Backbone:
    return backbones.load(name, **json.loads(options))


def modality_of(x: Any) -> str:
    """What X holds, by its shape and its first item: "text", "image", or "vector" for all that is neither.

    >>> modality_of(["lights off"]), modality_of([Path("cat.png")]), modality_of([[1.0, 2.0]])
    ('text', 'image', 'vector')
    """
    if isinstance(x, (np.ndarray, Tensor)) and x.ndim != 1:
        return "image" if x.ndim in (3, 4) and str(x.dtype).endswith("uint8") else "vector"
    items = _listed(x, "text")
    first = next((item for item in items or () if not _missing(item)), None)
    if isinstance(first, str):
        return "text"
    if isinstance(first, os.PathLike) or type(first).__module__.startswith("PIL."):
        return "image"
    pixels = isinstance(first, (np.ndarray, Tensor)) and str(first.dtype).endswith("uint8") and first.ndim > 1
    return "image" if pixels else "vector"


def raw_items(x: Any, modality: str) -> list[Any]:
    """Texts or images as a list, once each of them is known to be one.

    Raises:
        BadInput: X is empty, or names the index of the first item that is missing, blank or of another kind.
    """
    listed = _listed(x, modality)
    if not listed:
        what = "is empty" if listed == [] else f"is a {type(x).__name__}"
        raise BadInput(f"X {what}; pass a list of {modality}s")
    for index, item in enumerate(listed):
        blank = _missing(item) or (isinstance(item, str) and not item.strip())
        if blank:
            raise BadInput(f"X: the {modality} at index {index} is empty; fill it in or drop it and its label")
        if modality == "text" and not isinstance(item, str):
            raise BadInput(f"X: index {index} is a {type(item).__name__}, not a text; X must hold texts only")
    if modality == "text":
        if all(Path(item).suffix.lower() in SUFFIXES and " " not in item for item in listed):
            raise BadInput("X holds names of image files as texts; pass them as pathlib.Path")
        return listed
    return [Path(item) if isinstance(item, str) else item for item in listed]


def missing_label(labels: np.ndarray) -> int | None:
    """The index of the first label that is missing or blank."""
    if labels.dtype.kind not in "OUT":
        return None
    found = (i for i, v in enumerate(labels.ravel()) if _missing(v) or (isinstance(v, str) and not v.strip()))
    return next(found, None)


def _missing(item: Any) -> bool:
    if item is None:
        return True
    return (isinstance(item, float) and item != item) or type(item).__name__ in ("NAType", "NaTType")


def _listed(x: Any, modality: str) -> list[Any] | None:
    """The items of a one-dimensional container; ``None`` for anything else. One text is no container of letters."""
    if isinstance(x, (str, bytes)):
        raise BadInput(f"X is one {modality}; pass a list of {modality}s, [{modality}] for one")
    if isinstance(x, (np.ndarray, Tensor)):
        return list(x) if x.ndim else None
    if isinstance(x, Sequence):
        return list(x)
    one_dimensional = getattr(x, "ndim", 1) == 1
    for method in ("tolist", "to_list", "to_pylist"):
        if one_dimensional and hasattr(x, method):
            return list(getattr(x, method)())
    return None
