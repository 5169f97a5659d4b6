"""Swap the linears of a model for their tensor-parallel counterparts: check everything first, then change.

`plan_rewrite` reads the model and returns the whole plan or refuses; `apply_rewrite` cannot fail for a caller's reason.
New modules are created on the meta device; their parameters are filled afterwards, shard by shard.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn

from hf_tpp.errors import ConfigurationError
from hf_tpp.mesh import Axis
from hf_tpp.parts import ModelParts
from hf_tpp.plan.layout import Layout
from hf_tpp.plan.rules import Cut, RegionRule
from hf_tpp.sharding import ShardSpec, local_shape
from hf_tpp.tensor_parallel.attributes import set_attributes
from hf_tpp.tensor_parallel.full_width import install_full_width
from hf_tpp.tensor_parallel.linear import ColumnParallelLinear, ParallelLinear, RowParallelLinear
from hf_tpp.tensor_parallel.low_rank import LinearCuts, swap_linear
from hf_tpp.tensor_parallel.matching import UserPlan, find_rule, resolve_user_region
from hf_tpp.tensor_parallel.probe import probe_regions
from hf_tpp.tensor_parallel.region import RegionState, install_region_entry, install_region_exit
from hf_tpp.tensor_parallel.vocabulary import VocabularyPlan, apply_vocabulary, plan_vocabulary
from hf_tpp.wrappers import is_wrapper

__all__ = ["RewritePlan", "apply_rewrite", "plan_rewrite"]


@dataclass(frozen=True, slots=True)
class RewritePlan:
    """What will be swapped.

    Attributes:
        tp_size: Size of the tp axis.
        vocabulary: What happens to embedding and head.
        regions: Name of a region's module -> its rule.
        cuts: Parameter name -> (dimension that is cut, its layout). Whatever is not named stays whole.
        summed: Whole parameters of which each tp rank computes a part of the gradient.
        declined: Name of a module that was probed and stays whole -> why.
    """

    tp_size: int
    vocabulary: VocabularyPlan
    regions: dict[str, RegionRule] = field(default_factory=dict)
    cuts: dict[str, tuple[int, Layout]] = field(default_factory=dict)
    summed: set[str] = field(default_factory=set)
    declined: dict[str, str] = field(default_factory=dict)

    @property
    def decisions(self) -> str:
        """All that ranks must agree on, as text."""
        attributes = {name: dict(rule.attributes) for name, rule in self.regions.items()}
        return str((self.cuts, sorted(self.summed), attributes))

    def add_linear(self, name: str, linear: LinearCuts) -> None:
        """Note the cuts of a linear of this name."""
        self.cuts.update({f"{name}.{parameter}": cut for parameter, cut in linear.cuts.items()})
        self.summed.update(f"{name}.{parameter}" for parameter in linear.summed)


def plan_rewrite(model: nn.Module, parts: ModelParts, tp_size: int, user: UserPlan | None = None) -> RewritePlan:
    """Work out all cuts of a model without changing it.

    Args:
        model: The whole model.
        parts: Its parts.
        tp_size: Number of tensor-parallel ranks.
        user: Goes before what is found by names. What neither knows is probed, in code that transformers does not ship.

    Raises:
        ConfigurationError: The heads cannot be dealt out to `tp_size` ranks.
        UnsupportedModelError: A part that would be cut is quantized or wrapped.
    """
    plan = RewritePlan(tp_size, plan_vocabulary(model, parts, tp_size))
    if tp_size == 1:
        return plan
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    user = user or {}
    _check_names(user, model, parts)
    chosen_by_user: list[str] = []
    for name, module in _modules_of_blocks(model, parts):
        chosen = next((pattern for pattern in user if fnmatchcase(name, pattern)), None)
        if chosen is None:
            rule = find_rule(name, module, config, tp_size)
        else:
            chosen_by_user.append(name)
            region = user[chosen]
            rule = None if region is None else resolve_user_region(name, module, region, config, tp_size)
        if rule is not None:
            plan.regions[name] = rule
    if not parts.is_shipped(model):
        probed = probe_regions(model, parts, config, tp_size, {*plan.regions, *chosen_by_user})
        plan.regions.update(probed.rules)
        plan.declined.update(probed.declined)
    for name, rule in plan.regions.items():
        _add_cuts(plan, name, model.get_submodule(name), rule)
    plan.cuts.update(plan.vocabulary.cuts)
    plan.summed.update(plan.vocabulary.summed)
    return plan


def _check_names(user: UserPlan, model: nn.Module, parts: ModelParts) -> None:
    names = [name for name, _ in _modules_of_blocks(model, parts)]
    for pattern in user:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigurationError(
                f"plan names {pattern!r}, which is no module of a block of {type(model).__name__}: use names such as "
                f"{names[1]!r}, with * for the number"
            )


def _modules_of_blocks(model: nn.Module, parts: ModelParts) -> Iterator[tuple[str, nn.Module]]:
    """Every module of every block, under each of its names: blocks may share modules. Adapters are not looked into."""
    for index in range(parts.num_blocks):
        block = parts.block_name(index)
        inside: tuple[str, ...] = ()
        for name, module in model.get_submodule(block).named_modules(remove_duplicate=False):
            if name and name.startswith(inside):
                continue
            if is_wrapper(module):
                inside += (f"{name}.",)
            yield f"{block}.{name}" if name else block, module


def _add_cuts(plan: RewritePlan, name: str, module: nn.Module, rule: RegionRule) -> None:
    for child, layout in rule.columns.items():
        plan.add_linear(f"{name}.{child}", LinearCuts.of(module.get_submodule(child), True, layout))
    if rule.row:
        plan.add_linear(f"{name}.{rule.row}", LinearCuts.of(module.get_submodule(rule.row), False, rule.row_layout))
    for tensor, cut in rule.tensors.items():
        plan.cuts[f"{name}.{tensor}"] = (cut.dim, cut.layout)
    plan.summed.update(f"{name}.{parameter}" for parameter in rule.summed)


def apply_rewrite(
    model: nn.Module, parts: ModelParts, plan: RewritePlan, tp: Axis, blocks: range, state: RegionState
) -> None:
    """Swap the modules of the local `blocks`, the embedding and the head, in place.

    Args:
        model: The model that `plan` was made for.
        parts: Its parts.
        plan: What to swap.
        tp: The tp axis.
        blocks: Indices of the blocks on this stage.
        state: Shared by all regions.
    """
    if plan.tp_size == 1:
        return
    local = tuple(f"{parts.block_name(index)}." for index in blocks)
    done: set[nn.Module] = set()
    for name, rule in plan.regions.items():
        module = model.get_submodule(name)
        if f"{name}.".startswith(local) and module not in done:
            done.add(module)
            _rewrite_region(module, rule, tp, state)
    apply_vocabulary(model, parts, plan.vocabulary, tp, state.streams)


def _rewrite_region(module: nn.Module, rule: RegionRule, tp: Axis, state: RegionState) -> None:
    for child, layout in rule.columns.items():

        def column(full: nn.Module, layout: Layout = layout) -> ParallelLinear:
            region = state if rule.at_columns else None
            return ColumnParallelLinear.from_linear(
                full, group=tp.group, layout=layout, copy_input=False, region=region, device="meta"
            )

        swap_linear(module, child, column, state.streams)
    if rule.row:

        def row(full: nn.Module) -> ParallelLinear:
            return RowParallelLinear.from_linear(
                full, group=tp.group, layout=rule.row_layout, region=state, device="meta"
            )

        swap_linear(module, rule.row, row, state.streams)
    else:
        install_region_exit(module, rule, state, tp)
    for name, cut in rule.tensors.items():
        _cut_tensor(module, name, cut, tp)
    for name, (of_input, of_output) in rule.gathered.items():
        install_full_width(module.get_submodule(name), of_input, of_output, tp)
    set_attributes(module, rule.attributes)
    if not rule.at_columns:
        install_region_entry(module, rule, state, tp)


def _cut_tensor(module: nn.Module, name: str, cut: Cut, tp: Axis) -> None:
    """Make room for this rank's shard of a parameter that belongs to no linear."""
    owner, _, attribute = name.rpartition(".")
    parent = module.get_submodule(owner)
    full = parent._parameters[attribute]
    if full is None:  # a bias that this layer does not have
        return
    shape = local_shape(ShardSpec(name, tuple(full.shape), cut.dim, cut.layout, tp.rank, tp.size))
    empty = torch.empty(shape, dtype=full.dtype, device="meta")
    parent.register_parameter(attribute, nn.Parameter(empty, requires_grad=full.requires_grad))
    if isinstance(parent, nn.Conv1d) and attribute == "weight":  # depthwise: a group for each channel
        parent.in_channels = parent.out_channels = parent.groups = shape[0]
