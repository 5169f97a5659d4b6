"""Forward and backward of one microbatch on one stage.

    received --> [ model's own forward, this stage's blocks ] --> output --> boundary (a scalar: the graph's root)
                                                                    |
                                                                    '--> sent, then freed

The graph hangs on the boundary, not on the output: once the output has left, nothing here holds its memory.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_tpp.errors import UnsupportedModelError
from hf_tpp.pipeline_parallel.split import StageComplete, StageFlow

__all__ = ["MicrobatchGraph", "Stage"]


class _Boundary(torch.autograd.Function):
    """Hidden states -> a scalar; backward returns the gradient that the next stage sent."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, mailbox: list[torch.Tensor]) -> torch.Tensor:
        ctx.mailbox = mailbox
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.mailbox.pop(), None


@dataclass(slots=True)
class MicrobatchGraph:
    """What a forward leaves behind for its backward.

    Attributes:
        received: The input that gets a gradient; None on the first stage.
        root: Scalar at the end of the graph: the boundary, or the loss on the last stage.
        mailbox: Where the next stage's gradient is put before the backward.
    """

    received: torch.Tensor | None
    root: torch.Tensor
    mailbox: list[torch.Tensor] = field(default_factory=list)


@dataclass(slots=True)
class Stage:
    """One stage of the pipeline.

    Attributes:
        forward_model: The model's own forward, bound to the model.
        flow: Shared with the hollow layers.
        parameters: Local parameters that get gradients in the next pass.
    """

    forward_model: Callable[..., Any]
    flow: StageFlow
    parameters: Sequence[torch.Tensor] = ()

    def run(self, microbatch: dict[str, Any], received: torch.Tensor | None) -> Any:
        """The model's forward on this stage.

        Args:
            microbatch: The model's keyword arguments.
            received: [batch, seq, hidden] from the stage before, None on the first.

        Returns:
            The hidden states for the next stage, or on the last stage the model's output object.
        """
        self.flow.received = received
        try:
            return self.forward_model(**microbatch)
        except StageComplete:
            output, self.flow.output = self.flow.output, None
            return output
        finally:
            self.flow.received = None

    def forward(
        self, microbatch: dict[str, Any], received: torch.Tensor | None, message: tuple[tuple[int, ...], torch.dtype]
    ) -> tuple[MicrobatchGraph, torch.Tensor]:
        """Forward with a graph.

        Args:
            microbatch: The model's keyword arguments, labels among them.
            received: The stage's input, None on the first stage.
            message: Shape and type that the next stage expects.

        Returns:
            The graph, and what goes on: hidden states, or the detached loss on the last stage.
        """
        if received is not None:
            received.requires_grad_()
        result = self.run(microbatch, received)
        if not isinstance(result, torch.Tensor):
            return MicrobatchGraph(received, result.loss), result.loss.detach()
        check_message(result, *message)
        mailbox: list[torch.Tensor] = []
        root: torch.Tensor = _Boundary.apply(result, mailbox)
        return MicrobatchGraph(received, root, mailbox), result.detach()

    def backward(
        self, graph: MicrobatchGraph, gradient: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
        """Backward of one microbatch.

        Args:
            graph: What `forward` left.
            gradient: From the next stage, shaped as the output; None on the last stage.

        Returns:
            The gradient for the stage before (None on the first), and one gradient or None per parameter.
        """
        nothing: list[torch.Tensor | None] = [None] * len(self.parameters)
        inputs = list(self.parameters) if graph.received is None else [graph.received, *self.parameters]
        if not graph.root.requires_grad or not inputs:
            return None, nothing
        if gradient is not None:
            graph.mailbox.append(gradient)
        with torch.autocast(graph.root.device.type, enabled=False), _hooks_at_rest(self.parameters):
            gradients = torch.autograd.grad(graph.root, inputs, allow_unused=True)
        if graph.received is None:
            return None, list(gradients)
        return gradients[0], list(gradients[1:])


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


def check_message(output: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise unless `output` is what the next stage has posted a receive for."""
    if output.shape != shape or output.dtype != dtype:
        raise UnsupportedModelError(
            f"a stage's output is {output.dtype} {list(output.shape)} where the next stage expects {dtype} "
            f"{list(shape)}: use pp=1 for this model, or one dtype throughout"
        )
