"""The files of a Hugging Face folder: which they are, and which tensors they hold; nothing outside is opened."""

from collections.abc import Callable
from pathlib import Path

from hf_tpp.errors import CheckpointError
from hf_tpp_conversion.files.json_reading import read_json
from hf_tpp_conversion.files.safetensors import read_safetensors
from hf_tpp_conversion.files.stored import StoredArray
from hf_tpp_conversion.files.torch_tensors import array_of
from hf_tpp_conversion.files.torch_zip import TorchArchive

__all__ = ["INDEX", "MEGATRON_ARGS", "SIDE_FILES", "SINGLE", "inside", "list_hf_tensors"]

MEGATRON_ARGS = "megatron_args.json"
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_BIN_INDEX, _BIN_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
_MAX_FILES = 10_000


def list_hf_tensors(folder: Path, allow_bin: bool = False) -> dict[str, StoredArray]:
    """All tensors of a folder, from headers and indexes alone.

    Raises:
        CheckpointError: No checkpoint, or one that contradicts itself or leaves the folder.
    """
    if (folder / SINGLE).is_file():
        return read_safetensors(inside(folder, SINGLE, "the checkpoint"))
    if (folder / INDEX).is_file():
        return _list_sharded(folder, INDEX, ".safetensors", read_safetensors)
    if not (folder / _BIN_SINGLE).is_file() and not (folder / _BIN_INDEX).is_file():
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}: it is no Hugging Face checkpoint")
    if not allow_bin:
        raise CheckpointError(
            f"{folder} has pickled weights only: pass --allow-bin to read them (nothing in them is run)"
        )
    if (folder / _BIN_SINGLE).is_file():
        return _read_bin(inside(folder, _BIN_SINGLE, "the checkpoint"))
    return _list_sharded(folder, _BIN_INDEX, ".bin", _read_bin)


def _list_sharded(
    folder: Path, index: str, suffix: str, read: Callable[[Path], dict[str, StoredArray]]
) -> dict[str, StoredArray]:
    """The tensors of several files; the index and the files must agree."""
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{folder / index} has no 'weight_map' from tensors to files: download it again")
    files = sorted(set(weight_map.values()))
    if len(files) > _MAX_FILES:
        raise CheckpointError(f"{folder / index} names {len(files)} files, at most {_MAX_FILES} are read")
    paths = {name: inside(folder, name, index, suffix) for name in files}
    stored: dict[str, StoredArray] = {}
    for name, path in paths.items():
        for key, tensor in read(path).items():
            if key in stored:
                raise CheckpointError(f"tensor {key!r} is in {stored[key].file} and in {path}: delete the wrong one")
            if weight_map.get(key) != name:
                raise CheckpointError(f"{path} holds tensor {key!r}, which {index} does not place there")
            stored[key] = tensor
    for key, name in weight_map.items():
        if key not in stored:
            raise CheckpointError(
                f"{folder / index} places tensor {key!r} in {name}, which has none: download it again"
            )
    return stored


def _read_bin(path: Path) -> dict[str, StoredArray]:
    archive = TorchArchive(path)
    content = archive.content()
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no mapping from names to tensors")
    arrays = {str(name): array_of(value, archive, str(name)) for name, value in content.items()}
    return {name: array for name, array in arrays.items() if array is not None}


def inside(folder: Path, name: str, source: str, suffix: str = "") -> Path:
    """The file `name` of `folder`; never one elsewhere, except where the hub's cache keeps what it links to.

    Raises:
        CheckpointError: The name is no plain file name, or its file is missing or elsewhere.
    """
    if name != Path(name).name or "\\" in name or "\0" in name or not name.endswith(suffix) or name in ("", ".", ".."):
        raise CheckpointError(f"{folder}: {source} names the file {name[:80]!r}: only plain file names are opened")
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{source} needs the file {name}, which {folder} does not have: download it again")
    home = folder.resolve()
    parents = {home, home.parents[1] / "blobs"} if home.parent.name == "snapshots" else {home}
    if path.resolve().parent not in parents:
        raise CheckpointError(f"{path} is a link to {path.resolve()}, outside the checkpoint: copy the file into it")
    return path
