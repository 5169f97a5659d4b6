"""torch.save's archive: a zip of stored (never compressed) entries, read and laid out without torch.

    model/data.pkl      a pickle; each tensor is a call of torch._utils._rebuild_tensor_v2 on a storage by number
    model/byteorder     little
    model/data/0        the bytes of storage 0, aligned to 64 bytes
    model/data/1        ...
    model/version       3

A reader asks for the pickle first, then for bytes of single storages. A writer knows all sizes before the first byte,
so the position of every byte follows (`ZipPlan`), and storages can be written in any order.
"""

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_tpp.errors import CheckpointError
from hf_tpp_conversion.files.byte_ranges import read_range
from hf_tpp_conversion.files.pickles import MAX_PICKLE_BYTES, read_pickle
from hf_tpp_conversion.files.zip_records import CENTRAL, END, END64, LOCAL, LOCATOR

__all__ = ["TorchArchive"]

_MAX_DIRECTORY = 16 * 2**20


@dataclass(frozen=True, slots=True)
class _Entry:
    size: int
    header: int
    crc: int


class TorchArchive:
    """An archive at a position of a file: a whole .pt file, or one chunk of a .distcp file.

    Args:
        path: The file.
        start: Where the archive begins.
        length: Its size in bytes; default: to the end of the file.

    Raises:
        CheckpointError: Not such an archive, or one that lies about its contents.
    """

    def __init__(self, path: Path, start: int = 0, length: int | None = None) -> None:
        self.path, self._start = path, start
        try:
            file_size = path.stat().st_size
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}): copy the checkpoint again") from error
        self._length = file_size - start if length is None else length
        if start < 0 or self._length < END.size or start + self._length > file_size:
            raise self._damaged("it is shorter than its index says")
        try:
            self._entries = self._read_directory()
        except (struct.error, UnicodeDecodeError) as error:
            raise self._damaged("its directory is cut off") from error
        pickles = [name for name in self._entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise self._damaged("it holds no data.pkl, or two")
        self._prefix = pickles[0].removesuffix("data.pkl")

    def content(self) -> Any:
        """What was saved, as inert values; tensors are calls that `array_of` understands.

        Raises:
            CheckpointError: The pickle is too large or no valid one.
        """
        name = f"{self._prefix}data.pkl"
        if self._entries[name].size > MAX_PICKLE_BYTES:
            raise self._damaged(f"its pickle has {self._entries[name].size} bytes, at most {MAX_PICKLE_BYTES} are read")
        order = self._entries.get(f"{self._prefix}byteorder")
        if order and self._read(self.locate(f"{self._prefix}byteorder"), min(order.size, 16)) != b"little":
            raise self._damaged("it was written on a big-endian machine; save it again on a little-endian one")
        content = self._read(self.locate(name), self._entries[name].size)
        if self._entries[name].crc not in (0, zlib.crc32(content)):  # 0: torch was told to compute none
            raise self._damaged("the CRC-32 of its pickle is another one")
        return read_pickle(content, str(self.path))

    def storage_size(self, key: str) -> int:
        """Bytes of a storage.

        Raises:
            CheckpointError: The archive has no such storage.
        """
        entry = self._entries.get(f"{self._prefix}data/{key}")
        if entry is None:
            raise self._damaged(f"storage {key[:40]!r} is missing")
        return entry.size

    def storage_record(self, key: str) -> str:
        """Name of the entry of a storage."""
        return f"{self._prefix}data/{key}"

    def locate(self, record: str) -> int:
        """Position in the file of the bytes of an entry.

        Raises:
            CheckpointError: The entry's header is not where the directory says.
        """
        entry = self._entries[record]
        header = self._read(self._start + entry.header, LOCAL.size)
        if len(header) < LOCAL.size or not header.startswith(b"PK\x03\x04"):
            raise self._damaged(f"{record[:80]!r} is not where its directory says")
        name_size, extra_size = map(int, LOCAL.unpack(header)[-2:])
        position = entry.header + LOCAL.size + name_size + extra_size
        if position + entry.size > self._length:
            raise self._damaged(f"{record[:80]!r} reaches past its end")
        return self._start + position

    def _read(self, position: int, size: int) -> bytes:
        return read_range(self.path, position, size)

    def _damaged(self, why: str) -> CheckpointError:
        at = f" at byte {self._start}" if self._start else ""
        return CheckpointError(f"{self.path}{at} is no archive of torch.save that can be read: {why}")

    def _read_directory(self) -> dict[str, _Entry]:
        end_position, count, size, offset = self._find_end()
        if size > _MAX_DIRECTORY or offset + size > end_position:
            raise self._damaged(f"its directory of {size} bytes does not fit")
        content = self._read(self._start + offset, size)
        entries: dict[str, _Entry] = {}
        position = 0
        for _ in range(count):
            name, entry, position = self._read_entry(content, position)
            if name in entries:
                raise self._damaged(f"entry {name[:80]!r} is there twice")
            entries[name] = entry
        return entries

    def _find_end(self) -> tuple[int, int, int, int]:
        """Position of the end record, number of entries, size and offset of the directory."""
        end_position = self._length - END.size  # torch writes no comment
        signature, *_, count, size, offset, _ = END.unpack(self._read(self._start + end_position, END.size))
        if signature != b"PK\x05\x06":
            raise self._damaged(
                "its end is missing; legacy files of torch < 1.6 must be saved again with a newer torch"
            )
        locator = self._read(self._start + max(0, end_position - LOCATOR.size), LOCATOR.size)
        if locator.startswith(b"PK\x06\x07"):
            position = LOCATOR.unpack(locator)[2]
            if position + END64.size > self._length:
                raise self._damaged("its directory lies outside")
            signature, *_, count, size, offset = END64.unpack(self._read(self._start + position, END64.size))
            if signature != b"PK\x06\x06":
                raise self._damaged("its directory is missing")
        return end_position, count, size, offset

    def _read_entry(self, content: bytes, position: int) -> tuple[str, _Entry, int]:
        fields = CENTRAL.unpack_from(content, position)
        signature, method, packed, size = fields[0], fields[4], fields[8], fields[9]
        name_size, extra_size, comment_size, header = fields[10], fields[11], fields[12], fields[16]
        start = position + CENTRAL.size
        name = content[start : start + name_size].decode()
        extra = content[start + name_size : start + name_size + extra_size]
        size, packed, header = _widen(extra, size, packed, header)
        if signature != b"PK\x01\x02" or len(name) == 0:
            raise self._damaged("its directory is damaged")
        if method or packed != size:
            raise self._damaged(f"entry {name[:80]!r} is compressed, torch never does that")
        if header + LOCAL.size + size > self._length:
            raise self._damaged(f"entry {name[:80]!r} of {size} bytes reaches past its end")
        return name, _Entry(size, header, fields[7]), start + name_size + extra_size + comment_size


def _widen(extra: bytes, size: int, packed: int, header: int) -> tuple[int, int, int]:
    """The 64-bit values of those fields that did not fit into 32 bits."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        if kind == 1:
            values = list(struct.unpack_from(f"<{length // 8}Q", extra, position + 4))
            size = values.pop(0) if size == 0xFFFFFFFF else size
            packed = values.pop(0) if packed == 0xFFFFFFFF and values else packed
            header = values.pop(0) if header == 0xFFFFFFFF and values else header
        position += 4 + length
    return size, packed, header
