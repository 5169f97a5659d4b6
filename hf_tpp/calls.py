"""One call of a parallel model: check the batch, let the ranks agree, run the schedule, give everyone the result."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_tpp.collectives.agreement import agree_on, checksum, exchange, text_hash
from hf_tpp.dropout import DropoutStreams
from hf_tpp.errors import BatchError, HfTppError
from hf_tpp.gradients.release import release_gradients
from hf_tpp.gradients.synchronize import sum_shared_gradients
from hf_tpp.mesh import ParallelMesh
from hf_tpp.pipeline_parallel.cache import find_cache, new_cache
from hf_tpp.pipeline_parallel.microbatch import (
    batch_rows,
    count_label_tokens,
    default_num_microbatches,
    sequence_length,
    split_batch,
)
from hf_tpp.pipeline_parallel.runner import PipelineRunner
from hf_tpp.sharding import ShardSpec
from hf_tpp.tensor_parallel.linear import join_channels
from hf_tpp.tensor_parallel.region import RegionState

__all__ = ["CallContext", "evaluation_call", "training_call"]

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
    vocabulary: Any
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


def training_call(context: CallContext, batch: dict[str, Any]) -> Any:
    """One training pass; the returned loss carries the gradients.

    Collective: every rank of the job, with the same batch within a replica.

    Raises:
        BatchError: The batch cannot be run exactly.
        RankMismatchError: Ranks of one replica were given different batches.
    """
    mesh = context.mesh
    return_dict = batch.pop("return_dict", True)
    microbatches: list[dict[str, Any]] = []
    problem: HfTppError | None = None
    try:
        _check_training(context, batch)
        batch = _to_device({**batch, "use_cache": False}, mesh.device)
        microbatches = context.split(batch)
        _check_sequence_shards(context, microbatches)
    except HfTppError as error:
        problem = error
    draws = context.streams.draws()
    seed = int(torch.randint(0, 2**62, ()).item()) if draws else 0
    counts_itself = "num_items_in_batch" not in batch
    tokens: int | torch.Tensor = count_label_tokens(microbatches) if counts_itself and problem is None else 0
    replicas = _agree_on_call(context, batch, problem, [tokens, seed], trains=True)
    if counts_itself:
        # The mean over the tokens of all replicas: each divides by the average count, the dp mean does the rest.
        mean_tokens = sum(row[0] for row in replicas) / mesh.dp.size
        for microbatch in microbatches:
            microbatch["num_items_in_batch"] = torch.tensor(mean_tokens, device=mesh.device)
    replica_seed = replicas[mesh.dp.rank][1]

    def start_microbatch(index: int) -> None:
        context.streams.start_microbatch(replica_seed, mesh.dp.rank, index, mesh.pp.rank)
        if context.sequence_parallel and not mesh.pp.is_first:
            context.streams.enter_sequence_shards()

    specs = context.choose_trained()
    shards = mesh.tp.size if context.sequence_parallel else 1
    context.regions.sequence_parallel = context.sequence_parallel
    try:
        with context.streams.running(draws):
            loss, kept = context.runner.train(microbatches, context.messages(microbatches, shards), start_microbatch)
    finally:
        context.regions.sequence_parallel = False
    loss = _share_loss(loss, mesh, over_replicas=counts_itself)
    gradients = sum_shared_gradients(kept.tensors, context.runner.stage.parameters, specs, mesh)
    parameters: list[Any] = [*context.runner.stage.parameters]
    if context.residual is not None:
        parameters, gradients = [*parameters, context.residual], [*gradients, None]
    if parameters:
        loss = release_gradients(loss, parameters, gradients, context.after_backward)
    output = CausalLMOutputWithPast(loss=loss)
    return output if return_dict else output.to_tuple()


@torch.no_grad()
def evaluation_call(context: CallContext, batch: dict[str, Any]) -> Any:
    """Forwards only: logits (and the loss, if there are labels) on every rank of the replica.

    Collective: every rank of the replica, with the same batch.
    """
    mesh = context.mesh
    return_dict = batch.pop("return_dict", True)
    problem: HfTppError | None = None
    microbatches: list[dict[str, Any]] = []
    cache = None
    try:
        _check_outputs(context, batch)
        batch = _to_device(batch, mesh.device)
        cache = find_cache(batch.values())
        if cache is None and batch.get("use_cache"):
            cache = batch["past_key_values"] = new_cache(context.model)
        if cache is None:
            batch["use_cache"] = False
        microbatches = context.split(batch) if cache is None else split_batch(batch, 1)
    except HfTppError as error:
        problem = error
    draws = context.model.training and context.streams.draws()
    seed = int(torch.randint(0, 2**62, ()).item()) if draws else 0
    if context.agreement:
        _, seed = _agree_on_call(context, batch, problem, [0, seed], trains=False)[0]
    elif problem is not None:
        raise problem
    has_labels = "labels" in batch
    if has_labels and "num_items_in_batch" not in batch:
        tokens = count_label_tokens(microbatches)
        for microbatch in microbatches:
            microbatch["num_items_in_batch"] = tokens

    def start_microbatch(index: int) -> None:
        context.streams.start_microbatch(seed, mesh.dp.rank, index, mesh.pp.rank)

    with context.streams.running(draws):
        outputs = context.runner.evaluate(microbatches, context.messages(microbatches, 1), start_microbatch)
    result = CausalLMOutputWithPast(past_key_values=cache)
    if has_labels:
        losses = [output.loss for output in outputs]
        loss = torch.stack(losses).sum() if losses else torch.zeros((), device=mesh.device)
        result["loss"] = _share_loss(loss.float(), mesh, over_replicas=False)
    if context.eval_logits or not has_labels:
        logits = [_share_logits(context, outputs[i].logits if outputs else None) for i in range(len(microbatches))]
        is_list = isinstance(batch.get("input_ids"), list | tuple)
        result["logits"] = logits if is_list else torch.cat(logits)
    return result if return_dict else result.to_tuple()


def _check_training(context: CallContext, batch: Batch) -> None:
    _check_outputs(context, batch)
    if "labels" not in batch:
        raise BatchError(
            f"training needs labels, since the whole pass runs inside the model's call; got {', '.join(batch)}: pass "
            f"labels=input_ids (transformers shifts them), or call model.eval() for logits alone"
        )
    embeds = batch.get("inputs_embeds")
    if isinstance(embeds, torch.Tensor) and embeds.requires_grad:
        raise BatchError("inputs_embeds that need a gradient cannot get one from a pipeline pass: detach() them")
    for module in context.model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(function, "keywords", {}).get("use_reentrant"):
            raise BatchError(
                "reentrant gradient checkpointing writes into p.grad behind the schedule's back: use "
                "model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
            )


def _check_outputs(context: CallContext, batch: Batch) -> None:
    for name in ("output_attentions", "output_hidden_states"):
        if batch.get(name) or getattr(context.model.config, name, False):
            raise BatchError(f"{name}=True is not available from a parallel model: its layers are on several ranks")


def _check_sequence_shards(context: CallContext, microbatches: Sequence[Batch]) -> None:
    tp_size = context.mesh.tp.size
    if context.sequence_parallel:
        for microbatch in microbatches:
            seq = sequence_length(microbatch)
            if seq % tp_size:
                raise BatchError(
                    f"sequence_parallel=True needs a sequence length divisible by tp={tp_size}, got {seq}: pad the "
                    f"batch (pad_to_multiple_of={tp_size}) or use sequence_parallel=False"
                )


def _to_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device, non_blocking=True)
        if isinstance(value, list | tuple) and all(isinstance(part, torch.Tensor) for part in value):
            return [part.to(device, non_blocking=True) for part in value]
        return value

    return {name: move(value) for name, value in batch.items()}


def _agree_on_call(
    context: CallContext,
    batch: Batch,
    problem: HfTppError | None,
    numbers: Sequence[int | torch.Tensor],
    *,
    trains: bool,
) -> list[list[int]]:
    """Raise on all ranks unless the ranks of each replica were called alike.

    Args:
        context: The model's.
        batch: All arguments of the call.
        problem: What this rank found wrong with it.
        numbers: To be given to the others; may differ between ranks.
        trains: Whether this is a training pass, of which all replicas hear; an evaluation concerns one replica.

    Returns:
        The `numbers` of the first rank of each replica (of this one alone in evaluation).
    """
    mesh = context.mesh
    tensors = [
        part
        for value in batch.values()
        for part in (value if isinstance(value, list) else [value])
        if isinstance(part, torch.Tensor)
    ]
    arguments = str({name: _describe(value) for name, value in batch.items()})
    facts = (int(trains), int(problem is not None), text_hash(arguments), checksum(tensors))
    rows = exchange([*facts, *numbers], mesh.replica_control)
    is_refused = any(row[1] or row[:4] != rows[0][:4] for row in rows)
    if is_refused:
        call = {
            "call": "training" if trains else "evaluation",
            "batch": f"{arguments} checksum {int(checksum(tensors)):x}",
        }
        try:
            agree_on(call, problem, mesh.replica_control)
        except HfTppError as error:
            problem = error
    if not any(row[0] for row in rows) or mesh.dp.size == 1:
        if problem is not None:
            raise problem
        return [rows[0][4:]]
    # If one rank of a replica trains, all of its ranks are here: the other replicas must hear what is wrong.
    replicas = exchange([int(is_refused), *numbers], mesh.control)[:: mesh.replica.size]
    if any(row[0] for row in replicas):
        agree_on({}, problem, mesh.control)
    return [row[1:] for row in replicas]


def _describe(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, list | tuple):
        return [_describe(part) for part in value]
    return value if isinstance(value, bool | int | float | str) else type(value).__name__


def _share_loss(loss: torch.Tensor, mesh: ParallelMesh, over_replicas: bool) -> torch.Tensor:
    """The last stage's loss on every rank; the mean over replicas if they count tokens together."""
    if mesh.pp.size > 1:
        dist.all_reduce(loss, group=mesh.pp.group)
    if over_replicas and mesh.dp.size > 1:
        dist.all_reduce(loss, group=mesh.dp.group)
        loss = loss / mesh.dp.size
    return loss


def _share_logits(context: CallContext, logits: torch.Tensor | None) -> torch.Tensor:
    """Local columns on the last stage -> full logits on every rank of the replica."""
    mesh = context.mesh
    if logits is not None and mesh.tp.size > 1:
        logits = join_channels(logits, context.vocabulary, mesh.tp.group)
    if mesh.pp.size == 1:
        assert logits is not None
        return logits
    source = mesh.pp.global_ranks[-1]
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    header = torch.zeros(4, dtype=torch.int64, device=mesh.device)
    if logits is not None:
        header.copy_(torch.tensor([*logits.shape, dtypes.index(logits.dtype)]))
    dist.broadcast(header, source, group=mesh.pp.group)
    *shape, dtype = header.tolist()
    message = torch.empty(shape, dtype=dtypes[dtype], device=mesh.device) if logits is None else logits.contiguous()
    dist.broadcast(message, source, group=mesh.pp.group)
    return message
