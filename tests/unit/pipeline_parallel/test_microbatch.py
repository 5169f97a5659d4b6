"""Cutting a batch into microbatches: no row lost, none twice, no tensor cut that is not made of rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_tpp.errors import BatchError
from hf_tpp.pipeline_parallel.microbatch import (
    batch_rows,
    check_padded_rows,
    count_label_tokens,
    default_num_microbatches,
    sequence_length,
    split_batch,
)


def batch_of(rows: int, seq: int = 4) -> dict[str, torch.Tensor]:
    input_ids = torch.arange(rows * seq).reshape(rows, seq)
    return {"input_ids": input_ids, "attention_mask": input_ids % 3, "labels": input_ids + 1}


@given(st.integers(1, 20), st.integers(1, 25))
def test_rows_are_dealt_out_evenly_and_in_order(rows, num_microbatches):
    batch = batch_of(rows)
    microbatches = split_batch(batch, num_microbatches)
    counts = [batch_rows(microbatch) for microbatch in microbatches]
    assert len(counts) == min(rows, num_microbatches)
    assert counts == sorted(counts, reverse=True)
    assert max(counts) - min(counts) <= 1
    for name, value in batch.items():
        assert torch.equal(torch.cat([microbatch[name] for microbatch in microbatches]), value)


def test_the_example_of_the_module():
    assert [batch_rows(part) for part in split_batch(batch_of(10), 4)] == [3, 3, 2, 2]


def test_only_rows_are_cut():
    shared = {
        "position_ids": torch.arange(4)[None],
        "num_items_in_batch": torch.tensor(7),
        "use_cache": False,
        "past_key_values": None,
    }
    for microbatch in split_batch(batch_of(2) | shared, 2):
        assert all(microbatch[name] is value for name, value in shared.items())
        assert microbatch["labels"].shape == (1, 4)


@pytest.mark.parametrize("shape", [(3,), (2,), (3, 2, 4)])
def test_a_tensor_whose_rows_are_unclear_is_refused(shape):
    batch = batch_of(2) | {"cache_position": torch.zeros(shape)}
    with pytest.raises(BatchError, match=r"cache_position has the shape \[[0-9, ]+\], which cannot be cut"):
        split_batch(batch, 2)
    (whole,) = split_batch(batch, 1)  # the fix that the message names
    assert whole["cache_position"] is batch["cache_position"]


def test_one_row_stays_whole():
    batch = batch_of(1)
    (microbatch,) = split_batch(batch, 4)
    assert all(microbatch[name] is value for name, value in batch.items())


def test_inputs_embeds_count_as_tokens():
    batch = {"inputs_embeds": torch.rand(3, 5, 2), "labels": torch.ones(3, 5)}
    assert batch_rows(batch) == 3
    assert sequence_length(batch) == 5
    assert [part["inputs_embeds"].shape for part in split_batch(batch, 2)] == [(2, 5, 2), (1, 5, 2)]


def test_lists_are_microbatches():
    lists = {name: [value, value[:1, :2]] for name, value in batch_of(3).items()}
    assert batch_rows(lists) == 4
    for wanted in (1, 2, 8):
        first, second = split_batch({**lists, "num_items_in_batch": torch.tensor(5)}, wanted)
        assert first["input_ids"].shape == (3, 4)
        assert second["labels"].shape == (1, 2)
        assert first["num_items_in_batch"] == second["num_items_in_batch"] == 5


@pytest.mark.parametrize(("rows", "pp_size", "expected"), [(1, 4, 1), (5, 2, 5), (100, 2, 8), (3, 1, 3), (9, 1, 4)])
def test_default_number(rows, pp_size, expected):
    assert default_num_microbatches(rows, pp_size) == expected


@pytest.mark.parametrize(("rows", "expected"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (100, 8)])
def test_default_number_of_rows_that_must_be_together(rows, expected):
    assert default_num_microbatches(rows, 2, fewest_rows=2) == expected
    count = default_num_microbatches(rows, 2, fewest_rows=2)
    sizes = [batch_rows(part) for part in split_batch(batch_of(rows), count)]
    assert min(sizes) >= min(2, rows)


def padded(rows: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(rows, 4, dtype=torch.long)
    mask[-1, :2] = 0
    return {"input_ids": torch.ones(rows, 4, dtype=torch.long), "attention_mask": mask}


def test_padded_rows_that_must_be_together():
    with pytest.raises(BatchError, match=r"4 rows in 3 microbatches leave a padded row alone.*num_microbatches=2, or"):
        check_padded_rows(split_batch(padded(4), 3), 2)
    full = {**padded(4), "attention_mask": torch.ones(4, 4)}
    for fine in (split_batch(padded(4), 2), split_batch(padded(1), 2), split_batch(full, 4)):
        check_padded_rows(fine, 2)
    check_padded_rows(split_batch(padded(4), 4), 1)


def test_label_tokens():
    """The first label of a row has no token before it, and the ignored ones do not count."""
    labels = torch.tensor([[1, 2, 3, -100], [-100, -100, 5, 6]])
    assert count_label_tokens([{"labels": labels[:1]}, {"labels": labels[1:]}]) == 4
    assert count_label_tokens([{"labels": labels, "shift_labels": labels}]) == 5
    assert count_label_tokens([{"labels": labels, "ignore_index": 6}]) == 5


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({}, "neither input_ids nor inputs_embeds .got nothing."),
        ({"labels": torch.ones(2, 2)}, "neither input_ids nor inputs_embeds .got labels."),
        ({"input_ids": None, "labels": None}, "neither input_ids nor inputs_embeds"),
        ({"input_ids": torch.ones(0, 3)}, "no rows: skip"),
        ({"input_ids": []}, "no rows: skip"),
        ({"input_ids": [torch.ones(2, 3), torch.ones(0, 3)]}, "no rows: skip"),
        ({"input_ids": torch.ones(3)}, r"input_ids has the shape \[3\]: give \[rows, seq\]"),
        ({"input_ids": torch.ones(())}, r"input_ids has the shape \[\]: give \[rows, seq\]"),
        ({"inputs_embeds": torch.ones(3, 2)}, r"inputs_embeds has the shape \[3, 2\]: give \[rows, seq, hidden\]"),
        ({"input_ids": [torch.ones(2, 3)], "labels": [torch.ones(2, 3)] * 2}, "labels is a list of 2 microbatches"),
        ({"input_ids": [torch.ones(2, 3)], "labels": torch.ones(2, 3)}, "labels is one tensor while"),
    ],
)
def test_what_cannot_be_split(batch, message):
    with pytest.raises(BatchError, match=message):
        split_batch(batch, 2)
