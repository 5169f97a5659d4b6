"""From what the channels are to where they are cut, for one module's sizes; or a refusal with the nearest sizes."""

from dataclasses import dataclass

from hf_tpp.errors import ConfigurationError
from hf_tpp.plan.layout import Block, Layout
from hf_tpp.plan.rules import Channels

__all__ = ["HeadCounts", "channel_layout", "row_layout"]


@dataclass(frozen=True, slots=True)
class HeadCounts:
    """Attention heads of a module: `num_heads` query heads, `num_kv_heads` key/value heads."""

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

    def local(self, tp_size: int, in_pairs: bool) -> "HeadCounts":
        """The heads on one rank; `in_pairs`: it holds both heads of each pair."""
        together = 2 if in_pairs else 1
        return HeadCounts(self.num_heads // tp_size, together * max(self.num_kv_heads // together // tp_size, 1))

    def _fits(self, tp_size: int) -> bool:
        kv_fits = self.num_kv_heads % tp_size == 0 or tp_size % self.num_kv_heads == 0
        return self.num_heads % tp_size == 0 and kv_fits


def channel_layout(kind: Channels, heads: HeadCounts | None, size: int, tp_size: int) -> Layout | None:
    """The layout of `size` output channels of a column linear.

    Args:
        kind: What the channels are.
        heads: Head counts of the module; None for an MLP.
        size: Number of channels in the full layer.
        tp_size: Number of tensor-parallel ranks.

    Returns:
        The layout, or None if the channels are not made of equal units or the units do not divide.
    """
    if kind is Channels.NEURONS:
        return _blocks(1, size, size)
    if kind is Channels.NEURON_PAIRS:
        return _blocks(1, size // 2, size) if size % 2 == 0 else None
    if kind is Channels.TWO_HALVES:
        return _blocks(2, size // 2, size) if size % 2 == 0 else None
    assert heads is not None
    match kind:
        case Channels.QUERY_HEADS | Channels.QKV_PER_HEAD:
            return _blocks(1, heads.num_heads, size)
        case Channels.KEY_VALUE_HEADS:
            return _blocks(1, heads.num_kv_heads, size)
        case Channels.QKV_PER_GROUP:
            return _blocks(1, heads.num_kv_heads, size) if heads.num_kv_heads % tp_size == 0 else None
        case Channels.QKV_BLOCKS:
            head_size, rest = divmod(size, heads.num_heads + 2 * heads.num_kv_heads)
            counts = (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads)
            return None if rest else Layout(tuple(Block(count, head_size) for count in counts))
        case Channels.QVK_QUARTERS:
            return _blocks(12, heads.num_heads // 4, size) if heads.num_heads % (4 * tp_size) == 0 else None
        case Channels.PAIRED_QUERY_HEADS:
            return _blocks(2, heads.num_heads // 2, size) if heads.num_heads % (2 * tp_size) == 0 else None
        case Channels.PAIRED_KEY_VALUE_HEADS:
            pairs = heads.num_kv_heads // 2
            return None if pairs % tp_size and tp_size % pairs else _blocks(2, pairs, size)


def row_layout(kinds: set[Channels], heads: HeadCounts | None, size: int) -> Layout | None:
    """The layout of `size` input channels of a row linear behind columns of these kinds; None if they do not fit."""
    if heads is None:
        return _blocks(1, size, size)
    if Channels.QVK_QUARTERS in kinds:
        return _blocks(4, heads.num_heads // 4, size)
    if Channels.PAIRED_QUERY_HEADS in kinds:
        return _blocks(1, heads.num_heads // 2, size)
    return _blocks(1, heads.num_heads, size)


def _blocks(num_blocks: int, units_each: int, size: int) -> Layout | None:
    if units_each < 1 or size % (num_blocks * units_each):
        return None
    return Layout((Block(units_each, size // (num_blocks * units_each)),) * num_blocks)
