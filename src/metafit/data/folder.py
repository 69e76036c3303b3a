"""A source from a folder of images: one sub-folder a class."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from metafit.data.labels import warn_lookalikes
from metafit.data.source import Source
from metafit.errors import BadInput
from metafit.images import SUFFIXES, check_image
from metafit.progress import progress, say

LITTER = frozenset({"thumbs.db", "desktop.ini"})


def from_folder(path: str | os.PathLike[str]) -> Source:
    """A source whose classes are the sub-folders; ``x`` are the paths of the images, all of them checked.

    Hidden files are skipped; images in folders inside a class folder count for the class.

    Raises:
        BadInput: no such folder, no class folders or one only, a class without images, or a file that is not an
            image, damaged, empty or too large to decode safely.
    """
    found = images_by_class(path)
    folder, classes = Path(path), list(found)
    if len(classes) == 1:
        raise BadInput(f"{folder}: one class folder only ({classes[0]!r}); at least 2 classes are needed, add another")
    y = torch.tensor([index for index, group in enumerate(found.values()) for _ in group], dtype=torch.int64)
    return Source(
        folder.resolve().name, [file for group in found.values() for file in group], y, tuple(classes), "image"
    )


def images_by_class(path: str | os.PathLike[str]) -> dict[str, list[Path]]:
    """The images in each sub-folder, by its name, all of them checked; errors as :func:`from_folder`."""
    folder = Path(path)
    if not folder.exists():
        raise BadInput(f"{folder}: no such folder; check the path")
    if not folder.is_dir():
        raise BadInput(f"{folder}: it is a file; name a folder with one sub-folder of images a class")
    classes = sorted(child.name for child in folder.iterdir() if child.is_dir() and not _skipped(child))
    loose = [child for child in folder.iterdir() if child.is_file() and child.suffix.lower() in SUFFIXES]
    if not classes:
        found = f"{len(loose)} images and no sub-folders" if loose else "no sub-folders"
        raise BadInput(f"{folder}: {found}; put the images of each class into a sub-folder named after the class")
    if loose:
        say(f"{folder}: {len(loose)} images outside the class folders are left out")
    warn_lookalikes(classes, str(folder))
    files = {name: images_of(folder / name) for name in classes}
    check_images([file for group in files.values() for file in group])
    return files


def images_of(folder: str | os.PathLike[str]) -> list[Path]:
    """The sorted files of a folder and the folders in it, hidden ones skipped; not yet checked.

    Raises:
        BadInput: there are none.
    """
    folder = Path(folder)
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and not any(_skipped(part) for part in (file, *_between(file, folder)))
    )
    if not files:
        raise BadInput(f"{folder}: there are no images in it; add some or remove the folder")
    return files


def check_images(files: list[Path]) -> None:
    """Proves that every file can be decoded.

    Raises:
        BadInput: names the first that cannot, and how many more there are.
    """
    bad: list[BadInput] = []
    with progress("checking images", len(files), "image") as advance:
        for file in files:
            try:
                check_image(file)
            except BadInput as error:
                bad.append(error)
            advance()
    if bad:
        more = f" (and {len(bad) - 1} more files cannot be used)" if len(bad) > 1 else ""
        raise BadInput(f"{bad[0]}{more}")


def _between(file: Path, folder: Path) -> list[Path]:
    return [parent for parent in file.parents if parent != folder and folder in parent.parents]


def _skipped(path: Path) -> bool:
    return path.name.startswith((".", "__MACOSX")) or path.name.lower() in LITTER
