"""Whether a new task is like those that a model was trained on."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from metafit.apps.packed import packed
from metafit.apps.tasks import in_features
from metafit.backbones.base import Backbone
from metafit.data import Source, TaskSampler
from metafit.data.diversity import likeness, task_embeddings
from metafit.data.sampler import Range
from metafit.evaluation import describe_tasks
from metafit.learners import Learner
from metafit.task import Examples, Task
from metafit.training import Model

KEPT = 100  # training tasks


def network_of(learner: Learner) -> Backbone | None:
    """The network that the learner has learned; ``None`` where it reads frozen features."""
    return next((part for part in learner.modules() if isinstance(part, Backbone)), None)


def kept(training: Source, shot: Range, learner: Learner) -> Tensor:
    """Embeddings of training tasks by their support sets alone, as ``usual`` sees a new task."""
    most = shot if isinstance(shot, int) else shot[1]
    network = network_of(learner)
    sampler = TaskSampler(training, (2, min(5, len(training.classes))), most, 1)
    return _embeddings(packed(sampler, network).tasks(0, KEPT).support, network)


def usual(support: Examples, known: Tensor, learner: Learner) -> float:
    """How usual a new task is among training tasks, 0 to 1: see ``likeness``."""
    one = tree_map(lambda leaf: None if leaf is None else leaf[None], support)
    return float(likeness(_embeddings(one, network_of(learner)).float(), known)["rank"][0])


def report_beside(test: TaskSampler, model: Model) -> dict[str, Any] | None:
    """``task_report`` of tasks that the model was not trained with; ``None`` where it did not keep its own."""
    if model.tasks is None:
        return None
    network = network_of(model.learner)
    return describe_tasks(model.tasks, _embeddings(packed(test, network).tasks(0, KEPT).support, network).float())


def _embeddings(supports: Examples, network: nn.Module | None) -> Tensor:
    seen = in_features(supports, network)
    return task_embeddings(Task(seen, seen))
