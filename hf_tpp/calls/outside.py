"""A training call whose loss is computed outside the model, from logits (label smoothing, `compute_loss_func`, DPO).

    logits = model(input_ids).logits      forwards of all microbatches; every rank gets the logits   [B, s, V]
    loss = anything(logits)               by the caller, the same on every rank of the replica
    loss.backward()                       d loss / d logits  ->  backwards of all microbatches  ->  p.grad

Each call keeps its own graphs until its own backward, so several calls may be open at a time. A call whose logits are
dropped leaves nothing behind. Replicas are averaged after backward, as torch's DDP does: the loss of a replica is
whatever its ranks computed, and the mean over replicas is what is trained on.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hf_tpp.calls.context import CallContext
from hf_tpp.calls.preparation import TrainingBatch, start_forwards, training_mode
from hf_tpp.calls.reading import Reading
from hf_tpp.calls.sharing import from_last_stage
from hf_tpp.collectives.agreement import exchange
from hf_tpp.errors import BatchError, RankMismatchError
from hf_tpp.gradients.release import Gradients, defer_backward
from hf_tpp.gradients.synchronize import sum_shared_gradients
from hf_tpp.pipeline_parallel.payload import Payload
from hf_tpp.pipeline_parallel.runner import OpenPass
from hf_tpp.sharding import ShardSpec, local_part

__all__ = ["outside_call"]

_NORM_TOLERANCE = 1e-2  # between ranks: losses on a GPU may differ by rounding, another loss differs by more


def outside_call(
    context: CallContext, training: TrainingBatch, reading: Reading
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Forwards of a training batch; what is read of their outputs carries the backwards.

    Args:
        context: The model's.
        training: The batch, without labels.
        reading: What of the outputs the caller gets.

    Collective: every rank of the job; so is the backward pass of the result.

    Returns:
        What the reading gives, and the router loss of models that have one (the mean over microbatches).
    """
    trained = context.choose_trained()
    parameters: list[Any] = [*trained]

    def read_out(index: int, output: Any) -> Payload:
        router_loss = getattr(output, "aux_loss", None)
        read = reading.read(index, output)
        return (*read, router_loss) if isinstance(router_loss, torch.Tensor) else read

    with training_mode(context, training):
        opened = context.runner.open(*start_forwards(context, training), read_out)
    context.num_outside += 1
    outputs = reading.share([output[: reading.width] for output in opened.outputs])
    router_losses = [output[-1] for output in opened.outputs if len(output) > reading.width]
    router_loss = from_last_stage(torch.stack(router_losses).mean() if router_losses else None, context.mesh)
    has_routers = router_loss is not None
    waiting = _WaitingBackward(
        context, opened, trained, _values(trained), training, reading, has_routers, context.num_outside
    )
    if router_loss is not None:
        outputs.append(router_loss)
    if context.residual is not None:
        parameters = [*parameters, context.residual]
    if parameters:
        outputs = [*defer_backward(outputs, parameters, waiting.run, context.after_backward)]
    return (outputs[:-1], outputs[-1]) if has_routers else (outputs, None)


@dataclass(frozen=True, slots=True)
class _WaitingBackward:
    """The backwards of one call.

    Attributes:
        context: The model's.
        opened: The forwards.
        trained: Who gets gradients, those that needed one when the forwards ran, and how they lie.
        values: A hash of their values when the forwards ran.
        training: The batch.
        reading: What of the outputs the caller got.
        has_routers: Behind that there is a router loss.
        number: Of the call, counted by every rank.
    """

    context: CallContext
    opened: OpenPass
    trained: Mapping[nn.Parameter, ShardSpec]
    values: torch.Tensor
    training: TrainingBatch
    reading: Reading
    has_routers: bool
    number: int

    @torch.no_grad()
    def run(self, gradients: Gradients) -> list[torch.Tensor | None]:
        """From the gradients of all outputs to those of the parameters, and None for the residual.

        Collective: every rank of the replica.

        Raises:
            BatchError: The weights are not those of the forwards any more.
            RankMismatchError: The ranks go back through different calls, or computed different losses.
        """
        context = self.context
        if not torch.equal(_values(self.trained), self.values):
            raise BatchError(
                "parameters were changed (optimizer.step()) between a call of the model and the backward() of its "
                "logits, which needs them as they were: call backward() first"
            )
        self._agree(gradients)
        with training_mode(context, self.training):
            kept = self.opened.finish(self._per_microbatch(gradients) if context.mesh.pp.is_last else ())
        whole = context.replicas.computing(self.trained)
        summed = sum_shared_gradients(kept.tensors, whole, [*self.trained.values()], context.mesh)
        summed = context.replicas.hand_out([*self.trained], summed)
        return summed if context.residual is None else [*summed, None]

    def _agree(self, gradients: Gradients) -> None:
        if self.context.mesh.replica.size == 1:
            return
        norms = [0.0 if g is None else torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]
        norm = torch.stack([torch.as_tensor(n, dtype=torch.float64, device=self.context.mesh.device) for n in norms])
        number_and_norm = [self.number, norm.norm().view(torch.int64)]
        rows = exchange(number_and_norm, self.context.mesh.replica_control)
        numbers = [row[0] for row in rows]
        if len(set(numbers)) > 1:
            raise RankMismatchError(
                f"the ranks of a replica go back through different calls of the model (by rank, the {numbers}th call): "
                f"call backward() in the same order on every rank"
            )
        found = torch.tensor([row[1] for row in rows]).view(torch.float64)
        if not torch.allclose(found, found[:1].expand_as(found), rtol=_NORM_TOLERANCE, atol=0.0, equal_nan=True):
            raise RankMismatchError(
                f"the ranks of a replica computed different losses from the same logits: the norms of the gradients of "
                f"the logits are {found.tolist()} by rank. Compute the same loss on every rank, with random numbers "
                f"from one seed"
            )

    def _per_microbatch(self, gradients: Gradients) -> list[Gradients]:
        """The gradients of what was read out of each microbatch on this rank."""
        found = [output[: self.reading.width] for output in self.opened.outputs]
        if not self.has_routers:
            return self.reading.split(gradients, found)
        *of_read, router = gradients
        share = None if router is None else router / len(found)
        return [(*of_microbatch, share) for of_microbatch in self.reading.split(of_read, found)]


@torch.no_grad()
def _values(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """One number for the values of each parameter; of weights that replicas share, which are gathered anew.

    Autograd notices by itself when what a backward needs was changed, but not behind a gathering.
    """
    parts = [local_part(parameter) for parameter in parameters if isinstance(parameter, DTensor)]
    hashes = [torch.hash_tensor(part).view(torch.int64) for part in parts if part.numel()]
    return torch.stack(hashes) if hashes else torch.zeros(0, dtype=torch.int64)
