"""Gradients of one unit: their mean over replicas, of which each replica gets its rows.

A replica has rows [r * c, (r + 1) * c) of a parameter of n rows, with c = ceil(n / dp): what torch calls Shard(0). One
message carries all parameters of a unit, each padded to dp x c rows, cut into what goes where:

              to replica 0          to replica 1
    message   a[:c] b[:c] ...       a[c:] b[c:] ...
"""

from collections.abc import Sequence

import torch

from hf_tpp.collectives.flat import reduce_scatter_flat
from hf_tpp.mesh import Axis
from hf_tpp.sharding import rows_of

__all__ = ["scatter_mean"]


@torch.no_grad()
def scatter_mean(tensors: Sequence[torch.Tensor], axis: Axis) -> list[torch.Tensor]:
    """This replica's rows of the mean of each tensor over `axis`, in one message.

    Args:
        tensors: Of one type, of any shapes that have rows; the same shapes on all ranks.
        axis: The data-parallel axis.

    Collective over `axis`.
    """
    pieces = [_by_rank(tensor, axis.size) for tensor in tensors]
    message = torch.cat(pieces, dim=1)
    received = message.new_empty(message.shape[1])
    reduce_scatter_flat(received, message.view(-1), group=axis.group)
    received /= axis.size
    found = []
    for tensor, part in zip(tensors, received.split([piece.shape[1] for piece in pieces]), strict=True):
        start, stop = rows_of(tensor.shape[0], axis.rank, axis.size)
        rows = part.view(-1, *tensor.shape[1:]) if part.numel() else part.view(0, *tensor.shape[1:])
        # A copy: p.grad must not keep the whole message alive, and may be changed in place.
        found.append(rows[: stop - start].clone())
    return found


def _by_rank(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """[rows, ...] -> [size, padded values per rank]."""
    per_rank = -(-tensor.shape[0] // size)
    missing = size * per_rank - tensor.shape[0]
    if missing:
        tensor = torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])
    return tensor.reshape(size, -1)
