"""Runs one function on several ranks, each a process of its own, and collects what they return or raise.

    results = run_ranks(body, 4, config, seed=1)  # body(config, seed=1) on ranks 0..3

`body` is a module-level function of a test module. The ranks are forked from a server that has torch and
transformers loaded already, so that a rank starts in a fraction of a second. No rank outlives the call.
"""

import contextlib
import faulthandler
import functools
import importlib
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

GRACE_S = 5.0
"""How long the other ranks may still run, and report their own error, once one rank has failed."""
PRELOADED = ("pytest", "torch.distributed", "transformers.modeling_utils", "hf_tpp.api", "tests.ranks")


@dataclass(frozen=True)
class Report:
    """What a rank sends back: its pickled result, or its exception as text."""

    result: bytes = b""
    error: str = ""
    type: str = ""
    message: str = ""


class RankError(Exception):
    """At least one rank failed or did not finish in time.

    Attributes:
        errors: Rank -> formatted traceback of the ranks that raised, in the order in which they did.
        types: Rank -> class name of its exception.
        messages: Rank -> message of its exception.
        unfinished: Rank -> stack dump of the ranks that had to be stopped.
    """

    def __init__(self, reports: Mapping[int, Report], unfinished: Mapping[int, str], timeout: float) -> None:
        failed = {rank: report for rank, report in reports.items() if report.error}
        self.errors = {rank: report.error for rank, report in failed.items()}
        self.types = {rank: report.type for rank, report in failed.items()}
        self.messages = {rank: report.message for rank, report in failed.items()}
        self.unfinished = dict(unfinished)
        summary = [f"rank {rank} raised {report.type}: {report.message}" for rank, report in failed.items()]
        if unfinished:
            names = ", ".join(map(str, unfinished))
            limit = f"{timeout:g} s" + (f", or {GRACE_S:g} s after the first failure" if failed else "")
            summary.append(f"rank {names} did not finish within {limit}")
        details = [f"--- rank {rank} ---\n{text.rstrip()}" for rank, text in self.errors.items()]
        details += [f"--- rank {rank}, stopped at ---\n{text.rstrip()}" for rank, text in unfinished.items()]
        super().__init__("\n".join([*summary, *details]))


def run_ranks(
    body: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0, init: bool = True, **kwargs: Any
) -> list[Any]:
    """Run `body(*args, **kwargs)` on `world_size` ranks.

    Args:
        body: A module-level function of an importable module.
        world_size: The number of ranks.
        *args: Positional arguments of `body`, pickled; CPU tensors are fine.
        timeout: Seconds after which the ranks still running are stopped, and named in the error.
        init: Whether torch.distributed is initialised (gloo). If not, the environment is set for `body` to call
            `init_process_group("gloo")` itself.
        **kwargs: Keyword arguments of `body`.

    Returns:
        What each rank returned, in the order of the ranks.

    Raises:
        RankError: A rank raised, died or did not finish in time.
    """
    call = _pickle_call(body, args, kwargs)
    context = _context()
    ranks: dict[int, BaseProcess] = {}
    pipes: dict[int, connection.Connection] = {}
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        environment = os.environ | {"WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
        if not init:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        try:
            for rank in range(world_size):
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                pipes[rank], theirs = context.Pipe(duplex=False)
                with theirs:
                    ranks[rank] = context.Process(target=_serve, args=(call, environment, Path(folder), init, theirs))
                    ranks[rank].start()
            reports = _collect(ranks, pipes, timeout)
            unfinished = {rank: _stack(ranks[rank], rank, Path(folder)) for rank in ranks if rank not in reports}
            for rank in reports:
                ranks[rank].join(GRACE_S)
        finally:
            _stop(ranks, pipes)
    if unfinished or any(report.error for report in reports.values()):
        raise RankError(reports, unfinished, timeout)
    return [pickle.loads(reports[rank].result) for rank in range(world_size)]


def _pickle_call(body: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes:
    # Pickled here and not by the process, which would pass tensors as shared memory.
    try:
        return pickle.dumps((body, args, kwargs))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"run_ranks pickles the function and its arguments, got {body!r}: {error}. "
            "Make it a module-level function and pass plain data"
        ) from error


@functools.cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([name for name in PRELOADED if _importable(name)])
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with mock.patch.dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1"):
        forkserver.ensure_running()
    return context


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except Exception:  # a broken module must not take the server down; the ranks that need it report it
        return False
    return True


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _collect(
    ranks: Mapping[int, BaseProcess], pipes: Mapping[int, connection.Connection], timeout: float
) -> dict[int, Report]:
    """Wait for the reports, which come back in the order of their arrival."""
    end = time.monotonic() + timeout
    waiting = {pipe: rank for rank, pipe in pipes.items()}
    reports: dict[int, Report] = {}
    while waiting and (ready := connection.wait(list(waiting), max(0.0, end - time.monotonic()))):
        for rank, pipe in [(waiting.pop(pipe), pipe) for pipe in ready]:
            try:
                reports[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                ranks[rank].join(GRACE_S)
                message = f"the process ended without a report, exit code {ranks[rank].exitcode}"
                reports[rank] = Report(error=message, type="ChildProcessError", message=message)
            if reports[rank].error:
                end = min(end, time.monotonic() + GRACE_S)
    return reports


def _stack(process: BaseProcess, rank: int, folder: Path) -> str:
    """Have a rank that hangs write its stack, and return it."""
    file = folder / f"stack{rank}"
    if not file.exists():
        return "(the rank had not started yet)"
    with contextlib.suppress(ProcessLookupError):  # it may have ended this very moment
        os.kill(process.pid, signal.SIGUSR1)
    size, end = -1, time.monotonic() + 2.0
    while time.monotonic() < end and (size <= 0 or size != file.stat().st_size):
        size = file.stat().st_size
        time.sleep(0.05)
    return file.read_text() or "(no stack)"


def _stop(ranks: Mapping[int, BaseProcess], pipes: Mapping[int, connection.Connection]) -> None:
    started = [process for process in ranks.values() if process.pid is not None]
    for process in started:
        process.kill()
    for process in started:
        process.join()
        process.close()
    for pipe in pipes.values():
        pipe.close()


def _serve(call: bytes, environment: Mapping[str, str], folder: Path, init: bool, pipe: connection.Connection) -> None:
    """The process of one rank: run the call and send the report."""
    os.environ.clear()
    os.environ.update(environment)
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    with (folder / f"stack{rank}").open("w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack)
        threading.Thread(target=_exit_with_parent, daemon=True).start()
        try:
            torch.set_num_threads(1)
            if sys.platform == "linux":
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            if init:
                store = f"file://{folder}/rendezvous"
                dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
            body, args, kwargs = pickle.loads(call)
            report = Report(result=pickle.dumps(body(*args, **kwargs)))
            if dist.is_initialized():
                dist.destroy_process_group()
        except BaseException as error:  # whatever ends the rank is what the test wants to see
            report = Report(error=traceback.format_exc(), type=type(error).__name__, message=str(error))
        pipe.send_bytes(pickle.dumps(report))


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
