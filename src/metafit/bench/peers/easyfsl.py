"""easyfsl 1.5: ``PrototypicalNetworks``, which embeds the images of every episode; and ANIL that does the same."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def prototypical(backbone: nn.Module) -> tuple[str, Any]:
    """The library's classifier where it is installed (it needs torchvision), else the same algorithm."""
    try:
        from easyfsl.methods import PrototypicalNetworks
    except ImportError:
        return "easyfsl's algorithm, our code", _Prototypical(backbone)
    return "easyfsl", PrototypicalNetworks(backbone)


class _Prototypical(nn.Module):
    """Minus the Euclidean distance to the mean of each class, with the interface of easyfsl."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone, self.prototypes = backbone, torch.empty(0)

    def process_support_set(self, images: Tensor, labels: Tensor) -> None:
        features = self.backbone(images)
        self.prototypes = torch.stack([features[labels == label].mean(0) for label in labels.unique()])

    def forward(self, images: Tensor) -> Tensor:
        return -torch.cdist(self.backbone(images), self.prototypes)


def anil(
    backbone: nn.Module, head: nn.Linear, support: tuple[Tensor, Tensor], query: Tensor, steps: int, rate: float
) -> Tensor:
    """ANIL's adaptation in one episode: both sets embedded once, a few steps of gradient descent on the head."""
    with torch.no_grad():
        features, queries = backbone(support[0]), backbone(query)
    fast = [head.weight, head.bias]
    for _ in range(steps):
        loss = F.cross_entropy(F.linear(features, *fast), support[1])
        fast = [p - rate * g for p, g in zip(fast, torch.autograd.grad(loss, fast), strict=True)]
    return F.linear(queries, *fast)
