"""What an agent may do, and the distribution over it that a network's outputs are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

WIDEST = 2.0  # of log-deviations, either way: beyond, an update can make a policy that never comes back


@dataclass(frozen=True)
class Actions:
    """A choice of ``size`` actions, or a vector of ``size`` real numbers.

    Outputs ``(..., outputs)`` are the logits of a choice; of a vector, the means and then the logarithms of the
    standard deviations of independent Gaussians.
    """

    size: int
    discrete: bool = True

    @property
    def outputs(self) -> int:
        return self.size if self.discrete else 2 * self.size

    def sample(self, outputs: Float[Tensor, "n outputs"], generator: torch.Generator) -> Shaped[Tensor, "n ..."]:
        """Action numbers ``(n,)`` or vectors ``(n, size)``."""
        if self.discrete:
            noise = torch.rand(outputs.shape, generator=generator, dtype=outputs.dtype)
            return (outputs - (-noise.clamp_min(1e-20).log()).log()).argmax(-1)  # Gumbel's trick, one operation a row
        mean, log_deviation = _parts(outputs)
        return mean + log_deviation.exp() * torch.randn(mean.shape, generator=generator, dtype=mean.dtype)

    def best(self, outputs: Float[Tensor, "n outputs"]) -> Shaped[Tensor, "n ..."]:
        """The most probable action."""
        return outputs.argmax(-1) if self.discrete else _parts(outputs)[0]

    def log_prob(self, outputs: Float[Tensor, "n outputs"], action: Shaped[Tensor, "n ..."]) -> Float[Tensor, " n"]:
        """Of a choice the logarithm of its probability, of a vector that of its density."""
        if self.discrete:
            return outputs.log_softmax(-1).gather(-1, action[..., None])[..., 0]
        mean, log_deviation = _parts(outputs)
        scaled = (action - mean) * (-log_deviation).exp()
        return -(0.5 * scaled.square() + log_deviation + 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self, outputs: Float[Tensor, "n outputs"]) -> Float[Tensor, " n"]:
        if self.discrete:
            log_p = outputs.log_softmax(-1)
            return -(log_p.exp() * log_p).sum(-1)
        return (_parts(outputs)[1] + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def encode(self, action: Shaped[Tensor, "n ..."]) -> Float[Tensor, "n size"]:
        """As a network reads it."""
        return F.one_hot(action, self.size).to(torch.get_default_dtype()) if self.discrete else action

    def none(self, n: int) -> Float[Tensor, "n size"]:
        """What a network reads before the first action of a trial."""
        return torch.zeros(n, self.size)


def _parts(outputs: Tensor) -> tuple[Tensor, Tensor]:
    mean, log_deviation = outputs.chunk(2, -1)
    return mean, WIDEST * torch.tanh(log_deviation / WIDEST)
