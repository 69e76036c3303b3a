"""Easy tasks first."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from metafit.context import Context
from metafit.errors import BadInput
from metafit.losses.base import Loss, Params


class Curriculum(Loss):
    """Another loss, whose gradient counts by a weight that is small for tasks that are hard for now: σ((b − l) / T),
    with l the loss as a number and b a bar that rises as training goes on (a smooth self-paced weight, after Kumar et
    al., 2010). The value stays l, which families are balanced by and the history shows.

    An outer loss: ``learner.criterion = Curriculum(learner.criterion, ...)``; as an inner one (``inner_loss``) it makes
    the steps of a hard task short. At the end all tasks weigh 1, as they do in evaluation mode at any time. Reptile,
    whose query set is only measured, has no use for the outer one.

    Args:
        loss: of a task.
        start: b at the start of training, in units of the loss, above 0; it grows without bound towards the end.
        temperature: T, above 0.
    """

    bar: Tensor

    def __init__(self, loss: Loss, start: float, temperature: float = 0.1):
        super().__init__()
        if not (start > 0 and temperature > 0):
            raise BadInput(f"start {start}, temperature {temperature}: both need to be above 0")
        self.loss, self.start, self.temperature = loss, start, temperature
        self.transductive, self.reads_means = loss.transductive, loss.reads_means
        self.moves_features = loss.moves_features
        self.register_buffer("bar", torch.tensor(float(start)), persistent=False)

    def parameters_at(self, step: int) -> Params:
        return {f"loss.{name}": p for name, p in self.loss.parameters_at(step).items()}

    def advance(self, done: float) -> None:
        """Sets the bar; ``done`` is the share of training that is behind, 0 to 1."""
        self.loss.advance(done)
        self.bar.fill_(self.start / (1 - done) if done < 1 else torch.inf)

    def forward(self, outputs: Tensor, y: Tensor, weight: Tensor, context: Context) -> Tensor:
        loss: Tensor = self.loss(outputs, y, weight, context)
        if not self.training:
            return loss
        bar = self.bar.to(loss.dtype)
        weighed = -self.temperature * F.softplus((bar - loss) / self.temperature)  # its derivative by l is the weight
        weighed = torch.where(bar.isinf(), loss, weighed)
        return loss.detach() + (weighed - weighed.detach())
