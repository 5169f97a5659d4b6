"""The graphs of one kind of pass.

    slot 0    F0    B0 F2    B2 F4 ...       a slot: the graph of a forward and that of its backward, with inputs and
    slot 1       F1       B1 F3    B3 ...    results of their own; as many as microbatches are in flight on the stage

The memory of a slot's activations is its own: the graphs of a slot are replayed in the order in which they were
recorded, those of different slots in any. The sum of the gradients is one for all slots, added to inside the graphs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_tpp.pipeline_parallel.payload import LeafSpec, Payload
from hf_tpp.pipeline_parallel.stage import Gradients, MicrobatchGraph, Stage, Traffic
from hf_tpp.pipeline_parallel.stage_pass import KeptGradients, StagePass

__all__ = ["Captured", "RecordedPass", "Slot"]

Captured = tuple[Callable[[], None], Payload]
"""What repeats a recorded function, and what the function returned: the tensors that repeating it writes to."""
Capture = Callable[[Callable[[], Payload]], Captured]


@dataclass(slots=True)
class Slot:
    """One microbatch in flight.

    Attributes:
        stage: Whose forward and backward are recorded.
        traffic: What a microbatch receives and sends.
        read_out: What is taken from the model's output on the last stage.
        microbatch: Keyword arguments of the model; tensors are where the graph reads them.
        received: What the stage before sends, likewise.
        gradients: Of what is sent or read out, likewise.
        sums: Of the gradients of all parameters, for all slots.
        is_summed: Which of them have a gradient.
    """

    stage: Stage
    traffic: Traffic
    read_out: Callable[[Any], Payload]
    microbatch: dict[str, Any]
    received: Payload | None
    gradients: Gradients
    sums: Sequence[torch.Tensor]
    is_summed: list[bool] = field(default_factory=list)
    _graph: MicrobatchGraph | None = None
    _forward: Captured | None = None
    _backward: Captured | None = None

    @classmethod
    def of(
        cls,
        stage: Stage,
        traffic: Traffic,
        read_out: Callable[[Any], Payload],
        microbatch: dict[str, Any],
        gradients: Gradients,
        sums: Sequence[torch.Tensor],
    ) -> "Slot":
        """A slot for microbatches like this one, whose places hold its values as far as they are known."""
        device = sums[0].device
        received = None if traffic.receives is None else _places(traffic.receives.leaves, device)
        if traffic.sends is not None:
            gradients = _places([leaf for leaf in traffic.sends.leaves if leaf.needs_grad], device)
        own = {name: _copy(value) for name, value in microbatch.items()}
        return cls(stage, traffic, read_out, own, received, [_copy(gradient) for gradient in gradients], sums)

    def record(self, capture: Capture) -> None:
        """Record forward and backward."""
        self._forward = capture(self._run_forward)
        self._backward = capture(self._run_backward)

    def forward(self, microbatch: dict[str, Any], received: Payload | None) -> Payload:
        """Repeat the forward with these values; the results are the caller's."""
        for name, value in microbatch.items():
            if isinstance(value, torch.Tensor):
                self.microbatch[name].copy_(value)
        for place, value in zip(self.received or (), received or (), strict=True):
            place.copy_(value)
        return _repeat(self._forward)

    def backward(self, gradients: Gradients) -> Payload:
        """Repeat the backward with these gradients; the results are the caller's."""
        for place, value in zip(self.gradients, gradients, strict=True):
            if place is not None and value is not None:
                place.copy_(value)
        return _repeat(self._backward)

    def _run_forward(self) -> Payload:
        received = None if self.received is None else tuple(place.detach() for place in self.received)
        self._graph, result = self.stage.forward(self.microbatch, received, self.traffic, self.read_out)
        return result

    def _run_backward(self) -> Payload:
        graph, self._graph = self._graph, None
        assert graph is not None
        to_stage_before, found = self.stage.backward(graph, self.gradients)
        self.is_summed = [gradient is not None for gradient in found]
        sums = [total for total, gradient in zip(self.sums, found, strict=True) if gradient is not None]
        if sums:
            torch._foreach_add_(sums, [gradient for gradient in found if gradient is not None])
        return to_stage_before


class RecordedPass(StagePass):
    """A pass whose microbatches repeat what was recorded.

    Args:
        slots: Of this kind of pass.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        super().__init__(slots[0].stage)
        self._slots = slots
        torch._foreach_zero_(list(slots[0].sums))

    def forward(
        self,
        index: int,
        microbatch: dict[str, Any],
        received: Payload | None,
        traffic: Traffic,
        read_out: Callable[[Any], Payload],
    ) -> Payload:
        """As in `StagePass`."""
        return self._slots[index % len(self._slots)].forward(microbatch, received)

    def backward(self, index: int, gradients: Gradients) -> Payload:
        """As in `StagePass`."""
        return self._slots[index % len(self._slots)].backward(gradients)

    def gradients(self) -> KeptGradients:
        """Copies: the next pass writes to the same places, and the caller may keep what it was given."""
        first = self._slots[0]
        kept = KeptGradients(len(first.sums))
        pairs = zip(first.sums, first.is_summed, strict=True)
        kept.tensors = [total.clone() if is_summed else None for total, is_summed in pairs]
        return kept


def _repeat(captured: Captured | None) -> Payload:
    assert captured is not None
    replay, results = captured
    replay()
    return tuple(result.clone() for result in results)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _places(leaves: Sequence[LeafSpec], device: torch.device) -> tuple[torch.Tensor, ...]:
    return tuple(torch.zeros(leaf.shape, dtype=leaf.dtype, device=device) for leaf in leaves)
