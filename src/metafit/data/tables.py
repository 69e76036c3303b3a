"""Sources from CSV and Parquet files."""

from __future__ import annotations

import csv
import difflib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from metafit.data.labels import encode
from metafit.data.source import Source
from metafit.errors import BadInput
from metafit.progress import say

PathLike = str | os.PathLike[str]


class Table(NamedTuple):
    """A table's inputs and labels as they stand in the file.

    Attributes:
        x: the texts, or a float32 tensor (rows, features).
        y: the labels: strings, or floats where numbers were asked for; None without a label column.
        features: the columns that ``x`` was made of; give them again to read a second file the same way.
        arrow: the whole file, those of its columns too that are neither; the cells of a CSV file are strings.
    """

    x: Any
    y: list[Any] | None
    features: tuple[str, ...]
    arrow: Any


def from_csv(
    path: PathLike,
    text: str | None = None,
    label: str = "label",
    features: Sequence[str] | None = None,
    domain: str | None = None,
) -> Source:
    """A source from a CSV or TSV file in UTF-8 whose first line names the columns.

    Args:
        path: the file; tabs separate the columns of a .tsv, commas (or semicolons) those of any other.
        text: the column of texts; without it the ``features`` columns make numeric vectors.
        label: the column of class names.
        features: the numeric columns; by default all numeric ones but the label.
        domain: the column of the family that a class is of, the same in all its rows.

    Raises:
        BadInput: no such file or column, a ragged line, an empty text, a missing label, a feature that is not a
            finite number, one class only, or not UTF-8; the message names the file and the row.
    """
    return _source(path, _read_csv(Path(path)), text, label, features, domain)


def from_parquet(
    path: PathLike,
    text: str | None = None,
    label: str = "label",
    features: Sequence[str] | None = None,
    domain: str | None = None,
) -> Source:
    """A source from a Parquet file; arguments and errors as :func:`from_csv`."""
    return _source(path, _read_parquet(Path(path)), text, label, features, domain)


def table(
    path: PathLike,
    text: str | None = None,
    label: str | None = None,
    features: Sequence[str] | None = None,
    numeric_label: bool = False,
) -> Table:
    """Reads a CSV, TSV or Parquet file without turning labels into classes: unlabelled files, regression targets.

    Args:
        path, text, features: as :func:`from_csv`.
        label: the label column, or None for a file without one.
        numeric_label: labels are targets of a regression: finite numbers.

    Raises:
        BadInput: as :func:`from_csv`; and a target that is not a finite number.
    """
    return _table(Path(path), _read(Path(path)), text, label, features, numeric_label)


def rows(path: PathLike, read: Table) -> list[dict[str, Any]]:
    """Every column of a table that was read, row by row.

    Raises:
        BadInput: two columns have one name.
    """
    for name in read.arrow.column_names:
        _column(Path(path), read.arrow, name, "input")
    return read.arrow.to_pylist()


def is_table(path: PathLike) -> bool:
    return Path(path).suffix.lower() in (".csv", ".tsv", ".parquet")


def _source(
    path: PathLike, arrow: Any, text: str | None, label: str, features: Sequence[str] | None, domain: str | None
) -> Source:
    inputs = arrow
    if domain is not None:
        _column(Path(path), arrow, domain, "domain")
        if domain in (text, label, *(features or ())):
            raise BadInput(f"{path}: the domain column {domain!r} cannot be an input or the label too; name another")
        inputs = arrow.drop_columns([domain])
    read = _table(Path(path), inputs, text, label, features, numeric_label=False)
    y, classes = encode(read.y or [], str(path))
    columns = None if text else read.features
    source = Source(Path(path).stem, read.x, y, classes, "text" if text else "vector", columns=columns)
    return source if domain is None else replace(source, domains=_domains(Path(path), arrow, domain, read.y or []))


def _domains(path: Path, arrow: Any, name: str, labels: Sequence[str]) -> tuple[str, ...]:
    """The domain of each class, the classes sorted."""
    found: dict[str, str] = {}
    for row, (label, domain) in enumerate(zip(labels, _labels(path, arrow, name, False, "domain"), strict=True)):
        if found.setdefault(label, domain) != domain:
            raise BadInput(
                f"{path}: data row {row + 1}: class {label!r} is of domain {domain!r} here and of {found[label]!r} "
                "above; a class is of one domain: correct the row, or rename the class"
            )
    return tuple(found[label] for label in sorted(found))


def _table(
    path: Path, arrow: Any, text: str | None, label: str | None, features: Sequence[str] | None, numeric_label: bool
) -> Table:
    if arrow.num_rows == 0:
        raise BadInput(f"{path}: there are no rows below the column names; add some")
    if text is not None and features is not None:
        raise BadInput(f"{path}: name a text column or feature columns, not both")
    if label is not None:
        _column(path, arrow, label, "label")
        if label in (text, *(features or ())):
            raise BadInput(f"{path}: the label column {label!r} cannot be an input too; name other columns")
    if text is not None:
        columns: tuple[str, ...] = (text,)
        x: Any = _texts(path, arrow, text)
    else:
        columns = _feature_columns(path, arrow, label, features)
        x = torch.from_numpy(np.stack([_numbers(path, arrow, name, "feature") for name in columns], 1)).float()
    return Table(x, None if label is None else _labels(path, arrow, label, numeric_label), columns, arrow)


def _read(path: Path) -> Any:
    return _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path)


def _read_csv(path: Path) -> Any:
    """Every column as strings: a label 007 is a name, and a text 42 a text."""
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    _check_file(path)
    delimiter, names = _header(path)
    try:
        return arrow_csv.read_csv(
            path,
            read_options=arrow_csv.ReadOptions(use_threads=False),
            parse_options=arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=arrow_csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
            ),
        )
    except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
        raise BadInput(f"{path}: {_csv_trouble(path, delimiter, len(names), error)}") from error


def _header(path: Path) -> tuple[str, list[str]]:
    """The delimiter and the column names."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = next((line for line in file if line.strip()), "")
    except UnicodeDecodeError:
        raise BadInput(f"{path}: {_bad_encoding(path)}") from None
    if not first.strip():
        raise BadInput(f"{path}: the file is empty; it needs a line of column names and rows below it")
    if "\0" in first:
        raise BadInput(f"{path}: not a text file; save the table as CSV in UTF-8")
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    if delimiter not in first:  # spreadsheets write other delimiters where the comma is the decimal point
        delimiter = next((other for other in (";", "\t") if other in first), delimiter)
    return delimiter, next(csv.reader([first], delimiter=delimiter))


def _csv_trouble(path: Path, delimiter: str, columns: int, error: Exception) -> str:
    encoding = _bad_encoding(path)
    if encoding:
        return encoding
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter)
        try:
            for row in reader:
                if row and len(row) != columns:
                    return (
                        f"line {reader.line_num} has {len(row)} values and the column names are {columns}; "
                        f'correct it, or put a text that contains {delimiter!r} in "quotes"'
                    )
        except csv.Error as bad:
            return f"line {reader.line_num} cannot be read as CSV ({bad}); correct it"
    return f"cannot be read as CSV ({str(error).splitlines()[0]}); correct the file"


def _bad_encoding(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(2)
        if start in (b"\xff\xfe", b"\xfe\xff"):
            return "the text is in UTF-16; save the file as UTF-8"
        file.seek(0)
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return f"line {number} is not UTF-8; save the file as UTF-8"
    return ""


def _read_parquet(path: Path) -> Any:
    import pyarrow as pa
    from pyarrow import parquet

    _check_file(path)
    try:
        return parquet.read_table(path)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"{path}: cannot be read as Parquet ({reason}); write the file again") from error


def _check_file(path: Path) -> None:
    if not path.exists():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=1)
        hint = f"did you mean {near[0]!r}?" if near else "check the path"
        raise BadInput(f"{path}: no such file; {hint}")
    if path.is_dir():
        raise BadInput(f"{path}: it is a folder, not a table; name a CSV or Parquet file")
    if not os.access(path, os.R_OK):
        raise BadInput(f"{path}: not readable for this user; change its permissions")
    if path.stat().st_size == 0:
        raise BadInput(f"{path}: the file is empty; it needs a line of column names and rows below it")


def _column(path: Path, arrow: Any, name: str, role: str) -> Any:
    names = arrow.column_names
    if names.count(name) == 1:
        return arrow.column(name)
    if name in names:
        raise BadInput(f"{path}: {names.count(name)} columns are called {name!r}; rename all but one")
    near = difflib.get_close_matches(name, names, n=len(names), cutoff=0.5)
    ordered = near + [other for other in names if other not in near]
    shown = ", ".join(ordered[:12]) + (f", and {len(ordered) - 12} more" if len(ordered) > 12 else "")
    raise BadInput(f"{path}: there is no {role} column {name!r}; name one of: {shown}")


def _texts(path: Path, arrow: Any, name: str) -> list[str]:
    values = _column(path, arrow, name, "text").to_pylist()
    for row, value in enumerate(values):
        if value is not None and not isinstance(value, str):
            raise BadInput(f"{path}: column {name!r} holds {type(value).__name__}, not texts; name a text column")
        if value is None or not value.strip():
            raise BadInput(
                f"{path}: the text in column {name!r}, data row {row + 1}, is empty; fill it in or drop the row"
            )
    return values


def _labels(path: Path, arrow: Any, name: str, numeric: bool, what: str = "label") -> list[Any]:
    if numeric:
        return _numbers(path, arrow, name, what).tolist()
    values = _column(path, arrow, name, what).to_pylist()
    for row, value in enumerate(values):
        if value is None or value != value or not str(value).strip():
            raise BadInput(f"{path}: the {what} in data row {row + 1} is missing; fill it in or drop the row")
    return [str(value) for value in values]


def _feature_columns(path: Path, arrow: Any, label: str | None, features: Sequence[str] | None) -> tuple[str, ...]:
    if features is not None:
        if not features:
            raise BadInput(f"{path}: the list of feature columns is empty; name at least one")
        return tuple(features)
    index = _index_columns(arrow)
    if index:
        say(f"{path}: the index of a data frame is no feature, and left out: {', '.join(index)}")
    candidates = [name for name in arrow.column_names if name not in (label, *index)]
    numeric = [name for name in candidates if _is_numeric(_column(path, arrow, name, "feature"))]
    others = [name for name in candidates if name not in numeric]
    if not numeric:
        raise BadInput(
            f"{path}: no numeric feature columns; name the column of texts, one of: {', '.join(others) or 'none'}"
            + _decimal_comma(arrow, others)
        )
    if others:
        say(f"{path}: columns that are not numbers are left out: {', '.join(others)}{_decimal_comma(arrow, others)}")
    return tuple(numeric)


def _decimal_comma(arrow: Any, names: Sequence[str]) -> str:
    """What to say where a column would be numbers with a point for the decimal comma; else nothing."""
    for name in names:
        values = [value for value in arrow.column(name).to_pylist() if isinstance(value, str)]
        numbers = sum("," in value and _number(value.replace(",", ".")) is not None for value in values)
        if numbers > 0.5 * len(values):
            return f" ({name!r} has a decimal comma: write 0.5 for 0,5)"
    return ""


def _index_columns(arrow: Any) -> list[str]:
    """Columns of a Parquet file that are row numbers or the like, by what pandas wrote of them."""
    try:
        about = json.loads((arrow.schema.metadata or {})[b"pandas"])
        return [name for name in about["index_columns"] if isinstance(name, str) and name in arrow.column_names]
    except (KeyError, TypeError, ValueError):
        return []


def _is_numeric(column: Any) -> bool:
    """Numbers by type, or strings most of which are numbers: one wrong cell is an error to report, not a text."""
    import pyarrow as pa

    kind = column.type
    if (
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_decimal(kind)
    ):
        return True
    if not pa.types.is_string(kind):
        return False
    numbers = sum(_number(value) is not None for value in column.to_pylist())
    return numbers > 0.5 * len(column)


def _number(value: Any) -> float | None:
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        return None


def _numbers(path: Path, arrow: Any, name: str, role: str) -> np.ndarray:
    """A column as float64; every value a finite number, in float32 too."""
    values = _column(path, arrow, name, role).to_pylist()
    numbers = np.array([np.nan if (n := _number(v)) is None else n for v in values], dtype=np.float64)
    with np.errstate(over="ignore"):
        bad = np.flatnonzero(~np.isfinite(numbers.astype(np.float32)))
    if len(bad):
        row = int(bad[0])
        more = f" ({len(bad)} such rows)" if len(bad) > 1 else ""
        shown = "missing" if values[row] in (None, "") else f"{values[row]!r}, not a finite number"
        raise BadInput(f"{path}: column {name!r}, data row {row + 1}, is {shown}{more}; correct or drop the row")
    return numbers
