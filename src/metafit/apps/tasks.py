"""The training tasks of a comparison, balanced over families, and how different they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metafit.apps.packed import packed
from metafit.data import Source, TaskSampler
from metafit.data.diversity import leverages, similarities, task_embeddings
from metafit.data.families import Families, domain_sources
from metafit.data.sampler import Tasks
from metafit.evaluation import describe_tasks
from metafit.evaluation.evaluate import move
from metafit.task import Examples, Task, take

Balance = Literal["uniform", "loss", "diversity", "uncertainty"]
LOOKED_AT = 100  # tasks of each kind
EACH = 16  # of a family
QUERIES = 5  # a class, for embeddings


def balanced(
    source: Source, make: Callable[[Source], TaskSampler], balance: Balance, body: nn.Module | None, seed: int
) -> Tasks:
    """Tasks within the domains of the source: ``"uniform"``, by ``"loss"``, by ``"diversity"`` of the families, or
    uniform with their weights in the loss learned (``"uncertainty"``).

    Raises:
        BadInput: the source has no domains.
    """
    samplers = {domain: make(part) for domain, part in domain_sources(source).items()}
    by: Any = balance if balance == "loss" else "uniform"
    if balance == "diversity":
        middles = torch.stack([embeddings(sampler, body, EACH).mean(0) for sampler in samplers.values()])
        by = dict(zip(samplers, leverages(similarities(middles)).tolist(), strict=True))
    return Families({domain: packed(sampler, body) for domain, sampler in samplers.items()}, by, seed=seed)


def task_report(training: Source, test: TaskSampler, body: nn.Module | None) -> dict[str, Any]:
    """The diversity of the training tasks and the likeness of the test tasks, drawn as the test draws them."""
    way, shot = test.ways[1], test.shots[1]
    query = min(QUERIES, test.query)
    train = TaskSampler(training, min(way, len(training.classes)), shot, query, seed=test.seed)
    unseen = TaskSampler(test.source, test.way, test.shot, query, seed=test.seed)
    return describe_tasks(embeddings(train, body, LOOKED_AT), embeddings(unseen, body, LOOKED_AT))


def embeddings(sampler: TaskSampler, body: nn.Module | None, count: int) -> Tensor:
    """``task_embeddings`` of the first tasks, in the features that the network gives before any training."""
    drawn = packed(sampler, body).tasks(0, count)
    return task_embeddings(Task(*(in_features(part, body) for part in drawn)))


def in_features(examples: Examples, body: nn.Module | None) -> Examples:
    """The examples of a batch of tasks in the features that the network gives; as they are where there is none."""
    if body is None:
        return examples
    device = next(body.parameters()).device
    with torch.no_grad():
        rows = [body(move(take(examples.x, task), device)) for task in range(len(examples.y))]
    return examples._replace(x=torch.stack(rows).to(examples.y.device))
