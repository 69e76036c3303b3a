"""What pretraining and meta-training give, alone and one after the other: `python benchmarks/pretraining.py`.

Tiny-ImageNet with Conv-4 from scratch, as in tiny_imagenet.py. All three take the same number of steps, of 128 images
or of 4 tasks with 120; "both" pretrains for the first half of them. Tests are paired: "pretrain" is the frozen centroid
by cosines over the pretrained network, "random" the same over an untrained one, the others are ProtoNet.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from common import keep
from tiny_imagenet import tiny_imagenet
from torch import nn

from metafit import backbones
from metafit.data import TaskSampler
from metafit.evaluation import Contender, describe, evaluate, result
from metafit.learners import Learner, build
from metafit.learners.heads import CosineHead
from metafit.training import meta_train, pretrain

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2400, help="of each training, in all")
    parser.add_argument("--shot", type=int, default=1)
    parser.add_argument("--head", default="linear", choices=("linear", "cosine"))
    parser.add_argument("--mixup", type=float, default=0.0)
    parser.add_argument("--metric", default="cosine", choices=("cosine", "euclidean"), help="of ProtoNet")
    parser.add_argument("--second-rate", type=float, default=3e-4, help="of meta-training after pretraining")
    parser.add_argument("--episodes", type=int, default=600)
    parser.add_argument("--size", type=int, default=32, choices=(64, 32, 16), help="of the images, in pixels")
    parser.add_argument("--width", type=int, default=32, help="channels of every block")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    splits = tiny_imagenet(args.size)
    start = backbones.load("conv4", width=args.width, channels_in=3, image_size=args.size)
    tasks = TaskSampler(splits.train, 5, args.shot, 5, batch=4, seed=args.seed)
    validation = TaskSampler(splits.validation, 5, args.shot, 5, 10, seed=1)
    test = TaskSampler(splits.test, 5, args.shot, 15, batch=10, seed=2)
    seconds: dict[str, int] = {}

    def classified(name: str, steps: int) -> nn.Module:
        body, started = copy.deepcopy(start), time.process_time()
        head = CosineHead if args.head == "cosine" else nn.Linear
        pretrain(body, splits.train, start.out_dim, head, args.mixup, steps=steps, seed=args.seed)
        seconds[name] = round(time.process_time() - started)
        return body

    def prototypical(name: str, body: nn.Module, steps: int, rate: float) -> tuple[Learner, list[dict[str, object]]]:
        learner, started = build("protonet", start.out_dim, 5, body, metric=args.metric), time.process_time()
        done = meta_train(learner, tasks, validation, steps=steps, rate=rate, validate_every=max(1, steps // 8))
        seconds[name] = seconds.get(name, 0) + round(time.process_time() - started)
        return learner, done.history

    def frozen(body: nn.Module) -> Learner:
        return build("centroid", start.out_dim, 5, body)

    half = args.steps // 2
    trained = {
        "both": prototypical("both", classified("both", half), args.steps - half, args.second_rate),
        "pretrain": (frozen(classified("pretrain", args.steps)), []),
        "meta-train": prototypical("meta-train", copy.deepcopy(start), args.steps, 1e-3),
        "random": (frozen(copy.deepcopy(start)), []),
    }
    contenders = [
        Contender(name, learner, evaluate(learner, test, args.episodes), history)
        for name, (learner, history) in trained.items()
    ]
    row = result(contenders, test, backbone="conv4", source=describe(splits, "tiny-imagenet", "image"))
    row["protocol"] |= {"steps": args.steps, "head": args.head, "mixup": args.mixup, "metric": args.metric}
    keep(f"pretraining-tiny-imagenet-{args.metric}-5w{args.shot}s", row, seconds=seconds)
