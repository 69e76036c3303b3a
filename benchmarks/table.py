"""Writes benchmarks/RESULTS.md, and the measured rows of the catalogue, from benchmarks/results/*.json."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from metafit.evaluation import interval

HERE = Path(__file__).parent
MEASURED = HERE.parent / "src" / "metafit" / "learners" / "measured.json"

# Published accuracies in percent: 5-way 1-shot, 5-way 5-shot, 20-way 1-shot, 20-way 5-shot.
OMNIGLOT = {
    "protonet": ("Snell et al. 2017, table 1", (98.8, 99.7, 96.0, 98.9)),
    "maml": ("Finn et al. 2017, table 1", (98.7, 99.9, 95.8, 98.9)),
    "anil": ("Raghu et al. 2020 report 5w1s and 20w1s only", (None, None, None, None)),
    "maml++": ("Antoniou et al. 2019, table 1", (99.47, 99.93, 97.65, 99.33)),
    "imaml": ("Rajeswaran et al. 2019, table 2", (99.50, 99.74, 96.18, 99.14)),
}
# Published accuracies on miniImageNet, 5-way 1-shot and 5-shot, Conv-4: Baik et al. 2021, Antoniou et al. 2019.
MINI_IMAGENET = {"maml": (49.6, 65.0), "maml++": (52.4, None), "alfa+metal": (57.8, 74.1)}
# Mean log-likelihoods of Nguyen and Grover 2022, table 1, as we remember them: we could not check the page.
GAUSSIAN_PROCESS = {
    "rbf": {"cnp": 0.26, "anp": 0.81, "tnp": 1.39},
    "matern": {"cnp": 0.04, "anp": 0.63, "tnp": 0.95},
    "periodic": {"cnp": -1.40, "anp": -5.02, "tnp": -3.53},
}
CELLS = ((5, 1), (5, 5), (20, 1), (20, 5))
SINUSOID = {"maml": {5: 1.13, 10: 0.77, 20: 0.48}, "meta-sgd": {5: 0.90, 10: 0.53, 20: 0.31}}


def rows(prefix: str) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((HERE / "results").glob(f"{prefix}*.json"))}


def head(*columns: str) -> list[str]:
    """The first two lines of a table."""
    return [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]


def percent(value: dict[str, float]) -> str:
    return f"{100 * value['mean']:.2f} ± {100 * value['ci95']:.2f}"


def lead(difference: dict[str, float]) -> str:
    return f"{100 * difference['mean']:+.2f} ± {100 * difference['ci95']:.2f}"


def text() -> list[str]:
    lines = []
    for stem, row in {**rows("banking77"), **rows("clinc150"), **rows("gtsrb")}.items():
        first = row["learner"]
        lines += [
            f"\n**{stem}**: {row['protocol']['episodes']} test tasks, `{row['command']}`\n",
            *head("learner", "accuracy %", "loss", "ECE", "adaptation ms", "training s", "the first leads by, points"),
        ]
        for name, part, difference in [(first["name"], row, None)] + [
            (o["learner"], o, o["paired_difference"]) for o in row["against"]
        ]:
            m = part["metrics"]
            seconds = f"{part['history'][-1]['seconds']:.0f}" if part["history"] else ""
            lines.append(
                f"| {name} | {percent(m['accuracy'])} | {m['loss']['mean']:.3f} | {m['ece']['mean']:.3f} "
                f"| {m['adapt_ms']['mean']:.2f} | {seconds} | {lead(difference) if difference else ''} |"
            )
    return lines


def families() -> list[str]:
    """Learners that adapt in a forward pass and the baselines, by data: the best on the first data first."""
    columns = {
        "BANKING77 1": ("banking77-metric", "5w1s"),
        "BANKING77 5": ("banking77-metric", "5w5s"),
        "CLINC150 1": ("clinc150-metric", "5w1s"),
        "CLINC150 5": ("clinc150-metric", "5w5s"),
        "GTSRB 1": ("gtsrb", "5w1s"),
    }
    parts: dict[str, dict[str, Any]] = {}
    for title, (prefix, size) in columns.items():
        for row in (row for stem, row in rows(prefix).items() if stem.endswith(size)):
            for name, part in [(row["learner"]["name"], row)] + [(o["learner"], o) for o in row["against"]]:
                parts.setdefault(name, {})[title] = part
    for way in (5, 20):
        for row in rows("omniglot-small").values():
            if row["protocol"]["way"] == way and not row["learner"]["options"]:
                parts.setdefault(row["learner"]["name"], {})[f"Omniglot {way}w1"] = row
    titles = [*columns, "Omniglot 5w1", "Omniglot 20w1"]
    lines = head("learner", *titles, "training s", "adaptation ms")
    order = sorted(parts, key=lambda name: -score(parts[name].get(titles[0])))
    for name in order:
        cells = [f"{100 * score(parts[name].get(title)):.1f}" if title in parts[name] else "" for title in titles]
        first = parts[name].get(titles[0])
        seconds = f"{first['history'][-1]['seconds']:.0f}" if first and first["history"] else ""
        adapts = f"{first['metrics']['adapt_ms']['mean']:.2f}" if first else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {seconds} | {adapts} |")
    return lines


def score(part: dict[str, Any] | None) -> float:
    return -1.0 if part is None else float(part["metrics"]["accuracy"]["mean"])


def omniglot() -> list[str]:
    found = rows("omniglot")
    lines = [
        *head("learner", "task", "accuracy %", "published %", "lead", "training s", "test tasks", "command"),
    ]
    learners = dict.fromkeys(["protonet", "maml", *sorted(row["learner"]["name"] for row in found.values())])
    for learner in learners:
        for i, (way, shot) in enumerate(CELLS):
            row = found.get(f"omniglot-{learner}-{way}w{shot}s")
            if row is not None:
                published = OMNIGLOT.get(learner, ("", (None,) * 4))[1][i]
                gap = "" if published is None else f"{100 * row['metrics']['accuracy']['mean'] - published:+.2f}"
                lines.append(
                    f"| {learner} | {way}-way {shot}-shot | {percent(row['metrics']['accuracy'])} | {published or ''} "
                    f"| {gap} | {row['seconds']} | {row['protocol']['episodes']} | `{row['command']}` |"
                )
    return lines


def omniglot_family() -> list[str]:
    """The catalogue at one small budget: rows ``omniglot-small-ROW-20w1s``, the best last, and the same at 5 ways."""
    lines = [
        *head(
            "learner",
            "family",
            "options",
            "20-way accuracy %",
            "5-way accuracy %",
            "ECE",
            "published, 20-way %",
            "training s",
            "adaptation ms",
        ),
    ]
    found = rows("omniglot-small")
    wide = {stem: row for stem, row in found.items() if stem.endswith("-20w1s")}
    for stem, row in sorted(wide.items(), key=lambda item: item[1]["metrics"]["accuracy"]["mean"]):
        learner, metrics = row["learner"], row["metrics"]
        options = ", ".join(f"{k} {v}" for k, v in learner["options"].items())
        published = OMNIGLOT.get(learner["name"], ("", (None,) * 4))[1][2]
        narrow = found.get(stem.replace("-20w1s", "-5w1s"))
        transductive = " (transductive)" if learner["name"] in ("soft-kmeans", "tim", "laplacian") else ""
        lines.append(
            f"| {learner['name']}{transductive} | {learner['family']} | {options} | {percent(metrics['accuracy'])} "
            f"| {percent(narrow['metrics']['accuracy']) if narrow else ''} | {metrics['ece']['mean']:.3f} "
            f"| {published or ''} | {row['seconds']} | {metrics['adapt_ms']['mean']:.0f} |"
        )
    return lines


def apart(stem: str) -> bool:
    """Whether a row of Tiny-ImageNet is of another size or budget, for comparison with others of its kind."""
    return not {"sixteen", "variant", "long", "mirror", "published", "judge"}.isdisjoint(stem.split("-"))


MARGINS = (
    *("learner", "task", "accuracy %", "over MAML", "over the one before"),
    *("published over MAML, miniImageNet", "training s", "command"),
)


def tiny_imagenet() -> list[str]:
    found = {stem: row for stem, row in rows("tiny-imagenet").items() if not apart(stem)}
    return [*head(*MARGINS), *margins(found, 1), *margins(found, 5)]


def tiny_imagenet_published() -> list[str]:
    """From the inner rate of the publications: rows ``tiny-imagenet-published-...``, ``-seedS`` beside others of it."""
    drawn: dict[str, dict[str, dict[str, Any]]] = {}
    for stem, row in rows("tiny-imagenet-published").items():
        drawn.setdefault(stem.partition("seed")[2], {})[stem] = row
    return [*head(*MARGINS), *(line for _, found in sorted(drawn.items()) for line in margins(found, 1))]


def margins(found: dict[str, dict[str, Any]], shot: int) -> list[str]:
    """The rows of so many shots, the best last, by their leads over MAML's and over each other's."""
    lines = []
    drawn = sorted((row for stem, row in found.items() if stem.endswith(f"-5w{shot}s")), key=score)
    maml = next((row for row in drawn if row["learner"]["name"] == "maml"), None)
    for before, row in zip([None, *drawn], drawn, strict=False):
        theirs = MINI_IMAGENET.get(row["learner"]["name"], (None, None))[shot > 1]
        published = "" if theirs is None else f"{theirs - MINI_IMAGENET['maml'][shot > 1]:+.1f}"
        options = "".join(f", {k} {v}" for k, v in row["learner"]["options"].items() if isinstance(v, str))
        lines.append(
            f"| {row['learner']['name']}{options} | 5-way {shot}-shot | {percent(row['metrics']['accuracy'])} "
            f"| {ahead(row, maml)} | {ahead(row, before)} | {published} | {row['seconds']} "
            f"| `{row['command']}` |"
        )
    return lines


def tiny_imagenet_difficulty() -> list[str]:
    """The margins of seed 1 among the tasks that a ProtoNet finds harder and easier."""
    found = rows("tiny-imagenet-published-rate")
    maml, plus, metal = (
        found[f"tiny-imagenet-published-rate-{name}-seed1-5w1s"]["of_each_task"]
        for name in ("maml", "maml++", "alfa+metal-transductive")
    )
    judge = rows("tiny-imagenet-judge")["tiny-imagenet-judge-protonet-5w1s"]["of_each_task"]
    order, third = sorted(range(len(judge)), key=judge.__getitem__), len(judge) // 3
    groups = {"all": order, "hardest third": order[:third], "middle": order[third:-third], "easiest": order[-third:]}
    lines = head("tasks", "ProtoNet %", "MAML %", "MAML++ over MAML", "ALFA with MeTAL over MAML++", "over MAML")
    for name, ids in groups.items():
        own = [f"{100 * fmean(each[i] for i in ids):.1f}" for each in (judge, maml)]
        pairs = ((plus, maml), (metal, plus), (metal, maml))
        leads = [paired([one[i] - other[i] for i in ids]) for one, other in pairs]
        lines.append(f"| {name} | {' | '.join([*own, *leads])} |")
    return lines


def paired(apart: list[float]) -> str:
    """The mean over tasks, in points, with its 95 % interval."""
    return lead(interval(torch.tensor(apart)))


def ahead(row: dict[str, Any], other: dict[str, Any] | None) -> str:
    """By how many points, and where both rows tell the accuracy of each task, how well that is known over tasks."""
    if other is None:
        return ""
    if row is other or not ("of_each_task" in row and "of_each_task" in other):
        return f"{100 * (score(row) - score(other)):+.2f}"
    return paired([a - b for a, b in zip(row["of_each_task"], other["of_each_task"], strict=True)])


def unsupervised() -> list[str]:
    """Rows ``unsupervised-SOURCE-HOW-...``: the training reads no labels; and of Omniglot's network from scratch."""
    lines = [
        *head(
            "source",
            "labels in training",
            "learner",
            "accuracy %",
            "without meta-training",
            "lead, points",
            "training s",
            "command",
        ),
    ]
    plain = {"omniglot": rows("omniglot-scratch-width32-5w1s").get("omniglot-scratch-width32-5w1s")}
    for stem, row in rows("unsupervised").items():
        source = stem.split("-")[1]
        beside = row["against"][0] if row["against"] else plain[source]
        if row["against"]:
            name, gap = beside["learner"], lead(beside["paired_difference"])
        else:  # of two runs: the interval is as wide as if their tasks were others
            name, ours, theirs = beside["learner"]["name"], row["metrics"]["accuracy"], beside["metrics"]["accuracy"]
            gap = lead(
                {"mean": ours["mean"] - theirs["mean"], "ci95": (ours["ci95"] ** 2 + theirs["ci95"] ** 2) ** 0.5}
            )
        own, other = (percent(part["metrics"]["accuracy"]) for part in (row, beside))
        lines.append(
            f"| {source} | {row['protocol']['labels']} | {row['learner']['name']} | {own} | {name} {other} | {gap} "
            f"| {row['history'][-1]['seconds']:.0f} | `{row['command']}` |"
        )
    return lines


def contenders(stem: str) -> list[str]:
    """A result's learner and what it was compared with; the lead of the first is paired."""
    found = rows(stem)
    if not found:
        return ["Not measured yet."]
    lines = []
    for row in found.values():
        lines += [
            f"\n`{row['command']}`, {row['protocol']['episodes']} tasks:\n",
            *head("network", "accuracy %", "the first leads by, points", "training s"),
        ]
        seconds = row["seconds"] if isinstance(row["seconds"], dict) else {row["learner"]["name"]: row["seconds"]}
        for name, part, difference in [(row["learner"]["name"], row, None)] + [
            (o["learner"], o, o["paired_difference"]) for o in row["against"]
        ]:
            gap = "" if difference is None else lead(difference)
            lines.append(f"| {name} | {percent(part['metrics']['accuracy'])} | {gap} | {seconds.get(name, '')} |")
    return lines


def with_loss(learner: dict[str, Any]) -> str:
    """A learner's name, and its inner loss where it is not the usual one."""
    loss = learner["options"].get("loss")
    return learner["name"] + (f", loss {loss}" if loss else "")


def tiny_imagenet_gap() -> list[str]:
    """What is learned, and what of it carries over: rows ``tiny-imagenet-long-...`` and ``-mirror-...``."""
    lines = head("learner", "training", "seen classes, %", "unseen classes, %", "gap", "ECE", "seconds", "command")
    for row in {**rows("tiny-imagenet-long"), **rows("tiny-imagenet-mirror")}.values():
        gauge = row["gauge"]
        how = f"{row['history'][-1]['step']:,} steps{', mirrored' if 'mirror' in row['command'] else ''}"
        lines.append(
            f"| {with_loss(row['learner'])} | {how} | {percent(gauge['seen'])} | {percent(gauge['unseen'])} "
            f"| {percent(gauge['gap'])} | {row['metrics']['ece']['mean']:.3f} | {row['seconds']} | `{row['command']}` |"
        )
    return lines


def tiny_imagenet_family() -> list[str]:
    """The catalogue at one smaller budget: rows ``tiny-imagenet-sixteen-ROW-5w1s``, the best last, and ``5w5s``."""
    lines = head(
        "learner", "options", "1 shot %", "over MAML", "5 shots %", "over MAML", "ECE", "training s", "adaptation ms"
    )
    found = rows("tiny-imagenet-sixteen")

    def compared(row: dict[str, Any] | None, shot: int) -> str:
        if row is None:
            return "| "
        maml = score(found.get(f"tiny-imagenet-sixteen-maml-5w{shot}s"))
        return f"{percent(row['metrics']['accuracy'])} | {100 * (score(row) - maml):+.2f}"

    once = {stem: row for stem, row in found.items() if stem.endswith("-5w1s")}
    for stem, row in sorted(once.items(), key=lambda item: score(item[1])):
        learner, metrics = row["learner"], row["metrics"]
        options = ", ".join(f"{k} {v}" for k, v in learner["options"].items() if k != "rate")
        five = compared(found.get(stem.replace("-5w1s", "-5w5s")), 5)
        lines.append(
            f"| {learner['name']} | {options} | {compared(row, 1)} | {five} "
            f"| {metrics['ece']['mean']:.3f} | {row['seconds']} | {metrics['adapt_ms']['mean']:.0f} |"
        )
    return lines


LONG = "tiny-imagenet-variant-long"


def tiny_imagenet_budget() -> list[str]:
    """At nine times the tasks."""
    return [*head(*MARGINS), *margins(rows(LONG), 1)]


def tiny_imagenet_variants() -> list[str]:
    """What else might move the margins: rows ``tiny-imagenet-variant-...``, beside the one of the table above."""
    lines = head("learner", "accuracy %", "as above", "training s", "command")
    above = rows("tiny-imagenet-sixteen")
    for stem, row in rows("tiny-imagenet-variant").items():
        if stem.startswith(LONG):  # in a table of their own
            continue
        name, loss = row["learner"]["name"], row["learner"]["options"].get("loss", "")
        plain = f"tiny-imagenet-sixteen-{name}{'-transductive' if 'transductive' in loss else ''}-5w1s"
        lines.append(
            f"| {with_loss(row['learner'])} | {percent(row['metrics']['accuracy'])} "
            f"| {100 * score(above[plain]):.2f} | {row['seconds']} | `{row['command']}` |"
        )
    return lines


def pretraining() -> list[str]:
    return contenders("pretraining-tiny-imagenet")


def distillation() -> list[str]:
    return contenders("distillation")


def feedback() -> list[str]:
    """Loops from a bad start, by diagnosis and at random: a row a seed."""
    found = rows("feedback")
    if not found:
        return ["Not measured yet."]
    lines = head("data", "seed", "proposals", "start %", "end %", "accepted", "seconds", "command")
    for stem, made in found.items():
        _, source, budget, seed = stem.split("-")
        for row in made["rows"]:
            before, after = percent(row["against"]["start"]), percent(row["accuracy"])
            accepted = "; ".join(f"`{words}`" for words in row["accepted"])
            lines.append(
                f"| {source}, {budget} | {seed} | {row['proposer']} | {before} | {after} | {accepted} "
                f"| {row['seconds']:.0f} | `{made['command']}` |"
            )
    for group in dict.fromkeys(stem.rpartition("-")[0] for stem in found):
        ends = [
            [100 * row["accuracy"]["mean"] for row in made["rows"]]
            for stem, made in found.items()
            if stem.rpartition("-")[0] == group
        ]
        means = ", ".join(f"{fmean(column):.2f}" for column in zip(*ends, strict=True))
        higher = f"higher in {sum(ours > theirs for ours, theirs in ends)} of {len(ends)}"
        _, source, budget = group.split("-")
        lines.append(f"| {source}, {budget} | mean | diagnosis, random | | {means} | {higher} | | |")
    return lines


def online() -> list[str]:
    """A stream of labelled texts with a bounded memory, against all of them at once."""
    path = HERE / "results" / "online-banking77.json"
    if not path.exists():
        return ["Not measured yet."]
    made = json.loads(path.read_text())
    lines = head("rows remembered a class", "accuracy %", "herding, offline %", "a random memory %")
    for size in ("5 a class", "10 a class", "20 a class"):
        cells = (f"{100 * made[size][how]['mean']['accuracy']:.1f}" for how in ("stream", "herding", "chance"))
        lines.append(f"| {size.split()[0]} | {' | '.join(cells)} |")
    return [*lines, f"| all | {100 * made['batch']['accuracy']:.1f} | | |"]


def sinusoid() -> list[str]:
    lines = [
        *head("learner", "frequency", "shot", "MSE before", "MSE after one step", "published", "training s", "command"),
    ]
    for stem, row in rows("sinusoid").items():
        name, shot = row["learner"]["name"], row["protocol"]["shot"]
        after, before = row["metrics"]["mse"], row["curve"][0]["mse"]
        seconds = f"{row['history'][-1]['seconds']:.0f}" if row["history"] else ""
        lines.append(
            f"| {name} | {'0.8 to 1.2' if 'frequency' in stem else '1'} | {shot} | {before['mean']:.2f} "
            f"| {after['mean']:.3f} ± {after['ci95']:.3f} | {SINUSOID.get(name, {}).get(shot, '')} | {seconds} "
            f"| `{row['command']}` |"
        )
    return lines


def learned_optimizer() -> list[str]:
    """Query losses of learned rules beside tuned ones: networks and horizons, met in training and not."""
    found = rows("learned-optimizer")
    if not found:
        return ["Not measured yet."]
    lines = head("rule", "network", "steps", "loss", "SGD, best of 7 rates", "Adam, best of 7 rates", "training s")
    for stem, made in found.items():
        for row in made["rows"]:
            peers = [row[peer] for peer in ("sgd", "adam")]
            cells = (f"{p['loss']['mean']:.3f} ({p['above']['mean']:+.3f} ± {p['above']['ci95']:.3f})" for p in peers)
            lines.append(
                f"| {stem.removeprefix('learned-optimizer-')} | {row['network']} | {row['steps']} "
                f"| {row[made['rule']]['mean']:.3f} "
                f"| {' | '.join(cells)} | {made['seconds']} |"
            )
    return lines


def gaussian_process() -> list[str]:
    lines = [
        *head(
            "learner",
            "kernel",
            "log-density of a target, nats",
            "published",
            "squared error",
            "calibration error",
            "training s",
            "command",
        ),
    ]
    found = rows("gaussian-process")
    for kernel, published in GAUSSIAN_PROCESS.items():
        for name, theirs in published.items():
            row = found.get(f"gaussian-process-{name}-{kernel}")
            if row is not None:
                loss, error, ece = (row["metrics"][figure] for figure in ("loss", "mse", "ece"))
                lines.append(
                    f"| {name} | {kernel} | {-loss['mean']:.3f} ± {loss['ci95']:.3f} | {theirs:.2f} "
                    f"| {error['mean']:.3f} | {ece['mean']:.3f} | {row['seconds']} | `{row['command']}` |"
                )
    return lines


def tables() -> list[str]:
    """The in-context learner for rows against scikit-learn, by examples a class."""
    path = HERE / "results" / "tables.json"
    if not path.exists():
        return ["Not measured yet."]
    made = json.loads(path.read_text())
    columns = ("5", "10", "20", "all")
    lines = [
        f"`{made['command']}`: {len(made['tables'])} tables, {made['draws']} draws each.\n",
        *head("learner", *(f"accuracy %, {c}" for c in columns), "mean rank", "behind, points", "s a task"),
    ]
    for row in made["rows"]:
        cells = " | ".join(f"{100 * row[c]['accuracy']['mean']:.2f}" for c in columns)
        rank, behind = row["all"]["rank"], row["all"]["behind the first"]
        lines.append(
            f"| {row['learner']} | {cells} | {rank['mean']:.2f} ± {rank['ci95']:.2f} "
            f"| {'' if row is made['rows'][0] else lead(behind)} | {row['seconds a task']:.3f} |"
        )
    return lines


def speed() -> list[str]:
    """What ``metafit bench speed`` left: a table of the rows, then every contender."""
    path = HERE / "results" / "speed.json"
    if not path.exists():
        return ["Not measured yet."]
    made = json.loads(path.read_text())
    about = made["environment"]
    peers = ", ".join(f"{name} {version}" for name, version in about["peers"].items())
    lines = [
        f"{about['processor']}, {about['threads']} threads, {about['machine']}, {about['device']}; Python "
        f"{about['python']}, torch {about['torch']}; {peers}.\n",
        *head(
            "workload",
            "times the fastest peer",
            "target",
            "fastest peer",
            "ours",
            "memory, of that peer's",
            "data",
            "note",
        ),
    ]
    for row in made["rows"]:
        memory = "" if row["memory_ratio"] is None else f"{row['memory_ratio']:.2f}"
        lines.append(
            f"| {row['title']} | {ratio(row)} | {target(row)} "
            f"| {row['peer'] or ''} | {duration(row['seconds'])} | {memory} | {row['data']} | {further(row)} |"
        )
    lines += [
        "\nEvery contender; a call of the peer's over a call of ours in the same round, the median and quartiles:\n",
        *head("workload", "contender", "a call", "times ours", "peak memory, MB", "note"),
    ]
    for row in made["rows"]:
        for part in row["contenders"]:
            memory = "" if part["memory"] is None else f"{part['memory'] / 1e6:.1f}"
            lines.append(
                f"| {row['workload']} | {part['name']} | {duration(part['seconds'])} | {ratio(part)} | {memory} "
                f"| {part['note']} |"
            )
    return lines


def acting() -> list[str]:
    """Rows ``rl-ENVIRONMENT-NAME``: returns by episode in unseen environments."""
    lines = []
    for stem, row in rows("rl-").items():
        if stem == "rl-speed":
            continue
        protocol = row["protocol"]
        lines += [
            f"\n**{row['source']['name']}**: {protocol['episodes']} environments, `{row['command']}`\n",
            *head(
                "agent", "first episode", "last episode", "episodes before it", "whole trial", "trained on, steps", "s"
            ),
        ]
        for name, part in [(row["learner"]["name"], row)] + [(other["learner"], other) for other in row["against"]]:
            m, made = part["metrics"], row["training"].get(name, {})
            steps = f"{made['environment_steps']:,}" if made else ""
            lines.append(
                f"| {name} | {plain(m['first'])} | {plain(m['return'])} | {part['curve'][-1]['step']} "
                f"| {plain(m.get('total'))} | {steps} | {made.get('processor_seconds', '')} |"
            )
        for name, value in row["known"].items():
            total = f"{value:.3f}" if isinstance(value, float) else plain(value)
            lines.append(f"| {name} | | | | {total} | | |")
        if "switch" in row:
            lines += ["", *head("by episode from the change on", *map(str, range(-2, 4)))]
            lines += [f"| {name} | {' | '.join(map(plain, by))} |" for name, by in row["switch"].items()]
    return lines


def acting_speed() -> list[str]:
    """Environment steps a second, with learning: ``rl-speed.json``."""
    path = HERE / "results" / "rl-speed.json"
    row = json.loads(path.read_text())
    lines = [
        f"`{row['command']}`, a load of {row['load']:.1f} on {row['cores']} cores, target {row['target']:,}:\n",
        *head("family", "contender", "steps a second", "of processor time", "metafit is faster"),
    ]
    for part in row["rows"]:
        for c in part["contenders"]:
            faster = "" if c["contender"] == "metafit" else f"{c['metafit_is_faster']:.1f}"
            lines.append(
                f"| {part['family']} | {c['contender']} | {c['steps_a_second']:,} | {c['steps_a_processor_second']:,} "
                f"| {faster} |"
            )
    return lines


def plain(value: dict[str, float] | None) -> str:
    return "" if value is None else f"{value['mean']:.2f} ± {value['ci95']:.2f}"


def ratio(part: dict[str, Any]) -> str:
    return "" if part["ratio"] is None else f"{part['ratio']:.3g} ({part['low']:.3g}–{part['high']:.3g})"


def target(row: dict[str, Any]) -> str:
    return "" if row["ratio"] is None else f"{row['target']:g} {'reached' if row['reached'] else 'missed'}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def further(row: dict[str, Any]) -> str:
    """What a row has beside its ratio."""
    parts = [row["note"]] if row["note"] else []
    if "share" in row:
        parts += [
            f"{row['tasks_per_second']:.0f} tasks a second of {row['gflop_per_task']:.2f} GFLOP",
            f"{100 * row['share']:.0f} % of the {row['roofline_gflops']:.0f} GFLOP/s of one large convolution "
            f"(target {100 * row['share_target']:.0f} %)",
        ]
    if "cached_ratio" in row:
        parts.append(f"with the features cached {row['cached_ratio']:.0f} times, {duration(row['cached_seconds'])}")
    return "; ".join(parts)


def measured() -> dict[str, str]:
    """Each learner's figures, by task; the first row of a task is the one with the larger budget."""
    told: dict[str, dict[str, str]] = {}

    def tell(name: str, task: str, row: dict[str, Any]) -> None:
        metrics = row["metrics"]
        value = (
            f"MSE {metrics['mse']['mean']:.2f}" if "mse" in metrics else f"{100 * metrics['accuracy']['mean']:.1f} %"
        )
        told.setdefault(name, {}).setdefault(task, value)

    for stem, row in rows("omniglot").items():
        if "small" in stem and not row["learner"]["meta_trained"]:
            continue  # over random weights, for comparison with the trained ones
        tell(row["learner"]["name"], f"Omniglot {stem.rpartition('-')[2]}", row)
    for stem, row in rows("tiny-imagenet").items():
        if not apart(stem):
            tell(row["learner"]["name"], f"Tiny-ImageNet {stem.rpartition('-')[2]}", row)
    for stem, row in {
        **rows("banking77-5"),
        **rows("banking77-gradient"),
        **rows("banking77-metric"),
        **rows("banking77-lora"),
    }.items():
        parts = [(row["learner"]["name"], row)] + [(o["learner"], o) for o in row["against"]]
        for name, part in parts:
            tell(name, f"BANKING77 {stem.rpartition('-')[2]}", part)
    for stem, row in rows("sinusoid").items():
        if "frequency" not in stem:
            tell(row["learner"]["name"], f"sinusoid {stem.rpartition('-')[2]}", row)
    for stem, row in rows("gaussian-process").items():
        name, kernel = stem.split("-")[2:]
        told.setdefault(name, {})[f"GP {kernel}"] = f"{-row['metrics']['loss']['mean']:.2f} nats"
    for row in rows("tables")["tables"]["rows"]:
        if row["learner"] == "in-context":
            told["in-context"] = {
                f"63 tables, {shot} a class": f"{100 * row[str(shot)]['accuracy']['mean']:.1f} %"
                for shot in (5, 10, 20)
            }
    return {
        name: "; ".join(f"{task} {value}" for task, value in figures.items()) for name, figures in sorted(told.items())
    }


def main() -> None:
    template = (HERE / "RESULTS.template.md").read_text()
    sections = (
        text,
        families,
        unsupervised,
        omniglot,
        omniglot_family,
        tiny_imagenet,
        tiny_imagenet_published,
        tiny_imagenet_difficulty,
        tiny_imagenet_budget,
        tiny_imagenet_gap,
        tiny_imagenet_family,
        tiny_imagenet_variants,
        pretraining,
        distillation,
        feedback,
        online,
        sinusoid,
        learned_optimizer,
        gaussian_process,
        tables,
        acting,
        acting_speed,
        speed,
    )
    for part in sections:
        template = template.replace(f"<!-- {part.__name__.upper()} -->", "\n".join(part()))
    (HERE / "RESULTS.md").write_text(template)
    MEASURED.write_text(json.dumps(measured(), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
