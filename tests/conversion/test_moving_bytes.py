"""Bytes between files and arrays: bands, places that are not contiguous, and syncs that fail."""

import errno
from pathlib import Path

import numpy as np
import pytest

from hf_tpp.errors import CheckpointError
from hf_tpp_conversion import Conversion, convert
from hf_tpp_conversion.files import syncing
from hf_tpp_conversion.files.arrays import read_into
from hf_tpp_conversion.files.bands import BAND, bands
from hf_tpp_conversion.files.stored import StoredArray
from tests.conversion.models import architecture, write_hf

SIZE = BAND + BAND // 2 + 6
VIEWS = {
    "contiguous": lambda: np.empty((3, SIZE // 2), np.uint16),
    "one row of a cut": lambda: np.empty((1, 2, SIZE), np.uint8)[:, 1:],
    "transposed": lambda: np.empty((1200, 2500), np.uint16).T,
    "columns": lambda: np.empty((2500, 1200), np.uint32)[:, 100:1000],
    "heads of groups": lambda: np.empty((4, 3, 700, 500), np.uint16)[:, 1:2],
    "a row that is too large": lambda: np.empty((2, 3, 2 * SIZE), np.uint8)[:, ::2, ::2],
    "one number": lambda: np.empty((), np.uint32),
    "nothing": lambda: np.empty((0, 5), np.uint32),
}


@pytest.mark.parametrize("kind", VIEWS)
def test_a_file_is_read_into_any_view_and_back_in_bands(tmp_path, kind):
    target = VIEWS[kind]()
    content = np.random.default_rng(0).integers(0, 256, 5 + target.nbytes, dtype=np.uint8).tobytes()
    (tmp_path / "file").write_bytes(content)
    dtype = {1: "U8", 2: "BF16", 4: "F32"}[target.itemsize]
    read_into(StoredArray(tmp_path / "file", 5, target.shape, dtype), [target], kind)
    assert target.tobytes() == content[5:]
    found = list(bands([target]))
    assert all(0 < band.nbytes <= BAND for band in found)
    assert b"".join(band.tobytes() for band in found) == content[5:]


def test_several_views_follow_one_another_in_the_file(tmp_path):
    content = np.random.default_rng(0).integers(0, 2**16, (12, 4), dtype=np.uint16)
    content.tofile(tmp_path / "file")
    whole = np.zeros((3, 4, 4), np.uint16)
    read_into(StoredArray(tmp_path / "file", 0, (12, 4), "BF16"), [whole[:, :2], whole[:, 2:3], whole[:, 3:]], "qkv")
    assert (np.concatenate([whole[:, :2].reshape(-1, 4), whole[:, 2], whole[:, 3]]) == content).all()


@pytest.mark.parametrize("succeed", [0, 1])
def test_a_sync_that_fails_while_files_are_written_leaves_nothing(tmp_path, monkeypatch, succeed):
    """A later sync would report success: the system tells of a failure once."""
    source = write_hf(tmp_path / "hf", "llama", architecture("llama"))
    calls: list[Path] = []

    def sync(path: Path) -> None:
        calls.append(path)
        if len(calls) > succeed:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(syncing, "sync_and_forget", sync)
    monkeypatch.setattr(syncing, "_AFTER", 1)
    with pytest.raises(CheckpointError, match="could not be written"):
        convert(Conversion(source, tmp_path / "out", "megatron"))
    assert calls
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
