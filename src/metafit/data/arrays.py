"""Sources from what is in memory: arrays, lists, Hugging Face datasets."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metafit.data.folder import check_images
from metafit.data.labels import encode
from metafit.data.rows import lazily
from metafit.data.source import Source
from metafit.data.store import load, load_array
from metafit.errors import BadInput, unknown


def from_arrays(x: Any, y: Any, classes: Sequence[str] | None = None, name: str = "arrays") -> Source:
    """A source from arrays, tensors, pandas objects or lists.

    Args:
        x: numbers (N, F); uint8 images (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3; or a list of texts
            (str), of image paths (Path) or of PIL images.
        y: one label an example: class names, or integers.
        classes: class names, which integer labels are indices of; by default the sorted labels.
        name: what messages call it.

    Raises:
        BadInput: shapes or types do not fit, a missing label, one class only, or features that are not finite.

    >>> from_arrays([[0.0, 1.0], [1.0, 0.0]], ["left", "right"]).classes
    ('left', 'right')
    """
    return _source(*_inputs(x, name), y, classes, name)


def from_file(
    x: str | os.PathLike[str], y: Any, classes: Sequence[str] | None = None, name: str | None = None
) -> Source:
    """A source over the numbers in a file. Those of more than 256 MiB stay there: a task reads the rows it needs.

    The rows are read once when the source is made, some at a time, to find numbers that are missing or infinite.

    Args:
        x: a ``.npy`` file, or a ``.safetensors`` file of one tensor: what :func:`from_arrays` takes as an array.
        y: one label an example, as :func:`from_arrays` takes them, or a ``.npy`` file of them.
        classes: class names, which integer labels are indices of; by default the sorted labels.
        name: what messages call it; by default the name of the file.

    Raises:
        BadInput: a file is missing, damaged or of another kind, or as :func:`from_arrays`.
    """
    name = Path(x).stem if name is None else name
    rows = load(x)
    _, modality = _tensor(rows[:1], name)
    labels = load_array(y) if isinstance(y, (str, os.PathLike)) else y
    return _source(lazily(lambda some: _tensor(some, name)[0], rows), modality, labels, classes, name)


def _source(x: Any, modality: str, y: Any, classes: Sequence[str] | None, name: str) -> Source:
    found = _integers(y) if classes is None else None
    if found is None:
        labels, names = _labels(y, classes, name)
        _check_lengths(len(x), len(labels), name)
        if names is None:
            # Integers are sorted as numbers, so that class 10 comes after class 9.
            names = sorted(set(labels), key=int) if _all_integers(y) else None
        found = encode(labels, name, names)
    _check_lengths(len(x), len(found[0]), name)
    return Source(name, x, *found, modality)


def _check_lengths(examples: int, labels: int, name: str) -> None:
    if examples != labels:
        raise BadInput(f"{name}: x has {examples} examples and y has {labels} labels; give one label each")


def _integers(y: Any) -> tuple[Tensor, tuple[str, ...]] | None:
    """Indices and classes of an array of integers, in no time for millions; None where it is none, or of one class."""
    array = y.detach().cpu().numpy() if isinstance(y, Tensor) else y
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iu":
        return None
    values, indices = np.unique(array, return_inverse=True)
    return (torch.from_numpy(indices), tuple(map(str, values.tolist()))) if len(values) > 1 else None


def from_huggingface(dataset: Any, x: str = "text", y: str = "label") -> Source:
    """A source from one split of a ``datasets.Dataset``.

    Args:
        dataset: the split, for instance ``datasets.load_dataset(...)["train"]``.
        x: the column of texts, images, or sequences of numbers of one length.
        y: the column of labels; the names of a ``ClassLabel`` are used, without those that do not occur.

    Raises:
        BadInput: a dictionary of splits, no such column, a missing label, or as :func:`from_arrays`.
    """
    if isinstance(dataset, dict):
        splits = ", ".join(map(repr, dataset))
        raise BadInput(f"Hugging Face dataset: it has several splits ({splits}); choose one, for instance dataset[...]")
    name = str(getattr(dataset.info, "dataset_name", None) or "dataset")
    for column in (x, y):
        if column not in dataset.column_names:
            raise unknown(f"column of {name}", column, dataset.column_names)
    labels = list(dataset[y])
    known = getattr(dataset.features[y], "names", None)
    if known is not None:
        missing = next((row for row, label in enumerate(labels) if label is None or label < 0), None)
        if missing is not None:
            raise BadInput(f"{name}: the label in data row {missing + 1} is missing; choose a split that has labels")
        labels = [known[label] for label in labels]
    return from_arrays(_hub_column(dataset, x), labels, name=name)


def _hub_column(dataset: Any, column: str) -> Any:
    kind = type(dataset.features[column]).__name__
    if kind != "Image":
        return list(dataset.with_format(None)[column])
    from datasets import Image
    from PIL import Image as pil

    encoded = dataset.cast_column(column, Image(decode=False))[column]
    # Opening reads the header alone: the pixels are decoded when they are needed.
    return [pil.open(BytesIO(item["bytes"])) if item["bytes"] else pil.open(item["path"]) for item in encoded]


def _inputs(x: Any, name: str) -> tuple[Any, str]:
    if not isinstance(x, (Tensor, np.ndarray)):
        x = x.to_numpy() if hasattr(x, "to_numpy") else list(x)
    if isinstance(x, np.ndarray) and x.dtype.kind in "OUST" and x.ndim == 1:
        x = x.tolist()
    if isinstance(x, list):
        if not x:
            raise BadInput(f"{name}: x is empty; give at least one example a class")
        if isinstance(x[0], str):
            return _texts(x, name), "text"
        if isinstance(x[0], os.PathLike):
            files = [Path(file) for file in x]
            check_images(files)
            return files, "image"
        if type(x[0]).__module__.startswith("PIL."):
            return x, "image"
        x = _stacked(x, name)
    return _tensor(x if isinstance(x, Tensor) else _as_tensor(x, name), name)


def _texts(x: list[Any], name: str) -> list[str]:
    for row, text in enumerate(x):
        if not isinstance(text, str) or not text.strip():
            what = "empty" if isinstance(text, str) or text is None else f"a {type(text).__name__}, not a text"
            raise BadInput(f"{name}: the text in data row {row + 1} is {what}; fill it in or drop the row")
    return x


def _stacked(x: list[Any], name: str) -> Any:
    try:
        return torch.stack(x) if isinstance(x[0], Tensor) else np.asarray(x)
    except (ValueError, RuntimeError, TypeError) as error:
        raise BadInput(f"{name}: the examples of x differ in shape; give all the same number of features") from error


def _as_tensor(x: np.ndarray, name: str) -> Tensor:
    if x.dtype.kind not in "fiub":
        raise BadInput(f"{name}: x holds {x.dtype}, not numbers, texts or images; convert it")
    if x.dtype.kind == "u" and x.dtype != np.uint8:
        x = x.astype(np.float64)
    return torch.from_numpy(np.array(x, order="C"))


def _tensor(x: Tensor, name: str) -> tuple[Tensor, str]:
    if x.ndim == 2:
        return x.float(), "vector"
    if x.dtype == torch.uint8 and x.ndim == 3:
        return x[:, None], "image"
    if x.dtype == torch.uint8 and x.ndim == 4:
        if x.shape[1] in (1, 3):
            return x, "image"
        if x.shape[3] in (1, 3):
            return x.permute(0, 3, 1, 2).contiguous(), "image"
    raise BadInput(
        f"{name}: x of shape {tuple(x.shape)} and {x.dtype} is neither features (N, F) nor uint8 images (N, H, W), "
        "(N, H, W, C) or (N, C, H, W) with C 1 or 3; reshape it"
    )


def _labels(y: Any, classes: Sequence[str] | None, name: str) -> tuple[list[str], list[str] | None]:
    """Labels as strings, and the class names where they are given."""
    values = _values(y)
    for row, value in enumerate(values):
        if value is None or (isinstance(value, float) and math.isnan(value)):
            raise BadInput(f"{name}: the label in data row {row + 1} is missing; fill it in or drop the row")
        if isinstance(value, float) and not value.is_integer():
            raise BadInput(
                f"{name}: the label in data row {row + 1} is {value}, a number and not a class; "
                "to predict numbers use a regressor"
            )
    if classes is None:
        return [str(int(v)) if isinstance(v, float) else str(v) for v in values], None
    names = [str(c) for c in classes]
    if values and not isinstance(values[0], str):
        for row, value in enumerate(values):
            if not 0 <= int(value) < len(names):
                raise BadInput(f"{name}: class index {value} in data row {row + 1} is not from 0 to {len(names) - 1}")
        values = [names[int(value)] for value in values]
    return [str(value) for value in values], names


def _values(y: Any) -> list[Any]:
    if isinstance(y, Tensor):
        y = y.detach().cpu().numpy()
    if hasattr(y, "to_numpy"):
        y = y.to_numpy()
    array = y if isinstance(y, np.ndarray) else None
    if array is not None and array.ndim != 1:
        raise BadInput(f"labels of shape {array.shape}: one label an example is needed, (N,)")
    return [v.item() if isinstance(v, np.generic) else v for v in y]


def _all_integers(y: Any) -> bool:
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in _values(y))
