"""What kind of checkpoint a folder holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_tpp.errors import CheckpointError
from hf_tpp_conversion.formats.checkpoint import Checkpoint
from hf_tpp_conversion.formats.huggingface import open_huggingface
from hf_tpp_conversion.formats.megatron_folder import LATEST, find_iteration
from hf_tpp_conversion.formats.megatron_legacy import open_legacy
from hf_tpp_conversion.formats.torch_dist import open_torch_dist

__all__ = ["format_of", "open_checkpoint"]


def format_of(path: Path) -> str:
    """The format: "huggingface", "legacy" or "torch_dist".

    Raises:
        CheckpointError: None of them.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder: pass the folder of a checkpoint")
    if (path / LATEST).is_file() or any(path.glob("mp_rank_*")) or (path / ".metadata").is_file():
        return "torch_dist" if (find_iteration(path) / ".metadata").is_file() else "legacy"
    if (path / "config.json").is_file() or any(path.glob("*.safetensors")):
        return "huggingface"
    raise CheckpointError(
        f"{path} is no checkpoint: it has no config.json (Hugging Face), no {LATEST}, mp_rank_* or .metadata (Megatron)"
    )


def open_checkpoint(
    path: Path, given: Mapping[str, Any] | None = None, config: Path | None = None, allow_bin: bool = False
) -> Checkpoint:
    """Open a checkpoint of any format: everything is checked but the values.

    Args:
        path: The folder.
        given: Megatron's args that the checkpoint lacks.
        config: A config.json for a Megatron checkpoint that does not describe itself.
        allow_bin: Read pytorch_model.bin.

    Raises:
        CheckpointError: Damaged, missing or hostile files.
        UnsupportedModelError: A model that cannot be converted.
    """
    kind = format_of(path)
    if kind == "huggingface":
        return open_huggingface(path, allow_bin)
    if kind == "legacy":
        return open_legacy(path, given, config)
    return open_torch_dist(path, given, config)
