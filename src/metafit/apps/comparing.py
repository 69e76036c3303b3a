"""The main job: does meta-learning on these tasks beat the frozen model, by how much, at what cost?

Meta-trains learners on the training classes, and evaluates them, and the baselines, on the same tasks of the test
classes.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from metafit.apps.budget import Budget, fitting
from metafit.apps.meta_training import TEST_SEED, Watch, check_train_way, tasks_of, train, unseen_tasks
from metafit.apps.packed import packed
from metafit.apps.preparing import Prepared, check_unmet, in_order, prepare, pretrained
from metafit.apps.protocol import Protocol
from metafit.apps.tasks import task_report
from metafit.apps.usual import report_beside
from metafit.data import Source
from metafit.data.families import domain_sources
from metafit.data.source import is_raw
from metafit.errors import FAULTS, BadInput, in_short
from metafit.evaluation import Contender, describe, evaluate, gallery, result, write_report, write_result
from metafit.learners import Learner, build, entry
from metafit.progress import say
from metafit.task import take
from metafit.training import Model, load_model
from metafit.training.augment import augments, check_augments
from metafit.training.checkpoint import saved_history
from metafit.weights import free_for

log = logging.getLogger("metafit.apps")
BASELINES = ("centroid", "linear", "finetune")
GAUGED = 200  # tasks of the training classes


def compare_learners(
    prepared: Prepared,
    names: Sequence[str],
    protocol: Protocol,
    out: str | os.PathLike[str] | None = None,
    baselines: Sequence[str] = BASELINES,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    models: Mapping[str, Model] | None = None,
    show_progress: bool = True,
    budget: float | None = None,
    watch: Sequence[Watch] = (),
    resume: bool = False,
) -> dict[str, Any]:
    """Meta-trains each learner, evaluates all of them and the baselines on the same unseen tasks.

    Args:
        prepared: the data.
        names: learners of the catalogue; the result is the first one's, against the others. ``["all"]`` is every
            one that fits the data, and every baseline, the best on the test tasks first. One whose training fails, or
            that the time does not allow, is left out, and the result says why.
        protocol: ways, shots, episodes.
        out: folder for ``result.json``, ``report.html`` and a model folder for each trained learner.
        baselines: learners that are added to the comparison.
        options: of learners, by name.
        models: learners that are trained already, by the name they get in the result.
        budget: seconds for all of it, see ``apps.budget``; ``None`` is as long as it takes.
        watch: called with each row of each training's history, in which ``learner`` is named.
        resume: take the trainings that are done from the folder, and go on with the one that was stopped.

    Returns:
        The content of ``result.json``.

    Raises:
        BadInput: an option of a learner, or the protocol; what cannot be resumed; or all of the learners are left out.
    """
    if resume and budget is not None:
        raise BadInput("resume: a budget tells not how long a training that it has stopped may go on; leave out one")
    folder = None if out is None else free_for(out, None)
    protocol = protocol.over(prepared.splits)
    if protocol.balance is not None:
        domain_sources(prepared.splits.train)
    tasks = unseen_tasks(prepared, protocol)  # bad input is told before the training, not after it
    drawn = packed(tasks, prepared.body)
    entered: dict[str, tuple[Learner, Sequence[Mapping[str, Any]]]] = {}
    trained_here: dict[str, bool] = {}  # on these training classes
    for name, model in (models or {}).items():
        model.learner.way = protocol.most_ways if entry(model.learner.recipe["name"]).any_way else model.learner.way
        _check_way(name, model.learner, protocol)
        entered[name] = (model.learner, model.history)
        trained_here[name] = model.recipe.source == prepared.recipe.source
    ranked = list(names) == ["all"]
    if ranked:
        names, baselines = fitting(prepared.body is not None)
    wanted = [name for name in dict.fromkeys([*names, *baselines]) if name not in entered]
    check_train_way(wanted, protocol)
    chosen = {name: dict((options or {}).get(name) or {}) for name in wanted}
    allowance = Budget(budget, sum(entry(name).meta_trained for name in wanted))
    left_out: dict[str, str] = {}

    def leave_out(name: str, why: str | Exception) -> None:
        if isinstance(why, Exception):
            log.info("%s has failed", name, exc_info=why)
        left_out[name] = why if isinstance(why, str) else in_short(why)
        say(f"{name} is left out: {left_out[name]}")

    first = None if budget is None else take(drawn.tasks(0, 1), 0)
    for name in wanted:  # an option that is wrong is told before the first training, too
        fresh = build(name, prepared.dim, protocol.most_ways, copy.deepcopy(prepared.body), **chosen[name])
        why: str | Exception | None = None if first is None else allowance.refuses(name, fresh, first)
        try:
            check_augments(augments(protocol.augment, fresh.way), fresh)
        except BadInput as useless:
            if not ranked:
                raise
            why = useless
        if why is not None:
            leave_out(name, why)
    for name in (name for name in wanted if name not in left_out):
        where = None if folder is None or not entry(name).meta_trained else folder / "models" / name
        seconds = allowance.training() if entry(name).meta_trained else None
        own = protocol if entry(name).wide else replace(protocol, train_way=None)
        told = _Named(name, watch, saved_history(where) if resume and where is not None else [])
        try:
            learner, trained = train(prepared, name, own, where, resume, chosen[name], show_progress, seconds, [told])
        except FAULTS as fault:
            leave_out(name, fault)
            continue
        told.catch_up()
        if entry(name).meta_trained and trained.history and trained.history[-1]["step"] == 0:
            leave_out(name, "its share of the time was over before the first step")
            continue
        entered[name] = (learner, trained.history)
    contenders = []
    source, known, diversity = prepared.source, None, None
    if models and not names and not any(trained_here.values()):  # its training tasks are of other data
        source = describe({"test": prepared.splits.test}, source["name"], source["modality"])
        diversity = report_beside(tasks, next(iter(models.values())))
    elif protocol.unsupervised is None:  # else nothing looks at the labels of the training classes, the report neither
        known = packed(tasks_of(prepared.splits.train, protocol, TEST_SEED), prepared.body)
        diversity = task_report(prepared.splits.train, tasks, prepared.body)
    beside = 0 if known is None else GAUGED
    episodes = allowance.episodes((learner for learner, _ in entered.values()), drawn, protocol.episodes, beside)
    for name, (learner, history) in entered.items():
        seen = None  # what it does on the classes that it was trained on: the gauge of its overfitting
        try:
            evaluation = evaluate(learner, drawn, episodes, title=f"evaluate {name}", show_progress=show_progress)
            if history and known is not None and trained_here.get(name, True):
                seen = evaluate(learner, known, min(GAUGED, episodes), title=f"gauge {name}", show_progress=False)
        except FAULTS as fault:
            leave_out(name, fault)
            continue
        contenders.append(Contender(name, learner, evaluation, history, seen))
    if left_out and not {c.name for c in contenders} & {*names, *(models or {})}:
        raise BadInput("; ".join(f"{name} is left out: {why}" for name, why in left_out.items()))
    if ranked:
        contenders.sort(key=lambda contender: -float(contender.evaluation.score[:, -1].nan_to_num(0.0).mean()))
    shown = gallery(tasks, {c.name: c.evaluation for c in contenders}, min(4, episodes))
    made = result(
        contenders,
        tasks,
        backbone=prepared.recipe.backbone,
        source=source,
        gallery=shown,
        diversity=diversity,
    )
    made["protocol"]["seed"] = protocol.seed  # the one to give again, not that of the stream of test tasks
    made["left_out"] = left_out
    # what is not meta-trained then reads features of a network that has learned nothing
    made["random_weights"] = prepared.body is not None and not pretrained(prepared.recipe.backbone or "")
    if protocol.unsupervised is not None:
        made["protocol"]["labels"] = f"none ({protocol.unsupervised})"
    if folder is not None:
        write_result(made, folder)
        write_report([made], folder / "report.html")
    return made


class _Named:
    """A watcher that passes rows on, with the learner's name; those of a run that was stopped come first."""

    def __init__(self, name: str, watch: Sequence[Watch], before: Sequence[Mapping[str, Any]]):
        self.name, self.watch, self.waiting = name, watch, list(before)

    def __call__(self, row: Mapping[str, Any]) -> None:
        self.waiting.append(row)
        self.catch_up()

    def catch_up(self) -> None:
        while self.waiting:
            row = self.waiting.pop(0)
            for watcher in self.watch:
                watcher({"learner": self.name, **row})


def evaluate_one(
    source: Source,
    folder: str | os.PathLike[str] | None,
    name: str | None,
    protocol: Protocol,
    backbone: str | None = "auto",
    seed: int | None = None,
    out: str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluates a model folder, or an untrained learner of the catalogue, on test classes, against the baselines.

    Args:
        source: labelled examples; their test classes are those that a training with the same seed leaves out.
        folder: a model folder; ``name``: a learner, where there is no folder.
        seed: of the class split; the model's own where ``None``.

    Raises:
        BadInput: the model takes other inputs, or the seed would test it on classes it was trained on.
    """
    if folder is None:
        prepared = prepare(source, backbone, seed=protocol.seed)
        protocol = protocol.over(prepared.splits)
        torch.manual_seed(protocol.seed)
        model = Model(
            build(name or "", prepared.dim, protocol.most_ways, prepared.body, **dict(options or {})), prepared.recipe
        )
        return compare_learners(prepared, [], protocol, out, models={name or "": model})
    model = load_model(folder)
    trained_seed = model.recipe.training.get("seed", 0)
    if seed is not None and seed != trained_seed and model.recipe.source.get("name") == source.name:
        raise BadInput(
            f"seed {seed}: {folder} was trained on {source.name!r} with seed {trained_seed}; another seed would "
            f"test it on classes it has seen: leave --seed out"
        )
    unsupervised = model.recipe.training.get("unsupervised")
    protocol = replace(protocol, seed=trained_seed if seed is None else seed, unsupervised=unsupervised)
    recipe = model.recipe
    if recipe.backbone is None and is_raw(source.x):
        raise BadInput(f"model {Path(folder)} takes plain vectors, {source.name} is {source.modality}: give numbers")
    prepared = prepare(
        in_order(source, recipe.columns, f"model {Path(folder)}"),
        recipe.backbone,
        recipe.trained,
        protocol.seed,
        scaling=recipe.scaling,
        options=recipe.backbone_options,
    )
    _check_inputs(folder, model, prepared)
    check_unmet(
        f"model {Path(folder)}",
        model.recipe.classes,
        prepared.splits.test.classes,
        model.recipe.source.get("name") == source.name,
        "give the data that it was trained on, whole, of which its test classes are known, or data of other classes; "
        "where they only are called the same, rename the data",
    )
    if protocol.way is None and not entry(model.learner.recipe["name"]).any_way:
        protocol = protocol.over(prepared.splits)
        protocol = replace(protocol, way=min(protocol.most_ways, model.learner.way or protocol.most_ways))
    return compare_learners(prepared, [], protocol, out, models={model.learner.recipe["name"]: model})


def _check_inputs(folder: str | os.PathLike[str], model: Model, prepared: Prepared) -> None:
    if model.recipe.backbone != prepared.recipe.backbone or model.learner.recipe["dim"] != prepared.dim:
        raise BadInput(
            f"model {Path(folder)} takes {model.recipe.backbone or 'plain vectors'} ({model.learner.recipe['dim']} "
            f"features), the data gives {prepared.recipe.backbone or 'plain vectors'} ({prepared.dim}): "
            f"use the data or the backbone that it was trained with"
        )


def _check_way(name: str, learner: Learner, protocol: Protocol) -> None:
    if learner.way is not None and learner.way < protocol.most_ways:
        raise BadInput(
            f"model {name!r} was trained for {learner.way} ways: ask for {learner.way} or fewer, or train anew"
        )


def tell(made: Mapping[str, Any]) -> None:
    """The result as a few lines for people, on standard error."""
    metric = "accuracy" if "accuracy" in made["metrics"] else "mse"
    rows = [(made["learner"]["name"], made, None)]
    rows += [(other["learner"], other, other["paired_difference"]) for other in made["against"]]
    for name, row, difference in rows:
        mark = " (transductive)" if (made["learner"] if difference is None else row)["transductive"] else ""
        metrics = row["metrics"]
        line = f"  {name:12s} {metric} {_figure(metrics[metric], '.4f')}   loss {_mean(metrics['loss'], '.3f')}"
        line += f"   adapts in {_mean(metrics['adapt_ms'], '.2f')} ms"
        if difference is not None:
            line += f"   {made['learner']['name']} leads by {_figure(difference, '+.4f')}"
        say(line + mark)


def _figure(entry: Mapping[str, Any], form: str) -> str:
    half = "" if entry["ci95"] is None else f" ± {entry['ci95']:.4f}"
    return _mean(entry, form) + half


def _mean(entry: Mapping[str, Any], form: str) -> str:
    """A dash where a learner diverged, and there is no number."""
    return "–" if entry["mean"] is None else format(entry["mean"], form)
