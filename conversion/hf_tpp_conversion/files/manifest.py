"""CRC-32 sums of what was written, so that a flipped bit is found and named when it is read again.

hf_tpp_manifest.json     {"format": 2, "files": {"model.safetensors": {"<position>:<bytes>": "<crc32>", ...}, ...}}

Sums are kept per run of bytes, one run per stored tensor, because a reader reads tensors one at a time; small files
have one run. A checkpoint without a manifest (every one that others wrote) is read without this check.
"""

import re
import zlib
from pathlib import Path

from hf_tpp.errors import CheckpointError
from hf_tpp_conversion.files.byte_ranges import read_range
from hf_tpp_conversion.files.json_reading import read_json

__all__ = ["FORMAT", "MANIFEST_NAME", "Manifest", "written_sum"]

MANIFEST_NAME = "hf_tpp_manifest.json"
FORMAT = 2  # 1 had SHA-256
_LIMIT = 64 * 2**20
_MAX_HEAD = 64 * 2**20
_FIX = f"the file was damaged, get it again; if you changed it yourself, delete {MANIFEST_NAME}"


def written_sum(crc: int) -> str:
    """A sum as the manifest has it."""
    return f"{crc:08x}"


class Manifest:
    """The sums of one checkpoint folder.

    Args:
        root: The folder.

    Raises:
        CheckpointError: There is a manifest, and it or a file that it lists is damaged.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._sums: dict[str, dict[str, str]] = {}
        path = root / MANIFEST_NAME
        if path.is_file():
            content = read_json(path, _LIMIT)
            if content.get("format") != FORMAT:
                raise CheckpointError(
                    f"{path} has the format {str(content.get('format'))[:20]!r}, {FORMAT} is read here: delete it to "
                    f"read the checkpoint without this check"
                )
            files = content.get("files")
            if not isinstance(files, dict) or not all(isinstance(sums, dict) for sums in files.values()):
                raise CheckpointError(f"{path} is damaged: delete it to read the checkpoint without this check")
            self._sums = files
            self.check_heads()

    @property
    def files(self) -> dict[str, dict[str, str]]:
        """Relative path -> run of bytes -> CRC-32, eight digits."""
        return self._sums

    def expected(self, path: Path, position: int, size: int) -> str | None:
        """The sum of a run of bytes, or None if the file is not in the manifest.

        Raises:
            CheckpointError: The file is in it, but was not written with such a run.
        """
        if not self._sums or not path.is_relative_to(self._root):
            return None
        runs = self._sums.get(path.relative_to(self._root).as_posix())
        if runs is None:
            return None
        if f"{position}:{size}" not in runs:
            raise CheckpointError(f"{path}: no {size} bytes were written at {position} ({MANIFEST_NAME}): {_FIX}")
        return runs[f"{position}:{size}"]

    def check_heads(self) -> None:
        """Check what is not a tensor: small files, and the headers of large ones, which lie at their beginning.

        Raises:
            CheckpointError: They are not as they were written.
        """
        for name, runs in self._sums.items():
            path = self._root / name
            sizes = [int(run[2:]) for run in runs if re.fullmatch(r"0:\d{1,9}", run)]
            if Path(name).is_absolute() or ".." in Path(name).parts or not sizes or not path.is_file():
                continue
            content = read_range(path, 0, min(sizes[0], _MAX_HEAD))
            self.check(path, 0, sizes[0], zlib.crc32(content), path.name)
            if len(runs) == 1 and path.stat().st_size != sizes[0]:
                raise CheckpointError(f"{path} does not have the {sizes[0]} bytes that were written: {_FIX}")

    def check(self, path: Path, position: int, size: int, found: int, what: str) -> None:
        """Compare the sum of bytes that were just read.

        Raises:
            CheckpointError: They are not the bytes that were written.
        """
        expected = self.expected(path, position, size)
        if expected is not None and expected != written_sum(found):
            raise CheckpointError(
                f"{path}: the bytes of {what!r} are not those that were written ({MANIFEST_NAME} has another crc32): "
                f"{_FIX}"
            )
