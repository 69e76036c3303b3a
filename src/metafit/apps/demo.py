"""The whole job on packaged real data, in a few minutes on two cores: `metafit demo`.

Text: ``home-intents``, 38 home-assistant intents whose utterances are expanded from sentence templates, in a frozen
MiniLM BERT. Images: ``animals`` and ``digits`` and their quarter turns, in a Conv-4 that starts from random weights.
Test classes are in no training task.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F

from metafit.apps.comparing import compare_learners, tell
from metafit.apps.preparing import Prepared, prepare, seeded
from metafit.apps.protocol import Protocol
from metafit.data import Source, Splits, packaged
from metafit.disk import writable_folder
from metafit.evaluation import comparison_figure, describe, verdict, write_report
from metafit.progress import say
from metafit.training import Recipe

IMAGES_PER_CLASS = 100


def run(out: str | os.PathLike[str] = "demo-out", seed: int = 0) -> list[dict[str, Any]]:
    """Compares with and without meta-learning on text and on images; leaves ``report.html`` and model folders.

    Returns:
        The results: text 1-shot, text 5-shot, images 1-shot.
    """
    folder = writable_folder(out)
    say("text: home-assistant intents in a frozen MiniLM (features are computed once)")
    text = prepare(packaged.load("home-intents"), seed=seed)
    jobs = [
        ("text-1-shot", text, Protocol(5, 1, seed=seed), ["protonet", "anil"]),
        ("text-5-shot", text, Protocol(5, 5, seed=seed), ["protonet"]),
        ("images-1-shot", _shapes(seed), Protocol(5, 1, query=10, episodes=200, seed=seed), ["protonet"]),
    ]
    results = []
    for name, prepared, protocol, learners in jobs:
        say(f"{name}: meta-training on {len(prepared.splits.train.classes)} classes, "
            f"testing on {len(prepared.splits.test.classes)} others")  # fmt: skip
        # over images both are the Conv-4 before meta-training: the same network, with its random weights
        baselines = ("centroid", "linear", "finetune") if prepared.body is None else ("centroid", "linear")
        results.append(compare_learners(prepared, learners, protocol, folder / name, baselines))
        tell(results[-1])
        say(verdict(results[-1]))
    write_report(results, folder / "report.html")
    comparison_figure(results[0], folder / "comparison.png")
    say(f"report: {folder / 'report.html'}")
    return results


def _shapes(seed: int) -> Prepared:
    """Animal silhouettes and handwritten digits, 28×28; each class is split first, then turned into four."""
    animals, digits = packaged.load("animals"), packaged.load("digits")
    turned = F.interpolate(digits.x.float(), (28, 28), mode="bilinear").round().to(torch.uint8)
    x, y = torch.cat([animals.x, turned]), torch.cat([animals.y, digits.y + len(animals.classes)])
    first = torch.cat([torch.nonzero(y == c)[:IMAGES_PER_CLASS, 0] for c in range(20)])
    names = (*animals.classes, *(f"digit {name}" for name in digits.classes))
    train, validation, test = Source("shapes", x[first], y[first], names, "image").split(seed=seed)
    assert validation is not None
    splits = Splits(_quarter_turns(train), _quarter_turns(validation), _quarter_turns(test))
    about = describe(splits, "animals and digits, with quarter turns", "image")
    network = seeded("conv4", seed)
    return Prepared(splits, about, Recipe("conv4", {}, True), network.out_dim, network.requires_grad_(True))


def _quarter_turns(source: Source) -> Source:
    """Rotated classes are new classes, as in the Omniglot benchmarks."""
    n = len(source.classes)
    return Source(
        source.name,
        torch.cat([source.x.rot90(k, (2, 3)) for k in range(4)]),
        torch.cat([source.y + k * n for k in range(4)]),
        tuple(f"{name} {90 * k}°" for k in range(4) for name in source.classes),
        source.modality,
    )
