"""What a caller gets of the logits: all of them, or a few numbers for each token.

reading              last stage, of each microbatch            every rank of the replica
LogitsReading        [b, s, V/t]                               [B, s, V]
StatisticsReading    fields of [b, s], the same over tp        fields of [B, s]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hf_tpp.calls.context import CallContext
from hf_tpp.calls.sharing import from_last_stage, own_columns, share_logits
from hf_tpp.gradients.release import Gradients
from hf_tpp.pipeline_parallel.payload import Payload
from hf_tpp.plan.layout import Block, Layout
from hf_tpp.tensor_parallel.token_statistics import STATISTICS, token_statistics

__all__ = ["LogitsReading", "Reading", "StatisticsReading"]


class Reading(Protocol):
    """From the outputs of the last stage to what every rank gets, and back with gradients."""

    @property
    def width(self) -> int:
        """Number of tensors that are read of each output."""

    def read(self, index: int, output: Any) -> Payload:
        """On the last stage: what is taken from the output for microbatch `index`, with its graph."""

    def share(self, found: Sequence[Payload]) -> list[torch.Tensor]:
        """What was read of each microbatch (nothing except on the last stage) -> what every rank gets. Collective."""

    def split(self, gradients: Gradients, found: Sequence[Payload]) -> list[Gradients]:
        """On the last stage: gradients of what was shared -> those of what was read of each microbatch."""


@dataclass(frozen=True, slots=True)
class LogitsReading:
    """The logits.

    Attributes:
        context: The model's.
        pieces: How many consecutive microbatches go into one tensor.
    """

    context: CallContext
    pieces: Sequence[int]

    @property
    def width(self) -> int:
        """One tensor."""
        return 1

    def read(self, index: int, output: Any) -> Payload:
        """[b, s, V/t]."""
        return (output.logits,)

    def share(self, found: Sequence[Payload]) -> list[torch.Tensor]:
        """[B, s, V], or one such for each of `pieces`."""
        return share_logits(self.context, [logits for (logits,) in found], self.pieces)

    def split(self, gradients: Gradients, found: Sequence[Payload]) -> list[Gradients]:
        """[b, s, V/t]: each rank's columns, once."""
        rows = [logits.shape[0] for (logits,) in found]
        result: list[Gradients] = []
        for size, gradient in zip(self.pieces, gradients, strict=True):
            if gradient is None:
                result += [(None,)] * size
            else:
                parts = own_columns(self.context, gradient).split(rows[len(result) : len(result) + size])
                result += [(part,) for part in parts]
        return result


@dataclass(frozen=True, slots=True)
class StatisticsReading:
    """Numbers for each token that is to be predicted, zero where its label is ignored.

    Attributes:
        context: The model's.
        targets: Of each microbatch: [b, s], the token behind each position, or -100.
        temperature: What logits are divided by.
    """

    context: CallContext
    targets: Sequence[torch.Tensor]
    temperature: float = 1.0

    @property
    def width(self) -> int:
        """One tensor for each statistic."""
        return len(STATISTICS)

    def read(self, index: int, output: Any) -> Payload:
        """Each [b, s]."""
        logits, targets = output.logits, self.targets[index]
        mask = targets != -100
        layout, group = self.context.vocabulary, self.context.mesh.tp.group
        if layout is None:
            layout, group = Layout((Block(logits.shape[-1]),)), None
        flat = logits[:, : targets.shape[1]].flatten(0, 1)
        found = token_statistics(flat, targets.where(mask, 0).flatten(), layout, group, self.temperature)
        return tuple(found[name].view_as(targets).masked_fill(~mask, 0) for name in STATISTICS)

    def share(self, found: Sequence[Payload]) -> list[torch.Tensor]:
        """Each [B, s], in the order of `STATISTICS`; they travel together, as float32."""
        fields = [torch.cat(field).detach().float() for field in zip(*found, strict=True)]
        together = from_last_stage(torch.stack(fields) if fields else None, self.context.mesh)
        assert together is not None
        return [field.bool() if name == "is_top1" else field for name, field in zip(STATISTICS, together, strict=True)]

    def split(self, gradients: Gradients, found: Sequence[Payload]) -> list[Gradients]:
        """Each [b, s]; the same on all tp ranks, which is what the statistics need."""
        rows = [read[0].shape[0] for read in found]
        columns = [[None] * len(rows) if g is None else g.split(rows) for g in gradients]
        return list(zip(*columns, strict=True))
