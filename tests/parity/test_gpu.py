"""The same parity on real GPUs with NCCL: pytest -m gpu tests/parity/test_gpu.py on a machine with two of them."""

import pytest
import torch

from tests.parity.training import Case, assert_equal, run_parallel, run_single
from tests.ranks import run_ranks

CASES = [
    Case("gpt2", tp=2),
    Case("gpt2", pp=2),
    Case("gpt2", dp=2),
    Case("llama_gqa", tp=2, sequence_parallel=True),
    Case("llama_gqa", pp=2, checkpointing=True),
    Case("llama_one_kv", tp=2, attention="eager"),
    Case("gpt_neox", tp=2, checkpointing=True),
    Case("llama_tied", pp=2, num_microbatches=3),
]


def run_cases() -> list[object]:
    return [run_parallel(case) for case in CASES]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_equal_one_process() -> None:
    """Float32 on two GPUs over NCCL against the same run on the CPU."""
    ranks = run_ranks(run_cases, 2, init=False, timeout=70.0)
    for index, case in enumerate(CASES):
        assert_equal(case, run_single(case), [results[index] for results in ranks])
