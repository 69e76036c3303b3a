"""One image, read safely: the header is checked before a pixel is decoded, and every failure says what to do."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metafit.errors import BadInput

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 50_000_000
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def open_image(image: str | os.PathLike[str] | Any) -> Image:
    """One image as a PIL image in RGB, turned upright as its EXIF tag says, transparency laid on white.

    Args:
        image: a path, a PIL image, or a uint8 array or tensor: (H, W), (H, W, C) or (C, H, W) with C 1, 3 or 4.

    Raises:
        BadInput: missing, empty, no image, truncated, corrupt, or larger than ``MAX_PIXELS`` pixels.
    """
    from PIL import Image

    if isinstance(image, Image.Image):
        return _decoded(image, "image")
    if not isinstance(image, (str, os.PathLike)):
        return _decoded(_from_array(image), "image array")
    with _opened(Path(image)) as opened:
        return _decoded(opened, str(image))


def check_image(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Proves that an image file can be decoded; returns its (width, height) as stored.

    A JPEG is decoded at an eighth of its size, which is much cheaper and reads the file to its end all the same.

    Raises:
        BadInput: as :func:`open_image`.
    """
    with _opened(Path(path)) as opened:
        size: tuple[int, int] = opened.size
        _check_size(opened, str(path))
        with _damage(str(path)):
            opened.draft(None, (max(1, size[0] // 8), max(1, size[1] // 8)))
            opened.load()
    return size


def _opened(path: Path) -> Image:
    """Reads the header only."""
    from PIL import Image, UnidentifiedImageError

    try:
        if path.is_dir():
            raise BadInput(f"{path}: it is a folder, not an image")
        if path.stat().st_size == 0:
            raise BadInput(f"{path}: the file is empty; replace or remove it")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit comes next
            return Image.open(path)
    except Image.DecompressionBombError as error:
        raise BadInput(
            f"{path}: far more pixels than the limit of {MAX_PIXELS // 10**6} million; make it smaller or remove it"
        ) from error
    except UnidentifiedImageError as error:
        raise BadInput(f"{path}: not an image that can be read; replace or remove it") from error
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such file; check the path") from error
    except PermissionError as error:
        raise BadInput(f"{path}: not readable for this user; change its permissions") from error
    except (OSError, ValueError, SyntaxError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path}: the image is damaged ({_first_line(error)}); replace or remove it") from error


def _decoded(image: Image, what: str) -> Image:
    from PIL import ImageOps

    _check_size(image, what)
    with _damage(what):
        image.load()
        return _rgb(ImageOps.exif_transpose(image))


@contextlib.contextmanager
def _damage(what: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a palette with odd transparency, a damaged EXIF block
            yield
    except Exception as error:  # PIL's readers raise whatever the damaged bytes lead them to
        raise BadInput(f"{what}: the image is damaged ({_first_line(error)}); replace or remove it") from error


def _check_size(image: Image, what: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadInput(
            f"{what}: {width} x {height} pixels is more than the limit of {MAX_PIXELS // 10**6} million; "
            "make it smaller or remove it"
        )


def _rgb(image: Image) -> Image:
    from PIL import Image

    if image.mode.startswith("I"):  # 16-bit grey, which PIL's own conversion clips to white
        grey = np.asarray(image, dtype=np.float64).clip(0)
        return Image.fromarray((grey * (255.0 / max(65535.0, grey.max()))).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":  # no agreed range: from the lowest to the highest value
        grey = np.nan_to_num(np.asarray(image, dtype=np.float64))
        span = grey.max() - grey.min()
        return Image.fromarray(((grey - grey.min()) * (255.0 / (span or 1.0))).round().astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _from_array(value: Any) -> Image:
    from PIL import Image

    array = np.asarray(value)
    if array.dtype != np.uint8:
        raise BadInput(f"image array: uint8 from 0 to 255 is needed, not {array.dtype}; convert it")
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))):
        raise BadInput(f"image array of shape {array.shape}: (H, W), (H, W, C) or (C, H, W) is needed, C 1, 3 or 4")
    return Image.fromarray(np.ascontiguousarray(array))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
