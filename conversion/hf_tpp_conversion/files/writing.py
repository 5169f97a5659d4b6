"""Bytes onto the disk: arrays in contiguous bands, at any position of a file."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from hf_tpp_conversion.files.dtypes import Array

__all__ = ["bands", "sync", "write_all", "write_at"]

_BAND = 4 * 2**20


def bands(arrays: Iterable[Array]) -> Iterator[Array]:
    """Contiguous pieces of at most 4 MiB (or one row), in order."""
    for array in arrays:
        if array.ndim == 0 or array.nbytes <= _BAND:
            if array.size:
                yield np.ascontiguousarray(array)
            continue
        rows = max(1, _BAND * array.shape[0] // array.nbytes)
        for first in range(0, array.shape[0], rows):
            yield np.ascontiguousarray(array[first : first + rows])


def write_at(path: Path, position: int, views: list[memoryview]) -> None:
    """Write bytes one behind the other from a position of a file on; the file is made if it is not there."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        for view in views:
            write_all(descriptor, position, view)
            position += len(view)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, position: int, view: memoryview) -> None:
    """Write all of `view`, however many calls the system wants."""
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], position + done)


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
