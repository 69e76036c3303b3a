"""A memory-augmented network: a recurrent controller that reads and writes a memory of its own."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metafit.learners.base import Adapted, Learner, logarithm, mask_absent, present, targets
from metafit.task import Examples, weights

FAINT = 1e-4  # a squared length: what is much shorter has no direction, and its cosines no gradients without bound


class State(NamedTuple):
    """What is carried from one example to the next.

    Attributes:
        hidden: of the LSTM, ``(width,)``.
        cell: of the LSTM, ``(width,)``.
        memory: M, ``(slots, size)``.
        attention: w^r, where each head read last, ``(heads, slots)``.
        usage: w^u, how much each slot was read and written of late, ``(slots,)``.
    """

    hidden: Tensor
    cell: Tensor
    memory: Tensor
    attention: Tensor
    usage: Tensor


class MemoryLearner(Learner):
    """An LSTM reads the support set in its order and writes what it makes of each example into a memory, from where it
    is read by likeness (Santoro et al., 2016, ICML, arXiv:1605.06065, section 3).

    An example comes with its own label (the paper shows that of the step before). A query comes after the whole support
    set, with zeros for the label; it reads and does not write, so that no query sees another.

    Args:
        body: from inputs to ``(N, dim)``.
        dim: size of what it gives.
        way: the most classes of a task, ``None`` for regression.
        outputs: dimensions of a regression target.
        width: units of the LSTM.
        slots: of the memory.
        size: of a slot.
        heads: that read, and write, at each step.
        decay: γ, what is left of a slot's usage a step later.
        sharpness: what multiplies the cosines of eq. 2 (the paper has 1); a meta-parameter (learned as its logarithm).
    """

    weighs = False

    def __init__(
        self,
        body: nn.Module,
        dim: int,
        way: int | None,
        outputs: int = 1,
        width: int = 128,
        slots: int = 64,
        size: int = 32,
        heads: int = 4,
        decay: float = 0.95,
        sharpness: float = 20.0,
    ):
        super().__init__(way)
        self.body, self.width, self.decay = body, width, decay
        self.memory = (slots, heads, size)
        outputs = way or outputs
        self.lstm = nn.Linear(dim + outputs + heads * size + width, 4 * width)
        self.key = nn.Linear(width, heads * size)
        self.gate = nn.Parameter(torch.zeros(heads))  # α of eq. 7, one for each head
        self.log_sharpness = logarithm("sharpness", sharpness)
        self.out = nn.Linear(width + heads * size, outputs)

    def adapt(self, support: Examples) -> Adapted:
        x, weight = self.body(support.x), weights(support)
        labels, state = targets(support, self.way).to(x.dtype), self.blank(x)
        for i in range(len(labels)):
            after = self.step(state, torch.cat([x[i], labels[i]]))
            state = State(*(torch.where(weight[i] > 0, a, b) for a, b in zip(after, state, strict=True)))
        return {"state": state} if self.way is None else {"state": state, "present": present(support, self.way)}

    def predict(self, adapted: Adapted, x: Any) -> Tensor:
        x, state = self.body(x), adapted["state"]
        x = torch.cat([x, x.new_zeros(len(x), self.out.out_features)], -1)
        hidden, _, keys = self.control(state, x)
        found = read(state.memory, keys, self.log_sharpness.exp()) @ state.memory
        outputs = self.out(torch.cat([hidden, found.flatten(-2)], -1))
        return outputs if self.way is None else mask_absent(outputs, adapted["present"])

    def blank(self, x: Tensor) -> State:
        """Nothing seen yet; in the precision and on the device of x."""
        slots, heads, size = self.memory
        shapes = ((self.width,), (self.width,), (slots, size), (heads, slots), (slots,))
        return State(*(x.new_zeros(shape) for shape in shapes))

    def step(self, state: State, x: Tensor) -> State:
        """The state after one more example, its input beside its label."""
        hidden, cell, keys = self.control(state, x)
        memory, written = write(state, keys, self.gate)
        attention = read(memory, keys, self.log_sharpness.exp())
        usage = self.decay * state.usage + (attention + written).sum(0)  # eq. 5
        return State(hidden, cell, memory, attention, usage)

    def control(self, state: State, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The LSTM's next hidden and cell states, and a key for each head, from inputs ``(..., dim + outputs)``."""
        found = (state.attention @ state.memory).flatten()
        before = torch.cat([found, state.hidden]).expand(*x.shape[:-1], -1)
        take, keep, give, new = self.lstm(torch.cat([x, before], -1)).chunk(4, -1)
        cell = (keep + 1).sigmoid() * state.cell + take.sigmoid() * new.tanh()  # it starts by remembering
        hidden = give.sigmoid() * cell.tanh()
        return hidden, cell, self.key(hidden).reshape(*hidden.shape[:-1], *self.memory[1:])


def read(memory: Tensor, keys: Tensor, sharpness: Tensor) -> Tensor:
    """Where keys ``(..., heads, size)`` are found in memory, by their cosines: ``(..., heads, slots)`` (eq. 2-3)."""
    return (sharpness * (direction(keys) @ direction(memory).mT)).softmax(-1)


def direction(x: Tensor) -> Tensor:
    """Rows of length 1, or less where they are faint: a slot with traces of a key is nearly as good as empty."""
    return x * (x.square().sum(-1, keepdim=True) + FAINT).rsqrt()


def write(state: State, keys: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """The memory after each head has added its key where it read last or to a slot that is little used (eq. 6-8); and
    how much of it went where, ``(heads, slots)``.

    Where each head has a slot of its own, of the least used ones, which are emptied first.
    """
    idle = least_used(state.usage, len(keys)).to(keys.dtype)
    old = gate.sigmoid()[:, None]
    written = old * state.attention + (1 - old) * idle
    return state.memory * (1 - idle.sum(0))[:, None] + written.mT @ keys, written


def least_used(usage: Tensor, count: int) -> Tensor:
    """One row ``(slots,)`` for each of the least used slots, true there; of equals the first is less used."""
    return usage.argsort(stable=True)[:count, None] == torch.arange(len(usage), device=usage.device)
