"""An array in a file: where its bytes are, its shape and its type."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from hf_tpp_conversion.files.dtypes import ITEM_SIZES
from hf_tpp_conversion.files.torch_zip import TorchArchive

__all__ = ["StoredArray"]


@dataclass(frozen=True, slots=True)
class StoredArray:
    """A dense array of bytes in a file.

    Attributes:
        file: The file.
        offset: Where its bytes begin in the file; None if a local header must be read first (`TorchArchive.locate`).
        shape: Its shape.
        dtype: Its type, by its safetensors name.
        archive: The archive that holds it, if it is a storage.
        record: The name of the storage there.
        skip: Bytes of the storage before the first element.
    """

    file: Path
    offset: int | None
    shape: tuple[int, ...]
    dtype: str
    archive: TorchArchive | None = field(default=None, compare=False, repr=False)
    record: str = ""
    skip: int = 0

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]

    def start(self) -> int:
        """Where its bytes begin in the file."""
        if self.offset is not None:
            return self.offset
        assert self.archive is not None
        return self.archive.locate(self.record) + self.skip

    def entry(self, index: int) -> "StoredArray":
        """Entry `index` of the first dimension."""
        size = self.num_bytes // self.shape[0]
        return StoredArray(self.file, self.start() + index * size, self.shape[1:], self.dtype)
