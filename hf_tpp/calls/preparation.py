"""What every training call does first: check the batch together with the other ranks, and cut it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from hf_tpp.calls.agreement import agree_on_call
from hf_tpp.calls.checks import check_sequence_shards, check_training
from hf_tpp.calls.context import Batch, CallContext, to_device
from hf_tpp.errors import HfTppError, RankMismatchError
from hf_tpp.pipeline_parallel.microbatch import count_label_tokens
from hf_tpp.pipeline_parallel.stage import Traffic

__all__ = ["TrainingBatch", "prepare_training", "start_forwards", "training_mode"]


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """The batch of one training call.

    Attributes:
        microbatches: Keyword arguments of the model.
        seed: Of what they draw.
        draws: There is dropout.
        counts_itself: The label tokens of all replicas were counted here.
        is_list: The caller gave lists of microbatches.
    """

    microbatches: list[dict[str, Any]]
    seed: int
    draws: bool
    counts_itself: bool
    is_list: bool

    @property
    def logit_pieces(self) -> list[int]:
        """How many microbatches' logits the caller gets as one tensor."""
        count = len(self.microbatches)
        return [1] * count if self.is_list else [count]


def prepare_training(context: CallContext, batch: Batch, has_loss: bool) -> TrainingBatch:
    """Check the batch, agree on it, and cut it.

    Args:
        context: The model's.
        batch: All arguments of the call.
        has_loss: The model computes the loss, from labels.

    Collective: every rank of the job.

    Raises:
        BatchError: The batch cannot be run exactly.
        RankMismatchError: Ranks of one replica were given different batches, or one replica computes the loss in the
            model and another outside.
    """
    mesh = context.mesh
    counts_itself = has_loss and "num_items_in_batch" not in batch
    microbatches: list[dict[str, Any]] = []
    problem: HfTppError | None = None
    tokens: int | torch.Tensor = 0
    try:
        check_training(context, batch)
        batch = to_device({**batch, "use_cache": False}, mesh.device)
        microbatches = context.split(batch)
        check_sequence_shards(context, microbatches)
        if counts_itself:
            tokens = count_label_tokens(microbatches)
    except HfTppError as error:
        problem = error
    draws = context.streams.draws()
    seed = context.streams.next_seed(draws)
    replicas = agree_on_call(context, batch, problem, [int(has_loss), tokens, seed], trains=True)
    if any(row[0] != has_loss for row in replicas):
        raise RankMismatchError(
            f"some replicas compute the loss in the model, from labels, and others outside (replica {mesh.dp.rank}: "
            f"{'inside' if has_loss else 'outside'}): call the model alike on all replicas"
        )
    if counts_itself:
        # The mean over the tokens of all replicas: each divides by the average count, the dp mean does the rest.
        mean_tokens = torch.tensor(sum(row[1] for row in replicas) / mesh.dp.size, device=mesh.device)
        for microbatch in microbatches:
            microbatch["num_items_in_batch"] = mean_tokens
    is_list = isinstance(batch.get("input_ids", batch.get("inputs_embeds")), list | tuple)
    return TrainingBatch(microbatches, replicas[mesh.dp.rank][2], draws, counts_itself, is_list)


@contextmanager
def training_mode(context: CallContext, training: TrainingBatch) -> Iterator[None]:
    """Whole weights, dropout streams and sequence shards, for forwards and for what backwards compute again."""
    context.regions.sequence_parallel = context.sequence_parallel
    packing = context.packed_sequences.remembered(training.microbatches)
    try:
        streams = context.streams.running(training.draws, training.seed, context.mesh.dp.rank, context.mesh.pp.rank)
        with context.replicas.gathered(), streams, packing:
            yield
    finally:
        context.regions.sequence_parallel = False


def start_forwards(
    context: CallContext, training: TrainingBatch
) -> tuple[list[dict[str, Any]], list[Traffic], Callable[[int], None]]:
    """Microbatches, what each receives and sends, and what is to be called before the forward of each.

    Collective over the replica; within `training_mode`.
    """
    mesh = context.mesh

    def start_microbatch(index: int) -> None:
        context.streams.start_microbatch(training.seed, mesh.dp.rank, index, mesh.pp.rank)
        if context.sequence_parallel and not mesh.pp.is_first:
            context.streams.enter_sequence_shards()

    shards = mesh.tp.size if context.sequence_parallel else 1
    traffic = context.traffic(training.microbatches, shards, start_microbatch)
    return training.microbatches, traffic, start_microbatch
