"""Local processes that stand for the ranks of a job: start them once, run function after function on them.

    with World(4) as world:
        results = world.run(body, config, seed=1)  # body(config, seed=1) on ranks 0..3

`body` is a module-level function. The ranks are forked from a server that has torch and transformers loaded already, so
that a rank starts in a fraction of a second. Every call gets process groups of its own. A rank that dies or hangs is an
error of the call; its world is stopped, and the next call starts another one. No rank outlives its world.
"""

import contextlib
import faulthandler
import functools
import gc
import importlib
import multiprocessing
import os
import pickle
import re
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
from typing import Any, Self
from unittest import mock

import torch
import torch.distributed as dist

from hf_tpp.integrations.replicas import forget_meshes

__all__ = ["RankError", "World", "preload", "run_ranks"]

GRACE_S = 5.0
"""How long the other ranks may still run, and report their own error, once one rank has failed."""
_PRELOADED = ["torch.distributed", "transformers.modeling_utils", "hf_tpp.api", "hf_tpp.check.ranks"]


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
        summary: One sentence: the first failure, or where a rank hung.
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
        self.summary = summary[0].split("\n", maxsplit=1)[0]
        if not failed:
            self.summary += "".join(f"; rank {rank} was in {_innermost(text)}" for rank, text in unfinished.items())
        details = [f"--- rank {rank} ---\n{text.rstrip()}" for rank, text in self.errors.items()]
        details += [f"--- rank {rank}, stopped at ---\n{text.rstrip()}" for rank, text in unfinished.items()]
        super().__init__("\n".join([*summary, *details]))


def _innermost(stack: str) -> str:
    """The function of this package in which a dumped main thread was: `train of runner.py`."""
    frames = re.findall(r'File "([^"]*)", line \d+ in (\S+)', stack.rpartition("most recent call first")[2])
    own = [f"{name} of {Path(file).name}" for file, name in frames if "hf_tpp" in Path(file).parts]
    return next(iter(own), "the start of the process")


class World:
    """Some ranks on this machine, started at the first call and kept for further ones.

    Args:
        size: The number of ranks.
        init: Whether torch.distributed is initialised (gloo) for every call. If not, the environment is set for the
            function to call `init_process_group("gloo")` itself.
    """

    def __init__(self, size: int, *, init: bool = True) -> None:
        self.size, self._init = size, init
        self._ranks: dict[int, BaseProcess] = {}
        self._pipes: dict[int, connection.Connection] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._num_calls = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, body: Callable[..., Any], *args: Any, timeout: float = 60.0, **kwargs: Any) -> list[Any]:
        """Run `body(*args, **kwargs)` on every rank.

        Args:
            body: A module-level function of an importable module.
            *args: Positional arguments of `body`, pickled; CPU tensors are fine.
            timeout: Seconds after which the ranks still running are stopped, and named in the error.
            **kwargs: Keyword arguments of `body`.

        Returns:
            What each rank returned, in the order of the ranks.

        Raises:
            RankError: A rank raised, died or did not finish in time.
        """
        call = _pickle_call(body, args, kwargs)
        if not self._ranks:
            self._start()
        assert self._folder is not None
        self._num_calls += 1
        unfinished: dict[int, str] = {}
        reports: dict[int, Report] = {}
        try:
            for pipe in self._pipes.values():
                with contextlib.suppress(BrokenPipeError):  # a dead rank is reported by `_collect`
                    pipe.send((self._num_calls, call))
            reports = _collect(self._ranks, self._pipes, timeout)
            missing = [rank for rank in self._ranks if rank not in reports]
            unfinished = {rank: _stack(self._ranks[rank], rank, Path(self._folder.name)) for rank in missing}
        finally:
            if len(reports) < self.size or any(report.type == "ChildProcessError" for report in reports.values()):
                self.close()
        if unfinished or any(report.error for report in reports.values()):
            raise RankError(reports, unfinished, timeout)
        return [pickle.loads(reports[rank].result) for rank in range(self.size)]

    def close(self) -> None:
        """Stop the ranks; a further call would start new ones."""
        started = [process for process in self._ranks.values() if process.pid is not None]
        for process in started:
            process.kill()
        for process in started:
            process.join()
            process.close()
        for pipe in self._pipes.values():
            pipe.close()
        self._ranks, self._pipes = {}, {}
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        context = _context()
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        environment = os.environ | {"WORLD_SIZE": str(self.size), "OMP_NUM_THREADS": "1"}
        if not self._init:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        for rank in range(self.size):
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self._pipes[rank], theirs = context.Pipe()
            with theirs:
                arguments = (environment, Path(self._folder.name), self._init, theirs)
                self._ranks[rank] = context.Process(target=_serve, args=arguments)
                self._ranks[rank].start()


def run_ranks(
    body: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0, init: bool = True, **kwargs: Any
) -> list[Any]:
    """Run `body(*args, **kwargs)` once on `world_size` ranks, as `World.run` does.

    Returns:
        What each rank returned, in the order of the ranks.

    Raises:
        RankError: A rank raised, died or did not finish in time.
    """
    with World(world_size, init=init) as world:
        return world.run(body, *args, timeout=timeout, **kwargs)


def preload(*modules: str) -> None:
    """Have the server that ranks are forked from import further modules; before the first rank of this process."""
    _PRELOADED.extend(name for name in modules if name not in _PRELOADED)


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
    context.set_forkserver_preload([name for name in _PRELOADED if _importable(name)])
    root = str(Path(__file__).parents[2])
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
    waiting: dict[Any, int] = {pipe: rank for rank, pipe in pipes.items()}
    reports: dict[int, Report] = {}
    while waiting and (ready := connection.wait(list(waiting), max(0.0, end - time.monotonic()))):
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                reports[rank] = pickle.loads(pipes[rank].recv_bytes())
            except (EOFError, ConnectionResetError):
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
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError):  # it may have ended this very moment
        os.kill(process.pid, signal.SIGUSR1)
    size, end = -1, time.monotonic() + 2.0
    while time.monotonic() < end and (size <= 0 or size != file.stat().st_size):
        size = file.stat().st_size
        time.sleep(0.05)
    return file.read_text() or "(no stack)"


def _serve(environment: Mapping[str, str], folder: Path, init: bool, pipe: connection.Connection) -> None:
    """The process of one rank: run the calls that come in, and send a report of each."""
    os.environ.clear()
    os.environ.update(environment)
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with (folder / f"stack{rank}").open("w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack)
        while True:
            number, call = pipe.recv()
            try:
                if init:
                    store = f"file://{folder}/rendezvous{number}"
                    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
                body, args, kwargs = pickle.loads(call)
                report = Report(result=pickle.dumps(body(*args, **kwargs)))
            except BaseException as error:  # whatever ends the call is what the caller wants to see
                report = Report(error=traceback.format_exc(), type=type(error).__name__, message=str(error))
            if dist.is_initialized():
                dist.destroy_process_group()
            forget_meshes()
            gc.collect()  # a model of the last call may still hold groups and cycles
            pipe.send_bytes(pickle.dumps(report))


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
