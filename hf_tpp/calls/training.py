"""A training call.

with labels       one 1F1B pass, whose gradients `loss.backward()` releases
without labels    forwards alone; their logits carry the backwards (outside.py)
"""

import functools
from typing import Any

import torch

from hf_tpp.calls.context import CallContext
from hf_tpp.calls.output import DeferredOutput, LossOutput
from hf_tpp.calls.outside import outside_call
from hf_tpp.calls.preparation import TrainingBatch, prepare_training, start_forwards, training_mode
from hf_tpp.calls.reading import LogitsReading
from hf_tpp.calls.sharing import share_logits, share_loss
from hf_tpp.gradients.release import release_gradients
from hf_tpp.gradients.synchronize import sum_shared_gradients
from hf_tpp.pipeline_parallel.payload import Payload
from hf_tpp.pipeline_parallel.stage_pass import KeptGradients, StagePass

__all__ = ["training_call"]


def training_call(context: CallContext, batch: dict[str, Any]) -> Any:
    """One training pass; the returned loss, or without labels the logits, carry the gradients.

    Collective: every rank of the job, with the same batch within a replica.

    Raises:
        BatchError: The batch cannot be run exactly.
        RankMismatchError: Ranks of one replica were given different batches, or one replica labels and another none.
        OutOfMemoryError: With a note, where less memory would do.
    """
    return_dict = batch.pop("return_dict", True)
    has_labels = "labels" in batch
    training = prepare_training(context, batch, has_loss=has_labels)
    try:
        output: Any = _whole_pass(context, training) if has_labels else _logits(context, training)
    except torch.OutOfMemoryError as error:
        if context.runner.lanes is not None:
            error.add_note("hf_tpp had two microbatches in memory: parallelize(overlap_microbatches=False) has one")
        raise
    return output if return_dict else output.to_tuple()


def _logits(context: CallContext, training: TrainingBatch) -> DeferredOutput:
    """Forwards alone."""
    logits, router_loss = outside_call(context, training, LogitsReading(context, training.logit_pieces))
    shown: Any = logits if training.is_list else logits[0]
    return DeferredOutput(logits=shown, aux_loss=router_loss)


def _whole_pass(context: CallContext, training: TrainingBatch) -> LossOutput:
    """Forwards and backwards; gradients are kept for `loss.backward()`."""

    def read_out(_: int, output: Any) -> Payload:
        return (output.loss, output.logits.detach()) if context.train_logits else (output.loss,)

    mesh = context.mesh
    trained = context.choose_trained()
    gradients = (context.scale.value, None)[: 1 + context.train_logits]
    with training_mode(context, training):
        microbatches, traffic, start_microbatch = start_forwards(context, training)

        def run(stage_pass: StagePass | None) -> tuple[list[Payload], KeptGradients]:
            return context.runner.train(microbatches, traffic, start_microbatch, read_out, gradients, stage_pass)

        if context.recorder is None or training.draws:
            found, kept = run(None)
        else:
            found, kept = context.recorder.train(run, microbatches, traffic, gradients, read_out)
    loss = torch.zeros((), device=mesh.device)
    for output in found:
        loss = loss + output[0]
    loss = share_loss(loss, mesh, over_replicas=training.counts_itself)
    parameters: list[Any] = [*trained]
    released = sum_shared_gradients(kept.tensors, context.runner.stage.parameters, [*trained.values()], mesh)
    if context.residual is not None:
        parameters, released = [*parameters, context.residual], [*released, None]
    if parameters:
        hand_out = functools.partial(context.replicas.hand_out, parameters)
        loss = release_gradients(loss, parameters, released, hand_out, context.after_backward, context.scale)
    if not context.train_logits:
        return LossOutput(loss=loss)
    logits = share_logits(context, [output[1] for output in found], training.logit_pieces)
    shown: Any = logits if training.is_list else logits[0]
    return LossOutput(loss=loss, logits=shown)
