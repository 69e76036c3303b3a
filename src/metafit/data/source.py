"""A source: labelled examples of many classes, and its split into disjoint sets of classes."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from metafit.data.rows import StoredRows, pieces
from metafit.errors import BadInput

MODALITIES = ("text", "image", "vector")


class Splits(NamedTuple):
    """Three sources with no class in common; ``validation`` is None where its share is 0."""

    train: Source
    validation: Source | None
    test: Source


@dataclass(frozen=True, eq=False)
class Source:
    """Labelled examples of two classes or more, checked when made.

    Attributes:
        name: what messages and results call it.
        x: a tensor, rows that stay on disk, or a pytree of these (leading dimension = examples), the learner's
            input; or a list of raw items: texts, or paths of images.
        y: the class index of each example (N,), int64.
        classes: the name of each class (C,).
        modality: "text", "image" or "vector".
        raw: what a person can look at, one item an example (texts, image paths, uint8 CHW tensors); None means ``x``.
        domains: the domain of each class (C,), for splits by domain.
        columns: what the columns of rows ``x`` are called, where they came with names.

    Raises:
        BadInput: lengths differ, fewer than two classes, a class without examples, an index out of range, or a
            feature that is not finite.

    >>> source = Source("sum", torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([0, 1, 1]), ("none", "some"), "vector")
    >>> source.counts
    tensor([1, 2])
    """

    name: str
    x: Any
    y: Int64[Tensor, " n"]
    classes: tuple[str, ...]
    modality: str
    raw: Sequence[Any] | None = None
    domains: tuple[str, ...] | None = None
    columns: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.modality not in MODALITIES:
            raise BadInput(f"{self.name}: modality {self.modality!r} is not one of {', '.join(MODALITIES)}")
        if self.y.ndim != 1 or self.y.dtype != torch.int64:
            raise BadInput(f"{self.name}: y must be int64 of shape (N,), not {self.y.dtype} of {tuple(self.y.shape)}")
        self._check_lengths()
        self._check_classes()
        if not is_raw(self.x):
            for leaf in tree_leaves(self.x):
                _check_finite(self.name, leaf)

    def __len__(self) -> int:
        return int(self.y.shape[0])

    def __repr__(self) -> str:
        return f"Source({self.name!r}: {len(self)} examples of {len(self.classes)} classes, {self.modality})"

    @property
    def counts(self) -> Int64[Tensor, " c"]:
        """The number of examples of each class."""
        return torch.bincount(self.y, minlength=len(self.classes))

    def subset(self, classes: Sequence[int]) -> Source:
        """The examples of some classes, re-indexed in the order given; examples keep their order."""
        wanted = [int(c) for c in classes]
        if len(set(wanted)) != len(wanted) or any(not 0 <= c < len(self.classes) for c in wanted):
            raise BadInput(
                f"{self.name}: class indices must be distinct and from 0 to {len(self.classes) - 1}: {wanted}"
            )
        new_index = torch.full((len(self.classes),), -1, dtype=torch.int64)
        new_index[wanted] = torch.arange(len(wanted))
        y = new_index[self.y.cpu()]
        keep = torch.nonzero(y >= 0)[:, 0]
        return replace(
            self,
            x=_rows(self.x, keep) if is_raw(self.x) else tree_map(lambda leaf: _rows(leaf, keep), self.x),
            y=y[keep].to(self.y.device),
            classes=tuple(self.classes[c] for c in wanted),
            raw=None if self.raw is None else _rows(self.raw, keep),
            domains=None if self.domains is None else tuple(self.domains[c] for c in wanted),
        )

    def split(self, train: float = 0.6, validation: float = 0.15, seed: int = 0, by_domain: bool = False) -> Splits:
        """Disjoint meta-train, validation and test *classes*; the test classes are what the other two leave.

        The sorted class names are permuted by ``numpy.random.default_rng(seed)``; the first ``train`` of them are
        for meta-training, the next ``validation`` for validation. By domain, whole domains are taken in the order
        of their sorted names, rounded down (10 domains: 6, 1, 3).

        Raises:
            BadInput: a part gets fewer than two classes, or there are no domains to split by.
        """
        if not (0 < train < 1 and 0 <= validation < 1 and train + validation < 1):
            raise BadInput(f"{self.name}: split shares {train} and {validation} must leave some classes for the test")
        groups = self._domain_groups() if by_domain else self._class_groups(seed)
        rounded = _floor if by_domain else round
        first = rounded(train * len(groups))
        second = first + (max(1, rounded(validation * len(groups))) if validation else 0)
        parts = [
            [c for group in part for c in group] for part in (groups[:first], groups[first:second], groups[second:])
        ]
        sizes = [len(part) for part in parts]
        if min(sizes[0], sizes[2]) < 2 or (validation and sizes[1] < 2):
            raise BadInput(
                f"{self.name}: its {len(self.classes)} classes split into {sizes[0]} for training, {sizes[1]} for "
                f"validation and {sizes[2]} for testing, and each needs 2; add classes"
                + (", or change the shares (validation=0 needs none)" if validation else "")
            )
        return Splits(self.subset(parts[0]), self.subset(parts[1]) if validation else None, self.subset(parts[2]))

    def with_x(self, x: Any, modality: str | None = None) -> Source:
        """The same examples in another representation; ``raw`` stays what a person can look at."""
        return replace(self, x=x, modality=modality or self.modality, raw=self.x if self.raw is None else self.raw)

    def digest(self) -> str:
        """A hash of the content of ``x``: tensors, texts, or the bytes of the image files."""
        content = hashlib.sha256()
        leaves, structure = ([*self.x], "raw") if is_raw(self.x) else tree_flatten(self.x)
        content.update(str(structure).encode())
        for leaf in leaves:
            if isinstance(leaf, (Tensor, StoredRows)):
                size = leaf.dtype.itemsize * leaf.shape.numel()
                content.update(f"{leaf.dtype}{tuple(leaf.shape)}:{size}:".encode())
                for piece in pieces(leaf):
                    content.update(piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
                continue
            kind, data = _content(leaf)
            content.update(f"{kind}:{len(data)}:".encode())
            content.update(data)
        return content.hexdigest()

    def _check_lengths(self) -> None:
        lengths = [len(self.x)] if is_raw(self.x) else [int(leaf.shape[0]) for leaf in tree_leaves(self.x)]
        if self.raw is not None:
            lengths.append(len(self.raw))
        if not lengths or any(length != len(self) for length in lengths):
            raise BadInput(f"{self.name}: x has {'/'.join(map(str, lengths))} examples and y has {len(self)}")

    def _check_classes(self) -> None:
        if len(self.classes) < 2:
            known = f" ({self.classes[0]!r})" if self.classes else ""
            raise BadInput(
                f"{self.name}: {len(self.classes)} class{known}, at least 2 are needed to tell apart; add one"
            )
        if len(set(self.classes)) != len(self.classes):
            twice = Counter(self.classes).most_common(1)[0][0]
            raise BadInput(f"{self.name}: two classes are called {twice!r}; rename one")
        if self.domains is not None and len(self.domains) != len(self.classes):
            raise BadInput(f"{self.name}: {len(self.domains)} domains for {len(self.classes)} classes; give one each")
        outside = torch.nonzero((self.y < 0) | (self.y >= len(self.classes)))
        if len(outside):
            row = int(outside[0, 0])
            raise BadInput(
                f"{self.name}: class index {int(self.y[row])} in data row {row + 1} is not from 0 to "
                f"{len(self.classes) - 1}; correct the label"
            )
        empty = torch.nonzero(self.counts == 0)
        if len(empty):
            raise BadInput(
                f"{self.name}: class {self.classes[int(empty[0, 0])]!r} has no examples; add some or drop it"
            )

    def _class_groups(self, seed: int) -> list[list[int]]:
        by_name = sorted(range(len(self.classes)), key=lambda c: self.classes[c])
        return [[by_name[i]] for i in np.random.default_rng(seed).permutation(len(by_name))]

    def _domain_groups(self) -> list[list[int]]:
        if self.domains is None:
            raise BadInput(f"{self.name}: it has no domains to split by; split by class instead")
        groups: dict[str, list[int]] = defaultdict(list)
        for c in sorted(range(len(self.classes)), key=lambda c: self.classes[c]):
            groups[self.domains[c]].append(c)
        return [groups[domain] for domain in sorted(groups)]


def is_raw(x: Any) -> bool:
    """Whether ``x`` is a list of raw items (texts, paths, PIL images) and not a pytree of tensors."""
    return isinstance(x, Sequence) and not (len(x) and isinstance(x[0], (Tensor, list, tuple, dict)))


def _rows(items: Any, keep: Tensor) -> Any:
    if isinstance(items, Tensor):
        return items[keep.to(items.device)]
    if isinstance(items, StoredRows):
        return items.subset(keep)
    return [items[i] for i in keep.tolist()]


def _floor(share: float) -> int:
    return int(share + 1e-9)


def _check_finite(name: str, leaf: Tensor | StoredRows) -> None:
    if not leaf.dtype.is_floating_point or getattr(leaf, "finite", False):
        return
    first, count, start = 0, 0, 0
    for piece in pieces(leaf):
        bad = torch.nonzero(~torch.isfinite(piece).reshape(len(piece), -1).all(1))
        first = start + int(bad[0, 0]) if len(bad) and not count else first
        count, start = count + len(bad), start + len(piece)
    if count:
        raise BadInput(
            f"{name}: a feature in data row {first + 1} is missing or infinite ({count} such rows); "
            "fill in or drop those rows"
        )
    if isinstance(leaf, StoredRows):
        leaf.finite = True


def _content(leaf: Any) -> tuple[str, bytes]:
    if isinstance(leaf, str):
        return "text", leaf.encode("utf-8", "surrogatepass")
    if isinstance(leaf, os.PathLike):
        return "file", Path(leaf).read_bytes()
    return f"{leaf.mode}{leaf.size}", leaf.tobytes()  # a PIL image
