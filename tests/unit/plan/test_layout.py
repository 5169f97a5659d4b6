"""Layouts: every channel has its place, and cutting and joining is the identity, bit for bit."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_tpp.errors import ConfigurationError
from hf_tpp.plan.layout import Block, Layout, Segment, padded_vocabulary
from hf_tpp.sharding import ShardSpec, local_shape, shard, unshard


@st.composite
def dealt(draw: st.DrawFn) -> tuple[Layout, int]:
    """A layout and a tp size that its blocks can be dealt out to: enough units, or units that can be copied."""
    tp_size = draw(st.integers(1, 8))
    divisors = [units for units in range(1, tp_size) if tp_size % units == 0]
    units = st.one_of(st.integers(tp_size, 3 * tp_size + 2), *([st.sampled_from(divisors)] if divisors else []))
    blocks = draw(st.lists(st.builds(Block, units, st.integers(1, 5)), min_size=1, max_size=4))
    return Layout(tuple(blocks)), tp_size


vocabularies = st.builds(
    lambda vocab_size, tp_size: (padded_vocabulary(vocab_size, tp_size), tp_size),
    st.one_of(st.integers(1, 300), st.integers(4000, 40_000)),
    st.integers(1, 8),
)
layouts = st.one_of(dealt(), vocabularies)


@given(layouts)
def test_every_channel_is_held_num_copies_times(case):
    layout, tp_size = case
    held, promised = Counter(), {}
    for rank in range(tp_size):
        for piece in layout.segments(rank, tp_size):
            for channel in range(piece.start, piece.stop):
                held[channel] += 1
                assert promised.setdefault(channel, piece.num_copies) == piece.num_copies
    assert held == promised
    assert sorted(held) == list(range(layout.size))


@given(layouts)
def test_pieces_lie_side_by_side(case):
    layout, tp_size = case
    for rank in range(tp_size):
        end = 0
        for piece in layout.segments(rank, tp_size):
            assert piece.size > 0
            assert piece.local_start == end
            end += piece.size
        assert layout.valid_size(rank, tp_size) == end <= layout.local_size(rank, tp_size)
        assert layout.padded_local_size or layout.local_size(rank, tp_size) == end


@given(dealt())
def test_units_are_never_cut(case):
    layout, tp_size = case
    cuts, start = set(), 0
    for block in layout.blocks:
        cuts |= set(range(start, start + block.size + 1, block.unit_size))
        start += block.size
    for rank in range(tp_size):
        assert {end for piece in layout.segments(rank, tp_size) for end in (piece.start, piece.stop)} <= cuts


@given(dealt())
def test_blocks_are_dealt_out_evenly(case):
    """No two ranks differ by more than one unit in any block."""
    layout, tp_size = case
    start = 0
    for block in layout.blocks:
        counts = []
        for rank in range(tp_size):
            pieces = layout.segments(rank, tp_size)
            inside = [piece.size for piece in pieces if start <= piece.start < start + block.size]
            counts.append(sum(inside) // block.unit_size)
        assert max(counts) - min(counts) <= 1
        start += block.size


@given(layouts, st.integers(0, 2), st.sampled_from([torch.float32, torch.bfloat16, torch.int64]))
def test_cutting_and_joining_is_the_identity(case, dim, dtype):
    layout, tp_size = case
    shape = [2, 3, 1]
    shape[dim] = layout.size
    full = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    specs = [ShardSpec("weight", tuple(shape), dim, layout, rank, tp_size) for rank in range(tp_size)]
    shards = [
        shard(lambda start, stop: full.narrow(dim, start, stop - start), spec, device=full.device, dtype=dtype)
        for spec in specs
    ]
    for spec, local in zip(specs, shards, strict=True):
        assert tuple(local.shape) == local_shape(spec)
        assert local.untyped_storage().data_ptr() != full.untyped_storage().data_ptr()
        valid = layout.valid_size(spec.tp_rank, tp_size)
        assert not local.narrow(dim, valid, local.shape[dim] - valid).any()
    assert torch.equal(unshard(shards, specs[-1]), full)


@given(st.integers(1, 300_000), st.integers(1, 64))
def test_vocabulary_shards_are_equal_and_barely_padded(vocab_size, tp_size):
    layout = padded_vocabulary(vocab_size, tp_size)
    sizes = {layout.local_size(rank, tp_size) for rank in range(tp_size)}
    (size,) = sizes
    assert sum(layout.valid_size(rank, tp_size) for rank in range(tp_size)) == vocab_size <= size * tp_size
    if tp_size == 1:
        assert size == vocab_size
    elif size > 4096:
        assert size % 64 == 0
        assert size * tp_size - vocab_size < 64 * tp_size
    else:
        assert size * tp_size - vocab_size < tp_size


def test_the_examples_of_the_module():
    fused = Layout((Block(4, 1), Block(4, 1), Block(4, 1)))
    assert fused.segments(0, 2) == (Segment(0, 2, 0), Segment(4, 6, 2), Segment(8, 10, 4))
    assert fused.segments(1, 2) == (Segment(2, 4, 0), Segment(6, 8, 2), Segment(10, 12, 4))
    one_head = Layout((Block(1, 3),))
    assert one_head.segments(0, 2) == one_head.segments(1, 2) == (Segment(0, 3, 0, num_copies=2),)
    vocabulary = padded_vocabulary(131, 2)
    assert vocabulary.segments(0, 2) == (Segment(0, 66, 0),)
    assert vocabulary.segments(1, 2) == (Segment(66, 131, 0),)
    assert [vocabulary.local_size(rank, 2) for rank in range(2)] == [66, 66]


def test_neighbours_share_a_copied_head():
    """Query heads 0 1 | 2 3 belong to key heads 0 | 1: ranks 0 and 1 hold key head 0."""
    layout = Layout((Block(2, 4),))
    assert [layout.segments(rank, 4)[0].start for rank in range(4)] == [0, 0, 4, 4]


@pytest.mark.parametrize("tp_size", [4, 5, 7])
def test_units_that_cannot_be_copied_evenly(tp_size):
    with pytest.raises(ConfigurationError, match=f"tp={tp_size} is no multiple of the 3 units to replicate: use a tp"):
        Layout((Block(3, 2),)).segments(0, tp_size)
