"""The paragraph that rank 0 prints after parallelize()."""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch.distributed as dist

from hf_tpp.mesh import ParallelMesh
from hf_tpp.plan.rules import RegionRule
from hf_tpp.sharding import ShardSpec, local_shape

__all__ = ["describe", "describe_probe"]


def describe(
    kind: str, stages: Sequence[int], mesh: ParallelMesh, specs: Mapping[str, ShardSpec], num_bytes: int
) -> str:
    """Say what a model was turned into.

    Args:
        kind: Class name of the model.
        stages: Layers per stage.
        mesh: This rank's place.
        specs: This rank's parameters.
        num_bytes: Bytes of this rank's parameters.

    Collective: every rank of the job.

    Returns:
        One paragraph, the same on every rank: mesh, layers per stage, share of parameters sharded, bytes per rank.
    """
    sharded = sum(_numel(local_shape(spec)) for spec in specs.values() if spec.dim is not None)
    everything = sum(_numel(local_shape(spec)) for spec in specs.values())
    rows = [(sharded, everything, num_bytes)]
    if mesh.control is not None:
        gathered: list[tuple[int, int, int]] = [(0, 0, 0)] * mesh.world_size
        dist.all_gather_object(gathered, rows[0], group=mesh.control)
        rows = gathered
    share = sum(row[0] for row in rows) / sum(row[1] for row in rows)
    sizes = [row[2] for row in rows]
    backend = "" if mesh.replica.group is None else f", {mesh.replica.group.name()}"
    return (
        f"hf_tpp: {kind} on {mesh.world_size} ranks ({mesh.device.type}{backend}): tensor parallel {mesh.tp.size} x "
        f"pipeline {mesh.pp.size} x data {mesh.dp.size}. Layers per stage: {', '.join(map(str, stages))}. "
        f"{share:.1%} of the parameters on a rank are sharded over tp, the rest is replicated there. "
        f"Parameters take {_mib(min(sizes))} to {_mib(max(sizes))} MiB per rank."
    )


def describe_probe(regions: Mapping[str, RegionRule], declined: Mapping[str, str]) -> str:
    """What the probe found in a model: "" if it was not asked, or found nothing to look at.

    Args:
        regions: Name of a module -> its rule.
        declined: Name of a module that stays whole -> why.

    Returns:
        Sentences that go on after those of `describe`.
    """
    found = [
        f"{name} ({rule.kind}: {', '.join(rule.columns)} -> {rule.row})"
        for name, rule in regions.items()
        if rule.found_by == "probe"
    ]
    whole = [f"{name} ({reason})" for name, reason in declined.items()]
    text = f" Found by probe: {_each_once(found)}." if found else ""
    return f"{text} Whole on each rank: {_each_once(whole)}." if whole else text


def _each_once(entries: Iterable[str]) -> str:
    """Blocks that are alike once, their numbers as "*"."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", entry) for entry in entries))


def _numel(shape: Sequence[int]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f}"
