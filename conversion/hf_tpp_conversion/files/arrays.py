"""Bytes of stored arrays into memory: one array at a time, checked against the manifest."""

import hashlib
import os

import numpy as np

from hf_tpp.errors import CheckpointError
from hf_tpp_conversion.files.dtypes import Array, carrier
from hf_tpp_conversion.files.manifest import Manifest
from hf_tpp_conversion.files.stored import StoredArray

__all__ = ["read_array", "read_into", "read_rows"]

_BAND = 16 * 2**20


def read_array(stored: StoredArray, name: str, manifest: Manifest | None = None) -> Array:
    """A stored array, whole: its shape, its bits in unsigned integers.

    Raises:
        CheckpointError: The file ends early, or its bytes were changed.
    """
    values = np.empty(stored.shape, carrier(stored.dtype))
    read_into(stored, values, name, manifest)
    return values


def read_into(stored: StoredArray, target: Array, name: str, manifest: Manifest | None = None) -> None:
    """Fill a contiguous `target` of the array's size.

    Raises:
        CheckpointError: The file ends early, or its bytes were changed.
    """
    position = stored.start()
    expected = manifest.expected(stored.file, position, stored.num_bytes) if manifest else None
    digest = hashlib.sha256() if expected else None
    view = memoryview(target.reshape(-1).view(np.uint8).data) if stored.num_bytes else memoryview(b"")
    try:
        descriptor = os.open(stored.file, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{stored.file} cannot be read ({error.strerror}): check its permissions") from error
    try:
        done = 0
        while done < len(view):
            band = view[done : done + _BAND]
            count = os.preadv(descriptor, [band], position + done)
            if count == 0:
                raise CheckpointError(f"{stored.file} ends within {name!r}: copy the file again")
            if digest:
                digest.update(band[:count])
            done += count
    finally:
        os.close(descriptor)
    if digest and manifest:
        manifest.check(stored.file, position, stored.num_bytes, digest.hexdigest(), name)


def read_rows(stored: StoredArray, index: int, name: str) -> Array:
    """Entry `index` of the first dimension, without reading the others (experts that are stored as one tensor)."""
    size = stored.num_bytes // stored.shape[0]
    one = StoredArray(stored.file, stored.start() + index * size, stored.shape[1:], stored.dtype)
    return read_array(one, name)
