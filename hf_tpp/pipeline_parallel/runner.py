"""Executes a schedule: exactly the list of actions that `schedule.py` returns, and nothing else.

The list that is simulated, drawn and tested is the list that runs.
"""

import functools
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from hf_tpp.collectives.p2p import Receipt, StageLinks
from hf_tpp.mesh import ParallelMesh
from hf_tpp.pipeline_parallel.lanes import Lanes
from hf_tpp.pipeline_parallel.payload import LeafSpec, Payload
from hf_tpp.pipeline_parallel.rehearsal import Rehearsal
from hf_tpp.pipeline_parallel.schedule import Action, Kind, backward_only, forward_only, one_f_one_b
from hf_tpp.pipeline_parallel.stage import Gradients, Stage, Traffic, check_message
from hf_tpp.pipeline_parallel.stage_pass import KeptGradients, StagePass

__all__ = ["OpenPass", "PipelineRunner", "ReadOut", "TimedAction"]

ReadOut = Callable[[int, Any], Payload]
"""The tensors that are taken from the model's output for a microbatch, given by its index."""


@dataclass(frozen=True, slots=True)
class TimedAction:
    """An action that ran: `start` and `end` in seconds on this process's clock.

    A forward or backward starts when its message is there; on a GPU these are the times of the host.
    """

    action: Action
    start: float
    end: float


@dataclass(slots=True)
class PipelineRunner:
    """Runs microbatches through this rank's stage.

    Attributes:
        stage: Forward and backward of one microbatch.
        mesh: Who the neighbours are.
        links: Messages to them.
        rehearsal: What those messages are.
        lanes: In which the microbatches of a training pass overlap; None where they do not.
        record: If true, `timeline` holds the times of the last pass.
        timeline: The actions of the last pass with their times.
    """

    stage: Stage
    mesh: ParallelMesh
    links: StageLinks
    rehearsal: Rehearsal
    lanes: Lanes | None = None
    record: bool = False
    timeline: list[TimedAction] = field(default_factory=list)

    def train(
        self,
        microbatches: Sequence[dict[str, Any]],
        traffic: Sequence[Traffic],
        start_microbatch: Callable[[int], None],
        read_out: ReadOut,
        gradients: Gradients,
        stage_pass: StagePass | None = None,
    ) -> tuple[list[Payload], KeptGradients]:
        """Forwards and backwards of all microbatches in 1F1B order.

        Args:
            microbatches: Keyword arguments of the model, one dict each.
            traffic: What each microbatch receives and sends.
            start_microbatch: Called before each forward with the microbatch's index.
            read_out: What is taken from each output.
            gradients: One, or None, for each tensor that is read out; the same for all microbatches.
            stage_pass: Runs the microbatches on this stage; default: the stage itself.

        Collective: every rank of the replica calls it with the same batch.

        Returns:
            What was read out of each microbatch (nothing except on the last stage), and the gradients of the stage's
            parameters.
        """
        stage_pass = stage_pass or StagePass(self.stage, in_lanes=self.lanes is not None)
        execution = _Execution(self, microbatches, traffic, start_microbatch, read_out, stage_pass)
        execution.output_gradients = [gradients] * len(microbatches)
        pp = self.mesh.pp
        schedule = one_f_one_b(pp.rank, pp.size, len(microbatches))
        with nullcontext() if self.lanes is None else self.lanes.running(self.stage.parameters):
            execution.run(schedule, self.lanes)
        return execution.outputs, stage_pass.gradients()

    def open(
        self,
        microbatches: Sequence[dict[str, Any]],
        traffic: Sequence[Traffic],
        start_microbatch: Callable[[int], None],
        read_out: ReadOut,
    ) -> "OpenPass":
        """Forwards of all microbatches, with their graphs, for backwards that come later.

        Args:
            microbatches: Keyword arguments of the model, one dict each.
            traffic: What each microbatch receives and sends.
            start_microbatch: Called before each forward with the microbatch's index.
            read_out: What is taken from each output.

        Collective: every rank of the replica calls it with the same batch.
        """
        execution = _Execution(self, microbatches, traffic, start_microbatch, read_out)
        pp = self.mesh.pp
        execution.run(forward_only(pp.rank, pp.size, len(microbatches)))
        return OpenPass(execution)

    def evaluate(
        self,
        microbatches: Sequence[dict[str, Any]],
        traffic: Sequence[Traffic],
        start_microbatch: Callable[[int], None],
    ) -> list[Any]:
        """Forwards of all microbatches.

        Args:
            microbatches: Keyword arguments of the model, one dict each.
            traffic: What each microbatch receives and sends.
            start_microbatch: Called before each forward with the microbatch's index.

        Returns:
            The model's outputs in order on the last stage, an empty list elsewhere.
        """
        execution = _Execution(self, microbatches, traffic, start_microbatch)
        pp = self.mesh.pp
        execution.run(forward_only(pp.rank, pp.size, len(microbatches)))
        return execution.outputs


class OpenPass:
    """Forwards that have run, and keep their graphs until `finish`, or until nobody holds this any more."""

    def __init__(self, execution: "_Execution") -> None:
        self._execution = execution

    @property
    def outputs(self) -> list[Payload]:
        """What was read out of each microbatch, detached; nothing except on the last stage."""
        return self._execution.outputs

    def finish(self, gradients: Sequence[Gradients]) -> KeptGradients:
        """Backwards of all microbatches; only once.

        Args:
            gradients: Of what was read out of each microbatch; not looked at except on the last stage.

        Collective: every rank of the replica, whatever other passes are open.

        Returns:
            The gradients of the stage's parameters.
        """
        execution, pp = self._execution, self._execution.runner.mesh.pp
        execution.output_gradients = gradients
        execution.run(backward_only(pp.rank, pp.size, len(execution.microbatches)))
        return execution.stage_pass.gradients()


class _Execution:
    """The state of one pass over a schedule; without `read_out`, forwards leave no graphs."""

    def __init__(
        self,
        runner: PipelineRunner,
        microbatches: Sequence[dict[str, Any]],
        traffic: Sequence[Traffic],
        start_microbatch: Callable[[int], None],
        read_out: ReadOut | None = None,
        stage_pass: StagePass | None = None,
    ) -> None:
        self.runner, self.microbatches, self.traffic = runner, microbatches, traffic
        self.start_microbatch, self.read_out = start_microbatch, read_out
        self.stage, self.links = runner.stage, runner.links
        self.stage_pass = stage_pass or StagePass(runner.stage)
        self.is_last = runner.mesh.pp.is_last
        self.activations: dict[int, list[Receipt]] = {}
        self.gradients_in: dict[int, list[Receipt]] = {}
        self.to_send: dict[int, Payload] = {}
        self.outputs: list[Any] = []
        self.output_gradients: Sequence[Gradients] = ()
        self.timeline: list[TimedAction] = []
        self.started = 0.0

    def run(self, schedule: Sequence[Action], lanes: Lanes | None = None) -> None:
        """Execute the actions in order."""
        self.links.open(max(traffic.num_bytes for traffic in self.traffic))
        execute: dict[Kind, Callable[[int], None]] = {
            Kind.RECV_FORWARD: self._recv_forward,
            Kind.FORWARD: self._forward if self.read_out is not None else self._evaluate,
            Kind.SEND_FORWARD: self._send_forward,
            Kind.RECV_BACKWARD: self._recv_backward,
            Kind.BACKWARD: self._backward,
            Kind.SEND_BACKWARD: self._send_backward,
        }
        for action in schedule:
            self.started = time.perf_counter()
            with nullcontext() if lanes is None else lanes.lane(action.kind, action.microbatch):
                execute[action.kind](action.microbatch)
            if self.runner.record:
                self.timeline.append(TimedAction(action, self.started, time.perf_counter()))
        self.links.drain()
        self.runner.timeline = self.timeline

    def _recv_forward(self, index: int) -> None:
        receives = self.traffic[index].receives
        assert receives is not None
        if self.traffic[index].has_headers:
            return  # sizes come with the message
        self.activations[index] = [self.links.recv_forward(leaf.shape, leaf.dtype) for leaf in receives.leaves]

    def _recv_backward(self, index: int) -> None:
        sends = self.traffic[index].sends
        assert sends is not None
        graded: list[LeafSpec] = [leaf for leaf in sends.leaves if leaf.needs_grad]
        self.gradients_in[index] = [self.links.recv_backward(leaf.shape, leaf.dtype) for leaf in graded]

    def _send_forward(self, index: int) -> None:
        for tensor in self.to_send.pop(index):
            self.links.send_forward(tensor)

    def _send_backward(self, index: int) -> None:
        for tensor in self.to_send.pop(index):
            self.links.send_backward(tensor)

    def _wait(self, receipts: list[Receipt] | None) -> Payload | None:
        if receipts is None:
            return None
        payload = tuple(receipt.wait() for receipt in receipts)
        self.started = time.perf_counter()
        return payload

    def _forward(self, index: int) -> None:
        received = self._wait(self.activations.pop(index, None))
        self.start_microbatch(index)
        assert self.read_out is not None
        microbatch, traffic = self.microbatches[index], self.traffic[index]
        read_out = functools.partial(self.read_out, index)
        result = self.stage_pass.forward(index, microbatch, received, traffic, read_out)
        if self.is_last:
            self.outputs.append(result)
        else:
            self.to_send[index] = result

    def _evaluate(self, index: int) -> None:
        traffic = self.traffic[index]
        if traffic.has_headers and traffic.receives is not None:
            types = [leaf.dtype for leaf in traffic.receives.leaves]
            shapes = zip(self.links.hear_shapes(), types, strict=True)
            self.activations[index] = [self.links.recv_forward(shape, dtype) for shape, dtype in shapes]
        received = self._wait(self.activations.pop(index, None))
        self.start_microbatch(index)
        result = self.stage.run(self.microbatches[index], received, traffic)
        if traffic.sends is None:
            self.outputs.append(result)
            return
        if traffic.has_headers:
            self.links.tell_shapes([tuple(tensor.shape) for tensor in result])
        else:
            check_message(result, traffic.sends)
        self.to_send[index] = result

    def _backward(self, index: int) -> None:
        received = self._wait(self.gradients_in.pop(index, None))
        gradients_in = self.output_gradients[index] if received is None else received
        to_stage_before = self.stage_pass.backward(index, gradients_in)
        if not self.runner.mesh.pp.is_first:
            self.to_send[index] = to_stage_before
