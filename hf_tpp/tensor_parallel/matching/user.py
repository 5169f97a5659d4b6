"""Regions that the user describes, in the words of the table; checked against the module before anything changes."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from hf_tpp.errors import ConfigurationError
from hf_tpp.plan.resolve import HeadCounts
from hf_tpp.plan.rules import Channels, Pattern, Region, RegionRule
from hf_tpp.tensor_parallel.matching.match import check_linears, fits, resolve
from hf_tpp.tensor_parallel.plain_linear import leaves_of

__all__ = ["UserPlan", "resolve_user_region"]

UserPlan = Mapping[str, Region | None]
"""Pattern of module names, as in "model.layers.*.mlp" -> its region, or None: it stays whole."""

_OF_HEADS = frozenset(Channels) - {Channels.NEURONS, Channels.NEURON_PAIRS, Channels.TWO_HALVES}


def resolve_user_region(name: str, module: nn.Module, region: Region, config: Any, tp_size: int) -> RegionRule:
    """The rule of a region that the user described.

    Args:
        name: Of the module, for messages.
        module: The region's module.
        region: The description.
        config: Of the (text) model.
        tp_size: Number of tensor-parallel ranks.

    Raises:
        ConfigurationError: The module does not look like the description, or cannot be cut so.
    """
    columns = {child: _channels(name, child, kind) for child, kind in region.columns.items()}
    needs_heads = any(kind in _OF_HEADS for kind in columns.values())
    if needs_heads and not region.num_heads:
        raise ConfigurationError(f"plan[{name!r}] cuts between heads but has num_heads=None: give num_heads")
    leaves = dict(leaves_of(module))
    missing = [child for child in (*columns, region.row) if child not in leaves]
    if missing:
        raise ConfigurationError(
            f"plan[{name!r}] names {', '.join(missing)}, but the module's children with parameters are "
            f"{', '.join(leaves) or 'none'}: use their names"
        )
    pattern = Pattern(
        kind="attention" if needs_heads else "MLP",
        rows=frozenset({region.row}),
        columns=columns,
        needs=frozenset(columns),
        inside=region.inside,
        per_head=region.per_head,
    )
    if fits(pattern, module, leaves) is None:
        raise ConfigurationError(
            f"plan[{name!r}] does not say what happens to all parameters of {type(module).__name__} "
            f"({', '.join(key for key, _ in module.named_parameters())}): name those between columns and row as inside"
        )
    check_linears(name, pattern, region.row, leaves)
    heads = HeadCounts(region.num_heads, region.num_kv_heads or region.num_heads) if region.num_heads else None
    rule = resolve(pattern, module, leaves, region.row, heads, config, tp_size)
    if rule is None:
        raise ConfigurationError(
            f"plan[{name!r}] does not fit the sizes of {type(module).__name__}: the channels of its linears are not "
            f"made of the heads or neurons that the plan names"
        )
    return replace(rule, attributes={**rule.attributes, **region.local}, found_by="plan")


def _channels(name: str, child: str, kind: Channels | str) -> Channels:
    try:
        return Channels(kind)
    except ValueError:
        known = ", ".join(repr(known.value) for known in Channels)
        raise ConfigurationError(f"plan[{name!r}] calls the channels of {child} {kind!r}: use one of {known}") from None
