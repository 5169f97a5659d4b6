"""The training benchmark in miniature: all contestants on gloo, and what becomes of one that fails."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.contestants import CONTESTANTS
from benchmarks.measuring import measure
from benchmarks.workload import FAMILIES, TINY, Workload
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
UNABLE = [("torch_dtensor", "gpt2"), ("torch_pipeline", "gpt2"), ("transformers_tp", "gpt2")]
"""Modules of contestants that cannot do a family: GPT-2's weights are fused, transposed and tied."""


def curve(name: str, family: str) -> list[float] | str:
    """Body of a rank: the losses of a contestant, or why it has none."""
    workload = replace(Workload(**TINY), family=family)
    try:
        losses: list[float] = measure(name, workload, "cpu", warmup=0, steps=2, compile_backend="aot_eager")["losses"]
    except NotImplementedError as error:
        return str(error)
    return losses


@functools.cache
def plain_curve(family: str) -> list[float]:
    (losses,) = run_ranks(curve, 1, "one GPU, plain transformers", family, init=False)
    assert losses[1] < losses[0]
    return losses


def pairs() -> list[Any]:
    """All contestants with all families; by default those that compile with one, the others in turn with each.

    On a CPU nothing is recorded: those contestants are the ones without.
    """
    found = []
    for index, (name, (module, *_)) in enumerate(CONTESTANTS.items()):
        both_run = "compiled" not in name and (module, "gpt2") not in UNABLE
        by_default = FAMILIES[index % len(FAMILIES)] if both_run else "llama"
        for family in FAMILIES:
            runs = (family == by_default and "recorded" not in name) or (module, family) in UNABLE
            marks = [] if runs else [pytest.mark.slow]
            found.append(pytest.param(name, family, marks=marks))
    return found


@pytest.mark.parametrize(("name", "family"), pairs())
def test_all_contestants_follow_the_same_curve(name, family):
    module = CONTESTANTS[name][0]
    if module == "megatron" and importlib.util.find_spec("megatron") is None:
        pytest.skip("megatron-core is not installed: pip install -e '.[megatron]'")
    world_size = 1 if module == "one_gpu" else 2
    for losses in run_ranks(curve, world_size, name, family, init=False, timeout=280.0):
        if (module, family) in UNABLE:
            assert isinstance(losses, str)
            assert family in losses
        else:
            assert losses == pytest.approx(plain_curve(family), rel=1e-5)


def run(tmp_path: Path, *options: str) -> list[dict]:
    output = tmp_path / "result.json"
    command = [sys.executable, "benchmarks/training.py", "--device", "cpu", "--tiny", "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *options], cwd=ROOT, env=environment, check=True, timeout=500)
    assert (tmp_path / "result.png").stat().st_size > 10_000
    return json.loads(output.read_text())["results"]


@pytest.mark.timeout(600)
def test_results_and_reasons_are_recorded(tmp_path: Path) -> None:
    """Each contestant in processes of its own; one that cannot do the family is a row with its reason."""
    names = ["one GPU, plain", "transformers"]
    good, bad = run(tmp_path, "--model", "gpt2", "--only", *names, "--warmup", "1", "--steps", "1")
    assert good["step_seconds"] == good["all_step_seconds"][1] > 0
    assert good["tokens_per_second"] == pytest.approx(128 / good["step_seconds"])
    assert good["workload"]["vocab_size"] == 128
    assert bad["failed"] == "rank 0: NotImplementedError: transformers has no tensor-parallel plan for gpt2"
    assert "step_seconds" not in bad


def alone(name: str) -> dict[str, Any]:
    """Body of the rank."""
    workload = replace(Workload(**TINY), family="gpt2")
    return measure(name, workload, "cpu", warmup=1, steps=2, compile_backend="aot_eager", alone=True)


def test_one_rank_alone() -> None:
    """It does its own part of the work: half of the tensor-parallel model, of which it says what all ranks would."""
    (result,) = run_ranks(alone, 1, "tensor parallel 2, overlapped, compiled", init=False)
    assert result["alone"]
    assert result["losses"] == sorted(result["losses"], reverse=True)
    assert len(result["peak_bytes_per_rank"]) == 2


def test_a_stage_cannot_run_alone() -> None:
    with pytest.raises(NotImplementedError, match="a stage cannot run alone: it waits for what the others tell it"):
        alone("pipeline parallel 2")
