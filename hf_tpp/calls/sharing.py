"""What only the last stage knows, for every rank of the replica.

    last stage, tp rank r    [b, s, V/t] --join--> [b, s, V] --broadcast over pp--> every rank [b, s, V]
    and its gradient         [b, s, V/t] <--own columns-- [b, s, V]    (nothing is sent: every rank has it)

The caller computes the same loss on every rank, so each knows the whole gradient; the columns of tp rank r get it once.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from hf_tpp.calls.context import CallContext
from hf_tpp.mesh import ParallelMesh
from hf_tpp.sharding import ShardSpec, shard_tensor
from hf_tpp.tensor_parallel.linear import join_channels

__all__ = ["from_last_stage", "own_columns", "share_logits", "share_loss"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool)
_MOST_DIMS = 5


def share_loss(loss: torch.Tensor, mesh: ParallelMesh, over_replicas: bool) -> torch.Tensor:
    """The last stage's loss on every rank; the mean over replicas if they count tokens together."""
    if mesh.pp.size > 1:
        dist.all_reduce(loss, group=mesh.pp.group)
    if over_replicas and mesh.dp.size > 1:
        dist.all_reduce(loss, group=mesh.dp.group)
        loss = loss / mesh.dp.size
    return loss


def share_logits(context: CallContext, pieces: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
    """Local columns on the last stage -> full logits on every rank of the replica.

    Args:
        context: The model's.
        pieces: Logits of each microbatch, [rows, seq, local columns]; nothing except on the last stage.
        sizes: How many consecutive microbatches go into one tensor of the result.

    Collective: every rank of the replica.

    Returns:
        For each of `sizes` [rows, seq, vocabulary], without a graph.
    """
    shared, start = [], 0
    for size in sizes:
        local = torch.cat(list(pieces[start : start + size])) if pieces else None
        if local is not None and context.vocabulary is not None:
            local = join_channels(local.detach(), context.vocabulary, context.mesh.tp.group)
        logits = from_last_stage(local, context.mesh)
        assert logits is not None
        shared.append(logits)
        start += size
    return shared


def own_columns(context: CallContext, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient of full logits -> that of the logits of this rank of the last stage: the inverse of `share_logits`.

    Args:
        context: The model's.
        gradient: [rows, seq, vocabulary].

    Collective: the tp ranks of the last stage.

    Returns:
        [rows, seq, local columns]; padding columns get zeros.
    """
    tp = context.mesh.tp
    if context.vocabulary is not None:
        spec = ShardSpec("logits", tuple(gradient.shape), gradient.dim() - 1, context.vocabulary, tp.rank, tp.size)
        return shard_tensor(gradient, spec, gradient.device, gradient.dtype)
    if tp.size > 1:
        # All of it goes through replicated weights: bits that differ between ranks would make those drift apart.
        gradient = gradient.contiguous()
        dist.broadcast(gradient, tp.global_ranks[0], group=tp.group)
    return gradient


def from_last_stage(tensor: torch.Tensor | None, mesh: ParallelMesh) -> torch.Tensor | None:
    """The last stage's tensor, or None, on every rank.

    Args:
        tensor: On the last stage; not looked at elsewhere.
        mesh: The process groups.

    Collective: every stage of the pipeline.
    """
    if mesh.pp.size == 1:
        return tensor
    source = mesh.pp.global_ranks[-1]
    header = torch.zeros(2 + _MOST_DIMS, dtype=torch.int64, device=mesh.device)
    if tensor is not None and mesh.pp.is_last:
        facts = [1 + tensor.dim(), _DTYPES.index(tensor.dtype), *tensor.shape]
        header[: len(facts)] = torch.tensor(facts)
    dist.broadcast(header, source, group=mesh.pp.group)
    num_dims, dtype, *shape = header.tolist()
    if num_dims == 0:
        return None
    if tensor is None or not mesh.pp.is_last:
        tensor = torch.empty(shape[: num_dims - 1], dtype=_DTYPES[dtype], device=mesh.device)
    message = tensor.contiguous()
    dist.broadcast(message, source, group=mesh.pp.group)
    return message
