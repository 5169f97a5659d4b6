"""Recorded microbatches change no bit: on CPUs the functions are repeated that graphs would repeat on GPUs."""

from typing import Any

import pytest
import torch

from tests.parity.recorded import python_passes, train_in_all_ways
from tests.ranks import run_ranks

WAYS = [{"tp": 2}, {"pp": 2}, {"tp": 2, "overlap_microbatches": True}]
FURTHER = [{"tp": 2, "sequence_parallel": True}, {"pp": 2, "num_microbatches": 1}]


def check(world_size: int, ways: list[dict[str, Any]]) -> None:
    both = [{**way, "repeats": repeats} for way in ways for repeats in (False, True)]
    for results in run_ranks(train_in_all_ways, world_size, both, timeout=280.0):
        for plain, recorded in zip(results[::2], results[1::2], strict=True):
            assert plain[2] is None
            assert recorded[2] == 1  # of the two lengths, the longer comes often enough
            assert recorded[0] == plain[0]
            assert all(torch.equal(one, other) for one, other in zip(recorded[1], plain[1], strict=True))


def test_two_ranks() -> None:
    check(2, WAYS)


@pytest.mark.slow
def test_further_ways() -> None:
    check(2, FURTHER)


@pytest.mark.slow
def test_four_ranks() -> None:
    check(4, [{"pp": 4}, {"tp": 2, "pp": 2}, {"tp": 2, "pp": 2, "sequence_parallel": True}])


@pytest.mark.parametrize(("options", "slots"), [({"pp": 2}, (2, 1)), ({"tp": 2}, (1, 1))], ids=["pp", "tp"])
def test_what_python_runs(options: dict[str, Any], slots: tuple[int, int]) -> None:
    """Every microbatch in two passes, one for each slot in the third, and none from then on."""
    ranks = run_ranks(python_passes, 2, {**options, "num_microbatches": 4})
    assert [counts[1:] for counts in ranks] == [[4, in_flight, 0, 0] for in_flight in slots]
