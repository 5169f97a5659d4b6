"""Where replicated activations become sharded: the entry of a region, and what all regions of a model share.

                             between regions                 inside a region
    tensor parallel          [b, s, h] replicated   -enter-> [b, s, heads or neurons of this rank]
    + sequence parallel      [b, s/tp, h]           -enter-> [b, s, heads or neurons of this rank]

The exit is the region's `RowParallelLinear`.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hf_tpp.collectives.autograd import (
    copy_to_tensor_parallel,
    gather_from_sequence_parallel,
    gather_from_tensor_parallel,
    reduce_from_tensor_parallel,
    reduce_scatter_to_sequence_parallel,
    scatter_to_tensor_parallel,
)
from hf_tpp.dropout import DropoutStreams

__all__ = ["RegionState", "install_region_entry", "install_sequence_boundaries"]


@dataclass(slots=True)
class RegionState:
    """State that all regions of one model share.

    Attributes:
        group: The tp group.
        streams: The dropout streams.
        sequence_parallel: Hidden states between regions are cut along the sequence; true only while training.
    """

    group: dist.ProcessGroup | None
    streams: DropoutStreams
    sequence_parallel: bool = False

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Bring the input of a region in: [b, s, h] (or [b, s/tp, h]) -> [b, s, h]."""
        if self.sequence_parallel:
            return gather_from_sequence_parallel(x, self.group)
        self.streams.enter_region()
        return copy_to_tensor_parallel(x, self.group)

    def leave(self, partial: torch.Tensor) -> torch.Tensor:
        """Sum the partial results of a region: [b, s, h] -> [b, s, h] (or [b, s/tp, h])."""
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel(partial, self.group)
        self.streams.leave_region()
        return reduce_from_tensor_parallel(partial, self.group)


def install_region_entry(parent: nn.Module, state: RegionState) -> None:
    """Let the hidden states (first argument) of `parent` enter the region, once for all its column linears."""

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (state.enter(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": state.enter(kwargs["hidden_states"])}

    parent.register_forward_pre_hook(enter, with_kwargs=True)


def install_sequence_boundaries(first: nn.Module | None, last: nn.Module | None, state: RegionState) -> None:
    """Cut the sequence before the model's first block and join it after its last, where those are on this stage."""

    def cut(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not state.sequence_parallel:
            return args, kwargs
        state.streams.enter_sequence_shards()
        return (scatter_to_tensor_parallel(args[0], state.group, dim=1), *args[1:]), kwargs

    def join(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not state.sequence_parallel:
            return output
        if isinstance(output, tuple):
            return gather_from_tensor_parallel(output[0], state.group, dim=1), *output[1:]
        return gather_from_tensor_parallel(output, state.group, dim=1)

    if first is not None:
        first.register_forward_pre_hook(cut, with_kwargs=True)
    if last is not None:
        last.register_forward_hook(join)
