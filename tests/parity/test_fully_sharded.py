"""Replicas that share weights, gradients and optimizer state train as one process does."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest

from tests.parity.training import Case, Record, assert_equal, run_parallel, run_single
from tests.ranks import run_ranks

OPTIONS = {"data_parallel": "fully_shard"}
sharded = partial(Case, options=OPTIONS, steps=4, num_layers=3, rows=2)
GROUPS: dict[int, list[Case]] = {
    2: [
        sharded("gpt2", dp=2),
        sharded("llama_tied", dp=2, checkpointing=True),
    ],
    4: [
        sharded("gpt2", dp=2, tp=2),
        sharded("gpt2", dp=2, pp=2, num_layers=4),
        sharded("gpt2", dp=4),
        sharded("llama_gqa", dp=2, tp=2, sequence_parallel=True),
        sharded("llama_one_kv", dp=2, tp=2, frozen=("norm", "k_proj")),
        sharded("llama_tied", dp=2, pp=2, checkpointing=True, num_microbatches=3, rows=3),
        sharded("llama_gqa", dp=4, rows=1),
        sharded("gpt_neox", dp=2, tp=2, checkpointing=True),
    ],
    8: [
        sharded("gpt2", dp=2, tp=2, pp=2, sequence_parallel=True),
        sharded("llama_one_kv", dp=2, tp=2, pp=2),
    ],
}


def train_all(cases: Sequence[Case]) -> list[tuple[int, int, int, Record]]:
    return [run_parallel(case) for case in cases]


@pytest.fixture(scope="module")
def results() -> dict[int, Any]:
    return {}


@pytest.mark.parametrize(("size", "index"), [(size, i) for size, cases in GROUPS.items() for i in range(len(cases))])
def test_training(results: dict[int, Any], size: int, index: int) -> None:
    cases = GROUPS[size]
    if size not in results:
        results[size] = run_ranks(train_all, size, cases, timeout=250.0)
    assert_equal(cases[index], run_single(cases[index]), [rank[index] for rank in results[size]])
