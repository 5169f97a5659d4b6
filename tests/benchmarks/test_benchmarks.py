"""The benchmark scripts in miniature."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.host_cost import measure

ROOT = Path(__file__).parents[2]


def test_host_cost_is_within_its_target() -> None:
    """A tensor-parallel block costs the host at most 1.15 times the plain block of the same local size.

    The best of several medians: other processes of the machine only ever make a run slower, and rarely both alike.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ratios = [measure(200)["ratio"] for _ in range(5)]
    finally:
        torch.set_num_threads(threads)
    print(ratios)
    assert min(ratios) < 1.15


def test_training_benchmark_in_miniature(tmp_path: Path) -> None:
    """All contestants run on gloo and follow the same loss curve."""
    output = tmp_path / "result.json"
    command = [sys.executable, "benchmarks/training.py", "--device", "cpu", "--tiny", "--model", "llama"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--output", str(output)], cwd=ROOT, env=environment, check=True, timeout=200)
    results = json.loads(output.read_text())["results"]
    assert len(results) == 4
    for result in results:
        for loss, expected in zip(result["losses"], results[0]["losses"], strict=True):
            assert abs(loss - expected) < 1e-5 * expected
