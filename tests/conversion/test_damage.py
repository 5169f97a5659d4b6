"""Files that are damaged anywhere: a named error, or the same model; never another traceback, never a hang."""

import random
import shutil
from pathlib import Path

import pytest

from hf_tpp.errors import HfTppError
from hf_tpp_conversion import Conversion, Partition, convert
from hf_tpp_conversion.files.manifest import MANIFEST_NAME
from tests.conversion.models import architecture, bits, write_hf


def write(root: Path, kind: str) -> Path:
    """A small checkpoint of a kind that we wrote, so that it has a manifest."""
    source = write_hf(root / "hf", "mixtral", architecture("mixtral", layers=2, vocab=33))
    if kind == "hf":
        convert(Conversion(source, root / "first", "megatron"))
        convert(Conversion(root / "first", root / "good", "hf", max_shard_size=30_000))
    else:
        convert(Conversion(source, root / "good", "megatron", kind, partition=Partition(tp=2, ep=2)))
    return root / "good"


def damage(content: bytes, generator: random.Random) -> bytes:
    """Cut off, or one to three bytes changed, or bytes repeated."""
    changed = bytearray(content)
    way = generator.randrange(4)
    if way == 0:
        return content[: generator.randrange(len(content))]
    if way == 1:
        start = generator.randrange(len(content))
        return content[:start] + content[start : start + 16] + content[start:]
    for _ in range(generator.randrange(1, 4)):
        changed[generator.randrange(len(content))] ^= (
            1 << generator.randrange(8) if way == 2 else generator.randrange(256)
        )
    return bytes(changed)


def survives(root: Path, good: Path, expected, count: int, seed: int, keep_manifest: bool) -> list[str]:
    """What went wrong in `count` damages of every file that is not a side file."""
    generator = random.Random(seed)
    broken = []
    for path in sorted(path for path in good.rglob("*") if path.is_file() and path.name != "tokenizer.json"):
        name = path.relative_to(good)
        for number in range(count):
            bad, out = root / "bad", root / "out"
            shutil.copytree(good, bad)
            content = damage(path.read_bytes(), generator)
            (bad / name).write_bytes(content)
            if not keep_manifest:
                (bad / MANIFEST_NAME).unlink()
            try:
                convert(Conversion(bad, out, "hf", family="mixtral"))
                if keep_manifest and bits(out) != expected:
                    broken.append(f"{name} {number}: other values without a word")
            except HfTppError:
                if out.exists():
                    broken.append(f"{name} {number}: refused, but a destination is there")
            except Exception as error:
                broken.append(f"{name} {number}: {type(error).__name__}: {error}")
            shutil.rmtree(bad)
            shutil.rmtree(out, ignore_errors=True)
    return broken


@pytest.mark.parametrize("kind", ["hf", "legacy", "torch_dist"])
def test_damaged_files(tmp_path, kind):
    good = write(tmp_path, kind)
    assert survives(tmp_path, good, bits(tmp_path / "hf"), 2, 0, keep_manifest=True) == []


@pytest.mark.slow
@pytest.mark.parametrize("keep_manifest", [True, False])
@pytest.mark.parametrize("kind", ["hf", "legacy", "torch_dist"])
def test_files_damaged_in_many_ways(tmp_path, kind, keep_manifest):
    good = write(tmp_path, kind)
    assert survives(tmp_path, good, bits(tmp_path / "hf"), 60, 1, keep_manifest) == []
