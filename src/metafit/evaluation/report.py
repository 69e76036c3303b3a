"""The report: one self-contained HTML page from one or more ``result.json``."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metafit import disk
from metafit.errors import BadInput
from metafit.evaluation import plots
from metafit.evaluation.plots import metric_of, value

COLUMNS = {  # metric -> heading, scale, digits
    "accuracy": ("accuracy, %", 100.0, 1),
    "mse": ("squared error", 1.0, 3),
    "loss": ("loss", 1.0, 3),
    "ece": ("ECE", 1.0, 3),
    "adapt_ms": ("adaptation, ms", 1.0, 2),
}


def write_report(results: Sequence[dict], path: str | os.PathLike[str]) -> Path:
    """Writes the page: a verdict in words, then the comparison, the curves and real episodes behind it.

    Args:
        results: ``result.json`` dicts of schema 1; each becomes a chapter.
        path: the HTML file. It loads nothing: no script, font, style sheet or picture from elsewhere.

    Raises:
        BadInput: no result, another schema, or a folder that cannot be written to.
    """
    from jinja2 import Environment, PackageLoader

    if not results:
        raise BadInput("report: no result to write about; pass at least one result.json")
    for i, result in enumerate(results):
        if result.get("schema") != 1:
            raise BadInput(f"report: result {i} has schema {result.get('schema')!r}; this version reads schema 1")
    loader = PackageLoader("metafit.evaluation", "")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=loader)
    environment.filters.update(short=short, number=number, duration=duration, span=_span)
    chapters = [_chapter(result) for result in results]
    html = environment.get_template("report.html").render(chapters=chapters)
    path = Path(path)
    disk.write_bytes(path, html.encode("utf-8", "replace"))
    return path


def verdict(result: dict) -> str:
    """One sentence: does meta-learning beat learning without it on these unseen classes, by how much, at what cost?

    The rival is the best learner that was not meta-trained, so the answer does not depend on a weak baseline.
    """
    return _judge(result)["sentence"]


def number(x: Any, digits: int = 3) -> str:
    """Fixed digits, so that columns align; a dash where there is no number.

    >>> number(0.0312, 3), number(-1.5, 1), number(None), number(0.00002, 3)
    ('0.031', '−1.5', '–', '2e−05')
    """
    if x is None or not math.isfinite(x):
        return "–"
    text = f"{x:.{digits}f}" if x == 0 or 0.5 * 10**-digits <= abs(x) < 1e7 else f"{x:.1g}"
    return text.replace("-", "−")


def duration(seconds: float | None) -> str:
    """
    >>> duration(0.4), duration(41.3), duration(200), duration(9000)
    ('0.4 seconds', '41 seconds', '3.3 minutes', '2.5 hours')
    """
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 90:
        return f"{seconds:.{0 if seconds >= 10 else 1}f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def rows_of(result: Mapping[str, Any]) -> list[dict]:
    """Every learner in one shape: the result's own first, then those it was compared with."""
    own = {k: result.get(k) for k in ("metrics", "curve", "calibration", "history", "gauge")}
    first = {**result["learner"], **own, "name": result["learner"]["name"], "paired_difference": None}
    return [first, *({**row, "name": row["learner"]} for row in result.get("against") or [])]


def _judge(result: dict) -> dict[str, str]:
    """The verdict, the kind of it (``above``, ``zero``, ``below`` or ``none``), and the figures under it."""
    rows, metric = rows_of(result), metric_of(result)
    first, rest = rows[0], rows[1:]
    better = -1.0 if metric == "mse" else 1.0
    scale, unit = (1.0, " in squared error") if metric == "mse" else (100.0, " points")

    def level(row: dict) -> float:
        mean = better * value(row["metrics"].get(metric))
        return -math.inf if math.isnan(mean) else mean

    def shown(row: dict) -> str:
        kind = f" (transductive: {row['transductive']})" if row.get("transductive") else ""
        mean = scale * value(row["metrics"].get(metric))
        return f"{row['title']}{kind}: " + (number(mean, 1) + "%" if scale == 100 else number(mean, 3))

    classes = len(result["source"]["classes"].get("test") or [])
    episodes = result["protocol"]["episodes"]
    where = f"on {episodes} tasks from {classes} unseen classes" if classes else f"on {episodes} unseen tasks"
    # The pair to judge: the first learner and its best rival of the other kind.
    rivals = [row for row in rest if bool(row.get("meta_trained")) != bool(first.get("meta_trained"))]
    rivals = [row for row in rivals if not math.isnan(value(row.get("paired_difference")))]
    if not rivals:
        mean, half = (scale * value(first["metrics"].get(metric), key) for key in ("mean", "ci95"))
        figure = f"{number(mean, 1)}%" if scale == 100 else number(mean, 3)
        figure += "" if math.isnan(half) else f" ± {number(half, 1 if scale == 100 else 3)}"
        what = f"answers {figure} of the queries right" if scale == 100 else f"has a mean squared error of {figure}"
        missing = "without meta-training" if first.get("meta_trained") else "that was meta-trained"
        sentence = f"{plots.labelled(first)} {what} {where}; this result holds no learner {missing} to compare it with."
        return {"kind": "none", "sentence": sentence, "figures": shown(first), "difference": figure, "rival": ""}
    rival = max(rivals, key=level)
    trained, plain = (first, rival) if first.get("meta_trained") else (rival, first)
    lead = (better if trained is first else -better) * scale * value(rival["paired_difference"])
    half = scale * value(rival["paired_difference"], "ci95")
    digits = 1 if scale == 100 else 3
    if half > 0:  # enough digits that a certain lead never reads as zero
        digits = min(6, max(digits, math.ceil(-math.log10(half))))
    low, high = number(lead - half, digits), number(lead + half, digits)
    gap = number(abs(lead), digits) + unit
    many = len(rivals) > 1 and trained is first
    standing = f"the best of {len(rivals)} learners without it" if many else "which had no meta-training"
    standing += ", over random weights" * bool(result.get("random_weights"))
    other = f"{plots.labelled(plain)}, {standing}"
    if math.isnan(half):
        kind, text = "zero", f"is not shown to beat {other}: a difference of {gap} without an interval is no evidence,"
    elif lead - half > 0:
        kind, text = "above", f"beats {other}, by {gap} (95% interval {low} to {high})"
    elif lead + half < 0:
        ends = f"{number(-lead - half, digits)} to {number(-lead + half, digits)}"
        kind, text = "below", f"does worse than {other}, by {gap} (95% interval {ends})"
    else:
        interval = f"the 95% interval of its lead, {low} to {high}{unit}, includes zero"
        kind, text = "zero", f"is not shown to beat {other}: {interval}"
    # An honest headline names the learner that would have done better.
    winners = [row for row in rest if row.get("meta_trained") and trained is first and _ahead(row, better)]
    still = f" Also meta-trained, and better still: {shown(max(winners, key=level))}." if winners else ""
    cost = []
    if trained.get("history"):
        cost.append(f"{duration(value(trained['history'][-1], 'seconds'))} of training")
    adapt = value(trained["metrics"].get("adapt_ms"))
    if not math.isnan(adapt):
        cost.append(f"{number(adapt, 2 if adapt < 10 else 0)} ms to learn a new task")
    subject = "Meta-learning" + (" (transductive)" if trained.get("transductive") else "")
    price = f"; it costs {' and '.join(cost)}" if cost else ""
    start = " No step of its training made the validation tasks better: this is its start." * _kept_start(
        trained, better
    )
    return {
        "kind": kind,
        "sentence": f"{subject} {text} {where}{price}.{start}",
        "figures": f"{shown(trained)}. {shown(plain)}.{still}",
        "difference": f"{number(lead, digits)}{unit}" + ("" if math.isnan(half) else f" ({low} to {high})"),
        "rival": rival["name"],
    }


def _kept_start(row: dict, better: float) -> bool:
    """Whether the best look at the validation tasks was the one before the first step."""
    looks = [better * h["validation"] for h in row.get("history") or [] if h.get("validation") is not None]
    return len(looks) > 1 and max(looks) == looks[0]


def _ahead(row: dict, better: float) -> bool:
    """Whether the learner of this row is certainly ahead of the first, by its paired difference."""
    lead = -better * value(row.get("paired_difference"))
    return lead - value(row.get("paired_difference"), "ci95") > 0


def _chapter(result: dict) -> dict[str, Any]:
    from markupsafe import Markup

    rows, metric, judged = rows_of(result), metric_of(result), _judge(result)
    heading, scale, digits = COLUMNS[metric]
    names = dict.fromkeys([metric, *COLUMNS, *(key for row in rows for key in row["metrics"])])
    columns = [(key, *COLUMNS.get(key, (key, 1.0, 3))) for key in names if any(key in row["metrics"] for row in rows)]
    bars = [_interval(row["metrics"].get(metric), scale) for row in rows]
    gaps = [_interval(row["paired_difference"], scale) for row in rows]
    top = 100.0 if metric == "accuracy" else max([end for bar in bars if bar for end in bar], default=0.0) or 1.0
    ends = [0.0, *(end for gap in gaps if gap for end in gap)]
    low, high = (min(ends), max(ends)) if max(ends) > min(ends) else (-1.0, 1.0)
    for row, bar, gap, style in zip(rows, bars, gaps, plots.styles(rows), strict=True):
        row.update(style=style, bar=_place(bar, 0.0, top), gap=_place(gap, low, high))
    way = result["protocol"].get("way")
    pair = [row for i, row in enumerate(rows) if i == 0 or row["name"] == judged["rival"]]
    return {
        "result": result,
        "rows": rows,
        "pair": pair,
        "titles": {row["name"]: row for row in rows},
        "metric": metric,
        "heading": heading,
        "scale": scale,
        "digits": digits,
        "columns": columns,
        "chance": 100 / way if metric == "accuracy" and isinstance(way, int) else None,
        "zero": 100 * -low / (high - low),
        "verdict": judged,
        "curve": Markup(plots.curve_chart(rows, metric)),
        "history": Markup(plots.history_chart(rows, metric)),
        "losses": Markup(plots.losses_chart(rows[0])),
        "gauged": [row for row in rows if row.get("gauge")],
        "reliability": Markup(plots.reliability_chart(pair)),
    }


def _interval(entry: dict | None, scale: float) -> tuple[float, float, float] | None:
    """Mean and ends of the 95% interval; ends at the mean where there is no interval."""
    mean, half = scale * value(entry), scale * value(entry, "ci95")
    half = 0.0 if math.isnan(half) else half
    return None if math.isnan(mean) else (mean, mean - half, mean + half)


def _place(interval: tuple[float, float, float] | None, low: float, high: float) -> dict[str, float] | None:
    """Where the interval lies on a track from ``low`` to ``high``, in percent of the track."""
    if interval is None:
        return None
    mean, start, end = (100 * min(1.0, max(0.0, (v - low) / (high - low))) for v in interval)
    return {"mean": mean, "low": start, "width": end - start}


def short(text: Any, limit: int = 160) -> Any:
    """Data in the page: escaped, isolated from the direction of the text around it, clipped with the whole as title.

    Long names break after their underscores and slashes.
    """
    from markupsafe import Markup, escape

    text = str(text)
    safe = str(escape(plots.clip(text, limit) if len(text) > limit else text))
    shown = Markup(re.sub("([_/]+)", r"\1<wbr>", safe))
    if len(text) <= limit:
        return Markup("<bdi>{}</bdi>").format(shown)
    return Markup('<bdi title="{}">{}</bdi>').format(text, shown)


def _span(way: Any) -> str:
    """``5`` or, for a range, ``2 to 5``."""
    return f"{way[0]} to {way[1]}" if isinstance(way, (list, tuple)) else str(way)
