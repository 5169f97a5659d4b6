"""Trainer's checkpoints of a parallel model.

    checkpoint-500/
        model-0000s-of-0000P.safetensors, config.json   an ordinary checkpoint of the weights
        hf_tpp/                                         training checkpoint: weights, optimizer, schedule, generators;
                                                        resumable at any tp, pp and number of replicas
        rng_state_0.pth, ..., trainer_state.json, ...   Trainer's own files

With save_only_model=True there is no training checkpoint, and a run begins with these weights.
"""

from pathlib import Path
from typing import Any

from hf_tpp.checkpoint.huggingface import load_checkpoint
from hf_tpp.checkpoint.training import load_training_state, read_layout, save_training_state
from hf_tpp.checkpoint.training.random_state import get_random_state, layout_of, set_random_state
from hf_tpp.errors import ConfigurationError
from hf_tpp.integrations.replicas import find_parallel, state_of
from hf_tpp.parallel_model import ParallelState

__all__ = [
    "load_best_model",
    "load_optimizer_and_scheduler",
    "load_rng_state",
    "load_weights",
    "save_model",
    "save_optimizer_and_scheduler",
]

_FOLDER = "hf_tpp"
_RANDOM_STATE = "_hf_tpp_random_state"


def save_model(original: Any, trainer: Any, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
    """Write the whole model. Collective: every rank of the job."""
    if not trainer.args.should_save:  # Trainer would leave it at once, and its shards are needed
        trainer.model.save_pretrained(trainer.args.output_dir if output_dir is None else output_dir)
    original(output_dir, *args, **kwargs)


def save_optimizer_and_scheduler(_: Any, trainer: Any, output_dir: str) -> None:
    """Write a training checkpoint. Collective: every rank of the job."""
    model, state = _parallel(trainer)
    save_training_state(
        Path(output_dir) / _FOLDER,
        model,
        trainer.optimizer,
        specs=state.specs,
        mesh=state.mesh,
        extra={"scheduler": trainer.lr_scheduler.state_dict()},
    )


def load_optimizer_and_scheduler(_: Any, trainer: Any, checkpoint: str | None) -> None:
    """Continue weights, optimizer, schedule and random generators, if they were saved. Collective: every rank.

    Raises:
        ConfigurationError: Replicas would go on with the batch size that other replicas had.
    """
    if checkpoint is None or not _has_training_state(checkpoint):
        return
    model, state = _parallel(trainer)
    directory = Path(checkpoint) / _FOLDER
    _check_batch_size(trainer, read_layout(directory, state.mesh)["dp"], state.mesh.dp.size)
    extra = load_training_state(directory, model, trainer.optimizer, specs=state.specs, mesh=state.mesh)
    trainer.lr_scheduler.load_state_dict(extra["scheduler"])
    setattr(trainer, _RANDOM_STATE, get_random_state(state.mesh))


def load_weights(_: Any, trainer: Any, resume_from_checkpoint: str, *_args: Any, **_kwargs: Any) -> None:
    """Load the weights of a checkpoint without training state; else they come with the optimizer."""
    if not _has_training_state(resume_from_checkpoint):
        _load(trainer, resume_from_checkpoint)


def load_best_model(_: Any, trainer: Any) -> None:
    """Load the weights of the best checkpoint. Collective: every rank."""
    _load(trainer, trainer.state.best_model_checkpoint)


def load_rng_state(_: Any, trainer: Any, checkpoint: str | None) -> None:
    """Continue the generators as they were when the checkpoint was saved, after batches have been skipped."""
    random_state = getattr(trainer, _RANDOM_STATE, None)
    if checkpoint is not None and random_state is not None:
        mesh = _parallel(trainer)[1].mesh
        set_random_state(random_state, layout_of(mesh), mesh)


def _load(trainer: Any, folder: str) -> None:
    model, state = _parallel(trainer)
    load_checkpoint(model, state.specs, state.mesh, folder)


def _check_batch_size(trainer: Any, saved_dp_size: int, dp_size: int) -> None:
    """Early versions of Trainer 5 resume with the batch size of the checkpoint, whatever the arguments say."""
    used, wanted = trainer._train_batch_size, trainer.args.train_batch_size
    if used != wanted and saved_dp_size != dp_size:
        raise ConfigurationError(
            f"this version of Trainer resumes with the {used} rows a replica of the checkpoint instead of "
            f"per_device_train_batch_size={wanted}, and there are dp={dp_size} replicas instead of {saved_dp_size}: "
            f"set per_device_train_batch_size={used}, or update transformers"
        )


def _has_training_state(checkpoint: str) -> bool:
    return (Path(checkpoint) / _FOLDER).is_dir()


def _parallel(trainer: Any) -> tuple[Any, ParallelState]:
    model = find_parallel(trainer.model)
    assert model is not None
    return model, state_of(model)
