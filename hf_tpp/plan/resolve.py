"""From a family's table row to layouts for one configuration, or a refusal with the nearest sizes that work."""

from collections.abc import Mapping
from dataclasses import dataclass

from hf_tpp.errors import ConfigurationError, UnsupportedModelError
from hf_tpp.plan.families import FAMILIES
from hf_tpp.plan.layout import Block, Layout
from hf_tpp.plan.rules import Family, Fused, Region, RegionRule, Units

__all__ = ["HeadCounts", "family_of", "resolve_region"]


@dataclass(frozen=True, slots=True)
class HeadCounts:
    """Attention heads of a model: `num_heads` query heads, `num_kv_heads` key/value heads."""

    num_heads: int
    num_kv_heads: int

    def check(self, tp_size: int) -> None:
        """Raise ConfigurationError unless the heads can be dealt out evenly to `tp_size` ranks."""
        fitting = [size for size in range(1, self.num_heads + 1) if self._fits(size)]
        if not self._fits(tp_size):
            below = max((size for size in fitting if size < tp_size), default=1)
            above = min((size for size in fitting if size > tp_size), default=None)
            nearest = f"tp={below}" + (f" or tp={above}" if above else "")
            raise ConfigurationError(
                f"tp={tp_size} does not divide {self.num_heads} attention heads with {self.num_kv_heads} "
                f"key/value heads: use {nearest}"
            )

    def _fits(self, tp_size: int) -> bool:
        kv_fits = self.num_kv_heads % tp_size == 0 or tp_size % self.num_kv_heads == 0
        return self.num_heads % tp_size == 0 and kv_fits


def family_of(model_type: str) -> Family:
    """The table row of a `model_type`.

    Raises:
        UnsupportedModelError: The family has no row.
    """
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedModelError(
            f"the model family {model_type!r} has no tensor-parallel plan and is not known to be exact in parallel: "
            f"use one of {known}"
        )
    return FAMILIES[model_type]


def resolve_region(
    region: Region, heads: HeadCounts, column_sizes: Mapping[str, int], row_size: int, tp_size: int
) -> RegionRule:
    """Work out the layouts of one region.

    Args:
        region: The family's table row.
        heads: Head counts of the model.
        column_sizes: Child name -> output channels of the full linear.
        row_size: Input channels of the full row linear.
        tp_size: Number of tensor-parallel ranks.

    Returns:
        The region with a layout for every linear and the local values of the parent's attributes.
    """
    attention = any(kind is not Units.NEURONS for kind in region.columns.values())
    columns = {name: _column_layout(kind, heads, column_sizes[name]) for name, kind in region.columns.items()}
    row = _units(heads.num_heads if attention else row_size, row_size)
    attributes: dict[str, int] = {}
    if region.group_size is not None:
        local_kv_heads = max(heads.num_kv_heads // tp_size, 1)
        attributes[region.group_size] = heads.num_heads // tp_size // local_kv_heads
    return RegionRule(region, columns, row, attributes)


def _column_layout(kind: Units | Fused, heads: HeadCounts, size: int) -> Layout:
    match kind:
        case Units.NEURONS:
            return _units(size, size)
        case Units.QUERY_HEADS | Fused.QKV_PER_HEAD:
            return _units(heads.num_heads, size)
        case Units.KEY_VALUE_HEADS:
            return _units(heads.num_kv_heads, size)
        case Fused.QKV_BLOCKS:
            head_size = size // (heads.num_heads + 2 * heads.num_kv_heads)
            counts = (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads)
            return Layout(tuple(Block(count, head_size) for count in counts))


def _units(num_units: int, size: int) -> Layout:
    unit_size, rest = divmod(size, num_units)
    if rest:
        raise UnsupportedModelError(f"{size} channels are not made of {num_units} equal units: not a layout we know")
    return Layout((Block(num_units, unit_size),))
