"""From labelled examples to what learners take: classes split, inputs scaled, features computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metafit import backbones
from metafit.backbones import Backbone
from metafit.backbones.mlp import MLP
from metafit.data import Source, Splits
from metafit.data.features import features
from metafit.data.rows import StoredRows, lazily
from metafit.data.source import is_raw
from metafit.errors import BadInput, some
from metafit.evaluation import describe
from metafit.progress import say
from metafit.training import Recipe

SCALED_BY = 100_000  # rows on disk that the scaling is measured on: it is right to half a percent of the spread


@dataclass(frozen=True)
class Prepared:
    """Data as a learner takes it: frozen features, or inputs for a network that the learner trains.

    Attributes:
        splits: class-disjoint sources of tensors.
        source: what the result says of the data.
        recipe: how the inputs came about, for model folders.
        dim: size of the features.
        body: the network to train; ``None`` over frozen features.
    """

    splits: Splits
    source: dict[str, Any]
    recipe: Recipe
    dim: int
    body: Backbone | None = None


def seeded(backbone: str, seed: int, **options: Any) -> Backbone:
    """A backbone of the catalogue, whose weights, where they are random, are those of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return backbones.load(backbone, **options)


def prepare(
    source: Source,
    backbone: str | None = "auto",
    train_backbone: bool = False,
    seed: int = 0,
    by_domain: bool = False,
    scaling: dict[str, list[float]] | None = None,
    options: dict[str, Any] | None = None,
    show_progress: bool = True,
) -> Prepared:
    """Splits the classes and turns raw items into what learners take.

    Args:
        source: labelled examples.
        backbone: its name, or the folder of one that was pretrained; ``"auto"`` is ``minilm-l6`` for text,
            ``efficientnet-lite0`` for images, none for vectors.
        train_backbone: train the backbone itself, not a small map over its frozen features; a backbone without
            pretrained weights is always trained.
        seed, by_domain: of the class split; a backbone without pretrained weights draws them from the seed too.
        scaling: of plain vectors, as a model's recipe has it; that of the training classes where ``None``.
        options: of the backbone, as a model's recipe has them; those that fit the data where ``None``.

    Raises:
        BadInput: too few classes, a backbone of another modality, or one that was pretrained on classes of this source
            that the split leaves to the test.
    """
    if backbone == "auto":
        backbone = backbones.DEFAULTS[source.modality]
    columns = None if source.columns is None else list(source.columns)
    if backbone is None:
        if is_raw(source.x):
            raise BadInput(f"{source.name}: {source.modality} needs a backbone; name one, or leave it to 'auto'")
        flat = source.with_x(lazily(lambda x: x.flatten(1).float(), source.x), "vector")
        splits = _split(flat, seed, by_domain)
        scaling = scaling or _scaling(splits.train.x)
        if len(scaling["mean"]) != flat.x.shape[1]:
            raise BadInput(
                f"{source.name}: {flat.x.shape[1]} feature columns, the model was trained on {len(scaling['mean'])}; "
                "name the same columns"
            )
        mean, scale = torch.tensor(scaling["mean"]), torch.tensor(scaling["scale"])
        scaled = (part and part.with_x(lazily(lambda x: (x - mean) / scale, part.x)) for part in splits)
        splits = Splits(*scaled)  # type: ignore[arg-type]
        about = describe(splits, source.name, source.modality)
        recipe = Recipe(scaling=scaling, columns=columns, classes=_met(about), source=_counts(about))
        return Prepared(splits, about, recipe, int(flat.x.shape[1]))
    options = fitting_options(backbone, source) if options is None else options
    network = seeded(backbone, seed, **options)
    if network.modality != source.modality:
        fits = [e.name for e in backbones.catalog() if source.modality in e.modality]
        fits = ["none", *fits] if source.modality == "vector" else fits
        raise BadInput(
            f"backbone {backbone!r} reads {network.modality}, {source.name} is {source.modality}: choose "
            f"{', '.join(fits)}"
        )
    trained = train_backbone or not pretrained(network.name)
    if not trained and network.transductive:
        raise BadInput(
            f"backbone {backbone!r}: its features depend on the batch that they are computed in, so they cannot be "
            "kept; train it (--train-backbone), or pretrain one with --option norm=group"
        )
    if trained:
        inputs = source.with_x(lazily(network.preprocess, source.x), source.modality)
    else:
        inputs = features(source, network, show_progress)
    splits = _split(inputs, seed, by_domain)
    check_unseen(network, splits, seed)
    if isinstance(network, MLP) and network.saved is None:
        network.standardise(*_spread(splits.train.x))
    about = describe(splits, source.name, source.modality)
    recipe = Recipe(
        network.name, network.options or {}, trained, columns=columns, classes=_met(about), source=_counts(about)
    )
    body = network.requires_grad_(True) if trained else None
    return Prepared(splits, about, recipe, network.out_dim, body)


def in_order(source: Source, columns: Sequence[str] | None, who: str) -> Source:
    """The source with the columns that a model was trained on, in their order; others are left out.

    Raises:
        BadInput: as many columns, of other names.
    """
    found = source.columns
    if columns is None or found is None or list(found) == list(columns):
        return source
    missing = [name for name in columns if name not in found]
    if not missing:
        return replace(source, x=source.x[:, [found.index(name) for name in columns]], columns=tuple(columns))
    if len(found) != len(columns):
        return source  # their number says it, where they are used
    raise BadInput(
        f"{source.name}: {who} was trained on columns {some(columns, 8)}, and there is no {missing[0]!r} here; "
        "rename the columns that are the same"
    )


def check_unseen(network: Backbone, splits: Splits, seed: int) -> None:
    """Whether a backbone out of a folder was pretrained on classes that are held out here."""
    held = [name for part in splits[1:] if part is not None for name in part.classes]
    for done in network.pretraining:
        who = f"seed {seed}: the backbone {network.name}, pretrained on {done['source']!r} with seed {done['seed']},"
        mend = f"use --seed {done['seed']}, or pretrain another"
        check_unmet(who, done["classes"], held, done["source"] == splits.test.name, mend)


def check_unmet(who: str, known: Iterable[str], held: Iterable[str], same_source: bool, mend: str) -> None:
    """Refuses a test of classes that something was trained on; where no more than their names agree, says so.

    Raises:
        BadInput: some of the ``held`` classes are ``known``, and are of the same source.
    """
    met = sorted(set(known) & set(held))
    if not met:
        return
    shown = f"held out here ({some(list(map(repr, met)), 3)})"
    if same_source:
        raise BadInput(f"{who} has seen {len(met)} classes that are {shown}: {mend}")
    say(
        f"{who} has seen classes that are called as {len(met)} {shown}: where they are the same, the result is too good"
    )


def fitting_options(backbone: str, source: Source) -> dict[str, Any]:
    """What a network without weights of its own is told of the inputs: columns, or channels and size."""
    if source.modality == "vector":
        return {"columns": int(source.x.shape[1])} if backbone == "mlp" else {}
    if backbone not in ("conv4", "resnet12") or is_raw(source.x):
        return {"channels_in": 3, "image_size": 84} if backbone in ("conv4", "resnet12") else {}
    channels, height = source.x.shape[1:3]
    return {"channels_in": int(channels), "image_size": max(16, int(height))}


def usual_rate(network: Backbone) -> float:
    """Of AdamW: small where pretrained weights move, less so where they came about here, of a small network."""
    name = network.name if network.saved is None else network.saved.name
    if pretrained(name):
        return 3e-5
    return 1e-3 if network.saved is None else 3e-4


def pretrained(backbone: str) -> bool:
    return all(e.pretrained for e in backbones.catalog() if e.name == backbone)


def _split(source: Source, seed: int, by_domain: bool) -> Splits:
    """The class split; fewer than 10 classes leave too few for validation, so they go without."""
    if by_domain or len(source.classes) >= 10:
        return source.split(seed=seed, by_domain=by_domain)
    few = f"{source.name}: {len(source.classes)} classes are too few to keep some for validation"
    say(f"{few}: a training keeps its last step")
    return source.split(validation=0, seed=seed)


def _scaling(x: Tensor | StoredRows) -> dict[str, list[float]]:
    """From the training classes: columns of mean 0, rows whose squared lengths average 1, whatever the units."""
    mean, spread = _spread(x)
    return {"mean": mean.tolist(), "scale": (spread * x.shape[1] ** 0.5).tolist()}


def _spread(x: Tensor | StoredRows) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the columns; of rows on disk, ``SCALED_BY`` are looked at, drawn at random."""
    if isinstance(x, StoredRows):
        x = x[torch.from_numpy(np.random.default_rng(0).integers(len(x), size=SCALED_BY))]
    x = x.double()
    constant = (x == x[0]).all(0)  # its spread is rounding, and nothing to divide by
    return x.mean(0), torch.where(constant, 1.0, x.std(0, correction=0))


def _met(about: Mapping[str, Any]) -> list[str]:
    """The classes that training sees."""
    return [name for part in ("train", "validation") for name in about["classes"].get(part) or []]


def _counts(about: Mapping[str, Any]) -> dict[str, Any]:
    return {**about, "classes": {part: len(names) for part, names in about["classes"].items()}}
