"""An average of the meta-parameters over the outer steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Average:
    """The exponential moving average of a module's parameters after each step, bias-corrected (Kingma and Ba, 2015,
    arXiv:1412.6980, section 7.2): after t steps (1 − d) Σ_i d^(t−i) θ_i / (1 − d^t), and the start before the first.

    Buffers, such as running statistics, are not averaged.

    Args:
        module: whose parameters that require a gradient are averaged.
        decay: d, above 0 and below 1; about the last 1 / (1 − d) steps count.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.values: dict[str, Tensor] = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the parameters after that many steps."""
        share = (1 - self.decay) / (1 - self.decay**step)
        for name, value in self.values.items():
            value.lerp_(self.parameters[name], share)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """A context in which the module has the averages for parameters."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self.values.items():
            parameter = self.parameters[name]
            own = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(own)
