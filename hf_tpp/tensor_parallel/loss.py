"""Cross entropy over logits whose vocabulary is cut over the tensor-parallel group.

    loss_t = log sum_v exp(x_tv - max_t) + max_t - x_t,target

Three numbers per token cross the group (the maximum; then sum and target logit in one message); the full logits never
exist on any rank. Arithmetic is at least in float32, but no float32 copy of all logits exists either
(`loss_arithmetic.py`). The backward computes the exponentials again, from the logits in their own type.

    kept for the backward    logits [tokens, V/t], in their own type; maximum and log of the sum, float32 [tokens]
    made by the backward     their gradient, in their own type; unless compiled, float32 [chunk, V/t]

Source: Shoeybi et al. 2019, "Megatron-LM", section 3.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F

from hf_tpp.collectives.lanes import all_reduce_in_place
from hf_tpp.plan.layout import Layout
from hf_tpp.tensor_parallel.loss_arithmetic import PLAIN, LossArithmetic

__all__ = ["VocabParallelCausalLMLoss", "vocab_parallel_cross_entropy"]

Group = dist.ProcessGroup | None


def vocab_parallel_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    layout: Layout,
    group: Group,
    ignore_index: int = -100,
    arithmetic: LossArithmetic = PLAIN,
) -> torch.Tensor:
    """Cross entropy of each token.

    Args:
        logits: [tokens, local vocabulary], this rank's columns, padding included.
        targets: [tokens] ids of the full vocabulary, the same on every rank.
        layout: How the vocabulary is cut.
        group: The tensor-parallel group; None for a group of one.
        ignore_index: Target whose loss and gradient are zero.
        arithmetic: Plain or compiled.

    Collective: every rank of `group` calls it.

    Returns:
        [tokens] float32 losses, the same on every rank.
    """
    return cast(torch.Tensor, _CrossEntropy.apply(logits, targets, layout, group, ignore_index, arithmetic))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        layout: Layout,
        group: Group,
        ignore_index: int,
        arithmetic: LossArithmetic,
    ) -> torch.Tensor:
        tp_rank, tp_size = (0, 1) if group is None else (group.rank(), group.size())
        first = tp_rank * layout.local_size(0, tp_size)
        num_valid = layout.valid_size(tp_rank, tp_size)
        is_kept = targets != ignore_index
        # An id outside the vocabulary must fail as it does on one process, not count as a token of some other rank.
        is_token = ((targets >= 0) & (targets < layout.size)) | ~is_kept
        local_targets = targets - first
        is_here = (local_targets >= 0) & (local_targets < num_valid) & is_kept
        index = local_targets.where(is_here, 0).where(is_token, -1).unsqueeze(1)

        valid = logits[:, :num_valid]
        maximum = valid.amax(dim=1) if num_valid else valid.new_full(targets.shape, -torch.inf)
        maximum = maximum.to(torch.promote_types(logits.dtype, torch.float32))
        all_reduce_in_place(maximum, dist.ReduceOp.MAX, group)
        target_logits = logits.gather(1, index).squeeze(1) - maximum
        sums = torch.stack([arithmetic.sums(valid, maximum), target_logits.where(is_here, 0.0)])
        all_reduce_in_place(sums, dist.ReduceOp.SUM, group)
        log_normalizer, target_logits = sums[0].log(), sums[1]
        ctx.save_for_backward(logits, maximum, log_normalizer, index, is_here, is_kept)
        ctx.num_valid, ctx.arithmetic = num_valid, arithmetic
        losses: torch.Tensor = (log_normalizer - target_logits).where(is_kept, 0.0).float()
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None, None]:
        logits, maximum, log_normalizer, index, is_here, is_kept = ctx.saved_tensors
        upstream = gradients[0].where(is_kept, 0.0).unsqueeze(1).to(maximum.dtype)
        of_target = upstream.where(is_here.unsqueeze(1), 0.0)
        shift = (maximum + log_normalizer).unsqueeze(1)
        gradient = ctx.arithmetic.gradient(logits, shift, upstream, index, of_target, ctx.num_valid)
        return gradient, None, None, None, None, None


class VocabParallelCausalLMLoss:
    """Stands in for transformers' `ForCausalLMLoss` as `model.loss_function`, on vocabulary-parallel logits.

    Args:
        layout: How the vocabulary is cut.
        group: The tensor-parallel group.

    Attributes:
        arithmetic: Of training: plain or compiled.
    """

    def __init__(self, layout: Layout, group: Group) -> None:
        self.layout = layout
        self.group = group
        self.arithmetic = PLAIN

    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor | None,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """The loss of transformers' `ForCausalLMLoss` with the same arguments.

        Args:
            logits: [batch, seq, local vocabulary].
            labels: [batch, seq]; shifted here.
            vocab_size: Entries of the full vocabulary.
            num_items_in_batch: Tokens to divide by; default: the tokens that count here.
            ignore_index: Label that does not count.
            shift_labels: [batch, seq] already shifted labels, instead of `labels`.

        Returns:
            Float32 scalar.
        """
        assert vocab_size == self.layout.size
        if shift_labels is None:
            assert labels is not None
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = shift_labels.reshape(-1).to(logits.device)
        arithmetic = self.arithmetic if logits.requires_grad else PLAIN
        losses = vocab_parallel_cross_entropy(
            logits.reshape(-1, logits.shape[-1]), targets, self.layout, self.group, ignore_index, arithmetic
        )
        if num_items_in_batch is None:
            num_items_in_batch = (targets != ignore_index).sum()
        elif isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(losses.device)
        return losses.sum() / num_items_in_batch
