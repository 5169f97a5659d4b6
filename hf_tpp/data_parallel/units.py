"""Which parameters replicas gather and reduce together: those of one block, and all others; one type each."""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn

from hf_tpp.errors import UnsupportedModelError
from hf_tpp.parts import ModelParts

__all__ = ["UnitPlan", "check_shardable", "plan_units"]


@dataclass(frozen=True, slots=True)
class UnitPlan:
    """Parameters of one type that travel together.

    Attributes:
        module: The module whose submodules have them.
        parameters: The parameters, each once.
    """

    module: nn.Module
    parameters: tuple[nn.Parameter, ...]


def plan_units(model: nn.Module, parts: ModelParts) -> list[UnitPlan]:
    """The units of this rank's part of a model; first what lies outside the blocks, then block after block."""
    homes: dict[nn.Parameter, set[str]] = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        homes[parameter].add(_block_of(name, parts))
    members: dict[tuple[str, torch.dtype], list[nn.Parameter]] = {}
    for parameter, blocks in homes.items():
        # A weight that several blocks share belongs to none of them.
        home = next(iter(blocks)) if len(blocks) == 1 else ""
        members.setdefault((home, parameter.dtype), []).append(parameter)
    ordered = sorted(members.items(), key=lambda item: item[0][0] != "")
    return [UnitPlan(model.get_submodule(home), tuple(own)) for (home, _), own in ordered]


def _block_of(name: str, parts: ModelParts) -> str:
    if not parts.is_in_block(name):
        return ""
    return parts.block_name(int(name.removeprefix(parts.blocks + ".").partition(".")[0]))


def check_shardable(model: nn.Module) -> None:
    """Raise UnsupportedModelError unless every parameter has a dimension to be cut over replicas."""
    scalars = [name for name, parameter in model.named_parameters() if parameter.dim() == 0]
    if scalars:
        raise UnsupportedModelError(
            f"{type(model).__name__} has parameters without a dimension ({', '.join(scalars[:5])}), which replicas "
            f"cannot share: use data_parallel='replicate'"
        )
