"""Norms over the channels of all ranks, inside a region (the full-width q and k norms of OLMo 2, sub-norms of BitNet).

    this rank's channels -> gather -> the model's own norm over all channels -> this rank's channels

Whatever the norm computes stays the model's own code. The gradient of its weight is summed over the ranks, each of
which sees the loss through its own channels only.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hf_tpp.collectives.autograd import gather_from_sequence_parallel
from hf_tpp.mesh import Axis
from hf_tpp.plan.layout import Layout

__all__ = ["install_full_width"]


def install_full_width(norm: nn.Module, of_input: Layout, of_output: Layout, tp: Axis) -> None:
    """Show `norm` all channels, and go on with this rank's.

    Args:
        norm: A module from [..., channels] to the same shape, or to [..., other channels].
        of_input: How the channels are cut; shards of equal size.
        of_output: How those of its output are cut.
        tp: The tp axis.
    """
    group = tp.group
    assert group is not None
    own = of_output.segments(tp.rank, tp.size)

    def gather(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_all_channels(args[0], of_input, group), *args[1:])

    def keep_own(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return torch.cat([output.narrow(-1, piece.start, piece.size) for piece in own], dim=-1)

    norm.register_forward_pre_hook(gather)
    norm.register_forward_hook(keep_own)


def _all_channels(local: torch.Tensor, layout: Layout, group: dist.ProcessGroup) -> torch.Tensor:
    """[..., local channels] -> [..., all channels]; gradients of all ranks are summed, copies give theirs to one."""
    gathered = gather_from_sequence_parallel(local, group, dim=local.dim() - 1)
    size = local.shape[-1]
    pieces = {
        segment.start: gathered.narrow(-1, rank * size + segment.local_start, segment.size)
        for rank in range(group.size())
        for segment in layout.segments(rank, group.size())
    }
    return torch.cat([pieces[start] for start in sorted(pieces)], dim=-1)
