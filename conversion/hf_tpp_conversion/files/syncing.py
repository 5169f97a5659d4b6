"""Files onto the disk while they are still being written.

A system keeps gigabytes of written bytes in memory before it begins to bring them to the disk. Left to the end, they
would have to be waited for while the processors have nothing to do. Nor does it give that memory back: the next bytes
take further memory, until what other programs have read is driven out, and new memory is slow at its first use.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from hf_tpp_conversion.files.writing import sync_and_forget

__all__ = ["Syncer"]

_AFTER = 64 * 2**20  # bytes of one file: each sync has the disk write its tables too


class Syncer:
    """The thread."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._written: dict[Path, int] = {}
        self._running: dict[Path, Future[None]] = {}

    def wrote(self, path: Path, num_bytes: int) -> None:
        """Count bytes that were written; a file with enough of them is synced, unless it still is.

        Raises:
            OSError: A sync before failed. The system reports a failure once only, so it must not be lost.
        """
        self._written[path] = self._written.get(path, 0) + num_bytes
        running = self._running.get(path)
        if self._written[path] >= _AFTER and (running is None or running.done()):
            if running is not None:
                running.result()
            self._written[path] = 0
            self._running[path] = self._pool.submit(sync_and_forget, path)

    def finish(self) -> None:
        """Wait for the syncs that run.

        Raises:
            OSError: One failed.
        """
        for running in self._running.values():
            running.result()

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)
