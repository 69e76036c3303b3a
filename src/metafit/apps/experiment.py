"""The main job: does meta-learning on these tasks beat the frozen model, by how much, at what cost?

Splits the classes, meta-trains learners on the training classes, and evaluates them, and the baselines, on the same
tasks of the test classes.
"""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from metafit import backbones, processes
from metafit.apps.budget import Budget, fitting
from metafit.apps.packed import packed
from metafit.apps.tasks import Balance, balanced, task_report
from metafit.apps.unsupervised import QUERIES, WAYS, Unsupervised, pseudo_tasks
from metafit.apps.usual import kept
from metafit.backbones import Backbone
from metafit.backbones.mlp import MLP
from metafit.data import Source, Splits, TaskSampler
from metafit.data.families import domain_sources
from metafit.data.features import features
from metafit.data.rows import StoredRows, lazily
from metafit.data.sampler import Range, Tasks
from metafit.data.source import is_raw
from metafit.disk import writable_folder
from metafit.errors import FAULTS, BadInput, in_short
from metafit.evaluation import Contender, describe, evaluate, gallery, result, write_report, write_result
from metafit.learners import Entry, Learner, build, entry
from metafit.progress import say
from metafit.task import take
from metafit.training import Model, Recipe, Training, load_model, meta_train, save_tasks
from metafit.training.augment import augments
from metafit.training.checkpoint import saved_history
from metafit.training.meta_train import Precision, check_outer
from metafit.training.schedule import Schedule

if TYPE_CHECKING:
    from lightning_fabric import Fabric

log = logging.getLogger("metafit.apps")
BASELINES = ("centroid", "linear", "finetune")
Watch = Callable[[Mapping[str, Any]], None]
SCALED_BY = 100_000  # rows on disk that the scaling is measured on: it is right to half a percent of the spread
GAUGED = 200  # tasks of the training classes
TRAIN_SEED, VALIDATION_SEED, TEST_SEED = 0, 1, 2  # streams of tasks; each adds to the run's seed


@dataclass(frozen=True)
class Protocol:
    """What a comparison does.

    Attributes:
        way: classes a task, a range as (least, most); ``None`` is 5, or as many as the data has.
        shot: support examples a class, or a range.
        query: query examples a class, where the data has them.
        episodes: test tasks.
        steps, rate: outer steps of meta-training, and their rate; ``None`` is the learner's default.
        seed: of the class split, the tasks and the initialisation.
        patience: looks at the validation tasks (20 a training) without a better figure before training stops.
        augment: names of ``training.augment.AUGMENTS``, applied to the training tasks in this order.
        balance: how training tasks are drawn from the domains of the data (``apps.tasks.balanced``); where ``None``,
            a task's classes are of any domain.
        unsupervised: what makes the training tasks without labels (``apps.unsupervised``), of which all steps are
            taken and the last is kept; where ``None`` they are of the labelled classes.
        precision, accumulate, ema, schedule: of ``meta_train``.
        train_way: classes of a training task, for metric learners, which may train on more of them than they are asked
            for (``wide_task``); the learner's default where ``None``.
        batch: training tasks of an outer step; the learner's default where ``None``.

    Raises:
        BadInput: domains to balance, or classes a training task, and no labels; fewer than 2 of these; or an option of
            ``meta_train`` out of range.
    """

    way: Range | None = 5
    shot: Range = 1
    query: int = 15
    episodes: int = 600
    steps: int | None = None
    seed: int = 0
    patience: int | None = 8
    augment: tuple[str, ...] = ()
    balance: Balance | None = None
    unsupervised: Unsupervised | None = None
    rate: float | None = None
    precision: Precision | None = None
    accumulate: int = 1
    ema: float | None = None
    schedule: Schedule = "cosine"
    train_way: int | None = None
    batch: int | None = None

    def __post_init__(self) -> None:
        if self.batch is not None and self.batch < 1:
            raise BadInput(f"batch {self.batch}: needs at least 1 task")
        if self.train_way is not None and self.train_way < 2:
            raise BadInput(f"train_way {self.train_way}: a task to learn from has 2 classes or more")
        check_outer(self.precision, self.accumulate, self.ema, self.schedule)
        if self.unsupervised is not None and self.balance is not None:
            raise BadInput("unsupervised: domains are of labelled classes; leave the balance out")
        if self.unsupervised is not None and self.train_way is not None:
            raise BadInput(f"unsupervised: its tasks have {WAYS} classes; leave train_way out")

    @property
    def ways(self) -> Range:
        """The ways, once ``over`` has told them."""
        if self.way is None:
            raise BadInput("way: name the classes a task, or take the protocol over the data first")
        return self.way

    @property
    def most_ways(self) -> int:
        return self.ways if isinstance(self.ways, int) else self.ways[1]

    def over(self, splits: Splits) -> Protocol:
        """The protocol on these classes: 5 ways where none are named, fewer where there are fewer classes."""
        if self.way is not None:
            return self
        return replace(self, way=min(5, len(splits.train.classes), len(splits.test.classes)))


@dataclass(frozen=True)
class Prepared:
    """Data as a learner takes it: frozen features, or inputs for a network that the learner trains.

    Attributes:
        splits: class-disjoint sources of tensors.
        source: what the result says of the data.
        recipe: how the inputs came about, for model folders.
        dim: size of the features.
        body: the network to train; ``None`` over frozen features.
    """

    splits: Splits
    source: dict[str, Any]
    recipe: Recipe
    dim: int
    body: Backbone | None = None


def prepare(
    source: Source,
    backbone: str | None = "auto",
    train_backbone: bool = False,
    seed: int = 0,
    by_domain: bool = False,
    scaling: dict[str, list[float]] | None = None,
    options: dict[str, Any] | None = None,
    show_progress: bool = True,
) -> Prepared:
    """Splits the classes and turns raw items into what learners take.

    Args:
        source: labelled examples.
        backbone: its name, or the folder of one that was pretrained; ``"auto"`` is ``minilm-l6`` for text,
            ``efficientnet-lite0`` for images, none for vectors.
        train_backbone: train the backbone itself, not a small map over its frozen features; a backbone without
            pretrained weights is always trained.
        seed, by_domain: of the class split; a backbone without pretrained weights draws them from the seed too.
        scaling: of plain vectors, as a model's recipe has it; that of the training classes where ``None``.
        options: of the backbone, as a model's recipe has them; those that fit the data where ``None``.

    Raises:
        BadInput: too few classes, a backbone of another modality, or one that was pretrained on classes of this source
            that the split leaves to the test.
    """
    if backbone == "auto":
        backbone = backbones.DEFAULTS[source.modality]
    if backbone is None:
        if is_raw(source.x):
            raise BadInput(f"{source.name}: {source.modality} needs a backbone; name one, or leave it to 'auto'")
        flat = source.with_x(lazily(lambda x: x.flatten(1).float(), source.x), "vector")
        splits = _split(flat, seed, by_domain)
        scaling = scaling or _scaling(splits.train.x)
        if len(scaling["mean"]) != flat.x.shape[1]:
            raise BadInput(
                f"{source.name}: {flat.x.shape[1]} feature columns, the model was trained on {len(scaling['mean'])}; "
                "name the same columns"
            )
        mean, scale = torch.tensor(scaling["mean"]), torch.tensor(scaling["scale"])
        scaled = (part and part.with_x(lazily(lambda x: (x - mean) / scale, part.x)) for part in splits)
        splits = Splits(*scaled)  # type: ignore[arg-type]
        about = describe(splits, source.name, source.modality)
        return Prepared(splits, about, Recipe(scaling=scaling, source=_counts(about)), int(flat.x.shape[1]))
    options = fitting_options(backbone, source) if options is None else options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = backbones.load(backbone, **options)
    if network.modality != source.modality:
        fits = [e.name for e in backbones.catalog() if source.modality in e.modality]
        fits = ["none", *fits] if source.modality == "vector" else fits
        raise BadInput(
            f"backbone {backbone!r} reads {network.modality}, {source.name} is {source.modality}: choose "
            f"{', '.join(fits)}"
        )
    trained = train_backbone or not _pretrained(network.name)
    if not trained and network.transductive:
        raise BadInput(
            f"backbone {backbone!r}: its features depend on the batch that they are computed in, so they cannot be "
            "kept; train it (--train-backbone), or pretrain one with --option norm=group"
        )
    if trained:
        inputs = source.with_x(lazily(network.preprocess, source.x), source.modality)
    else:
        inputs = features(source, network, show_progress)
    splits = _split(inputs, seed, by_domain)
    check_unseen(network, splits, seed)
    if isinstance(network, MLP) and network.saved is None:
        network.standardise(*_spread(splits.train.x))
    about = describe(splits, source.name, source.modality)
    recipe = Recipe(network.name, network.options or {}, trained, source=_counts(about))
    body = network.requires_grad_(True) if trained else None
    return Prepared(splits, about, recipe, network.out_dim, body)


def train(
    prepared: Prepared,
    name: str,
    protocol: Protocol,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    options: Mapping[str, Any] | None = None,
    show_progress: bool = True,
    seconds: float | None = None,
    watch: Sequence[Watch] = (),
    share: float = 1.0,
    clock: Callable[[], float] = time.perf_counter,
    fabric: Fabric | None = None,
) -> tuple[Learner, Training]:
    """Builds a learner of the catalogue and meta-trains it on the training classes, if it has anything to learn.

    Args:
        share: of the outer steps that are taken, as far apart from one look at the validation tasks to the next as in
            the whole training.
        seconds, clock, fabric: see ``meta_train``.
    """
    protocol = protocol.over(prepared.splits)
    check_train_way([name], protocol)
    torch.manual_seed(protocol.seed)
    line = entry(name)
    learner = build(name, prepared.dim, protocol.most_ways, _copy(prepared.body), **dict(options or {}))
    if not line.meta_trained:
        return learner, Training()
    train_source, validation_source, _ = prepared.splits
    frozen = prepared.body is None
    ways: Range = protocol.ways
    query, usual = protocol.query, 16
    if line.wide:
        ways, query = wide_task(prepared, name, protocol)
        learner.way, usual = max(ways, protocol.most_ways), 4 if frozen else 1
    batch = protocol.batch or usual

    def sampler(source: Source) -> TaskSampler:
        asked = _queries(source, protocol, query)
        return TaskSampler(source, _at_most(ways, source), protocol.shot, asked, batch, protocol.seed + TRAIN_SEED)

    tasks: Tasks
    validation: Tasks | None = None
    if protocol.unsupervised is not None:
        # Without validation: tasks made up of the validation part hardly tell when to stop. Clusters of features, say,
        # are told apart well by these very features, however little they are the classes.
        tasks = pseudo_tasks(
            protocol.unsupervised,
            train_source,
            prepared.recipe,
            prepared.body,
            ways,
            protocol.shot,
            QUERIES,
            batch,
            protocol.seed + TRAIN_SEED,
        )
    else:
        if protocol.balance is None:
            tasks = packed(sampler(train_source), prepared.body)
        else:
            tasks = balanced(train_source, sampler, protocol.balance, prepared.body, protocol.seed)
        if validation_source is not None:
            way = min(protocol.most_ways, len(validation_source.classes))
            asked = _queries(validation_source, protocol, protocol.query if frozen else 5)
            sampled = TaskSampler(validation_source, way, protocol.shot, asked, 50, protocol.seed + VALIDATION_SEED)
            validation = packed(sampled, prepared.body)
    recipe = Recipe(**{**asdict(prepared.recipe), "training": asdict(protocol)})
    steps, rate = outer_loop(prepared, name, protocol, options or {})
    looks = 20 if frozen else 6
    trained = meta_train(
        learner,
        tasks,
        validation,
        steps=max(1, round(share * steps)),
        rate=rate,
        precision=protocol.precision,
        accumulate=protocol.accumulate,
        ema=protocol.ema,
        schedule=protocol.schedule,
        # cheap without inner steps, and over frozen features: then more tasks make the choice of the best surer
        validation_tasks=(600 if line.any_way else 200) if frozen else (200 if line.any_way else 50),
        validate_every=max(1, steps // looks),
        patience=protocol.patience,
        seconds=seconds,
        clock=clock,
        fabric=fabric,
        augment=augments(protocol.augment, learner.way),
        uncertainty=protocol.balance == "uncertainty",
        out=out,
        recipe=recipe,
        resume=resume,
        watch=watch,
        show_progress=show_progress,
    )
    learner.way = protocol.most_ways
    if out is not None and frozen and protocol.unsupervised is None and processes.first():
        save_tasks(out, kept(train_source, protocol.shot))
    return learner, trained


def check_train_way(names: Sequence[str], protocol: Protocol) -> None:
    """Whether the classes of a training task, if they are named, are of use.

    Raises:
        BadInput: none of the learners is ``wide``.
    """
    if protocol.train_way is not None and not any(entry(name).wide for name in names):
        tried = f"none of {', '.join(names)}" if len(names) > 1 else f"{names[0]} does not"
        raise BadInput(f"train_way {protocol.train_way}: {tried} train on more classes than in the test; leave it out")


def wide_task(prepared: Prepared, name: str, protocol: Protocol) -> tuple[int, int]:
    """Classes, and queries of each, of the tasks that a ``wide`` learner trains on.

    More classes cost little over frozen features. Any number that is named makes a task of as many examples, as far as
    one query a class allows.
    """
    shots, line = _most_shots(protocol), entry(name)
    most = WAYS if protocol.unsupervised else len(prepared.splits.train.classes)
    if line.most_rows is not None:
        most = min(most, max(protocol.most_ways, line.most_rows // shots))
    usual = min(most, 50 if prepared.body is None else 20)
    ways = min(protocol.train_way or usual, most)
    return ways, max(1, usual * (shots + 5) // ways - shots)


def outer_loop(prepared: Prepared, name: str, protocol: Protocol, options: Mapping[str, Any]) -> tuple[int, float]:
    """The outer steps and their rate: the protocol's, or else the learner's default on such data."""
    line = entry(name)
    steps = 400 if prepared.body is None and line.any_way else 300
    rate = _outer_rate(line, prepared, options)
    return protocol.steps or steps, protocol.rate or rate


def tasks_of(source: Source, protocol: Protocol, stream: int) -> TaskSampler:
    """The tasks of one part of the classes, the same for every learner: fewer ways where it has fewer classes.

    Args:
        stream: added to the protocol's seed; another stream is other tasks.
    """
    query = _queries(source, protocol, protocol.query)
    return TaskSampler(source, _at_most(protocol.ways, source), protocol.shot, query, 50, protocol.seed + stream)


def unseen_tasks(prepared: Prepared, protocol: Protocol) -> TaskSampler:
    """The tasks of the test classes.

    Raises:
        BadInput: more ways than test classes.
    """
    source = prepared.splits.test
    query = _queries(source, protocol, protocol.query)
    return TaskSampler(source, protocol.ways, protocol.shot, query, 50, protocol.seed + TEST_SEED)


def _at_most(ways: Range, source: Source) -> Range:
    """As many ways as the source has classes, where it has fewer."""
    most = len(source.classes)
    return min(ways, most) if isinstance(ways, int) else (min(ways[0], most), min(ways[1], most))


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
    folder = None if out is None else writable_folder(out)
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
        fresh = build(name, prepared.dim, protocol.most_ways, _copy(prepared.body), **chosen[name])
        why = None if first is None else allowance.refuses(name, fresh, first)
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
        entered[name] = (learner, trained.history)
    contenders = []
    known = diversity = None
    if protocol.unsupervised is None:  # else nothing looks at the labels of the training classes, the report neither
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
        source=prepared.source,
        gallery=shown,
        diversity=diversity,
    )
    made["protocol"]["seed"] = protocol.seed  # the one to give again, not that of the stream of test tasks
    made["left_out"] = left_out
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
        source,
        recipe.backbone,
        recipe.trained,
        protocol.seed,
        scaling=recipe.scaling,
        options=recipe.backbone_options,
    )
    _check_inputs(folder, model, prepared)
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


def _split(source: Source, seed: int, by_domain: bool) -> Splits:
    """The class split; fewer than 10 classes leave too few for validation, so they go without."""
    if by_domain or len(source.classes) >= 10:
        return source.split(seed=seed, by_domain=by_domain)
    say(f"{source.name}: {len(source.classes)} classes are too few to keep some for validation: the last step is kept")
    return source.split(validation=0, seed=seed)


def check_unseen(network: Backbone, splits: Splits, seed: int) -> None:
    """Whether a backbone out of a folder was pretrained on classes that are held out here."""
    held = {name for part in splits[1:] if part is not None for name in part.classes}
    for done in network.pretraining:
        met = sorted(held & set(done["classes"]))
        shown = ", ".join(map(repr, met[:3])) + ", ..." * (len(met) > 3)
        if met and done["source"] == splits.test.name:
            raise BadInput(
                f"seed {seed}: the backbone {network.name} was pretrained on {done['source']!r} with seed "
                f"{done['seed']}, and has seen {len(met)} classes that this seed holds out ({shown}): use --seed "
                f"{done['seed']}, or pretrain another"
            )
        if met:
            say(
                f"the backbone {network.name} was pretrained on {done['source']!r}, which has classes that are called "
                f"as some held out here ({shown}): where they are the same, the result is too good"
            )


def _scaling(x: Tensor | StoredRows) -> dict[str, list[float]]:
    """From the training classes: columns of mean 0, rows whose squared lengths average 1, whatever the units."""
    mean, spread = _spread(x)
    return {"mean": mean.tolist(), "scale": (spread * x.shape[1] ** 0.5).tolist()}


def _spread(x: Tensor | StoredRows) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the columns; of rows on disk, ``SCALED_BY`` are looked at, drawn at random."""
    if isinstance(x, StoredRows):
        x = x[torch.from_numpy(np.random.default_rng(0).integers(len(x), size=SCALED_BY))]
    x = x.double()
    constant = (x == x[0]).all(0)  # its spread is rounding, and nothing to divide by
    return x.mean(0), torch.where(constant, 1.0, x.std(0, correction=0))


def _check_way(name: str, learner: Learner, protocol: Protocol) -> None:
    if learner.way is not None and learner.way < protocol.most_ways:
        raise BadInput(
            f"model {name!r} was trained for {learner.way} ways: ask for {learner.way} or fewer, or train anew"
        )


def _queries(source: Source, protocol: Protocol, wanted: int) -> int:
    """As many queries a class as the smallest class leaves, at most ``wanted``: so that every task weighs the same."""
    return min(wanted, max(1, int(source.counts.min()) - _most_shots(protocol)))


def _most_shots(protocol: Protocol) -> int:
    return protocol.shot if isinstance(protocol.shot, int) else protocol.shot[1]


def _outer_rate(line: Entry, prepared: Prepared, options: Mapping[str, Any]) -> float:
    """Small where pretrained weights move; adapters beside them are new, and do not disturb them."""
    if prepared.body is None:
        # Plain columns have no distance yet that is worth keeping: ProtoNet, matching and R2D2 gain 4 to 7 points over
        # 3e-4 on letter and vowel, lose 1 on optdigits, and change nothing on penbased and texture.
        fresh = line.wide and prepared.recipe.backbone is None
        return 1e-3 if fresh or not line.any_way else 3e-4
    if line.wide and prepared.body.saved is None and prepared.body.name == "conv4":
        return 3e-3  # better than 1e-3 after 400 steps on Omniglot and Tiny-ImageNet; other networks were not tried
    return 1e-3 if options.get("scope") == "lora" else usual_rate(prepared.body)


def usual_rate(network: Backbone) -> float:
    """Of AdamW: small where pretrained weights move, less so where they came about here, of a small network."""
    name = network.name if network.saved is None else network.saved.name
    if _pretrained(name):
        return 3e-5
    return 1e-3 if network.saved is None else 3e-4


def _pretrained(backbone: str) -> bool:
    return all(e.pretrained for e in backbones.catalog() if e.name == backbone)


def fitting_options(backbone: str, source: Source) -> dict[str, Any]:
    """What a network without weights of its own is told of the inputs: columns, or channels and size."""
    if source.modality == "vector":
        return {"columns": int(source.x.shape[1])} if backbone == "mlp" else {}
    if backbone not in ("conv4", "resnet12") or is_raw(source.x):
        return {"channels_in": 3, "image_size": 84} if backbone in ("conv4", "resnet12") else {}
    channels, height = source.x.shape[1:3]
    return {"channels_in": int(channels), "image_size": max(16, int(height))}


def _copy(body: Backbone | None) -> Backbone | None:
    """Each learner trains its own copy of the network."""
    return copy.deepcopy(body)


def _counts(about: Mapping[str, Any]) -> dict[str, Any]:
    return {**about, "classes": {part: len(names) for part, names in about["classes"].items()}}


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
