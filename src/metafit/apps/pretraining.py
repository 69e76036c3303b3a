"""From data to a backbone in a folder: what ``metafit pretrain`` does."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metafit import backbones
from metafit.apps.preparing import Prepared, check_unseen, fitting_options, prepare, usual_rate
from metafit.backbones import Backbone
from metafit.backbones.mlp import MLP
from metafit.backbones.saved import save
from metafit.data import Source
from metafit.data.features import features
from metafit.data.rows import lazily
from metafit.data.views import Affine, Erase, Marginal, View
from metafit.disk import writable_folder
from metafit.errors import BadInput, unknown
from metafit.learners.heads import CosineHead
from metafit.progress import say
from metafit.training import distil, pretrain, pretrain_alike, pretrain_denoising
from metafit.training.self_supervised import nt_xent, vicreg

METHODS = ("supervised", "cosine", "simclr", "vicreg", "denoise", "distil")
HEADS: dict[str, Callable[[int, int], nn.Module]] = {"supervised": nn.Linear, "cosine": CosineHead}
STARTS = {"text": "minilm-l6", "image": "conv4", "vector": "mlp"}  # what is pretrained where no backbone is named
MARGINAL_OF = 100_000  # rows on disk that replace the values of others


def pretrain_backbone(
    source: Source,
    method: str,
    out: str | os.PathLike[str],
    backbone: str = "auto",
    mixup: float = 0.0,
    teacher: str | None = None,
    steps: int = 1000,
    batch: int = 128,
    rate: float | None = None,
    seed: int = 0,
    options: dict[str, Any] | None = None,
    resume: bool = False,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Pretrains a backbone on the training classes, those that meta-training on this source with this seed takes too.

    Args:
        source: examples; labels are read by ``"supervised"`` and ``"cosine"`` alone, but for the split of the classes.
        method: one of ``METHODS``.
        out: folder for the backbone, and for the state to resume from.
        backbone: a name of the catalogue, or a folder to go on from; ``"auto"`` is ``minilm-l6`` for text (distilled:
            ``minilm-small``), ``conv4`` for images, ``mlp`` for rows.
        mixup: of ``pretrain``.
        teacher: the large backbone that ``"distil"`` learns from; ``minilm-l6`` for text and ``efficientnet-lite0``
            for images where ``None``.
        steps, batch, rate: of the training; where ``None``, the rate is 1e-3, and less for pretrained weights.
        seed: of the class split, the weights and the order of the examples.
        options: of the backbone. Convolutional networks get ``norm="group"`` where it is not named, so that the
            features of an image do not depend on those beside it.
        resume: go on from the state in ``out``.

    Returns:
        What was done, as the folder says it, and the ``loss`` in the first and the last twentieth.

    Raises:
        BadInput: an unknown method or backbone, an option of another method, or as the trainings.
    """
    if method not in METHODS:
        raise unknown("pretraining", method, METHODS)
    if mixup and method not in HEADS:
        raise BadInput(f"mixup {mixup}: it mixes labelled examples, and {method} reads no labels; leave it out")
    if teacher is not None and method != "distil":
        raise BadInput(f"teacher {teacher!r}: {method} learns from none; leave it out, or distil")
    writable_folder(out)
    if backbone == "auto":
        backbone = "minilm-small" if (method, source.modality) == ("distil", "text") else STARTS[source.modality]
    defaults = fitting_options(backbone, source)
    if backbone in ("conv4", "resnet12"):
        defaults["norm"] = "group"
    prepared = prepare(source, backbone, True, seed, options={**defaults, **(options or {})})
    network, train = prepared.body, prepared.splits.train
    assert network is not None
    torch.manual_seed(seed)
    body: nn.Module = network
    if isinstance(network, MLP):  # trained on rows of one scale, which some methods restore
        mean, scale, body = network.mean, network.scale, network.layers
        train = train.with_x(lazily(lambda x: (x - mean) / scale, train.x))
    rate = usual_rate(network) if rate is None else rate
    done: dict[str, Any] = {"method": method, "source": source.name, "seed": seed, "classes": list(train.classes)}
    done |= {"examples": len(train), "steps": steps, "batch": batch, "rate": rate}
    descent: dict[str, Any] = {"steps": steps, "batch": batch, "rate": rate, "seed": seed, "out": out}
    descent |= {"resume": resume, "show_progress": show_progress}
    dim, before = network.out_dim, network.pretraining
    if method in HEADS:
        losses = pretrain(body, train, dim, HEADS[method], mixup, **descent)
        done["mixup"] = mixup
    elif method == "denoise":
        losses = pretrain_denoising(body, train, dim, **descent)
    elif method == "distil":
        large = _teacher(teacher, prepared, seed)
        same = source.subset([source.classes.index(name) for name in train.classes])  # as the teacher reads them
        known = features(same, large, show_progress).x[:]
        losses = distil(body, train, known, dim, **descent)
        before, done["teacher"] = [*before, *large.pretraining], large.name
    else:
        losses = pretrain_alike(body, train, dim, _views(train), nt_xent if method == "simclr" else vicreg, **descent)
    save(network, out, [*before, done])
    part = max(1, len(losses) // 20)
    first, last = (sum(some) / len(some) for some in (losses[:part], losses[-part:]))
    say(f"backbone in {out}: loss {first:.4f} at first, {last:.4f} at last; use it with --backbone {out}")
    return {**done, "loss": [first, last]}


def _teacher(name: str | None, prepared: Prepared, seed: int) -> Backbone:
    modality = prepared.splits.train.modality
    name = name or backbones.DEFAULTS[modality]
    if name is None:
        raise BadInput(f"distil: there is no usual teacher for {modality}s; name one with --teacher")
    large = backbones.load(name)
    if large.transductive:
        raise BadInput(f"teacher {name!r}: its features depend on the batch that they are computed in; name another")
    check_unseen(large, prepared.splits, seed)
    return large


def _views(train: Source) -> Sequence[View]:
    """What leaves an example what it is."""
    if isinstance(train.x, dict):
        raise BadInput(
            "there are no views of texts to make alike: pretrain them with --method supervised, cosine or distil"
        )
    if train.modality == "image":
        return Affine(), Erase()
    if not isinstance(train.x, Tensor):
        some = torch.from_numpy(np.random.default_rng(0).integers(len(train), size=MARGINAL_OF))
        return (Marginal(train.x[some]),)
    return (Marginal(train.x),)
