"""Every contestant runs in processes of its own, for a limited time; what goes wrong is a reason, not the end."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.workload import Workload

__all__ = ["launch"]

ROOT = Path(__file__).parents[1]


def launch(name: str, world_size: int, workload: Workload, options: Mapping[str, Any], limit: float) -> dict[str, Any]:
    """Run one contestant.

    Args:
        name: Of the contestant.
        world_size: Its processes.
        workload: What it trains.
        options: The further arguments of `measure`.
        limit: Seconds after which its processes are killed.

    Returns:
        What `measure` returned on rank 0, or {"contestant", "failed": the reason}.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "request.json").write_text(json.dumps({"name": name, "workload": asdict(workload), **options}))
        reason = _run(folder, world_size, options["device_type"], limit)
        answer = folder / "answer.json"
        if reason is None and answer.is_file():
            result: dict[str, Any] = json.loads(answer.read_text())
            return result
        return {"contestant": name, "failed": reason or "rank 0 left no result"}


def _run(folder: Path, world_size: int, device: str, limit: float) -> str | None:
    """Start the ranks and wait for them; returns why they failed."""
    shared = {
        **os.environ,
        "OMP_NUM_THREADS": "1" if device == "cpu" else "8",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "conversion"), os.environ.get("PYTHONPATH", "")]),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}),
    }
    ranks = []
    for rank in range(world_size):
        with (folder / f"rank{rank}.log").open("w") as log:
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-u", "-m", "benchmarks.rank", str(folder)]
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    deadline = time.monotonic() + limit
    try:
        while any(rank.poll() is None for rank in ranks):
            if time.monotonic() > deadline:
                return f"not done after {limit:.0f} s; {_reason(folder, range(world_size))}"
            if any(rank.poll() for rank in ranks):
                time.sleep(1.0)  # the others may be about to say what is wrong
                return _reason(folder, range(world_size))
            time.sleep(0.05)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    failed = [number for number, rank in enumerate(ranks) if rank.returncode]
    return _reason(folder, failed) if failed else None


def _reason(folder: Path, ranks: Iterable[int]) -> str:
    """What failed ranks say: the exception, or else the last line that one of them wrote."""
    for rank in ranks:
        told = folder / f"failure{rank}"
        if told.is_file():
            return f"rank {rank}: {' '.join(told.read_text().split())[:300]}"
    for rank in ranks:
        lines = [line for line in (folder / f"rank{rank}.log").read_text().splitlines() if line.strip()]
        if lines:
            return f"rank {rank}: {lines[-1].strip()[:300]}"
    return "no rank said why"


def _free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
