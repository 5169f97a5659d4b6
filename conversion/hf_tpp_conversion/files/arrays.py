"""Bytes of stored arrays into memory: one array at a time, checked against the manifest."""

import os
import zlib
from collections.abc import Iterable

import numpy as np

from hf_tpp.errors import CheckpointError
from hf_tpp_conversion.files.bands import BAND, bands
from hf_tpp_conversion.files.dtypes import Array, carrier
from hf_tpp_conversion.files.manifest import Manifest
from hf_tpp_conversion.files.stored import StoredArray

__all__ = ["read_array", "read_into", "read_rows"]


def read_array(stored: StoredArray, name: str, manifest: Manifest | None = None) -> Array:
    """A stored array, whole: its shape, its bits in unsigned integers.

    Raises:
        CheckpointError: The file ends early, or its bytes were changed.
    """
    values = np.empty(stored.shape, carrier(stored.dtype))
    read_into(stored, [values], name, manifest)
    return values


def read_into(stored: StoredArray, targets: Iterable[Array], name: str, manifest: Manifest | None = None) -> None:
    """Fill views whose bytes follow one another in the file; together they have the array's size.

    Raises:
        CheckpointError: The file ends early, or its bytes were changed.
    """
    position = stored.start()
    expected = manifest.expected(stored.file, position, stored.num_bytes) if manifest else None
    checksum = 0
    scratch = np.empty(0, np.uint8)
    try:
        descriptor = os.open(stored.file, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{stored.file} cannot be read ({error.strerror}): check its permissions") from error
    try:
        done = 0
        for band in bands(targets):
            in_place = band.flags.c_contiguous
            if not in_place and not scratch.size:
                scratch = np.empty(BAND, np.uint8)
            flat = band.reshape(-1).view(np.uint8) if in_place else scratch[: band.nbytes]
            _read_all(descriptor, position + done, memoryview(flat.data), stored, name)
            if expected:
                checksum = zlib.crc32(flat.data, checksum)
            if not in_place:
                band[...] = flat.view(band.dtype).reshape(band.shape)
            done += band.nbytes
    finally:
        os.close(descriptor)
    assert done == stored.num_bytes, f"{name}: {done} bytes were asked for, {stored.num_bytes} are stored"
    if expected and manifest:
        manifest.check(stored.file, position, stored.num_bytes, checksum, name)


def _read_all(descriptor: int, position: int, view: memoryview, stored: StoredArray, name: str) -> None:
    """Fill `view`, however many calls the system wants."""
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], position + done)
        if count == 0:
            raise CheckpointError(f"{stored.file} ends within {name!r}: copy the file again")
        done += count


def read_rows(stored: StoredArray, index: int, name: str) -> Array:
    """Entry `index` of the first dimension, without reading the others (experts that are stored as one tensor)."""
    return read_array(stored.entry(index), name)
