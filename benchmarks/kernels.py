"""What a GPU does in one step, by its profile."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["kernels_of"]

_SHOWN = 25


def kernels_of(step: Callable[[], Any]) -> dict[str, Any]:
    """Run one step under the profiler.

    Args:
        step: Issues the work; it need not wait for it.

    Returns:
        "count": kernels, copies included; "compute_seconds" and "communication_seconds": the sums of their times;
        "longest": name, calls and seconds of those that take most.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    calls: dict[str, int] = defaultdict(int)
    seconds: dict[str, float] = defaultdict(float)
    for event in profiler.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith("Context Sync"):
            calls[event.name] += 1
            seconds[event.name] += event.device_time_total * 1e-6
    is_transfer = {name: "nccl" in name.lower() for name in seconds}
    longest = sorted(seconds, key=lambda name: -seconds[name])[:_SHOWN]
    return {
        "count": sum(calls.values()),
        "compute_seconds": sum(time for name, time in seconds.items() if not is_transfer[name]),
        "communication_seconds": sum(time for name, time in seconds.items() if is_transfer[name]),
        "longest": [[name[:120], calls[name], seconds[name]] for name in longest],
    }
