"""Every command and program of README.md runs, in the order in which it stands there."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from hf_tpp import errors

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FENCE = re.compile(r"(?:<!-- not run: (?P<why>[^\n]*) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)```\n", re.DOTALL)


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    not_run: str | None


BLOCKS = [Block(match["language"], match["text"], match["why"]) for match in FENCE.finditer(README)]
PROGRAMS = {re.match(r"# (\w+\.py)\n", block.text)[1]: block.text for block in BLOCKS if block.language == "python"}
COMMANDS = [block.text for block in BLOCKS if block.language == "bash" and block.not_run is None]
NOT_RUN = {block.not_run: block.text for block in BLOCKS if block.not_run is not None}


def run(command: str, folder: Path, timeout: float) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in {"RANK", "WORLD_SIZE"}}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'conversion'}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    shell = ["bash", "-euo", "pipefail", "-c", command]
    result = subprocess.run(
        shell, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def flags(command: str) -> set[str]:
    """The flags of the last program of a command."""
    words = shlex.split(command)
    program = max(index for index, word in enumerate(words) if word.endswith(".py"))
    return {word for word in words[program:] if word.startswith("--")}


@pytest.mark.timeout(600)
def test_every_program_and_command_runs(tmp_path):
    assert len(COMMANDS) >= 4
    assert all(any(name in command for command in COMMANDS) for name in PROGRAMS), "a program that no command runs"
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(text)
    printed = [run(command, tmp_path, timeout=240) for command in COMMANDS]
    assert len(set(re.findall(r"\[\[1, 2, 3.*?\]\]", "".join(printed)))) == 1  # all ranks generate the same tokens
    assert (tmp_path / "my-model" / "config.json").is_file()
    assert (tmp_path / "runs" / "tiny" / "huggingface" / "config.json").is_file()


def test_only_what_is_too_heavy_is_not_run():
    assert set(NOT_RUN) == {"make", "8 GPUs"}
    assert {block.language for block in BLOCKS if block.not_run is None} <= {"python", "bash", "text", "diff"}


def test_the_targets_of_make_exist():
    targets = re.findall(r"^make (\w+)$", NOT_RUN["make"], re.MULTILINE)
    assert targets == ["demo", "test"]
    assert set(targets) <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_flags_of_the_large_run_exist(tmp_path):
    used = flags(NOT_RUN["8 GPUs"])
    assert len(used) > 10
    help_text = run(f"python {ROOT / 'examples' / 'pretrain_gpt.py'} --help", tmp_path, timeout=120)
    assert used - set(re.findall(r"--[\w-]+", help_text)) == set()


def test_the_errors_that_are_named_exist():
    named = set(re.findall(r"`(\w+Error)`", README))
    assert named
    assert named <= set(errors.__all__)


def test_the_files_that_are_named_exist():
    tree = next(block.text for block in BLOCKS if block.language == "text")
    folder, missing = ROOT, []
    for line in tree.splitlines():
        name = line.split()[0]
        path = (folder if line.startswith(" ") else ROOT) / name
        folder = path if not line.startswith(" ") and name.endswith("/") else folder
        missing += [] if path.exists() else [name]
    assert missing == []


def test_the_figures_of_speed_are_those_of_the_recorded_run():
    """Every row of the table, from the newest raw record of the benchmark that it names."""
    record = json.loads(max((ROOT / "benchmarks" / "results").glob("training-*.json")).read_text())
    expected: dict[str, list[str]] = {}
    for result in record["results"]:  # Llama first, then GPT-2
        name = result["contestant"].replace("one process", "one GPU")
        peaks = " / ".join(f"{peak / 2**30:.1f}" for peak in result["peak_bytes_per_rank"])
        expected.setdefault(name, []).extend([f"{1000 * result['step_seconds']:.0f}", peaks])
    rows = re.findall(r"^\| (one GPU.*|tensor.*|pipeline.*) \|$", README, re.MULTILINE)
    assert {row.split(" | ")[0]: row.split(" | ")[1:] for row in rows} == expected
