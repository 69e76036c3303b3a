"""What is wrong with a trained learner, in figures: what a change of structure or strategy is proposed from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metafit.data.sampler import Tasks
from metafit.evaluation import Evaluation, evaluate, interval
from metafit.evaluation.evaluate import move
from metafit.evaluation.statistics import gap
from metafit.learners import GradientLearner, Learner
from metafit.task import Task, take

PROBED = 16  # tasks whose gradients and movements are looked at

Figures = dict[str, Any]


def diagnose(
    learner: Learner,
    unseen: Evaluation,
    tasks: Tasks,
    seen: Evaluation | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    rivals: Mapping[str, Evaluation] | None = None,
    families: Mapping[str, Tasks] | None = None,
) -> Figures:
    """The symptoms of a learner, as plain JSON: means with 95 % intervals, over tasks unless said otherwise.

    Args:
        learner: trained; it is looked at in evaluation mode.
        unseen: what it does on validation tasks; ``tasks``: these tasks.
        seen: what it does on tasks of the training classes.
        history: of its training.
        rivals: others on the same tasks as ``unseen``: what nothing was trained for, say.
        families: tasks of each family among the validation classes.

    Returns:
        ``score`` and ``metric``; ``gap`` between seen and unseen classes; ``rivals``, by how much it leads each;
        ``training``; ``calibration``; ``families``, and for one that adapts in steps ``inner``: ``gain`` of adaptation,
        ``last_step`` and ``overshoot`` of the query loss, ``falls`` (support loss after over before), ``rises`` (share
        of tasks whose support loss is higher after than before, or no number); for gradient-based ones ``layers``:
        ``moved`` (length of the change over that of the layer) and ``aligned`` (cosine of the gradients of support and
        query loss before adaptation).
    """
    found: Figures = {"metric": unseen.metric, "score": interval(unseen.score[:, -1]), "inner": None, "layers": None}
    found["gap"] = None if seen is None else gap(seen.score[:, -1], unseen.score[:, -1])
    found["seen"] = None if seen is None else interval(seen.score[:, -1])
    found["rivals"] = {name: unseen.minus(other) for name, other in (rivals or {}).items()}
    found["training"] = _training(history, unseen.metric == "mse")
    found["calibration"] = _calibration(unseen)
    found["adapt_ms"] = interval(unseen.adapt_ms)
    if unseen.score.shape[1] > 1:
        found["inner"] = _inner(unseen)
    if isinstance(learner, GradientLearner):
        found["layers"] = layers(learner, tasks.tasks(0, min(PROBED, tasks.batch)))
    found["families"] = {
        name: interval(
            evaluate(learner, part, len(unseen.score) // len(families or {}), show_progress=False).score[:, -1]
        )
        for name, part in (families or {}).items()
    }
    return found


def _inner(unseen: Evaluation) -> Figures:
    score, loss, support = unseen.score.double(), unseen.loss.double(), unseen.support_loss.double()
    better = -1.0 if unseen.metric == "mse" else 1.0
    best = int(loss.mean(0).nan_to_num(torch.inf).argmin())
    unstable = ~support.isfinite().all(1) | (support[:, -1] > support[:, 0])
    return {
        "steps": unseen.steps.tolist(),
        "score": [interval(column) for column in score.T],
        "query_loss": [interval(column) for column in loss.T],
        "support_loss": [interval(column) for column in support.T],
        "gain": interval(better * (score[:, -1] - score[:, 0])),
        "last_step": interval(loss[:, -1] - loss[:, -2]),
        "best_step": int(unseen.steps[best]),
        "overshoot": interval(loss[:, -1] - loss[:, best]),
        "falls": interval(support[:, -1] / support[:, 0].clamp_min(1e-12)),
        "rises": round(float(unstable.double().mean()), 6),
    }


def _training(history: Sequence[Mapping[str, Any]], lower: bool) -> Figures | None:
    """How the outer training went: whether it was still getting better when it ended."""
    looks = [row for row in history if row.get("validation") is not None]
    if len(looks) < 2:
        return None
    values = [row["validation"] for row in looks]
    best = (min if lower else max)(range(len(values)), key=values.__getitem__)
    losses = [row["loss"] for row in history if row.get("loss") is not None]
    clipped = [row["clipped"] for row in history if row.get("clipped") is not None]
    return {
        "steps": looks[-1]["step"],
        "seconds": looks[-1]["seconds"],
        "start": values[0],
        "best": values[best],
        "last": values[-1],
        "best_step": looks[best]["step"],
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "clipped": sum(clipped) / len(clipped) if clipped else None,
    }


def _calibration(unseen: Evaluation) -> Figures | None:
    if unseen.confidence is None or unseen.right is None or unseen.counted is None:
        return None
    sure = unseen.confidence[unseen.counted].double().mean() - unseen.right[unseen.counted].double().mean()
    return {"ece": unseen.metrics()["ece"]["mean"], "too_sure": round(float(sure), 6)}


def layers(learner: GradientLearner, tasks: Task) -> dict[str, Figures]:
    """For each parameter that adapts: how far it moves, and whether support and query set pull it the same way.

    ``moved`` is ‖θ_K − θ_0‖ / ‖θ_0‖ over the inner steps, ``aligned`` the cosine of the gradients of the support and
    the query loss at θ_0 (where it is below zero, a step on the support set makes the queries worse); means over
    tasks.
    """
    moved: dict[str, list[Tensor]] = {}
    aligned: dict[str, list[Tensor]] = {}
    was_training = learner.training
    learner.eval()
    tasks = move(tasks, next(learner.parameters()).device)
    for i in range(len(tasks.query.y)):
        task: Task = take(tasks, i)
        path = learner.path(task)
        pulls = []
        for part in task:
            with torch.enable_grad():
                leaves = {n: p.detach().requires_grad_() for n, p in path[0]["parameters"].items()}
                loss, _ = learner.score(learner.predict({**path[0], "parameters": leaves}, part.x), part)
                found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            pulls.append(
                {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(leaves, found, strict=True)}
            )
        for name in learner.adapting:
            before, after = (path[at]["parameters"][name].detach() for at in (0, -1))
            # next to nothing is no length to compare with: a layer that was made to start at 0
            length = torch.where(before.norm() > 0.1 * after.norm(), before.norm(), torch.nan)
            moved.setdefault(name, []).append((after - before).norm() / length)
            both = torch.cosine_similarity(pulls[0][name].flatten(), pulls[1][name].flatten(), 0, 1e-20)
            aligned.setdefault(name, []).append(both)
    learner.train(was_training)
    return {
        name: {
            "moved": interval(torch.stack(moved[name])),
            "aligned": interval(torch.stack(aligned[name])),
            "size": learner.initial()[name].numel(),
        }
        for name in learner.adapting
    }
