"""Where replicated activations become sharded: the entry of a region, and what all regions of a model share.

                             between regions                 inside a region
    tensor parallel          [b, s, h] replicated   -enter-> [b, s, heads or neurons of this rank]
    + sequence parallel      [b, s/tp, h]           -enter-> [b, s, heads or neurons of this rank]

The exit is the region's `RowParallelLinear`.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_tpp.collectives.autograd import (
    copy_to_tensor_parallel,
    gather_from_sequence_parallel,
    reduce_from_tensor_parallel,
    reduce_scatter_to_sequence_parallel,
)
from hf_tpp.dropout import DropoutStreams
from hf_tpp.errors import UnsupportedModelError
from hf_tpp.mesh import Axis
from hf_tpp.plan.rules import RegionRule

__all__ = ["RegionEntry", "RegionState", "install_region_entry", "install_region_exit", "is_per_head", "own_heads"]


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
        if self.streams.active:
            self.streams.enter_region()
        return copy_to_tensor_parallel(x, self.group)

    def leave(self, partial: torch.Tensor) -> torch.Tensor:
        """Sum the partial results of a region: [b, s, h] -> [b, s, h] (or [b, s/tp, h])."""
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel(partial, self.group)
        if self.streams.active:
            self.streams.leave_region()
        return reduce_from_tensor_parallel(partial, self.group)


@dataclass(frozen=True, slots=True)
class RegionEntry:
    """How the inputs of one module enter its region; the module keeps it as `region_entry`.

    Attributes:
        names: The arguments of the module's forward.
        rule: What is done with those beside the hidden states.
        state: Shared by all regions.
        tp: The tp axis.
    """

    names: tuple[str, ...]
    rule: RegionRule
    state: RegionState
    tp: Axis

    def first(self, kwargs: dict[str, Any]) -> str:
        """The argument that holds the hidden states where all are given by name."""
        first = self.names[0]
        return first if first in kwargs else next(name for name in (*self.names, *kwargs) if name in kwargs)


def install_region_entry(module: nn.Module, rule: RegionRule, state: RegionState, tp: Axis) -> None:
    """Let the inputs of `module` enter the region: its hidden states (the first argument) once for all column linears.

    Args:
        module: The region's module, or a column linear that is entered by itself.
        rule: What is done with its other arguments.
        state: Shared by all regions.
        tp: The tp axis.
    """
    names = tuple(inspect.signature(module.forward).parameters)
    module.region_entry = RegionEntry(names, rule, state, tp)  # type: ignore[assignment]
    module.register_forward_pre_hook(_enter, with_kwargs=True)


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """One function for all modules: a compiled block is shared by layers, and what differs must be seen at them."""
    entry: RegionEntry = module.region_entry  # type: ignore[assignment]
    hidden = args[0] if args else kwargs[entry.first(kwargs)]
    entered = entry.state.enter(hidden)
    for name, value in kwargs.items():
        if value is hidden:
            kwargs[name] = entered
        elif isinstance(value, Tensor):
            kwargs[name] = _bring_in(module, name, value)
    if len(args) == 1:
        return (entered,), kwargs
    if not args:
        return args, kwargs
    others = [
        entered if value is hidden else _bring_in(module, name, value) if isinstance(value, Tensor) else value
        for name, value in zip(entry.names[1:], args[1:], strict=False)
    ]
    return (entered, *others, *args[1 + len(others) :]), kwargs


def _bring_in(module: nn.Module, name: str, value: torch.Tensor) -> torch.Tensor:
    """An argument beside the hidden states: per head, with a gradient, or neither."""
    entry: RegionEntry = module.region_entry  # type: ignore[assignment]
    rule, state = entry.rule, entry.state
    if is_per_head(name, value, rule):
        value = copy_to_tensor_parallel(value, state.group) if value.requires_grad else value
        return own_heads(module, name, value, rule, entry.tp)
    if not value.requires_grad or name in rule.outside_inputs:
        return value
    if rule.kind == "experts":
        return copy_to_tensor_parallel(value, state.group)
    raise UnsupportedModelError(
        f"{type(module).__name__} is given {name!r}, which needs a gradient, beside the hidden states: it is not known "
        f"how that gradient is summed over tensor-parallel ranks; use tp=1 for this model"
    )


def is_per_head(name: str, value: torch.Tensor, rule: RegionRule) -> bool:
    """Whether an argument has one slice per head, of which a rank is given its own."""
    is_mask = name == "attention_mask" and value.dim() == 4 and value.shape[1] > 1
    return rule.kind == "attention" and (name in rule.head_inputs or is_mask)


def own_heads(module: nn.Module, name: str, value: torch.Tensor, rule: RegionRule, tp: Axis) -> torch.Tensor:
    """This rank's heads of [heads, ...], [batch, heads, ...] or [batch x heads, ...].

    Raises:
        UnsupportedModelError: It does not show which heads those are.
    """
    heads = rule.head_layout
    if heads is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} is given {name!r} for each head, but a rank's heads do not lie side by side: "
            f"use tp=1 for this model"
        )
    (piece,) = heads.segments(tp.rank, tp.size)
    if value.dim() == 4 and value.shape[1] == heads.size:
        return value[:, piece.start : piece.stop]
    if value.dim() != 3 or value.shape[0] % heads.size:
        raise UnsupportedModelError(
            f"{type(module).__name__} is given {name!r} of shape {list(value.shape)}, which does not show what of it "
            f"belongs to which of its {heads.size} heads: use tp=1 for this model"
        )
    if value.shape[0] == heads.size:
        return value[piece.start : piece.stop]
    by_head = value.view(-1, heads.size, *value.shape[1:])
    return by_head[:, piece.start : piece.stop].flatten(0, 1)


def install_region_exit(module: nn.Module, rule: RegionRule, state: RegionState, tp: Axis) -> None:
    """Sum the output of `module` over the ranks; what it adds to the sum by itself counts on the first rank only."""
    share = float(tp.is_first)
    parameters = [name for name in rule.on_first if name in module._parameters]

    def count_once(_: nn.Module, args: tuple[Any, ...]) -> None:
        for name in parameters:
            # An instance attribute hides the parameter of that name while the forward runs.
            vars(module)[name] = module._parameters[name] * share  # type: ignore[operator]

    def leave(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        for name in parameters:
            vars(module).pop(name, None)
        return state.leave(output)

    for name in rule.on_first:
        if name not in parameters:
            module.get_submodule(name).register_forward_hook(lambda _, args, output: output * share)
    module.register_forward_pre_hook(count_once)
    module.register_forward_hook(leave)
