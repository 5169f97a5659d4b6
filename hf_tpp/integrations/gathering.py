"""What accelerate gathers from and reduces over processes: here one of each replica, whose ranks all have the same."""

from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import GradientState
from accelerate.utils import recursively_apply

from hf_tpp.mesh import ParallelMesh

__all__ = ["gather", "gather_for_metrics", "reduce", "share_trigger"]


def gather_for_metrics(state: GradientState, data: Any, mesh: ParallelMesh, as_objects: bool = False) -> Any:
    """What accelerate's `gather_for_metrics` promises: every sample once, in order.

    Args:
        state: Knows whether this is the last batch, and how many of its samples are new.
        data: Tensors of equal shapes on all replicas, in nested lists and dicts; or any objects, in a list.
        mesh: Says which ranks are one replica.
        as_objects: Treat even tensors as objects.

    Collective: every rank.

    Returns:
        Tensors `[replicas * rows, ...]`, or a list.
    """
    as_objects = as_objects or not _is_all_tensors(data)
    gathered = _gather_objects(data, mesh) if as_objects else recursively_apply(_GatherTensor(mesh), data)
    if not (state.end_of_dataloader and state.remainder > 0):
        return gathered
    count = state.remainder
    return gathered[:count] if as_objects else recursively_apply(lambda tensor: tensor[:count], gathered)


def gather(data: Any, mesh: ParallelMesh) -> Any:
    """What accelerate's `gather` promises, with replicas for processes.

    Args:
        data: Tensors of equal shapes on all replicas, in nested lists and dicts.
        mesh: Says which ranks are one replica.

    Collective: every rank.

    Returns:
        Tensors `[replicas * rows, ...]`.
    """
    return recursively_apply(_GatherTensor(mesh), data, error_on_other_type=True)


def reduce(data: Any, reduction: str, mesh: ParallelMesh) -> Any:
    """What accelerate's `reduce` promises, with replicas for processes.

    Args:
        data: Tensors of equal shapes on all replicas, in nested lists and dicts.
        reduction: "mean" and "max" are what they say, all else is the sum.
        mesh: Says which ranks are one replica.

    Collective: every rank.
    """
    operation = dist.ReduceOp.MAX if reduction == "max" else dist.ReduceOp.SUM

    def reduced(tensor: torch.Tensor) -> torch.Tensor:
        result = tensor.clone()
        if mesh.dp.size > 1:
            dist.all_reduce(result, operation, group=mesh.dp.group)
        if reduction == "mean":
            result /= mesh.dp.size
        return result

    return recursively_apply(reduced, data, error_on_other_type=True)


def share_trigger(trigger: torch.Tensor, mesh: ParallelMesh) -> torch.Tensor:
    """What any rank of the replica triggered, all of them do. Collective: every rank of the replica."""
    shared = trigger.clone()
    if mesh.replica.size > 1:
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=mesh.replica.group)
    return shared


class _GatherTensor:
    def __init__(self, mesh: ParallelMesh) -> None:
        self._mesh = mesh

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 0:
            tensor = tensor[None]
        if self._mesh.dp.size == 1:
            return tensor
        local = tensor.contiguous()
        if local.device.type != self._mesh.device.type:
            local = local.to(self._mesh.device)
        parts = [torch.empty_like(local) for _ in range(self._mesh.dp.size)]
        dist.all_gather(parts, local, group=self._mesh.dp.group)
        return torch.cat(parts)


def _gather_objects(data: Any, mesh: ParallelMesh) -> list[Any]:
    everyone: list[Any] = [data]
    if mesh.dp.size > 1:
        of_ranks: list[Any] = [None] * mesh.world_size
        dist.all_gather_object(of_ranks, data, group=mesh.control)
        everyone = of_ranks[:: mesh.replica.size]
    return [item for part in everyone for item in part]


def _is_all_tensors(data: Any) -> bool:
    try:
        recursively_apply(lambda tensor: tensor, data, error_on_other_type=True)
    except TypeError:
        return False
    return True
