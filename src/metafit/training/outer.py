"""The outer step: from batches of tasks to new meta-parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from metafit.errors import Diverged
from metafit.learners import Learner
from metafit.losses import UncertaintyWeights
from metafit.over_tasks import Plan, meta_gradient
from metafit.over_tasks.part import sharded
from metafit.task import Task

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Outcome(NamedTuple):
    """What an outer step saw, the same on all ranks.

    Attributes:
        losses, families: the mean loss of each batch, and the number of its family.
        norm: of the gradient before clipping.
        clipped: whether it was too long.
        skipped: whether half precision could not hold it, so that no step was taken.
        late: whether a rank says that time is up.
    """

    losses: list[float]
    families: list[int]
    norm: float
    clipped: bool
    skipped: bool
    late: bool


PACE = 10.0  # times the rate, for log-variances: they go to the logarithms of losses, by about the rate a step


class OuterStep:
    """AdamW on the meta-gradient: averaged over batches and ranks, with one all-reduce, and clipped.

    Where the Fabric's precision brings a loss scaler (fp16), the gradient is scaled on its way back; a step whose
    gradient overflows is skipped, at half the scale from then on (Micikevicius et al., 2018, arXiv:1710.03740).

    Args:
        learner: on its device.
        fabric: of the ranks and the precision.
        weight_decay: of the learner's parameters.
        clip: largest norm of the gradient; ``None`` for none.
        balance: learned weights of task families.
    """

    def __init__(
        self,
        learner: Learner,
        fabric: Fabric,
        weight_decay: float = 0.0,
        clip: float | None = None,
        balance: UncertaintyWeights | None = None,
    ):
        self.learner, self.fabric, self.balance = learner, fabric, balance
        self.clip = math.inf if clip is None else clip
        trained = {name: p for name, p in learner.named_parameters() if p.requires_grad}
        self.whole = {name: p for name, p in trained.items() if not sharded(p)}
        self.sharded = {name: p for name, p in trained.items() if sharded(p)}
        groups = [
            {"params": list(kind.values()), "weight_decay": weight_decay} for kind in (self.whole, self.sharded) if kind
        ]
        groups += [] if balance is None else [{"params": [balance.log_variance], "weight_decay": 0.0, "pace": PACE}]
        self.optimizer = torch.optim.AdamW(groups)
        self.scaler: torch.amp.GradScaler | None = getattr(fabric.strategy.precision, "scaler", None)

    def __call__(self, batches: Iterable[tuple[Task, int]], plan: Plan, rate: float, late: bool) -> Outcome:
        """Takes one step.

        Args:
            batches: this rank's tasks, with the number of their family.
            plan: how a batch is run.
            rate: of AdamW.
            late: whether time is up: the word of any rank is that of all.

        Raises:
            BadInput: the loss or its gradient is not finite.
        """
        losses, families, gradients = self._gradients(batches, plan)
        flat, losses, over = self._mean_over_ranks(gradients, losses, losses.new_tensor([late]))
        if self.balance is not None:
            self.balance.log_variance.grad = None  # the old one is not to be unscaled
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)  # in place, and so in `flat` too
        norm = self._norm(flat)
        skipped = self._overflows(losses, norm)
        clipped = self.clip < norm < math.inf
        if clipped:
            for gradient in (flat, *(gradients[name] for name in self.sharded)):
                gradient *= self.clip / norm
        if self.balance is not None:
            balanced = self.balance(losses, torch.tensor(families, device=losses.device)).mean()
            (self.balance.log_variance.grad,) = torch.autograd.grad(balanced, self.balance.log_variance)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("pace", 1.0)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self.balance is not None:
            self.balance.bound()
        return Outcome(losses.tolist(), families, norm, clipped, skipped, bool(over > 0))

    def _gradients(
        self, batches: Iterable[tuple[Task, int]], plan: Plan
    ) -> tuple[Tensor, list[int], dict[str, Tensor]]:
        """The loss and the family of each batch, and the mean gradient, scaled where there is a scaler."""
        device = self.fabric.device
        scale = None if self.scaler is None else self.scaler.scale(torch.ones((), device=device))
        losses, families = [], []
        total: dict[str, Tensor] = {}
        for tasks, family in batches:
            with self.fabric.autocast():
                loss, _, gradients = meta_gradient(self.learner, tasks, plan, scale=scale)
            if self.balance is not None:  # the batch is of one family, whose weight all its tasks share
                leaf = loss.detach().requires_grad_()
                balanced = self.balance(leaf[None], torch.tensor([family], device=device)).sum()
                (weight,) = torch.autograd.grad(balanced, leaf)
                gradients = {name: weight * gradient for name, gradient in gradients.items()}
            total = {name: total[name] + g for name, g in gradients.items()} if total else gradients
            losses.append(loss)
            families.append(family)
        if len(losses) > 1:
            total = {name: gradient / len(losses) for name, gradient in total.items()}
        return torch.stack(losses), families, total

    def _mean_over_ranks(
        self, gradients: dict[str, Tensor], losses: Tensor, late: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gives each parameter its gradient: those of whole ones are views of the first result."""
        flat = torch.cat([*(gradients[name].flatten() for name in self.whole), losses, late])
        if self.fabric.world_size > 1:
            flat = self.fabric.all_reduce(flat, reduce_op="mean")  # type: ignore[assignment]
        sizes = [p.numel() for p in self.whole.values()]
        *parts, losses, late = flat.split([*sizes, len(losses), 1])
        for p, part in zip(self.whole.values(), parts, strict=True):
            p.grad = part.view_as(p)
        for name, p in self.sharded.items():
            p.grad = gradients[name]
        return flat[: sum(sizes)], losses, late

    def _norm(self, flat: Tensor) -> float:
        norm = flat.norm()
        if self.sharded:
            shares = get_total_norm([p.grad for p in self.sharded.values() if p.grad is not None])
            norm = torch.hypot(norm, shares.full_tensor())  # type: ignore[attr-defined]
        return float(norm)

    def _overflows(self, losses: Tensor, norm: float) -> bool:
        """Whether the gradient is too large at the present scale, and only for that."""
        if torch.isfinite(losses).all():
            if math.isfinite(norm):
                return False
            if self.scaler is not None and self.scaler.get_scale() > 1:
                return True
        raise Diverged(
            "meta-training diverged: the loss or its gradient is not finite; lower the rate or the inner rate"
            + ("" if self.scaler is None else ", or take bf16, whose range is that of fp32")
        )
