"""What a run leaves behind: raw numbers as JSON, and a table; picture.py draws them."""

import datetime
import importlib.metadata
import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.workload import Workload

__all__ = ["Record", "device_name"]

PEAK_FLOPS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}
"""Dense bf16 operations per second of a card, by its datasheet."""

_VERSIONS = ("torch", "transformers", "megatron-core", "triton")


class Record:
    """The results of one run, written to `path` after each of them.

    Args:
        path: The JSON file.
        device: "cuda" or "cpu".
        steps: Timed steps.
    """

    def __init__(self, path: Path, device: str, steps: int) -> None:
        self.path = path
        self.card = device_name(device)
        self.results: list[dict[str, Any]] = []
        self.front: dict[str, Any] = {
            "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
            "device": self.card,
            "versions": {name: version for name in _VERSIONS if (version := _version(name))},
            "python": platform.python_version(),
            "steps": steps,
        }

    def add(self, result: dict[str, Any], workload: Workload, world_size: int) -> None:
        """Take one result in, with what follows from it."""
        result = {"model": workload.family, "world_size": world_size, **result, "workload": asdict(workload)}
        if "step_seconds" in result:
            seconds = result["step_seconds"]
            result["tokens_per_second"] = workload.num_tokens / seconds
            result["model_flops_per_step"] = workload.flops()
            peak = PEAK_FLOPS.get(self.card)
            if peak is not None:
                result["model_flops_utilisation"] = workload.flops() / seconds / (peak * world_size)
        self.results.append(result)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.content(), indent=1) + "\n")

    def content(self) -> dict[str, Any]:
        """Everything, as it is written."""
        return {**self.front, "results": self.results}

    def table(self) -> str:
        """One line a contestant; ratios against the first of the same family."""
        lines = [HEADER]
        for result in self.results:
            first = next(r for r in self.results if r["model"] == result["model"])
            lines.append(line_of(result, first))
        return "\n".join(lines)


HEADER = f"{'model':6} {'contestant':52} {'step ms':>9} {'tokens/s':>9} {'MFU':>6} {'x':>5} {'peak GiB':>11}  losses"


def line_of(result: dict[str, Any], first: dict[str, Any]) -> str:
    """One result as a line; `x` says how many times faster than `first`."""
    front = f"{result['model']:6} {result['contestant']:52}"
    if "failed" in result:
        return f"{front} {'failed: ' + result['failed']}"
    seconds = result["step_seconds"]
    used = result.get("model_flops_utilisation")
    ratio = first.get("step_seconds", float("nan")) / seconds
    peaks = "/".join(f"{peak / 2**30:.1f}" for peak in result["peak_bytes_per_rank"])
    losses = " ".join(f"{loss:.4f}" for loss in [*result["losses"][:3], result["losses"][-1]])
    share = "" if used is None else f"{used:.1%}"
    return (
        f"{front} {seconds * 1e3:9.1f} {result['tokens_per_second']:9.0f} {share:>6} {ratio:5.2f} {peaks:>11}  {losses}"
    )


def device_name(device: str) -> str:
    """Of the card, or of the processor."""
    return torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
