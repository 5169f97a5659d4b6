"""The comparison finds differences, each kind of them, and nothing else."""

import copy
import math
import re

import pytest
import torch

from hf_tpp.check.compare import RankRecord, compare_records, compare_tensors
from hf_tpp.check.joining import Place, RankTensors, join
from hf_tpp.check.passes import Record, Trouble
from hf_tpp.plan.layout import Block, Layout
from hf_tpp.sharding import ShardSpec

FULL = torch.arange(1.0, 33.0).reshape(8, 4)
HEADS = Layout((Block(4, 2),))
ONE_HEAD = Layout((Block(1, 8),))


def spec(tp_rank, layout=HEADS, dim=0):
    return ShardSpec("weight", (8, 4), dim, layout if dim is not None else None, tp_rank, 2)


def plain():
    return Record(
        losses=[4.0, 3.0],
        norms=[1.0, 0.5],
        gradients={"weight": FULL / 7},
        weights={"weight": FULL},
        logits=torch.ones(1, 2, 3),
        tokens=torch.tensor([[1, 2]]),
    )


def parallel(layout=HEADS, dim=0):
    ranks = []
    for tp_rank in range(2):
        record, here = copy.deepcopy(plain()), spec(tp_rank, layout, dim)
        for tensors in (record.gradients, record.weights):
            if dim is not None:
                rows = here.segments[0]
                tensors["weight"] = tensors["weight"][rows.start : rows.stop].clone()
        ranks.append(RankRecord(Place(0, 0, tp_rank), record, {"weight": here}))
    return ranks


@pytest.mark.parametrize(("layout", "dim"), [(HEADS, 0), (ONE_HEAD, 0), (None, None)])
def test_equal_runs_have_no_difference(layout, dim):
    assert compare_records(plain(), parallel(layout, dim)) == []


def change(ranks, what):
    record = ranks[1].record
    match what:
        case "loss":
            record.losses[1] *= 1 + 2e-5
        case "gradient norm":
            record.norms[0] = math.nan
        case "logits":
            record.logits[0, 0, 0] += 1e-3
        case "tokens":
            record.tokens[0, 1] = 3
        case "gradients":
            record.gradients["weight"][0, 0] += 0.05
        case "weights":
            record.weights["weight"] *= 1 + 2e-4


@pytest.mark.parametrize("what", ["loss", "gradient norm", "logits", "tokens", "gradients", "weights"])
def test_each_difference_is_found_on_the_second_rank(what):
    ranks = parallel()
    change(ranks, what)
    (difference,) = compare_records(plain(), ranks)
    assert difference.what.startswith(what)
    assert what in str(difference)
    assert "differs" in str(difference)


@pytest.mark.parametrize(("layout", "dim"), [(ONE_HEAD, 0), (None, None)])
def test_copies_must_be_the_same_bits(layout, dim):
    ranks = parallel(layout, dim)
    ranks[1].record.weights["weight"][0, 0] += 1e-6
    (difference,) = compare_records(plain(), ranks)
    assert re.fullmatch(r"weight: stage 0, tp rank [01] differs from the copy of another rank", difference.detail)


def test_a_rank_without_its_shard():
    ranks = parallel()
    del ranks[1].record.weights["weight"]
    _, problems = join([RankTensors(rank.place, rank.record.weights, rank.specs) for rank in ranks])
    assert problems == ["weight: tp rank 1 of stage 0 has none"]
    assert [difference.part for difference in compare_records(plain(), ranks)] == ["train", "train"]


def test_a_missing_gradient_is_a_zero_one():
    ours = {"a": torch.ones(2)}
    assert compare_tensors("train", "gradients", ours, ours | {"b": torch.zeros(2)}) == []
    (difference,) = compare_tensors("train", "gradients", ours, ours | {"b": torch.ones(2)})
    assert str(difference) == "gradients b differs: the parallel model has none"
    (difference,) = compare_tensors("train", "weights", ours, ours | {"b": torch.zeros(2)})
    assert difference.what == "weights b"


def test_shapes_and_integers():
    (difference,) = compare_tensors("save", "stored", {"a": torch.ones(2)}, {"a": torch.ones(3)})
    assert difference.detail == "shape [2], plain [3]"
    (difference,) = compare_tensors("save", "stored", {"a": torch.ones(2).long()}, {"a": torch.zeros(2).long()})
    assert difference.detail == "not the same integers"


def test_what_rounding_does_to_the_plain_model_is_allowed_ten_times():
    def differs(ours: float, plain: float, twin: float) -> bool:
        tensors = [{"bias": torch.full((4,), value)} for value in (ours, plain, twin)]
        return bool(compare_tensors("train", "gradients", *tensors))

    assert not differs(3e-8, 1e-8, -1e-8)  # a gradient that is nothing but rounding
    assert not differs(1.0009, 1.0, 1.0001)
    assert differs(1.0011, 1.0, 1.0001)
    assert not differs(1.00009, 1.0, 1.0)
    assert differs(1.00011, 1.0, 1.0)


def test_parts_with_trouble_are_left_out():
    ranks = parallel()
    for rank in ranks:
        rank.record.losses, rank.record.troubles = [], {"train": Trouble(True, "BatchError", "no")}
    assert compare_records(plain(), ranks) == []
