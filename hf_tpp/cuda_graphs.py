"""Training passes that are recorded as CUDA graphs: the host issues one graph instead of thousands of kernels.

    pass 1, 2        as ever: kernels are chosen and compiled, communicators set up
    pass 3           recorded: all forwards and backwards, collectives included, then replayed
    pass 4, ...      inputs are copied to where the graph reads them, the graph is replayed, its results are copied out

A graph repeats what the device did; what Python did is not repeated. So a recording stands for passes that differ in
the values of tensors alone, and everything else that a forward may depend on is part of its key: shapes, weights by
their place in memory, and the plain attributes of every module and of the configuration. A pass that is not like any
that was recorded runs as ever. Not recorded are passes that look at values (a mask of padding, experts that are looped
over), that draw random numbers, or with hooks of the user's.
"""

import functools
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hf_tpp.errors import ConfigurationError
from hf_tpp.pipeline_parallel.lanes import HeldLeaves
from hf_tpp.pipeline_parallel.payload import Payload
from hf_tpp.pipeline_parallel.runner import KeptGradients
from hf_tpp.transformers_versions import unlike_tracing

__all__ = ["PassRecorder", "check_recordable"]

Microbatches = Sequence[dict[str, Any]]
Gradients = Sequence[torch.Tensor | None]
Result = tuple[list[Payload], KeptGradients]
Train = Callable[[Microbatches, Gradients], Result]
"""Forwards and backwards of all microbatches, given the gradients of what is read out."""

_PASSES_BEFORE = 2
_RECORDINGS = 4
"""Each holds a sum of the gradients."""
_PLAIN = (bool, int, float, str, type(None), torch.dtype)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_OWN = ("hf_tpp.", "transformers.")


@dataclass(slots=True)
class _Recording:
    """A graph, where it reads its inputs, and where it leaves its results."""

    graph: torch.cuda.CUDAGraph
    inputs: list[torch.Tensor]
    outputs: list[Payload]
    gradients: list[torch.Tensor | None]

    def replay(self, inputs: Sequence[torch.Tensor]) -> Result:
        for static, given in zip(self.inputs, inputs, strict=True):
            static.copy_(given)
        self.graph.replay()
        kept = KeptGradients(len(self.gradients))
        # The next replay writes to the same places, and the caller may keep what it was given.
        kept.tensors = [None if gradient is None else gradient.clone() for gradient in self.gradients]
        return [tuple(tensor.clone() for tensor in output) for output in self.outputs], kept


@dataclass(slots=True)
class PassRecorder:
    """Runs the training passes of one model, recorded where that is possible.

    Attributes:
        model: The model; its parameters and modules are part of every key.
        device: This rank's GPU.
    """

    model: nn.Module
    device: torch.device
    _passes: dict[Hashable, int] = field(default_factory=dict)
    _recordings: dict[Hashable, _Recording] = field(default_factory=dict)
    _failed: bool = False
    _pool: Any = None
    _stream: Any = None
    _leaves: HeldLeaves = field(default_factory=HeldLeaves)

    def train(self, train: Train, microbatches: Microbatches, gradients: Gradients) -> Result:
        """Run a pass, or the recording of one that was like it.

        Args:
            train: Runs the pass.
            microbatches: Keyword arguments of the model, one dict each.
            gradients: Of what is read out of each microbatch.

        Returns:
            What `train` returns; with a recording in tensors that the caller owns.
        """
        if self._failed or any(map(_has_foreign_hooks, self.model.modules())):
            return train(microbatches, gradients)
        key = (self._state(), _shape_of(microbatches), _shape_of([dict(enumerate(gradients))]))
        self._passes[key] = self._passes.get(key, 0) + 1
        if key not in self._recordings:
            if self._passes[key] <= _PASSES_BEFORE or len(self._recordings) == _RECORDINGS:
                return self._on_stream(train, microbatches, gradients)
            try:
                self._recordings[key] = self._record(train, microbatches, gradients)
            except RuntimeError as error:
                self._failed = True
                warnings.warn(f"training passes are not recorded as CUDA graphs: {_first_line(error)}", stacklevel=2)
                return train(microbatches, gradients)
        return self._recordings[key].replay(list(_tensors(microbatches, gradients)))

    def _on_stream(self, train: Train, microbatches: Microbatches, gradients: Gradients) -> Result:
        """As ever, but in the stream that is recorded later: what is compiled or set up may depend on it."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        self._leaves.hold([parameter for parameter in self.model.parameters() if parameter.requires_grad], self._stream)
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                return train(microbatches, gradients)
        finally:
            current.wait_stream(self._stream)

    def _record(self, train: Train, microbatches: Microbatches, gradients: Gradients) -> _Recording:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        generator = torch.cuda.default_generators[self.device.index]
        before = generator.clone_state()
        try:
            return self._capture(train, microbatches, gradients)
        except Exception:
            # It would stay in the state of a generator that is being recorded.
            generator.graphsafe_set_state(before)
            raise

    def _capture(self, train: Train, microbatches: Microbatches, gradients: Gradients) -> _Recording:
        inputs = [tensor.clone() for tensor in _tensors(microbatches, gradients)]
        rest = iter(inputs)
        own = [
            {name: next(rest) if isinstance(value, torch.Tensor) else value for name, value in part.items()}
            for part in microbatches
        ]
        own_gradients = [None if gradient is None else next(rest) for gradient in gradients]
        graph = torch.cuda.CUDAGraph()
        # Backwards are issued by a thread of autograd's own, and a thread of NCCL looks at events meanwhile.
        with unlike_tracing(), torch.cuda.graph(graph, self._pool, self._stream, "thread_local"):
            outputs, kept = train(own, own_gradients)
        return _Recording(graph, inputs, outputs, kept.tensors)

    def _state(self) -> Hashable:
        """What a forward and backward may depend on beside its inputs."""
        tensors = [
            (tensor.data_ptr(), tensor.dtype, tensor.requires_grad)
            for tensor in (*self.model.parameters(), *self.model.buffers())
        ]
        kind = self.device.type
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        modules = [(id(vars(module).get("forward")), _plain_attributes(module)) for module in self.model.modules()]
        config: Any = self.model.config
        configs = [_plain_attributes(config), _plain_attributes(config.get_text_config())]
        return tuple(tensors), tuple(modules), tuple(configs), autocast


def check_recordable(device_type: str, pp_size: int, data_parallel: str) -> None:
    """Refuse to record what cannot be.

    Raises:
        ConfigurationError: There are no recordings for models of these sizes.
    """
    if device_type != "cuda" or pp_size > 1 or data_parallel != "replicate":
        raise ConfigurationError(
            f"cuda_graphs=True on {device_type} with pp={pp_size}, data_parallel={data_parallel!r}: only passes of a "
            f"single stage with replicated weights on GPUs are recorded (pp=1, data_parallel='replicate'); leave it out"
        )


def _plain_attributes(owner: Any) -> tuple[tuple[str, Any], ...]:
    return tuple((name, value) for name, value in vars(owner).items() if isinstance(value, _PLAIN))


def _has_foreign_hooks(module: nn.Module) -> bool:
    """Whether code that is neither ours nor transformers' runs at this module."""
    hooks = [hook for kind in _HOOKS for hook in vars(module)[kind].values()]
    return not all(_module_of(hook).startswith(_OWN) for hook in hooks)


def _module_of(hook: Any) -> str:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return getattr(hook, "__module__", "") or ""


def _tensors(microbatches: Microbatches, gradients: Gradients) -> Iterator[torch.Tensor]:
    """All tensors that go into a pass, in order."""
    yield from (value for part in microbatches for value in part.values() if isinstance(value, torch.Tensor))
    yield from (gradient for gradient in gradients if gradient is not None)


def _shape_of(parts: Sequence[dict[Any, Any]]) -> Hashable:
    """All of `parts` but the values of tensors."""
    return tuple(
        (name, (value.shape, value.stride(), value.dtype) if isinstance(value, torch.Tensor) else repr(value))
        for part in parts
        for name, value in (*part.items(), ("", None))
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
