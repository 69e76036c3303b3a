"""Learned optimizers where they were not trained: `python benchmarks/learned_optimizer.py mlp`.

The rule alone is meta-trained, over BANKING77's training classes (features of a frozen MiniLM) and networks with new
random weights every few outer steps: 10 inner steps of a network with one hidden layer of 32, or with ``--varied`` 5 to
20 of networks of one or two layers. It is then given 10 and 20 steps on test classes, of the first network and of
others that it has never met, beside SGD and Adam at the best of seven rates each, chosen on validation classes for the
very network and number of steps. All start from the same weights.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from common import RESULTS
from text import banking77
from torch import nn

from metafit import __version__
from metafit.apps.preparing import prepare
from metafit.data import TaskSampler
from metafit.disk import write_json
from metafit.evaluation import evaluate, interval
from metafit.learners import GradientLearner, build
from metafit.training import meta_train

DIM, WAY, SHOT = 384, 5, 5
MOMENTS = (10, 20)
Network = tuple[Callable[[], nn.Module], int]  # and the size of its features
NETWORKS: dict[str, Network] = {
    "as trained: 32, ReLU": (lambda: layers(nn.ReLU, DIM, 32), 32),
    "wider: 256, ReLU": (lambda: layers(nn.ReLU, DIM, 256), 256),
    "deeper: 64-64-64, tanh": (lambda: layers(nn.Tanh, DIM, 64, 64, 64), 64),
    "convolutional: 8 channels of width 9, max pooling": (lambda: convolutional(), 8 * 48),
}
RATES = {"sgd": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0), "adam": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1)}


def layers(bend: type[nn.Module], *sizes: int) -> nn.Module:
    return nn.Sequential(*(part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), bend())))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, DIM)), nn.Conv1d(1, 8, 9, padding=4), nn.ReLU(), nn.MaxPool1d(8), nn.Flatten()
    )


def drawn(seed: int) -> tuple[Network, int]:
    """One or two hidden layers of 16 to 128, and inner steps to train them for."""
    chance = random.Random(seed)
    bend, sizes = chance.choice((nn.ReLU, nn.Tanh, nn.GELU)), chance.choices((16, 32, 64, 128), k=chance.choice((1, 2)))
    return (lambda: layers(bend, DIM, *sizes), sizes[-1]), chance.choice((5, 10, 20))


def from_random(rule: str, network: Network, steps: int, seed: int, **options: Any) -> GradientLearner:
    """The learner of the family that trains a network from random weights, which are not meta-learned."""
    torch.manual_seed(seed)
    make, dim = network
    learner = build("maml", dim, WAY, make(), rule=rule, steps=steps, **options)
    assert isinstance(learner, GradientLearner)
    learner.model.requires_grad_(False)
    return learner


def trained(rule: str, args: argparse.Namespace, splits: Any) -> tuple[nn.Module, float]:
    """The rule after its meta-training, and the seconds that took."""
    started, first = time.process_time(), next(iter(NETWORKS.values()))
    made = from_random(rule, first, MOMENTS[0], 0, rate=1.0).optimizer
    for part in range(args.networks):
        network, steps = drawn(part) if args.varied else (first, MOMENTS[0])
        learner = from_random(rule, network, steps, 1000 + part)
        learner.optimizer = made
        tasks = TaskSampler(splits.train, WAY, SHOT, 5, 8, seed=part)
        rate = args.rate * (1 - part / args.networks)
        meta_train(learner, tasks, steps=args.steps, rate=rate, schedule="constant", clip=1.0, show_progress=False)
    return made, time.process_time() - started


def measured(learner: GradientLearner, tasks: TaskSampler, count: int) -> dict[int, torch.Tensor]:
    """The query loss of each task after so many steps."""
    learner.test_steps = MOMENTS[-1]
    found = evaluate(learner, tasks, count, show_progress=False)
    return {step: found.loss[:, found.steps.tolist().index(step)] for step in MOMENTS}


def best_rate(rule: str, network: Network, moment: int, tasks: TaskSampler) -> float:
    """Of ``RATES``, by the loss after so many steps of validation tasks."""
    losses = {
        rate: measured(from_random(rule, network, MOMENTS[0], 0, rate=rate), tasks, 50)[moment].mean().nan_to_num(1e9)
        for rate in RATES[rule]
    }
    return min(losses, key=lambda rate: float(losses[rate]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rule", choices=("mlp", "lstm"))
    parser.add_argument("--networks", type=int, default=10, help="with new random weights, in training")
    parser.add_argument("--steps", type=int, default=20, help="outer steps with each")
    parser.add_argument("--varied", action="store_true", help="train networks of many shapes for 5 to 20 steps")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--episodes", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    splits = prepare(banking77(), seed=0).splits
    assert splits.validation is not None
    validation, test = (
        TaskSampler(part, WAY, SHOT, 15, 50, seed) for part, seed in ((splits.validation, 3), (splits.test, 2))
    )
    rule, seconds = trained(args.rule, args, splits)
    rows = []
    for name, network in NETWORKS.items():
        learner = from_random(args.rule, network, MOMENTS[0], 7)
        learner.optimizer = rule
        ours = measured(learner, test, args.episodes)
        for moment in MOMENTS:
            row: dict[str, Any] = {"network": name, "steps": moment, args.rule: interval(ours[moment])}
            for peer in RATES:
                rate = best_rate(peer, network, moment, validation)
                theirs = measured(from_random(peer, network, MOMENTS[0], 7, rate=rate), test, args.episodes)[moment]
                row[peer] = {"rate": rate, "loss": interval(theirs), "above": interval(theirs - ours[moment])}
            rows.append(row)
            print(row, flush=True)
    about = {"schema": 1, "metafit": __version__, "command": " ".join(["python", *sys.argv]), "rule": args.rule}
    write_json(
        RESULTS / f"learned-optimizer-{args.rule}{'-varied' * args.varied}.json",
        {**about, "seconds": round(seconds), "rows": rows},
    )


if __name__ == "__main__":
    main()
