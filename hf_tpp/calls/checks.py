"""Calls that cannot be run exactly are refused by name."""

from collections.abc import Sequence

import torch

from hf_tpp.calls.context import Batch, CallContext
from hf_tpp.errors import BatchError, ConfigurationError
from hf_tpp.pipeline_parallel.cache import find_cache
from hf_tpp.pipeline_parallel.microbatch import sequence_length

__all__ = ["check_outputs", "check_parameters", "check_sequence_shards", "check_skipped_blocks", "check_training"]


def check_training(context: CallContext, batch: Batch) -> None:
    """Raise BatchError unless `batch` can be trained on."""
    check_outputs(context, batch)
    check_parameters(context)
    check_skipped_blocks(context)
    if find_cache(batch.values()) is not None:
        raise BatchError(
            "past_key_values cannot be given in training: a cache belongs to the whole batch, which is cut into "
            "microbatches; leave it out, or call model.eval()"
        )
    embeds = batch.get("inputs_embeds")
    if isinstance(embeds, torch.Tensor) and embeds.requires_grad:
        raise BatchError(
            "inputs_embeds that need a gradient cannot get one from a pipeline pass: detach() them; adapters that "
            "train them (prompt tuning) cannot be trained in parallel, LoRA can"
        )
    if batch.get("past_key_values") is not None:
        raise BatchError(
            "training with past_key_values is not possible in a pipeline pass: leave them out; adapters that train "
            "them (prefix tuning) cannot be trained in parallel, LoRA can"
        )
    for module in context.model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(function, "keywords", {}).get("use_reentrant"):
            raise BatchError(
                "reentrant gradient checkpointing writes into p.grad behind the schedule's back: use "
                "model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
            )


def check_parameters(context: CallContext) -> None:
    """Raise ConfigurationError if there are parameters that would not be trained as they would be in one process."""
    unknown = context.find_parameters()
    if unknown:
        raise ConfigurationError(
            f"{unknown[0]} was added after parallelize(), which does not know how it lies on the ranks: add it before, "
            f"or, if it is an adapter, with peft's get_peft_model, add_adapter or load_adapter"
        )
    for parameter, dtype in context.dtypes.items():
        if parameter.dtype != dtype and parameter in context.specs and context.mesh.pp.size > 1:
            raise ConfigurationError(
                f"{context.specs[parameter].name} was {dtype} when the model was made parallel and is "
                f"{parameter.dtype} now, which the other stages do not know: load the model with "
                f"dtype={parameter.dtype}, or convert it before parallelize()"
            )


def check_skipped_blocks(context: CallContext) -> None:
    """Raise ConfigurationError if blocks are skipped at random where the ranks do not draw alike."""
    if context.mesh.pp.size == 1 and not context.sequence_parallel:
        return
    for owner, name in context.streams.sources:
        rate = getattr(owner, name)
        if "layerdrop" in name and rate > 0.0:
            raise ConfigurationError(
                f"{name}={rate} skips blocks at random in training, of which pipeline stages and sequence shards would "
                f"each skip others: set it to 0.0, or use pp=1 without sequence_parallel"
            )


def check_outputs(context: CallContext, batch: Batch) -> None:
    """Raise BatchError if outputs are asked for that lie on several ranks."""
    for name in ("output_attentions", "output_hidden_states"):
        if batch.get(name) or getattr(context.model.config, name, False):
            raise BatchError(f"{name}=True is not available from a parallel model: its layers are on several ranks")


def check_sequence_shards(context: CallContext, microbatches: Sequence[Batch]) -> None:
    """Raise BatchError if a sequence cannot be cut into equal shards."""
    tp_size = context.mesh.tp.size
    if context.sequence_parallel:
        for microbatch in microbatches:
            seq = sequence_length(microbatch)
            if seq % tp_size:
                raise BatchError(
                    f"sequence_parallel=True needs a sequence length divisible by tp={tp_size}, got {seq}: pad the "
                    f"batch (pad_to_multiple_of={tp_size}) or use sequence_parallel=False"
                )
