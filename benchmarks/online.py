"""A stream of BANKING77 in a frozen MiniLM, remembered in bounded room: `python benchmarks/online.py`.

The 10,003 utterances of train.csv come in five orders (four shuffles, and sorted by intent), 500 at a time; the 3,080
of test.csv are the test. `OnlineClassifier` with 5, 10 and 20 rows a class beside the batch (`FewShotClassifier` on all
of them), and beside the same learner on as many real utterances: by herding (iCaRL, Rebuffi et al., 2017, eq. 4, which
sees a whole class at once), or by chance. Then the false alarms of drift in these streams, how soon drift is told once
all intents have changed places, and what feedback is worth: 2,000 predictions, from 5 labelled utterances an intent.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from common import RESULTS, data
from torch import Tensor

from metafit import backbones
from metafit.apps import FewShotClassifier, OnlineClassifier
from metafit.data import from_csv
from metafit.data.features import features
from metafit.disk import write_json
from metafit.evaluation.statistics import reliability
from metafit.progress import say

CHUNK = 500


class Part:
    """Texts, their labels and their features, of one file."""

    def __init__(self, name: str):
        source = from_csv(data("text", "banking77", f"{name}.csv"), text="text", label="category")
        self.texts = list(source.x)
        self.labels = np.array([source.classes[c] for c in source.y.tolist()])
        self.features = features(source, backbones.load("minilm-l6")).x[:]


def remembered(*parts: Part) -> backbones.Backbone:
    """MiniLM, as a table of what it made of each text."""
    table = torch.cat([part.features for part in parts])
    row = {text: i for i, text in enumerate(text for part in parts for text in part.texts)}
    return backbones.wrap(
        lambda rows: table[rows], table.shape[1], "text", lambda texts: torch.tensor([row[t] for t in texts]), "MiniLM"
    )


def herded(x: Tensor, room: int) -> list[int]:
    """The examples whose running mean stays nearest the mean of all."""
    chosen: list[int] = []
    total, mean = torch.zeros_like(x[0]), x.mean(0)
    for k in range(1, min(room, len(x)) + 1):
        away = (mean - (total + x) / k).square().sum(1)
        away[chosen] = torch.inf
        chosen.append(int(away.argmin()))
        total = total + x[chosen[-1]]
    return chosen


def figures(few: FewShotClassifier, test: Part) -> dict[str, float]:
    probability = few.predict_proba(test.texts)
    right = few.classes_[probability.argmax(1)] == test.labels
    ece = reliability(torch.tensor(probability.max(1)), torch.tensor(right))[0]
    return {"accuracy": round(float(right.mean()), 6), "ece": round(float(ece), 4)}


def told(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Mean over the orders, and each of them."""
    return {
        "mean": {name: round(float(np.mean([row[name] for row in rows])), 6) for name in rows[0]},
        "orders": [row["accuracy"] for row in rows],
    }


def stream(few: OnlineClassifier, train: Part, order: np.ndarray) -> OnlineClassifier:
    for rows in np.split(order, range(CHUNK, len(order), CHUNK)):
        few.partial_fit([train.texts[i] for i in rows], train.labels[rows])
    return few


def some_of(train: Part, order: np.ndarray, room: int, herding: bool) -> np.ndarray:
    rows = [order[train.labels[order] == c] for c in np.unique(train.labels)]
    return np.concatenate([part[herded(train.features[part], room)] if herding else part[:room] for part in rows])


def feedback(
    train: Part, test: Part, order: np.ndarray, backbone: backbones.Backbone, learner: str
) -> dict[str, float]:
    """Accuracy after 2,000 predictions, by what is said of them."""
    first = some_of(train, order, 5, False)
    rest = order[~np.isin(order, first)][:2000]
    made = {}
    for taught in ("nothing", "right", "right and wrong", "labels"):
        few = OnlineClassifier(learner=learner, backbone=backbone, per_class=20, in_all=2000)
        few.fit([train.texts[i] for i in first], train.labels[first])
        for rows in np.split(rest, range(CHUNK, len(rest), CHUNK)) if taught != "nothing" else []:
            texts = [train.texts[i] for i in rows]
            if taught == "labels":
                few.partial_fit(texts, train.labels[rows])
                continue
            said = few.predict(texts)
            right = said == train.labels[rows]
            kept = np.flatnonzero(right) if taught == "right" else np.arange(len(rows))
            few.feedback([texts[i] for i in kept], said[kept], right[kept])
        made[taught] = figures(few, test)["accuracy"]
    return made


def delay(train: Part, order: np.ndarray, backbone: backbones.Backbone) -> int:
    """How many labelled utterances after all intents have changed places, at 2,500, drift is told."""
    few = OnlineClassifier(learner="centroid", backbone=backbone)
    names = np.unique(train.labels)
    few = stream(few, train, order[:2500])
    changed = names[(np.searchsorted(names, train.labels) + 1) % len(names)]
    for done, i in enumerate(order[2500:], 1):
        few.partial_fit([train.texts[i]], changed[[i]])
        if few.drift_.alarms:
            return done
    raise AssertionError("never")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learner", default="linear")
    parser.add_argument("--rows", type=int, nargs="+", default=[5, 10, 20])
    args = parser.parse_args()
    torch.set_num_threads(1)
    train, test = Part("train"), Part("test")
    backbone = remembered(train, test)
    shuffles = [np.random.default_rng(seed).permutation(len(train.texts)) for seed in range(4)]
    orders = [*shuffles, train.labels.argsort(kind="stable")]
    batch = FewShotClassifier(learner=args.learner, backbone=backbone).fit(train.texts, train.labels)
    row: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "learner": args.learner, "backbone": "minilm-l6"}
    row["batch"] = figures(batch, test)
    say(f"batch: {row['batch']}")
    tested = alarms = 0
    for room in args.rows:
        found: dict[str, list[dict[str, float]]] = {"stream": [], "herding": [], "chance": []}
        for order in orders:
            few = OnlineClassifier(learner=args.learner, backbone=backbone, per_class=room, in_all=2000)
            found["stream"].append(figures(stream(few, train, order), test))
            tested, alarms = tested + few.drift_.tested, alarms + len(few.drift_.alarms)
            for name in ("herding", "chance"):
                rows = some_of(train, order, room, name == "herding")
                some = FewShotClassifier(learner=args.learner, backbone=backbone)
                found[name].append(figures(some.fit([train.texts[i] for i in rows], train.labels[rows]), test))
        row[f"{room} a class"] = {name: told(figure) for name, figure in found.items()}
        say(f"{room} a class: { {name: told(figure)['mean'] for name, figure in found.items()} }")
    row["drift"] = {
        "every": few.drift_.every,
        "tested": tested,
        "false alarms": alarms,
        "told after": [delay(train, order, backbone) for order in shuffles],
    }
    say(f"drift: {row['drift']}")
    row["feedback"] = [feedback(train, test, order, backbone, args.learner) for order in shuffles]
    say(f"feedback: {row['feedback']}")
    write_json(RESULTS / "online-banking77.json", row)
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
