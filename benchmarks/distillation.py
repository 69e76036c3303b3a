"""MiniLM distilled to a quarter of its size: `python benchmarks/distillation.py`.

The student sees the utterances of BANKING77's training intents and of the packaged texts, without labels; the test is
of frozen centroids on the test intents of BANKING77, of which neither has seen an utterance. The speed is of the same
texts by both networks, in turn, on one thread.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from common import keep
from text import banking77

from metafit import backbones
from metafit.backbones import Backbone
from metafit.data import Source, TaskSampler, packaged
from metafit.data.features import features
from metafit.evaluation import Contender, describe, evaluate, result
from metafit.learners import build
from metafit.training import distil
from metafit.training.distil import MATCHES


def texts_a_second(networks: dict[str, Backbone], texts: list[str], rounds: int = 7) -> dict[str, float]:
    """The median over rounds, in each of which all networks embed the texts once."""
    took: dict[str, list[float]] = {name: [] for name in networks}
    for network in networks.values():
        network.embed(texts[:64], progress=False)
    for _ in range(rounds):
        for name, network in networks.items():
            started = time.perf_counter()
            network.embed(texts, progress=False)
            took[name].append(time.perf_counter() - started)
    speeds = {name: len(texts) / statistics.median(seconds) for name, seconds in took.items()}
    ratios = [a / b for a, b in zip(took["minilm-l6"], took["distilled"], strict=True)]
    return {**speeds, "ratio": statistics.median(ratios)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--match", default="aligned", choices=MATCHES)
    parser.add_argument("--shot", type=int, default=1)
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    splits = banking77().split(seed=0)
    teacher, student = backbones.load("minilm-l6"), backbones.load("minilm-small")
    cut = copy.deepcopy(student)
    parts = [splits.train, packaged.load("home-intents"), packaged.load("chatter-topics")]
    known = torch.cat([features(part, teacher).x[:] for part in parts])
    texts = [text for part in parts for text in part.x]
    seen = Source("texts", student.preprocess(texts), torch.arange(len(texts)) % 2, ("no", "labels"), "text")
    started = time.process_time()
    run = {"steps": args.steps, "batch": args.batch, "rate": args.rate, "seed": args.seed}
    losses = distil(student.requires_grad_(True), seen, known, student.out_dim, MATCHES[args.match], **run)
    seconds = round(time.process_time() - started)
    student.eval()
    networks = {"distilled": student, "minilm-l6": teacher, "cut": cut}
    contenders = []
    for name, network in networks.items():
        embedded = splits.test.with_x(network.embed(splits.test.x), "vector")
        test = TaskSampler(embedded, 5, args.shot, 15, batch=50, seed=2 + args.seed)
        learner = build("centroid", network.out_dim, 5)
        contenders.append(Contender(name, learner, evaluate(learner, test, args.episodes)))
    row = result(contenders, test, backbone="minilm-small", source=describe(splits, "banking77", "text"))
    row["protocol"] |= {**run, "match": args.match, "texts": len(texts)}
    row["parameters"] = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    row["speed"] = texts_a_second({n: networks[n] for n in ("minilm-l6", "distilled")}, splits.test.x[:512])
    row["losses"] = [round(sum(losses[i : i + 50]) / len(losses[i : i + 50]), 4) for i in range(0, len(losses), 50)]
    keep(f"distillation-banking77-5w{args.shot}s", row, seconds=seconds)
    print(
        row["parameters"],
        row["speed"],
        [(o["learner"], o["metrics"]["accuracy"], o["paired_difference"]) for o in row["against"]],
    )
