"""Messages between neighbouring pipeline stages: non-blocking, one channel per direction.

                 forward_group: activations, stage -> stage + 1
    stage 0  ------------------------------------------------->  stage 1
             <-------------------------------------------------
                 backward_group: gradients, stage + 1 -> stage

Each stage knows shape and dtype of every message beforehand; only outside training, sizes that depend on a cache are
sent ahead of it.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from hf_tpp.mesh import ParallelMesh

__all__ = ["Receipt", "StageLinks"]


@dataclass(slots=True)
class Receipt:
    """A posted receive: the buffer, and the handle that says when it is filled."""

    buffer: torch.Tensor
    work: dist.Work

    def wait(self) -> torch.Tensor:
        """The message. On a GPU this orders the current stream after the transfer and does not stop the host."""
        self.work.wait()
        return self.buffer


@dataclass(slots=True)
class StageLinks:
    """The links of one stage to the stage before and the stage after it."""

    mesh: ParallelMesh
    _in_transit: list[tuple[dist.Work, torch.Tensor]] = field(default_factory=list)
    _open_bytes: int = 0

    def open(self, num_bytes: int) -> None:
        """Make every channel ready for messages of `num_bytes`, before a schedule depends on it.

        NCCL sets a channel up at its first message, and again at the first larger one, and stops both hosts until the
        other side comes. In the middle of a schedule the other side may be waiting for what this host has yet to
        issue: both would wait for ever.

        Collective: every stage of the pipeline, with the same number.
        """
        if self.mesh.device.type != "cuda" or num_bytes <= self._open_bytes:
            return
        self._open_bytes = num_bytes
        rank, size = self.mesh.pp.rank, self.mesh.pp.size
        probe = torch.zeros(num_bytes, dtype=torch.uint8, device=self.mesh.device)
        for parity in (0, 1):
            for source in range(parity, size - 1, 2):
                links = ((source, source + 1, self.mesh.forward_group), (source + 1, source, self.mesh.backward_group))
                for sender, receiver, group in links:
                    if rank == sender:
                        dist.send(probe, self.mesh.pp.global_ranks[receiver], group=group)
                    elif rank == receiver:
                        dist.recv(probe, self.mesh.pp.global_ranks[sender], group=group)
        torch.cuda.synchronize(self.mesh.device)

    def send_forward(self, activation: torch.Tensor) -> None:
        """Start sending an activation to the next stage."""
        self._send(activation, self.mesh.pp.rank + 1, self.mesh.forward_group)

    def send_backward(self, gradient: torch.Tensor) -> None:
        """Start sending a gradient to the stage before."""
        self._send(gradient, self.mesh.pp.rank - 1, self.mesh.backward_group)

    def recv_forward(self, shape: tuple[int, ...], dtype: torch.dtype) -> Receipt:
        """Post the receive of an activation of `shape` from the stage before."""
        return self._recv(shape, dtype, self.mesh.pp.rank - 1, self.mesh.forward_group)

    def recv_backward(self, shape: tuple[int, ...], dtype: torch.dtype) -> Receipt:
        """Post the receive of a gradient of `shape` from the next stage."""
        return self._recv(shape, dtype, self.mesh.pp.rank + 1, self.mesh.backward_group)

    def tell_shapes(self, shapes: list[tuple[int, ...]]) -> None:
        """Tell the next stage the sizes of tensors that follow, over the host's group."""
        target = self.mesh.pp.global_ranks[self.mesh.pp.rank + 1]
        dist.send_object_list([shapes], target, group=self.mesh.replica_control)

    def hear_shapes(self) -> list[tuple[int, ...]]:
        """What the stage before told."""
        message: list[list[tuple[int, ...]]] = [[]]
        source = self.mesh.pp.global_ranks[self.mesh.pp.rank - 1]
        dist.recv_object_list(message, source, group=self.mesh.replica_control)
        return message[0]

    def drain(self) -> None:
        """Wait until every message that was sent has left its buffer."""
        for work, _ in self._in_transit:
            work.wait()
        self._in_transit.clear()

    def _send(self, message: torch.Tensor, stage: int, group: dist.ProcessGroup | None) -> None:
        # Let go of what has left; gloo only knows after a wait, and the oldest have long been received.
        self._in_transit = [(work, buffer) for work, buffer in self._in_transit if not work.is_completed()]
        while len(self._in_transit) > 2 * self.mesh.pp.size:
            self._in_transit.pop(0)[0].wait()
        self._start(message.detach().contiguous(), stage, group)

    def _start(self, buffer: torch.Tensor, stage: int, group: dist.ProcessGroup | None) -> None:
        work = dist.isend(buffer, self.mesh.pp.global_ranks[stage], group=group)
        assert work is not None
        self._in_transit.append((work, buffer))

    def _recv(self, shape: tuple[int, ...], dtype: torch.dtype, stage: int, group: dist.ProcessGroup | None) -> Receipt:
        buffer = torch.empty(shape, dtype=dtype, device=self.mesh.device)
        work = dist.irecv(buffer, self.mesh.pp.global_ranks[stage], group=group)
        assert work is not None
        return Receipt(buffer, work)
