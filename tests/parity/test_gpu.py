"""The same parity on real GPUs with NCCL: pytest -m gpu tests/parity/test_gpu.py on a machine with two of them."""

import itertools

import pytest
import torch

from tests.parity.dropout import HIDDEN, Job, one_pass
from tests.parity.dropout import train as train_with_dropout
from tests.parity.recorded import train_in_all_ways
from tests.parity.training import Case, assert_equal, join, run_parallel, run_single
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
    Case("gpt2", tp=2, num_microbatches=3, options={"overlap_microbatches": True}),
]


DROPOUT = [
    Job("gpt2", {"tp": 2}),
    Job("gpt2", {"tp": 2}, sequence_parallel=True),
    Job("gpt_neox", {"pp": 2}),
    Job("llama_tied", {"tp": 2}, sequence_parallel=True),
]
RECOMPUTED = [Job(job.model, job.sizes, True, job.sequence_parallel) for job in DROPOUT]

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def run_cases() -> list[object]:
    return [run_parallel(case) for case in CASES]


@pytest.mark.gpu
@two_gpus
def test_two_gpus_equal_one_process() -> None:
    """Float32 on two GPUs over NCCL against the same run on the CPU."""
    ranks = run_ranks(run_cases, 2, init=False, timeout=70.0)
    for index, case in enumerate(CASES):
        assert_equal(case, run_single(case), [results[index] for results in ranks])


@pytest.mark.gpu
@two_gpus
def test_lanes_and_recordings_change_no_bit() -> None:
    """Steps of two lengths, one of them accumulated: the passes of the longer are recorded, and replayed."""
    lanes, graphs = {"overlap_microbatches": True}, {"cuda_graphs": True}
    ways = [{}, lanes, graphs, lanes | graphs]
    for results in run_ranks(train_in_all_ways, 2, ways, init=False, timeout=100.0):
        steps, weights, _ = results[0]
        assert [recordings for *_, recordings in results] == [None, None, 1, 1]
        for others in results[1:]:
            assert others[0] == steps
            assert all(torch.equal(one, other) for one, other in zip(weights, others[1], strict=True))


@pytest.mark.gpu
@two_gpus
def test_dropout_keeps_replicated_parameters_identical() -> None:
    """Ten steps; `join` asserts that what is replicated over tp or tied over stages is the same bit for bit."""
    ranks = run_ranks(train_with_dropout, 2, DROPOUT + RECOMPUTED, init=False, timeout=100.0)
    for index in range(len(DROPOUT + RECOMPUTED)):
        for weight in join([rank[index] for rank in ranks], "weights").values():
            assert weight.isfinite().all()


@pytest.mark.gpu
@two_gpus
def test_dropout_masks() -> None:
    """The same on replicated activations, different inside regions; recomputation repeats loss and gradients."""
    ranks = run_ranks(one_pass, 2, DROPOUT + RECOMPUTED, init=False, timeout=100.0)
    first, second = ranks
    for index, job in enumerate(DROPOUT):
        for rank in ranks:
            plain, recomputed = rank[index], rank[index + len(DROPOUT)]
            assert plain.masks
            assert any(mask.in_backward for mask in recomputed.masks)
            assert plain.loss == recomputed.loss
            for name, gradient in plain.gradients.items():
                torch.testing.assert_close(gradient, recomputed.gradients[name], rtol=1e-5, atol=1e-7)
        if job.sizes == {"tp": 2} and not job.sequence_parallel:
            for one, other in zip(first[index].masks, second[index].masks, strict=True):
                assert torch.equal(one.dropped, other.dropped) == (one.shape[-1] == HIDDEN), one.shape
        for rank in ranks:
            masks = [mask.dropped for mask in rank[index].masks if mask.shape[-1] == HIDDEN]
            assert all(not torch.equal(one, other) for one, other in itertools.combinations(masks, 2))
