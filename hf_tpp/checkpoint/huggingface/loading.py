"""Reading an ordinary Hugging Face checkpoint into a model that is parallel already: only the values change."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from hf_tpp.checkpoint.huggingface.buffers import persistent_buffers
from hf_tpp.checkpoint.huggingface.conversion import KeyRenaming, refuse_converted
from hf_tpp.checkpoint.huggingface.reading import SafetensorsCheckpoint
from hf_tpp.collectives.agreement import agree_on
from hf_tpp.errors import CheckpointError, HfTppError
from hf_tpp.mesh import ParallelMesh
from hf_tpp.sharding import ShardSpec

__all__ = ["load_checkpoint"]


@torch.no_grad()
def load_checkpoint(model: nn.Module, specs: Mapping[str, ShardSpec], mesh: ParallelMesh, folder: str | Path) -> None:
    """Give a parallel model the weights of a checkpoint; each rank reads its own slices.

    Args:
        model: This rank's part of the model.
        specs: Local parameter name -> how it lies in the unsplit model.
        mesh: This rank's place.
        folder: What `save_pretrained` wrote.

    Collective: every rank of the job.

    Raises:
        CheckpointError: The checkpoint does not hold the model; raised on every rank, before anything is changed.
        UnsupportedModelError: transformers would rearrange its tensors.
    """
    problem: HfTppError | None = None
    values: dict[str, torch.Tensor] = {}
    try:
        refuse_converted(model)
        source = SafetensorsCheckpoint(folder, getattr(model, "base_model_prefix", ""), rename=KeyRenaming(model))
        for name, spec in specs.items():
            parameter = model.get_parameter(name)
            values[name] = source.shard(spec, torch.device("cpu"), parameter.dtype)
        for name, buffer in persistent_buffers(model):
            values[name] = source.buffer(name, buffer.device)
    except HfTppError as error:
        problem = error
    except OSError as error:
        problem = CheckpointError(f"{folder} cannot be read ({error}): use another checkpoint")
    agree_on({"folder": str(folder)}, problem, mesh.control)
    local = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, value in values.items():
        local[name].copy_(value)
