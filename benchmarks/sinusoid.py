"""Sinusoid regression, MLP 1-40-40-1, one inner step: `python benchmarks/sinusoid.py maml --shot 5`.

Amplitude in [0.1, 5], phase in [0, π], x in [-5, 5]; frequency 1 as in Finn et al. (2017), or in [0.8, 1.2] with
``--frequency`` as in Li et al. (2017), whose table the published figures are from. The test is the mean squared error
on 100 query points of each of 600 functions (the spread of an error that depends on few points would hide it).
"""

from __future__ import annotations

import argparse

import torch
from common import keep, option
from torch import nn

from metafit.data import Sinusoids
from metafit.evaluation import Contender, evaluate, result
from metafit.learners import build, entry
from metafit.training import meta_train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("learner")
    parser.add_argument("--option", action="append", default=[], help="of the learner, as name=value")
    parser.add_argument("--shot", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30000)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--inner-rate", type=float, default=0.01)
    parser.add_argument("--frequency", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    frequency = (0.8, 1.2) if args.frequency else (1.0, 1.0)
    body = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU())
    learner = build(args.learner, 40, None, body, rate=args.inner_rate, **dict(option(o) for o in args.option))
    history: list[dict[str, object]] = []
    if entry(args.learner).meta_trained:
        training = Sinusoids(args.shot, args.shot, args.batch, args.seed, frequency=frequency)
        validation = Sinusoids(args.shot, 100, 100, seed=1001, frequency=frequency)
        history = meta_train(
            learner, training, validation, steps=args.steps, rate=args.rate, validation_tasks=500
        ).history
    test = Sinusoids(args.shot, 100, 100, seed=1002, frequency=frequency)
    row = result([Contender(args.learner, learner, evaluate(learner, test, 600), history)], test)
    keep(f"sinusoid{'-frequency' if args.frequency else ''}-{args.learner}-{args.shot}s", row)


if __name__ == "__main__":
    main()
