"""What a contestant has to do."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from benchmarks.workload import Workload

__all__ = ["Contestant", "Setting"]


@dataclass(frozen=True)
class Setting:
    """Where a contestant runs.

    Attributes:
        workload: What it trains.
        device: Of this rank.
        dtype: Of parameters and gradients.
        rank: Of this process.
        on_meta: The model is left on the meta device: hf_tpp initialises it shard by shard, with values of its own.
        compile_backend: What contestants that compile give to torch.compile.
    """

    workload: Workload
    device: torch.device
    dtype: torch.dtype
    rank: int
    on_meta: bool = False
    compile_backend: str = "inductor"

    def model(self) -> nn.Module:
        """The plain model with the weights that all contestants start from."""
        return self.workload.model(torch.device("meta") if self.on_meta else self.device, self.dtype)


class Contestant(ABC):
    """One way of training the workload, on this rank.

    Attributes:
        world_size: Processes it takes.
        starts_distributed: It starts torch.distributed itself.
        can_be_alone: Its first rank can run without the others; a stage waits for what those tell it.
    """

    world_size: ClassVar[int] = 2
    starts_distributed: ClassVar[bool] = False
    can_be_alone: ClassVar[bool] = True

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.workload = setting.workload

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer of this rank steps."""

    @abstractmethod
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Forward and backward of one global batch.

        Args:
            tokens: [rows, seq], ids and labels alike (transformers shifts them), the same on every rank.

        Returns:
            The mean loss over all tokens, detached, on every rank.
        """
