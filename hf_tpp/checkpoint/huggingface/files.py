"""What a folder of safetensors files holds, from its headers alone.

model.safetensors                                                      one file
model.safetensors.index.json, model-00001-of-00002.safetensors, ...    several

Nothing in such a folder is trusted: it may come from anywhere.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hf_tpp.errors import CheckpointError

__all__ = ["INDEX_NAME", "WEIGHTS_NAME", "StoredTensor", "list_tensors"]

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# Quantized types (8-bit floats among them) are left out: their values mean nothing without their scales.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        key: Its name in the file.
        file: The file.
        shape: Its shape.
        dtype: Its type; None if it is one that cannot be loaded.
    """

    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None

    def differences(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> list[str]:
        """Why this cannot become the tensor `name` of the model; `dtype` None accepts any that can be loaded."""
        problems = []
        if self.shape != tuple(shape):
            problems.append(f"{name!r} in {self.file.name} has shape {list(self.shape)}, the model's {list(shape)}")
        if self.dtype is None:
            problems.append(f"{name!r} in {self.file.name} has a quantized or unknown type")
        elif dtype not in (None, self.dtype) and not (dtype.is_floating_point and self.dtype.is_floating_point):
            problems.append(f"{name!r} in {self.file.name} is {self.dtype}, the model's {dtype}")
        return problems


def list_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of the checkpoint in `folder`, by their names in the files.

    Raises:
        CheckpointError: No safetensors checkpoint, or one that contradicts itself or leaves the folder.
    """
    index, single = folder / INDEX_NAME, folder / WEIGHTS_NAME
    if single.is_file() or not index.is_file():
        if not os.path.lexists(single):
            raise CheckpointError(_nothing_found(folder))
        return _read_header(_inside(folder, WEIGHTS_NAME, "the checkpoint"))
    weight_map = _read_weight_map(index)
    stored: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        for key, tensor in _read_header(_inside(folder, name, INDEX_NAME)).items():
            if key in stored:
                raise CheckpointError(
                    f"tensor {key!r} is in {stored[key].file.name} and in {name} of {folder}: delete the wrong one"
                )
            stored[key] = tensor
    for key, name in weight_map.items():
        if key not in stored or stored[key].file.name != name:
            raise CheckpointError(f"{index} places tensor {key!r} in {name}, which has none: download the files again")
    return stored


def _nothing_found(folder: Path) -> str:
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLE_SUFFIXES)
    found = f"only {', '.join(pickled[:3])}" if pickled else "neither"
    return (
        f"{folder} needs {WEIGHTS_NAME} or {INDEX_NAME}, it has {found}: convert other formats (pytorch_model.bin) "
        f"with transformers, AutoModelForCausalLM.from_pretrained(name).save_pretrained(folder)"
    )


def _inside(folder: Path, name: str, source: str) -> Path:
    """The file `name` of `folder`; never one elsewhere, except where the hub's cache keeps what it links to.

    Raises:
        CheckpointError: The name is no plain file name, or its file is missing or elsewhere.
    """
    if name != Path(name).name or "\\" in name or "\0" in name or not name.endswith(".safetensors"):
        raise CheckpointError(f"{source} names the file {name!r}: only plain names of .safetensors files are opened")
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{source} needs the file {name}, which {folder} does not have: download it again")
    home = folder.resolve()
    parents = {home, home.parents[1] / "blobs"} if home.parent.name == "snapshots" else {home}
    target = path.resolve()
    if target.parent not in parents:
        raise CheckpointError(
            f"{path} is a link to {target}, outside the checkpoint: copy the file into the folder, or pass the folder "
            f"in which it is"
        )
    return path


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        if index.stat().st_size > _MAX_HEADER_BYTES:
            raise CheckpointError(f"{index} has {index.stat().st_size} bytes, at most {_MAX_HEADER_BYTES} are read")
        content = index.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read ({error}): check the file and its permissions") from error
    weight_map = _parse(content, index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no 'weight_map' from tensors to files: download it again")
    return weight_map


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file.

    Raises:
        CheckpointError: The file cannot be read or is no valid safetensors file.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if length > _MAX_HEADER_BYTES:
                raise CheckpointError(f"{path} has a header of {length} bytes, at most {_MAX_HEADER_BYTES} are read")
            content = file.read(length)
        with safe_open(path, framework="pt"):  # checks the header: types, shapes, and that the data are all there
            pass
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is no readable safetensors file ({error}): download it again") from error
    header = _parse(content, path)
    header.pop("__metadata__", None)
    return {
        key: StoredTensor(key, path, tuple(entry["shape"]), _DTYPES.get(entry["dtype"]))
        for key, entry in header.items()
    }


def _parse(content: bytes, path: Path) -> dict[str, Any]:
    """A JSON object without repeated keys, which two readers could understand in two ways."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise CheckpointError(f"{path} names {twice!r} twice: it is damaged or malicious, get it elsewhere")
        return result

    try:
        parsed = json.loads(content, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} does not hold valid JSON ({error}): download it again") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} holds a JSON {type(parsed).__name__} where an object is needed")
    return parsed
