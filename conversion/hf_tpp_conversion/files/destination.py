"""A folder that appears whole or not at all.

    DST.partial-hf_tpp/     everything is written here, beside the target and on the same disk
    DST                     appears by one rename, after every byte has reached the disk

The folder is locked while it is written; an unlocked one was left by a process that was killed, and is swept.
"""

import contextlib
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from hf_tpp.errors import CheckpointError, ConfigurationError
from hf_tpp_conversion.files.bands import bands
from hf_tpp_conversion.files.dtypes import Array
from hf_tpp_conversion.files.manifest import FORMAT, MANIFEST_NAME, written_sum
from hf_tpp_conversion.files.sums import Summer
from hf_tpp_conversion.files.syncing import Syncer
from hf_tpp_conversion.files.writing import sync, write_all, write_at

__all__ = ["Destination", "check_target"]

_SUFFIX = ".partial-hf_tpp"
_LOCK = ".lock"
_RESERVE = 16 * 2**20  # bytes that must stay free for folders and the file system's own tables


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a target that holds something already.

    Raises:
        ConfigurationError: It does, or its parent is no folder.
    """
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())) and not overwrite:
        raise ConfigurationError(f"{target} exists: choose another destination, or pass --overwrite to replace it")
    if target.exists() and not target.is_dir():
        raise ConfigurationError(f"{target} is a file: choose a folder that does not exist yet")


class Destination:
    """Writes the files of a new checkpoint.

    Args:
        target: The folder to be.
        needed: Bytes that will be written.
        progress: Called with the number of bytes just written.
    """

    def __init__(self, target: Path, needed: int, progress: Callable[[int], object] | None = None) -> None:
        self.target = target.absolute()
        self.staging = self.target.with_name(self.target.name + _SUFFIX)
        self._needed = needed
        self._progress = progress or (lambda _: None)
        self._sums: dict[str, dict[str, str]] = {}
        self._summer, self._syncer = Summer(), Syncer()

    @contextlib.contextmanager
    def open(self) -> Iterator["Destination"]:
        """Begin; on leaving, either the target is there whole, or nothing is.

        Raises:
            CheckpointError: No room, or the disk failed.
        """
        lock = None
        created: list[Path] = []
        try:
            created = _make_parents(self.target.parent)
            lock = self._lock()
            self._check_room()
            yield self
            self._publish()
        except OSError as error:
            free = shutil.disk_usage(self.staging.parent).free if self.staging.parent.exists() else 0
            raise CheckpointError(
                f"{self.target} could not be written ({error.strerror}): {self._needed} bytes are needed, {free} are "
                f"free there; nothing was left behind"
            ) from error
        finally:
            self._summer.close()
            self._syncer.close()
            if lock is not None:
                shutil.rmtree(self.staging, ignore_errors=True)
                os.close(lock)
            for folder in reversed(created):
                with contextlib.suppress(OSError):
                    folder.rmdir()  # only if nothing came to be in it

    def write_small(self, name: str, content: bytes) -> None:
        """Write a whole small file."""
        path = self._path(name)
        path.write_bytes(content)
        self._sums.setdefault(name, {})[f"0:{len(content)}"] = written_sum(zlib.crc32(content))
        self._progress(len(content))

    def copy(self, name: str, source: Path) -> None:
        """Copy a side file (a tokenizer)."""
        self.write_small(name, source.read_bytes())

    def write_part(self, name: str, position: int, content: bytes, with_sum: bool = False) -> None:
        """Write bytes of a file that are no tensor."""
        if with_sum:
            self._sums.setdefault(name, {})[f"{position}:{len(content)}"] = written_sum(zlib.crc32(content))
        write_at(self._path(name), position, [memoryview(content)])
        self._progress(len(content))

    def write_arrays(self, name: str, position: int, arrays: Iterable[Array], num_bytes: int) -> int:
        """Write arrays one behind the other, in bands.

        Args:
            name: The file.
            position: Where in the file.
            arrays: Any views; each band is made contiguous by itself.
            num_bytes: What they must add up to.

        Returns:
            Their CRC-32.
        """
        sums, written = self._summer.begin(), 0
        path = self._path(name)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            for band in bands(arrays):
                view = memoryview(np.ascontiguousarray(band).reshape(-1).view(np.uint8).data)
                sums.add(view)
                write_all(descriptor, position + written, view)
                written += len(view)
                self._progress(len(view))
        finally:
            os.close(descriptor)
            checksum = sums.finish()
        assert written == num_bytes, f"{name} at {position}: {written} bytes were written, {num_bytes} planned"
        self._sums.setdefault(name, {})[f"{position}:{num_bytes}"] = written_sum(checksum)
        self._syncer.wrote(path, num_bytes)
        return checksum

    def _path(self, name: str) -> Path:
        path = self.staging / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _lock(self) -> int:
        self.staging.mkdir(exist_ok=True)
        lock = os.open(self.staging / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise CheckpointError(f"{self.target} is being written by another process: wait for it") from error
        for path in self.staging.iterdir():  # left by a process that was killed
            if path.name != _LOCK:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return lock

    def _check_room(self) -> None:
        free = shutil.disk_usage(self.staging).free
        if free < self._needed + _RESERVE:
            raise CheckpointError(
                f"{self.target} needs {self._needed} bytes, {free} are free on that disk: make room, or choose another"
            )

    def _publish(self) -> None:
        """Sync everything, then rename."""
        self._syncer.finish()
        manifest = json.dumps({"format": FORMAT, "files": self._sums}, indent=1, sort_keys=True)
        (self.staging / MANIFEST_NAME).write_text(manifest + "\n")
        (self.staging / _LOCK).unlink()
        for path in [*self.staging.rglob("*"), self.staging]:
            sync(path)
        old = self.target.with_name(self.target.name + ".replaced-hf_tpp")
        if self.target.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.target.rename(old)
        self.staging.rename(self.target)
        sync(self.target.parent)
        shutil.rmtree(old, ignore_errors=True)


def _make_parents(folder: Path) -> list[Path]:
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    for parent in reversed(missing):
        parent.mkdir()
    return missing[::-1]
