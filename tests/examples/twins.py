"""The examples that have a twin without parallelism: how they are run, and what of it is compared."""

import contextlib
import difflib
import io
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from tests.integrations.runs import as_launched

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples"
STEPS = ("--steps", "3", "--out", "out")
EXAMPLES = {
    "raw_loop": STEPS,
    "finetune_accelerate": ("model", *STEPS),
    "finetune_trainer": ("model", *STEPS),
    "generate": ("model",),
}
LAUNCHERS = {
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"],
    "accelerate": [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(FOLDER / "accelerate.yaml"), "--num_processes"),
    ],
}


def difference(name: str) -> list[str]:
    """What makes the plain twin of an example parallel, with a line of context around; without empty lines."""
    plain, parallel = (
        [line for line in (FOLDER / f"{each}.py").read_text().splitlines() if line] for each in (f"{name}_plain", name)
    )
    lines = list(difflib.unified_diff(plain, parallel, n=1, lineterm=""))[2:]
    return ["@@" if line.startswith("@@") else line for line in lines]


def run_inside(name: str, arguments: Sequence[str], folder: Path) -> str:
    """Body of a rank: run an example to its end, as a launcher would start it; returns what it printed."""
    as_launched()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    printed = io.StringIO()
    script = str(FOLDER / f"{name}.py")
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(printed),
        mock.patch.object(sys, "argv", [script, *arguments]),
        mock.patch.object(sys, "path", [str(FOLDER), *sys.path]),
    ):
        runpy.run_path(script, run_name="__main__")
    return printed.getvalue()


def launch(launcher: str, num_processes: int, name: str, arguments: Sequence[str], folder: Path) -> str:
    """Run an example in processes of its own; returns what they printed."""
    count = [] if launcher == "python" else [str(num_processes)]
    environment = {key: value for key, value in os.environ.items() if key not in {"RANK", "WORLD_SIZE"}} | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'conversion'}",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    result = subprocess.run(
        [*LAUNCHERS[launcher], *count, str(FOLDER / f"{name}.py"), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def results(printed: str, folder: Path) -> list[float] | str:
    """Losses and norms of all steps and of the evaluation, or what was written if nothing was trained."""
    log = folder / "out" / "trainer_state.json"
    if log.exists():
        history = json.loads(log.read_text())["log_history"]
        return [entry[key] for entry in history for key in ("loss", "grad_norm", "eval_loss") if key in entry]
    return [float(number) for number in re.findall(r"(?:loss|norm) +(\d+\.\d+)", printed)] or printed
