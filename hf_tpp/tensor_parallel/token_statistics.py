"""What losses and logs need of each token's distribution, from logits whose vocabulary is cut over the tp group.

    x = logits / temperature,  Z = sum_v exp(x_v - max),  p_v = exp(x_v - max) / Z

    log_probs           x_target - max - log Z          gradient  1[v = target] - p_v
    entropy             log Z - sum_v p_v (x_v - max)   gradient  -p_v (log p_v + entropy)
    log_sum_sq_probs    log sum_v p_v^2                 no gradient
    mean_logits         mean_v x_v                      no gradient
    is_top1             the target is the first of the largest x_v

A few numbers per token cross the group; the full logits never exist. Arithmetic in float32 whatever the logits' type.
"""

from typing import Any

import torch
import torch.distributed as dist

from hf_tpp.collectives.lanes import all_reduce_in_place
from hf_tpp.plan.layout import Layout

__all__ = ["STATISTICS", "token_statistics"]

STATISTICS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_LOWEST = -1e4  # of a log-probability: its probability is zero in float32, and so is every product with it
Group = dist.ProcessGroup | None


def token_statistics(
    logits: torch.Tensor, targets: torch.Tensor, layout: Layout, group: Group, temperature: float = 1.0
) -> dict[str, torch.Tensor]:
    """All of `STATISTICS`.

    Args:
        logits: [tokens, local vocabulary], this rank's columns, padding included.
        targets: [tokens] ids of the full vocabulary, the same on every rank.
        layout: How the vocabulary is cut.
        group: The tensor-parallel group; None for a group of one.
        temperature: What logits are divided by.

    Collective: every rank of `group` calls it; for the gradient, with the same gradients of the results.

    Returns:
        Name -> [tokens], float32 or bool, the same on every rank.
    """
    return dict(zip(STATISTICS, _TokenStatistics.apply(logits, targets, layout, group, temperature), strict=True))


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, layout: Layout, group: Group, temperature: float
    ) -> tuple[torch.Tensor, ...]:
        tp_rank, tp_size = (0, 1) if group is None else (group.rank(), group.size())
        first = tp_rank * layout.local_size(0, tp_size)
        num_valid = layout.valid_size(tp_rank, tp_size)
        is_here = (targets >= first) & (targets < first + num_valid)
        # An id outside the vocabulary must fail as it does on one process, not count as a token of some other rank.
        is_token = (targets >= 0) & (targets < layout.size)
        index = (targets - first).where(is_here, 0).where(is_token, -1).unsqueeze(1)

        x = logits.float() / temperature
        sum_of_logits = x[:, :num_valid].sum(dim=1)
        x[:, num_valid:] = float("-inf")
        position = x.argmax(dim=1)  # the first one, which max() does not promise
        maximum = x.gather(1, position.unsqueeze(1)).squeeze(1)
        top = maximum.clone()
        all_reduce_in_place(top, dist.ReduceOp.MAX, group)
        first_top = torch.where(maximum == top, position + first, layout.size)
        all_reduce_in_place(first_top, dist.ReduceOp.MIN, group)

        shifted = x.sub_(top.unsqueeze(1))
        target_logits = shifted.gather(1, index).squeeze(1).where(is_here, 0.0)
        exponentials = shifted.exp()
        weighted = (exponentials * shifted.clamp(min=_LOWEST)).sum(dim=1)
        squares = exponentials.square().sum(dim=1)
        sums = torch.stack([exponentials.sum(dim=1), target_logits, weighted, squares, sum_of_logits])
        all_reduce_in_place(sums, dist.ReduceOp.SUM, group)
        normalizer, target_logits, weighted, squares, sum_of_logits = sums
        log_normalizer = normalizer.log()
        entropy = log_normalizer - weighted / normalizer

        ctx.set_materialize_grads(False)
        # The logits, and not the exponentials, which are easily computed again and twice the size in bfloat16.
        ctx.save_for_backward(logits, top, normalizer, entropy, index, is_here)
        ctx.temperature, ctx.num_valid = temperature, num_valid
        found = (
            target_logits - log_normalizer,
            entropy,
            squares.log() - 2 * log_normalizer,
            sum_of_logits / layout.size,
            first_top == targets,
        )
        ctx.mark_non_differentiable(*found[2:])
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, None, None, None, None]:
        logits, top, normalizer, entropy, index, is_here = ctx.saved_tensors
        of_log_probs, of_entropy = gradients[:2]
        probabilities = (logits.float() / ctx.temperature).sub_(top.unsqueeze(1)).exp_().div_(normalizer.unsqueeze(1))
        probabilities[:, ctx.num_valid :] = 0.0
        gradient = torch.zeros_like(probabilities)
        if of_log_probs is not None:
            gradient -= probabilities * of_log_probs.unsqueeze(1)
            gradient.scatter_add_(1, index, of_log_probs.where(is_here, 0.0).unsqueeze(1))
        if of_entropy is not None:
            log_probabilities = probabilities.log().clamp(min=_LOWEST)
            gradient -= probabilities * (log_probabilities + entropy.unsqueeze(1)) * of_entropy.unsqueeze(1)
        return gradient.div_(ctx.temperature).to(logits.dtype), None, None, None, None
