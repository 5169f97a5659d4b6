"""Both ways in which replicas work together, behind one interface.

                 weights          while a pass runs     gradients after backward()             optimizer state
Replicated       whole            as they are           mean over replicas, whole              whole
FullySharded     a part each      gathered              mean over replicas, a part each        a part each
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import nn

from hf_tpp.gradients.release import scaled
from hf_tpp.gradients.synchronize import average_over_replicas
from hf_tpp.mesh import ParallelMesh

__all__ = ["Replicas", "Replicated"]


class Replicas(Protocol):
    """How the replicas of a parallel model hold weights and gradients.

    Attributes:
        shares_weights: Each replica has a part.
    """

    shares_weights: bool

    def gathered(self) -> AbstractContextManager[None]:
        """Within this context the modules have whole parameters. May be nested.

        Collective over the dp axis where replicas share weights.
        """
        ...

    def computing(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """What the modules have in place of the model's own `parameters` within `gathered`; in the same order."""
        ...

    def hand_out(
        self,
        parameters: Sequence[nn.Parameter],
        gradients: list[torch.Tensor | None],
        factor: torch.Tensor | None = None,
    ) -> list[torch.Tensor | None]:
        """A replica's whole gradients, times `factor`, as `p.grad` of the model's own parameters takes them.

        Collective over the dp axis where replicas share weights. `gradients` is emptied on the way.
        """
        ...

    def finish(self, parameters: Sequence[nn.Parameter]) -> None:
        """After a backward pass outside `no_sync` has filled every `p.grad`. Collective over the dp axis."""
        ...

    def convert(self, convert: Callable[[torch.Tensor], torch.Tensor], plainly: Callable[[], object]) -> None:
        """Convert all tensors of the model, as in `model.to`; `plainly` does it as torch does."""
        ...


class Replicated:
    """Every replica has all weights; gradients are averaged after backward.

    Args:
        mesh: The process groups.
    """

    shares_weights = False

    def __init__(self, mesh: ParallelMesh) -> None:
        self._mesh = mesh

    def gathered(self) -> AbstractContextManager[None]:
        """Nothing to gather."""
        return nullcontext()

    def computing(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """The same."""
        return list(parameters)

    def hand_out(
        self,
        parameters: Sequence[nn.Parameter],
        gradients: list[torch.Tensor | None],
        factor: torch.Tensor | None = None,
    ) -> list[torch.Tensor | None]:
        """The replica's own gradients."""
        return gradients if factor is None else scaled(gradients, factor)

    def finish(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average over the replicas."""
        average_over_replicas(parameters, self._mesh)

    def convert(self, convert: Callable[[torch.Tensor], torch.Tensor], plainly: Callable[[], object]) -> None:
        """As torch does."""
        plainly()
