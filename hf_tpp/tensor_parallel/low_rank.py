"""Additions of low rank to a parallel linear, cut as the linear is (`hf_tpp.wrappers` draws it).

The sum of all products passes the ends of the linear: what the linear's input enters through and its output leaves
through moves to the sum. So a row-parallel linear and its additions are reduced together, in one collective.

                  q_proj (sum)                                o_proj (sum)
    enter ------> W x            [.., local out]              W_r x_r     [.., out]  partial
                  + B_r (A x)    [.., local out] ------->     + B (A_r x_r)  partial ----> reduce over tp, + bias
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from hf_tpp.dropout import DropoutStreams
from hf_tpp.plan.layout import Layout
from hf_tpp.tensor_parallel.linear import ColumnParallelLinear, ParallelLinear, RowParallelLinear
from hf_tpp.tensor_parallel.plain_linear import linear_sizes
from hf_tpp.wrappers import LowRankSum

__all__ = ["LinearCuts", "cut_additions", "swap_linear"]


@dataclass(frozen=True, slots=True)
class LinearCuts:
    """How the parameters of a linear are cut, with those of its additions. Names are relative to it.

    Attributes:
        cuts: Parameter -> (dimension that is cut, its layout).
        summed: Whole parameters of which each tp rank computes a part of the gradient.
    """

    cuts: dict[str, tuple[int, Layout]] = field(default_factory=dict)
    summed: tuple[str, ...] = ()

    @classmethod
    def of(cls, linear: nn.Module, cuts_outputs: bool, layout: Layout) -> "LinearCuts":
        """The cuts of a plain linear, or of a sum.

        Args:
            linear: The linear, before anything is swapped.
            cuts_outputs: Its outputs are cut; if not, its inputs.
            layout: Of the channels that are cut.
        """
        total = LowRankSum.of(linear)
        base = "" if total is None else f"{LowRankSum.BASE}."
        transposed = linear_sizes(linear)[2]
        cuts = {f"{base}weight": (int(transposed if cuts_outputs else not transposed), layout)}
        if cuts_outputs:
            cuts[f"{base}bias"] = (0, layout)
        if total is None:
            return cls(cuts)
        additions = cls.of_additions(total, cuts_outputs, layout)
        return cls(cuts | additions.cuts, additions.summed)

    @classmethod
    def of_additions(cls, total: LowRankSum, cuts_outputs: bool, layout: Layout) -> "LinearCuts":
        """The cuts of the additions alone; those of `total.base` may be made already."""
        cut, summed = (total.ups, total.downs) if cuts_outputs else (total.downs, total.ups)
        dim = 0 if cuts_outputs else 1
        return cls({f"{name}.weight": (dim, layout) for name in cut}, tuple(f"{name}.weight" for name in summed))


def swap_linear(
    parent: nn.Module,
    child: str,
    make: Callable[[nn.Module], ParallelLinear],
    streams: DropoutStreams,
) -> None:
    """Swap a linear for a parallel one whose weights are filled later, and cut its additions.

    Args:
        parent: The module around it.
        child: Its name there.
        make: A plain linear -> its parallel counterpart on meta.
        streams: The dropout streams.
    """
    total = LowRankSum.of(parent.get_submodule(child))
    if total is None:
        parent.set_submodule(child, make(parent.get_submodule(child)))
    else:
        total = replace(total, base=make(total.base))
        total.module.set_submodule(LowRankSum.BASE, total.base)
        cut_additions(total, streams, device="meta")


def cut_additions(total: LowRankSum, streams: DropoutStreams, device: torch.device | str | None = None) -> None:
    """Cut the additions to a linear that is parallel already, in place; those that are cut already stay.

    Args:
        total: The sum.
        streams: The dropout streams.
        device: "meta" to leave the weights to be filled later; default: that of the additions, with their weights.
    """
    base, module = total.base, total.module
    assert isinstance(base, ParallelLinear)
    kind: Any = ColumnParallelLinear if base.cuts_outputs else RowParallelLinear
    for name, dropout in zip(total.ups if base.cuts_outputs else total.downs, total.dropouts, strict=True):
        full = module.get_submodule(name)
        if isinstance(full, ParallelLinear):
            continue
        local = kind.from_linear(full, group=base.group, layout=base.layout, device=device)
        local.bare = True
        module.set_submodule(name, local)
        if base.cuts_outputs:
            _drop_alike(module.get_submodule(dropout), streams)
    if not base.bare:
        base.bare = True
        module.register_forward_pre_hook(lambda _, args: (base.enter(args[0]), *args[1:]))
        module.register_forward_hook(lambda _, args, output: base.leave(output))


def _drop_alike(dropout: nn.Module, streams: DropoutStreams) -> None:
    """The input of these additions is whole on every rank: inside the region, too, the same elements must drop."""
    dropout.register_forward_pre_hook(lambda *_: streams.enter_replicated())
    dropout.register_forward_hook(lambda *_: streams.leave_replicated())
