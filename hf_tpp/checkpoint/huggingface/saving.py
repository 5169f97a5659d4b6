"""Writing an ordinary Hugging Face checkpoint from a parallel model.

    stage 0   model-00001-of-00003.safetensors, model-00002-of-00003.safetensors     each stage writes its own files:
    stage 1   model-00003-of-00003.safetensors                                       shards meet on its first tp rank
    rank 0    model.safetensors.index.json, config.json, generation_config.json

Only the first replica takes part in writing. If a rank fails, all ranks raise; what the folder held
before stays as it was until every file has been written.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hf_tpp.checkpoint.huggingface.buffers import persistent_buffers
from hf_tpp.checkpoint.huggingface.conversion import saved_tensors, stored_together
from hf_tpp.checkpoint.huggingface.gather import HeldTensor, gather_shards
from hf_tpp.checkpoint.huggingface.saved_files import (
    STAGING,
    Entry,
    SavedFile,
    check_space,
    move_metadata,
    parse_size,
    plan_files,
    write_metadata,
    write_weights,
)
from hf_tpp.collectives.agreement import agree_on
from hf_tpp.errors import CheckpointError, ConfigurationError, HfTppError
from hf_tpp.mesh import ParallelMesh
from hf_tpp.sharding import ShardSpec

__all__ = ["save_checkpoint"]

# What transformers' save_pretrained takes besides, and means nothing other than its default here.
_IGNORED = ("is_main_process", "save_function")
_DEFAULTS: dict[str, Any] = {
    "state_dict": None,
    "safe_serialization": True,
    "push_to_hub": False,
    "variant": None,
    "token": None,
    "save_peft_format": True,
    "save_original_format": True,
    "distributed_checkpoint": False,
}


@torch.no_grad()
def save_checkpoint(
    model: nn.Module,
    specs: Mapping[str, ShardSpec],
    mesh: ParallelMesh,
    save_directory: str | Path,
    max_shard_size: int | str = "5GB",
    **unsupported: Any,
) -> None:
    """Write a checkpoint that plain transformers loads.

    Args:
        model: This rank's part of the model.
        specs: Local parameter name -> how it lies in the unsplit model.
        mesh: This rank's place.
        save_directory: A folder that all nodes share.
        max_shard_size: Largest size of a file; a stage writes at least one of its own.
        **unsupported: transformers' other options, at their defaults. `is_main_process` is ignored: which rank writes
            follows from what it holds; and `save_function`, as transformers ignores it.

    Collective: every rank of the job, with the same arguments.

    Raises:
        ConfigurationError: An option that is not supported.
        CheckpointError: A rank could not write; raised on every rank.
    """
    folder = Path(save_directory)
    held: dict[str, HeldTensor] = {}
    entries: dict[str, Entry] = {}

    def prepare() -> None:
        _refuse_options(unsupported)
        parse_size(max_shard_size)
        held.update(_held_tensors(model, specs, mesh))
        entries.update(_entries(model, held))

    agree_on({"save_directory": str(folder), "max_shard_size": max_shard_size}, _attempt(prepare), mesh.control)
    stages = plan_files(_entries_of_stages(entries, mesh), parse_size(max_shard_size))
    try:
        _save_files(model, held, stages, mesh, folder)
    finally:
        if mesh.dp.is_first and mesh.tp.is_first:
            shutil.rmtree(folder / STAGING, ignore_errors=True)


def _save_files(
    model: nn.Module,
    held: Mapping[str, HeldTensor],
    stages: Sequence[Sequence[SavedFile]],
    mesh: ParallelMesh,
    folder: Path,
) -> None:
    """Stage all files, then move them into place. Collective: every rank, and none goes on if one of them failed."""
    files, mine = [file for stage in stages for file in stage], stages[mesh.pp.rank]
    writes = mesh.dp.is_first and mesh.tp.is_first
    _agreed(mesh, writes, check_space, folder, sum(file.num_bytes for file in files))
    problem = _write_stage(model, held, mine, folder, mesh) if mesh.dp.is_first else None
    if mesh.global_rank == 0 and problem is None:
        problem = _attempt(write_metadata, model, folder, files)
    agree_on({}, problem, mesh.control)
    _agreed(mesh, writes, _move_weights, folder, mine)
    _agreed(mesh, mesh.global_rank == 0, move_metadata, folder, files)


def _agreed(mesh: ParallelMesh, takes_part: bool, action: Callable[..., None], *args: Any) -> None:
    """Run `action` on the ranks that take part; all ranks wait for it, and raise if one of them fails."""
    agree_on({}, _attempt(action, *args) if takes_part else None, mesh.control)


def _refuse_options(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if name in _IGNORED:
            continue
        if name not in _DEFAULTS or value != _DEFAULTS[name]:
            known = f"leave it at {_DEFAULTS[name]!r}" if name in _DEFAULTS else "leave it out"
            raise ConfigurationError(
                f"save_pretrained({name}={value!r}) is not supported for a parallel model: {known}, or load the saved "
                f"checkpoint with transformers and save that again"
            )


def _attempt(action: Callable[..., None], *args: Any) -> HfTppError | None:
    """What went wrong in `action`, for the other ranks to hear of: they must not wait for this one for ever."""
    try:
        action(*args)
    except HfTppError as error:
        return error
    except Exception as error:
        problem = CheckpointError(f"the checkpoint could not be saved: {type(error).__name__}: {error}")
        problem.__cause__ = error
        return problem
    return None


def _held_tensors(model: nn.Module, specs: Mapping[str, ShardSpec], mesh: ParallelMesh) -> dict[str, HeldTensor]:
    """What this stage saves, by name; a weight that several stages hold only on the first of them."""
    held: dict[str, HeldTensor] = {}
    for name, spec in specs.items():
        if mesh.pp.rank == spec.stages[0]:
            held.setdefault(spec.name, HeldTensor(model.get_parameter(name).detach(), spec))
    for name, buffer in persistent_buffers(model):
        held.setdefault(name, HeldTensor(buffer, None))
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        held.pop(name, None)
    return held


def _entries(model: nn.Module, held: Mapping[str, HeldTensor]) -> dict[str, Entry]:
    """What this stage stores, by the first name of each group of tensors that are stored together."""
    with torch.device("meta"):
        empty = {
            name: torch.empty(tensor.spec.full_shape if tensor.spec else tensor.local.shape, dtype=tensor.local.dtype)
            for name, tensor in held.items()
        }
    entries: dict[str, Entry] = {}
    for group in stored_together(model, empty):
        stored = saved_tensors(model, {name: empty[name] for name in group})
        entries[group[0]] = Entry(tuple(group), sum(held[name].num_bytes for name in group), tuple(stored))
    return entries


def _entries_of_stages(entries: Mapping[str, Entry], mesh: ParallelMesh) -> list[dict[str, Entry]]:
    """What each stage writes; what several stages hold is the first one's. Collective."""
    mine = (mesh.pp.rank, dict(entries))
    everyone: list[Any] = [mine]
    if mesh.control is not None:
        everyone = [None] * mesh.control.size()
        dist.all_gather_object(everyone, mine if mesh.dp.is_first and mesh.tp.is_first else None, group=mesh.control)
    taken: set[str] = set()
    stages: list[dict[str, Entry]] = []
    for _, theirs in sorted(filter(None, everyone), key=lambda pair: pair[0]):
        stages.append({name: entry for name, entry in theirs.items() if name not in taken})
        taken.update(theirs)
    return stages


def _write_stage(
    model: nn.Module, held: Mapping[str, HeldTensor], files: Sequence[SavedFile], folder: Path, mesh: ParallelMesh
) -> HfTppError | None:
    """Gather and write one file after the other. Collective: the tp ranks of a stage; none stops on its own."""
    problem: HfTppError | None = None
    for file in files:
        if _first_rank_failed(problem, mesh):
            break
        whole: dict[str, torch.Tensor] = {}
        for entry in file.entries:
            shards = {name: gather_shards(held[name], mesh) for name in entry.members}
            if mesh.tp.is_first and problem is None:
                problem = _attempt(_add, whole, model, held, shards)
        if mesh.tp.is_first and problem is None:
            problem = _attempt(write_weights, whole, folder, file.name)
    return problem


def _first_rank_failed(problem: HfTppError | None, mesh: ParallelMesh) -> bool:
    if mesh.tp.group is None:
        return problem is not None
    failed = torch.tensor([problem is not None], dtype=torch.int32, device=mesh.device)
    dist.broadcast(failed, src=mesh.tp.global_ranks[0], group=mesh.tp.group)
    return bool(failed.item())


def _add(
    whole: dict[str, torch.Tensor],
    model: nn.Module,
    held: Mapping[str, HeldTensor],
    shards: Mapping[str, Sequence[torch.Tensor] | None],
) -> None:
    joined = {name: held[name].join(parts) for name, parts in shards.items() if parts is not None}
    for stored, tensor in saved_tensors(model, joined).items():
        whole[stored] = tensor.contiguous()


def _move_weights(folder: Path, files: Sequence[SavedFile]) -> None:
    for file in files:
        (folder / STAGING / file.name).replace(folder / file.name)
