"""From needs to layouts: the numbers alone, drawn as the weights store them."""

import pytest

from hf_tpp.plan.dependence import is_shared, layout_of_needs, refined, unit_sizes
from hf_tpp.plan.layout import Block, Layout


def bits(*units: str) -> list[int]:
    """ "01" -> units 0 and 1."""
    return [sum(1 << int(unit) for unit in channel) for channel in units]


def layout(*blocks: tuple[int, int]) -> Layout:
    return Layout(tuple(Block(*block) for block in blocks))


@pytest.mark.parametrize(
    ("needs", "num_units", "num_row_blocks", "expected"),
    [
        ("0 0 1 1 2 2", 3, 1, layout((3, 2))),
        ("0 1 2 3 0 1 2 3", 4, 1, layout((4, 1), (4, 1))),
        ("0 0 1 1 2 2 3 3 01 01 23 23 01 01 23 23", 4, 1, layout((4, 2), (2, 2), (2, 2))),
        ("0 0 1 1 2 2 3 3 0123 0123 0123 0123", 4, 1, layout((4, 2), (1, 4))),
        ("0 1 0 1 0 1 2 3 2 3 2 3", 4, 2, layout(*[(2, 1)] * 6)),
    ],
    ids=["heads", "gate and up", "grouped heads", "one key/value head", "two blocks of [q|k|v]"],
)
def test_layouts(needs, num_units, num_row_blocks, expected):
    assert layout_of_needs(bits(*needs.split()), num_units, num_row_blocks) == expected


@pytest.mark.parametrize(
    ("needs", "num_units", "num_row_blocks"),
    [
        ("1 0", 2, 1),
        ("0 1 1 0", 2, 1),
        ("02 13 02 13", 4, 1),
        ("0 1 2", 4, 1),
        ("0 0 1", 2, 1),
        ("0 1 2", 3, 2),
    ],
    ids=["order", "order in a block", "no neighbours", "one is missing", "unequal", "blocks do not divide"],
)
def test_what_is_no_layout(needs, num_units, num_row_blocks):
    assert layout_of_needs(bits(*needs.split()), num_units, num_row_blocks) is None


def test_a_channel_that_nothing_needs_is_no_layout():
    assert layout_of_needs([1, 0, 2, 2], 2, 1) is None


def test_shared():
    assert is_shared(bits("01", "01"), 2)
    assert not is_shared(bits("01", "1"), 2)


def test_refined():
    assert refined(layout((4, 6), (4, 3)), 3) == layout((12, 2), (12, 1))
    assert refined(layout((4, 5)), 3) is None


def test_unit_sizes():
    assert unit_sizes([[0, 1, 2, 3], [0], list(range(8))], 16) == [4, 8]
    assert unit_sizes([[0], [0]], 16) == [1]
    assert unit_sizes([[0, 4], [1, 2], []], 16) == []
    assert unit_sizes([[0, 1, 2]], 16) == []
