"""The chain of decisions as a page that a colleague can check: what was measured, proposed, tried, decided and why."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metafit import disk
from metafit.evaluation.plots import metric_of
from metafit.evaluation.report import COLUMNS, duration, number, short
from metafit.feedback.diagnose import Figures
from metafit.feedback.loop import Chain, Round, describe
from metafit.feedback.propose import above


def write_chain(chain: Chain, result: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Writes the page.

    Args:
        chain: what ``improve`` decided.
        result: of the test tasks, as ``result.json``: the last setting against the others.
        path: the HTML file; it loads nothing from elsewhere.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader

    loader = ChoiceLoader([PackageLoader("metafit.feedback", ""), PackageLoader("metafit.evaluation", "")])
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=loader)
    environment.filters.update(short=short, number=number)
    metric = metric_of(dict(result))
    heading, scale, digits = COLUMNS[metric]
    first = {"name": "improved", "metrics": result["metrics"], "transductive": result["learner"]["transductive"]}
    html = environment.get_template("report.html").render(
        result=result,
        verdict=verdict(chain, result),
        summary=_summary(chain),
        rows=[first, *({**row, "name": row["learner"]} for row in result["against"])],
        words=_words(chain),
        rounds=[_round(turn, metric) for turn in chain.rounds],
        metric=metric,
        heading=heading,
        scale=scale,
        digits=digits,
    )
    path = Path(path)
    disk.write_bytes(path, html.encode("utf-8", "replace"))
    return path


def verdict(chain: Chain, result: Mapping[str, Any]) -> str:
    """One sentence: what the loop gained on the test tasks, and by what."""
    metric = metric_of(dict(result))
    _, scale, digits = COLUMNS[metric]
    start = next(row for row in result["against"] if row["learner"] == "start")
    before, after = (number(scale * row["metrics"][metric]["mean"], digits) for row in (start, result))
    unit = "%" if scale == 100 else ""
    accepted = sum(turn.accepted for turn in chain.rounds)
    if not _tried(chain):
        return f"No change was tried: the setting stays as it was, at {before}{unit} on unseen tasks."
    if not accepted:
        return f"No change was better beyond chance: the setting stays as it was, at {before}{unit} on unseen tasks."
    lead = start["paired_difference"]
    half = "" if lead["ci95"] is None else f" ± {number(scale * lead['ci95'], digits)}"
    changes = "one change" if accepted == 1 else f"{accepted} changes"
    ahead = -lead["mean"] if metric == "mse" else lead["mean"]
    by = f"{number(scale * abs(ahead), digits)}{half}{' points' if scale == 100 else ''}"
    text = f"From {before}{unit} to {after}{unit} on unseen tasks, by {changes}: "
    if ahead + (lead["ci95"] or 0.0) < 0:
        chose = len(result["source"]["classes"].get("validation") or [])
        why = f"What was better on the {chose} validation classes did not carry over"
        return f"{text}worse by {by}. {why}: keep the start."
    return f"{text}{'a lead of' if ahead >= 0 else 'behind by'} {by}."


def symptoms(figures: Figures) -> list[str]:
    """What ``diagnose`` found, a sentence each."""
    if "failed" in figures:
        return [f"Training failed: {figures['failed']}"]
    scale, unit = (100, "%") if figures["metric"] == "accuracy" else (1, "")

    def shown(entry: Mapping[str, Any] | None, by: float = scale, of: str = unit, sign: str = "") -> str:
        if entry is None or entry["mean"] is None:
            return "no number"
        half = "" if entry["ci95"] is None else f" ± {by * entry['ci95']:.2g}"
        return f"{by * entry['mean']:{sign}.3g}{half}{of}"

    def ahead(entry: Mapping[str, Any]) -> str:
        return shown(entry, of=" points" if scale == 100 else "", sign="+")

    lines = []
    if figures["gap"]:
        kind = "learned by heart, at least in part" if above(figures["gap"]) else "little is learned by heart"
        lines.append(f"Seen classes against unseen ones: {ahead(figures['gap'])}, {kind}.")
    for name, lead in figures["rivals"].items():
        lines.append(f"It against {name}, which nothing was trained for: {ahead(lead)}.")
    inner = figures["inner"]
    if inner:
        lines.append(
            f"Adapting takes it from {shown(inner['score'][0])} to {shown(inner['score'][-1])}; the support loss falls "
            f"to {shown(inner['falls'], 100, '%')} of what it was, and ends higher in {100 * inner['rises']:.3g}% of "
            "the tasks."
        )
        lines.append(f"The query loss is lowest after step {inner['best_step']} of {inner['steps'][-1]}.")
    if figures["layers"]:
        moved = {n: layer["moved"]["mean"] or 0.0 for n, layer in figures["layers"].items()}
        most = max(moved, key=moved.__getitem__)
        apart = [n for n, layer in figures["layers"].items() if not above(layer["aligned"])]
        lines.append(
            f"{most} moves most in adaptation, by {100 * moved[most]:.3g}% of its length; in {len(apart)} of "
            f"{len(moved)} layers the gradients of support and query loss do not agree beyond chance."
        )
    ran = figures["training"]
    if ran:
        lines.append(
            f"Training took the validation figure from {scale * ran['start']:.4g} to {scale * ran['best']:.4g}{unit}, "
            f"best at step {ran['best_step']} of {ran['steps']}."
        )
    if figures["calibration"] and figures["calibration"]["ece"] is not None:
        sure = figures["calibration"]["too_sure"]
        lines.append(
            f"Its confidence is {100 * abs(sure):.3g} points too {'high' if sure > 0 else 'low'} on average "
            f"(expected calibration error {figures['calibration']['ece']:.3f})."
        )
    if figures["families"]:
        lines.append("By family: " + ", ".join(f"{n} {shown(s)}" for n, s in figures["families"].items()) + ".")
    return lines


def _round(turn: Round, metric: str) -> dict[str, Any]:
    _, scale, digits = COLUMNS[metric]
    rows = [
        {
            **candidate,
            "words": describe(candidate["change"]),
            "share": f"{100 * candidate['share']:.0f}%" if candidate["share"] else "–",
            "chosen": i == turn.chosen,
        }
        for i, candidate in enumerate(turn.candidates)
    ]
    if turn.chosen is None:
        title = "none came far enough to be judged" if rows else "nothing left to propose"
        decision = "The setting stays."
    else:
        words, lead = rows[turn.chosen]["words"], turn.judged or {"mean": None, "ci95": None}
        figure = "no number" if lead["mean"] is None else f"{scale * lead['mean']:+.{digits}f}"
        if lead["ci95"] is not None:
            figure += f" ± {scale * lead['ci95']:.{digits}f}"
        title = f"{words} {'accepted' if turn.accepted else 'refused'}"
        because = "the whole interval is above zero" if turn.accepted else "the interval is not above zero"
        decision = f"On the judging tasks {words} leads by {figure}: {because}, so it is {title.split()[-1]}."
    score = turn.score["mean"]
    return {
        "title": title,
        "words": describe(turn.setting),
        "score": "no number" if score is None else number(scale * score, digits) + ("%" if scale == 100 else ""),
        "symptoms": symptoms(turn.symptoms),
        "candidates": rows,
        "decision": decision,
    }


def _words(chain: Chain) -> list[tuple[str, ...]]:
    start = chain.rounds[0].setting if chain.rounds else chain.setting
    words = dict.fromkeys([*start, *chain.setting])
    return [(word, *(_value(setting.get(word, "–")) for setting in (start, chain.setting))) for word in words]


def _value(value: Any) -> str:
    return "none" if value is None else str(value)


def _tried(chain: Chain) -> int:
    return sum(candidate["lead"] is not None for turn in chain.rounds for candidate in turn.candidates)


def _summary(chain: Chain) -> str:
    rounds = "one round" if len(chain.rounds) == 1 else f"{len(chain.rounds)} rounds"
    took = duration(chain.seconds)
    return f"{rounds.capitalize()}, {_tried(chain)} changes tried in {took} of trials; it ended because {chain.ended}."
