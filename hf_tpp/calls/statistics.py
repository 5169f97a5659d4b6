"""A call that gives log-probabilities of the labels, and other numbers for each token, in place of logits.

The last stage computes them from logits that are cut over tp; only [B, s] travels, where logits would be [B, s, V].
"""

from typing import Any

import torch

from hf_tpp.calls.context import CallContext
from hf_tpp.calls.evaluation import forwards, prepare_evaluation
from hf_tpp.calls.outside import outside_call
from hf_tpp.calls.preparation import prepare_training
from hf_tpp.calls.reading import StatisticsReading
from hf_tpp.calls.sharing import from_last_stage
from hf_tpp.errors import BatchError
from hf_tpp.tensor_parallel.token_statistics import STATISTICS

__all__ = ["statistics_call"]

_NOT_FOR_THE_MODEL = ("labels", "shift_labels", "num_items_in_batch", "token_statistics")


def statistics_call(
    context: CallContext, batch: dict[str, Any], temperature: float = 1.0
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """Numbers for each token; in training mode log-probabilities and entropies carry the backwards.

    Args:
        context: The model's.
        batch: The model's arguments, with `labels` [B, s], or `shift_labels` that are shifted already.
        temperature: What logits are divided by.

    Collective: every rank of the job in training mode, else of the replica; so is the backward pass of the result.

    Returns:
        Statistic -> [B, s - 1] ([B, s] with `shift_labels`), zero where a label is -100; and the router loss (the mean
        over microbatches) of models that have one.

    Raises:
        BatchError: The batch cannot be run exactly.
    """
    if "labels" not in batch and "shift_labels" not in batch:
        raise BatchError(f"log-probabilities need labels; got {', '.join(batch)}: give labels or shift_labels")
    if isinstance(batch.get("input_ids"), list | tuple):
        raise BatchError("log-probabilities come from one batch, not from a list of microbatches: give one tensor")
    batch = {**batch, "token_statistics": temperature}  # so that ranks agree on the kind of call
    if context.model.training and torch.is_grad_enabled():
        training = prepare_training(context, batch, has_loss=False)
        reading = StatisticsReading(context, _take_targets(training.microbatches), temperature)
        outputs, router_loss = outside_call(context, training, reading)
    else:
        outputs, router_loss = _evaluate(context, batch, temperature)
    return dict(zip(STATISTICS, outputs, strict=True)), router_loss


@torch.no_grad()
def _evaluate(
    context: CallContext, batch: dict[str, Any], temperature: float
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    microbatches, _, seed = prepare_evaluation(context, batch)
    reading = StatisticsReading(context, _take_targets(microbatches), temperature)
    outputs = forwards(context, microbatches, seed)
    shared = reading.share([reading.read(index, output) for index, output in enumerate(outputs)])
    router_losses = [output.aux_loss for output in outputs if getattr(output, "aux_loss", None) is not None]
    return shared, from_last_stage(torch.stack(router_losses).mean() if router_losses else None, context.mesh)


def _take_targets(microbatches: list[dict[str, Any]]) -> list[torch.Tensor]:
    """Take what is not for the model out of the microbatches, and return the token behind each position."""
    targets = []
    for microbatch in microbatches:
        taken = {name: microbatch.pop(name, None) for name in _NOT_FOR_THE_MODEL}
        targets.append(taken["labels"][:, 1:] if taken["shift_labels"] is None else taken["shift_labels"])
    return targets
