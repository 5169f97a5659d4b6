"""What a parallelized model is: the same object of the same class, whose call runs a schedule.

model(**batch)          training: one 1F1B pass over all microbatches; else forwards only
loss.backward()         releases the gradients that the pass kept
model.generate(...)     unchanged, the same tokens on every rank
model.save_pretrained   an ordinary Hugging Face checkpoint
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hf_tpp.calls.context import CallContext
from hf_tpp.calls.evaluation import evaluation_call
from hf_tpp.calls.training import training_call
from hf_tpp.checkpoint.huggingface import save_checkpoint
from hf_tpp.collectives.agreement import agree_on, checksum
from hf_tpp.gradients.norm import NormResidual, ParallelNorm
from hf_tpp.gradients.optimizers import refuse_whole_tensor_optimizers
from hf_tpp.gradients.synchronize import average_over_replicas
from hf_tpp.mesh import ParallelMesh
from hf_tpp.sharding import ShardSpec

__all__ = ["ParallelState", "install", "parallel_state"]

_ATTRIBUTE = "_hf_tpp_state"
_RESIDUAL = "hf_tpp_norm"


@dataclass(slots=True)
class ParallelState:
    """Everything that parallelize() decided, kept at the model.

    Attributes:
        mesh: The process groups, and this rank's place.
        stages: Layers per stage.
        specs: Local parameter name -> how it lies in the unsplit model.
        calls: What a call of the model needs.
        report: The paragraph that rank 0 printed.
        norm: Norms over the whole model.
    """

    mesh: ParallelMesh
    stages: tuple[int, ...]
    specs: Mapping[str, ShardSpec]
    calls: CallContext
    report: str = ""
    norm: ParallelNorm = field(init=False)


def parallel_state(model: nn.Module) -> ParallelState | None:
    """What parallelize() decided about `model`; None if it is not parallel."""
    state: ParallelState | None = model.__dict__.get(_ATTRIBUTE)
    return state


def install(model: nn.Module, state: ParallelState) -> None:
    """Turn a rewritten model into a parallel one, in place. Its class keeps name, module and signature."""
    mesh = state.mesh
    parameters = {parameter: state.specs[name] for name, parameter in model.named_parameters()}
    residual: nn.Parameter | None = None
    if mesh.replica.size > 1:
        module = NormResidual(mesh.device)
        model.add_module(_RESIDUAL, module)
        residual = module.bias
    state.norm = ParallelNorm(parameters, mesh, residual)
    state.calls.residual = residual
    state.calls.after_backward = functools.partial(_finish_backward, state, list(parameters))
    refuse_whole_tensor_optimizers(parameter for parameter, spec in parameters.items() if spec.dim is not None)
    object.__setattr__(model, _ATTRIBUTE, state)
    if mesh.world_size > 1:
        plain: Any = type(model)
        model.__class__ = _parallel_class(plain)


def _finish_backward(state: ParallelState, parameters: list[nn.Parameter]) -> None:
    """After a backward pass has filled every `p.grad`."""
    if state.calls.sync_gradients:
        average_over_replicas(parameters, state.mesh)
    state.norm.update_residual()


@functools.cache
def _parallel_class(plain: type[nn.Module]) -> type[nn.Module]:
    plain_forward: Callable[..., Any] = plain.forward
    signature = inspect.signature(plain_forward)

    @functools.wraps(plain_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = _as_keywords(signature, self, args, kwargs)
        calls: CallContext = getattr(self, _ATTRIBUTE).calls
        if self.training and torch.is_grad_enabled():
            return training_call(calls, batch)
        return evaluation_call(calls, batch)

    body = {"forward": forward, "__module__": plain.__module__, "__qualname__": plain.__qualname__}
    return type(plain.__name__, (_ParallelMethods, plain), body)


def _as_keywords(signature: inspect.Signature, model: Any, args: tuple[Any, ...], kwargs: Any) -> dict[str, Any]:
    """All arguments of a call by name, those that are None left out."""
    arguments = dict(signature.bind(model, *args, **kwargs).arguments)
    arguments.pop("self")
    variadic = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
    arguments |= arguments.pop(variadic, {}) if variadic else {}
    return {name: value for name, value in arguments.items() if value is not None}


class _ParallelMethods:
    """The methods that a parallel model overrides."""

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within this context backward passes do not average gradients over the replicas, as in torch's DDP."""
        calls: CallContext = getattr(self, _ATTRIBUTE).calls
        before, calls.sync_gradients = calls.sync_gradients, False
        try:
            yield
        finally:
            calls.sync_gradients = before

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the plain model does; every rank of the replica returns the same tokens."""
        state: ParallelState = getattr(self, _ATTRIBUTE)
        _share_random_state(state.mesh)
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        facts = {
            "prompts": f"{[list(t.shape) for t in tensors]} checksum {int(checksum(tensors))}",
            "options": {name: value for name, value in kwargs.items() if isinstance(value, bool | int | float | str)},
            "generation_config": str(kwargs.get("generation_config", getattr(self, "generation_config", None))),
        }
        agree_on(facts, None, state.mesh.replica_control)
        with state.calls.without_agreement():
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: Any, max_shard_size: int | str = "5GB", **kwargs: Any) -> None:
        """Write an ordinary Hugging Face checkpoint that plain transformers loads.

        Args:
            save_directory: Where to.
            max_shard_size: Largest size of a file; a stage writes at least one of its own.
            **kwargs: transformers' other options; only their defaults are supported.

        Collective: every rank of the job.
        """
        state: ParallelState = getattr(self, _ATTRIBUTE)
        save_checkpoint(self, state.specs, state.mesh, save_directory, max_shard_size, **kwargs)  # type: ignore[arg-type]


def _share_random_state(mesh: ParallelMesh) -> None:
    """Sampling must draw the same tokens on every rank of a replica: continue from its first rank's generators."""
    if mesh.replica.size == 1:
        return
    state = [torch.get_rng_state(), torch.cuda.get_rng_state(mesh.device) if mesh.device.type == "cuda" else None]
    dist.broadcast_object_list(state, src=mesh.replica.global_ranks[0], group=mesh.replica_control)
    assert state[0] is not None
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], mesh.device)
