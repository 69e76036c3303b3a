"""The runs below a folder, and how some of them differ: `metafit runs`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from metafit.environment import alive
from metafit.errors import BadInput, unknown

COLUMNS = ("folder", "started", "status", "command", "learner", "data", "steps", "best", "metric", "seconds")
SHOWN = ("folder", "started", "status", "learner", "data", "steps", "best", "seconds")
ORDERS = ("started", "best")


def listing(folder: Path, sort: str = "started") -> list[dict[str, Any]]:
    """A row of ``COLUMNS`` for each run below the folder, or in it.

    Raises:
        BadInput: no such folder, or no such order.
    """
    if sort not in ORDERS:
        raise unknown("order", sort, ORDERS)
    if not folder.is_dir():
        raise BadInput(f"runs: {folder} is not a folder; name one that holds runs")
    found = [(_below(folder, where), run) for where in _folders(folder) if (run := _load(where)) is not None]
    if sort == "best":
        found.sort(key=lambda pair: _goodness(pair[1]), reverse=True)
    else:
        found.sort(key=lambda pair: pair[1]["started"] or "", reverse=True)
    return [_row(name, run) for name, run in found]


def differences(folders: Sequence[Path]) -> dict[str, Any]:
    """What differs between runs: a list of their values for each word of the configuration, for each fact about the
    code and the machine, and for each figure.

    Raises:
        BadInput: a folder is not that of a run.
    """
    runs = []
    for folder in folders:
        run = _load(folder)
        if run is None:
            raise BadInput(f"runs: {folder} holds no run; `metafit runs {folder}` lists those below it")
        runs.append(run)
    facts = [{"metafit": run["metafit"], **run["environment"], **(run["git"] or {})} for run in runs]
    figures = [{"best": run["best"], **run["figures"], "seconds": run["seconds"]} for run in runs]
    return {
        "folders": list(map(str, folders)),
        "configuration": _differing([{"command": run["command"], **_flat(run["config"])} for run in runs]),
        "environment": _differing(facts),
        "figures": _side_by_side(figures),
    }


def listed(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """A ``listing`` as a table for people."""
    of = [{**row, "best": row["best"] and f"{row['best']:.4f} {row['metric'].split()[0]}"} for row in rows]
    return [tuple(_short(name, row[name]) for name in SHOWN) for row in of]


def compared(differing: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """``differences`` as a table for people."""
    parts = ("configuration", "environment", "figures")
    return [(n, *(_short(n, v) for v in values)) for part in parts for n, values in differing[part].items()]


def _folders(folder: Path) -> Iterator[Path]:
    for where, below, files in os.walk(folder):
        below[:] = [name for name in below if not name.startswith(".")]
        if "run.json" in files or "result.json" in files:
            yield Path(where)


def _load(folder: Path) -> dict[str, Any] | None:
    """What ``run.json`` says, or ``result.json`` of an evaluation that was not tracked; ``None`` without either."""
    nothing: dict[str, Any] = {**dict.fromkeys((*COLUMNS, "metafit", "git", "lower"))}
    nothing |= {"config": {}, "environment": {}, "figures": {}}
    for name, reader in (("run.json", _of_run), ("result.json", _of_result)):
        try:
            return {**nothing, **reader(json.loads((folder / name).read_text(encoding="utf-8")))}
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError):
            return {**nothing, "status": "damaged"}
    return None


def _of_run(about: Mapping[str, Any]) -> dict[str, Any]:
    died = about["status"] == "running" and alive(about["process"]) is False
    return {**about, "status": "died" if died else about["status"]}


def _of_result(result: dict[str, Any]) -> dict[str, Any]:
    figures = {name: figure["mean"] for name, figure in result["metrics"].items()}
    metric = "accuracy" if "accuracy" in figures else "mse"
    names = {"data": result["source"]["name"], "learner": result["learner"]["name"], "backbone": result["backbone"]}
    return {
        "metafit": result["metafit"],
        "status": "finished",
        "started": result["created"],
        "config": {**names, **result["protocol"]},
        "steps": result["history"][-1]["step"] if result["history"] else None,
        "best": figures[metric],
        "metric": f"test {metric}",
        "lower": metric == "mse",
        "figures": figures,
        "environment": result["environment"],
    }


def _row(name: str, run: Mapping[str, Any]) -> dict[str, Any]:
    config = run["config"]
    made = {"folder": name, "learner": config.get("learner") or config.get("model"), "data": config.get("data")}
    return {column: made.get(column, run[column]) for column in COLUMNS}


def _goodness(run: Mapping[str, Any]) -> float:
    if run["best"] is None:
        return -float("inf")
    return -run["best"] if run["lower"] else run["best"]


def _below(folder: Path, where: Path) -> str:
    return str(where) if where == folder or folder == Path() else str(folder / where.relative_to(folder))


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Mappings within it by names with points: the options of the learner."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _side_by_side(entries: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for entry in entries for name in entry)
    return {name: [entry.get(name) for entry in entries] for name in names}


def _differing(entries: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {name: values for name, values in _side_by_side(entries).items() if any(v != values[0] for v in values)}


def _short(name: str, value: Any) -> Any:
    if name == "started" and value:
        return f"{datetime.fromisoformat(value).astimezone():%Y-%m-%d %H:%M}"
    if isinstance(value, float):
        return f"{value:.0f}" if name == "seconds" else f"{value:.4g}"
    return value
