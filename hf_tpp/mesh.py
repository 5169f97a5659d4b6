"""Which rank does what: the only place that creates process groups.

global_rank = (dp_rank * pp_size + pp_rank) * tp_size + tp_rank

dp=2, pp=2, tp=2      stage 0   stage 1
    replica 0           0 1       2 3         tp ranks are neighbours (NVLink), then stages, then replicas;
    replica 1           4 5       6 7         accelerate and the data loaders number replicas the same way
"""

import atexit
import functools
import os
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hf_tpp.errors import ConfigurationError

__all__ = [
    "Axis",
    "ParallelMesh",
    "check_world",
    "control_group",
    "default_device_type",
    "initialize_distributed",
    "local_device",
]

Group = dist.ProcessGroup
SECONDS_TO_LET_GO = 0.2  # a thread of a group needs microseconds; with more processes than cores, longer


@dataclass(frozen=True, slots=True)
class Axis:
    """This rank's place on one axis of the mesh.

    Attributes:
        rank: Position on the axis.
        size: Ranks on the axis.
        group: Its process group; None if `size` is 1.
        global_ranks: The global rank at each position.
    """

    rank: int
    size: int
    group: Group | None
    global_ranks: tuple[int, ...]

    @property
    def is_first(self) -> bool:
        """True on position 0."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """True on the last position."""
        return self.rank == self.size - 1


def initialize_distributed(device_type: str | None = None, timeout: timedelta | None = None) -> int:
    """Start torch.distributed if a launcher asked for several processes and nobody did it yet.

    Args:
        device_type: "cuda" for NCCL, "cpu" for gloo alone; default: whatever the machine has.
        timeout: Limit for one collective.

    Returns:
        World size; 1 without a launcher.
    """
    if dist.is_initialized():
        _end_with_interpreter()
        return dist.get_world_size()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return 1
    use_cuda = torch.cuda.is_available() if device_type is None else device_type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    if use_cuda:
        torch.cuda.set_device(local_device("cuda"))
    dist.init_process_group(backend, timeout=timeout)
    _end_with_interpreter()
    return world_size


@functools.cache
def _end_with_interpreter() -> None:
    atexit.register(_end_distributed)


def _end_distributed() -> None:
    """End the groups while the interpreter still lives: a thread of theirs that lets go of the last tensor needs it.

    Without this a process aborts now and then at its exit ("terminate called without an active exception"). A group
    that a module still holds keeps its threads, whoever ended it, and they cannot be joined: they get time to let go of
    what they hold. After an exception the others may be waiting within a collective, and ending it in order would wait
    for them.
    """
    if hasattr(sys, "last_type"):
        return
    if dist.is_initialized():
        dist.destroy_process_group()
    time.sleep(SECONDS_TO_LET_GO)


def default_device_type() -> str:
    """The kind of device that the ranks of this job use unless they are told otherwise."""
    uses_nccl = not dist.is_initialized() or "nccl" in dist.get_backend_config()
    return "cuda" if torch.cuda.is_available() and uses_nccl else "cpu"


def local_device(device_type: str | None = None) -> torch.device:
    """The device of this rank: its own GPU (by LOCAL_RANK) or the CPU."""
    device_type = device_type or default_device_type()
    if device_type != "cuda":
        return torch.device(device_type)
    index = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
    if index >= torch.cuda.device_count():
        raise ConfigurationError(
            f"LOCAL_RANK={index} but this machine shows {torch.cuda.device_count()} GPUs: start one process per GPU"
        )
    return torch.device("cuda", index)


def control_group() -> Group | None:
    """A gloo group of all ranks for host data; None in a world of one. Collective."""
    return dist.new_group(backend="gloo") if dist.is_initialized() and dist.get_world_size() > 1 else None


def check_world(world_size: int, tp_size: int, pp_size: int) -> int:
    """The number of data-parallel replicas.

    Raises:
        ConfigurationError: tp x pp does not divide the world size.
    """
    for name, size in (("tp", tp_size), ("pp", pp_size)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigurationError(f"{name}={size!r} is not a positive whole number: use {name}=1 for none")
    replica_size = tp_size * pp_size
    if world_size % replica_size:
        raise ConfigurationError(
            f"tp={tp_size} x pp={pp_size} = {replica_size} ranks do not divide the world of {world_size} processes: "
            f"start a multiple of {replica_size} processes (torchrun --nproc-per-node {replica_size}) or choose "
            f"sizes whose product divides {world_size}"
        )
    return world_size // replica_size


@dataclass(frozen=True, slots=True)
class ParallelMesh:
    """Every process group of a parallel model, seen from this rank.

    Attributes:
        device: Where this rank's shards live.
        tp: Tensor-parallel axis.
        pp: Pipeline axis; the position is the stage.
        dp: Data-parallel axis.
        replica: tp x pp: the ranks that hold one whole model.
        forward_group: The pipeline's ranks, for activations.
        backward_group: The same ranks again, so that gradients travel beside the activations.
        control: gloo group of all ranks, for host data; None in a world of one.
        replica_control: gloo group of the replica.
        dp_control: gloo group of the data-parallel axis; None if `dp.size` is 1.
        replicas: The data-parallel axis as torch's DTensor and FSDP take it; None in a world of one.
    """

    device: torch.device
    tp: Axis
    pp: Axis
    dp: Axis
    replica: Axis
    forward_group: Group | None = None
    backward_group: Group | None = None
    control: Group | None = None
    replica_control: Group | None = None
    dp_control: Group | None = None
    replicas: DeviceMesh | None = None
    _background: list[Group] = field(default_factory=list, repr=False)
    _neighbours: dict[int, Group] = field(default_factory=dict, repr=False)
    _stage_groups: dict[tuple[int, ...], Group | None] = field(default_factory=dict, repr=False)

    @classmethod
    def create(cls, tp_size: int, pp_size: int, device: torch.device, control: Group | None = None) -> "ParallelMesh":
        """Build all groups.

        Args:
            tp_size: Tensor-parallel ranks.
            pp_size: Stages.
            device: Where this rank's shards live.
            control: What `control_group()` gave, if it was called before.

        Collective: every process of the job, with the same sizes.

        Returns:
            The mesh as this rank sees it.
        """
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        dp_size = check_world(world_size, tp_size, pp_size)
        if world_size == 1:
            alone = Axis(0, 1, None, (0,))
            return cls(device, alone, alone, alone, alone)
        mesh = init_device_mesh(device.type, (dp_size, pp_size, tp_size), mesh_dim_names=("dp", "pp", "tp"))
        ranks = mesh.mesh

        def axis(name: str) -> Axis:
            group = mesh.get_group(name)
            members = tuple(dist.get_process_group_ranks(group))
            return Axis(dist.get_rank(group), len(members), group if len(members) > 1 else None, members)

        tp, pp, dp = axis("tp"), axis("pp"), axis("dp")
        replicas = ranks.reshape(dp_size, -1).tolist()
        pipelines = ranks.transpose(1, 2).reshape(-1, pp_size).tolist()
        replica_group = _subgroup(replicas)
        replica = Axis(pp.rank * tp_size + tp.rank, tp_size * pp_size, replica_group, tuple(replicas[dp.rank]))
        has_pipeline = pp_size > 1
        return cls(
            device=device,
            tp=tp,
            pp=pp,
            dp=dp,
            replica=replica,
            forward_group=_subgroup(pipelines) if has_pipeline else None,
            backward_group=_subgroup(pipelines) if has_pipeline else None,
            control=control or control_group(),
            replica_control=_subgroup(replicas, backend="gloo"),
            dp_control=_subgroup(ranks.reshape(dp_size, -1).T.tolist(), backend="gloo"),
            replicas=mesh["dp"],
        )

    @property
    def world_size(self) -> int:
        """All processes."""
        return self.replica.size * self.dp.size

    @property
    def global_rank(self) -> int:
        """This process among all."""
        return self.replica.global_ranks[self.replica.rank]

    def tp_twin(self) -> Group | None:
        """A second group of the tp ranks, whose collectives do not wait for those of the first; None if tp is 1.

        Collective: must be called by every process.
        """
        return _subgroup(torch.arange(self.world_size).reshape(-1, self.tp.size).tolist())

    def background_group(self) -> Group | None:
        """A gloo group of all ranks for host data of a thread beside training; None in a world of one.

        Collective: the first call must be made by every process.
        """
        if self.control is not None and not self._background:
            self._background.append(dist.new_group(backend="gloo"))
        return self._background[0] if self._background else None

    def neighbours(self, num_copies: int) -> Group | None:
        """The `num_copies` neighbouring tp ranks that share a replicated unit, this rank's among them.

        Collective: the first call for a given `num_copies` must be made by every process.
        """
        if num_copies == 1:
            return None
        if num_copies == self.tp.size:
            return self.tp.group
        if num_copies not in self._neighbours:
            runs = torch.arange(self.world_size).reshape(-1, num_copies).tolist()
            group = _subgroup(runs)
            assert group is not None
            self._neighbours[num_copies] = group
        return self._neighbours[num_copies]

    def stage_group(self, stages: tuple[int, ...]) -> Group | None:
        """The ranks of some stages with the same tp_rank, this one among them; None for a stage alone.

        Collective: the first call for given `stages` must be made by every process.
        """
        if len(stages) == 1:
            return None
        if len(stages) == self.pp.size:
            return self.pp.group
        if stages not in self._stage_groups:
            ranks = torch.arange(self.world_size).view(self.dp.size, self.pp.size, self.tp.size)
            lines = ranks[:, list(stages)].transpose(1, 2).reshape(-1, len(stages))
            self._stage_groups[stages] = _subgroup(lines.tolist())
        return self._stage_groups[stages]


def _subgroup(partition: list[list[int]], backend: str | None = None) -> Group | None:
    """This rank's group in a partition of (some of) the ranks; None if it is alone or in none."""
    if all(len(ranks) == 1 for ranks in partition):
        return None
    mine: Group | None = None
    for ranks in partition:
        group = dist.new_group(ranks, backend=backend)
        if dist.get_rank() in ranks:
            mine = group
    return mine
