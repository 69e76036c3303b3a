"""Meta-training a learner on the training classes, as a protocol says."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from metafit import processes
from metafit.apps.packed import packed
from metafit.apps.preparing import Prepared, usual_rate
from metafit.apps.protocol import Protocol
from metafit.apps.tasks import balanced
from metafit.apps.unsupervised import QUERIES, WAYS, pseudo_tasks
from metafit.apps.usual import kept
from metafit.data import Source, TaskSampler
from metafit.data.sampler import Range, Tasks
from metafit.errors import BadInput
from metafit.learners import Entry, Learner, build, entry
from metafit.progress import say
from metafit.training import Recipe, Training, meta_train, save_tasks
from metafit.training.augment import augments

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Watch = Callable[[Mapping[str, Any]], None]
TRAIN_SEED, VALIDATION_SEED, TEST_SEED = 0, 1, 2  # streams of tasks; each adds to the run's seed


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
    learner = build(name, prepared.dim, protocol.most_ways, copy.deepcopy(prepared.body), **dict(options or {}))
    if not line.meta_trained:
        return learner, Training()
    train_source, validation_source, _ = prepared.splits
    frozen = prepared.body is None
    _check_ways(line, protocol, prepared)
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
    learner.eval()
    # parts of a network that processes share out are not for the first of them alone
    if out is not None and (frozen or fabric is None) and protocol.unsupervised is None and processes.first():
        save_tasks(out, kept(train_source, protocol.shot, learner))
    return learner, trained


def check_train_way(names: Sequence[str], protocol: Protocol) -> None:
    """Whether the classes of a training task, if they are named, are of use.

    Raises:
        BadInput: none of the learners is ``wide``.
    """
    if protocol.train_way is not None and not any(entry(name).wide for name in names):
        tried = f"none of {', '.join(names)}" if len(names) > 1 else f"{names[0]} does not"
        raise BadInput(f"train_way {protocol.train_way}: {tried} train on more classes than in the test; leave it out")


def _check_ways(line: Entry, protocol: Protocol, prepared: Prepared) -> None:
    """Whether training tasks can have the classes that they are asked for; outputs beyond them would train nothing."""
    asked, most = protocol.most_ways, len(prepared.splits.train.classes)
    if protocol.unsupervised is not None or asked <= most:
        return
    if not line.any_way:
        raise BadInput(f"way {asked}: there are {most} training classes; ask {line.name} for {most} ways or fewer")
    say(f"way {asked}: the training tasks have {most}, of as many training classes")


def wide_task(prepared: Prepared, name: str, protocol: Protocol) -> tuple[int, int]:
    """Classes, and queries of each, of the tasks that a ``wide`` learner trains on.

    More classes cost little over frozen features. Any number that is named makes a task of as many examples, as far as
    one query a class allows.
    """
    shots, line = protocol.most_shots, entry(name)
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


def _queries(source: Source, protocol: Protocol, wanted: int) -> int:
    """As many queries a class as the smallest class leaves, at most ``wanted``: so that every task weighs the same."""
    return min(wanted, max(1, int(source.counts.min()) - protocol.most_shots))
