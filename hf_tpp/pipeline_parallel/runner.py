"""Executes a schedule: exactly the list of actions that `schedule.py` returns, and nothing else.

The list that is simulated, drawn and tested is the list that runs.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_tpp.collectives.p2p import Receipt, StageLinks
from hf_tpp.mesh import ParallelMesh
from hf_tpp.pipeline_parallel.schedule import Action, Kind, forward_only, one_f_one_b
from hf_tpp.pipeline_parallel.stage import MicrobatchGraph, Stage, check_message

__all__ = ["KeptGradients", "PipelineRunner", "TimedAction"]

Message = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True, slots=True)
class TimedAction:
    """An action that ran: `start` and `end` in seconds on this process's clock.

    A forward or backward starts when its message is there; on a GPU these are the times of the host.
    """

    action: Action
    start: float
    end: float


class KeptGradients:
    """Gradients of the parameters, summed over the microbatches and kept apart from `p.grad`."""

    def __init__(self, num_parameters: int) -> None:
        self.tensors: list[torch.Tensor | None] = [None] * num_parameters
        self._is_own = [False] * num_parameters

    def add(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Add one microbatch."""
        for index, gradient in enumerate(gradients):
            if gradient is None:
                continue
            kept = self.tensors[index]
            if kept is None:
                self.tensors[index] = gradient
            elif self._is_own[index]:
                kept.add_(gradient)
            else:
                # Autograd may have handed out one tensor twice: only a sum of our own may be changed in place.
                self.tensors[index] = kept + gradient
                self._is_own[index] = True


@dataclass(slots=True)
class PipelineRunner:
    """Runs microbatches through this rank's stage.

    Attributes:
        stage: Forward and backward of one microbatch.
        mesh: Who the neighbours are.
        links: Messages to them.
        record: If true, `timeline` holds the times of the last pass.
        timeline: The actions of the last pass with their times.
    """

    stage: Stage
    mesh: ParallelMesh
    links: StageLinks
    record: bool = False
    timeline: list[TimedAction] = field(default_factory=list)

    def train(
        self,
        microbatches: Sequence[dict[str, Any]],
        messages: Sequence[Message],
        start_microbatch: Callable[[int], None],
    ) -> tuple[torch.Tensor, KeptGradients]:
        """Forwards and backwards of all microbatches in 1F1B order.

        Args:
            microbatches: Keyword arguments of the model, one dict each.
            messages: Shape and type of each microbatch's hidden states between stages.
            start_microbatch: Called before each forward with the microbatch's index.

        Collective: every rank of the replica calls it with the same batch.

        Returns:
            The summed loss (zero except on the last stage) and the gradients of the stage's parameters.
        """
        execution = _Execution(self, microbatches, messages, start_microbatch)
        pp = self.mesh.pp
        execution.run(one_f_one_b(pp.rank, pp.size, len(microbatches)))
        return execution.loss, execution.gradients

    def evaluate(
        self,
        microbatches: Sequence[dict[str, Any]],
        messages: Sequence[Message],
        start_microbatch: Callable[[int], None],
    ) -> list[Any]:
        """Forwards of all microbatches.

        Args:
            microbatches: Keyword arguments of the model, one dict each.
            messages: Shape and type of each microbatch's hidden states between stages.
            start_microbatch: Called before each forward with the microbatch's index.

        Returns:
            The model's outputs in order on the last stage, an empty list elsewhere.
        """
        execution = _Execution(self, microbatches, messages, start_microbatch)
        pp = self.mesh.pp
        execution.run(forward_only(pp.rank, pp.size, len(microbatches)), with_graph=False)
        return execution.outputs


class _Execution:
    """The state of one pass over a schedule."""

    def __init__(
        self,
        runner: PipelineRunner,
        microbatches: Sequence[dict[str, Any]],
        messages: Sequence[Message],
        start_microbatch: Callable[[int], None],
    ) -> None:
        self.runner, self.microbatches, self.messages = runner, microbatches, messages
        self.start_microbatch = start_microbatch
        self.stage, self.links = runner.stage, runner.links
        self.is_last = runner.mesh.pp.is_last
        self.activations: dict[int, Receipt] = {}
        self.gradients_in: dict[int, Receipt] = {}
        self.graphs: dict[int, MicrobatchGraph] = {}
        self.to_send: dict[int, torch.Tensor] = {}
        self.outputs: list[Any] = []
        self.started = 0.0
        self.loss = torch.zeros((), device=runner.mesh.device)
        self.gradients = KeptGradients(len(runner.stage.parameters))

    def run(self, schedule: Sequence[Action], with_graph: bool = True) -> None:
        """Execute the actions in order."""
        self.links.open(max(math.prod(shape) * dtype.itemsize for shape, dtype in self.messages))
        execute: dict[Kind, Callable[[int], None]] = {
            Kind.RECV_FORWARD: self._recv_forward,
            Kind.FORWARD: self._forward if with_graph else self._evaluate,
            Kind.SEND_FORWARD: lambda index: self.links.send_forward(self.to_send.pop(index)),
            Kind.RECV_BACKWARD: self._recv_backward,
            Kind.BACKWARD: self._backward,
            Kind.SEND_BACKWARD: lambda index: self.links.send_backward(self.to_send.pop(index)),
        }
        timeline = []
        for action in schedule:
            self.started = time.perf_counter()
            execute[action.kind](action.microbatch)
            if self.runner.record:
                timeline.append(TimedAction(action, self.started, time.perf_counter()))
        self.links.drain()
        self.runner.timeline = timeline

    def _recv_forward(self, index: int) -> None:
        self.activations[index] = self.links.recv_forward(*self.messages[index])

    def _recv_backward(self, index: int) -> None:
        self.gradients_in[index] = self.links.recv_backward(*self.messages[index])

    def _received(self, index: int) -> torch.Tensor | None:
        receipt = self.activations.pop(index, None)
        if receipt is None:
            return None
        if self.stage.flow.tuple_length is None:
            self.stage.flow.tuple_length = self.links.hear_previous()
        return self._wait(receipt)

    def _wait(self, receipt: Receipt) -> torch.Tensor:
        message = receipt.wait()
        self.started = time.perf_counter()
        return message

    def _tell_convention(self, is_first_time: bool) -> None:
        """The first forward of all shows what the blocks return; the stages behind must know before theirs."""
        if is_first_time and not self.is_last:
            assert self.stage.flow.tuple_length is not None
            self.links.tell_next(self.stage.flow.tuple_length)

    def _forward(self, index: int) -> None:
        is_first_time = self.stage.flow.tuple_length is None
        received = self._received(index)
        self.start_microbatch(index)
        self.graphs[index], result = self.stage.forward(self.microbatches[index], received, self.messages[index])
        self._tell_convention(is_first_time)
        if self.is_last:
            self.loss = self.loss + result
        else:
            self.to_send[index] = result

    def _evaluate(self, index: int) -> None:
        is_first_time = self.stage.flow.tuple_length is None
        received = self._received(index)
        self.start_microbatch(index)
        result = self.stage.run(self.microbatches[index], received)
        if self.is_last:
            self.outputs.append(result)
        else:
            check_message(result, *self.messages[index])
            self.to_send[index] = result
        self._tell_convention(is_first_time)

    def _backward(self, index: int) -> None:
        receipt = self.gradients_in.pop(index, None)
        gradient = None if receipt is None else self._wait(receipt)
        received = self.graphs[index].received
        to_stage_before, gradients = self.stage.backward(self.graphs.pop(index), gradient)
        self.gradients.add(gradients)
        if received is not None:
            self.to_send[index] = torch.zeros_like(received) if to_stage_before is None else to_stage_before
