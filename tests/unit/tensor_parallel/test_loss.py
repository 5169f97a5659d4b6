"""The cross entropy over cut logits works on chunks of tokens: the same numbers, and no float32 copy of all logits."""

import pytest
import torch
import torch.nn.functional as F

from hf_tpp.plan.layout import Block, Layout
from hf_tpp.tensor_parallel import loss_arithmetic, vocab_parallel_cross_entropy
from hf_tpp.tensor_parallel.loss_arithmetic import LossArithmetic
from tests.unit.tensor_parallel.live_bytes import LiveBytes

TOKENS, VOCABULARY, PADDED = 50, 1000, 1024
LAYOUT = Layout((Block(VOCABULARY),), padded_local_size=PADDED)


def logits_and_targets(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(TOKENS, PADDED, generator=generator) * 5).to(dtype)
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    targets[::7] = -100
    return logits.requires_grad_(), targets


@pytest.mark.parametrize("rows", [1, 3, 25, 50, 51])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_chunks_give_the_numbers_of_the_whole(rows, dtype, monkeypatch):
    monkeypatch.setattr(loss_arithmetic, "_CHUNK_SIZE", rows * PADDED)
    logits, targets = logits_and_targets(dtype)
    check(logits, targets, vocab_parallel_cross_entropy(logits, targets, LAYOUT, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_arithmetic_gives_the_same(dtype):
    """Of generated code; several sizes, and targets that are elsewhere, at both ends and do not count."""
    arithmetic = LossArithmetic.compiled({"dynamic": False})
    logits, targets = logits_and_targets(dtype)
    targets[1], targets[2] = 0, VOCABULARY - 1
    for tokens in (TOKENS, TOKENS - 7):
        part = logits.detach()[:tokens].requires_grad_()
        losses = vocab_parallel_cross_entropy(part, targets[:tokens], LAYOUT, None, arithmetic=arithmetic)
        check(part, targets[:tokens], losses)


def check(logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor) -> None:
    """Against torch's own cross entropy in float32."""
    dtype, tokens = logits.dtype, len(targets)
    reference = logits.detach().float().requires_grad_()
    expected = F.cross_entropy(reference[:, :VOCABULARY], targets, reduction="none")
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-6, atol=1e-6)
    upstream = torch.randn(tokens, generator=torch.Generator().manual_seed(1))
    losses.backward(upstream)
    expected.backward(upstream)
    assert logits.grad.dtype == dtype
    rounding = {"rtol": 1e-2, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(logits.grad.float(), reference.grad, **rounding)
    assert (logits.grad[:, VOCABULARY:] == 0).all()


def test_memory(monkeypatch):
    """Beside the logits: in the forward one chunk in float32, in the backward also their gradient in their own type."""
    rows = 5
    monkeypatch.setattr(loss_arithmetic, "_CHUNK_SIZE", rows * PADDED)
    logits, targets = logits_and_targets(torch.bfloat16)
    chunk, per_token = 4 * rows * PADDED, 100 * TOKENS
    with LiveBytes() as forward:
        losses = vocab_parallel_cross_entropy(logits, targets, LAYOUT, None)
    assert chunk <= forward.peak <= 2 * chunk + per_token
    assert forward.now <= per_token  # what is kept for the backward, beside the logits themselves
    with LiveBytes() as backward:
        losses.sum().backward()
    own = logits.numel() * logits.element_size()
    assert own + chunk <= backward.peak <= own + 2 * chunk + per_token
    assert max(forward.float32, backward.float32) <= rows * PADDED


def test_the_count_of_bytes_sees_copies():
    """The same measure on torch's own cross entropy, as transformers calls it, finds the float32 copies."""
    logits, targets = logits_and_targets(torch.bfloat16)
    with LiveBytes() as live:
        F.cross_entropy(logits.float(), targets).backward()
    assert live.float32 == logits.numel()
    assert live.peak >= 2 * 4 * logits.numel()
