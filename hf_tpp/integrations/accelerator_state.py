"""`Accelerator.save_state` and `load_state`: what is parallel is saved by hf_tpp, all else by accelerate.

    folder/
        scheduler.bin, sampler.bin, random_states_0.pkl, ...   accelerate's own files
        hf_tpp_0/                                              a training checkpoint per parallel model: resumable at
                                                               any tp and pp, and without prepared schedules, which
                                                               count replicas, at any number of replicas

A model without a prepared optimizer is saved alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from hf_tpp.checkpoint.training import load_training_state, read_layout, save_training_state
from hf_tpp.collectives.agreement import exchange
from hf_tpp.errors import ConfigurationError
from hf_tpp.integrations.replicas import find_parallel, state_of
from hf_tpp.mesh import ParallelMesh

__all__ = ["load_state", "save_state"]

_FOLDER = "hf_tpp_{}"
Pair = tuple[nn.Module, torch.optim.Optimizer]


def save_state(original: Any, accelerator: Accelerator, output_dir: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Everything a script needs to go on. Collective: every rank of the job."""
    with _set_aside(accelerator) as pairs:
        folder = original(output_dir, *args, **kwargs)
    for index, (model, optimizer) in enumerate(pairs):
        state = state_of(model)
        directory = Path(folder) / _FOLDER.format(index)
        save_training_state(directory, model, optimizer, specs=state.specs, mesh=state.mesh)
    return folder


def load_state(original: Any, accelerator: Accelerator, input_dir: Any = None, *args: Any, **kwargs: Any) -> None:
    """Go on from what `save_state` saved. Collective: every rank of the job.

    Raises:
        ConfigurationError: There are prepared schedules, and another number of replicas.
    """
    used: list[str] = []

    def before(models: Any, folder: str) -> None:
        used.append(folder)
        for index, (model, _) in enumerate(pairs):
            _check_schedules(accelerator, Path(folder) / _FOLDER.format(index), state_of(model).mesh)

    with _set_aside(accelerator) as pairs:
        handle = accelerator.register_load_state_pre_hook(before)
        try:
            original(input_dir, *args, **kwargs)
        finally:
            handle.remove()
    for index, (model, optimizer) in enumerate(pairs):
        state = state_of(model)
        directory = Path(used[-1]) / _FOLDER.format(index)
        load_training_state(directory, model, optimizer, specs=state.specs, mesh=state.mesh)
        # accelerate reads it from this process's own file, which a larger job than the one that saved does not have.
        accelerator.step = exchange([accelerator.step], state.mesh.control)[0][0]


def _check_schedules(accelerator: Accelerator, directory: Path, mesh: ParallelMesh) -> None:
    saved = read_layout(directory, mesh)["dp"]
    if accelerator._schedulers and saved != mesh.dp.size:
        raise ConfigurationError(
            f"{directory} was saved by dp={saved} replicas, and there are dp={mesh.dp.size}: a schedule that was given "
            f"to prepare() counts the batches of all replicas, so its place would be another one. Resume with "
            f"dp={saved}, or step the schedule yourself, once per optimizer step, and do not prepare it"
        )


@contextmanager
def _set_aside(accelerator: Accelerator) -> Iterator[list[Pair]]:
    """Have accelerate see only what is not parallel; gives the parallel models with their optimizers."""
    models, optimizers = accelerator._models, accelerator._optimizers
    found = [find_parallel(model) for model in models]
    parallel = list({id(model): model for model in found if model is not None}.values())
    pairs = [(model, _optimizer_of(model, optimizers)) for model in parallel]
    taken = [optimizer for _, optimizer in pairs]
    accelerator._models = [model for model, inner in zip(models, found, strict=True) if inner is None]
    accelerator._optimizers = [one for one in optimizers if all(one is not other for other in taken)]
    try:
        yield pairs
    finally:
        accelerator._models, accelerator._optimizers = models, optimizers


def _optimizer_of(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    own = {id(parameter) for parameter in model.parameters()}
    found = [
        optimizer
        for optimizer in optimizers
        if any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"])
    ]
    if len(found) > 1:
        raise ConfigurationError(
            f"{len(found)} prepared optimizers have parameters of one parallel {type(model).__name__}: use one "
            f"optimizer with several parameter groups"
        )
    return found[0] if found else torch.optim.SGD([{"params": []}])
