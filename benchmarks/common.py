"""What the benchmarks share: where the data is, and how a row is kept."""

from __future__ import annotations

import ast
import json
import os
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def data(*parts: str) -> Path:
    """A file of the benchmark data, whose folder ``METAFIT_DATA`` names."""
    root = os.environ.get("METAFIT_DATA")
    if not root:
        sys.exit("set METAFIT_DATA to the folder of the benchmark data (see benchmarks/README.md)")
    path = Path(root).joinpath(*parts)
    if not path.exists():
        sys.exit(f"{path}: missing from the benchmark data")
    return path


def option(text: str) -> tuple[str, Any]:
    """A learner's option given as name=value."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def keep(name: str, result: dict[str, Any], **more: Any) -> None:
    """Writes the figures of a row (not the gallery) under ``benchmarks/results``, and prints them."""
    from metafit.disk import write_json

    row = {**result, "gallery": [], "command": " ".join(["python", *sys.argv]), **more}
    for part in (row, *row["against"]):
        part.pop("calibration", None)
    row["source"] = {**row["source"], "classes": {k: len(v) for k, v in row["source"]["classes"].items()}}
    write_json(RESULTS / f"{name}.json", row)
    print(json.dumps({"row": name, **row["metrics"]}), flush=True)
