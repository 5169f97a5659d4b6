"""Shards of single parameters: what is read, what is copied, what is counted."""

import pytest
import torch

from hf_tpp.plan.layout import Block, Layout, Segment, padded_vocabulary
from hf_tpp.sharding import ShardSpec, local_shape, shard, unshard

CPU = torch.device("cpu")
QKV = Layout((Block(4, 2), Block(1, 2), Block(1, 2)))


def spec_of(rank: int, **changes: object) -> ShardSpec:
    values = {"name": "qkv.weight", "full_shape": (12, 3), "dim": 0, "layout": QKV, "tp_rank": rank, "tp_size": 2}
    return ShardSpec(**values | changes)


def test_only_what_lies_here_is_read():
    asked = []

    def read(start: int, stop: int) -> torch.Tensor:
        asked.append((start, stop))
        return torch.full((stop - start, 3), float(start))

    local = shard(read, spec_of(1), device=CPU, dtype=torch.float64)
    assert asked == [(4, 8), (8, 10), (10, 12)]
    assert local.dtype == torch.float64
    assert local[:, 0].tolist() == [4.0] * 4 + [8.0] * 2 + [10.0] * 2


def test_a_whole_parameter_is_read_once():
    full = torch.randn(5, 2)
    spec = spec_of(1, full_shape=(5, 2), dim=None, layout=None)
    local = shard(lambda start, stop: full, spec, device=CPU, dtype=full.dtype)
    assert torch.equal(local, full)
    assert local.data_ptr() != full.data_ptr()
    assert unshard([local], spec) is local
    assert local_shape(spec) == (5, 2)


@pytest.mark.parametrize("shape", [(), (7,)])
def test_small_whole_parameters(shape):
    spec = spec_of(0, full_shape=shape, dim=None, layout=None)
    full = torch.rand(shape)
    assert torch.equal(shard(lambda *_: full, spec, device=CPU, dtype=full.dtype), full)
    (segment,) = spec.segments
    assert spec.copies(segment) == 2
    assert spec.narrow(full, segment) is full


def test_the_second_dimension():
    full = torch.arange(24.0).reshape(2, 12)
    specs = [spec_of(rank, full_shape=(2, 12), dim=1) for rank in range(2)]
    shards = [
        shard(lambda start, stop: full.narrow(1, start, stop - start), spec, device=CPU, dtype=full.dtype)
        for spec in specs
    ]
    assert [local_shape(spec) for spec in specs] == [(2, 8), (2, 8)]
    assert shards[0][0].tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert torch.equal(unshard(shards, specs[0]), full)


def test_narrow_is_a_view():
    local = torch.zeros(8, 3)
    spec = spec_of(0)
    spec.narrow(local, spec.segments[1]).add_(1.0)
    assert local[:, 0].tolist() == [0, 0, 0, 0, 1, 1, 0, 0]


def test_copies_count_tensor_parallel_ranks_and_stages():
    spec = spec_of(0, stages=(0, 1))
    assert [spec.copies(segment) for segment in spec.segments] == [2, 4, 4]
    whole = spec_of(0, dim=None, layout=None, stages=(0, 1))
    assert [whole.copies(segment) for segment in whole.segments] == [4]
    assert whole.segments == (Segment(0, 12, 0, 2),)


def test_padding_is_zero_and_falls_away():
    full = torch.ones(5, 2)
    layout = padded_vocabulary(5, 4)
    specs = [spec_of(rank, full_shape=(5, 2), layout=layout, tp_size=4) for rank in range(4)]
    shards = [
        shard(lambda start, stop: full.narrow(0, start, stop - start), spec, device=CPU, dtype=full.dtype)
        for spec in specs
    ]
    assert [local.sum().item() for local in shards] == [4.0, 4.0, 2.0, 0.0]
    assert {tuple(local.shape) for local in shards} == {(2, 2)}
    shards[2][1] = shards[3][:] = float("nan")
    assert torch.equal(unshard(shards, specs[0]), full)


def test_at_rank():
    first = spec_of(0, is_partial=True)
    assert first.at_rank(1) == spec_of(1, is_partial=True)
    assert first.at_rank(0) == first
