"""Training state: saved from any (tp, pp, dp), resumed at any other.

    save_training_state("runs/a/step-00000010", model, optimizer, specs=..., mesh=..., extra={"step": 10})
    extra = load_training_state(latest_checkpoint("runs/a"), model, optimizer, specs=..., mesh=...)

On disk is an ordinary torch.distributed.checkpoint of full tensors under the Hugging Face names:

    model.<name>                     parameters (not buffers: they are computed from the config)
    optimizer.state.<name>.<key>     exp_avg, step, ...
    optimizer.groups, extra, layout  plain objects
    random.<global rank>             random generators
"""

import functools
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from hf_tpp.checkpoint.training.background import BackgroundSave, snapshot
from hf_tpp.checkpoint.training.entries import collect_tensors, saved_keys
from hf_tpp.checkpoint.training.folders import prepare, publish, temporary_folder
from hf_tpp.checkpoint.training.parameter_groups import check_groups, merge_groups, optimized, read_groups, set_options
from hf_tpp.checkpoint.training.random_state import get_random_state, layout_of, saved_by, set_random_state
from hf_tpp.checkpoint.training.sharded_state import Sharded, ShardedLoadPlanner, ShardedSavePlanner, plain_object
from hf_tpp.collectives.agreement import agree_on
from hf_tpp.errors import CheckpointError
from hf_tpp.mesh import ParallelMesh
from hf_tpp.sharding import ShardSpec

__all__ = ["load_training_state", "read_layout", "save_training_state"]

_under_way: dict[dist.ProcessGroup | None, BackgroundSave] = {}
"""Control group -> the asynchronous save of its ranks."""


def save_training_state(
    directory: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    specs: Mapping[str, ShardSpec],
    mesh: ParallelMesh,
    extra: Mapping[str, Any] | None = None,
    asynchronous: bool = False,
) -> BackgroundSave | None:
    """Save everything that training needs to continue. Collective: every rank of the job.

    Written beside `directory`, flushed, and only then renamed, so that a crash never leaves half a checkpoint under
    that name. Last, the file `latest` in the parent folder is made to name it.

    Args:
        directory: The new checkpoint, seen by all ranks; best a folder per step. One of the same name is replaced.
        model: The parallel model.
        optimizer: Its optimizer, as it is or wrapped by accelerate.
        specs: Local parameter name -> how it lies in the unsplit model.
        mesh: The process groups.
        extra: What else to keep, the same on all ranks: scheduler.state_dict(), the step, the position in the data.
            Numbers, strings, tensors and containers of them.
        asynchronous: Return once the state is copied to the host, and write it in a thread. Only one save is under way:
            the next one waits for it, and so does the end of the program.

    Returns:
        The save under way, whose `wait()` raises what went wrong; None if there is none.

    Raises:
        CheckpointError: Something cannot be saved, or an asynchronous save before could not; raised on all ranks.
    """
    _finish(mesh)
    directory = Path(directory).absolute()
    state: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    with _on_all_ranks(mesh):
        if mesh.global_rank == 0:
            prepare(directory)
        state = collect_tensors(model, optimizer, specs)
        groups = read_groups(model, optimizer, specs)
        state["extra"] = plain_object("extra", dict(extra or {}))
        state["layout"] = layout_of(mesh)
        state[f"random.{mesh.global_rank}"] = get_random_state(mesh)
    state["optimizer.groups"] = plain_object("optimizer.param_groups", merge_groups(groups, mesh))
    if asynchronous:
        copied, group = snapshot(state), mesh.background_group()
        _ignore_lonely_warning()  # for good: filters are not the thread's own
        write = functools.partial(_write, directory, copied, mesh, group, then_publish=True)
        _under_way[mesh.control] = BackgroundSave(write, functools.partial(_on_all_ranks, mesh))
        return _under_way[mesh.control]
    with _on_all_ranks(mesh), _without_warning():
        _write(directory, state, mesh, mesh.control)
    with _on_all_ranks(mesh):
        if mesh.global_rank == 0:
            publish(directory)
    return None


def _write(
    directory: Path,
    state: dict[str, Any],
    mesh: ParallelMesh,
    group: dist.ProcessGroup | None,
    then_publish: bool = False,
) -> None:
    writer = FileSystemWriter(temporary_folder(directory), sync_files=True)
    with _plain_cause():
        save(state, storage_writer=writer, planner=ShardedSavePlanner(), process_group=group, no_dist=group is None)
    # torch returns once the first rank has the word of all others, and has written what makes the checkpoint complete.
    if then_publish and mesh.global_rank == 0:
        publish(directory)


def _finish(mesh: ParallelMesh) -> None:
    """Wait for the asynchronous save that is under way."""
    before = _under_way.pop(mesh.control, None)
    if before is not None and not before.was_awaited:
        before.wait()


def load_training_state(
    directory: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    specs: Mapping[str, ShardSpec],
    mesh: ParallelMesh,
) -> dict[str, Any]:
    """Continue from a checkpoint of `save_training_state`, at any layout. Collective: every rank of the job.

    Resume only checkpoints that you trust: torch.distributed.checkpoint reads its file `.metadata` with pickle, which
    can run any code. Everything else is read without.

    Args:
        directory: The checkpoint.
        model: The parallel model, of the same parameters in the same types.
        optimizer: An optimizer of the same class and parameter groups; its state need not exist yet.
        specs: Local parameter name -> how it lies in the unsplit model.
        mesh: The process groups.

    Returns:
        `extra` as it was saved. Random generators continue too (`random_state.py` says how at another layout).

    Raises:
        CheckpointError: The checkpoint does not fit; raised on all ranks, before anything is changed (unless a
            file cannot be read).
    """
    _finish(mesh)
    with _on_all_ranks(mesh):
        reader = _Reader(directory)
        saved = reader.read_metadata().state_dict_metadata
    plain = _read({"optimizer.groups": None, "extra": None, "layout": None}, reader, mesh)
    groups: dict[str, Any] = {}
    with _on_all_ranks(mesh):
        groups = read_groups(model, optimizer, specs)
    everyone = merge_groups(groups, mesh)
    with _on_all_ranks(mesh):
        check_groups(plain["optimizer.groups"], everyone)
        random_state = f"random.{saved_by(plain['layout'], mesh)}"
        state = collect_tensors(model, optimizer, specs, saved) | {random_state: None}
    state = _read(state, reader, mesh)
    set_options(optimizer, plain["optimizer.groups"])
    keys = saved_keys(saved)
    for _, parameter, spec in optimized(model, optimizer, specs):
        values = {key: state[f"optimizer.state.{spec.name}.{key}"] for key in keys.get(spec.name, ())}
        optimizer.state[parameter] = {k: v.tensor if isinstance(v, Sharded) else v for k, v in values.items()}
    set_random_state(state[random_state], plain["layout"], mesh)
    return dict(plain["extra"])


def read_layout(directory: str | os.PathLike[str], mesh: ParallelMesh) -> dict[str, int]:
    """The sizes of the axes, by name, of the job that saved a checkpoint. Collective: every rank of the job.

    Raises:
        CheckpointError: There is none; raised on all ranks.
    """
    layout: dict[str, int] = _read({"layout": None}, _Reader(directory), mesh)["layout"]
    return layout


class _Reader(FileSystemReader):
    """Reads `.metadata` once."""

    _metadata: Metadata | None = None

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        if self._metadata is None:
            if not (Path(self.path) / ".metadata").is_file():
                raise CheckpointError(
                    f"{self.path} holds no complete checkpoint (no file .metadata): pass the folder of one step, or "
                    f"latest_checkpoint(root)"
                )
            self._metadata = super().read_metadata()
        return self._metadata


def _read(state: dict[str, Any], reader: _Reader, mesh: ParallelMesh) -> dict[str, Any]:
    with _on_all_ranks(mesh), _without_warning(), _plain_cause():
        planner, alone = ShardedLoadPlanner(), mesh.control is None
        load(state, storage_reader=reader, planner=planner, process_group=mesh.control, no_dist=alone)
    return state


@contextmanager
def _on_all_ranks(mesh: ParallelMesh) -> Iterator[None]:
    """Raise on all ranks what one of them raises within."""
    problem: CheckpointError | None = None
    try:
        yield
    except CheckpointError as error:
        problem = error
    except Exception as error:
        problem = CheckpointError(f"{type(error).__name__}: {error}")
        problem.__cause__ = error
    agree_on({}, problem, mesh.control)


def _ignore_lonely_warning() -> None:
    """Of DCP, in a process that is alone on purpose."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled")


@contextmanager
def _without_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        _ignore_lonely_warning()
        yield


@contextmanager
def _plain_cause() -> Iterator[None]:
    """Give the cause instead of DCP's bundle of the ranks' tracebacks."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"rank {rank}: {cause}") from error
