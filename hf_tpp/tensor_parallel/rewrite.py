"""Swap the linears of a model for their tensor-parallel counterparts: check everything first, then change.

`plan_rewrite` reads the model and returns the whole plan or refuses; `apply_rewrite` cannot fail for a caller's reason.
New modules are created on the meta device; their parameters are filled afterwards, shard by shard.
"""

from dataclasses import dataclass

import torch
from torch import nn

from hf_tpp.errors import UnsupportedModelError
from hf_tpp.mesh import Axis
from hf_tpp.parts import ModelParts
from hf_tpp.plan.layout import Layout, padded_vocabulary
from hf_tpp.plan.resolve import HeadCounts, family_of, resolve_region
from hf_tpp.plan.rules import RegionRule
from hf_tpp.tensor_parallel.embedding import VocabParallelEmbedding
from hf_tpp.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear, linear_sizes
from hf_tpp.tensor_parallel.loss import VocabParallelCausalLMLoss
from hf_tpp.tensor_parallel.region import RegionState, install_region_entry

__all__ = ["RewritePlan", "apply_rewrite", "plan_rewrite"]


@dataclass(frozen=True, slots=True)
class RewritePlan:
    """What will be swapped.

    Attributes:
        tp_size: Size of the tp axis.
        regions: Name of a region's parent module -> its rule.
        vocabulary: Layout of the vocabulary.
        cuts: Parameter name -> (dimension that is cut, its layout). Whatever is not named stays whole.
    """

    tp_size: int
    regions: dict[str, RegionRule]
    vocabulary: Layout
    cuts: dict[str, tuple[int, Layout]]


def plan_rewrite(model: nn.Module, parts: ModelParts, tp_size: int) -> RewritePlan:
    """Work out all cuts of a model without changing it.

    Raises:
        ConfigurationError: The heads cannot be dealt out to `tp_size` ranks.
        UnsupportedModelError: The family has no table row, or a block does not look like its row.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    family = family_of(config.model_type)
    embedding = model.get_submodule(parts.embedding)
    assert isinstance(embedding, nn.Embedding)
    if tp_size == 1:
        return RewritePlan(1, {}, padded_vocabulary(embedding.num_embeddings, 1), {})
    num_heads = int(config.num_attention_heads)
    heads = HeadCounts(num_heads, int(getattr(config, "num_key_value_heads", None) or num_heads))
    heads.check(tp_size)
    plan = RewritePlan(tp_size, {}, padded_vocabulary(embedding.num_embeddings, tp_size), {})
    for index in range(parts.num_blocks):
        for region in family.regions:
            name = f"{parts.block_name(index)}.{region.parent}"
            try:
                parent = model.get_submodule(name)
                sizes = {child: linear_sizes(parent.get_submodule(child)) for child in (*region.columns, region.row)}
            except (AttributeError, ValueError) as error:
                raise UnsupportedModelError(
                    f"{name} does not look like a block of {config.model_type} ({error}): "
                    f"pass the model before it is quantized, wrapped or given adapters"
                ) from error
            rule = resolve_region(
                region, heads, {child: sizes[child][1] for child in region.columns}, sizes[region.row][0], tp_size
            )
            plan.regions[name] = rule
            _add_cuts(plan, name, parent, rule)
    _add_vocabulary(plan, model, parts)
    return plan


def _add_cuts(plan: RewritePlan, name: str, parent: nn.Module, rule: RegionRule) -> None:
    for child, layout in rule.columns.items():
        transposed = linear_sizes(parent.get_submodule(child))[2]
        plan.cuts[f"{name}.{child}.weight"] = (int(transposed), layout)
        plan.cuts[f"{name}.{child}.bias"] = (0, layout)
    transposed = linear_sizes(parent.get_submodule(rule.region.row))[2]
    plan.cuts[f"{name}.{rule.region.row}.weight"] = (int(not transposed), rule.row)


def _add_vocabulary(plan: RewritePlan, model: nn.Module, parts: ModelParts) -> None:
    embedding, head = model.get_submodule(parts.embedding), model.get_submodule(parts.head)
    if embedding.num_embeddings != head.out_features:
        raise UnsupportedModelError(
            f"the embedding has {embedding.num_embeddings} tokens and the head {head.out_features}: "
            f"resize both to one vocabulary (model.resize_token_embeddings)"
        )
    VocabParallelEmbedding.check(embedding)  # type: ignore[arg-type]
    for name in (f"{parts.embedding}.weight", f"{parts.head}.weight", f"{parts.head}.bias"):
        plan.cuts[name] = (0, plan.vocabulary)


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
    for name, rule in plan.regions.items():
        if name.startswith(local):
            _rewrite_region(model.get_submodule(name), rule, tp, state)
    head = model.get_submodule(parts.head)
    parallel_head = ColumnParallelLinear.from_linear(head, group=tp.group, layout=plan.vocabulary, device="meta")
    _swap(model, parts.head, parallel_head)
    embedding = model.get_submodule(parts.embedding)
    with torch.device("meta"):
        _swap(
            model,
            parts.embedding,
            VocabParallelEmbedding(
                embedding.num_embeddings,  # type: ignore[arg-type]
                embedding.embedding_dim,  # type: ignore[arg-type]
                group=tp.group,
                padding_idx=embedding.padding_idx,  # type: ignore[arg-type]
                dtype=embedding.weight.dtype,  # type: ignore[arg-type]
            ),
        )
    model.loss_function = VocabParallelCausalLMLoss(plan.vocabulary, tp.group)  # type: ignore[assignment]


def _rewrite_region(parent: nn.Module, rule: RegionRule, tp: Axis, state: RegionState) -> None:
    for child, layout in rule.columns.items():
        full = parent.get_submodule(child)
        local = ColumnParallelLinear.from_linear(full, group=tp.group, layout=layout, copy_input=False, device="meta")
        setattr(parent, child, local)
    full = parent.get_submodule(rule.region.row)
    row = RowParallelLinear.from_linear(full, group=tp.group, layout=rule.row, region=state, device="meta")
    setattr(parent, rule.region.row, row)
    for attribute in rule.region.divide:
        setattr(parent, attribute, getattr(parent, attribute) // tp.size)
    for attribute, value in rule.attributes.items():
        setattr(parent, attribute, value)
    install_region_entry(parent, state)


def _swap(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
