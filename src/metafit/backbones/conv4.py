"""Conv-4, the four-block convolutional network of the few-shot benchmarks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from metafit.backbones.base import Backbone
from metafit.backbones.pictures import channels_last, stack, to_convolve
from metafit.errors import BadInput, unknown

NORMS = ("batch", "group", "none")


class Conv4(Backbone):
    """Four blocks of 3×3 convolution, normalisation, ReLU and 2×2 max-pooling, flattened.

    Args:
        channels_in: 1 for greyscale, 3 for colour.
        image_size: height and width in pixels: 28 gives 64 features, 64 gives 1024, 84 gives 1600.
        width: channels of every block.
        norm: "batch" (statistics of the batch, in training and evaluation alike, as MAML does: the features of an
            example then depend on the others of its batch, and ``transductive`` is true), "group" or "none".

    ``forward`` takes uint8 ``(N, channels_in, H, W)`` of 0 to 255, or floats of any scale, and computes in the type
    of the parameters.

    References:
        Vinyals et al., Matching Networks for One Shot Learning, NeurIPS 2016; Finn et al., MAML, ICML 2017.
    """

    def __init__(self, channels_in: int = 1, image_size: int = 28, width: int = 64, norm: str = "batch") -> None:
        final = image_size // 16
        if final < 1:
            raise BadInput(f"backbone 'conv4': image_size {image_size} is too small for four poolings; use 16 or more")
        recipe = f"conv4 v1 channels_in={channels_in} image_size={image_size} width={width} norm={norm}"
        super().__init__("conv4", width * final * final, "image", recipe)
        self.channels_in, self.image_size = channels_in, image_size
        self.transductive = norm == "batch"
        channels = [channels_in] + [width] * 4
        self.blocks = nn.Sequential(*(_block(a, b, norm) for a, b in itertools.pairwise(channels)))
        channels_last(self)

    def forward(self, x: Shaped[Tensor, "n c h w"]) -> Float[Tensor, "n out_dim"]:
        if x.shape[-3:] != (self.channels_in, self.image_size, self.image_size):
            raise BadInput(
                f"backbone 'conv4': images of shape {tuple(x.shape[-3:])} (channels, height, width) where it was made "
                f"for {(self.channels_in, self.image_size, self.image_size)}; "
                "pass channels_in= and image_size= that fit, or resize the images"
            )
        return self.blocks(to_convolve(x, next(self.parameters()).dtype)).flatten(-3)

    def preprocess(self, raw: Sequence[Any]) -> Tensor:
        return stack(raw, self.image_size, self.channels_in)


def _block(channels_in: int, channels_out: int, norm: str) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=norm != "batch"),
        normalisation(norm, channels_out),
        nn.MaxPool2d(2),  # before the ReLU: the same function, at a quarter of the work
        nn.ReLU(),
    )


def normalisation(norm: str, channels: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels, track_running_stats=False)
    if norm == "group":
        return nn.GroupNorm(max(g for g in (1, 2, 4, 8) if channels % g == 0), channels)
    if norm == "none":
        return nn.Identity()
    raise unknown("norm", norm, NORMS)
