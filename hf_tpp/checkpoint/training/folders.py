"""A training run's folder: a checkpoint appears under its name only once it is complete.

A folder while training runs, after a crash, or between two saves:

    runs/a/step-00000010/          complete
    runs/a/step-00000020.tmp-new/  being written, or left by a crash: swept by the next save
    runs/a/latest                  "step-00000010", replaced last
"""

import os
import shutil
from pathlib import Path

from hf_tpp.errors import CheckpointError

__all__ = ["latest_checkpoint", "prepare", "publish", "temporary_folder"]

_NEW, _OLD, _LATEST = ".tmp-new", ".tmp-old", "latest"
_COMPLETE = ".metadata"  # what torch.distributed.checkpoint writes last


def latest_checkpoint(root: str | os.PathLike[str]) -> Path | None:
    """The checkpoint to resume from.

    Args:
        root: Folder that holds the checkpoints of one run.

    Returns:
        The newest complete checkpoint; None if nothing was saved yet.

    Raises:
        CheckpointError: The file `latest` names a checkpoint that is not there.
    """
    root = Path(root)
    try:
        name = (root / _LATEST).read_text().strip()
    except FileNotFoundError:
        return None
    for candidate in (root / name, root / (name + _OLD)):  # the second if a crash hit while replacing the first
        if name and (candidate / _COMPLETE).is_file():
            return candidate
    complete = sorted(file.parent.name for file in root.glob(f"*/{_COMPLETE}"))
    raise CheckpointError(
        f"{root / _LATEST} names {name!r}, which is not there or incomplete: pass one of "
        f"{', '.join(complete) or 'none'} by its own path, or delete the file to start anew"
    )


def temporary_folder(directory: Path) -> Path:
    """Where a checkpoint is written before it is complete."""
    return directory.with_name(directory.name + _NEW)


def prepare(directory: Path) -> None:
    """Make the parent folder and remove what an interrupted save left there."""
    root = directory.parent
    root.mkdir(parents=True, exist_ok=True)
    for old in root.glob(f"*{_OLD}"):
        complete = old.with_name(old.name.removesuffix(_OLD))
        if not complete.exists():
            old.rename(complete)
    for pattern in (f"*{_NEW}", f"*{_OLD}"):
        for leftover in root.glob(pattern):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


def publish(directory: Path) -> None:
    """Give a complete checkpoint its name, then point `latest` at it."""
    new, old, root = temporary_folder(directory), directory.with_name(directory.name + _OLD), directory.parent
    _flush(new)
    if directory.exists():
        directory.rename(old)
    new.rename(directory)
    _flush(root)
    pointer = root / (_LATEST + _NEW)
    with pointer.open("w") as file:
        file.write(directory.name + "\n")
        file.flush()
        os.fsync(file.fileno())
    pointer.replace(root / _LATEST)
    _flush(root)
    if old.exists():
        shutil.rmtree(old)


def _flush(folder: Path) -> None:
    """Make the names in a folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
