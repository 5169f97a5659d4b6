"""Linear layers cut over a tensor-parallel group.

    ColumnParallelLinear    Y = X A      A = [A_0 | A_1]         Y_r = X A_r             gather: Y = [Y_0 | Y_1]
    RowParallelLinear       Y = X A      A = [A_0 ; A_1]         Y = sum_r X_r A_r       X = [X_0 | X_1]

Source: Shoeybi et al. 2019, "Megatron-LM".
"""

from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_tpp.collectives.autograd import (
    copy_to_tensor_parallel,
    gather_from_tensor_parallel,
    reduce_from_tensor_parallel,
    scatter_to_tensor_parallel,
)
from hf_tpp.errors import ConfigurationError
from hf_tpp.plan.layout import Block, Layout
from hf_tpp.sharding import ShardSpec, shard_tensor
from hf_tpp.tensor_parallel.region import RegionState

__all__ = ["ColumnParallelLinear", "RowParallelLinear", "join_channels", "linear_sizes"]

Group = dist.ProcessGroup | None


def linear_sizes(linear: nn.Module) -> tuple[int, int, bool]:
    """(in_features, out_features, is the weight stored as [in, out]) of an `nn.Linear` or transformers' `Conv1D`.

    Raises:
        ConfigurationError: It is neither.
    """
    if isinstance(linear, Conv1D):
        return linear.weight.shape[0], linear.weight.shape[1], True
    if type(linear) is nn.Linear:
        return linear.in_features, linear.out_features, False
    raise ConfigurationError(f"{type(linear).__name__} is no linear layer: give an nn.Linear or transformers' Conv1D")


class _ParallelLinear(nn.Module):
    """What both cuts share: a group, a layout of the cut dimension, and the weight's orientation."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    cuts_outputs: ClassVar[bool]

    def __init__(self, in_features: int, out_features: int, group: Group, layout: Layout, transposed: bool) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.group = group
        self.layout = layout
        self.transposed = transposed
        self.tp_rank, self.tp_size = (0, 1) if group is None else (group.rank(), group.size())

    def _create(self, local_in: int, local_out: int, bias_size: int, bias: bool, **factory: object) -> None:
        shape = (local_in, local_out) if self.transposed else (local_out, local_in)
        self.weight = nn.Parameter(torch.empty(shape, **factory))  # type: ignore[call-overload]
        if bias:
            self.bias = nn.Parameter(torch.empty(bias_size, **factory))  # type: ignore[call-overload]
        else:
            self.register_parameter("bias", None)

    def _product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, self.weight.t() if self.transposed else self.weight, bias)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        group: Group,
        layout: Layout | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> Self:
        """This rank's part of a full `nn.Linear` or `Conv1D`; every rank passes the same weights.

        Args:
            linear: The full layer.
            group: The tensor-parallel group; None for a group of one.
            layout: How the cut channels are laid out; default: one run.
            device: "meta" to leave the weights to be filled later; default: that of `linear`, with its weights.
            **options: Of the constructor.

        Returns:
            The layer that holds this rank's shard.
        """
        in_features, out_features, transposed = linear_sizes(linear)
        weight: torch.Tensor = linear.weight  # type: ignore[assignment]
        create: Any = cls
        local: Self = create(
            in_features,
            out_features,
            linear.bias is not None,
            group=group,
            layout=layout,
            transposed=transposed,
            device=device or weight.device,
            dtype=weight.dtype,
            **options,
        )
        if local.weight.device.type != "meta":
            local._load(linear)
        return local

    @torch.no_grad()
    def _load(self, source: nn.Module) -> None:
        """Copy this rank's part of a full linear's parameters."""
        for name, parameter in self.named_parameters():
            full: torch.Tensor = getattr(source, name)
            is_cut = name == "weight" or self.cuts_outputs
            dim = None if not is_cut else int(self.cuts_outputs == self.transposed) if name == "weight" else 0
            spec = ShardSpec(name, tuple(full.shape), dim, self.layout if is_cut else None, self.tp_rank, self.tp_size)
            parameter.copy_(shard_tensor(full, spec, full.device, full.dtype))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"tp_rank={self.tp_rank}, tp_size={self.tp_size}"
        )


class ColumnParallelLinear(_ParallelLinear):
    """A linear whose output channels are cut: this rank computes `Y[..., segments of this rank]`.

    Args:
        in_features: Input channels.
        out_features: Output channels of the full layer.
        bias: Whether it has one (cut like the output).
        group: The tensor-parallel group; None for a group of one.
        layout: Where the output channels may be cut; default: anywhere, in one run.
        gather_output: Return the full output on every rank instead of the local part.
        copy_input: The input is replicated and enters the region here, so its gradient is summed over the group. False
            if it entered before, together with other linears' input.
        transposed: The weight is stored as [in, out] (Conv1D).
        device: Where the parameters live.
        dtype: Their type.

    Shape:
        input [..., in_features]; output [..., local_out_features], or [..., out_features] with `gather_output`.
    """

    cuts_outputs = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group: Group,
        layout: Layout | None = None,
        gather_output: bool = False,
        copy_input: bool = True,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        layout = layout or Layout((Block(out_features),))
        super().__init__(in_features, out_features, group, layout, transposed)
        if gather_output and len({layout.local_size(rank, self.tp_size) for rank in range(self.tp_size)}) > 1:
            raise ConfigurationError(
                f"gather_output needs equal shards, but {out_features} outputs over tp={self.tp_size} differ: "
                f"pad out_features to a multiple of {self.tp_size} or keep the output local"
            )
        self.gather_output = gather_output
        self.copy_input = copy_input
        self.local_out_features = layout.local_size(self.tp_rank, self.tp_size)
        self._create(in_features, self.local_out_features, self.local_out_features, bias, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., local_out_features], or [..., out_features] with `gather_output`."""
        if self.copy_input:
            x = copy_to_tensor_parallel(x, self.group)
        y = self._product(x, self.bias)
        if not self.gather_output:
            return y
        return join_channels(y, self.layout, self.group)


def join_channels(local: torch.Tensor, layout: Layout, group: Group) -> torch.Tensor:
    """Local channels of all ranks -> all channels in the order of the full layer, without padding and extra copies.

    Args:
        local: [..., local channels], the same size on every rank.
        layout: How the channels are cut.
        group: The tensor-parallel group.

    Collective: every rank of `group` calls it; differentiable.

    Returns:
        [..., layout.size].
    """
    gathered = gather_from_tensor_parallel(local, group)
    tp_size = 1 if group is None else group.size()
    local_size = local.shape[-1]
    pieces = {
        segment.start: gathered.narrow(-1, rank * local_size + segment.local_start, segment.size)
        for rank in range(tp_size)
        for segment in layout.segments(rank, tp_size)
    }
    return torch.cat([pieces[start] for start in sorted(pieces)], dim=-1)


class RowParallelLinear(_ParallelLinear):
    """A linear whose input channels are cut: the partial products of all ranks are summed, then the bias is added.

    Args:
        in_features: Input channels of the full layer.
        out_features: Output channels.
        bias: Whether it has one (replicated, added once).
        group: The tensor-parallel group; None for a group of one.
        layout: How the input channels are cut; must be the layout of the column-parallel layer before it.
        input_is_parallel: The input is already this rank's part; False cuts a replicated input here.
        region: Shared state of the model's regions (sequence parallelism, dropout streams); None when used alone.
        transposed: The weight is stored as [in, out] (Conv1D).
        device: Where the parameters live.
        dtype: Their type.

    Shape:
        input [..., local_in_features] (or [..., in_features]); output [..., out_features], under sequence parallelism
        [batch, seq / tp, out_features].
    """

    cuts_outputs = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group: Group,
        layout: Layout | None = None,
        input_is_parallel: bool = True,
        region: RegionState | None = None,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        layout = layout or Layout((Block(in_features),))
        super().__init__(in_features, out_features, group, layout, transposed)
        if not input_is_parallel and (len(layout.blocks) > 1 or in_features % self.tp_size):
            raise ConfigurationError(
                f"input_is_parallel=False needs {in_features} inputs in one block divisible by tp={self.tp_size}: "
                f"pass the local part of the input instead"
            )
        self.input_is_parallel = input_is_parallel
        self.region = region
        self.local_in_features = layout.local_size(self.tp_rank, self.tp_size)
        self._create(self.local_in_features, out_features, out_features, bias, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., local_in_features] -> [..., out_features], summed over the group."""
        if not self.input_is_parallel:
            x = scatter_to_tensor_parallel(x, self.group)
        partial = self._product(x, None)
        y = reduce_from_tensor_parallel(partial, self.group) if self.region is None else self.region.leave(partial)
        return y if self.bias is None else y + self.bias
