"""Functions of Gaussian processes: `python benchmarks/gaussian_process.py tnp`.

Trained on the RBF kernel, tested on it, on a Matérn kernel and on a periodic one (protocol of Nguyen and Grover, 2022,
arXiv:2207.04179, section 5.1). A row's ``loss`` is the negative log-density of a query target in nats.
"""

from __future__ import annotations

import argparse
import time
from typing import get_args

import torch
from common import keep, option

from metafit.data import GaussianProcesses
from metafit.data.gaussian_process import Kernel
from metafit.evaluation import Contender, evaluate, result
from metafit.learners import build
from metafit.training import meta_train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("learner")
    parser.add_argument("--option", action="append", default=[], help="of the learner, as name=value")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--episodes", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    learner = build(args.learner, 1, None, **dict(option(o) for o in args.option))
    started = time.perf_counter()
    training, validation = GaussianProcesses(seed=args.seed), GaussianProcesses(batch=100, seed=1001)
    history = meta_train(learner, training, validation, steps=args.steps, rate=args.rate, validation_tasks=500).history
    seconds = round(time.perf_counter() - started)
    for kernel in get_args(Kernel):
        test = GaussianProcesses(kernel, batch=100, seed=1002)
        row = result([Contender(args.learner, learner, evaluate(learner, test, args.episodes), history)], test)
        keep(f"gaussian-process-{args.learner}-{kernel}", row, seconds=seconds)


if __name__ == "__main__":
    main()
