"""One forward call is one schedule: its gradients are kept, and `loss.backward()` releases them.

    loss = model(**batch).loss     runs all forwards and backwards; the gradients of `loss` are kept aside
    loss.backward()                p.grad += upstream x kept, by autograd's own accumulation

so gradient accumulation, loss scaling and hooks on parameters behave as if the model had been run by autograd.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["release_gradients"]


def release_gradients(
    loss: torch.Tensor,
    parameters: Sequence[torch.nn.Parameter],
    gradients: Sequence[torch.Tensor | None],
    after_backward: Callable[[], None],
) -> torch.Tensor:
    """A loss whose backward hands out gradients that are known already.

    Args:
        loss: Scalar value.
        parameters: Who gets gradients.
        gradients: d loss / d parameter, or None; in the same order.
        after_backward: Called once, when the backward pass has filled every `p.grad`.

    Returns:
        `loss` with a graph of one node.
    """
    released: torch.Tensor = _Release.apply(loss, gradients, after_backward, *parameters)
    return released


class _Release(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        loss: torch.Tensor,
        gradients: Sequence[torch.Tensor | None],
        after_backward: Callable[[], None],
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        ctx.gradients, ctx.after_backward = list(gradients), after_backward
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[Any, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were released before: call the model again, then backward()")
        gradients, ctx.gradients = ctx.gradients, None
        scale = upstream[0]
        released = []
        for index, gradient in enumerate(gradients):
            gradients[index] = None
            released.append(None if gradient is None else gradient * scale.to(gradient.dtype))
        # The only way to run code after AccumulateGrad; torch's own FSDP uses it too.
        torch.autograd.Variable._execution_engine.queue_callback(ctx.after_backward)
        return None, None, None, *released
