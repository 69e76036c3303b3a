"""Figures of a result: line charts for the report (inline SVG) and the comparison picture of the README."""

from __future__ import annotations

import io
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from metafit import disk
from metafit.errors import BadInput

INK, MUTED, GRID, ACCENT, PLAIN = "#17212b", "#5b6670", "#dfe3e6", "#00628f", "#838d95"
COLOURS = {INK: "--ink", MUTED: "--muted", GRID: "--grid", ACCENT: "--accent", PLAIN: "--plain", "#fefefe": "--paper"}
MARKERS = (  # matplotlib's name, and the same shape in the legend's 36 × 12 box
    ("o", "M14 6a4 4 0 1 0 8 0a4 4 0 1 0-8 0z"),
    ("s", "M14.5 2.5h7v7h-7z"),
    ("^", "M18 1.5l4.6 8.4h-9.2z"),
    ("D", "M18 1l5 5-5 5-5-5z"),
)
DASHES = ((), (5, 2), (1.5, 2))
LOSSES = {"loss": "on the queries", "support_loss": "on the examples learned from"}


class Style(NamedTuple):
    """How one learner is drawn: accent and filled marker where it was meta-trained, grey and hollow where not."""

    colour: str
    marker: str
    shape: str
    dash: tuple[float, ...]
    width: float
    fill: str


def styles(rows: Sequence[dict]) -> list[Style]:
    """One style a learner, told apart by marker and dash, so never by colour alone; the first is the thickest."""
    seen = {True: 0, False: 0}
    out: list[Style] = []
    for row in rows:
        trained = bool(row.get("meta_trained"))
        i = seen[trained]
        seen[trained] += 1
        marker, shape = MARKERS[i % len(MARKERS)]
        colour = ACCENT if trained else PLAIN
        dash = DASHES[i // len(MARKERS) % len(DASHES)]
        width = 1.3 if out else 2.2
        out.append(Style(colour, marker, shape, dash, width, colour if trained else "#fefefe"))
    return out


def metric_of(result: dict) -> str:
    """``"mse"`` (lower is better) for regression, else ``"accuracy"``."""
    return "mse" if "mse" in result.get("metrics", {}) else "accuracy"


def value(entry: dict | None, key: str = "mean") -> float:
    """The number under ``key``, NaN where it is absent, null or not finite."""
    number = (entry or {}).get(key)
    return float(number) if number is not None and math.isfinite(number) else math.nan


def curve_chart(rows: Sequence[dict], metric: str, by: str = "adaptation step") -> str:
    """The metric by adaptation step; learners that adapt in one go are level lines. ``""`` if all of them are."""
    longest = max((len(row.get("curve") or []) for row in rows), default=0)
    if longest < 2:
        return ""

    def draw(axes: Any) -> None:
        last = max(point["step"] for row in rows for point in row.get("curve") or [])
        for row, style in zip(rows, styles(rows), strict=True):
            curve = row.get("curve") or []
            x = [point["step"] for point in curve]
            y = [value(point.get(metric)) for point in curve]
            half = [value(point.get(metric), "ci95") for point in curve]
            if len(curve) == 1:
                x, y, half = [0, last], y * 2, half * 2
            axes.fill_between(
                x, *[[a + sign * b for a, b in zip(y, half, strict=True)] for sign in (-1, 1)],
                color=style.colour, alpha=0.13, linewidth=0,
            )  # fmt: skip
            _line(axes, x, y, style)
        axes.set_xlabel(by)
        axes.set_title(_label(metric), loc="left")
        _whole(axes, metric)

    ends = [f"{labelled(row)} ends at {value(row['curve'][-1].get(metric)):.3g}" for row in rows if row.get("curve")]
    return svg(draw, f"{_label(metric)} by {by}: " + "; ".join(ends))


def history_chart(rows: Sequence[dict], metric: str) -> str:
    """Loss and validation metric by meta-training step; ``""`` where nothing was meta-trained."""
    rows_styles = [(row, style) for row, style in zip(rows, styles(rows), strict=True) if row.get("history")]
    if not rows_styles:
        return ""
    validated = any(h.get("validation") is not None for row, _ in rows_styles for h in row["history"])
    keys = ["loss", "validation"] if validated else ["loss"]

    def draw(*panels: Any) -> None:
        for axes, key in zip(panels, keys, strict=True):
            for row, style in rows_styles:
                points = [(h["step"], h[key]) for h in row["history"] if h.get(key) is not None]
                if points:
                    x, y = zip(*points, strict=True)
                    _line(axes, x, y, style, every=max(1, len(points) // 6))
            axes.set_title("training loss" if key == "loss" else f"validation {_label(metric)}", loc="left")
        if validated:
            _whole(panels[-1], metric)
        panels[-1].set_xlabel("meta-training step")

    ends = []
    for row, _ in rows_styles:
        first, last = row["history"][0], row["history"][-1]
        ends.append(f"{labelled(row)} loss from {value(first, 'loss'):.3g} to {value(last, 'loss'):.3g}")
    return svg(draw, "Meta-training: " + "; ".join(ends), panels=len(keys))


def losses_chart(row: dict) -> str:
    """Support and query loss by adaptation step of one learner; ``""`` where it adapts in one go."""
    curve = [point for point in row.get("curve") or [] if point.get("support_loss")]
    if len(curve) < 2:
        return ""
    lines = {
        "loss": Style(ACCENT, "o", MARKERS[0][1], (), 2.2, ACCENT),
        "support_loss": Style(PLAIN, "s", MARKERS[1][1], (5, 2), 1.3, "#fefefe"),
    }

    def draw(axes: Any) -> None:
        for key, style in lines.items():
            _line(axes, [point["step"] for point in curve], [value(point[key]) for point in curve], style)
        axes.set_xlabel("adaptation step")
        axes.set_title("loss", loc="left")

    first, last = curve[0], curve[-1]
    ends = [f"{what} from {value(first[key]):.3g} to {value(last[key]):.3g}" for key, what in LOSSES.items()]
    return svg(draw, f"Loss of {labelled(row)}: " + "; ".join(ends))


def reliability_chart(rows: Sequence[dict]) -> str:
    """Accuracy by stated confidence; the area of a mark is the share of answers in its bin.

    For predicted densities: the share of central intervals that hold the target, by their probability.
    """
    rows_styles = [(row, style) for row, style in zip(rows, styles(rows), strict=True) if row.get("calibration")]
    if not rows_styles:
        return ""
    of_densities = "mse" in rows_styles[0][0]["metrics"]

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, dashes=(1, 3))
        for row, style in rows_styles:
            bins = [b for b in row["calibration"] if b["count"] and b["accuracy"] is not None]
            total = sum(b["count"] for b in bins) or 1
            x, y = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
            axes.plot(x, y, color=style.colour, linewidth=style.width, **_dashes(style))
            size = [12 + 170 * b["count"] / total for b in bins]
            axes.scatter(x, y, size, style.fill, style.marker, edgecolors=style.colour, zorder=3)
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("probability of the interval" if of_densities else "stated confidence")
        axes.set_title("share of intervals that hold the target" if of_densities else "share that is right", loc="left")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda v, _: f"{100 * v:.0f}%")

    return svg(draw, "Reliability diagram of " + ", ".join(labelled(row) for row, _ in rows_styles), height=4.2)


def comparison_figure(result: dict, path: str | os.PathLike[str]) -> Path:
    """Bars with 95% intervals, and the paired difference of each learner to the first, as one picture.

    Args:
        result: a ``result.json`` of schema 1.
        path: where to write; ``.png`` or ``.svg``.

    Raises:
        BadInput: another ending, or a folder that cannot be written to.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    path = Path(path)
    kind = path.suffix.lower().lstrip(".")
    if kind not in ("png", "svg"):
        raise BadInput(f"figure {path}: the ending says the format; use .png or .svg")
    metric = metric_of(result)
    rows = [{**result["learner"], "metrics": result["metrics"]}, *result.get("against", [])]
    scale = 1.0 if metric == "mse" else 100.0
    with _settings():
        figure = Figure(figsize=(9, 1.1 + 0.42 * len(rows)), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
        bars, differences = figure.subplots(1, 2, sharey=True, width_ratios=(9, 5))
        for i, row in enumerate(rows):
            colour = ACCENT if row.get("meta_trained") else PLAIN
            mean, half = (scale * value(row["metrics"].get(metric), key) for key in ("mean", "ci95"))
            if not math.isnan(mean):
                bars.barh(i, mean, 0.56, color=colour)
                text = f"{mean:.1f}%" if metric == "accuracy" else f"{mean:.3g}"
                bars.annotate(
                    text, (mean, i), (6 if math.isnan(half) else 8, 0), textcoords="offset points", va="center"
                )
                bars.errorbar(mean, i, xerr=None if math.isnan(half) else half, color=INK, capsize=2.5, linewidth=1)
            paired = row.get("paired_difference")
            mean, half = scale * value(paired), scale * value(paired, "ci95")
            if not math.isnan(mean):
                differences.errorbar(
                    mean, i, xerr=None if math.isnan(half) else half, color=INK, marker="o", markersize=4.5, capsize=2.5
                )
        names = [labelled(row, 38) for row in rows]
        bars.set_yticks(range(len(rows)), names)
        bars.get_yticklabels()[0].set_fontweight("bold")
        bars.invert_yaxis()
        bars.set_xlim(0, 112 if metric == "accuracy" else bars.get_xlim()[1] * 1.12)
        if metric == "accuracy":
            bars.set_xticks(range(0, 101, 25), [f"{v}%" for v in range(0, 101, 25)])
        bars.set_title(f"{_label(metric)} (blue: meta-trained)", loc="left")
        differences.axvline(0, color=MUTED, linewidth=0.8)
        differences.margins(x=0.15)
        differences.set_title("first minus this" + (", points" if scale == 100 else ""), loc="left")
        for axes in (bars, differences):
            axes.spines[["left"]].set_visible(False)
            axes.tick_params(axis="y", length=0)
        if len(rows) == 1:
            differences.set_visible(False)
        content = io.BytesIO()
        figure.savefig(
            content, format=kind, dpi=180, facecolor="white", metadata={"Date": None} if kind == "svg" else {}
        )
    disk.write_bytes(path, content.getvalue())
    return path


def clip(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def labelled(row: dict, limit: int = 80) -> str:
    """The learner's title as it is printed wherever its result is: a transductive one says so."""
    return clip(row["title"], limit) + (" (transductive)" if row.get("transductive") else "")


def _label(metric: str) -> str:
    return "mean squared error" if metric == "mse" else metric


def _dashes(style: Style) -> dict:
    return {"dashes": style.dash} if style.dash else {}


def _line(axes: Any, x: Iterable[float], y: Iterable[float], style: Style, every: int = 1) -> None:
    axes.plot(
        x, y, color=style.colour, linewidth=style.width, marker=style.marker, markersize=5, markevery=every,
        markerfacecolor=style.fill, **_dashes(style),
    )  # fmt: skip


def _whole(axes: Any, metric: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if metric == "accuracy":
        axes.yaxis.set_major_formatter(lambda v, _: f"{100 * v:g}%")


def _settings(salt: str = "metafit") -> Any:
    import matplotlib

    return matplotlib.rc_context({
        "svg.fonttype": "none", "svg.hashsalt": salt, "text.parse_math": False, "font.size": 10,
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GRID, "axes.axisbelow": True,
        "axes.labelcolor": MUTED, "axes.titlecolor": MUTED, "axes.titlesize": 10, "text.color": INK,
        "xtick.color": GRID, "ytick.color": GRID, "xtick.labelcolor": MUTED, "ytick.labelcolor": INK,
    })  # fmt: skip


def svg(draw: Callable[..., None], alt: str, panels: int = 1, height: float = 3.2) -> str:
    """An ``<svg>`` element that takes its width and its colours from the page around it."""
    from markupsafe import escape
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    content = io.StringIO()
    with _settings(alt), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # glyphs that the measuring font lacks; the page's font has them
        room = ConstrainedLayoutEngine(w_pad=0.14)  # for the larger letters that the page has on phones
        figure = Figure(figsize=(5.6, height * (1 + 0.7 * (panels - 1))), layout=room)
        axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
        for one in axes:
            one.grid(axis="y", color=GRID, linewidth=0.7)
            one.tick_params(labelcolor=MUTED)
        draw(*axes)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(content, format="svg", transparent=True, metadata=nothing)
    svg = content.getvalue()
    head, body = svg[svg.index("<svg") :].split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    for colour, name in COLOURS.items():
        body = body.replace(colour, f"var({name})")
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # names that nothing refers to, alike in every figure
    return f'<svg {box[0] if box else ""} role="img" aria-label="{escape(alt)}">{body}'
