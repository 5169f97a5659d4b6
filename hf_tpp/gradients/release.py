"""One forward call is one schedule: its gradients are kept, and `loss.backward()` releases them.

    loss = model(**batch).loss     runs all forwards and backwards; the gradients of `loss` are kept aside
    loss.backward()                p.grad += upstream x kept, by autograd's own accumulation

so gradient accumulation, loss scaling and hooks on parameters behave as if the model had been run by autograd. Where
the caller computes the loss, the backwards have to wait for its gradient:

    logits = model(**batch).logits     runs all forwards
    loss(logits).backward()            runs all backwards, then p.grad += their gradients
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from hf_tpp.errors import BatchError

__all__ = ["BackwardScale", "Gradients", "HandOut", "defer_backward", "release_gradients", "scaled"]

Gradients = Sequence[torch.Tensor | None]
HandOut = Callable[[list[torch.Tensor | None], torch.Tensor], list[torch.Tensor | None]]


class BackwardScale:
    """The gradient of the loss that kept gradients are computed with.

    In float16 small gradients vanish on their way back, and scaling them afterwards cannot bring them back. What a
    GradScaler will multiply the loss by is not known before `backward()`; it rarely changes, so the last one is taken,
    and only the quotient is applied at the release. Scales below 1 are no loss scales.

    Args:
        device: Of the model; the host never waits for the value.
    """

    def __init__(self, device: torch.device) -> None:
        self.value = torch.ones((), device=device)

    def expect(self, upstream: torch.Tensor) -> None:
        """The next loss will probably be multiplied by what this one was multiplied by."""
        is_scale = torch.isfinite(upstream) & (upstream > 1)
        self.value = upstream.float().where(is_scale, 1.0)

    def back_off(self, is_finite: torch.Tensor) -> None:
        """After gradients that overflowed a GradScaler halves its scale."""
        self.value = self.value.where(is_finite, (self.value / 2).clamp(min=1))


def release_gradients(
    loss: torch.Tensor,
    parameters: Sequence[torch.nn.Parameter],
    gradients: Gradients,
    hand_out: HandOut,
    after_backward: Callable[[], None],
    scale: BackwardScale,
) -> torch.Tensor:
    """A loss whose backward hands out gradients that are known already.

    Args:
        loss: Scalar value.
        parameters: Who gets gradients.
        gradients: d loss / d parameter times the present value of `scale`, or None; in the same order.
        hand_out: (gradients, factor) -> what each parameter gets. It may empty the list as it goes.
        after_backward: Called once, when the backward pass has filled every `p.grad`.
        scale: Learns what the loss is multiplied by.

    Returns:
        `loss` with a graph of one node.
    """
    released: torch.Tensor = _Release.apply(loss, gradients, hand_out, after_backward, scale, *parameters)
    return released


def scaled(gradients: list[torch.Tensor | None], factor: torch.Tensor) -> list[torch.Tensor | None]:
    """Gradients times `factor`, one after the other, so that few exist twice."""
    released = []
    for index, gradient in enumerate(gradients):
        gradients[index] = None
        released.append(None if gradient is None else gradient * factor.to(gradient.dtype))
    return released


class _Release(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        loss: torch.Tensor,
        gradients: Gradients,
        hand_out: HandOut,
        after_backward: Callable[[], None],
        scale: BackwardScale,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        ctx.gradients, ctx.hand_out, ctx.after_backward = list(gradients), hand_out, after_backward
        ctx.scale, ctx.used = scale, scale.value
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[Any, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were released before: call the model again, then backward()")
        gradients, ctx.gradients = ctx.gradients, None
        ctx.scale.expect(upstream)
        released = ctx.hand_out(gradients, upstream / ctx.used)
        _after_accumulation(ctx.after_backward)
        return None, None, None, None, None, *released


def defer_backward(
    outputs: Sequence[torch.Tensor],
    parameters: Sequence[torch.nn.Parameter],
    run_backward: Callable[[Gradients], Gradients],
    after_backward: Callable[[], None],
) -> tuple[torch.Tensor, ...]:
    """Outputs whose backward runs the model's.

    Args:
        outputs: What the caller gets, without a graph.
        parameters: Who gets gradients.
        run_backward: From d loss / d output, or None, of each output to d loss / d parameter, or None, of each
            parameter. Called at most once, and let go of with the graph of the outputs.
        after_backward: Called once, when the backward pass has filled every `p.grad`.

    Returns:
        The outputs with a common graph of one node. Its backward raises BatchError the second time.
    """
    deferred: tuple[torch.Tensor, ...] = _Defer.apply(list(outputs), run_backward, after_backward, *parameters)
    return deferred


class _Defer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        outputs: list[torch.Tensor],
        run_backward: Callable[[Gradients], Gradients],
        after_backward: Callable[[], None],
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.run_backward, ctx.after_backward = run_backward, after_backward
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        if ctx.run_backward is None:
            raise BatchError(
                "backward() went twice through the logits of one call of a parallel model (retain_graph=True), but "
                "what its stages kept was used up the first time: add the losses up and call backward() once, or call "
                "the model again"
            )
        run_backward, ctx.run_backward = ctx.run_backward, None
        released = run_backward(gradients)
        _after_accumulation(ctx.after_backward)
        return None, None, None, *released


def _after_accumulation(callback: Callable[[], None]) -> None:
    """Run code after AccumulateGrad. This is the only way to; torch's own FSDP uses it too."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)
