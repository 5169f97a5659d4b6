"""Forward and backward of one microbatch on one stage.

    received --> [ model's own forward, this stage's blocks ] --> output --> boundary (a scalar: the graph's root)
                                                                    |
                                                                    '--> sent, then freed

The graph hangs on the boundary, not on the output: once the output has left, nothing here holds its memory. On the last
stage the output is what is read out of the model's (its loss, or its logits), and goes to the caller.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_tpp.errors import UnsupportedModelError
from hf_tpp.pipeline_parallel.flow import StageComplete, StageFlow
from hf_tpp.pipeline_parallel.loss_note import LossNote
from hf_tpp.pipeline_parallel.microbatch import batch_rows, sequence_length
from hf_tpp.pipeline_parallel.payload import Payload, PayloadSpec

__all__ = ["Gradients", "MicrobatchGraph", "Stage", "Traffic", "check_message"]


Gradients = Sequence[torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one microbatch receives from the stage before and sends to the next; None at the ends of the pipeline.

    With `has_headers` the sizes in the specs are not binding: each message is preceded by its own. (Shared keys and
    values grow with the cache.)
    """

    receives: PayloadSpec | None = None
    sends: PayloadSpec | None = None
    has_headers: bool = False

    @property
    def num_bytes(self) -> int:
        """Size of the largest message."""
        specs = (self.receives, self.sends)
        return max((leaf.num_bytes for spec in specs if spec is not None for leaf in spec.leaves), default=0)


class _Boundary(torch.autograd.Function):
    """Tensors of a payload -> a scalar; backward returns their gradients, which are in the mailbox by then."""

    @staticmethod
    def forward(ctx: Any, mailbox: list[Gradients], *outputs: torch.Tensor) -> torch.Tensor:
        ctx.mailbox = mailbox
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *ctx.mailbox.pop()


@dataclass(slots=True)
class MicrobatchGraph:
    """What a forward leaves behind for its backward.

    Attributes:
        received: The inputs that get gradients; empty on the first stage.
        root: The boundary: a scalar at the end of the graph.
        mailbox: Where the gradients of the output are put before the backward.
        parameters: Who gets gradients.
    """

    received: Payload
    root: torch.Tensor
    mailbox: list[Gradients]
    parameters: Sequence[torch.Tensor]


@dataclass(slots=True)
class Stage:
    """One stage of the pipeline.

    Attributes:
        forward_model: The model's own forward, bound to the model.
        flow: Shared with the hollow layers.
        parameters: Local parameters that get gradients from the next pass.
        with_routers: Router logits are collected in the next pass.
        loss_note: Notes the loss of the tokens.
        added_share: What one microbatch's additions to it (router losses) count: 1 / number of microbatches.
    """

    forward_model: Callable[..., Any]
    flow: StageFlow
    parameters: Sequence[torch.Tensor] = ()
    with_routers: bool = False
    loss_note: LossNote = field(default_factory=LossNote)
    added_share: float = 1.0

    def run(self, microbatch: dict[str, Any], received: Payload | None, traffic: Traffic) -> Any:
        """The model's forward on this stage.

        Args:
            microbatch: The model's keyword arguments.
            received: What the stage before sent, None on the first.
            traffic: What is received and sent; where `sends` is None, `flow.sends` tells afterwards.

        Returns:
            The payload for the next stage, or on the last stage the model's output object.
        """
        flow = self.flow
        flow.received, flow.receives, flow.sends = received, traffic.receives, traffic.sends
        flow.rows, flow.seq = batch_rows(microbatch), sequence_length(microbatch)
        flow.routers.active = self.with_routers
        flow.start()
        self.loss_note.forget()
        try:
            result = self._whole_loss(self.forward_model(**microbatch))
            flow.check_complete(has_ended=False)
            return result
        except StageComplete:
            flow.check_complete(has_ended=True)
            output, flow.output = flow.output, None
            return output
        finally:
            flow.received, flow.is_running = None, False
            # Recomputation in the backward pass calls the routers again.
            flow.routers.active, flow.routers.logits = False, {}

    def _whole_loss(self, result: Any) -> Any:
        """Of what the model adds to the loss of the tokens, a mean over microbatches; the tokens' is a sum already."""
        if self.loss_note.value is not None:
            result.loss = self.loss_note.whole(result.loss, self.added_share)
        return result

    def forward(
        self, microbatch: dict[str, Any], received: Payload | None, traffic: Traffic, read_out: Callable[[Any], Payload]
    ) -> tuple[MicrobatchGraph, Payload]:
        """Forward with a graph.

        Args:
            microbatch: The model's keyword arguments.
            received: The stage's input, None on the first stage.
            traffic: What is received and sent.
            read_out: What is taken from the model's output on the last stage.

        Returns:
            The graph, and what goes on: the payload, or on the last stage what was read out; detached.
        """
        with_gradient = self.require_gradients(received, traffic)
        result = self.run(microbatch, received, traffic)
        if traffic.sends is None:
            tensors = outputs = read_out(result)
        else:
            check_message(result, traffic.sends)
            tensors = result
            leaves = zip(result, traffic.sends.leaves, strict=True)
            outputs = tuple(tensor for tensor, leaf in leaves if leaf.needs_grad)
        mailbox: list[Gradients] = []
        root: torch.Tensor = _Boundary.apply(mailbox, *outputs)
        graph = MicrobatchGraph(with_gradient, root, mailbox, self.parameters)
        return graph, tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def require_gradients(received: Payload | None, traffic: Traffic) -> Payload:
        """Those received tensors whose gradient the stage before waits for, as leaves of the graph."""
        if received is None or traffic.receives is None:
            return ()
        leaves = zip(received, traffic.receives.leaves, strict=True)
        return tuple(tensor.requires_grad_() for tensor, leaf in leaves if leaf.needs_grad)

    @staticmethod
    def backward(graph: MicrobatchGraph, gradients: Gradients) -> tuple[Payload, list[torch.Tensor | None]]:
        """Backward of one microbatch.

        Args:
            graph: What `forward` left.
            gradients: From the next stage, one for each output that needs one; on the last stage one, or None, for each
                tensor that was read out.

        Returns:
            The gradients for the stage before (none on the first), and one gradient or None per parameter.
        """
        inputs = [*graph.received, *graph.parameters]
        if not graph.root.requires_grad or not inputs:
            return tuple(map(torch.zeros_like, graph.received)), [None] * len(graph.parameters)
        graph.mailbox.append(gradients)
        with torch.autocast(graph.root.device.type, enabled=False), _hooks_at_rest(graph.parameters):
            found = torch.autograd.grad(graph.root, inputs, allow_unused=True)
        count = len(graph.received)
        to_stage_before = tuple(
            torch.zeros_like(tensor) if gradient is None else gradient
            for tensor, gradient in zip(graph.received, found[:count], strict=True)
        )
        return to_stage_before, list(found[count:])


@contextmanager
def _hooks_at_rest(parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """Autograd would run the parameters' hooks for each microbatch, and again for the sum when it is released."""
    hooked = [(parameter, parameter._backward_hooks) for parameter in parameters if parameter._backward_hooks]
    for parameter, _ in hooked:
        parameter._backward_hooks = None
    try:
        yield
    finally:
        for parameter, hooks in hooked:
            parameter._backward_hooks = hooks


def check_message(payload: Payload, spec: PayloadSpec) -> None:
    """Raise UnsupportedModelError unless `payload` is what the next stage has posted receives for."""
    for tensor, leaf in zip(payload, spec.leaves, strict=True):
        if tensor.shape != leaf.shape or tensor.dtype != leaf.dtype:
            raise UnsupportedModelError(
                f"a stage's output is {tensor.dtype} {list(tensor.shape)} where the next stage expects {leaf.dtype} "
                f"{list(leaf.shape)}: use pp=1 for this model, or one dtype throughout"
            )
