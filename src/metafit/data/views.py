"""Other views of an example: random changes that leave what it is.

A view is a function of the examples and of one key each, so that what happens to an example depends on nothing else:
not on its batch, nor on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int64, Shaped
from torch import Tensor

from metafit.data.features import features
from metafit.data.randomness import below, derive, keys, normal, uniform
from metafit.data.source import Source
from metafit.errors import BadInput

View = Callable[[Shaped[Tensor, "n ..."], Int64[Tensor, " n"]], Shaped[Tensor, "n ..."]]


@dataclass(frozen=True)
class Jitter:
    """Vectors with some features left out and noise on the others.

    Args:
        drop: share of the features that become 0; the others grow to keep the mean.
        noise: standard deviation of the noise, in units of the vector's root mean square.
    """

    drop: float = 0.5
    noise: float = 1.0

    def __call__(self, x: Tensor, key: Tensor) -> Tensor:
        _check_vectors(self, x)
        size = x.square().mean(1, keepdim=True).sqrt()
        noisy = x + self.noise * size * normal(derive(key, 0), x.shape[1]).to(x)
        return noisy * (_each(key, 1, x) >= self.drop) / (1 - self.drop)


@dataclass(frozen=True)
class Marginal:
    """Vectors with some features taken from other rows, each from a row of its own, so that every column keeps its
    distribution (Bahri et al., 2022, SCARF, arXiv:2106.15147): for tables, whose columns have units of their own.

    Args:
        rows: where the values come from ``(N, dim)``.
        share: of the features.
    """

    rows: Tensor
    share: float = 0.6

    def __call__(self, x: Tensor, key: Tensor) -> Tensor:
        _check_vectors(self, x)
        column = torch.arange(x.shape[1])
        other = self.rows[below(derive(derive(key, 0)[:, None], column), len(self.rows)), column]
        return torch.where(_each(key, 1, x) < self.share, other, x)


@dataclass(frozen=True)
class Affine:
    """Images ``(n, C, H, W)`` turned, scaled, sheared and shifted, each by as much as is drawn for it; what comes in
    at the border is black.

    Args:
        turn: largest angle, in degrees.
        scale: largest change of either side, as a share.
        shear: largest shear.
        shift: largest shift, as a share of the image.
    """

    turn: float = 15.0
    scale: float = 0.2
    shear: float = 0.2
    shift: float = 0.1

    def __call__(self, x: Tensor, key: Tensor) -> Tensor:
        _check_images(self, x)
        drawn = [uniform(derive(key, i), -1.0, 1.0) for i in range(6)]
        angle, shear = math.radians(self.turn) * drawn[0], self.shear * drawn[1]
        wide, high = (1 + self.scale * drawn[i] for i in (2, 3))
        cos, sin = angle.cos(), angle.sin()
        right, down = (2 * self.shift * drawn[i] for i in (4, 5))  # the grid goes from -1 to 1
        matrix = torch.stack([wide * cos, shear - high * sin, right, wide * sin, high * cos, down], 1).view(-1, 2, 3)
        floats = x if x.is_floating_point() else x.float()
        grid = F.affine_grid(matrix.to(floats), list(x.shape), align_corners=False)
        return rounded(F.grid_sample(floats, grid, align_corners=False), x)


@dataclass(frozen=True)
class Mirror:
    """Images ``(n, C, H, W)`` with left and right exchanged, every other one on average."""

    def __call__(self, x: Tensor, key: Tensor) -> Tensor:
        _check_images(self, x)
        turned = uniform(derive(key, 0), 0.0, 1.0).to(x.device) < 0.5
        return torch.where(turned[:, None, None, None], x.flip(-1), x)


@dataclass(frozen=True)
class Erase:
    """Images with a share of their pixels black, all channels of a pixel alike."""

    share: float = 0.1

    def __call__(self, x: Tensor, key: Tensor) -> Tensor:
        _check_images(self, x)
        return x * (_each(key, 0, x[:, :1]) >= self.share)


def changed(x: Tensor, key: Tensor, views: Sequence[View]) -> Tensor:
    """The examples after all the views, one after the other."""
    for i, view in enumerate(views):
        x = view(x, derive(key, i))
    return x


def rounded(made: Tensor, x: Tensor) -> Tensor:
    """What was made in floats, in the type of ``x``."""
    return made.to(x.dtype) if x.is_floating_point() else made.round().to(x.dtype)


def drop_words(texts: Sequence[str], share: float = 0.3, seed: int = 0) -> list[str]:
    """The texts without some of their words, drawn one by one; a text of one word keeps it.

    >>> drop_words(["please block my card, it was stolen"], seed=1)
    ['please my it stolen']
    """
    found = []
    for text, key in zip(texts, keys(seed, torch.arange(len(texts))), strict=True):
        words = text.split()
        drawn = uniform(derive(key, torch.arange(len(words))), 0.0, 1.0)
        kept = drawn >= min(share, float(drawn.max())) if words else drawn
        found.append(" ".join(word for word, keep in zip(words, kept.tolist(), strict=True) if keep))
    return found


def text_views(
    texts: Source, backbone: Any, views: int = 4, share: float = 0.3, seed: int = 0, progress: bool = True
) -> Tensor:
    """Features of each text with words dropped, ``views`` times: ``(N, views, dim)``, cached as ``features`` are.

    Args:
        texts: a source whose ``x`` is texts; its labels are not looked at.
        backbone: of texts.
        share: of the words.
    """
    dropped = (texts.with_x(drop_words(texts.x, share, seed * views + v)) for v in range(views))
    return torch.stack([features(view, backbone, progress).x[:] for view in dropped], 1)


def _each(key: Tensor, stream: int, x: Tensor) -> Tensor:
    """A uniform number for each element of each example, in the shape of ``x``."""
    place = torch.arange(x[0].numel(), device=key.device)
    return uniform(derive(derive(key, stream)[:, None], place), 0.0, 1.0).view(x.shape).to(x.device)


def _check_vectors(view: Any, x: Tensor) -> None:
    if x.ndim != 2 or not x.is_floating_point():
        raise BadInput(f"{type(view).__name__}: it changes vectors of floats, and this is {x.dtype} {tuple(x.shape)}")


def _check_images(view: Any, x: Tensor) -> None:
    if x.ndim != 4:
        raise BadInput(
            f"{type(view).__name__}: it changes images (n, C, H, W), and this is {tuple(x.shape)}; leave it out "
            "(of --augment) over rows and features of a frozen backbone, or train the backbone"
        )
