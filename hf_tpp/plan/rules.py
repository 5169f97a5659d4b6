"""What a plan is made of: which linears form a region, where their channels may be cut. Plain data, no torch.

A *region* is one pair Y = f(X A) B in the sense of Megatron-LM: column-parallel linears that read the same input, a
computation that stays inside one rank's heads or neurons, and the row-parallel linear that sums the result up.

    region        module       columns                     row          what else is inside
    attention     self_attn    q_proj, k_proj, v_proj      o_proj       q_norm, k_norm, sinks
    MLP           mlp          gate_proj, up_proj          down_proj    parameters of the activation
    experts       experts      gate_up_proj                down_proj    down_proj_bias

Source: Shoeybi et al. 2019, "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism".
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from hf_tpp.plan.layout import Layout

__all__ = ["Channels", "Cut", "Pattern", "Region", "RegionRule"]


class Channels(Enum):
    """What the output channels of a column-parallel linear are, and so where they may be cut."""

    NEURONS = "neurons"
    """Independent channels: cut anywhere."""
    NEURON_PAIRS = "neuron pairs"
    """[gate0 up0 gate1 up1 ...]: cut between pairs."""
    TWO_HALVES = "[gate|up]"
    """All gates, then all ups: cut each half."""
    QUERY_HEADS = "query heads"
    """[q0 q1 ...]: cut between heads."""
    KEY_VALUE_HEADS = "key/value heads"
    """[k0 k1 ...]: cut between heads, replicated when there are fewer heads than ranks."""
    QKV_BLOCKS = "[q|k|v]"
    """All query heads, then all key heads, then all value heads (GPT-2, Phi-3)."""
    QKV_PER_HEAD = "per head [q k v]"
    """For each head its q, k and v (GPT-NeoX, BLOOM)."""
    QKV_PER_GROUP = "per key/value group [q.. k v]"
    """For each key/value head its query heads, then itself (Falcon's newer layout)."""
    QVK_QUARTERS = "4 x [q|v|k]"
    """Four blocks, each [q|v|k] of a quarter of the heads (CodeGen); a rank takes a share of each."""
    PAIRED_QUERY_HEADS = "query heads i and i + n/2"
    """Two halves whose heads belong together in pairs (differential attention)."""
    PAIRED_KEY_VALUE_HEADS = "key/value heads i and i + n/2"
    """The same for keys and values."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A kind of region, recognised by the names of a module's parameterised children and of its own parameters.

    A module fits if each of its children has a role here: one that is not named might do anything with the channels,
    and then the module stays whole on every rank.

    Attributes:
        kind: "attention", "MLP", ...
        rows: Names of the row linear, one of which must be there.
        columns: Name of a column linear -> what its output channels are.
        needs: Columns of which at least one must be there.
        inside: Children and parameters that every rank keeps whole and uses on its own part.
        norms: Child -> the linear whose channels it normalises ("query", "key", "value", "row"), per head or all.
        per_head: Parameters with one entry per query head.
        per_kv_head: Parameters with one entry per key/value head.
        per_channel: Parameters with one entry per input channel of the row linear.
        mixing: Child that reads the channels of all key/value heads and gives one number for each head.
        convolutions: Depthwise convolution -> the linear whose channels it convolves ("key", "value").
        outside: Parameters that join behind the row linear, and so see replicated activations.
        at_columns: The region is entered at each column linear, not at the module: children that are not named here
            work on replicated activations.
        outside_inputs: Arguments of the module that join behind the row linear (a residual).
        only: Class names that this pattern is for; empty for any.
        widths: Further attributes of the module that hold the number of all channels.
    """

    kind: str
    rows: frozenset[str]
    columns: Mapping[str, Channels]
    needs: frozenset[str]
    inside: frozenset[str] = frozenset()
    norms: Mapping[str, str] = field(default_factory=dict)
    per_head: frozenset[str] = frozenset()
    per_kv_head: frozenset[str] = frozenset()
    per_channel: frozenset[str] = frozenset()
    mixing: frozenset[str] = frozenset()
    convolutions: Mapping[str, str] = field(default_factory=dict)
    outside: frozenset[str] = frozenset()
    at_columns: bool = False
    outside_inputs: frozenset[str] = frozenset()
    only: frozenset[str] = frozenset()
    widths: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Region:
    """A region of a user's own model, for `parallelize(plan={"model.layers.*.mlp": Region(...)})`.

    Attributes:
        columns: Child -> what its output channels are, as `Channels` or its text ("neurons", "query heads", ...).
        row: Child that sums the region up.
        num_heads: Query heads of the module; None for an MLP.
        num_kv_heads: Its key/value heads; default: as many.
        inside: Children and own parameters between the columns and the row that every rank keeps whole. Others must not
            have parameters.
        per_head: Parameters of the module with one entry per query head.
        local: Attribute of the module -> value that it must have on a rank. Head counts under their usual names
            (num_heads, num_key_value_heads, num_key_value_groups, ...) are found without being named here.
    """

    columns: Mapping[str, Channels | str]
    row: str
    num_heads: int | None = None
    num_kv_heads: int | None = None
    inside: frozenset[str] = frozenset()
    per_head: frozenset[str] = frozenset()
    local: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cut:
    """Dimension `dim` of a tensor is cut as `layout` says."""

    dim: int
    layout: Layout


@dataclass(frozen=True, slots=True)
class RegionRule:
    """A region with its layouts worked out for one module of one model and one tp size.

    Names are relative to the module.

    Attributes:
        kind: Of the pattern.
        columns: Column linear -> layout of its output channels.
        row: Row linear; empty if the module's own output is the partial sum (fused experts).
        row_layout: Layout of the row's input channels.
        tensors: Parameter that is no linear's -> its cut.
        gathered: Child that is shown the channels of all ranks -> layouts of its input and output.
        summed: Parameters of which each rank computes a part of the gradient.
        on_first: Parameters and children that add to the partial sum, and so count on the first rank only.
        head_inputs: Arguments with one slice per query head.
        head_layout: Layout of the query heads, one channel each.
        at_columns: Entered at the columns, not at the module.
        outside_inputs: Arguments that join behind the row linear.
        attributes: Attribute (of the module or, dotted, of a child or its config) -> local value.
        found_by: "names", "plan" (the user's) or "probe".
    """

    kind: str
    columns: Mapping[str, Layout]
    row: str
    row_layout: Layout
    tensors: Mapping[str, Cut] = field(default_factory=dict)
    gathered: Mapping[str, tuple[Layout, Layout]] = field(default_factory=dict)
    summed: tuple[str, ...] = ()
    on_first: tuple[str, ...] = ()
    head_inputs: tuple[str, ...] = ()
    head_layout: Layout | None = None
    at_columns: bool = False
    outside_inputs: frozenset[str] = frozenset()
    attributes: Mapping[str, int] = field(default_factory=dict)
    found_by: str = "names"
