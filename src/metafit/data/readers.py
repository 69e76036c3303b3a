"""One door to all data: a file, a folder, or the name of a packaged source."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from metafit.data import packaged
from metafit.data.folder import from_folder
from metafit.data.source import Source
from metafit.data.tables import from_csv, from_parquet, is_table
from metafit.errors import BadInput, unknown


def read(
    data: str | os.PathLike[str] | Source,
    text: str | None = None,
    label: str = "label",
    features: Sequence[str] | None = None,
    domain: str | None = None,
) -> Source:
    """A source from wherever the data is.

    Args:
        data: a .csv, .tsv or .parquet file, a folder with one sub-folder of images a class, the name of a packaged
            source (``./name`` for a folder of the same name), or a source, which is returned as it is.
        text, label, features, domain: columns of a table, as :func:`~metafit.data.from_csv`.

    Raises:
        BadInput: it is none of these, or it cannot be used; the message says where and why.
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, str) and packaged.is_packaged(data):
        return packaged.load(data)
    path = Path(data)
    if path.is_dir():
        return from_folder(path)
    if is_table(path):
        read_table = from_parquet if path.suffix.lower() == ".parquet" else from_csv
        return read_table(path, text, label, features, domain)
    if path.exists():
        raise BadInput(
            f"{path}: a file of unknown kind ({path.suffix or 'no suffix'}); save it as .csv, .tsv or .parquet"
        )
    if path.suffix or len(path.parts) > 1:
        raise BadInput(f"{path}: no such file or folder; check the path")
    raise unknown(
        "data", str(data), [*packaged.names(), "keel:NAME", "a .csv, .tsv or .parquet file", "a folder of images"]
    )
