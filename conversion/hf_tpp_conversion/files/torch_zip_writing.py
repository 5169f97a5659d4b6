"""Laying out torch.save's archive before its contents exist: the inverse of `torch_zip.py`."""

import struct
from dataclasses import dataclass

from hf_tpp_conversion.files.zip_records import CENTRAL, END, END64, LOCAL, LOCATOR

__all__ = ["ZipPlan"]

_ALIGNMENT = 64
_LIMIT = 0xFFFFFFFF
_PADDING_ID = 0x4246  # "FB": torch's own mark of padding in a header


@dataclass(frozen=True, slots=True)
class _Record:
    name: str
    size: int
    header: int  # position of its local header
    data: int  # position of its bytes


class ZipPlan:
    """Where every byte of an archive goes.

    Args:
        prefix: Name of the folder inside the archive.
        pickle: The content of data.pkl.
        storages: Sizes in bytes; the storage at index i is called `data/i`.
        start: Position in the file at which the archive begins.
    """

    def __init__(self, prefix: str, pickle: bytes, storages: list[int], start: int = 0) -> None:
        self._start = start
        self._small = {f"{prefix}/data.pkl": pickle, f"{prefix}/byteorder": b"little", f"{prefix}/version": b"3\n"}
        sizes = {name: len(content) for name, content in self._small.items()}
        sizes |= {f"{prefix}/data/{index}": size for index, size in enumerate(storages)}
        position = 0
        self._records: list[_Record] = []
        for name, size in sizes.items():
            data = position + LOCAL.size + len(name.encode()) + _zip64_size(size) + 4
            data += -(start + data) % _ALIGNMENT
            self._records.append(_Record(name, size, position, data))
            position = data + size
        self._directory = position
        self._num_small = len(self._small)
        self.length = position + len(self._tail({}))

    def storage_position(self, index: int) -> int:
        """Position in the file of the bytes of storage `index`."""
        return self._start + self._records[self._num_small + index].data

    def frame(self, checksums: dict[int, int]) -> list[tuple[int, bytes]]:
        """Everything but the storages: (position in the file, bytes).

        Args:
            checksums: CRC-32 of every storage by its index; the small entries are added here.
        """
        import zlib

        sums = {self._num_small + index: value for index, value in checksums.items()}
        parts = []
        for index, record in enumerate(self._records):
            content = self._small.get(record.name, b"")
            if content:
                sums[index] = zlib.crc32(content)
            parts.append((self._start + record.header, self._header(record, sums.get(index, 0)) + content))
        return [*parts, (self._start + self._directory, self._tail(sums))]

    def _header(self, record: _Record, checksum: int) -> bytes:
        name = record.name.encode()
        size = min(record.size, _LIMIT)
        wide = struct.pack("<HHQQ", 1, 16, record.size, record.size) if _zip64_size(record.size) else b""
        padding = record.data - record.header - LOCAL.size - len(name) - len(wide) - 4
        extra = wide + struct.pack("<HH", _PADDING_ID, padding) + b"Z" * padding
        # Version 4.5 of the format, no flags, stored, dated 1980-01-01 so that equal models give equal files.
        return LOCAL.pack(b"PK\x03\x04", 45, 0, 0, 0, 33, checksum, size, size, len(name), len(extra)) + name + extra

    def _tail(self, sums: dict[int, int]) -> bytes:
        directory = b"".join(self._central(record, sums.get(i, 0)) for i, record in enumerate(self._records))
        count, size, offset = len(self._records), len(directory), self._directory
        tail = directory
        if count >= 0xFFFF or offset + size >= _LIMIT:
            tail += END64.pack(b"PK\x06\x06", END64.size - 12, 45, 45, 0, 0, count, count, size, offset)
            tail += LOCATOR.pack(b"PK\x06\x07", 0, offset + size, 1)
        short = min(count, 0xFFFF)
        return tail + END.pack(b"PK\x05\x06", 0, 0, short, short, min(size, _LIMIT), min(offset, _LIMIT), 0)

    def _central(self, record: _Record, checksum: int) -> bytes:
        name = record.name.encode()
        size, header = min(record.size, _LIMIT), min(record.header, _LIMIT)
        values = [record.size, record.size] if size == _LIMIT else []
        values += [record.header] if header == _LIMIT else []
        extra = struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""
        fixed = (b"PK\x01\x02", 45, 45, 0, 0, 0, 33, checksum, size, size, len(name), len(extra), 0, 0, 0, 0, header)
        return CENTRAL.pack(*fixed) + name + extra


def _zip64_size(size: int) -> int:
    """Bytes of the field for sizes that need more than 32 bits."""
    return 20 if size >= _LIMIT else 0
