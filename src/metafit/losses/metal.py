"""A loss that is learned and adapts to the task."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metafit.context import Context
from metafit.errors import BadInput
from metafit.losses.base import Loss, Params
from metafit.losses.learned import criterion, network, target
from metafit.task import weighted_mean


class MeTAL(Loss):
    """The criterion and the mean of l(τ) over the examples, where the network l is itself adapted to the task (Baik et
    al., 2021, arXiv:2110.03909, eq. 5 to 8).

    The state τ of an example is the criterion, the means of the adapting parameters, its outputs (0 for an absent
    class) and its label, standardised over the task; a second network reads the first two of them, standardised, and
    gives a scale and a shift for each tensor of l, which has parameters of its own at each step. l's last layer starts
    at zero and the scales and shifts at none, so that the loss starts as the criterion, which the authors' code adds as
    well.

    Args:
        params: the parameters that will adapt; only their number is used.
        way: classes; ``None`` for regression.
        steps: inner steps that have networks of their own; later steps take the last.
        outputs: dimensions of a regression target.
        hidden: units of a hidden layer.
        transductive: adds such a network over the unlabelled query inputs, whose state has their entropy for a label
            and no criterion; the second network reads the mean state. For classes. The queries are a batch of their
            own, where the authors' code makes one of both sets, which batch normalisation then mixes.
    """

    reads_means = True

    def __init__(
        self,
        params: Mapping[str, Tensor],
        way: int | None,
        steps: int,
        outputs: int = 1,
        hidden: int = 32,
        transductive: bool = False,
    ):
        super().__init__()
        if steps < 1 or hidden < 1:
            raise BadInput(f"steps {steps}, hidden {hidden}: both need at least 1")
        if transductive and way is None:
            raise BadInput("transductive MeTAL is for classes: take the inductive one for a regression")
        self.way, self.outputs, self.transductive, self.criterion = way, way or outputs, transductive, criterion(way)
        task, example, query = 1 + len(params), 2 * (way or outputs), len(params) + (way or 0) + 1
        self.labelled = nn.ModuleList(_Adapting(task + example, task, hidden) for _ in range(steps))
        self.unlabelled = nn.ModuleList(_Adapting(query, query, hidden) for _ in range(steps if transductive else 0))

    def parameters_at(self, step: int) -> Params:
        own = tuple(f"{part}.{self._networks(step)}." for part in ("labelled", "unlabelled"))
        return {name: p for name, p in self.named_parameters() if name.startswith(own)}

    def _networks(self, step: int) -> int:
        return min(step, len(self.labelled) - 1)

    def forward(self, outputs: Tensor, y: Tensor, weight: Tensor, context: Context) -> Tensor:
        if context.means is None:
            raise BadInput("MeTAL looks at the parameters: use it as the inner loss of a gradient-based learner")
        if outputs.shape[-1] != self.outputs:
            raise BadInput(
                f"MeTAL: {outputs.shape[-1]} outputs, made for {self.outputs}; give way, or outputs= where None"
            )
        step = self._networks(context.step)
        plain = self.criterion(outputs, y, weight, context)
        task = torch.cat([plain[None], context.means])
        states = _states(task, _finite(outputs), target(y, outputs, self.way), weight)
        read = _standardised(task[None], weight.new_ones(1))[0]
        loss: Tensor = plain + self.labelled[step](states, read, weight)
        if self.transductive:
            if context.unlabelled is None or context.unlabelled_weight is None:
                raise BadInput("transductive MeTAL needs the outputs and weights of the query inputs in the context")
            counted = context.unlabelled_weight.to(outputs.dtype)
            p = context.unlabelled.softmax(-1)
            entropy = -torch.special.xlogy(p, p.clamp_min(torch.finfo(p.dtype).tiny)).sum(-1, keepdim=True)
            states = _states(context.means, _finite(context.unlabelled), entropy, counted)
            mean = counted @ states / counted.sum().clamp_min(torch.finfo(counted.dtype).tiny)
            loss = loss + self.unlabelled[step](states, mean, counted)
        return loss


class _Adapting(nn.Module):
    """A network over the states of examples; its tensors are scaled and shifted by what another makes of a task."""

    def __init__(self, state: int, task: int, hidden: int):
        super().__init__()
        self.loss = network(state, hidden)
        tensors = len(list(self.loss.parameters()))
        self.adapter = nn.Sequential(nn.Linear(task, hidden), nn.SiLU(), nn.Linear(hidden, 2 * tensors))
        for parameter in self.adapter[2].parameters():
            nn.init.zeros_(parameter)

    def forward(self, states: Tensor, task: Tensor, weight: Tensor) -> Tensor:
        scales, shifts = self.adapter(task).chunk(2)
        named = zip(self.loss.named_parameters(), scales.unbind(), shifts.unbind(), strict=True)
        adapted = {name: (1 + scale) * value + shift for (name, value), scale, shift in named}
        values: Tensor = functional_call(self.loss, adapted, (states,))
        return weighted_mean(values[:, 0], weight)


def _states(task: Tensor, outputs: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    return _standardised(torch.cat([task.expand(len(outputs), -1), outputs, label], -1), weight)


def _finite(outputs: Tensor) -> Tensor:
    return torch.where(outputs.isneginf(), 0.0, outputs)


def _standardised(rows: Tensor, weight: Tensor) -> Tensor:
    """Of mean 0 and variance 1 over all entries of the rows that count."""
    mean = weighted_mean(rows.mean(-1), weight)
    variance = weighted_mean((rows - mean).square().mean(-1), weight)
    # with a dimension: of a scalar plus a number, forward over reverse mode makes a double (PyTorch 2.13)
    return (rows - mean) * torch.rsqrt(variance[None] + 1e-6)
