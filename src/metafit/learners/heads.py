"""Heads of the gradient-based learner: from features to logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metafit.learners.base import logarithm, members
from metafit.task import Examples, unit


class CosineHead(nn.Module):
    """Logits are s·cos(feature, weight of the class), with a learned scale s (Gidaris and Komodakis, 2018,
    arXiv:1804.09458, eq. 3; Chen et al., 2019, arXiv:1904.04232, Baseline++).

    Args:
        dim: size of the features.
        way: classes.
        scale: s at the start.
    """

    def __init__(self, dim: int, way: int, scale: float = 10.0):
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.empty(way, dim)), nn.Parameter(torch.tensor(float(scale)))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)  # as torch's linear layers

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * unit(features) @ unit(self.weight).mT


class PrototypeHead(nn.Module):
    """A linear head that starts each task from the class means c of its support features: W = 2c, b = −‖c‖².

    Its logits are then minus the squared distances to the means, up to what all classes share (ProtoMAML,
    Triantafillou et al., 2020, arXiv:1903.03096, section 3; Snell et al., 2017, eq. 8). What the means are computed
    from is differentiated, so that the outer gradient moves the embedding through the start, too.

    Args:
        dim: size of the features.
        way: the most classes of a task.
    """

    def __init__(self, dim: int, way: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(way, dim)), nn.Parameter(torch.zeros(way))

    def start(self, features: Tensor, y: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """The parameters before the first step, of support features ``(N, dim)``; zeros for absent classes."""
        member = members(Examples(features, y, weight), len(self.bias)).to(features.dtype)
        size = member.sum(0)
        means = member.mT @ features / torch.where(size > 0, size, 1.0)[:, None]
        return {"weight": 2 * means, "bias": -means.square().sum(-1)}

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight, self.bias)


class CosinePrototypeHead(PrototypeHead):
    """The same over features scaled to length √s: minus s times the squared distances of their directions.

    For networks whose features have a length of their own, such as 1, which leaves the logits no room. s is a
    meta-parameter that does not adapt, whatever the scope.

    Args:
        dim, way: as before.
        sharpness: s at the start.
    """

    def __init__(self, dim: int, way: int, sharpness: float = 10.0):
        super().__init__(dim, way)
        self.stretch = Stretch(sharpness)

    def start(self, features: Tensor, y: Tensor, weight: Tensor) -> dict[str, Tensor]:
        return super().start(self.stretch(features), y, weight)

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(self.stretch(features))


class Stretch(nn.Module):
    """Features scaled to length √s, with s learned as its logarithm."""

    meta_only = True  # no scope lets it adapt

    def __init__(self, sharpness: float):
        super().__init__()
        self.log_sharpness = logarithm("sharpness", sharpness)

    def forward(self, features: Tensor) -> Tensor:
        return (self.log_sharpness / 2).exp() * unit(features)
