"""What agents did in unseen environments, as a page: returns by episode, training, and the ways they went."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metafit import disk
from metafit.evaluation import plots
from metafit.evaluation.plots import value
from metafit.evaluation.report import number, rows_of, short


def write_report(result: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Writes the page; it loads nothing from elsewhere.

    Args:
        result: of ``rl.evaluate.result``.
        path: the HTML file.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader

    loader = ChoiceLoader([PackageLoader("metafit.rl", ""), PackageLoader("metafit.evaluation", "")])
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=loader)
    environment.filters.update(short=short, number=number)
    rows = rows_of(result)
    styled = [{**row, "style": style} for row, style in zip(rows, plots.styles(rows), strict=True)]
    html = environment.get_template("report.html").render(
        result=result,
        rows=styled,
        verdict=verdict(result),
        curve=plots.curve_chart(rows, "return", "episodes of the environment seen before"),
        history=plots.history_chart(rows, "return"),
        ways=[ways_chart(picture, rows) for picture in result["gallery"]],
    )
    path = Path(path)
    disk.write_bytes(path, html.encode("utf-8", "replace"))
    return path


def verdict(result: Mapping[str, Any]) -> str:
    """One sentence: what adapting brings the first agent, and what it leads the best one without meta-training by."""
    rows = rows_of(result)
    first, last = (rows[0]["metrics"][key] for key in ("first", "return"))
    tasks = result["protocol"]["episodes"]
    seen = rows[0]["curve"][-1]["step"]
    sentence = f"{rows[0]['title']} returns {_figure(first)} in its first episode in an unseen environment"
    if seen:
        sentence += f" and {_figure(last)} after {seen} {'episode' if seen == 1 else 'episodes'}"
    rivals = [row for row in rows[1:] if not row["meta_trained"] and row["paired_difference"]["mean"] is not None]
    if rows[0]["meta_trained"] and rivals:
        best = max(rivals, key=lambda row: value(row["metrics"]["return"]))
        lead = best["paired_difference"]
        beyond = lead["ci95"] is not None and abs(lead["mean"]) > lead["ci95"]
        how = "ahead of" if lead["mean"] > 0 else "behind"
        beside = f"{how} {best['title']} by {_figure({**lead, 'mean': abs(lead['mean'])})}"
        sentence += f", {beside}" if beyond else f", not apart beyond chance from {best['title']}"
    return f"{sentence} ({tasks} environments)."


def ways_chart(picture: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Where the first two agents went in an environment: the first episode grey and dashed, the last in colour."""
    names = [row["name"] for row in rows][:2]
    seen = [*picture["goals"], *(place for name in names for way in picture["ways"][name].values() for place in way)]
    sides = [(min(values), max(values)) for values in zip(*seen, strict=True)]
    margin = 0.06 * max(high - low for low, high in sides) + 1e-6

    def draw(*panels: Any) -> None:
        for axes, name in zip(panels, names, strict=True):
            ways = picture["ways"][name]
            for key, style in (("first", {"color": plots.PLAIN, "dashes": (4, 2)}), ("last", {"color": plots.ACCENT})):
                x, y = zip(*ways[key], strict=True)
                axes.plot(x, y, linewidth=1.6, marker="o", markersize=2.5, **style)
            for goal, fill in zip(picture["goals"], ("#fefefe", plots.INK), strict=True):
                axes.plot(*goal, marker="*", markersize=13, color=plots.INK, markerfacecolor=fill, linestyle="none")
            for limit, (low, high) in zip((axes.set_xlim, axes.set_ylim), sides, strict=True):
                limit(low - margin, high + margin)
            axes.set_aspect("equal", adjustable="box")
            axes.set_title(name, loc="left")

    return plots.svg(draw, f"The way of {' and '.join(names)} in one environment", panels=len(names), height=3.4)


def _figure(entry: Mapping[str, Any]) -> str:
    mean, half = entry["mean"], entry["ci95"]
    digits = 1 if mean is not None and abs(mean) >= 10 else 2
    return number(mean, digits) + ("" if half is None else f" ± {number(half, digits)}")
