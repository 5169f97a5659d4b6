"""A training call: one 1F1B pass whose gradients `loss.backward()` releases."""

from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_tpp.calls.agreement import agree_on_call
from hf_tpp.calls.checks import check_sequence_shards, check_training
from hf_tpp.calls.context import CallContext, share_loss, to_device
from hf_tpp.errors import HfTppError
from hf_tpp.gradients.release import release_gradients
from hf_tpp.gradients.synchronize import sum_shared_gradients
from hf_tpp.pipeline_parallel.microbatch import count_label_tokens
from hf_tpp.pipeline_parallel.runner import KeptGradients

__all__ = ["training_call"]


def training_call(context: CallContext, batch: dict[str, Any]) -> Any:
    """One training pass; the returned loss carries the gradients.

    Collective: every rank of the job, with the same batch within a replica.

    Raises:
        BatchError: The batch cannot be run exactly.
        RankMismatchError: Ranks of one replica were given different batches.
    """
    return_dict = batch.pop("return_dict", True)
    counts_itself = "num_items_in_batch" not in batch
    microbatches, seed = _prepare(context, batch, counts_itself)
    specs = context.choose_trained()
    loss, kept = _run(context, microbatches, seed)
    loss = share_loss(loss, context.mesh, over_replicas=counts_itself)
    parameters: list[Any] = [*context.runner.stage.parameters]
    gradients = sum_shared_gradients(kept.tensors, parameters, specs, context.mesh)
    if context.residual is not None:
        parameters, gradients = [*parameters, context.residual], [*gradients, None]
    if parameters:
        loss = release_gradients(loss, parameters, gradients, context.after_backward)
    output = CausalLMOutputWithPast(loss=loss)
    return output if return_dict else output.to_tuple()


def _prepare(context: CallContext, batch: dict[str, Any], counts_itself: bool) -> tuple[list[dict[str, Any]], int]:
    """Check the batch together with the other ranks; returns its microbatches and the seed of their dropout."""
    mesh = context.mesh
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
    seed = int(torch.randint(0, 2**62, ()).item()) if context.streams.draws() else 0
    replicas = agree_on_call(context, batch, problem, [tokens, seed], trains=True)
    if counts_itself:
        # The mean over the tokens of all replicas: each divides by the average count, the dp mean does the rest.
        mean_tokens = torch.tensor(sum(row[0] for row in replicas) / mesh.dp.size, device=mesh.device)
        for microbatch in microbatches:
            microbatch["num_items_in_batch"] = mean_tokens
    return microbatches, replicas[mesh.dp.rank][1]


def _run(context: CallContext, microbatches: list[dict[str, Any]], seed: int) -> tuple[torch.Tensor, KeptGradients]:
    """The schedule, with dropout streams and sequence shards switched on for its duration."""
    mesh = context.mesh

    def start_microbatch(index: int) -> None:
        context.streams.start_microbatch(seed, mesh.dp.rank, index, mesh.pp.rank)
        if context.sequence_parallel and not mesh.pp.is_first:
            context.streams.enter_sequence_shards()

    shards = mesh.tp.size if context.sequence_parallel else 1
    context.regions.sequence_parallel = context.sequence_parallel
    try:
        with context.streams.running(context.streams.draws()):
            return context.runner.train(microbatches, context.messages(microbatches, shards), start_microbatch)
    finally:
        context.regions.sequence_parallel = False
