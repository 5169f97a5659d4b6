"""What a plan is made of: which module of a block is cut, how, and which numbers become local. Plain data, no torch.

A *region* is one pair Y = f(X A) B in the sense of Megatron-LM: column-parallel linears that read the same input, a
computation that stays inside one rank's heads or neurons, and the row-parallel linear that sums the result up.

    region        parent module      columns                     row
    attention     self_attn          q_proj, k_proj, v_proj      o_proj
    MLP           mlp                gate_proj, up_proj          down_proj

Source: Shoeybi et al. 2019, "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism".
"""

from dataclasses import dataclass
from enum import Enum

from hf_tpp.plan.layout import Layout

__all__ = ["Family", "Fused", "Region", "RegionRule", "Units"]


class Units(Enum):
    """What the output channels of a column-parallel linear are, and so where they may be cut."""

    NEURONS = "neurons"
    """Independent channels: cut anywhere."""
    QUERY_HEADS = "query heads"
    """[q0 q1 ...]: cut between heads."""
    KEY_VALUE_HEADS = "key/value heads"
    """[k0 k1 ...]: cut between heads, replicated when there are fewer heads than ranks."""


class Fused(Enum):
    """Layout of a weight that computes q, k and v in one product."""

    QKV_BLOCKS = "[q|k|v]"
    """All query heads, then all key heads, then all value heads (GPT-2)."""
    QKV_PER_HEAD = "per head [q k v]"
    """For each head its q, k and v (GPT-NeoX, BLOOM)."""


@dataclass(frozen=True, slots=True)
class Region:
    """A row of a family's table: names relative to the block.

    Attributes:
        parent: Module whose input enters the region and whose children the linears are.
        columns: Child name -> what its output channels are.
        row: Child name of the row-parallel linear.
        divide: Attributes of the parent that count heads or channels: divided by tp.
        group_size: Attribute of the parent that holds query heads per KV head, recomputed from local heads.
    """

    parent: str
    columns: dict[str, Units | Fused]
    row: str
    divide: tuple[str, ...] = ()
    group_size: str | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """How the blocks of one model family are cut."""

    regions: tuple[Region, ...]


@dataclass(frozen=True, slots=True)
class RegionRule:
    """A region with its layouts worked out for one model and one tp size.

    Attributes:
        region: The table row.
        columns: Child name -> layout of its output channels.
        row: Layout of the row-parallel linear's input channels.
        attributes: Attribute of the parent -> its local value.
    """

    region: Region
    columns: dict[str, Layout]
    row: Layout
    attributes: dict[str, int]
