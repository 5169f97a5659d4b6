"""How a model was cut, as rows for a reader: read off the parallel model itself, not off what was planned."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from hf_tpp.plan.layout import Layout
from hf_tpp.sharding import ShardSpec
from hf_tpp.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from hf_tpp.tensor_parallel.region import RegionEntry

__all__ = ["PlanRow", "merge_rows", "plan_rows", "sharded_share"]


@dataclass(frozen=True, order=True)
class PlanRow:
    """One module, or the same module of several blocks.

    Attributes:
        module: Its name, block numbers as "*".
        cut: column, row, vocabulary, split (a cut parameter of some other module) or replicated.
        layout: How the cut dimension is dealt out: units x unit size of each fused block.
        found_by: Of a module in a region: names, plan or probe.
    """

    module: str
    cut: str
    layout: str
    found_by: str = ""


def plan_rows(model: nn.Module, specs: Mapping[str, ShardSpec]) -> list[PlanRow]:
    """The rows of the modules that have parameters on this rank.

    Args:
        model: A parallel model.
        specs: Local parameter name -> how it lies.

    Returns:
        Rows in the order of the modules, each once.
    """
    rows: dict[PlanRow, None] = {}
    regions: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(entry := getattr(module, "region_entry", None), RegionEntry):
            regions[f"{name}."] = entry.rule.found_by
        own = [specs[key] for child, _ in module.named_parameters(recurse=False) if (key := f"{name}.{child}") in specs]
        if own:
            cut = next((spec for spec in own if spec.dim is not None), own[0])
            layout = "" if cut.layout is None else describe_layout(cut.layout)
            found_by = next((how for region, how in regions.items() if f"{name}.".startswith(region)), "")
            rows[PlanRow(re.sub(r"\.\d+(?=\.|$)", ".*", name), _kind(module, cut), layout, found_by)] = None
    return list(rows)


def merge_rows(ranks: Iterable[Iterable[PlanRow]]) -> list[PlanRow]:
    """The rows of all stages, each once."""
    return list(dict.fromkeys(row for rows in ranks for row in rows))


def describe_layout(layout: Layout) -> str:
    """[4 x 16 | 2 x 16 | 2 x 16]: blocks side by side, each of so many units of so many channels."""
    text = " | ".join(f"{block.num_units} x {block.unit_size}" for block in layout.blocks)
    return f"[{text}]" + (f" padded to {layout.padded_local_size} a rank" if layout.padded_local_size else "")


def _kind(module: nn.Module, spec: ShardSpec) -> str:
    if spec.dim is None:
        return "replicated"
    if isinstance(module, VocabParallelEmbedding) or (spec.layout is not None and spec.layout.padded_local_size):
        return "vocabulary"
    if isinstance(module, ColumnParallelLinear):
        return "column"
    return "row" if isinstance(module, RowParallelLinear) else "split"


def sharded_share(specs: Iterable[ShardSpec], blocks: str) -> float:
    """The share of the elements of the blocks' parameters that do not lie on every tensor-parallel rank.

    Args:
        specs: Of all parameters of the model, on any rank.
        blocks: Name of the list of blocks.

    Returns:
        0 to 1; 0 for a model whose blocks have no parameters.
    """
    by_name = {spec.name: spec for spec in specs if spec.name.startswith(blocks + ".")}
    total = sum(math.prod(spec.full_shape) for spec in by_name.values())
    cut = sum(_cut_elements(spec) for spec in by_name.values())
    return cut / total if total else 0.0


def _cut_elements(spec: ShardSpec) -> float:
    if spec.dim is None or spec.tp_size == 1:
        return 0.0
    channels = sum(
        segment.size / segment.num_copies
        for tp_rank in range(spec.tp_size)
        for segment in spec.at_rank(tp_rank).segments
        if segment.num_copies < spec.tp_size
    )
    return math.prod(spec.full_shape) * channels / spec.full_shape[spec.dim]
