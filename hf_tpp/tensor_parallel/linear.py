"""Linear layers cut over a tensor-parallel group.

    ColumnParallelLinear    Y = X A      A = [A_0 | A_1]         Y_r = X A_r             gather: Y = [Y_0 | Y_1]
    RowParallelLinear       Y = X A      A = [A_0 ; A_1]         Y = sum_r X_r A_r       X = [X_0 | X_1]

A layer is made of three steps: `enter` (what its input passes first), its product, `leave` (what its output passes).
A `bare` one is the product alone; the other two then belong to a sum that it is a term of (`low_rank.py`).

Source: Shoeybi et al. 2019, "Megatron-LM".
"""

import functools
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from hf_tpp.collectives.autograd import (
    copy_to_tensor_parallel,
    gather_from_tensor_parallel,
    reduce_from_tensor_parallel,
    scatter_to_tensor_parallel,
)
from hf_tpp.errors import ConfigurationError
from hf_tpp.plan.layout import Block, Layout
from hf_tpp.sharding import ShardSpec, shard_tensor
from hf_tpp.tensor_parallel.copying import SharesGroup
from hf_tpp.tensor_parallel.plain_linear import linear_sizes
from hf_tpp.tensor_parallel.region import RegionState

__all__ = ["ColumnParallelLinear", "ParallelLinear", "RowParallelLinear", "join_channels"]

Group = dist.ProcessGroup | None


class ParallelLinear(SharesGroup):
    """What both cuts share: a group, a layout of the cut dimension, and the weight's orientation.

    Attributes:
        cuts_outputs: The outputs are cut; if not, the inputs.
        bare: It is the product alone.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    cuts_outputs: ClassVar[bool]
    bare: bool = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group: Group,
        layout: Layout,
        region: RegionState | None,
        transposed: bool,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.group = group
        self.layout = layout
        self.region = region
        self.transposed = transposed
        self.tp_rank, self.tp_size = (0, 1) if group is None else (group.rank(), group.size())

    def _create(self, local_in: int, local_out: int, bias_size: int, bias: bool, **factory: object) -> None:
        shape = (local_in, local_out) if self.transposed else (local_out, local_in)
        self.weight = nn.Parameter(torch.empty(shape, **factory))  # type: ignore[call-overload]
        if bias:
            self.bias = nn.Parameter(torch.empty(bias_size, **factory))  # type: ignore[call-overload]
        else:
            self.register_parameter("bias", None)

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """What the input passes before the product."""
        raise NotImplementedError

    def leave(self, y: torch.Tensor) -> torch.Tensor:
        """What the output passes after the product."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The shapes are in the class's docstring; those of a bare layer are local."""
        if not self.bare:
            x = self.enter(x)
        y = F.linear(x, self.weight.t() if self.transposed else self.weight, self.bias if self.cuts_outputs else None)
        return y if self.bare else self.leave(y)

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
            The layer that holds this rank's shard. It is an instance of the class of `linear` too, as code that looks
            for linears by their class (peft does) expects.
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
        kinds: Any = (cls, type(linear))
        local.__class__ = _also(*kinds)
        local.weight.requires_grad_(weight.requires_grad)
        if local.weight.device.type != "meta":
            local._load(linear)
        return local

    @torch.no_grad()
    def _load(self, source: nn.Module) -> None:
        """Copy this rank's part of a full linear's parameters."""
        for name, parameter in self.named_parameters():
            full: torch.Tensor = getattr(source, name)
            parameter.copy_(self._shard(name, full))

    def _shard(self, name: str, full: torch.Tensor) -> torch.Tensor:
        return shard_tensor(full, self._spec(name, tuple(full.shape)), full.device, full.dtype)

    def _spec(self, name: str, shape: tuple[int, ...]) -> ShardSpec:
        is_cut = name == "weight" or self.cuts_outputs
        dim = None if not is_cut else int(self.cuts_outputs == self.transposed) if name == "weight" else 0
        return ShardSpec(name, shape, dim, self.layout if is_cut else None, self.tp_rank, self.tp_size)

    def _full_shape(self, name: str) -> tuple[int, ...]:
        if name == "bias":
            return (self.out_features,)
        sizes = (self.out_features, self.in_features)
        return sizes[::-1] if self.transposed else sizes

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A shard is loaded as it is; of a whole tensor, this rank's part."""
        for name, parameter in self.named_parameters(recurse=False):
            given = state_dict.get(prefix + name)
            if given is not None and parameter.shape != given.shape == self._full_shape(name):
                state_dict[prefix + name] = self._shard(name, given)
        super()._load_from_state_dict(state_dict, prefix, *args)

    __repr__ = nn.Module.__repr__  # Conv1D has one of its own, for attributes of its own

    def extra_repr(self) -> str:
        """Sizes for `repr`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"tp_rank={self.tp_rank}, tp_size={self.tp_size}"
        )


class ColumnParallelLinear(ParallelLinear):
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
        region: The input enters this region here; None if it entered before, or there is none.
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
        region: RegionState | None = None,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        layout = layout or Layout((Block(out_features),))
        super().__init__(in_features, out_features, group, layout, region, transposed)
        if gather_output and len({layout.local_size(rank, self.tp_size) for rank in range(self.tp_size)}) > 1:
            raise ConfigurationError(
                f"gather_output needs equal shards, but {out_features} outputs over tp={self.tp_size} differ: "
                f"pad out_features to a multiple of {self.tp_size} or keep the output local"
            )
        self.gather_output = gather_output
        self.copy_input = copy_input
        self.bare = region is None and not copy_input and not gather_output
        self.local_out_features = layout.local_size(self.tp_rank, self.tp_size)
        self._create(in_features, self.local_out_features, self.local_out_features, bias, device=device, dtype=dtype)

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features], replicated -> the same, inside the region."""
        if self.region is not None:
            return self.region.enter(x)
        return copy_to_tensor_parallel(x, self.group) if self.copy_input else x

    def leave(self, y: torch.Tensor) -> torch.Tensor:
        """[..., local_out_features] -> the same, or [..., out_features] with `gather_output`."""
        return join_channels(y, self.layout, self.group) if self.gather_output else y


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


class RowParallelLinear(ParallelLinear):
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
        super().__init__(in_features, out_features, group, layout, region, transposed)
        if not input_is_parallel and (len(layout.blocks) > 1 or in_features % self.tp_size):
            raise ConfigurationError(
                f"input_is_parallel=False needs {in_features} inputs in one block divisible by tp={self.tp_size}: "
                f"pass the local part of the input instead"
            )
        self.input_is_parallel = input_is_parallel
        self.local_in_features = layout.local_size(self.tp_rank, self.tp_size)
        self._create(self.local_in_features, out_features, out_features, bias, device=device, dtype=dtype)

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., local_in_features], unless it is local already."""
        return x if self.input_is_parallel else scatter_to_tensor_parallel(x, self.group)

    def leave(self, y: torch.Tensor) -> torch.Tensor:
        """Partial products [..., out_features] -> their sum over the group, with the bias."""
        y = reduce_from_tensor_parallel(y, self.group) if self.region is None else self.region.leave(y)
        return y if self.bias is None else y + self.bias


@functools.cache
def _also(parallel: Any, plain: Any) -> Any:
    """The class `parallel` whose instances are instances of `plain` as well."""
    return type(parallel.__name__, (parallel, plain), {"__module__": parallel.__module__})
