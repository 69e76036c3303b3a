"""What the benchmarks of Conv-4 from scratch share: the options, the training within them, the test."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, get_args

import torch
from common import keep, option

from metafit import backbones
from metafit.apps.unsupervised import Unsupervised, pseudo_tasks
from metafit.data import Splits, TaskSampler
from metafit.data.sampler import Tasks
from metafit.evaluation import Contender, describe, evaluate, result
from metafit.learners import build, entry
from metafit.training import Recipe, meta_train, pretrain
from metafit.training.augment import AUGMENTS, augments


def parser(about: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("learner")
    made.add_argument("--way", type=int, default=5)
    made.add_argument("--shot", type=int, default=1)
    made.add_argument("--query", type=int, default=15, help="test queries a class")
    made.add_argument("--train-way", type=int, help="ways of the training tasks (as in test)")
    made.add_argument("--train-query", type=int, default=5)
    made.add_argument("--batch", type=int, default=1, help="training tasks a step")
    made.add_argument("--unsupervised", choices=get_args(Unsupervised), help="train without labels")
    made.add_argument("--augment", choices=list(AUGMENTS), help="of the training tasks")
    made.add_argument("--steps", type=int, default=1000)
    made.add_argument("--looks", type=int, default=8, help="at the validation tasks")
    made.add_argument("--validation-tasks", type=int, default=100, help="of each look")
    made.add_argument("--rate", type=float, default=1e-3)
    made.add_argument("--width", type=int, default=64, help="channels of every block")
    made.add_argument("--option", action="append", default=[], help="of the learner, as name=value")
    made.add_argument("--name", help="of the row (as the learner)")
    made.add_argument("--out", help="folder of the training, which goes on from what the same options left there")
    made.add_argument("--also", action="append", default=[], help="test on these too, as WAYxSHOT")
    made.add_argument("--episodes", type=int, default=600)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--seed", type=int, default=0)
    return made


def run(name: str, load: Callable[[], Splits], args: argparse.Namespace, **network: Any) -> None:
    """Trains the learner and keeps a row for each test, ``NAME-LEARNER-WAYwSHOTs``."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    options = dict(option(o) for o in args.option)
    splits = load()
    body = backbones.load("conv4", width=args.width, **network)
    started = time.perf_counter()
    if args.learner == "finetune":
        pretrain(body, splits.train, body.out_dim, steps=args.steps, rate=args.rate)
    learner = build(args.learner, body.out_dim, args.way, body, **options)
    history: list[dict[str, Any]] = []
    if entry(args.learner).meta_trained:
        learner.way = args.train_way or args.way
        drawn = (learner.way, args.shot, args.train_query, args.batch, args.seed)
        training: Tasks = TaskSampler(splits.train, *drawn)
        validation: Tasks | None = TaskSampler(splits.validation, args.way, args.shot, 5, 10, seed=1)
        if args.unsupervised:
            training, validation = pseudo_tasks(args.unsupervised, splits.train, Recipe(), body, *drawn), None
        every = args.steps // args.looks
        history = meta_train(
            learner,
            training,
            validation,
            steps=args.steps,
            rate=args.rate,
            validate_every=every,
            validation_tasks=args.validation_tasks,
            augment=augments([args.augment] if args.augment else [], learner.way),
            out=args.out,
            resume=True,
        ).history
    seconds = history[-1]["seconds"] if history else time.perf_counter() - started  # of every run that it resumed
    for way, shot in [(args.way, args.shot), *(tuple(map(int, cell.split("x"))) for cell in args.also)]:
        if entry(args.learner).any_way:
            learner.way = way
        test = TaskSampler(splits.test, way, shot, args.query if way < 20 else 5, batch=10, seed=2)
        known = TaskSampler(splits.train, way, shot, test.query, batch=10, seed=3)
        seen = evaluate(learner, known, 200, title="gauge") if history else None
        tested = evaluate(learner, test, args.episodes)
        contender = Contender(args.learner, learner, tested, history, seen)
        row = result([contender], test, backbone="conv4", source=describe(splits, name, "image"))
        if args.unsupervised:
            row["protocol"]["labels"] = f"none ({args.unsupervised})"
        prefix = f"unsupervised-{name}-{args.unsupervised}" if args.unsupervised else name
        each = [round(value, 4) for value in tested.score[:, -1].tolist()]
        keep(f"{prefix}-{args.name or args.learner}-{way}w{shot}s", row, seconds=round(seconds), of_each_task=each)
