"""Tensors in a folder, and the JSON that names them: the form of everything that metafit saves."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from metafit._version import __version__
from metafit.disk import writable_folder, write_bytes, write_json
from metafit.errors import BadInput

SCHEMA = 1
INDEX = "model.json"


def save_folder(
    folder: str | os.PathLike[str], kind: str, about: dict[str, Any], tensors: dict[str, Tensor], index: str = INDEX
) -> None:
    """Writes tensors, then the JSON that names them: the rename of the JSON is the moment that the folder changes.

    Several indices may share a folder; weights that none of them names any more are removed.
    """
    folder = Path(folder)
    # cloned: safetensors refuses the tensors of tied layers, which share their memory
    content = save({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()})
    digest = hashlib.sha256(content).hexdigest()
    weights = f"{Path(index).stem}-{digest[:12]}.safetensors"
    if not (folder / weights).exists():
        write_bytes(folder / weights, content)
    head = {"schema": SCHEMA, "kind": kind, "metafit": __version__, "weights": weights, "sha256": digest}
    write_json(folder / index, {**head, **about})
    for old in folder.glob(f"{Path(index).stem}-*.safetensors"):
        if old.name != weights:
            old.unlink(missing_ok=True)


def kind_of(folder: str | os.PathLike[str], index: str = INDEX) -> str | None:
    """What a folder holds, by its index: ``"learner"``, ``"agent"``, ``"predictor"``; ``None`` where it is not ours."""
    try:
        about = json.loads((Path(folder) / index).read_text(encoding="utf-8"))
        return "agent" if "env" in about.get("learner", {}) else str(about["kind"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def free_for(folder: str | os.PathLike[str], kind: str | None, index: str = INDEX) -> Path:
    """A folder that can be written to, and holds nothing of another kind by this index, which writing would destroy.

    Raises:
        BadInput: it cannot, or it does.
    """
    check_kind(folder, kind, index)
    return writable_folder(folder)


def check_kind(folder: str | os.PathLike[str], kind: str | None, index: str = INDEX) -> None:
    """Whether a folder holds this kind by this index, or nothing.

    Raises:
        BadInput: it holds another.
    """
    held = kind_of(folder, index)
    if held not in (None, kind):
        raise BadInput(f"output folder {folder}: it holds a {held}; name another, so that nothing of it is replaced")


def tidy(folder: Path, indices: Iterable[str] = (INDEX,)) -> None:
    """Removes what an interrupted write left: files set aside, and weights that their index does not name."""
    for index in indices:
        stem = Path(index).stem
        for aside in folder.glob(f".{stem}[.-]*.part"):
            aside.unlink(missing_ok=True)
        try:
            named = json.loads((folder / index).read_text(encoding="utf-8"))["weights"]
        except FileNotFoundError:
            named = None
        except (OSError, ValueError, TypeError, KeyError):  # not ours to judge
            continue
        for weights in folder.glob(f"{stem}-{'[0-9a-f]' * 12}.safetensors"):
            if weights.name != named:
                weights.unlink(missing_ok=True)


def load_index(folder: str | os.PathLike[str], kind: str, index: str = INDEX) -> dict[str, Any]:
    """The JSON that ``save_folder`` wrote, without the tensors.

    Raises:
        BadInput: no such folder, not a model of that kind, or from a newer metafit.
    """
    path = Path(folder)
    if not path.exists():
        raise BadInput(f"model folder {path}: does not exist; check the path")
    try:
        about: dict[str, Any] = json.loads((path / index).read_text(encoding="utf-8"))
        schema = int(about["schema"])
    except (OSError, ValueError, TypeError, KeyError):
        raise BadInput(
            f"model folder {path}: is not a metafit model (no readable {index}); name a folder that metafit saved"
        ) from None
    if schema > SCHEMA:
        raise BadInput(f"model folder {path}: has schema {schema}, this metafit reads up to {SCHEMA}; upgrade metafit")
    if about.get("kind") != kind:
        raise BadInput(f"model folder {path}: holds a {about.get('kind')!r}, a {kind!r} is needed here")
    return about


def load_folder(
    folder: str | os.PathLike[str], kind: str, index: str = INDEX
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON and the tensors that ``save_folder`` wrote.

    Raises:
        BadInput: as ``load_index``, or the tensors are missing or damaged.
    """
    about, path = load_index(folder, kind, index), Path(folder)
    try:
        content = (path / about["weights"]).read_bytes()
        if hashlib.sha256(content).hexdigest() != about["sha256"]:
            raise ValueError("checksum")
        return about, load(content)
    except (OSError, ValueError, KeyError, SafetensorError):
        raise BadInput(
            f"model folder {path}: its weights are missing or damaged; copy the folder again or train anew"
        ) from None


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names start with the prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
