"""parallel-metalearn 0.5: its ``MAML`` over tasks by vmap, or one after another."""

from __future__ import annotations

import copy
import itertools
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metafit.bench.problem import Gradient, Problem, Step
from metafit.task import count


def step(problem: Problem, backend: Literal["vmap", "sequential"], own_norm: bool = False) -> Step:
    """One outer step, of rate 0, so that the parameters stay.

    Args:
        backend: the library's.
        own_norm: with its own batch normalisation in place of PyTorch's. (Its ``ModelTranslator``, made for that,
            raises a TypeError in 0.5.6, so the layers are exchanged here.)
    """
    from metalearn.algorithms import MAML
    from metalearn.inner_optimizers import InnerSGD
    from metalearn.loss import CategoricalAccuracy, CrossEntropy
    from metalearn.model_wrappers import MAML_Model

    network = copy.deepcopy(problem.network)
    if own_norm:
        _exchange_norms(network)
    model = MAML_Model(backbone=_Plain(network.get_submodule("body")), head=_Plain(network.get_submodule("head")))
    algorithm = MAML(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        inner_optimizer=InnerSGD(model.get_fast_weights(), inner_lr=problem.rate, learn_lr=False),
        support_loss_fn=_squared_error() if problem.way is None else CrossEntropy(metric_fn=CategoricalAccuracy()),
        inner_steps=problem.steps,
        chunk_size=problem.chunk,
        backend=backend,
        device=problem.tasks.support.y.device,
    )
    support, query = problem.tasks
    batches = itertools.repeat((support.x, {"labels": support.y}, query.x, {"labels": query.y}))
    # the sequential backend reports the loss over the number of tasks twice; its gradient is right
    scale = count(problem.tasks) if backend == "sequential" else 1

    def call() -> Gradient:
        loss, _ = algorithm.step(batches)
        gradients = {_name(name): p.grad for name, p in model.named_parameters() if p.grad is not None}
        return torch.tensor(loss * scale), gradients

    return call


class _Plain(nn.Module):
    """The library calls every module with keywords of its own."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return self.module(x)


def _name(theirs: str) -> str:
    return theirs.replace("backbone.module.", "body.", 1).replace("head.module.", "head.", 1)


def _squared_error() -> nn.Module:
    from metalearn.loss import BaseLoss

    class SquaredError(BaseLoss):
        def forward(self, out_dict: Any, targets: Any, model_states: Any = None, **_: Any) -> tuple[Tensor, Tensor]:
            loss = nn.functional.mse_loss(out_dict["logits"], targets["labels"])
            return loss, loss.detach()

    return SquaredError()


def _exchange_norms(network: nn.Module) -> None:
    from metalearn.nn_models.basic_layers.BatchNormalization import BatchNorm

    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                norm = BatchNorm(child.num_features, eps=child.eps, track_running_stats=False, affine=True)
                norm.load_state_dict(child.state_dict())
                setattr(parent, name, norm.to(child.weight))
