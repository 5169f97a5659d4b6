"""Which training passes are recorded, and for which of them a recording stands.

Not recorded are passes that look at values (a mask of padding, experts that are looped over), that draw random numbers,
with hooks of the user's, or with arguments that are neither tensors nor plain values, and passes whose microbatches
differ in shape. A pass that is not like any that was recorded runs as ever.
"""

import functools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hf_tpp.cuda_graphs.recording import Captured, RecordedPass, Slot
from hf_tpp.cuda_graphs.state import has_foreign_hooks, host_generators, shape_of, state_of
from hf_tpp.errors import ConfigurationError, first_line
from hf_tpp.pipeline_parallel.lanes import HeldLeaves
from hf_tpp.pipeline_parallel.payload import Payload
from hf_tpp.pipeline_parallel.runner import PipelineRunner, ReadOut
from hf_tpp.pipeline_parallel.stage import Gradients, Traffic
from hf_tpp.pipeline_parallel.stage_pass import KeptGradients, StagePass
from hf_tpp.transformers_versions import unlike_tracing

__all__ = ["StageRecorder", "check_recordable"]

Result = tuple[list[Payload], KeptGradients]
Run = Callable[[StagePass | None], Result]
"""Runs a pass; its microbatches as given, or as ever."""

_PASSES_BEFORE = 2
_RECORDINGS = 4
"""Each holds a sum of the gradients."""
_REMEMBERED = 16
"""Kinds of passes that are counted."""


@dataclass(slots=True)
class StageRecorder:
    """Runs the training passes of one model, recorded where that is possible.

    Attributes:
        model: The model; its parameters and modules are part of every key.
        runner: Runs its passes on this stage.
    """

    model: nn.Module
    runner: PipelineRunner
    _passes: OrderedDict[Hashable, int] = field(default_factory=OrderedDict)
    _recordings: dict[Hashable, list[Slot]] = field(default_factory=dict)
    _has_failed: bool = False
    _pools: list[Any] = field(default_factory=list)
    _stream: Any = None
    _leaves: HeldLeaves = field(default_factory=HeldLeaves)

    @property
    def num_recordings(self) -> int:
        """How many kinds of passes are recorded."""
        return len(self._recordings)

    def train(
        self,
        run: Run,
        microbatches: Sequence[dict[str, Any]],
        traffic: Sequence[Traffic],
        gradients: Gradients,
        read_out: ReadOut,
    ) -> Result:
        """Run a pass, with its microbatches recorded if there is a recording of such.

        Args:
            run: Runs the pass.
            microbatches: Keyword arguments of the model, one dict each.
            traffic: What each microbatch receives and sends.
            gradients: Of what is read out of each.
            read_out: What is taken from each output.

        Returns:
            What `run` returns; what comes of a recording is in tensors that the caller owns.
        """
        if self._has_failed or not self.runner.stage.parameters or has_foreign_hooks(self.model):
            return run(None)
        with self._on_stream():
            slots = self._slots_for(microbatches, traffic, gradients, read_out)
            if slots is not None:
                return run(RecordedPass(slots))
            before = host_generators()
            result = run(None)
            if host_generators() != before:
                self._fail("the model draws random numbers on the host, with which it may decide what to do")
            return result

    def _slots_for(
        self,
        microbatches: Sequence[dict[str, Any]],
        traffic: Sequence[Traffic],
        gradients: Gradients,
        read_out: ReadOut,
    ) -> list[Slot] | None:
        """The slots of passes like this one, recorded now if it is time; None without."""
        shapes = [shape_of(microbatch) for microbatch in microbatches]
        are_alike = all(shape == shapes[0] for shape in shapes) and all(each == traffic[0] for each in traffic)
        if shapes[0] is None or not are_alike:
            return None
        stage, lanes = self.runner.stage, self.runner.lanes
        in_flight = self.runner.mesh.pp.size - self.runner.mesh.pp.rank if lanes is None else 2
        count = min(len(microbatches), in_flight)
        share = None if stage.loss_note.function is None else stage.added_share
        further = repr(traffic[0]), shape_of(dict(enumerate(gradients))), share, stage.with_routers, count
        key = state_of(self.model, self._device), shapes[0], further
        if key in self._recordings or not self._is_time(key):
            return self._recordings.get(key)
        sums = [torch.zeros_like(parameter) for parameter in stage.parameters]
        take = functools.partial(read_out, 0)
        slots = [Slot.of(stage, traffic[0], take, microbatches[0], gradients, sums) for _ in range(count)]
        try:
            for index, slot in enumerate(slots):
                with nullcontext() if lanes is None else lanes.placed(index):
                    slot.record(functools.partial(self._capture, index))
        except RuntimeError as error:
            self._fail(first_line(error))
            return None
        self._recordings[key] = slots
        return slots

    def _is_time(self, key: Hashable) -> bool:
        """Count one more pass of a kind; whether it is now to be recorded."""
        count = self._passes.pop(key, 0) + 1
        self._passes[key] = count
        if len(self._passes) > _REMEMBERED:
            self._passes.popitem(last=False)
        return count > _PASSES_BEFORE and len(self._recordings) < _RECORDINGS

    def _fail(self, reason: str) -> None:
        self._has_failed = True
        warnings.warn(f"training passes are not recorded as CUDA graphs: {reason}", stacklevel=3)

    @property
    def _device(self) -> torch.device:
        return self.runner.mesh.device

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        """In a stream that can be recorded: what is compiled or set up may depend on it. Lanes have their own."""
        if self.runner.lanes is not None:
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        self._leaves.hold([parameter for parameter in self.model.parameters() if parameter.requires_grad], self._stream)
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    def _capture(self, slot: int, function: Callable[[], Payload]) -> Captured:
        """Record what `function` does, without doing it, in memory of this slot.

        No message between stages may be on its way: the host waits for the device.
        """
        if slot == len(self._pools):
            self._pools.append(torch.cuda.graph_pool_handle())
        generator = torch.cuda.default_generators[self._device.index or 0]
        before = generator.clone_state()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            # Backwards are issued by a thread of autograd's own, and a thread of NCCL looks at events meanwhile.
            with unlike_tracing(), torch.cuda.graph(graph, self._pools[slot], stream, "thread_local"):
                results = function()
        except Exception:
            # It would stay in the state of a generator that is being recorded.
            generator.graphsafe_set_state(before)
            raise
        return graph.replay, results


def check_recordable(device_type: str, data_parallel: str) -> None:
    """Refuse to record what cannot be.

    Raises:
        ConfigurationError: There are no recordings on this device, or of replicas that share their weights.
    """
    if device_type != "cuda" or data_parallel != "replicate":
        raise ConfigurationError(
            f"cuda_graphs=True on {device_type} with data_parallel={data_parallel!r}: only passes with replicated "
            f"weights on GPUs are recorded (data_parallel='replicate'); leave it out"
        )
