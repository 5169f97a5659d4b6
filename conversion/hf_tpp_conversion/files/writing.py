"""Bytes onto the disk, at any position of a file."""

import os
from pathlib import Path

__all__ = ["sync", "sync_and_forget", "write_all", "write_at"]


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


def sync_and_forget(path: Path) -> None:
    """Wait until a file is on the disk, and give back the memory in which the system keeps its bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
