"""A term that draws features of a class together."""

from __future__ import annotations

import torch
from torch import Tensor

from metafit.context import Context
from metafit.errors import BadInput
from metafit.losses.base import Loss
from metafit.losses.plain import CrossEntropy
from metafit.task import unit, weighted_mean


class Contrastive(Loss):
    """Cross-entropy, and λ times the supervised contrastive loss of the features (Khosla et al., 2020,
    arXiv:2004.11362, eq. 2).

    For each example it is −log of the softmax of its cosine to the others, over temperature, averaged over the others
    of its class; a class of one example adds nothing.

    Args:
        strength: λ.
        temperature: of the cosines.
    """

    moves_features = True

    def __init__(self, strength: float = 0.1, temperature: float = 0.1):
        super().__init__()
        if strength < 0 or not temperature > 0:
            raise BadInput(f"strength {strength}, temperature {temperature}: need 0 or more, and more than 0")
        self.strength, self.temperature, self.entropy = strength, temperature, CrossEntropy()

    def forward(self, outputs: Tensor, y: Tensor, weight: Tensor, context: Context) -> Tensor:
        if context.features is None:
            raise BadInput("the contrastive loss looks at features: use it as the inner loss of a gradient learner")
        term = contrastive(context.features, y, weight, self.temperature)
        return self.entropy(outputs, y, weight, context) + self.strength * term


def contrastive(features: Tensor, y: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """The term alone, in which an example of weight w counts as w of them; 0 where no class has two."""
    z = unit(features)
    counts = (weight - torch.eye(len(y), dtype=weight.dtype, device=y.device)).clamp_min(0)  # of the others, (N, N)
    similar = z @ z.mT / temperature
    several = (similar + torch.where(counts > 0, counts, 1.0).log()).masked_fill(counts == 0, -torch.inf)
    alike = (counts > 0) & (y[:, None] == y)
    log_p = torch.where(alike, similar - several.logsumexp(-1, keepdim=True), 0.0)
    found = (counts * alike).sum(-1)
    losses = -(counts * log_p).sum(-1) / torch.where(found > 0, found, 1.0)
    return weighted_mean(losses, weight * (found > 0))
