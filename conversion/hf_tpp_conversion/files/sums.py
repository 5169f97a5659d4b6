"""Sums of bytes, computed in a thread of their own beside the writing of the same bytes."""

import hashlib
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

__all__ = ["Summer", "Sums"]

_IN_FLIGHT = 2  # bands that may wait for their sum: more would keep memory alive


class Summer:
    """The thread."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sums")

    def begin(self, with_crc: bool) -> "Sums":
        """The sums of one run of bytes that will be handed over band by band."""
        return Sums(self._pool, with_crc)

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class Sums:
    """The sums of one run of bytes.

    Args:
        pool: Where they are computed.
        with_crc: CRC-32 as well, which archives need.
    """

    def __init__(self, pool: ThreadPoolExecutor, with_crc: bool) -> None:
        self._pool, self._with_crc = pool, with_crc
        self._digest, self._crc = hashlib.sha256(), 0
        self._waiting: deque[Future[None]] = deque()

    def add(self, view: memoryview) -> None:
        """Hand over the next band; it must not change until `finish`."""
        self._waiting.append(self._pool.submit(self._update, view))
        if len(self._waiting) > _IN_FLIGHT:
            self._waiting.popleft().result()

    def _update(self, view: memoryview) -> None:
        self._digest.update(view)
        if self._with_crc:
            self._crc = zlib.crc32(view, self._crc)

    def finish(self) -> tuple[str, int]:
        """SHA-256 and CRC-32 (0 if it was not asked for) of all bands."""
        while self._waiting:
            self._waiting.popleft().result()
        return self._digest.hexdigest(), self._crc
