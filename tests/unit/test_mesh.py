"""Process groups end with the interpreter, so that no thread of theirs outlives it."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import atexit
import torch.distributed as dist
from hf_tpp.mesh import initialize_distributed

atexit.register(lambda: print("groups at the exit:", dist.is_initialized()))  # runs after what is registered later
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
assert initialize_distributed() == 1
{end}
"""


@pytest.mark.parametrize(
    ("end", "code", "groups"),
    [("", 0, False), ("dist.destroy_process_group()", 0, False), ("raise ValueError('a rank fails')", 1, True)],
)
def test_groups_are_ended_at_the_exit_of_a_program_that_did_not_fail(end, code, groups):
    program = [sys.executable, "-c", PROGRAM.format(end=end)]
    result = subprocess.run(
        program, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == code, result.stderr
    assert f"groups at the exit: {groups}" in result.stdout


LETTING_GO = """
import threading
import time
import weakref
import torch
import torch.distributed as dist
from hf_tpp.mesh import initialize_distributed

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
assert initialize_distributed() == 1
group = dist.group.WORLD  # held, as the modules of a model hold theirs
letting_go, main = threading.Event(), threading.get_ident()

def last_owner():
    if threading.get_ident() != main:
        letting_go.set()
        time.sleep(0.1)  # the interpreter is free meanwhile, and the main thread ends
        print("let go", flush=True)

while not letting_go.wait(0.001):  # no further work meanwhile: it would wait for the thread
    tensor = torch.ones(1)
    weakref.finalize(tensor, last_owner).atexit = False
    dist.all_reduce(tensor)
    del tensor
{end}
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("end", ["", "dist.destroy_process_group()"])
def test_a_thread_of_a_group_may_let_go_of_its_last_tensor_before_the_interpreter_ends(end):
    program = [sys.executable, "-c", LETTING_GO.format(end=end)]
    result = subprocess.run(
        program, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=100, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "let go" in result.stdout
