"""The same parity on real GPUs with NCCL: pytest -m gpu tests/parity/test_gpu.py on a machine with one or two of them.

On a single GPU both ranks share it, for the first test; NCCL, which takes them for different machines then, carries
messages over sockets. The ranks take turns on the GPU, so that a collective takes a tenth of a second.
"""

import itertools
import os
from collections.abc import Callable
from typing import Any

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

TP, PP, COMPILED, RECORDED = {"tp": 2}, {"pp": 2}, {"compile": True}, {"cuda_graphs": True}
LANES = {"overlap_microbatches": True}
PLAIN: dict[str, Any] = {"compile": False}
"""Instead of what is the default on GPUs."""
WAYS = [
    [TP, TP | LANES, TP | RECORDED, TP | LANES | RECORDED],
    [TP | {"sequence_parallel": True}, TP | {"sequence_parallel": True} | RECORDED],
    [PP, PP | RECORDED],
    [TP | COMPILED, TP | COMPILED | RECORDED, TP | COMPILED | LANES | RECORDED],
    [PP | COMPILED, PP | COMPILED | RECORDED],
    [TP | {"compile": {"dynamic": None}}, TP | {"compile": None}],
]
"""What differs within a group must not change a bit."""

has_gpu = pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs a GPU")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two ranks that share a GPU are too slow for this")


def on_gpus(body: Callable[..., Any], *args: Any, timeout: float = 90.0) -> list[Any]:
    """What `body` returns on two ranks."""
    return run_ranks(_placed, 2, body, *args, init=False, timeout=timeout)


def _placed(body: Callable[..., Any], *args: Any) -> Any:
    if torch.cuda.device_count() == 1:
        own = {"LOCAL_RANK": "0", "NCCL_HOSTID": f"host{os.environ['RANK']}", "NCCL_SOCKET_IFNAME": "lo"}
        os.environ.update(own, NCCL_P2P_DISABLE="1", NCCL_SHM_DISABLE="1", NCCL_IB_DISABLE="1")
    return body(*args)


def run_cases() -> list[object]:
    return [run_parallel(case) for case in CASES]


@pytest.mark.gpu
@has_gpu
def test_two_ranks_equal_one_process() -> None:
    """Float32 on GPUs over NCCL against the same run on the CPU."""
    ranks = on_gpus(run_cases)
    for index, case in enumerate(CASES):
        assert_equal(case, run_single(case), [results[index] for results in ranks])


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("ways", WAYS, ids=lambda ways: "-".join(ways[0]))
def test_lanes_and_recordings_change_no_bit(ways: list[dict[str, Any]]) -> None:
    """Steps of two lengths, one of them accumulated: microbatches of the longer are recorded, and replayed."""
    small = {"layers": ways[0].get("pp", 1), "num_microbatches": 2}
    for results in on_gpus(train_in_all_ways, [small | PLAIN | way for way in ways]):
        steps, weights, _ = results[0]
        for way, others in zip(ways, results, strict=True):
            assert others[2] == (1 if "cuda_graphs" in way else None), way
            assert others[0] == steps, way
            assert all(torch.equal(one, other) for one, other in zip(weights, others[1], strict=True)), way


@pytest.mark.gpu
@two_gpus
def test_dropout_keeps_replicated_parameters_identical() -> None:
    """Ten steps; `join` asserts that what is replicated over tp or tied over stages is the same bit for bit."""
    ranks = on_gpus(train_with_dropout, DROPOUT + RECOMPUTED)
    for index in range(len(DROPOUT + RECOMPUTED)):
        for weight in join([rank[index] for rank in ranks], "weights").values():
            assert weight.isfinite().all()


@pytest.mark.gpu
@two_gpus
def test_dropout_masks() -> None:
    """The same on replicated activations, different inside regions; recomputation repeats loss and gradients."""
    ranks = on_gpus(one_pass, DROPOUT + RECOMPUTED)
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
