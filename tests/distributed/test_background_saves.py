"""Training state that is written in a thread while training goes on."""

import copy
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from hf_tpp.checkpoint.training import latest_checkpoint, save_training_state
from hf_tpp.errors import CheckpointError
from tests.distributed.test_training_state import ALONE, Job, load_body, trained
from tests.ranks import run_ranks

EXTRA = {"step": 2, "nested": {"betas": (0.9, 0.95)}}


def save(job, directory):
    extra = copy.deepcopy(EXTRA)
    pending = save_training_state(
        directory, job.model, job.optimizer, specs=job.specs, mesh=job.mesh, extra=extra, asynchronous=True
    )
    extra["nested"]["betas"] = "what training makes of it later"
    return pending


def held_back():
    """Files are not written before `go` is set."""
    go, write = threading.Event(), FileSystemWriter.write_data

    def late(*args, **kwargs):
        assert go.wait(60)
        return write(*args, **kwargs)

    return go, mock.patch.object(FileSystemWriter, "write_data", late)


def trains_on_body(tp, pp, directory):
    job = Job(tp, pp, salt=0)
    job.step(0)
    job.step(1)
    go, patch = held_back()
    with patch:
        pending = save(job, directory)
        for step in (2, 3):  # with collectives of its own
            job.step(step)
            dist.all_reduce(torch.ones(3))
        assert not pending.is_done
        assert latest_checkpoint(directory.parent) is None
        go.set()
        pending.wait()
    assert pending.is_done
    assert latest_checkpoint(directory.parent) == directory


@pytest.mark.parametrize(("tp", "pp", "dp"), [(2, 1, 1), (1, 2, 2)])
def test_holds_the_state_of_the_call(tmp_path: Path, tp: int, pp: int, dp: int) -> None:
    run_ranks(trains_on_body, tp * pp * dp, tp, pp, tmp_path / "step-2")
    load_body(1, 1, tmp_path / "step-2")


def two_saves_body(directory):
    job = Job(2, 1, salt=0)
    job.step(0)
    job.step(1)
    first = save(job, directory / "step-1")
    job.step(2)
    second = save(job, directory / "step-2")
    assert first.is_done  # one at a time
    job.load(directory / "step-2")  # nor is anything read before it is there
    assert second.is_done
    job.check(trained(3))


def test_the_next_save_and_a_load_wait(tmp_path: Path) -> None:
    run_ranks(two_saves_body, 2, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"step-1", "step-2", "latest"}


def left_to_itself(directory):
    """A program that ends while a save is under way."""
    go, patch = held_back()
    patch.start()
    save(trained(2), directory)
    threading.Timer(1.0, go.set).start()


def test_the_end_of_the_program_waits(tmp_path: Path) -> None:
    program = f"from {__name__} import *; left_to_itself(Path({str(tmp_path / 'step-2')!r}))"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2], timeout=120)
    load_body(1, 1, tmp_path / "step-2")


def fails_body(directory):
    job = Job(2, 1, salt=0)
    job.step(0)
    failing = mock.patch.object(FileSystemWriter, "write_data", mock.Mock(side_effect=OSError("disk full")))
    if job.mesh.tp.rank == 1:
        failing.start()
    with pytest.raises(CheckpointError, match="disk full"):
        save(job, directory / "step-1").wait()
    save(job, directory / "step-2")
    with pytest.raises(CheckpointError, match="disk full"):
        save(job, directory / "step-3")
    if job.mesh.tp.rank == 1:
        failing.stop()
    save(job, directory / "step-4").wait()


def test_an_error_is_raised_on_all_ranks_at_the_latest_by_the_next_save(tmp_path: Path) -> None:
    run_ranks(fails_body, 2, tmp_path)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-4"
    assert {path.name for path in tmp_path.iterdir()} == {"step-4", "latest"}


def test_in_one_process(tmp_path: Path) -> None:
    job = trained(2)
    pending = save(job, tmp_path / "step-2")
    job.step(5)
    pending.wait()
    load_body(1, 1, tmp_path / "step-2")
    assert job.mesh is ALONE
