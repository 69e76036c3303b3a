"""Whether a new task is like those that a model was trained on."""

from __future__ import annotations

from torch import Tensor
from torch.utils._pytree import tree_map

from metafit.data import Source, TaskSampler
from metafit.data.diversity import likeness, task_embeddings
from metafit.data.sampler import Range
from metafit.task import Examples, Task

KEPT = 100  # training tasks


def kept(training: Source, shot: Range) -> Tensor:
    """Embeddings of training tasks by their support sets alone, as ``usual`` sees a new task; of frozen features."""
    most = shot if isinstance(shot, int) else shot[1]
    drawn = TaskSampler(training, (2, min(5, len(training.classes))), most, 1).tasks(0, KEPT)
    return task_embeddings(Task(drawn.support, drawn.support))


def usual(support: Examples, known: Tensor) -> float:
    """How usual a new task is among training tasks, 0 to 1: see ``likeness``."""
    one = tree_map(lambda leaf: None if leaf is None else leaf[None], support)
    return float(likeness(task_embeddings(Task(one, one)).float(), known)["rank"][0])
