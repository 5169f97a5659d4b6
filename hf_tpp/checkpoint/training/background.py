"""A checkpoint that is written while training goes on.

    copy of this rank's state, on the host  -->  a thread: written with the other ranks' threads  -->  published

The threads of the ranks talk to each other through a group of their own: collectives of training may run meanwhile.
"""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from hf_tpp.checkpoint.training.sharded_state import Sharded

__all__ = ["BackgroundSave", "snapshot"]


class BackgroundSave:
    """A save under way.

    Args:
        write: Writes and publishes; what it raises is raised by `wait`. The interpreter does not end before it does.
        on_all_ranks: Context in which an exception of one rank becomes one of all.

    Attributes:
        was_awaited: Somebody knows, or is about to know, how it went.
    """

    def __init__(self, write: Callable[[], None], on_all_ranks: Callable[[], Any]) -> None:
        pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._written = pool.submit(write)
        self._on_all_ranks = on_all_ranks
        self.was_awaited = False
        pool.shutdown(wait=False)

    @property
    def is_done(self) -> bool:
        """Whether this rank has nothing left to do; `wait` then says how it went."""
        return self._written.done()

    def wait(self) -> None:
        """Wait until the checkpoint is complete. Collective: every rank of the job.

        Raises:
            CheckpointError: It could not be written; raised on all ranks.
        """
        self.was_awaited = True
        wait([self._written])
        with self._on_all_ranks():
            self._written.result()


def snapshot(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of everything that training changes: on the host; shards of replicas on their device, as DTensors."""
    return {name: _copied(value) for name, value in state.items()}


def _copied(value: Any) -> Any:
    if isinstance(value, Sharded):
        return Sharded(_copied(value.tensor), value.spec)
    if isinstance(value, DTensor):
        return value.clone()
    return value.to("cpu", copy=True) if isinstance(value, torch.Tensor) else copy.deepcopy(value)
