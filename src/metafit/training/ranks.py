"""What the processes of a training share, and how one that does not fit is spread over them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from metafit.errors import BadInput
from metafit.learners import GradientLearner, Learner
from metafit.over_tasks.part import sharded

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import Strategy
    from torch.distributed.device_mesh import DeviceMesh


def fully_sharded(*blocks: type[nn.Module]) -> Strategy:
    """The strategy of a ``Fabric`` whose processes each keep a share of the learner's body: its parameters, their
    gradients and the optimizer's state (FSDP2; Zhao et al., 2023, arXiv:2304.11277). The rest of the learner is whole
    everywhere.

    A block's parameters come together, from all processes, while it computes. So memory holds one block whole at a
    time: name the classes of modules that the body repeats, such as a transformer's layers.

    Args:
        blocks: of the body; where none is named, or found, the body comes together at once.
    """
    from lightning_fabric.strategies import ModelParallelStrategy

    def shard(learner: Any, mesh: DeviceMesh) -> Any:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        body, everyone = body_of(learner), init_device_mesh(mesh.device_type, (mesh.size(),))
        within = [part for part in body.modules() if isinstance(part, blocks) and part is not body]
        for part in (*within, body):
            fully_shard(part, mesh=everyone)
        return learner

    return ModelParallelStrategy(shard)


def body_of(learner: Learner) -> nn.Module:
    """The network within a learner."""
    body = getattr(learner.model if isinstance(learner, GradientLearner) else learner, "body", None)
    if not isinstance(body, nn.Module):
        raise BadInput(f"learner {type(learner).__name__} has no body to shard; choose another strategy for the Fabric")
    return body


def set_up(learner: Learner, fabric: Fabric) -> None:
    """Puts the learner on the device, from the first rank's parameters, or its share where the Fabric shards.

    Raises:
        BadInput: a strategy that this learner cannot be trained by.
    """
    from lightning_fabric.strategies import FSDPStrategy, ModelParallelStrategy

    if isinstance(fabric.strategy, FSDPStrategy):
        raise BadInput(
            "strategy FSDPStrategy: it flattens the parameters that a learner is made of; take "
            "metafit.training.fully_sharded()"
        )
    shards = isinstance(fabric.strategy, ModelParallelStrategy)
    if shards and isinstance(learner, GradientLearner) and learner.body_adapts:
        raise BadInput(
            f"learner {type(learner).__name__}: it adapts the body for each task, by functions of its whole "
            "parameters, which sharding has nowhere whole; adapt the head alone (anil), take a metric-based learner, "
            "or a strategy that does not shard (ddp)"
        )
    if not shards:
        learner.to(fabric.device)
    if fabric.world_size > 1:  # ranks must start from the same parameters, whatever they were seeded with
        for value in learner.state_dict().values():
            first = value.to(fabric.device)
            torch.distributed.broadcast(first, src=0)
            value.copy_(first)
    if shards:
        fabric.strategy.setup_module(learner)
        for tensor in (*learner.parameters(), *learner.buffers()):
            if not sharded(tensor):
                tensor.data = tensor.data.to(fabric.device)


def whole(tensors: Mapping[str, Tensor], fabric: Fabric) -> dict[str, Tensor]:
    """The tensors, of which ranks may hold shares, on the first rank's host; for all ranks to call."""
    found = {}
    for name, value in tensors.items():
        full = value.full_tensor() if sharded(value) else value  # type: ignore[attr-defined]
        if fabric.is_global_zero:
            found[name] = full.detach().cpu()
    return found


def everywhere(tensors: Mapping[str, Tensor], fabric: Fabric) -> Iterator[tuple[str, Tensor]]:
    """The first rank's tensors, one after another, on the host of each."""
    for name in fabric.broadcast(list(tensors)):
        yield name, fabric.broadcast(tensors.get(name))  # type: ignore[misc]


def of_each_rank(value: Tensor, fabric: Fabric) -> Tensor:
    """A tensor of each rank, on the host: a row for each."""
    rows = [value]
    if fabric.world_size > 1:
        rows = [torch.empty_like(value, device=fabric.device) for _ in range(fabric.world_size)]
        torch.distributed.all_gather(rows, value.to(fabric.device))
    return torch.stack(rows).cpu()


def own_share(value: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor, what this rank holds of one like that."""
    if not sharded(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]
