"""Bytes of a file, by position."""

import os
from pathlib import Path

from hf_tpp.errors import CheckpointError

__all__ = ["read_range"]


def read_range(path: Path, position: int, size: int) -> bytes:
    """Bytes of a file; fewer at its end.

    Raises:
        CheckpointError: The file cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return os.pread(descriptor, size, position)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}): check the file and its permissions"
        ) from error
