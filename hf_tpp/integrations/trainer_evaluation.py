"""The loss of an evaluation: that of its samples, each counted once.

The last batch is filled up with samples that were seen before, so that all replicas have something to do. Trainer drops
their predictions; here they do not count in the loss either. And the loss of a batch is that of all replicas' rows, as
if one process had had them.

    7 samples, 2 replicas, 2 rows each      replica 0    replica 1
    first batch                              0 1          2 3
    last batch                               4 5          6 (0)     labels of (0) are ignored
"""

from typing import Any

import torch
import torch.distributed as dist

from hf_tpp.errors import ConfigurationError
from hf_tpp.integrations.replicas import find_parallel, state_of
from hf_tpp.integrations.trl_trainers import counts_own_tokens, repeats_rows
from hf_tpp.mesh import ParallelMesh

__all__ = ["prediction_step"]

_IGNORED = -100


def prediction_step(original: Any, trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """Loss, logits and labels of one batch.

    Collective: every rank of the job.

    Raises:
        ConfigurationError: The last batch is filled up with rows that would count twice.
    """
    parallel = find_parallel(trainer.model)
    assert parallel is not None
    mesh = state_of(parallel).mesh
    if mesh.dp.size == 1:
        return original(model, inputs, *args, **kwargs)
    counted = _without_repeated(trainer, inputs, mesh)
    loss, logits, labels = original(model, counted, *args, **kwargs)
    if loss is not None:
        loss = _mean_over_replicas(loss, _weight(trainer, counted), mesh)
    return loss, logits, labels


def _without_repeated(trainer: Any, inputs: Any, mesh: ParallelMesh) -> Any:
    """The batch with labels that are ignored in the rows that only fill it up."""
    state = trainer.accelerator.gradient_state
    if state.end_of_dataloader and state.remainder > 0 and repeats_rows(trainer):
        raise ConfigurationError(
            f"{type(trainer).__name__} with {mesh.dp.size} replicas evaluates {state.remainder} rows in its last "
            f"batch, which is filled up with others that would count twice: give an eval_dataset whose length is a "
            f"multiple of per_device_eval_batch_size x {mesh.dp.size}"
        )
    labels = {name: inputs[name] for name in trainer.label_names if isinstance(inputs.get(name), torch.Tensor)}
    if not (state.end_of_dataloader and state.remainder > 0) or not labels:
        return inputs
    rows = len(next(iter(labels.values())))
    num_new = max(0, min(rows, state.remainder - mesh.dp.rank * rows))
    masked = {name: value.clone() for name, value in labels.items()}
    for value in masked.values():
        value[num_new:] = _IGNORED
    return {**inputs, **masked}


def _weight(trainer: Any, inputs: Any) -> float:
    """What a replica's loss of a batch counts.

    TRL's is the mean over its own tokens. Trainer's is that, too, or the sum of its tokens' times the number of
    replicas over the number of all tokens.
    """
    labels = [inputs[name] for name in trainer.label_names if isinstance(inputs.get(name), torch.Tensor)]
    if counts_own_tokens(trainer):
        return float(sum(int((value[:, 1:] != _IGNORED).sum()) for value in labels))
    counts = trainer.args.average_tokens_across_devices or not labels
    return float(counts or any(bool((value != _IGNORED).any()) for value in labels))


def _mean_over_replicas(loss: torch.Tensor, weight: float, mesh: ParallelMesh) -> torch.Tensor:
    """The mean of what replicas have; one of weight 0 has the mean of no tokens."""
    both = torch.stack([loss * weight if weight else torch.zeros_like(loss), torch.full_like(loss, weight)])
    dist.all_reduce(both, group=mesh.dp.group)
    return both[0] / both[1]
