"""Shards of one parameter at a time, brought together on the first tensor-parallel rank of a stage."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from hf_tpp.mesh import ParallelMesh
from hf_tpp.sharding import ShardSpec, local_shape, unshard

__all__ = ["HeldTensor", "gather_shards"]


@dataclass(frozen=True, slots=True)
class HeldTensor:
    """A tensor that this rank holds, or holds a shard of.

    Attributes:
        local: The tensor.
        spec: How it lies in the unsplit model; None for a buffer.
    """

    local: torch.Tensor
    spec: ShardSpec | None

    @property
    def num_bytes(self) -> int:
        """Size of the whole tensor."""
        shape = self.spec.full_shape if self.spec else self.local.shape
        return math.prod(shape) * self.local.element_size()

    def join(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole tensor on the CPU, in storage that no other one shares."""
        shards = [shard.cpu() for shard in shards]
        full = unshard(shards, self.spec) if self.spec else shards[0]
        owns_storage = full.untyped_storage().nbytes() == full.numel() * full.element_size()
        return full.contiguous() if owns_storage else full.clone(memory_format=torch.contiguous_format)


def gather_shards(tensor: HeldTensor, mesh: ParallelMesh) -> list[torch.Tensor] | None:
    """Every tp rank's shard on the first of them, None on the others. Shards travel as bytes, padded to one size."""
    local, spec = tensor.local, tensor.spec
    if spec is None or spec.dim is None or mesh.tp.group is None:
        return [local] if mesh.tp.is_first else None
    shapes = [local_shape(spec.at_rank(tp_rank)) for tp_rank in range(mesh.tp.size)]
    sizes = [math.prod(shape) * local.element_size() for shape in shapes]
    sent = local.new_zeros(max(sizes), dtype=torch.uint8)
    sent[: sizes[mesh.tp.rank]] = local.contiguous().view(-1).view(torch.uint8)
    received = [torch.empty_like(sent) for _ in sizes] if mesh.tp.is_first else None
    dist.gather(sent, received, dst=mesh.tp.global_ranks[0], group=mesh.tp.group)
    if received is None:
        return None
    return [
        flat[:size].view(local.dtype).view(shape) for flat, size, shape in zip(received, sizes, shapes, strict=True)
    ]
