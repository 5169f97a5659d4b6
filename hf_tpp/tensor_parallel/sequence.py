"""Sequence parallelism: between the regions every rank holds its own tokens.

    first block -> cut -> [b, s/tp, h] -> norm -> region -> ... -> norm -> region -> join -> last block's output

The cut happens at the model's first block and the join behind its last, so that the model's own code around the blocks
sees full sequences. That is exact only if everything between the regions treats tokens one by one.
"""

from typing import Any

from torch import nn

from hf_tpp.collectives.autograd import gather_from_tensor_parallel, scatter_to_tensor_parallel
from hf_tpp.errors import UnsupportedModelError
from hf_tpp.parts import ModelParts
from hf_tpp.plan.rules import RegionRule
from hf_tpp.tensor_parallel.region import RegionState
from hf_tpp.tensor_parallel.rewrite import RewritePlan
from hf_tpp.wrappers import LowRankSum

__all__ = ["check_dropout", "check_tokenwise", "install_sequence_boundaries"]

_ALLOWED = ("attention", "MLP")


def check_tokenwise(model: nn.Module, parts: ModelParts, plan: RewritePlan) -> None:
    """Check that every parameter of a block is in a region, or in a norm between regions.

    Experts are routed by token before their region gathers the sequence, and convolutions and recurrences mix tokens.
    What a region that the probe found does behind its row linear is not known.

    Raises:
        UnsupportedModelError: Something else works on the hidden states there.
    """
    known = (name for name, rule in plan.regions.items() if _treats_tokens_one_by_one(rule))
    regions = tuple(f"{name}." for name in known)
    for index in range(parts.num_blocks):
        block = parts.block_name(index)
        for name, module in model.get_submodule(block).named_modules(prefix=block):
            has_own = any(True for _ in module.parameters(recurse=False))
            if has_own and not f"{name}.".startswith(regions) and "Norm" not in type(module).__name__:
                raise UnsupportedModelError(
                    f"sequence_parallel=True cuts hidden states between the tensor-parallel regions, where {name} "
                    f"({type(module).__name__}) works on them, which is not known to treat tokens one by one: use "
                    f"sequence_parallel=False"
                )
    columns = [f"{name}.{child}" for name, rule in plan.regions.items() for child in rule.columns]
    for name in (*columns, parts.head):
        check_dropout(name, model.get_submodule(name))


def check_dropout(name: str, linear: nn.Module) -> None:
    """Check that the additions to a column-parallel linear drop nothing.

    Their input is whole on every rank, and the ranks' random streams have parted by then.

    Raises:
        UnsupportedModelError: They would drop other elements on each rank.
    """
    total = LowRankSum.of(linear)
    rates = [getattr(total.module.get_submodule(dropout), "p", 0.0) for dropout in total.dropouts] if total else []
    if max(rates, default=0.0) > 0.0:
        raise UnsupportedModelError(
            f"lora_dropout={max(rates)} at {name} must drop the same elements on all tensor-parallel ranks, which have "
            f"no random stream in common under sequence parallelism: use lora_dropout=0.0 or sequence_parallel=False"
        )


def _treats_tokens_one_by_one(rule: RegionRule) -> bool:
    return rule.kind in _ALLOWED and not rule.at_columns and rule.found_by != "probe"


def install_sequence_boundaries(first: nn.Module | None, last: nn.Module | None, state: RegionState) -> None:
    """Cut the sequence before the model's first block and join it after its last, where those are on this stage."""

    def cut(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not state.sequence_parallel:
            return args, kwargs
        state.streams.enter_sequence_shards()
        if not args:
            shard = scatter_to_tensor_parallel(kwargs["hidden_states"], state.group, dim=1)
            return args, {**kwargs, "hidden_states": shard}
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
