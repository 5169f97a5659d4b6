"""What every call of one parallel model needs to know."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hf_tpp.compilation import CompiledBlocks
from hf_tpp.cuda_graphs import StageRecorder
from hf_tpp.data_parallel import Replicas
from hf_tpp.dropout import DropoutStreams
from hf_tpp.gradients.release import BackwardScale
from hf_tpp.mesh import ParallelMesh
from hf_tpp.pipeline_parallel.microbatch import (
    batch_rows,
    check_padded_rows,
    default_num_microbatches,
    sequence_length,
    split_batch,
)
from hf_tpp.pipeline_parallel.routers import wants_router_logits
from hf_tpp.pipeline_parallel.runner import PipelineRunner
from hf_tpp.pipeline_parallel.stage import Traffic
from hf_tpp.plan.layout import Layout
from hf_tpp.sharding import ShardSpec
from hf_tpp.tensor_parallel.region import RegionState
from hf_tpp.transformers_versions import PackedSequences

__all__ = ["Batch", "CallContext", "to_device"]

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
        specs: This rank's parameters, and how they lie (all rows of them: while a pass runs, replicas share none); one
            dictionary for all that is done with gradients.
        named_specs: The same by the parameters' names in the model.
        replicas: How replicas hold them.
        vocabulary: How the logits are cut over tp; None if every rank has them whole.
        hidden_size: Channels of the embedding.
        dtype: Its type.
        compiled_blocks: This stage's blocks, compiled or not.
        counts_tokens: The model's loss can be divided by the tokens of the whole batch.
        fewest_padded_rows: Rows that a piece of a batch needs for the model to mask its padding.
        num_microbatches: The user's choice, None for the default.
        sequence_parallel: Train with sequence parallelism.
        eval_logits: Give logits to every rank when not training.
        train_logits: Give logits without a graph beside the loss of training.
        num_outside: Training calls without labels so far.
        dtypes: Type of each parameter when the model was made parallel.
        residual: The parameter that carries the norm of other ranks.
        recorder: Records microbatches as CUDA graphs; None where none are.
        packed_sequences: What the model was found to make of rows.
        after_backward: Runs once every backward pass has filled `p.grad`.
        sync_gradients: Average over the replicas after backward.
        agreement: Compare the batch between ranks before it runs.
        scale: What losses are multiplied by before their backward.
    """

    model: nn.Module
    mesh: ParallelMesh
    runner: PipelineRunner
    regions: RegionState
    streams: DropoutStreams
    specs: dict[nn.Parameter, ShardSpec]
    named_specs: dict[str, ShardSpec]
    replicas: Replicas
    vocabulary: Layout | None
    hidden_size: int
    dtype: torch.dtype
    sequence_parallel: bool
    compiled_blocks: CompiledBlocks
    counts_tokens: bool = True
    fewest_padded_rows: int = 1
    num_microbatches: int | None = None
    eval_logits: bool = True
    train_logits: bool = False
    num_outside: int = 0
    dtypes: Mapping[nn.Parameter, torch.dtype] = field(init=False)
    residual: nn.Parameter | None = None
    recorder: StageRecorder | None = None
    packed_sequences: PackedSequences = field(default_factory=PackedSequences)
    after_backward: Callable[[], None] = field(default=lambda: None)
    sync_gradients: bool = True
    agreement: bool = True
    scale: BackwardScale = field(init=False)

    def __post_init__(self) -> None:
        """Note what must not change, and what is not known yet."""
        self.scale = BackwardScale(self.mesh.device)
        self.dtypes = {parameter: parameter.dtype for parameter in self.specs}

    @contextmanager
    def without_agreement(self) -> Iterator[None]:
        """Calls whose batches are known to be the same: the steps of a generation."""
        self.agreement = False
        try:
            yield
        finally:
            self.agreement = True

    def find_parameters(self) -> list[str]:
        """Note what the model's parameters are now: PEFT replaces some when it changes their type, or loads them.

        Returns:
            Names of parameters that need a gradient and of which it is not known how they lie.
        """
        found: dict[nn.Parameter, ShardSpec] = {}
        unknown: list[str] = []
        for name, parameter in self.model.named_parameters():
            spec = self.specs.get(parameter) or self.named_specs.get(name)
            if spec is not None:
                found[parameter] = spec
            elif parameter is not self.residual and parameter.requires_grad:
                unknown.append(name)
        if found.keys() != self.specs.keys():
            self.specs.clear()
            self.specs.update(found)
        return unknown

    def choose_trained(self) -> dict[nn.Parameter, ShardSpec]:
        """Have the next pass compute what needs a gradient now; returns those parameters. While they are gathered."""
        trained = {parameter: spec for parameter, spec in self.specs.items() if parameter.requires_grad}
        self.runner.stage.parameters = self.replicas.computing(trained)
        return trained

    def traffic(
        self, microbatches: Sequence[dict[str, Any]], shards: int, start_microbatch: Callable[[int], None]
    ) -> list[Traffic]:
        """What each microbatch receives and sends; found out by a forward if it is not known yet.

        Args:
            microbatches: Keyword arguments of the model.
            shards: Ranks over which hidden states are cut along the sequence.
            start_microbatch: Called before a forward.

        Collective over the replica.
        """
        stage = self.runner.stage
        stage.with_routers = wants_router_logits(self.model, microbatches[0])
        stage.added_share = 1.0 / len(microbatches)
        device = self.mesh.device.type
        mode = (
            self.model.training,
            stage.with_routers,
            torch.is_autocast_enabled(device),
            torch.get_autocast_dtype(device),
        )
        return [
            self.runner.rehearsal.traffic(
                part,
                ((batch_rows(part), sequence_length(part) // shards, self.hidden_size), self.dtype),
                mode,
                functools.partial(start_microbatch, index),
            )
            for index, part in enumerate(microbatches)
        ]

    def split(self, batch: Batch) -> list[dict[str, Any]]:
        """The microbatches of a batch."""
        if not self.counts_tokens:
            return split_batch(batch, 1)
        fewest = self.fewest_padded_rows
        wanted = self.num_microbatches or default_num_microbatches(batch_rows(batch), self.mesh.pp.size, fewest)
        microbatches = split_batch(batch, wanted)
        if isinstance(batch.get("attention_mask"), torch.Tensor):  # a list: the user's own batches, each by itself
            check_padded_rows(microbatches, fewest)
        return microbatches


def to_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """All tensors of a batch on `device`."""

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device, non_blocking=True)
        if isinstance(value, list | tuple) and all(isinstance(part, torch.Tensor) for part in value):
            return [part.to(device, non_blocking=True) for part in value]
        return value

    return {name: move(value) for name, value in batch.items()}
