"""What accelerate's Accelerator does differently where there are parallel models.

method                 stock                                  here
prepare_model          wraps in DDP over all processes        mixed precision alone: the model averages by itself
prepare_data_loader    every process its own batches          every replica its own batches
num_processes, gather, ...                                    replicas count: processes.py
save_state, load_state the first process's tensors            the whole model and its optimizer
save_model             the first process's tensors            the whole model
"""

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn

from hf_tpp.errors import ConfigurationError
from hf_tpp.integrations import data_loading
from hf_tpp.integrations.accelerator_state import load_state, save_state
from hf_tpp.integrations.changes import Changes
from hf_tpp.integrations.processes import PROCESS_CHANGES
from hf_tpp.integrations.replicas import find_parallel, mesh_of_process, shared_mesh, state_of
from hf_tpp.mesh import ParallelMesh

__all__ = ["ACCELERATOR_CHANGES", "concerns_accelerator", "stay_on_cpu"]


def concerns_accelerator(_: Accelerator) -> bool:
    """Whether there is a parallel model: accelerate's state belongs to the process, and so do its replicas."""
    return shared_mesh() is not None


def stay_on_cpu(mesh: ParallelMesh) -> None:
    """Have an Accelerator that is yet to come count the processes of a model on the CPU, as after `torchrun`.

    Without this variable accelerate takes a process on a machine without GPUs for the only one.
    """
    if mesh.device.type == "cpu" and mesh.world_size > 1:
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")


def prepare_model(
    original: Any,
    accelerator: Accelerator,
    model: nn.Module,
    device_placement: bool | None = None,
    evaluation_mode: bool = False,
) -> nn.Module:
    """Mixed precision and compilation; no DDP."""
    parallel = find_parallel(model)
    if parallel is None:
        return original(model, device_placement, evaluation_mode)  # type: ignore[no-any-return]
    state = state_of(parallel)
    _check(accelerator, state.mesh)
    if accelerator.scaler is not None:
        state.calls.scale.expect(torch.tensor(accelerator.scaler.get_scale(), device=state.mesh.device))
    plugin = accelerator.state.dynamo_plugin
    backend, plugin.backend = plugin.backend, DynamoBackend.NO
    try:
        prepared = original(model, device_placement, evaluation_mode=True)
    finally:
        plugin.backend = backend
    if backend != DynamoBackend.NO and not plugin.disable:
        # A call of the model runs messages between ranks; what can be compiled are the blocks between them.
        options = {name: value for name, value in plugin.to_kwargs().items() if name != "disable"}
        state.calls.compiled_blocks.compile(options)
    return prepared  # type: ignore[no-any-return]


def prepare_data_loader(
    original: Any,
    accelerator: Accelerator,
    data_loader: Any,
    device_placement: Any = None,
    slice_fn_for_dispatch: Any = None,
) -> Any:
    """Each replica its own batches, and all ranks of a replica the same."""
    if not getattr(data_loader, "_is_accelerate_prepared", False):
        mesh = mesh_of_process()
        _check(accelerator, mesh)
        placement = accelerator.device_placement if device_placement is None else device_placement
        data_loader = data_loading.share_out(accelerator, data_loader, mesh, placement)
        data_loader._is_accelerate_prepared = True
    return original(data_loader, device_placement, slice_fn_for_dispatch)  # registers it


def save_model(
    original: Any,
    accelerator: Accelerator,
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    max_shard_size: int | str = "10GB",
    safe_serialization: bool = True,
) -> None:
    """The whole model, as an ordinary checkpoint."""
    if find_parallel(model) is None:
        original(model, save_directory, max_shard_size, safe_serialization)
        return
    if not safe_serialization:
        raise ConfigurationError(
            "save_model(safe_serialization=False) is not available for a parallel model: leave it out, for safetensors"
        )
    accelerator.unwrap_model(model).save_pretrained(save_directory, max_shard_size=max_shard_size)


ACCELERATOR_CHANGES: Changes = {
    "prepare_model": prepare_model,
    "prepare_data_loader": prepare_data_loader,
    "save_state": save_state,
    "load_state": load_state,
    "save_model": save_model,
    **PROCESS_CHANGES,
}


def _check(accelerator: Accelerator, mesh: ParallelMesh) -> None:
    """Raise ConfigurationError unless accelerate sees the processes and the device that the model is on."""
    counted = accelerator.state.num_processes
    if counted != mesh.world_size:
        raise ConfigurationError(
            f"accelerate counts {counted} processes, and the model is on {mesh.world_size}: start "
            f"with torchrun or `accelerate launch --multi_gpu`, and on CPUs set ACCELERATE_USE_CPU=true in the "
            f"environment (or use Accelerator(cpu=True), TrainingArguments(use_cpu=True))"
        )
    if accelerator.device.type != mesh.device.type:
        raise ConfigurationError(
            f"accelerate works on {accelerator.device} and the model is on {mesh.device}: pass "
            f"parallelize(device={accelerator.device.type!r}), or Accelerator(cpu=True) for the CPU"
        )
    if accelerator.parallelism_config is not None or str(accelerator.distributed_type).endswith(("FSDP", "DEEPSPEED")):
        raise ConfigurationError(
            f"accelerate is configured for {accelerator.distributed_type} {accelerator.parallelism_config or ''}, and "
            f"the model is parallel already: leave out fsdp, deepspeed and parallelism_config"
        )
