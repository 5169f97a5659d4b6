"""Train one contestant on this rank, and time its steps."""

import gc
import os
import statistics
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.alone import start_alone
from benchmarks.contestants import Setting, load
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
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if kind.world_size > 1 and alone:
        start_alone(kind.world_size)
    elif kind.world_size > 1 and not kind.starts_distributed:
        backend = "nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, device_id=device if backend == "nccl" else None, timeout=timedelta(minutes=5))
    dtype = torch.bfloat16 if device_type == "cuda" else torch.float32
    contestant = kind(Setting(workload, device, dtype, int(os.environ["RANK"]), on_meta, compile_backend))
    optimizer = optimizer_of(contestant.parameters(), device)
    tokens = workload.tokens(device)
    if alone:
        # Tokens of other ranks would be embedded as zeros, whose norms make gradients overflow.
        tokens %= workload.vocabulary // kind.world_size
    gc.collect()
    if device_type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    losses, times = [], []

    def step() -> torch.Tensor:
        loss = contestant.step(tokens)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    for _ in range(warmup + steps):
        _synchronize(device_type)
        start = time.perf_counter()
        loss = step()
        _synchronize(device_type)
        times.append(time.perf_counter() - start)
        losses.append(float(loss))
    result = {
        "contestant": name,
        "step_seconds": statistics.median(times[warmup:]),
        "all_step_seconds": times,
        "warmup": warmup,
        "peak_bytes_per_rank": _of_all_ranks(torch.cuda.max_memory_allocated() if device_type == "cuda" else 0),
        "peak_reserved_bytes_per_rank": _of_all_ranks(torch.cuda.max_memory_reserved() if device_type == "cuda" else 0),
        "losses": losses,
        **({"alone": True} if alone else {}),
    }
    if profile and device_type == "cuda":
        result["kernels"] = kernels_of(step)
    if dist.is_initialized():
        dist.destroy_process_group()
    return result


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
