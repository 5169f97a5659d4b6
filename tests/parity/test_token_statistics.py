"""Log-probabilities and entropies of logits that are cut over tp: values and gradients are those of whole logits."""

import pytest
import torch
import torch.distributed as dist

from hf_tpp.plan.layout import Block, Layout
from hf_tpp.tensor_parallel.token_statistics import STATISTICS, token_statistics
from tests.ranks import run_ranks

VOCABULARY, TOKENS, TEMPERATURE = 13, 6, 0.7
WEIGHTS = torch.arange(1.0, TOKENS + 1)
Found = tuple[dict[str, torch.Tensor], torch.Tensor]


def logits() -> torch.Tensor:
    values = torch.randn(TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(4)) * 3
    values[1, 3] = values[1, 9] = 20.0  # two largest ones, of different ranks
    values[2, 5] = float("-inf")
    return values


def targets() -> torch.Tensor:
    return torch.tensor([0, 9, 12, 7, 3, 6])


def backward(statistics: dict[str, torch.Tensor]) -> None:
    loss = (statistics["log_probs"] * WEIGHTS).sum() + (statistics["entropy"] * WEIGHTS.flip(0)).sum()
    loss.backward()


def of_whole_logits() -> Found:
    whole = logits().requires_grad_()
    log_probabilities = (whole / TEMPERATURE).log_softmax(dim=1)
    probabilities = log_probabilities.exp()
    statistics = {
        "log_probs": log_probabilities.gather(1, targets().unsqueeze(1)).squeeze(1),
        "entropy": -(probabilities * log_probabilities.clamp(min=-1e4)).sum(dim=1),
        "log_sum_sq_probs": probabilities.square().sum(dim=1).log(),
        "mean_logits": (whole / TEMPERATURE).mean(dim=1),
        "is_top1": whole.argmax(dim=1) == targets(),
    }
    backward(statistics)
    assert whole.grad is not None
    return {name: value.detach() for name, value in statistics.items()}, whole.grad


def of_shards(dtype: torch.dtype = torch.float32) -> Found:
    """Body of a rank; the last rank has columns of padding."""
    rank, size = dist.get_rank(), dist.get_world_size()
    layout = Layout((Block(VOCABULARY),), padded_local_size=7 if size == 2 else 5)
    local = torch.full((TOKENS, layout.local_size(0, size)), 1e3, dtype=dtype)
    first, valid = rank * local.shape[1], layout.valid_size(rank, size)
    local[:, :valid] = logits()[:, first : first + valid]
    local.requires_grad_()
    found = token_statistics(local, targets(), layout, dist.group.WORLD, TEMPERATURE)
    backward(found)
    assert local.grad is not None
    assert local.grad[:, valid:].abs().max() == 0 if valid < local.shape[1] else True
    return {name: value.detach() for name, value in found.items()}, local.grad[:, :valid]


@pytest.mark.parametrize("tp_size", [2, 3])
def test_equal_to_those_of_whole_logits(tp_size):
    statistics, gradient = of_whole_logits()
    ranks = run_ranks(of_shards, tp_size)
    assert statistics.keys() == set(STATISTICS)
    for found, _ in ranks:
        for name, expected in statistics.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat([shard for _, shard in ranks], dim=1), gradient, rtol=1e-5, atol=1e-6)


def test_a_target_outside_the_vocabulary_is_an_error():
    layout = Layout((Block(VOCABULARY),))
    with pytest.raises(RuntimeError, match="out of bounds"):
        token_statistics(logits(), targets() + VOCABULARY, layout, None)
