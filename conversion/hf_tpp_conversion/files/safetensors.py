"""Safetensors files: headers read and laid out; the bytes are moved by others.

8 bytes       length n of the header, little-endian
n bytes       JSON: name -> {"dtype", "shape", "data_offsets": [begin, end)}, padded with spaces
the rest      the tensors, without gaps
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from hf_tpp.errors import CheckpointError
from hf_tpp_conversion.files.byte_ranges import read_range
from hf_tpp_conversion.files.dtypes import ITEM_SIZES
from hf_tpp_conversion.files.json_reading import parse_json
from hf_tpp_conversion.files.stored import StoredArray

__all__ = ["plan_safetensors", "read_safetensors"]

_LENGTH_BYTES = 8
_ALIGNMENT = 8
_MAX_HEADER_BYTES = 10 * 2**20  # about 100,000 tensors in one file
_MAX_NAME = 512


def read_safetensors(path: Path) -> dict[str, StoredArray]:
    """The tensors of one file, from its header alone.

    Raises:
        CheckpointError: The header is damaged, or does not account for every byte of the file exactly once.
    """
    try:
        file_size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): download it again") from error
    length = int.from_bytes(read_range(path, 0, _LENGTH_BYTES), "little")
    if length > _MAX_HEADER_BYTES or _LENGTH_BYTES + length > file_size:
        raise CheckpointError(f"{path} says that its header has {length} bytes: it is damaged, download it again")
    header = parse_json(read_range(path, _LENGTH_BYTES, length), path)
    header.pop("__metadata__", None)
    data_start = _LENGTH_BYTES + length
    tensors: dict[str, StoredArray] = {}
    spans = []
    for name, entry in header.items():
        tensors[name], begin, end = _read_entry(path, name, entry, data_start)
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise CheckpointError(f"{path}: tensor {name!r} overlaps another one or leaves a hole before it")
        position = end
    if data_start + position != file_size:
        raise CheckpointError(
            f"{path} has {file_size} bytes where its header accounts for {data_start + position}: download it again"
        )
    return tensors


def _read_entry(path: Path, name: str, entry: object, data_start: int) -> tuple[StoredArray, int, int]:
    """One tensor with its span of bytes behind the header.

    Raises:
        CheckpointError: The entry is damaged or malicious.
    """
    if len(name) > _MAX_NAME or not name.isprintable() or "/" in name or "\\" in name:
        raise CheckpointError(f"{path} has a tensor called {name[:80]!r}: names must be printable, without slashes")
    try:
        assert isinstance(entry, dict)
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sizes = [*shape, begin, end]
        assert all(type(size) is int and size >= 0 for size in sizes)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the entry of tensor {name!r} is damaged: download the file again") from error
    if dtype not in ITEM_SIZES:
        raise CheckpointError(
            f"{path}: tensor {name!r} has the type {str(dtype)[:20]!r}; quantized ones are not converted"
        )
    stored = StoredArray(path, data_start + begin, tuple(shape), dtype)
    if stored.num_bytes != end - begin:
        raise CheckpointError(
            f"{path}: tensor {name!r} of shape {shape} and type {dtype} needs {stored.num_bytes} bytes, "
            f"has {end - begin}"
        )
    return stored, begin, end


def plan_safetensors(tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> tuple[bytes, dict[str, int], int]:
    """Lay out a file: the inverse of `read_safetensors`.

    Args:
        tensors: Name -> (shape, dtype), in the order in which they are to lie in the file.

    Returns:
        The bytes in front of the tensors, the position of each tensor in the file, and the size of the file.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    position = 0
    for name, (shape, dtype) in tensors.items():
        size = math.prod(shape) * ITEM_SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        offsets[name] = position
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    front = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    return front, {name: len(front) + offset for name, offset in offsets.items()}, len(front) + position
