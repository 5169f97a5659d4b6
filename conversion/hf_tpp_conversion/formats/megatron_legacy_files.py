"""The rank files of a legacy checkpoint: their names, and what they hold as inert values."""

import itertools
import re
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_tpp.errors import CheckpointError
from hf_tpp_conversion.files.torch_zip import TorchArchive
from hf_tpp_conversion.formats.megatron_folder import plain_args
from hf_tpp_conversion.model.partition import Partition

__all__ = ["RANK_FILES", "RANK_FOLDER", "flatten", "list_ranks", "rank_folder", "read_rank_args"]

RANK_FILES = ("model_optim_rng.pt", "model_rng.pt")
RANK_FOLDER = re.compile(r"mp_rank_(\d{2,3})(?:_(\d{3}))?(?:_(\d{3}))?")
_MAX_RANKS = 100_000
_MAX_ENTRIES, _MAX_NAME = 500_000, 1000


def rank_folder(tp_rank: int, stage: int, ep_rank: int, partition: Partition) -> str:
    """Name of a rank's folder."""
    name = f"mp_rank_{tp_rank:02d}"
    name += f"_{stage:03d}" if partition.pp > 1 else ""
    return name + (f"_{ep_rank:03d}" if partition.ep > 1 else "")


def list_ranks(folder: Path) -> list[Path]:
    """The ranks' files, in the order of their names.

    Raises:
        CheckpointError: There are none, or a folder without its file.
    """
    folders = sorted(path for path in folder.glob("mp_rank_*") if RANK_FOLDER.fullmatch(path.name) and path.is_dir())
    if not folders or len(folders) > _MAX_RANKS:
        raise CheckpointError(f"{folder} has {len(folders)} mp_rank_* folders: it is no legacy Megatron checkpoint")
    files = []
    for path in folders:
        found = [path / name for name in RANK_FILES if (path / name).is_file()]
        if not found:
            raise CheckpointError(f"{path} has no {RANK_FILES[0]}: copy the checkpoint again")
        files.append(found[0])
    return files


def read_rank_args(file: Path) -> tuple[dict[str, Any], Any]:
    """The plain args of a rank's file, and all that it holds, as inert values.

    Raises:
        CheckpointError: It is no such file.
    """
    content = TorchArchive(file).content()
    if not isinstance(content, dict) or not ({"model", "model0"} & set(content)):
        raise CheckpointError(f"{file} holds no 'model': it is no file of a legacy Megatron checkpoint")
    return plain_args(content.get("args")), content


def flatten(state: Mapping[Any, Any]) -> list[tuple[str, Any]]:
    """Nested mappings (of old checkpoints) as one, names joined by dots.

    Raises:
        CheckpointError: Mappings within themselves, or shared so often that there is no end to them.
    """
    flat: list[tuple[str, Any]] = []
    mappings = deque([("", state)])
    for seen in itertools.count():
        if not mappings:
            break
        prefix, mapping = mappings.popleft()
        for key, value in mapping.items():
            if isinstance(value, dict):
                mappings.append((f"{prefix}{key}.", value))
            else:
                flat.append((f"{prefix}{key}", value))
        if seen + len(mappings) + len(flat) > _MAX_ENTRIES or len(prefix) > _MAX_NAME:
            raise CheckpointError(f"the model of a rank is nested without an end, at {prefix[:80]!r}: it is damaged")
    return flat
