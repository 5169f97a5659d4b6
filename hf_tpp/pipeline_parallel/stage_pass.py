"""The microbatches of one pass on one stage: their graphs, and the sum of their gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hf_tpp.pipeline_parallel.payload import Payload
from hf_tpp.pipeline_parallel.stage import Gradients, MicrobatchGraph, Stage, Traffic

__all__ = ["KeptGradients", "StagePass"]


class KeptGradients:
    """Gradients of the parameters, summed over the microbatches and kept apart from `p.grad`.

    Args:
        num_parameters: How many.
        in_lanes: Microbatches run in several streams. A sum is then one tensor throughout: memory that one stream frees
            while another still reads it would be used again too early.
    """

    def __init__(self, num_parameters: int, in_lanes: bool = False) -> None:
        self.tensors: list[torch.Tensor | None] = [None] * num_parameters
        self._is_own = [False] * num_parameters
        self._in_lanes = in_lanes

    def add(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Add one microbatch."""
        into: list[torch.Tensor] = []
        added: list[torch.Tensor] = []
        for index, gradient in enumerate(gradients):
            if gradient is None:
                continue
            kept = self.tensors[index]
            if kept is None:
                self.tensors[index] = gradient.clone() if self._in_lanes else gradient
                self._is_own[index] = self._in_lanes
            elif self._is_own[index]:
                into.append(kept)
                added.append(gradient)
            else:
                # Autograd may have handed out one tensor twice: only a sum of our own may be changed in place.
                self.tensors[index] = kept + gradient
                self._is_own[index] = True
        if into:
            torch._foreach_add_(into, added)  # in few kernels


class StagePass:
    """Forwards with graphs, and their backwards.

    Args:
        stage: Forward and backward of one microbatch.
        in_lanes: Microbatches run in several streams.
    """

    def __init__(self, stage: Stage, in_lanes: bool = False) -> None:
        self.stage = stage
        self._graphs: dict[int, MicrobatchGraph] = {}
        self._gradients = KeptGradients(len(stage.parameters), in_lanes)

    def forward(
        self,
        index: int,
        microbatch: dict[str, Any],
        received: Payload | None,
        traffic: Traffic,
        read_out: Callable[[Any], Payload],
    ) -> Payload:
        """The forward of a microbatch; arguments as in `Stage.forward`.

        Returns:
            The payload for the next stage, or on the last stage what was read out.
        """
        self._graphs[index], result = self.stage.forward(microbatch, received, traffic, read_out)
        return result

    def backward(self, index: int, gradients: Gradients) -> Payload:
        """The backward of a microbatch whose forward has run; `gradients` as in `Stage.backward`.

        Returns:
            The gradients for the stage before.
        """
        to_stage_before, found = self.stage.backward(self._graphs.pop(index), gradients)
        self._gradients.add(found)
        return to_stage_before

    def gradients(self) -> KeptGradients:
        """Of the stage's parameters, once all backwards have run."""
        return self._gradients
