"""Which communicator serves a tensor-parallel group at the moment.

The collectives of one communicator run one after the other, in whatever streams they are called. Microbatches that are
to overlap therefore use the group itself and its twin, a second group of the same ranks, in turn (the lanes of
`pipeline_parallel/lanes.py`); everything else uses the group.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["all_reduce_in_place", "of_lane", "on_twin"]

Group = dist.ProcessGroup


@dataclass(slots=True)
class _Redirection:
    """The group that is not used at the moment, and the one in its place."""

    group: Group | None = None
    twin: Group | None = None


_redirection = _Redirection()


def of_lane(group: Group | None) -> Group | None:
    """The communicator to use for `group`. torch.compile sees through this, and makes one graph for each answer."""
    twin = _redirection.twin
    return twin if twin is not None and _redirection.group is group else group


@contextmanager
def on_twin(group: Group, twin: Group) -> Iterator[None]:
    """Within this context `twin` is used for `group`, in the threads of the backward pass too."""
    before = _redirection.group, _redirection.twin
    _redirection.group, _redirection.twin = group, twin
    try:
        yield
    finally:
        _redirection.group, _redirection.twin = before


def all_reduce_in_place(x: torch.Tensor, op: Any, group: Group | None) -> None:
    """All-reduce outside autograd, on the communicator of the moment. Without a group nothing happens."""
    if group is not None:
        dist.all_reduce(x, op=op, group=of_lane(group))
