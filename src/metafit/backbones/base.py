"""A backbone maps inputs (texts, images, vectors) to features; everything after it learns from those features."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from metafit.errors import BadInput
from metafit.progress import progress as progress_bar

MODALITIES = ("text", "image", "vector")
_PIECE = 64  # batches of text that are tokenised, and sorted by length, together


class Saved(NamedTuple):
    """What a folder says of the backbone in it.

    Attributes:
        name, options: what ``load`` makes it of, before it gets its weights.
        pretraining: the trainings that the weights went through: see ``backbones.saved.save``.
    """

    name: str
    options: dict[str, Any]
    pretraining: list[dict[str, Any]]


class Backbone(nn.Module):
    """A mapping from inputs to feature vectors, with the preprocessing that belongs to it.

    A subclass defines ``forward``, which takes what ``preprocess`` gives (a tensor, or a dict of tensors, with N
    examples along the leading dimension) and returns differentiable features ``(N, out_dim)``.

    Args:
        name: the name in the catalogue, or a name for people to read.
        out_dim: number of features; ``None`` where it shows only when the backbone is run.
        modality: "text", "image" or "vector".
        recipe: one line that changes whenever the code around the weights (preprocessing, pooling, architecture)
            changes its answers. It is part of the fingerprint; without one, features are never cached.

    Attributes:
        transductive: whether the features of one example depend on the others in its batch.
        packs: whether ``forward`` takes what ``pack`` makes of tokens, too.
        options: what ``load`` was called with, so that ``load(backbone.name, **backbone.options)`` makes it again;
            ``None`` where no name can make it again (a wrapped model).
        saved: of one out of a folder, what the folder says of it.
    """

    transductive: bool = False
    packs: bool = False
    options: dict[str, Any] | None = None
    saved: Saved | None = None

    def __init__(self, name: str, out_dim: int | None, modality: str, recipe: str | None) -> None:
        super().__init__()
        if modality not in MODALITIES:
            raise BadInput(f"backbone {name!r}: modality {modality!r} is not one of {', '.join(MODALITIES)}")
        self.name = name
        self.modality = modality
        self.recipe = recipe
        self._out_dim = out_dim

    @property
    def out_dim(self) -> int:
        """Number of features.

        Raises:
            BadInput: a wrapped function has not been told, and has not been run yet.
        """
        if self._out_dim is None:
            raise BadInput(f"backbone {self.name!r}: the number of features is not known; pass out_dim= to wrap()")
        return self._out_dim

    @property
    def pretraining(self) -> list[dict[str, Any]]:
        """The trainings that ``metafit pretrain`` has put its weights through; none of a catalogue's own weights."""
        return [] if self.saved is None else self.saved.pretraining

    def preprocess(self, raw: Sequence[Any]) -> Any:
        """Raw items to the input of ``forward``: for vectors, floats ``(N, ...)``."""
        import numpy as np

        try:
            return torch.as_tensor(np.asarray(raw, dtype=np.float32))
        except (TypeError, ValueError) as error:
            raise BadInput(
                f"backbone {self.name!r}: the inputs are not rows of numbers of one length ({error}); pass vectors, "
                "or wrap() the model with a preprocess function"
            ) from error

    def embed(
        self,
        x: Any,
        batch_size: int | None = None,
        progress: bool = True,
        out: Callable[[int, int], Any] = torch.empty,
    ) -> Any:
        """Features without gradients, in evaluation mode, in batches.

        Texts are run in order of their length, so that little of a batch is padding.

        Args:
            x: a list of raw items, or what ``preprocess`` gives: a tensor or a dict of tensors (or what is indexed
                like one and has its ``shape``, ``dtype`` and ``device``).
            batch_size: examples run at once; by default 64, and 16 for images on a CPU, whose caches hold no more.
            progress: show a bar on standard error.
            out: called with N and ``out_dim``, makes what takes the features, as ``made[rows] = features``.

        Returns:
            What ``out`` made; by default a float32 tensor ``(N, out_dim)`` on the CPU, in the order of ``x``.

        Raises:
            BadInput: an item cannot be read, or the backbone does not give one row of features for each example.
        """
        total = _length(x)
        if total == 0:
            return out(0, self.out_dim)
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        batch_size = batch_size or (16 if self.modality == "image" and device.type == "cpu" else 64)
        modes = {module: module.training for module in self.modules()}
        made: Any = None
        self.eval()
        try:
            with (
                torch.inference_mode(),
                progress_bar(f"embedding with {self.name}", total, self.modality, progress) as done,
            ):
                for rows, batch in self._batches(x, total, batch_size):
                    features = self(tree_map(lambda leaf: leaf.to(device, non_blocking=True), batch))
                    self._check(features, len(rows))
                    if made is None:
                        self._out_dim = features.shape[1]
                        with torch.inference_mode(False):  # an inference tensor could not be trained on
                            made = out(total, features.shape[1])
                    made[rows] = features.to("cpu", torch.float32)
                    done(len(rows))
        finally:
            for module, training in modes.items():
                module.training = training
        return made

    def fingerprint(self) -> str | None:
        """SHA-256 of the weights and the recipe: equal fingerprints, equal features. ``None``: do not cache."""
        if self.recipe is None:
            return None
        digest = hashlib.sha256(f"{self.name}\n{self.recipe}\n".encode())
        for key, value in sorted(self.state_dict().items()):
            value = value.detach().cpu().contiguous()
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(memoryview(value.reshape(-1).view(torch.uint8).numpy()))
        return digest.hexdigest()

    def _batches(self, x: Any, total: int, batch_size: int) -> Iterator[tuple[Tensor, Any]]:
        """Row numbers and inputs of each batch."""
        raw = not _is_preprocessed(x)
        order = torch.arange(total)
        if raw and self.modality == "text":  # a first, cheap order; the exact one is by tokens, below
            order = torch.tensor([len(text) for text in texts(x)]).argsort(stable=True, descending=True)
        piece = total if not raw else batch_size * (_PIECE if self.modality == "text" else 1)
        for rows in order.split(piece):
            inputs = self.preprocess([x[i] for i in rows.tolist()]) if raw else x
            mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
            lengths = mask.sum(1).cpu() if mask is not None else None
            inside = torch.arange(len(rows)) if lengths is None else lengths.argsort(stable=True, descending=True)
            for some in inside.split(batch_size):
                batch = tree_map(lambda leaf, some=some: leaf[some.to(leaf.device)], inputs)
                if mask is not None and lengths is not None:
                    batch = _trim(batch, mask.shape[1], int(lengths[some].max()))
                yield rows[some], batch

    def _check(self, features: Any, rows: int) -> None:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        if not isinstance(features, Tensor) or features.ndim != 2 or features.shape[0] != rows:
            raise BadInput(
                f"backbone {self.name!r}: it gave {shape} for {rows} examples, where ({rows}, features) is needed; "
                "pool or flatten its output"
            )
        if self._out_dim not in (None, features.shape[1]):
            raise BadInput(f"backbone {self.name!r}: it gave {features.shape[1]} features, not out_dim={self._out_dim}")


class Wrapped(Backbone):
    """Any module or function as a backbone; see ``wrap``."""

    def __init__(
        self,
        function: Callable[[Any], Tensor],
        out_dim: int | None,
        modality: str,
        preprocess: Callable[[Sequence[Any]], Any] | None,
        name: str | None,
    ) -> None:
        label = name or str(getattr(function, "__name__", type(function).__name__))
        # Weights can be hashed, code cannot: only a name that the user vouches for makes features cacheable.
        super().__init__(label, out_dim, modality, None if name is None else f"wrapped {function!r:.10000}")
        if name is not None and not isinstance(function, nn.Module):
            self.recipe = f"wrapped function {name}"
        self.function = function
        self._preprocess = preprocess

    def forward(self, x: Any) -> Tensor:
        return self.function(x)

    def preprocess(self, raw: Sequence[Any]) -> Any:
        if self._preprocess is not None:
            return self._preprocess(raw)
        if self.modality == "image":
            from metafit.backbones.pictures import stack

            return stack(raw)
        if self.modality == "text":
            raise BadInput(
                f"backbone {self.name!r}: a text model needs wrap(..., preprocess=a function of a list of str)"
            )
        return super().preprocess(raw)


def wrap(
    model: Callable[[Any], Tensor],
    out_dim: int | None = None,
    modality: str = "vector",
    preprocess: Callable[[Sequence[Any]], Any] | None = None,
    name: str | None = None,
) -> Backbone:
    """Makes a backbone of any module, or function, that maps N inputs to ``(N, out_dim)``.

    Args:
        model: an ``nn.Module`` or a function of a tensor (or of what ``preprocess`` gives).
        out_dim: number of features; where left out, it is known after the first ``embed``.
        modality: "text", "image" or "vector".
        preprocess: a list of raw items to a tensor or dict of tensors. Image items need none if they share one
            size; the model then gets uint8 ``(N, C, H, W)``.
        name: a name for this model *and its code*. Features are cached on disk only for a named model: change the
            name when the code changes (changed weights are noticed).

    >>> wrap(nn.Linear(4, 2), out_dim=2).embed(torch.zeros(3, 4)).shape
    torch.Size([3, 2])
    """
    return Wrapped(model, out_dim, modality, preprocess, name)


def texts(raw: Sequence[Any]) -> list[str]:
    """The items as a list, once each of them is known to be a text."""
    for index, text in enumerate(raw):
        if not isinstance(text, str):
            raise BadInput(f"text {index} is {type(text).__name__}, not str; drop it or write it as text")
        if not text.isascii() and text.encode("utf-8", "replace").decode() != text:
            raise BadInput(f"text {index} has half a character (a lone surrogate); mend its encoding")
    return list(raw)


def _is_preprocessed(x: Any) -> bool:
    return isinstance(x, Mapping) or isinstance(getattr(x, "dtype", None), torch.dtype)


def _length(x: Any) -> int:
    return int(tree_leaves(x)[0].shape[0]) if _is_preprocessed(x) else len(x)


def _trim(batch: Any, padded: int, longest: int) -> Any:
    """Cuts the columns that are padding in every row (padding is on the right)."""
    return {
        key: value[:, : max(longest, 1)] if value.ndim > 1 and value.shape[1] == padded else value
        for key, value in batch.items()
    }
