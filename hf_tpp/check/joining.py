"""Full tensors from the shards of all ranks, and the places where ranks disagree about what they share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from hf_tpp.sharding import ShardSpec, unshard

__all__ = ["Place", "RankTensors", "join"]

_NOT_OF_THE_MODEL = "hf_tpp_residual."


@dataclass(frozen=True, order=True)
class Place:
    """A rank's position on the axes of the mesh."""

    pp_rank: int = 0
    dp_rank: int = 0
    tp_rank: int = 0

    def __str__(self) -> str:
        return f"stage {self.pp_rank}, tp rank {self.tp_rank}" + (f", replica {self.dp_rank}" if self.dp_rank else "")


@dataclass
class RankTensors:
    """Tensors of one rank: gradients or weights.

    Attributes:
        place: The rank.
        tensors: Local parameter name -> this rank's shard.
        specs: Local parameter name -> how it lies in the unsplit model.
    """

    place: Place
    tensors: Mapping[str, torch.Tensor]
    specs: Mapping[str, ShardSpec]


def join(ranks: Sequence[RankTensors]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Put the shards of all ranks together.

    Args:
        ranks: Every rank of the job.

    Returns:
        Full tensors by canonical name, and one sentence for every rank whose copy of a piece is not bit for bit the one
        in the full tensor, or that lacks its shard.
    """
    shards: dict[str, dict[Place, tuple[torch.Tensor, ShardSpec]]] = {}
    for rank in ranks:
        for name, tensor in rank.tensors.items():
            if not name.startswith(_NOT_OF_THE_MODEL):
                shards.setdefault(rank.specs[name].name, {})[rank.place] = tensor, rank.specs[name]
    full: dict[str, torch.Tensor] = {}
    problems: list[str] = []
    for name, held in shards.items():
        first = min(held)
        spec = held[first][1]
        line = [Place(first.pp_rank, first.dp_rank, tp_rank) for tp_rank in range(spec.tp_size)]
        if missing := [place.tp_rank for place in line if place not in held]:
            problems.append(f"{name}: tp rank {', '.join(map(str, missing))} of stage {first.pp_rank} has none")
            continue
        full[name] = unshard([held[place][0] for place in line], spec)
        problems += [
            f"{name}: {place} differs from the copy of another rank"
            for place, (local, there) in sorted(held.items(), key=lambda item: item[0])
            if not _agrees(local, there, full[name])
        ]
    return full, problems


def _agrees(local: torch.Tensor, spec: ShardSpec, full: torch.Tensor) -> bool:
    if spec.dim is None:
        return torch.equal(local, full)
    pieces = [
        torch.equal(spec.narrow(local, segment), full.narrow(spec.dim, segment.start, segment.size))
        for segment in spec.segments
    ]
    return all(pieces)
