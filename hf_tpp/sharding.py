"""Cutting tensors into shards and putting them together again. Arithmetic only: nothing here communicates.

One truth for rewriting a model, loading and saving checkpoints, and counting gradient norms: a `ShardSpec` says which
part of which Hugging Face parameter a rank holds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.distributed.tensor import DTensor

from hf_tpp.plan.layout import Layout, Segment

__all__ = ["ShardSpec", "local_part", "local_shape", "on_this_replica", "rows_of", "shard", "shard_tensor", "unshard"]


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """How one local parameter lies in the parameter of the unsplit model.

    Attributes:
        name: Name in the Hugging Face state dict.
        full_shape: Shape in the unsplit model.
        dim: The dimension that is cut, or None if the rank holds the whole parameter.
        layout: How `dim` is cut; None with `dim`.
        tp_rank: This rank's position on the tp axis.
        tp_size: Size of the tp axis.
        stages: Which stages hold this parameter (first and last for a tied embedding).
        is_partial: True if this rank computes only a part of the gradient, and tp ranks must be summed: the part of its
            tokens (sequence parallelism), or of its heads or neurons (a parameter inside a region).
        rows: Of this rank's shard, the rows [first, last + 1) that lie on this replica; None if all do.
    """

    name: str
    full_shape: tuple[int, ...]
    dim: int | None
    layout: Layout | None
    tp_rank: int
    tp_size: int
    stages: tuple[int, ...] = (0,)
    is_partial: bool = False
    rows: tuple[int, int] | None = None

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Pieces of the full parameter along `dim` that lie here; the whole of dim 0 if nothing is cut."""
        if self.layout is None:
            size = self.full_shape[0] if self.full_shape else 1
            return (Segment(0, size, 0, self.tp_size),)
        return self.layout.segments(self.tp_rank, self.tp_size)

    def copies(self, segment: Segment) -> int:
        """Number of ranks of one replica that hold the values of `segment`."""
        return segment.num_copies * len(self.stages)

    def narrow(self, local: torch.Tensor, segment: Segment) -> torch.Tensor:
        """The view of `local` (shape: this rank's shard, or its `rows`) that holds `segment`, or what is here of it."""
        if self.dim is None:
            return local
        if self.dim == 0 and self.rows is not None:
            start, stop = self.within_rows(segment)
            return local.narrow(0, start - self.rows[0], stop - start)
        return local.narrow(self.dim, segment.local_start, segment.size)

    def within_rows(self, segment: Segment) -> tuple[int, int]:
        """Where `segment` begins and ends in the shard, as far as it lies on this replica; for `dim` 0."""
        first, last = self.rows or (0, segment.local_start + segment.size)
        start = min(max(segment.local_start, first), last)
        return start, max(start, min(segment.local_start + segment.size, last))

    def at_rank(self, tp_rank: int) -> "ShardSpec":
        """The same parameter's spec on another tp rank."""
        return replace(self, tp_rank=tp_rank)


def local_shape(spec: ShardSpec) -> tuple[int, ...]:
    """Shape of this rank's shard, padding included; of its `rows`, if it has only those."""
    shape = list(spec.full_shape)
    if spec.dim is not None and spec.layout is not None:
        shape[spec.dim] = spec.layout.local_size(spec.tp_rank, spec.tp_size)
    if spec.rows is not None:
        shape[0] = spec.rows[1] - spec.rows[0]
    return tuple(shape)


def rows_of(num_rows: int, rank: int, size: int) -> tuple[int, int]:
    """First and last + 1 of the rows on `rank` of `size`: what torch calls Shard(0), ceil(num_rows / size) each."""
    per_rank = -(-num_rows // size)
    return min(rank * per_rank, num_rows), min((rank + 1) * per_rank, num_rows)


def on_this_replica(spec: ShardSpec, parameter: torch.Tensor) -> ShardSpec:
    """The spec of what this rank holds of `parameter`, which replicas may share (a DTensor over the dp axis)."""
    if not isinstance(parameter, DTensor):
        return spec
    replicas = parameter.device_mesh
    return replace(spec, rows=rows_of(parameter.shape[0], replicas.get_local_rank(), replicas.size()))


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of this rank behind a tensor that replicas may share."""
    if not isinstance(tensor, DTensor):
        return tensor
    part: torch.Tensor = tensor.to_local()
    return part


def shard(
    read: Callable[[int, int], torch.Tensor], spec: ShardSpec, *, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Build this rank's shard from slices of the full parameter.

    Args:
        read: `read(start, stop)` gives the full parameter's slice [start, stop) along `spec.dim` (whole if None). A
            tensor's `narrow` or a safetensors slice: only what lies here is ever asked for.
        spec: What to cut.
        device: Where the shard goes.
        dtype: Its type.

    Returns:
        A tensor of its own storage, shape `local_shape(spec)`, padding filled with zeros.
    """
    local = torch.zeros(local_shape(spec), device=device, dtype=dtype)
    for segment in spec.segments:
        spec.narrow(local, segment).copy_(read(segment.start, segment.stop))
    return local


def shard_tensor(full: torch.Tensor, spec: ShardSpec, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """This rank's shard of a full parameter that is in memory, in storage of its own."""

    def read(start: int, stop: int) -> torch.Tensor:
        return full if spec.dim is None else full.narrow(spec.dim, start, stop - start)

    return shard(read, spec, device=device, dtype=dtype)


def unshard(shards: Sequence[torch.Tensor], spec: ShardSpec) -> torch.Tensor:
    """Put the shards of all tp ranks together: the inverse of `shard`; padding and extra copies fall away.

    Args:
        shards: One tensor per tp rank, in order; a single one suffices if nothing is cut.
        spec: The parameter's spec on any rank.

    Returns:
        The full parameter, shape `spec.full_shape`.
    """
    if spec.dim is None:
        return shards[0]
    full = shards[0].new_empty(spec.full_shape)
    for tp_rank, local in enumerate(shards):
        there = spec.at_rank(tp_rank)
        for segment in there.segments:
            full.narrow(spec.dim, segment.start, segment.size).copy_(there.narrow(local, segment))
    return full
