"""Sums of gradients over ranks that hold the same parameter.

who holds it                                     summed over                  when
tp ranks that share a replicated KV head         those neighbours             before the release
all tp ranks, each with its own tokens or heads  the tp axis                  before the release
stages that share it (tied embedding)            those stages                 before the release
replicas                                         the dp axis, mean            after backward, unless in no_sync()
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from hf_tpp.collectives.agreement import true_somewhere
from hf_tpp.mesh import ParallelMesh
from hf_tpp.sharding import ShardSpec

__all__ = ["average_over_replicas", "sum_shared_gradients"]

_BUCKET_BYTES = 64 * 2**20


def sum_shared_gradients(
    gradients: Sequence[torch.Tensor | None],
    parameters: Sequence[torch.Tensor],
    specs: Sequence[ShardSpec],
    mesh: ParallelMesh,
) -> list[torch.Tensor | None]:
    """Complete the gradients of parameters that several ranks of a replica hold.

    Args:
        gradients: One per local parameter, or None where this rank's part of the model did not use it.
        parameters: The local parameters.
        specs: How each parameter lies.
        mesh: The process groups.

    Collective: every rank of the replica, with the same plan.

    Returns:
        The gradients; those that were summed are new tensors.
    """
    result = list(gradients)
    if mesh.tp.size > 1:
        _sum_partial(result, specs, mesh)
        _sum_replicated_heads(result, specs, mesh)
    shared = [index for index, spec in enumerate(specs) if len(spec.stages) > 1]
    # A tied weight comes under its first name on one stage and under its last on another: order by what all know.
    for index in sorted(shared, key=lambda index: specs[index].name):
        gradient = result[index]
        if gradient is None:  # this stage did not use it: inputs_embeds stood in for the embedding
            total = torch.zeros_like(parameters[index], memory_format=torch.contiguous_format)
        else:
            total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=mesh.stage_group(specs[index].stages))
        result[index] = total
    return result


def _sum_partial(gradients: list[torch.Tensor | None], specs: Sequence[ShardSpec], mesh: ParallelMesh) -> None:
    chosen = [i for i, spec in enumerate(specs) if spec.is_partial and gradients[i] is not None]
    for index in chosen:
        gradients[index] = gradients[index].clone(memory_format=torch.contiguous_format)  # type: ignore[union-attr]
    _all_reduce_buckets([gradients[i] for i in chosen], mesh.tp.group, 1.0)


def _sum_replicated_heads(gradients: list[torch.Tensor | None], specs: Sequence[ShardSpec], mesh: ParallelMesh) -> None:
    for index, spec in enumerate(specs):
        gradient = gradients[index]
        if spec.dim is None or gradient is None:
            continue
        shared = [segment for segment in spec.segments if segment.num_copies > 1]
        if shared:
            gradients[index] = gradient = gradient.clone(memory_format=torch.contiguous_format)
        for segment in shared:
            view = spec.narrow(gradient, segment)
            total = view.contiguous()
            dist.all_reduce(total, group=mesh.neighbours(segment.num_copies))
            view.copy_(total)


def average_over_replicas(parameters: Iterable[torch.nn.Parameter], mesh: ParallelMesh) -> None:
    """Replace every `p.grad` by its mean over the dp axis.

    A parameter that no replica used keeps none, as in one process; where some used it, it is zero on the others (an
    expert that none of their tokens chose, a block that they skipped).

    Collective: every rank of the dp axis, with the same parameters.
    """
    if mesh.dp.size == 1:
        return
    parameters = list(parameters)
    is_used = true_somewhere([parameter.grad is not None for parameter in parameters], mesh.dp_control)
    used = [parameter for parameter, flag in zip(parameters, is_used, strict=True) if flag]
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    _all_reduce_buckets([parameter.grad for parameter in used], mesh.dp.group, 1.0 / mesh.dp.size)


@torch.no_grad()
def _all_reduce_buckets(tensors: Sequence[torch.Tensor | None], group: dist.ProcessGroup | None, scale: float) -> None:
    """Sum tensors over a group in few messages, times `scale`, in place."""
    buckets: dict[torch.dtype, list[list[torch.Tensor]]] = defaultdict(lambda: [[]])
    for tensor in tensors:
        assert tensor is not None
        bucket = buckets[tensor.dtype][-1]
        bucket.append(tensor)
        if sum(member.numel() * member.element_size() for member in bucket) >= _BUCKET_BYTES:
            buckets[tensor.dtype].append([])
    for bucket in (bucket for lists in buckets.values() for bucket in lists if bucket):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.all_reduce(flat, group=group)
        if scale != 1.0:
            flat *= scale
        for tensor, piece in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(piece.view_as(tensor))
