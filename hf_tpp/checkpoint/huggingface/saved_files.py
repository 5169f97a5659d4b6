"""The files of a Hugging Face checkpoint: how many, how named, and how they come into their folder.

Everything is written to `.saving` inside the target first and moved into place once every rank has succeeded.
"""

import copy
import json
import re
import shutil
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.utils import CONFIG_NAME

from hf_tpp.checkpoint.huggingface.files import INDEX_NAME, WEIGHTS_NAME
from hf_tpp.errors import CheckpointError, ConfigurationError

__all__ = [
    "STAGING",
    "Entry",
    "SavedFile",
    "check_space",
    "move_metadata",
    "parse_size",
    "plan_files",
    "write_metadata",
    "write_weights",
]

STAGING = ".saving"

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


@dataclass(frozen=True, slots=True)
class Entry:
    """Tensors of the model that are stored together: their names, size, and the names that they are stored under."""

    members: tuple[str, ...]
    num_bytes: int
    saved_as: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SavedFile:
    """A file to be written.

    Attributes:
        name: Its name.
        entries: What it stores.
        num_bytes: Size of that.
    """

    name: str
    entries: tuple[Entry, ...]
    num_bytes: int

    @property
    def saved_as(self) -> tuple[str, ...]:
        """Names of the tensors in the file."""
        return tuple(name for entry in self.entries for name in entry.saved_as)


def parse_size(size: int | str) -> int:
    """Bytes in a size such as 5_000_000_000 or "5GB".

    Raises:
        ConfigurationError: Not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]B)?\s*", str(size), re.IGNORECASE)
    num_bytes = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if num_bytes < 1 or isinstance(size, bool):
        raise ConfigurationError(f'max_shard_size={size!r} is no size: use a number of bytes, or a text such as "5GB"')
    return num_bytes


def plan_files(stages: Sequence[Mapping[str, Entry]], limit: int) -> list[list[SavedFile]]:
    """Deal every stage's tensors into files of at most `limit` bytes; a larger tensor gets a file of its own.

    Args:
        stages: For each stage, name in the model -> what is stored of it.
        limit: Largest size of a file.

    Returns:
        The files of each stage, numbered over all stages; a single one is `model.safetensors`.
    """
    groups: list[list[dict[str, Entry]]] = []
    for tensors in stages:
        files: list[dict[str, Entry]] = []
        for name, entry in tensors.items():
            if not files or _num_bytes(files[-1]) + entry.num_bytes > limit:
                files.append({})
            files[-1][name] = entry
        groups.append(files)
    total = sum(map(len, groups))
    numbers = iter(range(1, total + 1))

    def named(file: dict[str, Entry]) -> SavedFile:
        number = next(numbers)
        name = WEIGHTS_NAME if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"
        return SavedFile(name, tuple(file.values()), _num_bytes(file))

    return [[named(file) for file in files] for files in groups]


def _num_bytes(file: Mapping[str, Entry]) -> int:
    return sum(entry.num_bytes for entry in file.values())


def check_space(folder: Path, needed: int) -> None:
    """Make the folder and check that `needed` bytes fit beside what it holds.

    Raises:
        CheckpointError: They do not, or the folder is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: pass a folder to save to")
    (folder / STAGING).mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(f"{folder} needs {needed} bytes for the checkpoint, {free} are free: make room there")


def write_weights(tensors: dict[str, torch.Tensor], folder: Path, name: str) -> None:
    """Write one staged file with the permissions that any new file would have."""
    path = folder / STAGING / name
    path.unlink(missing_ok=True)
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)  # safetensors makes its files readable by their owner alone
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def write_metadata(model: nn.Module, folder: Path, files: Sequence[SavedFile]) -> None:
    """Stage the configuration, as transformers writes it, and the index if there are several files."""
    staging = folder / STAGING
    parallel: Any = model
    config = copy.deepcopy(parallel.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(parallel.dtype).removeprefix("torch.")
    config.save_pretrained(staging)
    if parallel.can_generate():
        parallel.generation_config.save_pretrained(staging)
    if len(files) > 1:
        weight_map = {name: file.name for file in files for name in file.saved_as}
        index = {"metadata": {"total_size": sum(file.num_bytes for file in files)}, "weight_map": weight_map}
        (staging / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def move_metadata(folder: Path, files: Sequence[SavedFile]) -> None:
    """Move everything but the weights into place, the configuration last; remove weights of an earlier save.

    Raises:
        CheckpointError: Weights that other ranks wrote are not there.
    """
    names = {file.name for file in files}
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise CheckpointError(
            f"{folder} lacks {', '.join(missing)}, written by other ranks: save to a folder that all nodes share"
        )
    staged = sorted((folder / STAGING).glob("*.json"), key=lambda path: (path.name == CONFIG_NAME, path.name))
    for path in staged:
        path.replace(folder / path.name)
    if len(files) == 1:
        (folder / INDEX_NAME).unlink(missing_ok=True)
    for path in folder.iterdir():
        if _WEIGHTS.fullmatch(path.name) and path.name not in names:
            path.unlink()
