"""The collectives of tensor parallelism as autograd functions, each next to its conjugate.

    function                               forward            backward
    copy_to_tensor_parallel                identity           all-reduce
    reduce_from_tensor_parallel            all-reduce         identity
    scatter_to_tensor_parallel             own slice          all-gather
    gather_from_tensor_parallel            all-gather         own slice
    gather_from_sequence_parallel          all-gather         reduce-scatter
    reduce_scatter_to_sequence_parallel    reduce-scatter     all-gather

All take a group (None: a group of one, nothing happens) and must be called by each of its ranks in the same order.

Source: Shoeybi et al. 2019 (f and g), Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer
Models" (the sequence-parallel pair).
"""

from typing import Any, cast

import torch
import torch.distributed as dist

from hf_tpp.collectives.flat import all_gather_flat, reduce_scatter_flat
from hf_tpp.collectives.lanes import of_lane

__all__ = [
    "copy_to_tensor_parallel",
    "gather_from_sequence_parallel",
    "gather_from_tensor_parallel",
    "reduce_from_tensor_parallel",
    "reduce_scatter_to_sequence_parallel",
    "scatter_to_tensor_parallel",
]

Group = dist.ProcessGroup | None
Tensor = torch.Tensor


def _is_alone(group: Group) -> bool:
    return group is None or group.size() == 1


def _all_gather(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Equal shards of all ranks side by side along `dim`."""
    size = group.size()
    gathered = x.new_empty((size * x.shape[0], *x.shape[1:]))
    all_gather_flat(gathered, x.contiguous(), group=group)
    if dim == 0:
        return gathered
    pieces = gathered.view(size, *x.shape).movedim(0, dim)
    return pieces.reshape(*x.shape[:dim], size * x.shape[dim], *x.shape[dim + 1 :])


def _reduce_scatter(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's equal share, along `dim`, of the sum over all ranks."""
    size = group.size()
    split = x.unflatten(dim, (size, x.shape[dim] // size)).movedim(dim, 0).contiguous()
    share = torch.empty_like(split[0])
    reduce_scatter_flat(share, split.flatten(0, 1), group=group)
    return share


def _own_slice(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    size = x.shape[dim] // group.size()
    return x.narrow(dim, group.rank() * size, size).contiguous()


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = of_lane(group)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # A copy, since autograd may hand the same tensor to another node too.
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _ScatterTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, of_lane(group)
        return _own_slice(x, dim, ctx.group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather(gradients[0], ctx.dim, ctx.group), None, None


class _GatherFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, of_lane(group)
        return _all_gather(x, dim, ctx.group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _own_slice(gradients[0], ctx.dim, ctx.group), None, None


class _GatherSequence(_GatherFrom):
    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(gradients[0], ctx.dim, ctx.group), None, None


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, of_lane(group)
        return _reduce_scatter(x, dim, ctx.group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather(gradients[0], ctx.dim, ctx.group), None, None


def copy_to_tensor_parallel(x: Tensor, group: Group) -> Tensor:
    """Enter a tensor-parallel region: replicated `x` as it is; the gradients of all ranks are summed."""
    # A node, not a hook: torch refuses to change its output in place, after which a hook would be lost without a word.
    return x if _is_alone(group) else cast(Tensor, _CopyTo.apply(x, group))


def reduce_from_tensor_parallel(x: Tensor, group: Group) -> Tensor:
    """Leave a tensor-parallel region: the sum of all ranks' partial results.

    The sum is formed in place: `x` must not be used again, nor be saved for a backward pass.
    """
    if _is_alone(group):
        return x
    # The gradient is the identity, so autograd need not know: a node of our own would cost more than a small product.
    x = x.contiguous()
    dist.all_reduce(x.detach(), group=of_lane(group))
    return x


def scatter_to_tensor_parallel(x: Tensor, group: Group, dim: int = -1) -> Tensor:
    """This rank's equal slice of replicated `x` along `dim`; the gradient is gathered."""
    return x if _is_alone(group) else cast(Tensor, _ScatterTo.apply(x, dim % x.dim(), group))


def gather_from_tensor_parallel(x: Tensor, group: Group, dim: int = -1) -> Tensor:
    """All ranks' equal slices side by side along `dim`; the gradient is cut back to the own slice."""
    return x if _is_alone(group) else cast(Tensor, _GatherFrom.apply(x, dim % x.dim(), group))


def gather_from_sequence_parallel(x: Tensor, group: Group, dim: int = 1) -> Tensor:
    """Enter a tensor-parallel region from sequence shards.

    Args:
        x: [batch, seq / tp, hidden].
        group: The tp group.
        dim: The sequence dimension.

    Returns:
        [batch, seq, hidden]; gradients are summed over the ranks and cut along the sequence.
    """
    return x if _is_alone(group) else cast(Tensor, _GatherSequence.apply(x, dim, group))


def reduce_scatter_to_sequence_parallel(x: Tensor, group: Group, dim: int = 1) -> Tensor:
    """Leave a tensor-parallel region into sequence shards: the conjugate of `gather_from_sequence_parallel`."""
    return x if _is_alone(group) else cast(Tensor, _ReduceScatterSequence.apply(x, dim, group))
