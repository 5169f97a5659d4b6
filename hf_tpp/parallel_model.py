"""What a parallelized model is: the same object of the same class, whose call runs a schedule.

model(**batch)          training: one 1F1B pass over all microbatches; else forwards only
loss.backward()         releases the gradients that the pass kept
model.generate(...)     unchanged, the same tokens on every rank
model.save_pretrained   an ordinary Hugging Face checkpoint
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hf_tpp.assembly import Assembly
from hf_tpp.calls.context import CallContext
from hf_tpp.calls.evaluation import evaluation_call
from hf_tpp.calls.generation import generation_options
from hf_tpp.calls.statistics import statistics_call
from hf_tpp.calls.training import training_call
from hf_tpp.checkpoint.huggingface import save_checkpoint
from hf_tpp.errors import ConfigurationError
from hf_tpp.gradients.norm import NormResidual, ParallelNorm
from hf_tpp.gradients.optimizers import refuse_whole_tensor_optimizers
from hf_tpp.mesh import ParallelMesh
from hf_tpp.refused_methods import RefusedMethods
from hf_tpp.sharding import ShardSpec
from hf_tpp.wrappers import wrappers_of

__all__ = ["ParallelState", "install", "parallel_state", "token_statistics"]

_ATTRIBUTE = "_hf_tpp_state"
_RESIDUAL = "hf_tpp_residual"
"""No name that ends like those of norms and heads: peft finds modules by the ends of their names."""


@dataclass(slots=True)
class ParallelState:
    """Everything that parallelize() decided, kept at the model.

    Attributes:
        mesh: The process groups, and this rank's place.
        specs: Local parameter name -> how it lies in the unsplit model.
        calls: What a call of the model needs.
        assembly: The decisions themselves.
        report: The paragraph that rank 0 printed.
        norm: Norms over the whole model.
    """

    mesh: ParallelMesh
    specs: dict[str, ShardSpec]
    calls: CallContext
    assembly: Assembly
    report: str = ""
    norm: ParallelNorm = field(init=False)


def parallel_state(model: nn.Module) -> ParallelState | None:
    """What parallelize() decided about `model`, or about the model that PEFT wrapped; None if it is not parallel."""
    state: ParallelState | None = getattr(model, _ATTRIBUTE, None)
    return state


def install(model: nn.Module, state: ParallelState) -> None:
    """Turn a rewritten model into a parallel one, in place. Its class keeps name, module and signature."""
    mesh, parameters = state.mesh, state.calls.specs
    residual: nn.Parameter | None = None
    if mesh.replica.size > 1:
        shared = any(isinstance(parameter, DTensor) for parameter in parameters)
        module = NormResidual(mesh.device, mesh.replicas if shared else None)
        model.add_module(_RESIDUAL, module)
        residual = module.bias
    state.norm = ParallelNorm(parameters, mesh, residual)
    state.calls.residual = residual
    state.calls.after_backward = functools.partial(_finish_backward, state)
    refuse_whole_tensor_optimizers(
        parameter for parameter, spec in parameters.items() if spec.dim is not None or isinstance(parameter, DTensor)
    )
    object.__setattr__(model, _ATTRIBUTE, state)
    if mesh.world_size > 1:
        plain: Any = type(model)
        model.__class__ = _parallel_class(plain)


def _finish_backward(state: ParallelState) -> None:
    """After a backward pass has filled every `p.grad`."""
    parameters = list(state.calls.specs)
    if state.calls.sync_gradients:
        state.calls.replicas.finish(parameters)
    state.norm.update_residual()
    state.calls.scale.back_off(state.norm.is_finite(parameters))


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
    return type(plain.__name__, (_ParallelMethods, RefusedMethods, plain), body)


def token_statistics(
    model: nn.Module, *args: Any, temperature: float = 1.0, **kwargs: Any
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """Call a parallel model for log-probabilities of its labels and other numbers for each token, not for logits.

    Args:
        model: What `parallelize` returned, on several processes.
        *args: As of its forward.
        temperature: What logits are divided by.
        **kwargs: As of its forward; `labels`, or `shift_labels` that are shifted already.

    Collective: as a call of the model, and the backward pass of the result too.

    Returns:
        Name of a statistic -> [rows, seq - 1], zero where a label is ignored; and the router loss of models with one.
    """
    batch = _as_keywords(inspect.signature(type(model).forward), model, args, kwargs)
    return statistics_call(getattr(model, _ATTRIBUTE).calls, batch, temperature)


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
        """Within this context backward passes do not average gradients over the replicas, as in torch's DDP.

        Where replicas share gradients, this changes nothing: no rank keeps whole gradients between calls.
        """
        calls: CallContext = getattr(self, _ATTRIBUTE).calls
        before, calls.sync_gradients = calls.sync_gradients, False
        try:
            yield
        finally:
            calls.sync_gradients = before

    def compile(self, **options: Any) -> None:
        """Train the blocks, one by one, through `torch.compile`, as `parallelize(compile=options)` does.

        Args:
            **options: Of torch.compile.

        Raises:
            ConfigurationError: There is no such option or backend, or what it does is not known to be exact.
        """
        calls: CallContext = getattr(self, _ATTRIBUTE).calls
        calls.compiled_blocks.compile(options)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the plain model does; every rank of the replica returns the same tokens."""
        calls: CallContext = getattr(self, _ATTRIBUTE).calls
        options = generation_options(calls, args, kwargs)
        with calls.without_agreement(), calls.replicas.gathered():
            return super().generate(*args, **options)  # type: ignore[misc]

    def save_pretrained(self, save_directory: Any, max_shard_size: int | str = "5GB", **kwargs: Any) -> None:
        """Write an ordinary Hugging Face checkpoint that plain transformers loads.

        Args:
            save_directory: Where to.
            max_shard_size: Largest size of a file; a stage writes at least one of its own.
            **kwargs: transformers' other options; only their defaults are supported.

        Collective: every rank of the job.

        Raises:
            ConfigurationError: The model has adapters.
        """
        state: ParallelState = getattr(self, _ATTRIBUTE)
        if any(True for _ in wrappers_of(self)):  # type: ignore[arg-type]
            raise ConfigurationError(
                f"{type(self).__name__} has adapters, whose names no plain {type(self).__name__} knows: save the "
                f"adapter with the PEFT model's save_pretrained(), or call its merge_and_unload() before this"
            )
        with state.calls.replicas.gathered():
            save_checkpoint(self, state.specs, state.mesh, save_directory, max_shard_size, **kwargs)  # type: ignore[arg-type]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """What `to`, `half` and the like go through."""
        state: ParallelState = getattr(self, _ATTRIBUTE)
        state.calls.replicas.convert(fn, lambda: super(_ParallelMethods, self)._apply(fn, recurse))  # type: ignore[misc]
        return self
