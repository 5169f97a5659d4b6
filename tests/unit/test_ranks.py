"""The harness that the multi-process tests stand on."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from hf_tpp.check.ranks import Report
from tests.ranks import RankError, run_ranks


def empty():
    pass


def describe(*args, **kwargs):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
    return dist.get_rank(), [os.environ[name] for name in names], torch.get_num_threads(), args, kwargs


def sum_of_ranks():
    value = torch.full((2,), float(dist.get_rank()))
    dist.all_reduce(value)
    return value


def double(value):
    return value * 2


def join_through_env():
    initialised = dist.is_initialized()
    dist.init_process_group("gloo")
    return initialised, sum_of_ranks().tolist()


def fail_on(rank):
    if dist.get_rank() == rank:
        raise ValueError(f"no luck on {rank}")


def fail_everywhere():
    raise KeyError(dist.get_rank())


def hang_on(rank, seconds=600.0):
    if dist.get_rank() == rank:
        time.sleep(seconds)


def fail_beside_a_hang():
    hang_on(1)
    fail_on(0)


def die():
    os._exit(3)


def read_variable(name):
    return os.environ.get(name)


def leave_pid(folder, seconds=0.0):
    (folder / str(os.getpid())).touch()
    time.sleep(seconds)


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def unpicklable():
    return lambda: None


def test_results_come_in_the_order_of_the_ranks():
    results = run_ranks(describe, 3, "a", key=torch.ones(1))
    assert [result[0] for result in results] == [0, 1, 2]
    assert results[2][1] == ["2", "2", "3", "1"]
    assert results[2][2:] == (1, ("a",), {"key": torch.ones(1)})


def test_tensors_travel_in_both_directions():
    value = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    for result in run_ranks(double, 2, value):
        torch.testing.assert_close(result, value * 2, rtol=0, atol=0)


def test_all_reduce():
    for result in run_ranks(sum_of_ranks, 4):
        assert result.tolist() == [6.0, 6.0]


def test_body_can_initialise_through_the_environment():
    assert run_ranks(join_through_env, 2, init=False) == [(False, [1.0, 1.0])] * 2


def test_environment_of_the_test_reaches_the_ranks(monkeypatch):
    monkeypatch.setenv("RANKS_TEST_VARIABLE", "here")
    assert run_ranks(read_variable, 1, "RANKS_TEST_VARIABLE") == ["here"]


def test_failing_rank_is_named_with_its_traceback():
    with pytest.raises(RankError, match=r"rank 1 raised ValueError: no luck on 1") as caught:
        run_ranks(fail_on, 2, 1)
    error = caught.value
    assert error.types == {1: "ValueError"}
    assert error.messages == {1: "no luck on 1"}
    assert "in fail_on" in error.errors[1]
    assert error.errors[1].rstrip() in str(error)
    assert not error.unfinished


def test_error_of_every_rank_is_collected():
    with pytest.raises(RankError) as caught:
        run_ranks(fail_everywhere, 3)
    assert caught.value.messages == {0: "0", 1: "1", 2: "2"}
    assert sorted(caught.value.errors) == [0, 1, 2]


def test_errors_stand_in_the_order_in_which_they_came():
    """Given, not timed: the first failure is the summary."""
    reports = {rank: Report(error=f"trace {rank}", type="KeyError", message=str(rank)) for rank in (2, 0, 1)}
    error = RankError(reports, {}, 1.0)
    assert list(error.errors) == [2, 0, 1]
    assert error.summary == "rank 2 raised KeyError: 2"


def test_hang_becomes_a_failure_with_the_stack():
    begin = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1 did not finish within 3 s") as caught:
        run_ranks(hang_on, 2, 1, timeout=3.0)
    assert time.monotonic() - begin < 30
    assert not caught.value.errors
    assert list(caught.value.unfinished) == [1]
    assert "in hang_on" in caught.value.unfinished[1]


def test_failure_stops_the_ranks_that_hang(monkeypatch):
    monkeypatch.setattr("hf_tpp.check.ranks.GRACE_S", 1.0)
    begin = time.monotonic()
    with pytest.raises(RankError, match=r"rank 0 raised ValueError[^\n]*\nrank 1 did not finish") as caught:
        run_ranks(fail_beside_a_hang, 2)
    assert time.monotonic() - begin < 30
    assert list(caught.value.errors) == [0]
    assert "in fail_beside_a_hang" in caught.value.unfinished[1]


def test_death_of_a_rank_is_reported():
    with pytest.raises(RankError, match=r"rank 0 raised ChildProcessError: .* exit code 3"):
        run_ranks(die, 1)


def test_result_that_cannot_be_pickled_is_an_error_of_the_rank():
    with pytest.raises(RankError, match=r"rank 0 raised"):
        run_ranks(unpicklable, 1)


def test_local_function_is_refused():
    with pytest.raises(TypeError, match=r"module-level function"):
        run_ranks(lambda: None, 1)


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    temporary, pids = tmp_path / "temporary", tmp_path / "pids"
    temporary.mkdir()
    pids.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    run_ranks(leave_pid, 2, pids)
    with pytest.raises(RankError):
        run_ranks(leave_pid, 2, pids, seconds=600.0, timeout=2.0)
    assert not list(temporary.iterdir())
    left = [int(file.name) for file in pids.iterdir()]
    assert len(left) == 4
    assert not [pid for pid in left if is_running(pid)]


def test_speed_of_an_empty_body(capsys):
    run_ranks(empty, 2)
    begin = time.monotonic()
    run_ranks(empty, 2)
    with capsys.disabled():
        print(f" [2 ranks, empty body: {time.monotonic() - begin:.2f} s] ", end="")
