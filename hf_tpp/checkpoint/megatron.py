"""Reading Megatron checkpoints straight into a parallel model: one tensor of the whole model at a time.

The only module of the parallel side that knows the conversion: it asks it for tensors under Hugging Face's names.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_tpp.checkpoint.huggingface.buffers import computed_buffer
from hf_tpp.checkpoint.huggingface.conversion import KeyRenaming
from hf_tpp.errors import CheckpointError
from hf_tpp.sharding import ShardSpec, shard_tensor
from hf_tpp_conversion.families import family_of_config
from hf_tpp_conversion.files.dtypes import TORCH_NAMES, Array
from hf_tpp_conversion.formats.checkpoint import WholeTensor
from hf_tpp_conversion.formats.detect import format_of, open_checkpoint
from hf_tpp_conversion.names import fused_expert_names

__all__ = ["MegatronCheckpoint", "is_megatron"]


def is_megatron(path: Any) -> bool:
    """Whether `path` is the folder of a Megatron checkpoint."""
    try:
        return Path(path).is_dir() and format_of(Path(path)) != "huggingface"
    except CheckpointError:
        return False


class MegatronCheckpoint:
    """A `WeightSource` over a Megatron checkpoint of any layout.

    Args:
        model: The unsplit model on meta; only read.
        shapes: Canonical parameter name -> shape.
        path: The folder.

    Raises:
        CheckpointError: The checkpoint does not hold the model.
        UnsupportedModelError: A model that Megatron cannot represent.
    """

    def __init__(self, model: nn.Module, shapes: Mapping[str, tuple[int, ...]], path: str | Path) -> None:
        config: Any = model.config
        family, self._architecture = family_of_config(json.loads(config.to_json_string(use_diff=False)), "the model")
        checkpoint = open_checkpoint(Path(path))
        differences = self._architecture.differences(checkpoint.model)
        if differences:
            raise CheckpointError(
                f"{path} does not hold this model: {'; '.join(differences[:6])} (model and checkpoint). "
                f"Build the model from the checkpoint's own configuration"
            )
        self._model = copy.deepcopy(model)
        self._table = family.table
        # name in the model -> (tensor of the whole Megatron model, its part)
        self._parts: dict[str, tuple[WholeTensor, int]] = {}
        # name in the model -> the tensors of all experts that are one tensor there
        self._experts: dict[str, list[WholeTensor]] = {}
        renamed = KeyRenaming(model)
        for tensor in checkpoint.tensors.values():
            for part, name in enumerate(self._table.row(tensor.spec).hf):
                self._parts[renamed(name)] = (tensor, part)
            for name in fused_expert_names(tensor.spec):
                self._experts.setdefault(name, []).append(tensor)
        missing = [name for name in shapes if name not in self._parts and name not in self._experts]
        if missing:
            raise CheckpointError(f"{path} has no values for {', '.join(missing[:6])}: use another checkpoint")
        self._last: tuple[str, Any] = ("", None)

    def shard(self, spec: ShardSpec, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """This rank's shard of a parameter, in storage of its own."""
        if spec.name not in self._parts:
            stacked = torch.stack([_values(tensor.read(), tensor) for tensor in self._experts[spec.name]])
            return shard_tensor(stacked, spec, device, dtype)
        tensor, part = self._parts[spec.name]
        if self._last[0] != tensor.spec.name:  # query, key and value lie in one tensor: read it once
            self._last = ("", None)
            self._last = (tensor.spec.name, tensor.read())
        transform = self._table.row(tensor.spec).transform
        pieces = transform.split(self._last[1], part, self._architecture)
        values = torch.cat([_values(piece.copy().reshape(-1), tensor) for piece in pieces])
        shape = transform.part_shapes(tensor.spec.shape, self._architecture)[part]
        return shard_tensor(values.view(shape), spec, device, dtype)

    def buffer(self, name: str, device: torch.device) -> torch.Tensor:
        """A buffer, computed as the model does: Megatron stores none."""
        return computed_buffer(self._model, name).to(device)


def _values(bits: Array, tensor: WholeTensor) -> torch.Tensor:
    """Bits in unsigned integers as the numbers that they are."""
    kind: torch.dtype = getattr(torch, TORCH_NAMES[tensor.dtype])
    return torch.from_numpy(bits).view(kind)
