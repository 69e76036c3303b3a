"""People's verdicts on predictions, as the reward of the feedback loop: evaluation without a single test label."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metafit.apps.estimators import FewShotClassifier
from metafit.data.sampler import Tasks
from metafit.data.tables import table
from metafit.errors import BadInput
from metafit.training import Model

WORDS = {"true": True, "yes": True, "right": True, "1": True, "false": False, "no": False, "wrong": False, "0": False}


class Verdicts:
    """How often a model agrees with what people said of earlier predictions.

    The model adapts to the labelled examples of the user's task and answers for the inputs that were judged. An answer
    is worth 1 where it repeats a prediction that was said to be right, or differs from one said to be wrong; else 0. A
    different answer need not be the true one: verdicts of "right" tell more.

    Called with tasks of an even seed it looks at every other verdict, with an odd one at the others: so what chooses a
    change and what judges it are not the same verdicts.

    Args:
        x, y: the labelled examples of the task.
        inputs, said: what was asked, and the prediction that was judged.
        right: the verdicts ``(N,)``.

    Raises:
        BadInput: fewer than four verdicts, or verdicts on classes that the task has not.
    """

    def __init__(self, x: Any, y: Sequence[Any], inputs: Any, said: Sequence[Any], right: Sequence[bool]):
        if len(right) < 4:
            raise BadInput(f"verdicts: {len(right)} are too few to choose by and to judge by; collect 4 or more")
        strange = sorted({str(label) for label in said} - {str(label) for label in y})
        if strange:
            raise BadInput(f"verdicts: the prediction {strange[0]!r} is no class of the labelled examples; drop it")
        self.x, self.y, self.inputs = x, list(y), inputs
        self.said, self.right = np.asarray([str(label) for label in said]), torch.tensor(list(right))

    @property
    def about(self) -> str:
        """A hash of the task and the verdicts: another reward where they differ."""
        told = ([str(label) for label in self.y], self.said.tolist(), self.right.tolist())
        return hashlib.sha256(repr(told).encode()).hexdigest()

    def __call__(self, model: Model, tasks: Tasks, count: int) -> Tensor:
        few = FewShotClassifier(model=model).fit(self.x, self.y)
        half = torch.arange(len(self.right)) % 2 == tasks.seed % 2
        rows = np.flatnonzero(half.numpy())
        inputs = [self.inputs[i] for i in rows] if isinstance(self.inputs, list) else self.inputs[rows]
        agrees = torch.from_numpy(few.predict(inputs).astype(str) == self.said[rows])
        return (agrees == self.right[half]).double()


def read_verdicts(
    labelled: str | os.PathLike[str],
    judged: str | os.PathLike[str],
    text: str | None,
    label: str,
    features: Sequence[str] | None = None,
) -> Verdicts:
    """From the table that `metafit adapt` learned from, and what `metafit predict` wrote, with a column ``right``.

    Args:
        labelled: the table of labelled examples; ``text``, ``label``, ``features``: its columns.
        judged: a table with the same inputs, ``prediction`` and ``right`` (true or false, yes or no, 1 or 0).

    Raises:
        BadInput: a missing column, or a verdict that is none of these words.
    """
    known = table(labelled, text, label, features)
    columns = None if text else list(known.features)
    said = table(judged, text, "prediction", columns)
    verdicts = table(judged, text, "right", columns).y or []
    for i, word in enumerate(verdicts):
        if str(word).strip().lower() not in WORDS:
            raise BadInput(f"{judged}: row {i + 1}: the verdict {word!r} is none of: {', '.join(WORDS)}; correct it")
    right = [WORDS[str(word).strip().lower()] for word in verdicts]
    x, inputs = (part.x if isinstance(part.x, list) else part.x.numpy() for part in (known, said))
    return Verdicts(x, known.y or [], inputs, said.y or [], right)
