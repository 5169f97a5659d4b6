"""From which units need which channels to where a dimension may be cut: integers, no torch.

A *unit* is a run of neighbouring input channels of a row linear that belong together (a head, a neuron); they are
numbered in the order in which they lie there. For each channel of another dimension, the units that depend on it are
known as the bits of a number. A layout is read off when these numbers follow one another as they do in real weights:

    channels    0 1 2 3 4 5 6 7 | 8 9 10 11 | 12 13 14 15         four heads of two channels, two key/value heads
    needed by   0 0 1 1 2 2 3 3 | 01 01 23 23 | 01 01 23 23       -> [4 x 2 | 2 x 2 | 2 x 2]
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from hf_tpp.plan.layout import Block, Layout

__all__ = ["is_shared", "layout_of_needs", "refined", "unit_sizes"]


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring channels that the same units need: units [first, first + num_units)."""

    length: int
    first: int
    num_units: int


def unit_sizes(influences: Sequence[Sequence[int]], size: int) -> list[int]:
    """The sizes that units may have, the smallest first.

    Args:
        influences: For some channels of the columns, the row's channels that depend on them, in order; each of the
            channels influences the row's channel 0.
        size: Input channels of the row linear.

    Returns:
        Lengths of those influences that are a run of neighbours, if they divide `size`. Single channels count only if
        there is nothing else: a value channel is added up by itself, and still belongs to a head.
    """
    lengths = {len(found) for found in influences if list(found) == list(range(len(found)))} - {0}
    fitting = sorted(length for length in lengths if size % length == 0)
    return fitting[1:] if len(fitting) > 1 and fitting[0] == 1 else fitting


def is_shared(needs: Sequence[int], num_units: int) -> bool:
    """Whether all units need all channels, so that nothing can be cut."""
    return all(need == (1 << num_units) - 1 for need in needs)


def layout_of_needs(needs: Sequence[int], num_units: int, num_row_blocks: int) -> Layout | None:
    """The layout of a dimension, so that each unit finds what it needs on its rank.

    Args:
        needs: For each channel, the units that need it, as bits.
        num_units: Units of the row linear.
        num_row_blocks: Blocks of the row linear's layout, of equally many units each.

    Returns:
        The layout; None if the channels are not blocks of equal units in the order of the row's units.
    """
    runs = [_run(need, sum(1 for _ in channels)) for need, channels in groupby(needs)]
    found = [run for run in runs if run is not None]
    if len(found) < len(runs) or num_units % num_row_blocks:
        return None
    blocks = list(_blocks(found, num_units // num_row_blocks))
    return Layout(tuple(block for block in blocks if block is not None)) if blocks and None not in blocks else None


def refined(layout: Layout, factor: int) -> Layout | None:
    """A layout of groups of `factor` units, as a layout of the units; None if they do not divide."""
    if any(block.unit_size % factor for block in layout.blocks):
        return None
    return Layout(tuple(Block(block.num_units * factor, block.unit_size // factor) for block in layout.blocks))


def _run(need: int, length: int) -> _Run | None:
    """None if the units are no neighbours, or there are none."""
    if not need:
        return None
    first = (need & -need).bit_length() - 1
    num_units = need.bit_count()
    return _Run(length, first, num_units) if need >> first == (1 << num_units) - 1 else None


def _blocks(runs: Sequence[_Run], units_each: int) -> Iterator[Block | None]:
    """Blocks that go once through the units of one of the row's blocks, of `units_each`; None where one does not."""
    position = 0
    while position < len(runs):
        begin = runs[position]
        count = units_each // begin.num_units
        block = runs[position : position + count]
        expected = [
            _Run(begin.length, begin.first + index * begin.num_units, begin.num_units) for index in range(count)
        ]
        if not count or units_each % begin.num_units or begin.first % units_each or list(block) != expected:
            yield None
            return
        yield Block(count, begin.length)
        position += count
