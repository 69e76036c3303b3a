"""Runs learners over the same unseen tasks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from metafit.data.sampler import Tasks
from metafit.errors import BadInput
from metafit.evaluation.statistics import coverage, interval, reliability
from metafit.learners import Learner, check_tasks
from metafit.over_tasks import Backend, over_tasks
from metafit.progress import progress
from metafit.task import Examples, Task, take, weights

TIMED_TASKS = 20
CURVE_POINTS = 11


@dataclass(frozen=True)
class Evaluation:
    """What a learner did on T tasks of Q queries, at S moments of its adaptation: before it, and up to 10 in it.

    Attributes:
        score: accuracy (or mean squared error) of each task at each moment ``(T, S)``; the last column is the result.
        loss: query loss, likewise; ``support_loss``: of the examples that were learned from.
        steps: the adaptation step of each moment ``(S,)``.
        answers, confidence: predicted class and its probability ``(T, Q)``; ``None`` for regression.
        right: whether the answer was right ``(T, Q)``; ``counted``: whether the query counts (is no padding).
        level: of a predicted density, the probability of the smallest central interval that holds the target
            ``(T, Q, D)``; ``None`` where none is predicted.
        adapt_ms: milliseconds that adapting to one task took, of the first tasks, one at a time.
    """

    metric: str
    score: Tensor
    loss: Tensor
    support_loss: Tensor
    adapt_ms: Tensor
    steps: Tensor
    answers: Tensor | None = None
    confidence: Tensor | None = None
    right: Tensor | None = None
    counted: Tensor | None = None
    level: Tensor | None = None

    def metrics(self) -> dict[str, Any]:
        """Each metric's mean and 95 % interval over tasks."""
        measured: dict[str, Any] = {self.metric: interval(self.score[:, -1]), "loss": interval(self.loss[:, -1])}
        if self.counted is not None:
            measured["ece"] = {"mean": round(self._reliability()[0], 6), "ci95": None}
        measured["adapt_ms"] = interval(self.adapt_ms)
        return measured

    def curve(self) -> list[dict[str, Any]]:
        """The metrics by adaptation step."""
        measured = {self.metric: self.score, "loss": self.loss, "support_loss": self.support_loss}
        return [
            {"step": step, **{name: interval(values[:, i]) for name, values in measured.items()}}
            for i, step in enumerate(self.steps.tolist())
        ]

    def calibration(self) -> list[dict[str, Any]]:
        return [] if self.counted is None else self._reliability()[1]

    def minus(self, other: Evaluation) -> dict[str, Any]:
        """The paired difference of the metric on the same tasks: this one minus the other."""
        return {"metric": self.metric, **interval(self.score[:, -1] - other.score[:, -1])}

    def _reliability(self) -> tuple[float, list[dict[str, Any]]]:
        assert self.counted is not None
        if self.level is not None:
            return coverage(self.level[self.counted].flatten())
        assert self.confidence is not None and self.right is not None
        return reliability(self.confidence[self.counted], self.right[self.counted])


def evaluate(
    learner: Learner,
    tasks: Tasks,
    episodes: int = 600,
    backend: Backend = "auto",
    title: str = "evaluate",
    show_progress: bool = True,
) -> Evaluation:
    """Adapts the learner to each of the first ``episodes`` tasks and measures it on their query sets.

    Args:
        learner: in whatever mode; it is evaluated in evaluation mode, without gradients to the meta-parameters.
        tasks: a sampler; the task with a given (seed, index) is always the same, so that evaluations are paired.
        episodes: how many tasks; 600 or more give an interval worth printing.

    Raises:
        BadInput: fewer than one episode, or tasks that are not of the learner's kind or have more classes than it tells
            apart.
    """
    if episodes < 1:
        raise BadInput(f"episodes {episodes}: needs at least 1")
    check_tasks(learner, tasks)
    was_training, device = learner.training, _device(learner)
    learner.eval()
    try:
        with torch.no_grad(), progress(title, episodes, "tasks", show_progress) as advance:
            parts = []
            for start in range(0, episodes, tasks.batch):
                stop = min(start + tasks.batch, episodes)
                part = over_tasks(partial(_episode, learner), move(tasks.tasks(start, stop), device), backend)
                parts.append({name: value.cpu() for name, value in part.items()})
                advance(stop - start)
            adapt_ms = _adaptation_times(learner, tasks, min(TIMED_TASKS, episodes), device)
    finally:
        learner.train(was_training)
    joined = {name: _together([part[name] for part in parts]) for name in parts[0]}
    joined["steps"] = joined["steps"][0]  # the same in every task
    return Evaluation(learner.measured_by, adapt_ms=adapt_ms, **joined)


def compare(
    learners: Mapping[str, Learner], tasks: Tasks, episodes: int = 600, show_progress: bool = True
) -> dict[str, Evaluation]:
    """Evaluates every learner on the same tasks, so that their differences can be paired."""
    return {
        name: evaluate(learner, tasks, episodes, title=f"evaluate {name}", show_progress=show_progress)
        for name, learner in learners.items()
    }


def move(tasks: Task, device: torch.device) -> Task:
    """The tasks on that device."""
    return tree_map(lambda leaf: None if leaf is None else leaf.to(device, non_blocking=True), tasks)


def _episode(learner: Learner, task: Task) -> dict[str, Tensor]:
    """One task's figures, by adaptation step."""
    query = task.query
    path = learner.path(task)
    kept = curve_steps(len(path))
    outputs = [learner.predict(path[step], query.x) for step in kept]
    scored = [learner.score(output, query) for output in outputs]
    learned = [learner.score(learner.predict(path[step], task.support.x), task.support)[0] for step in kept]
    figures = {
        "score": torch.stack([metrics[learner.measured_by] for _, metrics in scored]),
        "loss": torch.stack([loss for loss, _ in scored]),
        "support_loss": torch.stack(learned),
        "steps": torch.tensor(kept),
    }
    if learner.way is not None:
        return figures | _answers(outputs[-1], query)
    return figures | _levels(outputs[-1], query) if learner.gaussian else figures


def curve_steps(length: int) -> list[int]:
    """Which states of a trajectory are measured: all of a short one, of a long one 11 that lie evenly.

    >>> curve_steps(51)
    [0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50]
    """
    points = min(length, CURVE_POINTS)
    return [round(i * (length - 1) / max(1, points - 1)) for i in range(points)]


def _answers(logits: Tensor, query: Examples) -> dict[str, Tensor]:
    confidence, answers = logits.softmax(-1).max(-1)
    confidence = confidence.nan_to_num(0.0)  # of an adaptation that diverged
    counted = weights(query) > 0
    return {"answers": answers, "confidence": confidence, "right": answers == query.y, "counted": counted}


def _levels(outputs: Tensor, query: Examples) -> dict[str, Tensor]:
    mean, log_variance = outputs.chunk(2, -1)
    apart = (query.y - mean).abs() * (-0.5 * log_variance).exp()
    return {"level": torch.erf(apart / 2**0.5), "counted": weights(query) > 0}


def _together(parts: list[Tensor]) -> Tensor:
    """Of all batches ``(T, ...)``; families may differ in their queries: the missing ones do not count."""
    widest = max(part.shape[1] for part in parts)
    return torch.cat([torch.cat([p, p.new_zeros(len(p), widest - p.shape[1], *p.shape[2:])], 1) for p in parts])


def _adaptation_times(learner: Learner, tasks: Tasks, count: int, device: torch.device) -> Tensor:
    times: list[float] = []
    for i in range(count):
        one: Any = move(take(tasks.tasks(i, i + 1), 0), device)
        if not times:
            learner.path(one)  # the first call pays for warming up
        begin = time.perf_counter()
        learner.path(one)
        if one.support.y.is_cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    return torch.tensor(times)


def _device(learner: Learner) -> torch.device:
    return next((p.device for p in learner.parameters()), torch.device("cpu"))
