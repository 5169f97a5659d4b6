"""One rank of several on one GPU: its collectives return at once, and move nothing.

What a rank computes and what its host issues, without the transfers: where two GPUs are not at hand, and to see what a
step would take if communication were free. Every rank seems to say what this one says. Sums are those of one rank, so
losses mean nothing.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

__all__ = ["one_rank_alone"]


@contextmanager
def one_rank_alone(world_size: int) -> Iterator[None]:
    """Be rank 0 of `world_size` ranks, of which the others do not exist."""
    create = dist.new_group

    def new_group(ranks: Any = None, timeout: Any = None, backend: Any = None, **options: Any) -> Any:
        """Whatever backend is asked for."""
        return create(ranks, timeout, "fake", **options)

    with patch.dict(os.environ, WORLD_SIZE=str(world_size)), patch.object(dist, "new_group", new_group):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
        yield
