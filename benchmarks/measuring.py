"""Train one contestant on this rank, and time its steps."""

import gc
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.alone import one_rank_alone
from benchmarks.contestants import Contestant, Setting, load
from benchmarks.kernels import kernels_of
from benchmarks.workload import Workload, optimizer_of

__all__ = ["measure"]


def measure(
    name: str,
    workload: Workload,
    device_type: str,
    warmup: int,
    steps: int,
    on_meta: bool = False,
    compile_backend: str = "inductor",
    alone: bool = False,
    profile: bool = False,
) -> dict[str, Any]:
    """Whole synchronised steps: forward, backward, optimizer.

    Args:
        name: Of the contestant.
        workload: What it trains.
        device_type: "cuda" or "cpu".
        warmup: Steps that are not timed.
        steps: Steps of which the median counts.
        on_meta: Give the contestant a model without values.
        compile_backend: What contestants that compile give to torch.compile.
        alone: Be rank 0 without the others; see `alone.py`.
        profile: One more step, under the profiler; on a GPU.

    Collective: every rank of the contestant, started with the environment of torchrun.

    Returns:
        Times in seconds, losses of all steps, peak memory of every rank in bytes (allocated; and reserved, where that
        of recorded graphs counts), and with `profile` what `kernels_of` returns.
    """
    kind = load(name)
    if alone and not kind.can_be_alone:
        raise NotImplementedError("a stage cannot run alone: it waits for what the others tell it")
    device, dtype = torch.device("cpu"), torch.float32
    if device_type == "cuda":
        device, dtype = torch.device("cuda", int(os.environ["LOCAL_RANK"])), torch.bfloat16
        torch.cuda.set_device(device)
    setting = Setting(workload, device, dtype, int(os.environ["RANK"]), on_meta, compile_backend)
    with one_rank_alone(kind.world_size) if alone and kind.world_size > 1 else _started(kind, device):
        result = _run(kind, setting, warmup, steps, profile, alone)
        if dist.is_initialized():
            dist.destroy_process_group()
    return {"contestant": name, "warmup": warmup, **({"alone": True} if alone else {}), **result}


@contextmanager
def _started(kind: type[Contestant], device: torch.device) -> Iterator[None]:
    """With torch.distributed, unless the contestant starts it."""
    if kind.world_size > 1 and not kind.starts_distributed:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, device_id=device if backend == "nccl" else None, timeout=timedelta(minutes=5))
    yield


def _run(
    kind: type[Contestant], setting: Setting, warmup: int, steps: int, profile: bool, alone: bool
) -> dict[str, Any]:
    """Build the contestant, and time its steps."""
    contestant, device = kind(setting), setting.device
    optimizer = optimizer_of(contestant.parameters(), device)
    tokens = setting.workload.tokens(device)
    if alone:
        # Tokens of other ranks would be embedded as zeros, whose norms make gradients overflow.
        tokens %= setting.workload.vocabulary // kind.world_size
    gc.collect()
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    losses, times = [], []

    def step() -> torch.Tensor:
        loss = contestant.step(tokens)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    for _ in range(warmup + steps):
        _synchronize(device.type)
        start = time.perf_counter()
        loss = step()
        _synchronize(device.type)
        times.append(time.perf_counter() - start)
        losses.append(float(loss))
    return {
        "step_seconds": statistics.median(times[warmup:]),
        "all_step_seconds": times,
        "peak_bytes_per_rank": _of_all_ranks(torch.cuda.max_memory_allocated() if is_cuda else 0),
        "peak_reserved_bytes_per_rank": _of_all_ranks(torch.cuda.max_memory_reserved() if is_cuda else 0),
        "losses": losses,
        **({"kernels": kernels_of(step)} if profile and is_cuda else {}),
    }


def _synchronize(device_type: str) -> None:
    """Wait for the device, and for the other ranks."""
    if device_type == "cuda":
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()


def _of_all_ranks(number: int) -> list[int]:
    if not dist.is_initialized():
        return [number]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, number)
    return gathered
