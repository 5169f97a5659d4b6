"""Two lanes in which microbatches take turns, so that one computes while the collectives of another are on their way.

    lane 0    F0    B0 B0    F2    B2 B2            a lane: a stream, and a communicator of its own for the tp group
    lane 1             F1    B1 B1    F3    B3 B3   F1 runs beside B0, F2 beside B1, ...

A forward waits for the forward before it, a backward for the backward before it; only the forward of a microbatch and
the backward of the one before it overlap. So everything that passes change in order (sums of gradients, buffers that a
forward renews) is still changed in that order, and the results are the same, bit for bit, as without lanes. What one
lane allocates, the other may read only while it stays allocated until the pass ends. The host
issues F0 B0 F1 B1 ... as ever: a graph is gone before the next one is built, and since it issues faster than the device
runs, the device finds F1 in its queue while it runs B0.

The price: torch's allocator keeps the memory that lanes have freed apart, so that it reserves up to twice as much for
activations. Its peak of allocated memory stays the same.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from hf_tpp.collectives.lanes import on_twin
from hf_tpp.errors import ConfigurationError
from hf_tpp.mesh import ParallelMesh
from hf_tpp.pipeline_parallel.schedule import Kind

__all__ = ["HeldLeaves", "Lanes", "check_overlap"]


class HeldLeaves:
    """The ends of the graphs at the weights, held in a stream of their own.

    Autograd brings the gradient of a weight to the stream in which that end was made, by the first forward or by a loss
    that the caller still has. Were that a lane, it would wait there for backwards of the other lane, and its next
    forward with it.
    """

    def __init__(self) -> None:
        self._nodes: dict[torch.Tensor, Any] = {}

    def hold(self, parameters: Sequence[torch.Tensor], stream: torch.cuda.Stream) -> None:
        """Make those that are not held yet, in `stream`; for as long as this lives."""
        if self._nodes.keys() == set(parameters):
            return
        with torch.cuda.stream(stream):
            edges = {parameter: torch.autograd.graph.get_gradient_edge(parameter) for parameter in parameters}
        self._nodes = {parameter: edge.node for parameter, edge in edges.items()}


class Lanes:
    """The lanes of one stage.

    Args:
        mesh: With a tp group, which the first lane uses; the other uses its twin. On a CPU there are no streams, and
            lanes differ in their communicator alone.

    Collective: every process of the job.
    """

    def __init__(self, mesh: ParallelMesh) -> None:
        twin = mesh.tp_twin()
        assert mesh.tp.group is not None
        assert twin is not None
        self._device = device = mesh.device
        self._groups = mesh.tp.group, twin
        is_cuda = device.type == "cuda"
        self._streams = [torch.cuda.Stream(device) for _ in self._groups] if is_cuda else []
        self._leaf_stream = torch.cuda.Stream(device) if is_cuda else None
        self._last: dict[Kind, torch.cuda.Event] = {}
        self._leaves = HeldLeaves()

    @contextmanager
    def running(self, parameters: Sequence[torch.Tensor]) -> Iterator[None]:
        """Around a pass: it begins after what was issued before, and what is issued afterwards waits for it.

        Args:
            parameters: Whose gradients the pass computes.
        """
        if not self._streams:
            yield
            return
        current = torch.cuda.current_stream(self._device)
        self._last.clear()
        assert self._leaf_stream is not None
        self._leaves.hold(parameters, self._leaf_stream)
        for stream in self._streams:
            stream.wait_stream(current)
        try:
            yield
        finally:
            for stream in self._streams:
                current.wait_stream(stream)

    @contextmanager
    def lane(self, kind: Kind, microbatch: int) -> Iterator[None]:
        """Around the forward or the backward of a microbatch."""
        with self.placed(microbatch):
            if not self._streams:
                yield
                return
            stream = torch.cuda.current_stream(self._device)
            if kind in self._last:
                stream.wait_event(self._last[kind])
            yield
            self._last[kind] = stream.record_event()

    @contextmanager
    def placed(self, microbatch: int) -> Iterator[None]:
        """In the stream of a microbatch's lane, with its communicator."""
        index = microbatch % 2
        communicator = on_twin(*self._groups) if index else nullcontext()
        with communicator, torch.cuda.stream(self._streams[index]) if self._streams else nullcontext():
            yield


def check_overlap(tp_size: int, pp_size: int, data_parallel: str) -> None:
    """Refuse lanes where there can be none.

    Raises:
        ConfigurationError: A model of these sizes cannot have them.
    """
    if tp_size == 1 or pp_size > 1 or data_parallel != "replicate":
        raise ConfigurationError(
            f"overlap_microbatches=True with tp={tp_size}, pp={pp_size}, data_parallel={data_parallel!r}: only "
            f"microbatches of a single tensor-parallel stage with replicated weights overlap (tp > 1, pp=1, "
            f"data_parallel='replicate'); leave it out"
        )
