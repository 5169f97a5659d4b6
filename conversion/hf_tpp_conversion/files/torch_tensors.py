"""Tensors in torch's pickles: records of calls that stand for arrays, and the other way round."""

import math
from collections.abc import Sequence
from typing import Any

from hf_tpp.errors import CheckpointError
from hf_tpp_conversion.files.dtypes import ITEM_SIZES, STORAGES
from hf_tpp_conversion.files.pickle_values import Call, Global, PersistentId
from hf_tpp_conversion.files.stored import StoredArray
from hf_tpp_conversion.files.torch_zip import TorchArchive

__all__ = ["array_of", "storage_call"]

_DTYPE_OF_STORAGE = {name: dtype for dtype, name in STORAGES.items()}
_MAX_DIMS = 8
_WRAPPERS = ("torch._utils._rebuild_parameter", "torch.Tensor.detach")


def array_of(value: Any, archive: TorchArchive, name: str) -> StoredArray | None:
    """The array that a pickled tensor stands for, or None if `value` is no tensor.

    Raises:
        CheckpointError: A tensor that does not fit its storage, or is not dense and contiguous.
    """
    while isinstance(value, Call) and value.args and value.name in _WRAPPERS:
        value = value.args[0]
    if not isinstance(value, Call) or not value.name.startswith("torch._"):
        return None
    if value.name != "torch._utils._rebuild_tensor_v2":
        raise CheckpointError(
            f"{archive.path}: tensor {name!r} is stored by {value.name[:80]!r}, only dense tensors are"
        )
    try:
        storage, offset, shape, strides = value.args[:4]
        kind, cls, key, _, numel = storage.value
        if isinstance(shape, Call):
            shape = shape.args[0]
        dtype = _DTYPE_OF_STORAGE.get(cls.name, "") if isinstance(cls, Global) and kind == "storage" else ""
        sizes_are_fine = len(shape) == len(strides) <= _MAX_DIMS and all(
            type(size) is int and size >= 0 for size in (*shape, *strides, offset, numel)
        )
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{archive.path}: tensor {name!r} is damaged ({error})") from error
    if not dtype or not sizes_are_fine or not isinstance(key, str):
        raise CheckpointError(f"{archive.path}: tensor {name!r} has a quantized, unknown or impossible type or shape")
    itemsize = ITEM_SIZES[dtype]
    num_bytes = archive.storage_size(key)
    if numel * itemsize != num_bytes or (offset + math.prod(shape)) * itemsize > num_bytes:
        raise CheckpointError(
            f"{archive.path}: tensor {name!r} of shape {list(shape)} does not fit its storage of {num_bytes} bytes"
        )
    if 0 not in shape and any(a != b for a, b, size in zip(strides, _strides(shape), shape, strict=True) if size > 1):
        raise CheckpointError(f"{archive.path}: tensor {name!r} is not contiguous: save it with .contiguous()")
    return StoredArray(
        archive.path, None, tuple(shape), dtype, archive, archive.storage_record(key), skip=offset * itemsize
    )


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[index + 1 :]) for index in range(len(shape))]


def storage_call(shape: tuple[int, ...], dtype: str, key: str) -> Call:
    """The pickled form of a contiguous tensor in a storage of its own: the inverse of `array_of`."""
    storage = PersistentId(
        ("storage", Global("torch", STORAGES[dtype]), key, "cpu", math.prod(shape)),
    )
    hooks = Call(Global("collections", "OrderedDict"), ())
    arguments = (storage, 0, shape, tuple(_strides(shape)), False, hooks)
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), arguments)
