"""From labels as people write them to class indices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor

from metafit.errors import BadInput, unknown
from metafit.progress import say


def encode(
    labels: Sequence[str], where: str, classes: Sequence[str] | None = None
) -> tuple[Int64[Tensor, " n"], tuple[str, ...]]:
    """Class indices (N,) and class names, sorted unless ``classes`` gives them.

    Raises:
        BadInput: a label is blank, there is one class only, or a label is not one of ``classes``.
    """
    for row, label in enumerate(labels):
        if not label.strip():
            raise BadInput(f"{where}: the label in data row {row + 1} is missing; fill it in or drop the row")
    names = tuple(sorted(set(labels)) if classes is None else classes)
    if len(names) < 2:
        only = f"all {len(labels)} examples have the label {names[0]!r}" if names else "there are no examples"
        raise BadInput(f"{where}: {only}; at least 2 classes are needed, add examples of another")
    warn_lookalikes(names, where)
    index = {name: i for i, name in enumerate(names)}
    for row, label in enumerate(labels):
        if label not in index:
            raise BadInput(f"{where}: data row {row + 1}: {unknown('class', label, names)}")
    return torch.tensor([index[label] for label in labels], dtype=torch.int64), names


def warn_lookalikes(names: Sequence[str], where: str) -> None:
    """Tells of labels that differ only by blanks or case; they stay different classes."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        alike["".join(name.split()).casefold()].append(name)
    for group in alike.values():
        if len(group) > 1:
            say(
                f"{where}: the labels {' and '.join(map(repr, group))} differ only by blanks or case and are kept "
                "as different classes; correct them if they are one"
            )
