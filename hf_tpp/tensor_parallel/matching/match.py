"""Recognise a region in a module: which pattern its children fit, its head counts, and so its layouts.

Only reads. What fits no pattern stays whole on every rank, which is exact; what fits but cannot be dealt out to the
ranks is refused with the nearest sizes.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from hf_tpp.errors import UnsupportedModelError
from hf_tpp.plan.layout import Block, Layout
from hf_tpp.plan.patterns import HEAD_INPUTS, PATTERNS
from hf_tpp.plan.resolve import HeadCounts, channel_layout, row_layout
from hf_tpp.plan.rules import Channels, Pattern, RegionRule
from hf_tpp.tensor_parallel.attributes import local_attributes
from hf_tpp.tensor_parallel.matching.experts import match_experts
from hf_tpp.tensor_parallel.matching.heads import head_counts
from hf_tpp.tensor_parallel.matching.inside import resolve_inside, summed_parameters
from hf_tpp.tensor_parallel.matching.mixers import match_mixer
from hf_tpp.tensor_parallel.plain_linear import leaves_of, linear_sizes

__all__ = ["check_linears", "find_rule", "fits", "resolve"]

_PER_INPUT = {Channels.TWO_HALVES: 2}
"""Outputs of an MLP's column linear for each input of its row linear; 1 for what is not named."""


def find_rule(name: str, module: nn.Module, config: Any, tp_size: int) -> RegionRule | None:
    """The rule of a module, or None if it stays whole.

    Args:
        name: Of the module, for messages.
        module: Any module of a block, not its children.
        config: Of the (text) model.
        tp_size: Number of tensor-parallel ranks.

    Raises:
        ConfigurationError: Its heads cannot be dealt out to `tp_size` ranks.
        UnsupportedModelError: A linear of the region is quantized or wrapped.
    """
    rule = match_experts(module, tp_size) or match_mixer(module, tp_size)
    if rule is not None:
        return rule
    if getattr(module, "activation_sparsity", 0.0) > 0.0:
        return None  # Gemma 3n keeps the neurons above a quantile of all neurons: no rank can tell alone
    leaves = dict(leaves_of(module))
    for pattern in PATTERNS:
        row = fits(pattern, module, leaves)
        if row is not None:
            check_linears(name, pattern, row, leaves)
            return resolve(pattern, module, leaves, row, None, config, tp_size)
    return None


def _side_by_side(row: Layout, heads: HeadCounts) -> bool:
    """Whether the heads of a rank are neighbours in the full layer: not so for quarters and pairs."""
    return len(row.blocks) == 1 and row.blocks[0].num_units == heads.num_heads


def _class_name(module: nn.Module) -> str:
    """The class, with what its fused layout depends on."""
    kind = type(module).__name__
    if getattr(module, "new_decoder_architecture", False):
        return f"{kind} with key/value groups"
    return f"{kind} with one key/value head" if getattr(module, "multi_query", False) else kind


def fits(pattern: Pattern, module: nn.Module, leaves: Mapping[str, nn.Module]) -> str | None:
    """The name of the row linear if `module`, whose parameterised children are `leaves`, fits `pattern`."""
    if pattern.only and _class_name(module) not in pattern.only:
        return None
    rows = [name for name in leaves if name in pattern.rows]
    if len(rows) != 1 or not pattern.needs & leaves.keys():
        return None
    linears = [leaves[name] for name in (*pattern.columns, *rows) if name in leaves]
    if any(tensor.dim() > 2 for linear in linears for tensor in linear.parameters(recurse=False)):
        return None  # stacked experts in a module of their own (Aria before 5.23)
    if not pattern.at_columns:
        known = {
            *pattern.columns,
            *rows,
            *pattern.convolutions,
            *(name.rpartition(".")[0] for name in pattern.per_head),
        }
        if any(
            name not in known and name.partition(".")[0] not in pattern.inside | pattern.mixing | pattern.norms.keys()
            for name in leaves
        ):
            return None
        own = {name for name, _ in module.named_parameters(recurse=False)}
        if own - pattern.inside - pattern.per_head - pattern.per_kv_head - pattern.per_channel - pattern.outside:
            return None
    return rows[0]


def check_linears(name: str, pattern: Pattern, row: str, leaves: Mapping[str, nn.Module]) -> None:
    """Raise UnsupportedModelError if a linear of the region is not what its name says."""
    for child in (*pattern.columns, row):
        try:
            if child in leaves:
                linear_sizes(leaves[child])
        except ValueError as error:
            raise UnsupportedModelError(
                f"{name}.{child} cannot be cut ({error}): pass the model before it is quantized or wrapped"
            ) from error


def resolve(
    pattern: Pattern,
    module: nn.Module,
    leaves: Mapping[str, nn.Module],
    row: str,
    heads: HeadCounts | None,
    config: Any,
    tp_size: int,
) -> RegionRule | None:
    """Work out the layouts of a module that fits; None if its sizes do not.

    Args:
        pattern: What it fits.
        module: The region's module.
        leaves: Its parameterised children.
        row: Name of the row linear.
        heads: Its head counts, if they are known already.
        config: Of the (text) model.
        tp_size: Number of tensor-parallel ranks.
    """
    columns = {name: linear for name, linear in leaves.items() if name in pattern.columns}
    row_size = linear_sizes(leaves[row])[0]
    attributes: dict[str, int] = {}
    if pattern.kind == "attention":
        heads = heads or head_counts(module, columns, row_size, config)
        if heads is None:
            return None
        heads.check(tp_size)
        local = heads.local(tp_size, Channels.PAIRED_QUERY_HEADS in pattern.columns.values())
        attributes = local_attributes(module, heads, local, pattern.widths, config)
    layouts: dict[str, Layout] = {}
    for name, linear in columns.items():
        layout = channel_layout(pattern.columns[name], heads, linear_sizes(linear)[1], tp_size)
        if layout is None or (heads is None and layout.size != row_size * _PER_INPUT.get(pattern.columns[name], 1)):
            return None
        layouts[name] = layout
    of_row = row_layout({pattern.columns[name] for name in columns}, heads, row_size)
    inside = None if of_row is None else resolve_inside(pattern, module, layouts, of_row, heads, tp_size)
    if of_row is None or inside is None:
        return None
    return RegionRule(
        kind=pattern.kind,
        columns=layouts,
        row=row,
        row_layout=of_row,
        tensors=inside.cuts,
        gathered=inside.gathered,
        summed=() if pattern.at_columns else summed_parameters(module, {*layouts, row}, inside.cuts, pattern.outside),
        head_inputs=tuple(HEAD_INPUTS) if heads else (),
        head_layout=Layout((Block(heads.num_heads),)) if heads and _side_by_side(of_row, heads) else None,
        at_columns=pattern.at_columns,
        outside_inputs=pattern.outside_inputs,
        attributes=attributes,
    )
