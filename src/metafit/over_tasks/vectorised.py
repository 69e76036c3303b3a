"""Operations of image models, written so that generated code for them is vectorised over the channels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_FEW = 32  # columns of a patch below which a convolution is limited by memory, and a matrix product is as fast


def max_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Pooling over windows that do not overlap, by comparisons; the first of equal values wins, as in torch's."""
    height, width = _pair(kernel_size)
    same = _pair(stride or kernel_size) == (height, width)
    if not same or _pair(padding) != (0, 0) or _pair(dilation) != (1, 1) or ceil_mode or return_indices:
        pool: Any = F.max_pool2d_with_indices if return_indices else torch.max_pool2d
        return pool(input, kernel_size, stride or kernel_size, padding, dilation, ceil_mode)
    x = input[..., : input.shape[-2] // height * height, : input.shape[-1] // width * width]
    most = x[..., ::height, ::width]
    for place in range(1, height * width):
        value = x[..., place // width :: height, place % width :: width]
        most = torch.where((value > most) | (value != value), value, most)  # not a number wins
    return most


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution of few input channels as a matrix product, whose result has the channels innermost.

    The library's kernel gives them outermost, and every operation after it then mixes two layouts.
    """
    out, channels, height, width = weight.shape
    simple = groups == 1 and not isinstance(padding, str) and _pair(stride) == (1, 1) and _pair(dilation) == (1, 1)
    if not simple or channels * height * width > _FEW or input.dim() != 4:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    over, along = _pair(padding)
    x = F.pad(input, (along, along, over, over)).permute(0, 2, 3, 1)
    rows, columns = x.shape[1] - height + 1, x.shape[2] - width + 1
    patches = [x[:, i : i + rows, j : j + columns] for i in range(height) for j in range(width)]
    matrix = weight.permute(2, 3, 1, 0).reshape(-1, out).contiguous()  # transposed, its gradient is a slow product
    result = torch.cat(patches, -1) @ matrix
    return (result if bias is None else result + bias).permute(0, 3, 1, 2)


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    first, *rest = value
    return first, rest[0] if rest else first
