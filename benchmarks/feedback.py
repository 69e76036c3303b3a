"""The feedback loop from a bad start, against random search: `python benchmarks/feedback.py banking77 --seed 0`.

Both begin with the same setting, race by the same halving, accept by the same judges and have the same time: seconds
of the processor in trials. ``banking77`` is over frozen features of MiniLM, ``omniglot`` a Conv-4 from random weights;
both 5-way 1-shot, with the class splits of the tables.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import omniglot
import torch
from common import RESULTS
from text import banking77

from metafit import __version__, backbones
from metafit.apps.improving import Improvement
from metafit.apps.preparing import Prepared, prepare
from metafit.apps.protocol import Protocol
from metafit.disk import write_json
from metafit.evaluation import describe
from metafit.feedback import propose
from metafit.feedback.at_random import AtRandom
from metafit.feedback.loop import describe as words
from metafit.training import Recipe

BAD: dict[str, Any] = {"option.rate": 1e-3, "option.steps": 1, "rate": 1e-5}
START = {
    "banking77": {"learner": "maml", "option.scope": "body", "steps": 200, **BAD},
    "omniglot": {"learner": "maml", "backbone": "conv4", "option.scope": "norm", "steps": 20, **BAD},
}
QUERIES = {"banking77": 15, "omniglot": 5}  # a class: fewer where each is a picture for a network that trains


def characters(seed: int, backbone: str | None, trained: bool) -> Prepared:
    torch.manual_seed(seed)  # the same weights in every trial, of a loop that was stopped too
    splits, network = omniglot.omniglot(), backbones.load(backbone or "conv4")
    about = describe(splits, "omniglot", "image")
    return Prepared(splits, about, Recipe(backbone, {}, True), network.out_dim, network.requires_grad_(True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", choices=START)
    parser.add_argument("--seed", type=int, default=0, help="of tasks, initialisation and random search")
    parser.add_argument("--seconds", type=float, default=300, help="of the processor, in trials")
    parser.add_argument("--tasks", type=int, default=200, help="validation tasks that choose, and that judge")
    parser.add_argument("--episodes", type=int, default=600)
    parser.add_argument("--out", help="folder for the pages and models")
    args = parser.parse_args()
    torch.set_num_threads(1)
    read = partial(characters, args.seed) if args.source == "omniglot" else partial(prepare, banking77(), seed=0)
    protocol, rows = Protocol(5, 1, QUERIES[args.source], args.episodes, seed=args.seed), []
    with tempfile.TemporaryDirectory() as scratch:
        for name, proposer in (("diagnosis", propose), ("random", AtRandom(args.seed))):
            out = Path(args.out or scratch) / f"{args.source}-{name}-{args.seed}"
            loop = Improvement(read, START[args.source], protocol, out, tasks=args.tasks, clock=time.process_time)
            chain, made = loop.run(args.seconds, proposer)
            rows.append(
                {
                    "proposer": name,
                    "accuracy": made["metrics"]["accuracy"],
                    "against": {row["learner"]: row["metrics"]["accuracy"] for row in made["against"]},
                    "setting": words(chain.setting),
                    "accepted": [words(t.candidates[t.chosen]["change"]) for t in chain.rounds if t.accepted],
                    "seconds": chain.seconds,
                    "ended": chain.ended,
                }
            )
            print(rows[-1], flush=True)
    command = f"python feedback.py {args.source} --seed {args.seed} --seconds {args.seconds:g} --tasks {args.tasks}"
    command += "" if args.episodes == 600 else f" --episodes {args.episodes}"
    about = {"schema": 1, "metafit": __version__, "command": command, "start": words(START[args.source])}
    write_json(RESULTS / f"feedback-{args.source}-{args.seconds:g}s-{args.seed}.json", {**about, "rows": rows})


if __name__ == "__main__":
    main()
