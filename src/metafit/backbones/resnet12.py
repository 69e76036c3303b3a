"""ResNet-12, the residual network of the few-shot benchmarks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from metafit.backbones.base import Backbone
from metafit.backbones.conv4 import normalisation
from metafit.backbones.pictures import channels_last, stack, to_convolve
from metafit.errors import BadInput

WIDTHS = (64, 160, 320, 640)


class ResNet12(Backbone):
    """Four residual blocks of three 3×3 convolutions, 64-160-320-640 channels, globally pooled: 640 features.

    Not pretrained. The DropBlock regularisation of the papers is left out.

    Args:
        channels_in: 1 for greyscale, 3 for colour.
        image_size: height and width to which raw images are resized; tensors of any size from 16 up are accepted.
        norm: "batch" (statistics of the batch, in training and evaluation alike: ``transductive`` is then true),
            "group" or "none".

    ``forward`` takes uint8 ``(N, channels_in, H, W)`` of 0 to 255, or floats of any scale, and computes in the type
    of the parameters.

    References:
        Oreshkin et al., TADAM, NeurIPS 2018; the widths: Lee et al., Meta-Learning with Differentiable Convex
        Optimization, CVPR 2019.
    """

    def __init__(self, channels_in: int = 3, image_size: int = 84, norm: str = "batch") -> None:
        recipe = f"resnet12 v1 channels_in={channels_in} image_size={image_size} norm={norm}"
        super().__init__("resnet12", WIDTHS[-1], "image", recipe)
        self.channels_in, self.image_size = channels_in, image_size
        self.transductive = norm == "batch"
        self.blocks = nn.Sequential(*(_Block(a, b, norm) for a, b in itertools.pairwise((channels_in, *WIDTHS))))
        channels_last(self)

    def forward(self, x: Shaped[Tensor, "n c h w"]) -> Float[Tensor, "n 640"]:
        if x.shape[-3] != self.channels_in or min(x.shape[-2:]) < 16:
            raise BadInput(
                f"backbone 'resnet12': images of shape {tuple(x.shape[-3:])} (channels, height, width) where it was "
                f"made for {self.channels_in} channels of 16 pixels or more; pass channels_in= or resize the images"
            )
        return self.blocks(to_convolve(x, next(self.parameters()).dtype)).mean((-2, -1))

    def preprocess(self, raw: Sequence[Any]) -> Tensor:
        return stack(raw, self.image_size, self.channels_in)


class _Block(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, norm: str) -> None:
        super().__init__()
        bias = norm != "batch"
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise((channels_in, channels_out, channels_out, channels_out)):
            layers += [nn.Conv2d(a, b, 3, padding=1, bias=bias), normalisation(norm, b), nn.LeakyReLU(0.1)]
        self.layers = nn.Sequential(*layers[:-1])
        self.shortcut = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 1, bias=bias), normalisation(norm, channels_out)
        )
        self.last = nn.Sequential(nn.LeakyReLU(0.1), nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layers(x) + self.shortcut(x))
