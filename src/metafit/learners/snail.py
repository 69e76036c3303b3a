"""SNAIL: a task is a sequence, read by convolutions over its recent past and attention to all of it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metafit.learners.base import Adapted, Learner, mask_absent, present, targets
from metafit.task import Examples, weights


class SnailLearner(Learner):
    """The support examples with their labels, then one query without: what the network makes of the query is the answer
    (Mishra et al., 2018, arXiv:1707.03141, section 3).

    No position sees a later one. So what the support set is at each layer is the same for every query, and ``adapt``
    computes it once. Padding is moved to the front of the sequence and is zero at every layer: to a causal convolution,
    there is nothing before the first example.

    Args:
        body: from inputs to ``(N, dim)``.
        dim: size of what it gives.
        way: the most classes of a task, ``None`` for regression.
        outputs: dimensions of a regression target.
        length: positions that the convolutions of one stage look back on, at least; attention sees all.
        filters: channels that each convolution adds.
        width: of the first layer, and of keys and values of the attention.
    """

    weighs = False

    def __init__(
        self,
        body: nn.Module,
        dim: int,
        way: int | None,
        outputs: int = 1,
        length: int = 128,
        filters: int = 32,
        width: int = 64,
    ):
        super().__init__(way)
        self.body, self.blocks = body, nn.ModuleList()
        outputs = way or outputs
        self.token = nn.Linear(dim + outputs, width)
        channels = width
        dilations = [2**i for i in range(math.ceil(math.log2(length)))]
        for stage in ([], dilations, dilations):
            for dilation in stage:
                self.blocks.append(GatedConvolution(channels, filters, dilation))
                channels += filters
            self.blocks.append(CausalAttention(channels, width))
            channels += width
        self.out = nn.Linear(channels, outputs)

    def adapt(self, support: Examples) -> Adapted:
        x, real = self.body(support.x), weights(support) > 0
        order = real.long().argsort(stable=True)  # padding first, the others in the order that they have
        x = self.token(torch.cat([x, targets(support, self.way).to(x.dtype)], -1))[order]
        real, place, states = real[order], torch.arange(len(x), device=x.device), []
        for block in self.blocks:
            x = x * real[:, None]
            states.append(x)
            x = block(x, place, x, real)
        adapted = {"states": states, "real": real}
        return adapted if self.way is None else {**adapted, "present": present(support, self.way)}

    def predict(self, adapted: Adapted, x: Any) -> Tensor:
        x, real = self.body(x), adapted["real"]
        x = self.token(torch.cat([x, x.new_zeros(len(x), self.out.out_features)], -1))
        place = torch.full((len(x),), len(real), device=x.device)  # each alone behind the support set
        for block, state in zip(self.blocks, adapted["states"], strict=True):
            x = block(x, place, state, real)
        outputs = self.out(x)
        return outputs if self.way is None else mask_absent(outputs, adapted["present"])


class GatedConvolution(nn.Module):
    """A dense block: tanh·sigmoid of a causal convolution of two taps, beside its inputs (section 3, figure 2a).

    Args:
        channels: of the inputs.
        filters: channels that it adds.
        dilation: how many positions back the earlier tap is.
    """

    def __init__(self, channels: int, filters: int, dilation: int):
        super().__init__()
        self.dilation = dilation
        self.now, self.before = nn.Linear(channels, 2 * filters), nn.Linear(channels, 2 * filters, bias=False)

    def forward(self, x: Tensor, place: Tensor, sequence: Tensor, real: Tensor) -> Tensor:
        """What ``(P, channels)`` at places ``(P,)`` of a sequence ``(N, channels)``, or one behind it, become."""
        before = F.pad(sequence, (0, 0, self.dilation, 0))[place]
        value, gate = (self.now(x) + self.before(before)).chunk(2, -1)
        return torch.cat([x, value.tanh() * gate.sigmoid()], -1)


class CausalAttention(nn.Module):
    """What attention finds among the earlier positions and the own, beside the inputs (section 3, figure 2b).

    Args:
        channels: of the inputs.
        width: of queries, keys and values; channels that it adds.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(channels, width) for _ in range(3))
        self.key.load_state_dict(self.query.state_dict())  # attention starts as likeness

    def forward(self, x: Tensor, place: Tensor, sequence: Tensor, real: Tensor) -> Tensor:
        """As ``GatedConvolution.forward``; ``real`` ``(N,)`` tells which positions are no padding."""
        query, earlier = self.query(x), torch.arange(len(real), device=x.device) < place[:, None]
        scores = (query @ self.key(sequence).mT).masked_fill(~(earlier & real), -torch.inf)
        own = (query * self.key(x)).sum(-1, keepdim=True)
        attention = (torch.cat([scores, own], -1) / query.shape[-1] ** 0.5).softmax(-1)
        found = attention[:, :-1] @ self.value(sequence) + attention[:, -1:] * self.value(x)
        return torch.cat([x, found], -1)
