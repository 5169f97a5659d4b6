"""What a checkpoint of training state holds, entry by entry, and how each entry lies in memory.

A tensor of its parameter's shape is cut as the parameter is; anything else must be the same on all ranks that have it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from hf_tpp.checkpoint.training.parameter_groups import optimized
from hf_tpp.checkpoint.training.sharded_state import Sharded, plain_object
from hf_tpp.errors import CheckpointError
from hf_tpp.sharding import ShardSpec

__all__ = ["collect_tensors", "saved_keys"]

_OWN = "hf_tpp"  # modules that hf_tpp adds to a model carry nothing to save


def collect_tensors(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    specs: Mapping[str, ShardSpec],
    saved: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Parameters and optimizer state by their names on disk.

    Args:
        model: The parallel model.
        optimizer: Its optimizer.
        specs: Local parameter name -> how it lies in the unsplit model.
        saved: What a checkpoint has; then the result has room for the optimizer state that exists there.

    Raises:
        CheckpointError: Something has no place in the unsplit model.
    """
    state: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        if name in specs:
            state[f"model.{specs[name].name}"] = Sharded(parameter.detach(), specs[name])
        elif not name.startswith(_OWN):
            raise CheckpointError(f"parameter {name} was added after parallelize(): it cannot be saved or loaded")
    keys = None if saved is None else saved_keys(saved)
    for index, parameter, spec in optimized(model, optimizer, specs):
        present = optimizer.state.get(parameter, {})
        for key in present if keys is None else keys.get(spec.name, ()):
            name = f"optimizer.state.{spec.name}.{key}"
            if saved is None:
                state[name] = _saved_value(name, present[key], parameter, spec)
            else:
                group = optimizer.param_groups[index]
                on_host = key == "step" and not (group.get("capturable") or group.get("fused"))  # as torch keeps it
                device = torch.device("cpu") if on_host else parameter.device
                state[name] = _empty_value(present.get(key), saved[name], parameter, spec, device)
    return state


def saved_keys(saved: Mapping[str, Any]) -> dict[str, list[str]]:
    """Parameter -> keys of its optimizer state."""
    found: dict[str, list[str]] = {}
    for path in saved:
        if path.startswith("optimizer.state."):
            name, _, key = path.removeprefix("optimizer.state.").rpartition(".")
            found.setdefault(name, []).append(key)
    return found


def _saved_value(name: str, value: Any, parameter: nn.Parameter, spec: ShardSpec) -> Any:
    if not isinstance(value, torch.Tensor):
        return plain_object(name, value)
    if value.dim() and value.shape == parameter.shape:
        return Sharded(value, spec)
    if value.dim() and spec.dim is not None:
        raise CheckpointError(
            f"{name} has shape {list(value.shape)}, neither a number nor the parameter's {list(parameter.shape)}, and "
            f"the parameter is cut over tp={spec.tp_size}: save at tp=1, or use an optimizer such as AdamW"
        )
    return value


def _empty_value(present: Any, saved: Any, parameter: nn.Parameter, spec: ShardSpec, device: torch.device) -> Any:
    """Room for one saved value: what is `present` if it fits, else new."""
    if not isinstance(saved, TensorStorageMetadata):
        return None
    is_shard = len(saved.size) > 0 and tuple(saved.size) == spec.full_shape
    shape, dtype = parameter.shape if is_shard else saved.size, saved.properties.dtype
    if not (isinstance(present, torch.Tensor) and present.shape == shape and present.dtype == dtype):
        # Of the parameter's kind: shared by replicas, if the parameter is.
        like = torch.zeros_like(parameter, dtype=dtype, device=device, requires_grad=False)
        present = like if is_shard else torch.zeros(shape, dtype=dtype, device=device)
    return Sharded(present, spec) if is_shard else present
