"""A pretrained backbone as a folder: what it is made of, its weights, and what it has seen."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metafit.backbones.base import Backbone, Saved
from metafit.backbones.catalog import load
from metafit.errors import BadInput
from metafit.weights import load_folder, save_folder

KIND, INDEX = "backbone", "backbone.json"


def save(backbone: Backbone, folder: str | os.PathLike[str], pretraining: Sequence[dict[str, Any]]) -> None:
    """Saves a backbone of the catalogue, from where ``load("folder:DIR")`` reads it.

    Args:
        backbone: one that ``load`` made; its weights may be others by now.
        folder: holds the old backbone whole until it holds the new one.
        pretraining: what was done to the weights, in order: of each training at least ``source`` (a name), ``seed`` and
            ``classes`` (the names of those it saw), so that nobody tests on them.

    Raises:
        BadInput: a wrapped module, which no name can make again, or a folder that cannot be written.
    """
    if backbone.options is None:
        raise BadInput(f"backbone {backbone.name!r} cannot be saved: it is not of the catalogue; save its state_dict()")
    name, options, _ = backbone.saved or (backbone.name, backbone.options, [])
    about = {"backbone": name, "options": options, "pretraining": list(pretraining)}
    save_folder(folder, KIND, about, backbone.state_dict(), INDEX)


def load_saved(name: str, sha256: str | None = None) -> Backbone:
    """The backbone that ``save`` left.

    Args:
        name: the folder.
        sha256: of its weights, where they must be those that something was trained on.

    Raises:
        BadInput: no such folder, unfinished, damaged, from a newer metafit, or with other weights by now.
    """
    folder = Path(name).expanduser().resolve()
    if folder.is_dir() and not (folder / INDEX).exists():
        raise BadInput(
            f"backbone folder {folder}: it holds no backbone (no {INDEX}); name one that `metafit pretrain` has left, "
            "or let it finish with --resume"
        )
    about, tensors = load_folder(folder, KIND, INDEX)
    if sha256 is not None and about["sha256"] != sha256:
        raise BadInput(
            f"backbone folder {folder}: its weights are no longer those that this model was trained on; restore them, "
            "or train the model anew"
        )
    backbone = load(about["backbone"], **about["options"])
    backbone.load_state_dict(tensors)
    backbone.saved = Saved(about["backbone"], about["options"], about["pretraining"])
    backbone.name, backbone.options = f"folder:{folder}", {"sha256": about["sha256"]}
    return backbone
