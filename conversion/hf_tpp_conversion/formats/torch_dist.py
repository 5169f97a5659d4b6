"""Megatron's torch_dist format: tensors in chunks, independent of the layout that wrote them.

    release/metadata.json      {"sharded_backend": "torch_dist", ...}
    release/.metadata          a pickle: key -> shape, chunks, places
    release/common.pt          args, checkpoint_version, iteration
    release/__0_0.distcp       archives of torch.save, one per chunk, one behind the other

Megatron 0.19 and newer may keep the common part in the chunks (`common_state/shard_0_1`): it is read in both forms.
"""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hf_tpp.errors import CheckpointError
from hf_tpp_conversion.configs.megatron_partition import partition_from_args
from hf_tpp_conversion.files.arrays import read_into
from hf_tpp_conversion.files.dtypes import FLOATS, Array
from hf_tpp_conversion.files.manifest import Manifest
from hf_tpp_conversion.files.stored import StoredArray
from hf_tpp_conversion.files.torch_tensors import array_of
from hf_tpp_conversion.files.torch_zip import TorchArchive
from hf_tpp_conversion.formats.checkpoint import Checkpoint, WholeTensor
from hf_tpp_conversion.formats.huggingface_files import inside
from hf_tpp_conversion.formats.megatron_common import describe
from hf_tpp_conversion.formats.megatron_folder import find_iteration, plain_args
from hf_tpp_conversion.formats.torch_dist_metadata import Chunk, StoredTensor, read_metadata
from hf_tpp_conversion.formats.torch_dist_names import keys_of
from hf_tpp_conversion.model.architecture import Architecture
from hf_tpp_conversion.model.tensors import TensorSpec, tensor_specs

__all__ = ["open_torch_dist", "read_common"]

_OTHERS = (
    "optimizer.",
    "rng_state",
    "opt_param_scheduler",
    "rerun_state_machine",
    "common_state",
    "chained_",
    "content_metadata",
)
_MAX_LISTED = 1_000_000  # chunks, each counted once for every layer and expert in it


def read_common(folder: Path) -> dict[str, Any]:
    """The plain args of a checkpoint; empty where it has no common.pt.

    Raises:
        CheckpointError: common.pt is damaged or hostile.
    """
    if not (folder / "common.pt").is_file():
        return {}
    content = TorchArchive(inside(folder, "common.pt", "the checkpoint")).content()
    return plain_args(content.get("args")) if isinstance(content, dict) else {}


def open_torch_dist(path: Path, given: Mapping[str, Any] | None = None, config: Path | None = None) -> Checkpoint:
    """Open a checkpoint: everything is checked but the values.

    Args:
        path: The folder, or its iteration.
        given: Args of the command line, for those that the checkpoint lacks.
        config: A config.json for a checkpoint that does not describe itself.

    Raises:
        CheckpointError: Files that are damaged, missing, hostile, or do not hold what the args say.
        UnsupportedModelError: No model that can be converted.
    """
    folder = find_iteration(path)
    root = path if folder != path else folder.parent
    stored = read_metadata(folder / ".metadata")
    found = describe(root, read_common(folder), given or {}, config)
    reader = _Reader(folder, found.model, stored, Manifest(root))
    specs = tensor_specs(found.model)
    tensors = {name: reader.whole(spec) for name, spec in specs.items()}
    reader.refuse_leftovers()
    partition = partition_from_args({k: v for k, v in found.args.items() if v is not None}, found.model.num_layers)
    layer_spec = "local" if found.args.get("transformer_impl") == "local" else "te"
    return Checkpoint(
        "torch_dist", folder, found.model, tensors, partition, layer_spec, found.family, found.args, found.hf_files
    )


class _Reader:
    """From a tensor of the whole model to the chunks that cover it."""

    def __init__(
        self, folder: Path, model: Architecture, stored: Mapping[str, StoredTensor], manifest: Manifest
    ) -> None:
        self.folder, self.model, self.manifest = folder, model, manifest
        self.stored = {key.removeprefix("model."): tensor for key, tensor in stored.items()}
        self.used: set[str] = set()
        self._files: set[str] = set()
        self._listed = 0
        # key -> indices into the leading dimensions -> chunks
        self._rows: dict[tuple[str, int], dict[tuple[int, ...], list[Chunk]]] = {}

    def whole(self, spec: TensorSpec) -> WholeTensor:
        for key, indices in keys_of(spec, self.model):
            tensor = self.stored.get(key)
            if tensor is not None and len(tensor.shape) == len(indices) + len(spec.shape):
                break
        else:
            raise CheckpointError(f"{self.folder} lacks {spec.name!r}, which its args ask for")
        self.used.add(key)
        own = tensor.shape[len(indices) :]
        fits = own[1:] == spec.shape[1:] and own[0] >= spec.shape[0] if spec.is_vocabulary else own == spec.shape
        if not fits or any(index >= size for index, size in zip(indices, tensor.shape, strict=False)):
            raise CheckpointError(
                f"{self.folder}: {key!r} has shape {list(tensor.shape)}, the args ask for {list(spec.shape)} "
                f"at {indices}"
            )
        chunks = self._covering(key, tensor, indices)
        self._check(key, chunks, len(indices), own)
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{self.folder / '.metadata'}: {key!r} has the type {tensor.dtype}: no weights have it"
            )
        return WholeTensor(spec, tensor.dtype, lambda whole: self._read(spec, tensor, chunks, indices, key, whole))

    def _covering(self, key: str, tensor: StoredTensor, indices: tuple[int, ...]) -> list[Chunk]:
        """The chunks that hold anything of the tensor at `indices`."""
        depth = len(indices)
        rows = self._rows.get((key, depth))
        if rows is None:
            rows = self._rows[key, depth] = {}
            for chunk in tensor.chunks:
                spans = (range(o, o + s) for o, s in zip(chunk.offsets[:depth], chunk.sizes[:depth], strict=True))
                self._listed += math.prod(chunk.sizes[:depth])
                if self._listed > _MAX_LISTED:
                    raise CheckpointError(
                        f"{self.folder / '.metadata'}: the chunks of {key!r} and others are more than {_MAX_LISTED}: "
                        f"get the checkpoint again"
                    )
                for place in itertools.product(*spans):
                    rows.setdefault(place, []).append(chunk)
        return rows.get(indices, [])

    def _check(self, key: str, chunks: list[Chunk], depth: int, shape: tuple[int, ...]) -> None:
        """The chunks must cover the tensor exactly once, and their files must be there and long enough."""
        covered = sum(math.prod(chunk.sizes[depth:]) for chunk in chunks)
        if covered != math.prod(shape) or _overlap(chunks, depth):
            raise CheckpointError(
                f"{self.folder / '.metadata'}: the chunks of {key!r} hold {covered} of its {math.prod(shape)} values, "
                f"or overlap: get the checkpoint again"
            )
        for chunk in chunks:
            if chunk.file not in self._files:
                inside(self.folder, chunk.file, ".metadata", ".distcp")
                self._files.add(chunk.file)

    def _read(
        self,
        spec: TensorSpec,
        tensor: StoredTensor,
        chunks: list[Chunk],
        indices: tuple[int, ...],
        key: str,
        whole: Array,
    ) -> None:
        depth = len(indices)
        for chunk in chunks:
            array = self._array(chunk, tensor, key)
            sizes = tuple(
                min(s, n - o) for s, n, o in zip(chunk.sizes[depth:], spec.shape, chunk.offsets[depth:], strict=True)
            )
            if min(sizes, default=1) <= 0:
                continue  # padding only
            target = whole[tuple(slice(o, o + s) for o, s in zip(chunk.offsets[depth:], sizes, strict=True))]
            if target.shape == chunk.sizes[depth:] and math.prod(chunk.sizes[:depth]) == 1:
                read_into(array, [target], key, self.manifest)  # straight into place
                continue
            values = np.empty(chunk.sizes, whole.dtype)
            read_into(array, [values], key, self.manifest)
            inner = values[tuple(i - o for i, o in zip(indices, chunk.offsets[:depth], strict=True))]
            target[...] = inner[tuple(slice(0, size) for size in sizes)]

    def _array(self, chunk: Chunk, tensor: StoredTensor, key: str) -> StoredArray:
        archive = TorchArchive(self.folder / chunk.file, chunk.position, chunk.length)
        array = array_of(archive.content(), archive, key)
        if array is None or array.dtype != tensor.dtype or math.prod(array.shape) != math.prod(chunk.sizes):
            raise CheckpointError(
                f"{self.folder / chunk.file}: the chunk of {key!r} at byte {chunk.position} is not the "
                f"{list(chunk.sizes)} tensor that .metadata promises"
            )
        return array

    def refuse_leftovers(self) -> None:
        """Refuse weights that the args do not ask for; optimizer and random state are left behind.

        Raises:
            CheckpointError: There are such.
        """
        left = [key for key in self.stored if key not in self.used and not key.startswith(_OTHERS)]
        if left:
            raise CheckpointError(
                f"{self.folder / '.metadata'} has {left[0]!r}, which a model of its args does not have "
                f"({len(left)} such keys): correct the args with --arg"
            )


def _overlap(chunks: list[Chunk], depth: int) -> bool:
    """Whether two of the boxes have a value in common."""
    starts = np.array([chunk.offsets[depth:] for chunk in chunks], dtype=np.int64)
    stops = starts + np.array([chunk.sizes[depth:] for chunk in chunks], dtype=np.int64)
    for index in range(len(chunks) - 1):
        apart = (stops[index + 1 :] <= starts[index]) | (starts[index + 1 :] >= stops[index])
        if not apart.any(axis=1).all():
            return True
    return False
