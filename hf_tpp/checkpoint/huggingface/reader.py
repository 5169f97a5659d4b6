"""Slices of safetensors files within a bound of memory.

Such a file is mapped, and every page that was touched counts as this process's memory until the mapping is closed:
a file is read in bands of rows, and opened anew whenever `MAX_TOUCHED` bytes of it were touched.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from hf_tpp.checkpoint.huggingface.files import StoredTensor

__all__ = ["MAX_TOUCHED", "SliceReader"]

MAX_TOUCHED = 64 * 2**20
_BAND = 16 * 2**20


class SliceReader:
    """Reads tensors of many files, one file open at a time."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._handle: Any = None
        self._touched = 0

    def copy(self, target: torch.Tensor, source: StoredTensor, dim: int = 0, start: int = 0) -> None:
        """Fill `target` with the slice of `source` along `dim` that begins at `start` and is as large as `target`."""
        if not source.shape:
            target.copy_(self._open(source, 0).get_tensor(source.key))
            return
        num_rows = target.shape[0]
        offset = start if dim == 0 else 0
        for first, last in _bands(source, num_rows):
            cut = [slice(offset + first, offset + last), *(slice(0, size) for size in source.shape[1:])]
            if dim:
                cut[dim] = slice(start, start + target.shape[dim])
            # No name for the slice: it would keep the file mapped.
            target[first:last].copy_(self._slice(source, cut, last - first))

    def equal(self, a: StoredTensor, b: StoredTensor) -> bool:
        """True if two stored tensors have the same shape, type and values."""
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return False
        for first, last in _bands(a, a.shape[0] if a.shape else 0):
            cut = [slice(first, last), *(slice(0, size) for size in a.shape[1:])]
            rows = self._slice(a, cut, last - first).clone()
            if not torch.equal(rows, self._slice(b, cut, last - first)):
                return False
        return True

    def _slice(self, source: StoredTensor, cut: list[slice], num_rows: int) -> torch.Tensor:
        """A view of the mapped file; whole rows count as touched, whatever part of them is asked for."""
        view: torch.Tensor = self._open(source, num_rows * _row_bytes(source)).get_slice(source.key)[tuple(cut)]
        return view

    def _open(self, source: StoredTensor, num_bytes: int) -> Any:
        if source.file != self._path or self._touched + num_bytes > MAX_TOUCHED:
            self._handle = None  # closes the file before the next one is opened
            self._handle = safe_open(source.file, framework="pt", device="cpu")
            self._path, self._touched = source.file, 0
        self._touched += num_bytes
        return self._handle


def _bands(source: StoredTensor, num_rows: int) -> Iterator[tuple[int, int]]:
    step = max(1, _BAND // max(1, _row_bytes(source)))
    for first in range(0, num_rows, step):
        yield first, min(first + step, num_rows)


def _row_bytes(source: StoredTensor) -> int:
    assert source.dtype is not None
    return math.prod(source.shape[1:]) * source.dtype.itemsize
