"""Hostile and damaged files are refused at once, name the file, and run nothing."""

import contextlib
import io
import json
import os
import pickle
import re
import resource
import struct
import subprocess
import sys
import time
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from hf_tpp.errors import CheckpointError, HfTppError, UnsupportedModelError
from hf_tpp_conversion import Conversion, Partition, convert, inspect
from hf_tpp_conversion.files.manifest import MANIFEST_NAME
from hf_tpp_conversion.files.pickle_writing import write_pickle
from hf_tpp_conversion.files.pickles import read_pickle
from tests.conversion.models import architecture, write_hf

ROOT = Path(__file__).parents[2]
SECONDS, MEGABYTES = 1.0, 200


class Canary:
    """Unpickling it the ordinary way leaves a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def hf(tmp_path):
    return write_hf(tmp_path / "hf", "llama", architecture("llama"))


@pytest.fixture
def legacy(hf, tmp_path):
    convert(Conversion(hf, tmp_path / "legacy", "megatron", "legacy", partition=Partition(tp=2)))
    return tmp_path / "legacy"


@pytest.fixture
def torch_dist(hf, tmp_path):
    convert(Conversion(hf, tmp_path / "dist", "megatron", "torch_dist", partition=Partition(tp=2)))
    return tmp_path / "dist"


def resident(line):
    """Megabytes of this process: VmRSS now, VmHWM the most since it was reset."""
    return int(re.search(rf"^{line}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)[1]) / 1024


@contextlib.contextmanager
def within_limits():
    """What is done inside takes little time and memory."""
    measures_memory = Path("/proc/self/clear_refs").exists()
    if measures_memory:
        Path("/proc/self/clear_refs").write_text("5")  # the most memory from here on
        before = resident("VmRSS")
    start = time.process_time()
    yield
    assert time.process_time() - start < SECONDS
    if measures_memory:
        assert resident("VmHWM") - before < MEGABYTES


def spin(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_the_limits_are_measured():
    with pytest.raises(AssertionError), within_limits():
        b"x" * (2 * MEGABYTES * 2**20)
    with pytest.raises(AssertionError), within_limits():
        spin(1.5 * SECONDS)


def refused(path, words, tmp_path, error=CheckpointError):
    """Converting is refused within the limits, with the words, and nothing is written."""
    with within_limits(), pytest.raises(error) as caught:
        convert(Conversion(path, tmp_path / "never", "hf" if path.name != "hf" else "megatron"))
    assert words in str(caught.value), str(caught.value)
    assert not any("never" in path.name for path in tmp_path.iterdir())


def rank_file(legacy):
    return legacy / "release" / "mp_rank_00" / "model_optim_rng.pt"


def test_a_pickle_that_runs_a_command(legacy, tmp_path):
    canary = tmp_path / "canary"
    content = {"args": Canary(canary), "model": {"embedding.word_embeddings.weight": torch.zeros(2, 2)}}
    torch.save(content, rank_file(legacy))
    with within_limits(), pytest.raises(HfTppError):
        inspect(legacy)
    assert not canary.exists()
    os.system(f"touch {canary}-works")  # the canary would sing
    assert Path(f"{canary}-works").exists()


def test_metadata_that_runs_a_command(torch_dist, tmp_path):
    canary = tmp_path / "canary"
    (torch_dist / "release" / ".metadata").write_bytes(pickle.dumps(Canary(canary)))
    refused(torch_dist, ".metadata", tmp_path)
    assert not canary.exists()


def test_unknown_globals_become_inert(legacy, tmp_path):
    """A harmless checkpoint with objects of modules that do not exist here is read; nothing is imported."""
    path = rank_file(legacy)
    content = torch.load(path, weights_only=False)
    module = type(sys)("module_of_theirs")
    module.Thing = type("Thing", (), {"__module__": "module_of_theirs"})
    sys.modules["module_of_theirs"] = module
    thing = module.Thing()
    thing.x = 1
    torch.save(content | {"rerun_state_machine": thing}, path)
    del sys.modules["module_of_theirs"]
    (legacy / MANIFEST_NAME).unlink()
    convert(Conversion(legacy, tmp_path / "out", "hf"))
    assert "module_of_theirs" not in sys.modules


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x80\x02r\xff\xff\xff\xff.", "IndexError"),  # a memo of 4 billion entries
        (b"\x80\x02cos\nsystem\n", "before seeing STOP"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fx.", "no valid pickle"),  # bytes of 9 exabytes
        (b"\x80\x02ios\nsystem\n.", "INST"),
        (b"\x80\x02}((NNtNu.", "as a key"),
        (b"\x80\x02}(X\x01\x00\x00\x00aNX\x01\x00\x00\x00aNu.", "twice"),
        (b"\x80\x02" + b"]" * 2_000_000 + b".", "piles up"),
        (b"\x80\x02" + b"]0" * 1_000_000 + b"].", "pickle instructions"),
        (b"garbage", "no valid pickle"),
    ],
)
def test_pickle_bombs(content, words):
    with within_limits(), pytest.raises(CheckpointError) as caught:
        read_pickle(content, "some file")
    assert words in str(caught.value)
    assert "some file" in str(caught.value)


def test_a_manifest_of_another_format(legacy, tmp_path):
    path = legacy / MANIFEST_NAME
    path.write_text(path.read_text().replace('"format": 2', '"format": 1'))
    refused(legacy, "has the format '1', 2 is read here", tmp_path)


def test_python_reads_what_is_written_and_the_other_way_round():
    value = {"a": [1, 2.5, None, True, "ä", -(2**40)], "b": (1, (2,)), "n": Namespace(x=1)}
    assert pickle.loads(write_pickle(value)) == value
    plain = {key: value[key] for key in ("a", "b")}
    for protocol in (2, 3, 4, 5):
        assert read_pickle(pickle.dumps(plain, protocol), "x") == plain


def test_a_namespace_with_impossible_sizes(legacy, tmp_path):
    path = rank_file(legacy)
    content = torch.load(path, weights_only=False)
    content["args"].num_layers = 10**12
    torch.save(content, path)
    for file in (legacy / "huggingface").iterdir():
        file.unlink()
    refused(legacy, "num_layers", tmp_path, UnsupportedModelError)


def test_missing_args_name_the_flag(legacy, tmp_path):
    for file in legacy.glob("release/*/*.pt"):
        content = torch.load(file, weights_only=False)
        del content["args"].num_layers
        torch.save(content, file)
    for file in (legacy / "huggingface").iterdir():
        file.unlink()
    refused(legacy, "--arg num_layers=VALUE", tmp_path, UnsupportedModelError)
    (legacy / MANIFEST_NAME).unlink()
    convert(Conversion(legacy, tmp_path / "out", "hf", args={"num_layers": 4}))


def test_a_compressed_archive(legacy, tmp_path):
    path = rank_file(legacy)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("m/data.pkl", b"\x80\x02}.")
        file.writestr("m/data/0", b"\0" * 2**28)
    refused(legacy, "compressed", tmp_path)


def test_a_tensor_larger_than_its_storage(legacy, tmp_path):
    path = rank_file(legacy)
    content = torch.load(path, weights_only=False)
    content["model"]["embedding.word_embeddings.weight"] = torch.zeros(1).expand(2**40)
    torch.save(content, path)
    refused(legacy, "does not fit its storage", tmp_path)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "a/b.safetensors", "..", "x\0.safetensors", "x.bin"]
)
def test_a_weight_map_that_leaves_the_folder(hf, tmp_path, name):
    (hf / "model.safetensors").unlink()
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    refused(hf, "only plain file names are opened", tmp_path)


def test_a_link_that_leaves_the_folder(hf, tmp_path):
    (hf / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (hf / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    refused(hf, "outside the checkpoint", tmp_path)


def test_a_missing_shard(hf, tmp_path):
    (hf / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(hf, "model-00001-of-00002.safetensors", tmp_path)


def test_repeated_keys(hf, tmp_path):
    header = (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    )
    (hf / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"x")
    refused(hf, "names 'a' twice", tmp_path)


def header_of(entries):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def entry(begin, end, shape=None, dtype="U8"):
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("entries", "data", "words"),
    [
        ({"a": entry(0, 2), "b": entry(1, 3)}, 3, "overlaps another one"),
        ({"a": entry(0, 2), "b": entry(3, 4)}, 4, "leaves a hole"),
        ({"a": entry(0, 2)}, 5, "its header accounts for"),
        ({"a": entry(0, 8)}, 3, "its header accounts for"),
        ({"a": entry(0, 2, dtype="I3")}, 2, "has the type 'I3'"),
        ({"a": entry(0, 2, [2**62, 2**62])}, 2, "needs"),
        ({"a": entry(0, 2, [-1, -2])}, 2, "is damaged"),
        ({"a": entry(0, 2, [True, 2])}, 2, "is damaged"),
        ({"a": [1, 2]}, 2, "is damaged"),
        ({"../../a": entry(0, 2)}, 2, "without slashes"),
        ({"a\0b": entry(0, 2)}, 2, "printable"),
        ({"a\x1b[2J": entry(0, 2)}, 2, "printable"),
        ({str(number): entry(0, 0, [0]) for number in range(150_000)}, 0, "lists and objects"),
        ([1, 2], 0, "an object is needed"),
    ],
)
def test_headers_that_lie(hf, tmp_path, entries, data, words):
    (hf / "model.safetensors").write_bytes(header_of(entries) + b"x" * data)
    refused(hf, words, tmp_path)


def test_900000_empty_tensors(hf, tmp_path):
    (hf / "model.safetensors").write_bytes(header_of({str(number): entry(0, 0, [0]) for number in range(900_000)}))
    refused(hf, "says that its header has", tmp_path)


def test_a_huge_header(hf, tmp_path):
    (hf / "model.safetensors").write_bytes(struct.pack("<Q", 2**40) + b"{}")
    refused(hf, "says that its header has", tmp_path)


def test_a_wrong_shape(hf, tmp_path):
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))
    refused(hf, "gate_proj", tmp_path)


def test_a_missing_rank(legacy, tmp_path):
    rank_file(legacy).unlink()
    refused(legacy, "mp_rank_00", tmp_path)


def test_a_chunk_file_that_is_missing(torch_dist, tmp_path):
    (torch_dist / "release" / "__1_0.distcp").unlink()
    refused(torch_dist, "__1_0.distcp", tmp_path)


@pytest.mark.parametrize("kind", ["hf", "legacy", "torch_dist"])
def test_a_flipped_bit_is_found_by_the_manifest(kind, legacy, torch_dist, tmp_path):
    convert(Conversion(legacy, tmp_path / "from", "hf"))
    root = {"hf": tmp_path / "from", "legacy": legacy, "torch_dist": torch_dist}[kind]
    path = max((p for p in root.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    runs = json.loads((root / MANIFEST_NAME).read_text())["files"][path.relative_to(root).as_posix()]
    position = max(int(run.partition(":")[0]) for run in runs)
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    with within_limits(), pytest.raises(CheckpointError, match="another crc32") as caught:
        convert(Conversion(root, tmp_path / "never", "megatron"))
    assert path.name in str(caught.value)
    assert not (tmp_path / "never").exists()


def test_pickled_weights_only_when_asked_for(hf, tmp_path):
    from safetensors.torch import load_file

    torch.save(load_file(hf / "model.safetensors"), hf / "pytorch_model.bin")
    (hf / "model.safetensors").unlink()
    refused(hf, "--allow-bin", tmp_path)
    convert(Conversion(hf, tmp_path / "out", "megatron", allow_bin=True))


def test_unknown_families_are_refused_by_name(hf, tmp_path):
    config = json.loads((hf / "config.json").read_text())
    for kind, words in [("gemma", "square root"), ("falcon", "side by side"), ("bert", "11 families are")]:
        (hf / "config.json").write_text(json.dumps(config | {"model_type": kind}))
        refused(hf, words, tmp_path, UnsupportedModelError)


def run(arguments, **options):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'conversion'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hf_tpp.cli", *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_a_full_disk_leaves_nothing(hf, tmp_path):
    before = (hf / "model.safetensors").read_bytes()

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # no file may grow further: the write fails

    process = run(["convert", hf, tmp_path / "out", "--to", "megatron", "--json"], preexec_fn=limit)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "bytes are needed" in json.loads(output)["message"]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert (hf / "model.safetensors").read_bytes() == before
    convert(Conversion(hf, tmp_path / "out", "megatron"))


def test_a_killed_conversion_leaves_no_destination_and_the_next_one_succeeds(tmp_path):
    source = write_hf(tmp_path / "hf", "llama", architecture("llama", layers=4, heads=64, groups=64, channels=16))
    process = run(["convert", source, tmp_path / "out", "--to", "megatron", "--json"])
    partial = tmp_path / "out.partial-hf_tpp"
    while process.poll() is None and not any(partial.glob("release/*.distcp")):
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert process.returncode == -9
    assert partial.is_dir()
    assert not (tmp_path / "out").exists()
    convert(Conversion(source, tmp_path / "out", "megatron"))
    assert not partial.exists()
    assert inspect(tmp_path / "out")["tensors"] == inspect(source)["tensors"]


def test_an_existing_destination_is_kept(hf, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(HfTppError, match="--overwrite"):
        convert(Conversion(hf, tmp_path / "out", "megatron"))
    assert (tmp_path / "out" / "mine").read_text() == "precious"
    convert(Conversion(hf, tmp_path / "out", "megatron", overwrite=True))
    assert not (tmp_path / "out" / "mine").exists()


def test_an_archive_that_torch_wrote_is_read_as_torch_reads_it(tmp_path):
    from hf_tpp_conversion.files.arrays import read_array
    from hf_tpp_conversion.files.torch_tensors import array_of
    from hf_tpp_conversion.files.torch_zip import TorchArchive

    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.tensor(3)}
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    (tmp_path / "x.pt").write_bytes(buffer.getvalue())
    archive = TorchArchive(tmp_path / "x.pt")
    for name, value in archive.content().items():
        stored = array_of(value, archive, name)
        assert stored is not None
        read = torch.from_numpy(read_array(stored, name)).view(tensors[name].dtype)
        assert torch.equal(read, tensors[name])
