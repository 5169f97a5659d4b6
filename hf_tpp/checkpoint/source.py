"""Where a rank's shards come from: a loaded model, fresh initial values, or a checkpoint (`huggingface.py`).

A source is asked for one shard at a time and lets go of what it gave, so that a rank never holds more than its shards
and one part of the model.
"""

import copy
import zlib
from typing import Protocol

import torch
from torch import nn

from hf_tpp.dropout import derive_seed
from hf_tpp.parts import ModelParts
from hf_tpp.sharding import ShardSpec, shard_tensor

__all__ = ["InitialWeights", "LoadedWeights", "WeightSource"]


class WeightSource(Protocol):
    """Gives the values of parameters and buffers."""

    def shard(self, spec: ShardSpec, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """This rank's shard of a parameter, in storage of its own."""

    def buffer(self, name: str, device: torch.device) -> torch.Tensor:
        """A buffer, whole."""


class LoadedWeights:
    """The weights of a model that every rank has in memory."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors = {name: tensor.detach() for name, tensor in model.named_parameters(remove_duplicate=False)}
        self._buffers = dict(model.named_buffers(remove_duplicate=False))

    def shard(self, spec: ShardSpec, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """This rank's shard of a parameter, in storage of its own; the full tensor is let go."""
        return shard_tensor(self._tensors.pop(spec.name), spec, device, dtype)

    def buffer(self, name: str, device: torch.device) -> torch.Tensor:
        """A buffer, on `device`."""
        return self._buffers[name].to(device)


class InitialWeights:
    """The initial values that the model's own `_init_weights` draws, the same at every (tp, pp, dp).

    One part (a block, or a module outside the blocks) at a time is built whole on the rank's device, initialised from a
    seed of its own, and cut. GPUs and CPUs draw different numbers from one seed.

    Args:
        model: The model on the meta device, before anything is swapped.
        parts: Its parts.
        seed: The same on every rank.
    """

    def __init__(self, model: nn.Module, parts: ModelParts, seed: int) -> None:
        self._skeleton = copy.deepcopy(model)
        self._parts = parts
        self._seed = seed
        self._current: nn.Module | None = None

    def shard(self, spec: ShardSpec, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """This rank's shard of a freshly initialised parameter."""
        self._build(spec.name, device)
        return shard_tensor(self._skeleton.get_parameter(spec.name).detach(), spec, device, dtype)

    def buffer(self, name: str, device: torch.device) -> torch.Tensor:
        """A freshly computed buffer."""
        self._build(name, device)
        return self._skeleton.get_buffer(name).to(device)

    @torch.no_grad()
    def _build(self, name: str, device: torch.device) -> None:
        is_block = self._parts.is_in_block(name)
        part = self._block_of(name) if is_block else name.rpartition(".")[0]
        module = self._skeleton.get_submodule(part)
        if module is self._current:
            return
        if self._current is not None:
            self._current.to_empty(device="meta")
        module.to_empty(device=device, recurse=is_block)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(derive_seed(self._seed, zlib.crc32(part.encode())))
            if is_block:
                _initialize(self._skeleton, module)
            else:
                self._skeleton._init_weights(module)  # type: ignore[operator]
        self._current = module

    def _block_of(self, name: str) -> str:
        index = name.removeprefix(self._parts.blocks + ".").partition(".")[0]
        return self._parts.block_name(int(index))


def _initialize(model: nn.Module, module: nn.Module) -> None:
    """Children first, then their parent, as transformers does: a parent may overwrite what its child was given."""
    for child in module.children():
        _initialize(model, child)
    model._init_weights(module)  # type: ignore[operator]
