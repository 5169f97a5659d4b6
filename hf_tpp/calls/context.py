"""What every call of one parallel model needs to know."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hf_tpp.dropout import DropoutStreams
from hf_tpp.mesh import ParallelMesh
from hf_tpp.pipeline_parallel.microbatch import batch_rows, default_num_microbatches, sequence_length, split_batch
from hf_tpp.pipeline_parallel.runner import PipelineRunner
from hf_tpp.plan.layout import Layout
from hf_tpp.sharding import ShardSpec
from hf_tpp.tensor_parallel.region import RegionState

__all__ = ["Batch", "CallContext", "share_loss", "to_device"]

Batch = Mapping[str, Any]


@dataclass(slots=True)
class CallContext:
    """What every call of one parallel model needs.

    Attributes:
        model: The model.
        mesh: The process groups.
        runner: Runs schedules on this rank's stage.
        regions: Shared by the tensor-parallel regions.
        streams: The dropout streams.
        specs: This rank's parameters, and how they lie.
        vocabulary: Layout of the vocabulary.
        hidden_size: Channels of the hidden states between stages.
        num_microbatches: The user's choice, None for the default.
        sequence_parallel: Train with sequence parallelism.
        eval_logits: Give logits to every rank when not training.
        residual: The parameter that carries the norm of other ranks.
        after_backward: Runs once every backward pass has filled `p.grad`.
        sync_gradients: Average over the replicas after backward.
        agreement: Compare the batch between ranks before it runs.
    """

    model: nn.Module
    mesh: ParallelMesh
    runner: PipelineRunner
    regions: RegionState
    streams: DropoutStreams
    specs: Mapping[nn.Parameter, ShardSpec]
    vocabulary: Layout
    hidden_size: int
    sequence_parallel: bool
    num_microbatches: int | None = None
    eval_logits: bool = True
    residual: nn.Parameter | None = None
    after_backward: Callable[[], None] = field(default=lambda: None)
    sync_gradients: bool = True
    agreement: bool = True

    @contextmanager
    def without_agreement(self) -> Iterator[None]:
        """Calls whose batches are known to be the same: the steps of a generation."""
        self.agreement = False
        try:
            yield
        finally:
            self.agreement = True

    def choose_trained(self) -> list[ShardSpec]:
        """Have the next pass compute what needs a gradient now, and return the specs of those parameters."""
        trained = {parameter: spec for parameter, spec in self.specs.items() if parameter.requires_grad}
        self.runner.stage.parameters = list(trained)
        return list(trained.values())

    def messages(self, microbatches: Sequence[Batch], shards: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of the hidden states between stages, per microbatch."""
        dtype = next(self.model.parameters()).dtype
        return [((batch_rows(part), sequence_length(part) // shards, self.hidden_size), dtype) for part in microbatches]

    def split(self, batch: Batch) -> list[dict[str, Any]]:
        """The microbatches of a batch."""
        wanted = self.num_microbatches or default_num_microbatches(batch_rows(batch), self.mesh.pp.size)
        return split_batch(batch, wanted)


def to_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """All tensors of a batch on `device`."""

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device, non_blocking=True)
        if isinstance(value, list | tuple) and all(isinstance(part, torch.Tensor) for part in value):
            return [part.to(device, non_blocking=True) for part in value]
        return value

    return {name: move(value) for name, value in batch.items()}


def share_loss(loss: torch.Tensor, mesh: ParallelMesh, over_replicas: bool) -> torch.Tensor:
    """The last stage's loss on every rank; the mean over replicas if they count tokens together."""
    if mesh.pp.size > 1:
        dist.all_reduce(loss, group=mesh.pp.group)
    if over_replicas and mesh.dp.size > 1:
        dist.all_reduce(loss, group=mesh.dp.group)
        loss = loss / mesh.dp.size
    return loss
