"""Pictures as tensors: files and arrays to uint8 ``(N, C, H, W)``, and those to what a network wants to see."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from metafit.errors import BadInput
from metafit.images import open_image
from metafit.over_tasks.double_backward import within_double_backward


def stack(raw: Sequence[Any], size: int | tuple[int, int] | None = None, channels: int = 3) -> UInt8[Tensor, "n c h w"]:
    """Reads images (paths, PIL images, uint8 arrays or tensors) into one tensor.

    Args:
        raw: the images.
        size: height and width to resize to (bicubic, antialiased; the whole image, its aspect is not kept);
            ``None`` where all images have one size.
        channels: 3 for colour, 1 for greyscale.

    Raises:
        BadInput: an image cannot be read, or the sizes differ where no size is given.
    """
    height_width = (size, size) if isinstance(size, int) else size

    def one(item: Any) -> np.ndarray:
        if isinstance(item, Tensor) and item.ndim == 3 and item.shape[0] in (1, 3, 4):
            item = item.permute(1, 2, 0)  # a tensor is (C, H, W) even where W could be taken for channels
        image = open_image(item).convert("L" if channels == 1 else "RGB")
        if height_width is not None and image.size != height_width[::-1]:
            image = image.resize(height_width[::-1], 3)  # 3 is bicubic
        return np.asarray(image).reshape(image.height, image.width, channels).transpose(2, 0, 1)

    with ThreadPoolExecutor(max_workers=min(8, torch.get_num_threads())) as pool:  # decoding releases the lock
        arrays = list(pool.map(one, raw))
    sizes = sorted({f"{array.shape[2]}x{array.shape[1]}" for array in arrays})
    if len(sizes) > 1:
        raise BadInput(f"the images differ in size ({', '.join(sizes[:4])} pixels); resize them to one size")
    return torch.from_numpy(np.stack(arrays))


def unit_floats(x: Shaped[Tensor, "..."], dtype: torch.dtype) -> Float[Tensor, "..."]:
    """Bytes 0 to 255 become 0 to 1; floats only change their type."""
    return x.to(dtype) if x.is_floating_point() else x.to(dtype) / 255


def to_convolve(x: Shaped[Tensor, "n c h w"], dtype: torch.dtype) -> Float[Tensor, "n c h w"]:
    """``unit_floats``, grey pictures with their channel innermost, for convolutions of ``channels_last``.

    Torch takes a single channel to be outermost, and then lays out all channels of the first layer so: on a CPU its
    pooling takes twenty times as long. Not within ``double_backward``: some operations of a gradient that is
    differentiated again put the channels outermost in any case, and two layouts cost more than either.
    """
    x = unit_floats(x, dtype)
    n, channels, height, width = x.shape
    if channels > 1 or within_double_backward():
        return x
    return x.reshape(n, height, width, 1).permute(0, 3, 1, 2)


def fit(x: Shaped[Tensor, "n c h w"], height: int, width: int, dtype: torch.dtype) -> Float[Tensor, "n 3 height width"]:
    """Images of any size, grey or colour, bytes or floats of 0 to 1, as colour floats of 0 to 1 of one size."""
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise BadInput(f"images of shape {tuple(x.shape)}: (N, 1 or 3 channels, height, width) is needed")
    x = unit_floats(x, dtype)
    if x.shape[-2:] != (height, width):
        x = F.interpolate(x, (height, width), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return x.expand(-1, 3, -1, -1)


def channels_last(module: nn.Module) -> None:
    """Lays out the weights of the convolutions so that they run up to twice as fast on a CPU."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            part.weight.data = part.weight.data.contiguous(memory_format=torch.channels_last)
