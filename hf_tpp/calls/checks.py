"""Calls that cannot be run exactly are refused by name."""

from collections.abc import Sequence

import torch

from hf_tpp.calls.context import Batch, CallContext
from hf_tpp.errors import BatchError
from hf_tpp.pipeline_parallel.microbatch import sequence_length

__all__ = ["check_outputs", "check_sequence_shards", "check_training"]


def check_training(context: CallContext, batch: Batch) -> None:
    """Raise BatchError unless `batch` can be trained on."""
    check_outputs(context, batch)
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
