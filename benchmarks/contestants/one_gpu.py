"""One process in plain transformers: what everything is compared with."""

from typing import ClassVar

import torch
from torch import nn

from benchmarks.contestants.contract import Contestant, Setting
from benchmarks.contestants.layers import compile_layers

__all__ = ["Plain", "PlainCompiled", "accumulate"]


class Plain(Contestant):
    """A loop over microbatches, gradients accumulated."""

    world_size: ClassVar[int] = 1

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.model = setting.model()

    def parameters(self) -> list[nn.Parameter]:
        """All."""
        return list(self.model.parameters())

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """One microbatch after the other."""
        return accumulate(self.model, tokens, self.workload.micro_batch)


class PlainCompiled(Plain):
    """The same with every layer compiled by itself."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        compile_layers(self.model, setting.compile_backend)


def accumulate(model: nn.Module, tokens: torch.Tensor, micro_batch: int) -> torch.Tensor:
    """Forward and backward of one microbatch after the other; returns the mean loss."""
    microbatches = tokens.split(micro_batch)
    total = torch.zeros((), device=tokens.device)
    for rows in microbatches:
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss / len(microbatches)
        loss.backward()
        total += loss.detach()
    return total
