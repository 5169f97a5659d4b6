"""Adapters saved as PEFT saves them in one process: one file of whole tensors and the configuration.

PEFT itself says which parameters belong to an adapter and what they are called in its file. Each stage asks it about
its own; their shards meet on the stage's first tp rank, and the files are written by rank 0.
"""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from hf_tpp.checkpoint.huggingface.gather import HeldTensor, gather_shards
from hf_tpp.collectives.agreement import agree_on
from hf_tpp.errors import CheckpointError, ConfigurationError, HfTppError
from hf_tpp.mesh import ParallelMesh
from hf_tpp.parallel_model import ParallelState

__all__ = ["save_adapters"]

_PREFIX = "base_model.model."
"""Where a PEFT model keeps the transformers model."""
_DEFAULTS: dict[str, Any] = {
    "safe_serialization": True,
    "path_initial_model_for_weight_conversion": None,
    "state_dict": None,
    "push_to_hub": False,
}
"""What PEFT's save_pretrained takes besides, and means nothing other than its default here."""


@torch.no_grad()
def save_adapters(
    peft_model: Any,
    state: ParallelState,
    save_directory: str | Path,
    safe_serialization: bool = True,
    selected_adapters: Sequence[str] | None = None,
    save_embedding_layers: bool | Literal["auto"] = "auto",
    is_main_process: bool = True,
    **options: Any,
) -> None:
    """Write ordinary adapters, which plain peft loads into a plain model.

    Args:
        peft_model: PEFT's model around a parallel one.
        state: Of the parallel model.
        save_directory: Where to; an adapter of another name than "default" gets a folder of its own there.
        safe_serialization: Only true.
        selected_adapters: Names of the adapters; default: all.
        save_embedding_layers: As in PEFT.
        is_main_process: Ignored: which rank writes follows from what it holds.
        **options: PEFT's other options, at their defaults.

    Collective: every rank of the job.

    Raises:
        ConfigurationError: An option that is not supported, or an unknown adapter.
        CheckpointError: Rank 0 could not write; raised on every rank.
    """
    mesh = state.mesh
    chosen = [*peft_model.peft_config] if selected_adapters is None else [*selected_adapters]
    agree_on(
        {"adapters": chosen},
        _problem(peft_model, chosen, safe_serialization=safe_serialization, **options),
        mesh.control,
    )
    for adapter in chosen:
        held = _held(peft_model, state, adapter, save_embedding_layers)
        tensors = _whole_tensors(held, mesh)
        problem: HfTppError | None = None
        if mesh.global_rank == 0:
            try:
                _write(peft_model, adapter, tensors, Path(save_directory))
            except OSError as error:
                problem = CheckpointError(f"the adapter {adapter!r} could not be saved: {error}")
        agree_on({}, problem, mesh.control)


def _problem(peft_model: Any, chosen: Sequence[str], **options: Any) -> HfTppError | None:
    for name, value in options.items():
        if name not in _DEFAULTS or value != _DEFAULTS[name]:
            return ConfigurationError(
                f"save_pretrained({name}={value!r}) is not supported for adapters of a parallel model: leave it out, "
                f"or load the saved adapter in one process and save that again"
            )
    unknown = sorted(set(chosen) - set(peft_model.peft_config))
    if unknown:
        return ConfigurationError(
            f"there is no adapter {', '.join(unknown)}: use one of {', '.join(peft_model.peft_config)}"
        )
    return None


def _held(
    peft_model: Any, state: ParallelState, adapter: str, embeddings: bool | Literal["auto"]
) -> dict[str, HeldTensor]:
    """Name in the adapter's file -> the tensor, for those that this stage saves."""
    from peft import get_peft_model_state_dict

    here = dict(_tensors_of(state.assembly.model, state))
    stand_ins = {
        f"{_PREFIX}{name}": torch.empty(
            held.spec.full_shape if held.spec else held.local.shape, dtype=held.local.dtype, device="meta"
        )
        for name, held in here.items()
    }
    names = {id(tensor): name for name, tensor in stand_ins.items()}
    saved = get_peft_model_state_dict(
        peft_model, state_dict=stand_ins, adapter_name=adapter, save_embedding_layers=embeddings
    )
    return {key: here[names[id(tensor)].removeprefix(_PREFIX)] for key, tensor in saved.items()}


def _tensors_of(model: nn.Module, state: ParallelState) -> Iterator[tuple[str, HeldTensor]]:
    """Everything of this stage that a state dict would name; what other stages hold too, only on the first of them."""
    specs = state.specs
    for name, tensor in model.state_dict(keep_vars=True).items():
        spec = specs.get(name)
        if spec is None or spec.stages[0] == state.mesh.pp.rank:
            yield name, HeldTensor(tensor.detach(), spec)


def _whole_tensors(held: dict[str, HeldTensor], mesh: ParallelMesh) -> dict[str, torch.Tensor]:
    """The tensors of all stages on rank 0, in the order of the stages; nothing elsewhere. Collective."""
    whole: dict[str, torch.Tensor] = {}
    if mesh.dp.is_first:
        for key, tensor in held.items():
            shards = gather_shards(tensor, mesh)
            if shards is not None:
                whole[key] = tensor.join(shards)
    everyone: list[Any] | None = [None] * mesh.world_size if mesh.global_rank == 0 else None
    dist.gather_object(whole, everyone, dst=0, group=mesh.control)
    return {key: tensor for theirs in everyone or () for key, tensor in theirs.items()}


def _write(peft_model: Any, adapter: str, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    from peft.utils import SAFETENSORS_WEIGHTS_NAME
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    peft_model.create_or_update_model_card(str(folder))
    folder = folder if adapter == "default" else folder / adapter
    folder.mkdir(exist_ok=True)
    config = copy.deepcopy(peft_model.peft_config[adapter])
    config.inference_mode = True
    base = peft_model.get_base_model()
    config.base_model_name_or_path = config.base_model_name_or_path or getattr(base, "name_or_path", None) or None
    mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    staged = folder / f"{SAFETENSORS_WEIGHTS_NAME}.part"
    save_file(tensors, staged, metadata={"format": "pt"})
    config.save_pretrained(str(folder), auto_mapping_dict=None if config.task_type else mapping)
    staged.replace(folder / SAFETENSORS_WEIGHTS_NAME)
