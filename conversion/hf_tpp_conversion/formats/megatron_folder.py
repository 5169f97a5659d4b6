"""Where a Megatron checkpoint lies in its folder, and what its common parts say.

latest_checkpointed_iteration.txt     "10" or "release"
iter_0000010/ or release/             legacy: mp_rank_*/; torch_dist: .metadata, metadata.json, common.pt, *.distcp
"""

import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_tpp.errors import CheckpointError
from hf_tpp_conversion.files.byte_ranges import read_range
from hf_tpp_conversion.files.pickle_values import Call, Global
from hf_tpp_conversion.formats.huggingface_files import SIDE_FILES, inside

__all__ = ["HF_FOLDER", "LATEST", "find_iteration", "hf_side_files", "iteration_name", "plain_args", "to_namespace"]

LATEST = "latest_checkpointed_iteration.txt"
HF_FOLDER = "huggingface"  # our own addition: config.json and tokenizer files, for the way back
_MAX_ITERATION_TEXT = 32
_ITERATION = re.compile(r"iter_\d{7,}|release")
_MAX_LIST = 100_000


def find_iteration(path: Path) -> Path:
    """The folder that holds the weights: `path` itself, or what its `latest` file names.

    Raises:
        CheckpointError: There is none.
    """
    if any(path.glob("mp_rank_*")) or (path / ".metadata").is_file():
        return path
    latest = path / LATEST
    if not latest.is_file():
        raise CheckpointError(
            f"{path} has neither {LATEST}, mp_rank_* folders nor .metadata: it is no Megatron checkpoint"
        )
    text = read_range(latest, 0, _MAX_ITERATION_TEXT).decode("ascii", "replace").strip()
    if text != "release" and not re.fullmatch(r"\d{1,12}", text):
        raise CheckpointError(f"{latest} holds {text!r}, where a number or 'release' is needed")
    folder = path / (text if text == "release" else iteration_name(int(text)))
    if not folder.is_dir():
        raise CheckpointError(f"{latest} names {folder.name}, which is not there: copy the checkpoint again")
    return folder


def iteration_name(iteration: int) -> str:
    """Folder of an iteration."""
    return f"iter_{iteration:07d}"


def plain_args(value: Any) -> dict[str, Any]:
    """The plain entries of a checkpoint's args: numbers, texts, None and lists of them; others are left out."""
    if isinstance(value, Call) and value.name == "argparse.Namespace" and isinstance(value.state, dict):
        entries: Mapping[Any, Any] = value.state
    elif isinstance(value, Call) and isinstance(value.state, dict):
        entries = value.state
    elif isinstance(value, dict):
        entries = value
    else:
        return {}
    return {
        key: list(item) if isinstance(item, tuple) else item
        for key, item in entries.items()
        if isinstance(key, str) and key.isidentifier() and _is_plain(item)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) <= _MAX_LIST and all(_is_scalar(item) for item in value)
    return _is_scalar(value)


def _is_scalar(value: Any) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 2**63
    return value is None or isinstance(value, (bool, float)) or (isinstance(value, str) and len(value) <= 4096)


def to_namespace(args: Mapping[str, Any], dtype: str) -> Namespace:
    """The args as they are stored, with the type of the weights as Megatron stores it."""
    return Namespace(**{**args, "params_dtype": Global("torch", dtype)})


def hf_side_files(path: Path) -> dict[str, Path]:
    """Hugging Face's side files that an earlier conversion kept: name -> path."""
    folder = path / HF_FOLDER
    if not folder.is_dir():
        return {}
    return {name: inside(folder, name, "the conversion") for name in SIDE_FILES if (folder / name).is_file()}
