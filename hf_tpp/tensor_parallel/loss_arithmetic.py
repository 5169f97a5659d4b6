"""What the vocabulary-parallel loss computes of every logit: plain, a chunk of tokens at a time, or compiled.

In bf16 the plain arithmetic reads and writes about 20 bytes a logit in the forward and 30 in the backward, compiled 2
and 4: what is in float32 stays in registers.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["PLAIN", "LossArithmetic"]

Tensor = torch.Tensor

_CHUNK_SIZE = 2**24
"""Logits that are in float32 at a time: enough to keep a GPU busy."""


def _sums(valid: Tensor, maximum: Tensor) -> Tensor:
    return (valid - maximum.unsqueeze(1)).exp().sum(dim=1)


def _gradient(logits: Tensor, shift: Tensor, upstream: Tensor, index: Tensor, of_target: Tensor, valid: int) -> Tensor:
    columns = torch.arange(logits.shape[1], device=logits.device)
    gradient = (logits - shift).exp() * upstream - of_target.where(columns == index, 0.0)
    return gradient.where(columns < valid, 0.0).to(logits.dtype)


def _sums_in_chunks(valid: Tensor, maximum: Tensor) -> Tensor:
    sums = torch.zeros_like(maximum)
    for rows in _chunks(valid):
        sums[rows] = (valid[rows] - maximum[rows].unsqueeze(1)).exp_().sum(dim=1)
    return sums


def _gradient_in_chunks(
    logits: Tensor, shift: Tensor, upstream: Tensor, index: Tensor, of_target: Tensor, valid: int
) -> Tensor:
    gradient = torch.empty_like(logits)
    gradient[:, valid:] = 0.0
    for rows in _chunks(logits):
        chunk = (logits[rows, :valid] - shift[rows]).exp_().mul_(upstream[rows])
        if valid:
            chunk.scatter_add_(1, index[rows], -of_target[rows])
        gradient[rows, :valid] = chunk
    return gradient


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Runs of rows of [tokens, V/t] that have at most `_CHUNK_SIZE` logits, or are one row."""
    step = max(1, _CHUNK_SIZE // max(1, logits.shape[1]))
    return (slice(start, start + step) for start in range(0, logits.shape[0], step))


@dataclass(frozen=True, slots=True)
class LossArithmetic:
    """How it is computed.

    Attributes:
        sums: (logits [tokens, V/t] without padding, maximum [tokens]) -> sums of their exponentials [tokens].
        gradient: (logits [tokens, V/t], their maximum and log of the sum [tokens, 1], gradient of each loss
            [tokens, 1], column of its target [tokens, 1], gradient of each loss whose target is here and zero for the
            others [tokens, 1], columns that are no padding) -> gradient of the logits.
    """

    sums: Callable[[Tensor, Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor]

    @classmethod
    def compiled(cls, options: Mapping[str, Any]) -> "LossArithmetic":
        """Through `torch.compile` with `options`; the first shape is compiled as it is, others for any length."""
        chosen = {name: value for name, value in options.items() if name in ("backend", "mode", "options")}
        return cls(torch.compile(_sums, **chosen), torch.compile(_gradient, **chosen))


PLAIN = LossArithmetic(_sums_in_chunks, _gradient_in_chunks)
