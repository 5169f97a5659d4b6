"""An optimizer's parameter groups over all ranks: hyperparameters, and which parameter belongs to which group."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hf_tpp.errors import CheckpointError
from hf_tpp.mesh import ParallelMesh
from hf_tpp.sharding import ShardSpec

__all__ = ["check_groups", "merge_groups", "optimized", "read_groups", "set_options"]

_NO_OPTIONS = {"params", "param_names"}
_LOCAL_OPTIONS = {"foreach", "fused", "capturable", "differentiable"}  # how to compute on this device, not what
_SHOWN = 5


def optimized(
    model: nn.Module, optimizer: torch.optim.Optimizer, specs: Mapping[str, ShardSpec]
) -> Iterator[tuple[int, nn.Parameter, ShardSpec]]:
    """Every parameter of the unsplit model that the optimizer has here, with the index of its group.

    Raises:
        CheckpointError: The optimizer has a parameter that is not the model's.
    """
    known = {parameter: specs.get(name) for name, parameter in model.named_parameters()}
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if parameter not in known:
                raise CheckpointError(
                    f"the optimizer has a parameter of shape {list(parameter.shape)} that is not the model's: create "
                    f"it from model.parameters() after parallelize()"
                )
            spec = known[parameter]
            if spec is not None:
                yield index, parameter, spec


def read_groups(model: nn.Module, optimizer: torch.optim.Optimizer, specs: Mapping[str, ShardSpec]) -> dict[str, Any]:
    """This rank's groups as plain data: class of the optimizer, and options and parameter names per group."""
    groups: list[dict[str, Any]] = [
        {"options": {k: _on_host(v) for k, v in group.items() if k not in _NO_OPTIONS}, "names": []}
        for group in optimizer.param_groups
    ]
    for index, _, spec in optimized(model, optimizer, specs):
        groups[index]["names"].append(spec.name)
    return {"class": type(getattr(optimizer, "optimizer", optimizer)).__name__, "groups": groups}


def merge_groups(mine: Mapping[str, Any], mesh: ParallelMesh) -> dict[str, Any]:
    """The groups of the unsplit model: options of rank 0, names of all ranks. Collective.

    Raises:
        CheckpointError: The ranks have different numbers of groups.
    """
    everyone: list[Any] = [mine]
    if mesh.control is not None:
        everyone = [None] * mesh.world_size
        dist.all_gather_object(everyone, mine, group=mesh.control)
    counts = {len(rank["groups"]) for rank in everyone}
    if len(counts) > 1:
        raise CheckpointError(
            f"the ranks' optimizers have {' or '.join(map(str, sorted(counts)))} parameter groups: create the same "
            f"groups on every rank; a group may be empty where a stage has none of its parameters"
        )
    merged = []
    for index, first in enumerate(everyone[0]["groups"]):
        names = {name for rank in everyone for name in rank["groups"][index]["names"]}
        merged.append({"options": first["options"], "names": sorted(names)})
    return {"class": everyone[0]["class"], "groups": merged}


def check_groups(saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Compare the groups of a checkpoint with those of the job.

    Raises:
        CheckpointError: Another optimizer, or a parameter that is new, gone or in another group.
    """
    if saved["class"] != present["class"]:
        raise CheckpointError(
            f"the checkpoint was saved with {saved['class']}, the optimizer is {present['class']}: resume with "
            f"{saved['class']}"
        )
    if len(saved["groups"]) != len(present["groups"]):
        raise CheckpointError(
            f"the checkpoint has {len(saved['groups'])} parameter groups, the optimizer {len(present['groups'])}: "
            f"create the groups as they were"
        )
    before, now = _group_of(saved["groups"]), _group_of(present["groups"])
    facts = {
        "only in the checkpoint": before.keys() - now.keys(),
        "only in the optimizer": now.keys() - before.keys(),
        "in another group": {name for name in before.keys() & now.keys() if before[name] != now[name]},
    }
    differences = [f"{len(names)} {what} ({_some(names)})" for what, names in facts.items() if names]
    if differences:
        raise CheckpointError(
            f"the optimizer's parameters are not those of the checkpoint: {'; '.join(differences)}: create the model "
            f"and the parameter groups as they were"
        )


def set_options(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Continue with the saved hyperparameters."""
    for group, loaded in zip(optimizer.param_groups, saved["groups"], strict=True):
        for name, value in loaded["options"].items():
            if name in _LOCAL_OPTIONS:
                continue
            if isinstance(group.get(name), torch.Tensor):
                group[name].copy_(torch.as_tensor(value))  # a tensor stays where it is
            else:
                group[name] = value


def _group_of(groups: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {name: index for index, group in enumerate(groups) for name in group["names"]}


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _on_host(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value
