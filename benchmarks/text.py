"""Intents in a frozen MiniLM: `python benchmarks/text.py banking77 --shot 1`, or `clinc150`.

Class splits: BANKING77 46/12/19 intents by ``default_rng(0)`` over the sorted names (the utterances of train.csv and
test.csv together); CLINC150 by domain, the first 6 of the sorted names for training, 1 validation, 3 test.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from typing import get_args

import torch
from common import data, keep, option

from metafit.apps.comparing import compare_learners
from metafit.apps.preparing import prepare
from metafit.apps.protocol import Protocol
from metafit.apps.unsupervised import Unsupervised
from metafit.data import Source, from_arrays, from_csv
from metafit.learners import entry


def banking77() -> Source:
    parts = [
        from_csv(data("text", "banking77", f"{part}.csv"), text="text", label="category") for part in ("train", "test")
    ]
    texts = [text for part in parts for text in part.x]
    labels = [part.classes[c] for part in parts for c in part.y.tolist()]
    return from_arrays(texts, labels, name="banking77")


def clinc150() -> Source:
    splits = json.loads(data("text", "clinc150_full.json").read_text())
    domains = json.loads(data("text", "clinc150_domains.json").read_text())
    of = {intent: domain for domain, intents in domains.items() for intent in intents}
    rows = [row for part in ("train", "val", "test") for row in splits[part]]
    source = from_arrays([text for text, _ in rows], [intent for _, intent in rows], name="clinc150")
    return Source(source.name, source.x, source.y, source.classes, "text", domains=tuple(of[c] for c in source.classes))


def main(about: str | None, sources: Mapping[str, Callable[[], Source]]) -> None:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", choices=sources)
    parser.add_argument("--learner", default="protonet,anil")
    parser.add_argument("--baselines", default="centroid,knn,linear,finetune")
    parser.add_argument("--scope", choices=("lora",), help="train adapters in the MiniLM, not a map over its features")
    parser.add_argument("--unsupervised", choices=get_args(Unsupervised), help="train without labels")
    parser.add_argument("--option", action="append", default=[], help="of the learners that have it, as name=value")
    parser.add_argument("--name", help="of the row, before the task (as the source)")
    parser.add_argument("--way", type=int, default=5)
    parser.add_argument("--steps", type=int, help="outer steps")
    parser.add_argument("--patience", type=int, default=8)
    parser.add_argument("--query", type=int, default=15)
    parser.add_argument("--shot", type=int, default=1)
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of tasks and initialisation; the class split is fixed")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    source, learners = sources[args.source](), args.learner.split(",")
    prepared = prepare(source, train_backbone=args.scope == "lora", by_domain=args.source == "clinc150", seed=0)
    protocol = Protocol(
        args.way,
        args.shot,
        args.query,
        args.episodes,
        args.steps,
        seed=args.seed,
        patience=args.patience,
        unsupervised=args.unsupervised,
    )
    given = [option(o) for o in args.option] + ([("scope", args.scope)] if args.scope else [])
    options = {name: {k: v for k, v in given if k in entry(name).options()} for name in learners}
    row = compare_learners(prepared, learners, protocol, baselines=args.baselines.split(","), options=options)
    name = f"unsupervised-{args.source}-{args.unsupervised}" if args.unsupervised else args.source
    keep(f"{args.name or name}-{args.way}w{args.shot}s", row)


if __name__ == "__main__":
    main(__doc__, {"banking77": banking77, "clinc150": clinc150})
