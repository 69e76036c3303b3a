"""Omniglot, whole, Conv-4 from scratch: `python benchmarks/omniglot.py protonet --train-way 60 --way 20 --shot 1`.

Of the 1,623 characters, permuted by ``default_rng(0)`` over their sorted names, 1,100 are for meta-training, 100 for
validation and 423 for test; rotations by 90, 180 and 270 degrees make new classes of each, as in the literature.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from common import data, keep

from metafit import backbones
from metafit.data import Source, Splits, TaskSampler
from metafit.evaluation import Contender, describe, evaluate, result
from metafit.learners import build, entry
from metafit.training import meta_train, pretrain


def omniglot() -> Splits:
    archive = np.load(data("vision", "omniglot_28.npz"))
    names = archive["names"]
    order = np.argsort(names)[np.random.default_rng(0).permutation(len(names))]
    parts = (order[:1100], order[1100:1200], order[1200:])
    return Splits(*(_rotated(archive["images"][part], names[part]) for part in parts))


def _rotated(images: np.ndarray, names: np.ndarray) -> Source:
    turned = np.concatenate([np.rot90(images, k, axes=(2, 3)) for k in range(4)])
    x = torch.from_numpy(turned.reshape(-1, 1, 28, 28).copy())
    y = torch.arange(len(turned)).repeat_interleave(images.shape[1])
    return Source("omniglot", x, y, tuple(f"{name}@{90 * k}" for k in range(4) for name in names), "image")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("learner")
    parser.add_argument("--way", type=int, default=5)
    parser.add_argument("--shot", type=int, default=1)
    parser.add_argument("--query", type=int, default=15, help="test queries a class")
    parser.add_argument("--train-way", type=int, help="ways of the training tasks (as in test)")
    parser.add_argument("--train-query", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1, help="training tasks a step")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--option", action="append", default=[], help="of the learner, as name=value")
    parser.add_argument("--also", action="append", default=[], help="test on these too, as WAYxSHOT")
    parser.add_argument("--episodes", type=int, default=600)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    options = {k: float(v) if "." in v else int(v) for k, v in (o.split("=") for o in args.option)}

    splits = omniglot()
    body = backbones.load("conv4")
    started = time.perf_counter()
    if args.learner == "finetune":
        pretrain(body, splits.train, body.out_dim, steps=args.steps, rate=args.rate)
    learner = build(args.learner, body.out_dim, args.way, body, **options)
    history: list[dict[str, object]] = []
    if entry(args.learner).meta_trained:
        learner.way = args.train_way or args.way
        training = TaskSampler(splits.train, learner.way, args.shot, args.train_query, args.batch, args.seed)
        validation = TaskSampler(splits.validation, args.way, args.shot, 5, 10, seed=1)
        trained = meta_train(
            learner, training, validation, steps=args.steps, rate=args.rate, validate_every=args.steps // 8
        )
        history = trained.history
    seconds = time.perf_counter() - started
    for way, shot in [(args.way, args.shot), *(tuple(map(int, cell.split("x"))) for cell in args.also)]:
        if entry(args.learner).any_way:
            learner.way = way
        test = TaskSampler(splits.test, way, shot, args.query if way < 20 else 5, batch=10, seed=2)
        contender = Contender(args.learner, learner, evaluate(learner, test, args.episodes), history)
        row = result([contender], test, backbone="conv4", source=describe(splits, "omniglot", "image"))
        keep(f"omniglot-{args.learner}-{way}w{shot}s", row, seconds=round(seconds))


if __name__ == "__main__":
    main()
