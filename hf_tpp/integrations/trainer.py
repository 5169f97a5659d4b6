"""What transformers' Trainer does differently with a parallel model.

method                           stock                              here
__init__, train                                                     refuse what cannot work
get_total_train_batch_size       the batches of all processes       of all replicas
create_model_card                counts processes                   replicas
prediction_step                  loss of this process's rows        of all rows of the evaluation set that are new
save_model                       the first process writes           all ranks give their shards
_save_optimizer_and_scheduler    the first process's state          a training checkpoint of all ranks
_load_...                        from these files                   from that

Everything else is Trainer's own: it accumulates, clips, logs and schedules as for any model, and counts by its
Accelerator, for which a replica is a process.
"""

import copy
import inspect
from typing import Any

from hf_tpp.integrations.changes import Changes
from hf_tpp.integrations.replicas import find_parallel, state_of
from hf_tpp.integrations.trainer_arguments import check_arguments
from hf_tpp.integrations.trainer_checkpoints import (
    load_best_model,
    load_optimizer_and_scheduler,
    load_rng_state,
    load_weights,
    save_model,
    save_optimizer_and_scheduler,
)
from hf_tpp.integrations.trainer_evaluation import prediction_step
from hf_tpp.integrations.trl import serve_trl
from hf_tpp.integrations.trl_trainers import check_trl

__all__ = ["TRAINER_CHANGES", "TRAINER_CREATION", "concerns_trainer", "initialize"]


def concerns_trainer(trainer: Any) -> bool:
    """Whether this Trainer has a parallel model."""
    return find_parallel(getattr(trainer, "model", None)) is not None


def initialize(original: Any, trainer: Any, *args: Any, **kwargs: Any) -> None:
    """Refuse what cannot work before Trainer acts upon it."""
    given = inspect.signature(original).bind_partial(*args, **kwargs).arguments
    check_arguments(given.get("model"), given.get("args"))
    check_trl(trainer, given.get("model"), given.get("args"))
    original(*args, **kwargs)
    check_arguments(trainer.model, trainer.args)  # the model may come from model_init


def train(original: Any, trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """Once more, for arguments that were changed since."""
    check_arguments(trainer.model, trainer.args)
    return original(*args, **kwargs)


def get_total_train_batch_size(original: Any, trainer: Any, args: Any) -> int:
    """Rows of one optimizer step."""
    model = find_parallel(trainer.model)
    assert model is not None
    return int(original(args)) // state_of(model).mesh.replica.size


def create_model_card(original: Any, trainer: Any, *args: Any, **kwargs: Any) -> None:
    """Write the sizes that the card names as the log does, for replicas."""
    model = find_parallel(trainer.model)
    assert model is not None
    num_replicas, stated = state_of(model).mesh.dp.size, trainer.args
    kind = type(stated)
    trainer.args = copy.copy(stated)
    trainer.args.__class__ = type(kind.__name__, (kind,), {"world_size": property(lambda _: num_replicas)})
    try:
        original(*args, **kwargs)
    finally:
        trainer.args = stated


def _initialize_patched(original: Any, trainer: Any, *args: Any, **kwargs: Any) -> None:
    serve_trl(trainer)
    initialize(original, trainer, *args, **kwargs)


TRAINER_CREATION: Changes = {"__init__": _initialize_patched}
"""For every Trainer: before it is created nobody knows its model."""

TRAINER_CHANGES: Changes = {
    "train": train,
    "get_total_train_batch_size": get_total_train_batch_size,
    "create_model_card": create_model_card,
    "prediction_step": prediction_step,
    "save_model": save_model,
    "_save_optimizer_and_scheduler": save_optimizer_and_scheduler,
    "_load_optimizer_and_scheduler": load_optimizer_and_scheduler,
    "_load_from_checkpoint": load_weights,
    "_load_best_model": load_best_model,
    "_load_rng_state": load_rng_state,
}
