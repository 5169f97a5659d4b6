"""The `.metadata` of torch.distributed.checkpoint: which chunk of which tensor lies where, as plain data.

torch reads this file with Python's unpickler, which runs what it is told to. Here it is read as inert values, and of
their names only those of `torch.distributed.checkpoint.metadata` mean anything.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_tpp.errors import CheckpointError
from hf_tpp_conversion.files.byte_ranges import read_range
from hf_tpp_conversion.files.dtypes import TORCH_NAMES
from hf_tpp_conversion.files.pickle_values import Call, Global
from hf_tpp_conversion.files.pickle_writing import write_pickle
from hf_tpp_conversion.files.pickles import MAX_PICKLE_BYTES, read_pickle

__all__ = ["Chunk", "StoredTensor", "read_metadata", "write_metadata"]

_METADATA = "torch.distributed.checkpoint.metadata"
_STORAGE = "torch.distributed.checkpoint.filesystem"
_CODES = {name: code for code, name in TORCH_NAMES.items()}
_MAX_SIZE = 2**48


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor, and where its bytes are.

    Attributes:
        offsets: Its first corner in the tensor.
        sizes: Its sizes.
        file: Name of its file.
        position: Where its archive begins there.
        length: Bytes of the archive.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    position: int
    length: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of the checkpoint; without chunks and shape it is an object (`_extra_state`)."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]


def read_metadata(path: Path) -> dict[str, StoredTensor]:
    """Key -> tensor; objects are left out.

    Raises:
        CheckpointError: The file is damaged or hostile.
    """
    content = read_range(path, 0, MAX_PICKLE_BYTES + 1)
    top = read_pickle(content, str(path))
    if not isinstance(top, Call) or top.name != f"{_METADATA}.Metadata" or not isinstance(top.state, dict):
        raise CheckpointError(f"{path} is no metadata of torch.distributed.checkpoint: get the checkpoint again")
    try:
        return _tensors(top.state["state_dict_metadata"], _places(top.state["storage_data"]))
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{path} is damaged or hostile ({str(error)[:120]!r}): get the checkpoint again"
        ) from error


def _tensors(entries: Mapping[Any, Any], places: Mapping[Any, tuple[str, int, int]]) -> dict[str, StoredTensor]:
    """Key -> tensor.

    Raises:
        ValueError: An entry that is neither a tensor nor an object.
    """
    tensors = {}
    for key, value in entries.items():
        if value.name == f"{_METADATA}.TensorStorageMetadata":
            tensors[str(key)] = _tensor(str(key), value.state, places)
        elif value.name != f"{_METADATA}.BytesStorageMetadata":
            raise ValueError(f"an entry of type {value.name}")
    return tensors


def _places(storage_data: Mapping[Any, Any]) -> dict[tuple[str, tuple[int, ...] | None], tuple[str, int, int]]:
    """(key, offsets) -> (file, position, length)."""
    places = {}
    for index, info in storage_data.items():
        offset = index.state.get("offset")
        offsets = None if offset is None else _size(offset)
        name, position, length = (info.state[field] for field in ("relative_path", "offset", "length"))
        if not isinstance(name, str) or name != Path(name).name or not name.endswith(".distcp") or "\0" in name:
            raise ValueError(f"the file name {str(name)[:60]!r}")
        if type(position) is not int or type(length) is not int or position < 0 or length < 0:
            raise ValueError(f"a place that is no place in {name}")
        if info.state.get("transform_descriptors"):
            raise ValueError("compressed chunks, which Megatron never writes")
        places[str(index.state["fqn"]), offsets] = (name, position, length)
    return places


def _tensor(key: str, state: Mapping[str, Any], places: Mapping[Any, tuple[str, int, int]]) -> StoredTensor:
    properties = state["properties"].state
    dtype = properties[0] if isinstance(properties, tuple) else properties["dtype"]
    code = _CODES.get(dtype.name, "") if dtype.module == "torch" else ""
    if not code:
        raise ValueError(f"tensor {key} of type {dtype}")
    shape = _size(state["size"])
    chunks = []
    for chunk in state["chunks"]:
        offsets, sizes = _size(chunk.state["offsets"]), _size(chunk.state["sizes"])
        if len(offsets) != len(shape) or any(o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)):
            raise ValueError(f"a chunk of {key} outside its shape {list(shape)}")
        place = places.get((key, offsets))
        if place is None:
            raise ValueError(f"no place for a chunk of {key}")
        chunks.append(Chunk(offsets, sizes, *place))
    return StoredTensor(shape, code, tuple(chunks))


def _size(value: Any) -> tuple[int, ...]:
    """The numbers of a pickled torch.Size."""
    numbers = value.args[0] if isinstance(value, Call) else value
    if not all(type(number) is int and 0 <= number < _MAX_SIZE for number in numbers):
        raise ValueError("a size that is no size")
    return tuple(numbers)


def write_metadata(tensors: Mapping[str, StoredTensor], objects: Mapping[str, Chunk]) -> bytes:
    """The inverse of `read_metadata`, readable by torch and Megatron.

    Args:
        tensors: Key -> tensor.
        objects: Key -> where a pickled object lies.
    """
    entries: dict[str, Any] = {key: _tensor_entry(tensor) for key, tensor in tensors.items()}
    entries |= {key: _made(f"{_METADATA}.BytesStorageMetadata", {}) for key in objects}
    storage: dict[Any, Any] = {}
    for key, tensor in tensors.items():
        for chunk in tensor.chunks:
            storage[_index(key, chunk.offsets)] = _place(chunk)
    for key, chunk in objects.items():
        storage[_index(key, None)] = _place(chunk)
    state = {"state_dict_metadata": entries, "planner_data": None, "storage_data": storage, "storage_meta": None}
    return write_pickle(_made(f"{_METADATA}.Metadata", state | {"version": "1.0.0"}))


def _tensor_entry(tensor: StoredTensor) -> Call:
    layout = Call(Global("torch.serialization", "_get_layout"), ("torch.strided",))
    memory_format = Call(Global(_METADATA, "_MEM_FORMAT_ENCODING"), (0,))
    dtype = Global("torch", TORCH_NAMES[tensor.dtype])
    properties = _made(f"{_METADATA}.TensorProperties", (dtype, layout, False, memory_format, False))
    chunks = [
        _made(f"{_METADATA}.ChunkStorageMetadata", {"offsets": _torch_size(c.offsets), "sizes": _torch_size(c.sizes)})
        for c in tensor.chunks
    ]
    state = {"properties": properties, "size": _torch_size(tensor.shape), "chunks": chunks}
    return _made(f"{_METADATA}.TensorStorageMetadata", state)


def _index(key: str, offsets: tuple[int, ...] | None) -> Call:
    offset = None if offsets is None else _torch_size(offsets)
    return _made(f"{_METADATA}.MetadataIndex", {"fqn": key, "offset": offset, "index": None})


def _place(chunk: Chunk) -> Call:
    state = {"relative_path": chunk.file, "offset": chunk.position, "length": chunk.length}
    return _made(f"{_STORAGE}._StorageInfo", state)


def _torch_size(numbers: tuple[int, ...]) -> Call:
    return Call(Global("torch", "Size"), (numbers,))


def _made(name: str, state: Any) -> Call:
    module, _, cls = name.rpartition(".")
    made = Call(Global(module, cls), ())
    made.state = state
    return made
