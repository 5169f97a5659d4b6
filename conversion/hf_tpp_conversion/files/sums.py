"""Sums of bytes, computed in a thread of their own beside the writing of the same bytes.

CRC-32, as in archives, where it is needed anyway: it finds every flipped bit and every damaged run of up to 32 bits,
and of all other damage all but one case in four billions. A stronger hash would take longer than the writing, and find
no more: who can change the bytes on purpose can change the manifest beside them.
"""

import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

__all__ = ["Summer", "Sums"]

_IN_FLIGHT = 2  # bands that may wait for their sum: more would keep memory alive


class Summer:
    """The thread."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sums")

    def begin(self) -> "Sums":
        """The sum of one run of bytes that will be handed over band by band."""
        return Sums(self._pool)

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class Sums:
    """The sum of one run of bytes.

    Args:
        pool: Where it is computed.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._crc = 0
        self._waiting: deque[Future[None]] = deque()

    def add(self, view: memoryview) -> None:
        """Hand over the next band; it must not change until `finish`."""
        self._waiting.append(self._pool.submit(self._update, view))
        if len(self._waiting) > _IN_FLIGHT:
            self._waiting.popleft().result()

    def _update(self, view: memoryview) -> None:
        self._crc = zlib.crc32(view, self._crc)

    def finish(self) -> int:
        """CRC-32 of all bands."""
        while self._waiting:
            self._waiting.popleft().result()
        return self._crc
