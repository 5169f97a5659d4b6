"""From a tensor of the whole model to the parts of it that the ranks of a legacy checkpoint hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from hf_tpp.errors import CheckpointError
from hf_tpp_conversion.files.arrays import read_array, read_into, read_rows
from hf_tpp_conversion.files.dtypes import Array
from hf_tpp_conversion.files.manifest import Manifest
from hf_tpp_conversion.files.stored import StoredArray
from hf_tpp_conversion.files.torch_tensors import array_of
from hf_tpp_conversion.files.torch_zip import TorchArchive
from hf_tpp_conversion.formats.checkpoint import WholeTensor, common_dtype
from hf_tpp_conversion.formats.megatron_legacy_files import RANK_FILES, flatten, rank_folder
from hf_tpp_conversion.formats.megatron_names import EXPERT_FUSED, from_rank_name
from hf_tpp_conversion.layouts import qkv_from_version
from hf_tpp_conversion.model.architecture import Architecture
from hf_tpp_conversion.model.partition import Partition, join, local_shape, padded_vocabulary
from hf_tpp_conversion.model.tensors import HEAD, WORDS, TensorSpec

__all__ = ["Ranks"]


@dataclass(frozen=True, slots=True)
class _Part:
    """A rank's part of a tensor: the array, and which expert's row of it, if it holds several experts."""

    array: StoredArray
    name: str
    row: int | None = None


class Ranks:
    """All rank files of a checkpoint: from a tensor of the whole model to the parts of it that ranks hold."""

    def __init__(self, folder: Path, model: Architecture, partition: Partition, version: float, root: Path) -> None:
        self.folder, self.model, self.partition, self.version = folder, model, partition, version
        self.padded = padded_vocabulary(model.vocab_size, partition)
        self.manifest = Manifest(root)
        self.layer_spec = "local"
        self.old_names = False
        # name in the whole model -> (tp rank, ep rank) -> part
        self.parts: dict[str, dict[tuple[int, int], _Part]] = {}
        self.tied_head: dict[int, _Part] = {}
        layers = partition.layers(model.num_layers)
        for stage, tp_rank, ep_rank in product(range(partition.pp), range(partition.tp), range(partition.ep)):
            self._read_rank(stage, tp_rank, ep_rank, layers[stage])

    def _read_rank(self, stage: int, tp_rank: int, ep_rank: int, chunks: list[range]) -> None:
        rank = self.folder / rank_folder(tp_rank, stage, ep_rank, self.partition)
        files = [rank / name for name in RANK_FILES if (rank / name).is_file()]
        if not files:
            raise CheckpointError(
                f"{rank / RANK_FILES[0]} is missing: the args say tp={self.partition.tp}, pp={self.partition.pp}, "
                f"ep={self.partition.ep}; copy all ranks, or give the right sizes with --arg"
            )
        archive = TorchArchive(files[0])
        content = archive.content()
        for chunk, layers in enumerate(chunks):
            state = content.get("model" if len(chunks) == 1 else f"model{chunk}") if isinstance(content, dict) else None
            if not isinstance(state, dict):
                raise CheckpointError(f"{files[0]} has no chunk {chunk} of the model: pp and vpp do not fit its args")
            for name, value in flatten(state):
                array = array_of(value, archive, name)
                if array is not None:
                    self._add(name, array, tp_rank, ep_rank, layers, stage)

    def _add(self, name: str, array: StoredArray, tp_rank: int, ep_rank: int, layers: range, stage: int) -> None:
        experts = self.model.experts.num_experts // self.partition.ep if self.model.experts else 0
        found = from_rank_name(name, layers.start, ep_rank * experts)
        self.old_names |= found.is_old
        if ".layer_norm_" in name:
            self.layer_spec = "te"
        if found.name == HEAD and self.model.tied:
            self.tied_head[tp_rank] = _Part(array, name)
            return
        if match := EXPERT_FUSED.search(found.name):
            for expert in range(experts):
                whole = EXPERT_FUSED.sub(
                    f".mlp.experts.{ep_rank * experts + expert}.linear_fc{match[1]}.weight", found.name
                )
                self.parts.setdefault(whole, {})[tp_rank, ep_rank] = _Part(array, name, expert)
            return
        previous = self.parts.setdefault(found.name, {}).setdefault((tp_rank, ep_rank), _Part(array, name))
        if previous.array is not array:
            raise CheckpointError(f"{previous.array.file} and {array.file} (stage {stage}) both hold {found.name!r}")

    def whole(self, spec: TensorSpec) -> WholeTensor:
        """A tensor of the whole model.

        Raises:
            CheckpointError: A rank lacks its part, or has one of another shape or type.
        """
        held = self.parts.get(spec.name, {})
        ep_rank = 0
        if spec.expert is not None and self.model.experts:
            ep_rank = spec.expert * self.partition.ep // self.model.experts.num_experts
        parts = [held.get((tp_rank, ep_rank)) for tp_rank in range(self.partition.tp)]
        missing = [tp_rank for tp_rank, part in enumerate(parts) if part is None]
        if missing:
            raise CheckpointError(
                f"{self.folder} lacks {spec.name!r} of tensor-parallel rank {missing[0]}, which its args ask for"
            )
        present = [part for part in parts if part is not None]
        self._check_shapes(spec, present)
        dtype = common_dtype([part.array for part in present], spec.name)
        return WholeTensor(spec, dtype, lambda whole: self._join(spec, present, whole))

    def _check_shapes(self, spec: TensorSpec, parts: list[_Part]) -> None:
        expected = local_shape(spec, self.partition.tp, self.padded)
        for part in parts:
            shape = part.array.shape
            if part.row is not None:
                continue  # all experts in one matrix: checked when it is cut
            if spec.is_vocabulary and shape[1:] == expected[1:] and shape[0] * len(parts) >= spec.shape[0]:
                continue  # padded to another multiple
            if shape != expected:
                raise CheckpointError(
                    f"{part.array.file}: {part.name!r} has shape {list(shape)}, the args ask for {list(expected)}"
                )

    def _join(self, spec: TensorSpec, parts: list[_Part], whole: Array) -> None:
        if len(parts) == 1 and parts[0].row is None and parts[0].array.shape == spec.shape:
            read_into(parts[0].array, [whole], parts[0].name, self.manifest)
            if (upgraded := self._upgraded(whole, spec)) is not whole:
                whole[...] = upgraded
            return
        if spec.dim is None:
            self._replicated(spec, parts, whole)
            return
        for tp_rank, part in enumerate(parts):
            local = self._upgraded(self._read(part, spec), spec)
            join(whole, local, spec, tp_rank, len(parts))

    def _read(self, part: _Part, spec: TensorSpec) -> Array:
        if part.row is None:
            return read_array(part.array, part.name, self.manifest)
        return _one_expert(part, spec, self.partition.tp, self.model)

    def _replicated(self, spec: TensorSpec, parts: list[_Part], first: Array) -> None:
        """A tensor that every tensor-parallel rank holds whole; all must agree."""
        read_into(parts[0].array, [first], parts[0].name, self.manifest)
        other = np.empty_like(first)
        for part in parts[1:]:
            read_into(part.array, [other], part.name, self.manifest)
            if not np.array_equal(first, other):
                raise CheckpointError(
                    f"{parts[0].array.file} and {part.array.file} hold different values of {spec.name!r}, which all "
                    f"tensor-parallel ranks share: these are not files of one checkpoint"
                )

    def _upgraded(self, local: Array, spec: TensorSpec) -> Array:
        """Query, key and value of an old checkpoint in today's order."""
        is_old = self.old_names and self.version < 2 and ".linear_qkv." in spec.name
        return qkv_from_version(local, self.version, self.model.kv_channels) if is_old else local

    def refuse_leftovers(self, specs: Mapping[str, TensorSpec]) -> None:
        """Refuse tensors that the args do not ask for, and a copy of a tied embedding that differs from it.

        Raises:
            CheckpointError: There are such.
        """
        left = [name for name in self.parts if name not in specs and not name.endswith("rotary_pos_emb.inv_freq")]
        if left:
            part = next(iter(self.parts[left[0]].values()))
            raise CheckpointError(
                f"{part.array.file} holds {part.name!r}, which a model of its args does not have ({len(left)} such): "
                f"correct the args with --arg"
            )
        for tp_rank, copy in self.tied_head.items():
            words = self.parts.get(WORDS, {}).get((tp_rank, 0))
            if words is None or words.array.shape != copy.array.shape or not _same_bits(words.array, copy.array):
                raise CheckpointError(f"{copy.array.file}: {copy.name!r} is tied to the embedding but differs from it")


def _one_expert(part: _Part, spec: TensorSpec, tp: int, model: Architecture) -> Array:
    """One expert of the grouped matrices of older Megatrons: weight1 [h, E 2n/tp], weight2 [E n/tp, h], transposed."""
    assert model.experts is not None
    assert part.row is not None
    is_first = ".linear_fc1." in spec.name
    hidden, width = model.hidden_size, spec.shape[0 if is_first else 1] // tp
    held = _size_of(part.array.shape) // (hidden * width)
    expected = (hidden, held * width) if is_first else (held * width, hidden)
    if part.array.shape != expected or part.row >= held:
        raise CheckpointError(f"{part.array.file}: {part.name!r} has shape {list(part.array.shape)}, no experts' shape")
    # Megatron views the memory of weight1 as [E, h, 2n/tp] and that of weight2 as [E, n/tp, h].
    shape = (held, hidden, width) if is_first else (held, width, hidden)
    array = StoredArray(part.array.file, part.array.start(), shape, part.array.dtype)
    return np.ascontiguousarray(read_rows(array, part.row, part.name).T)


def _size_of(shape: tuple[int, ...]) -> int:
    """Elements of an array."""
    return int(np.prod(shape, dtype=np.int64))


def _same_bits(a: StoredArray, b: StoredArray) -> bool:
    return all(bool((read_rows(a, row, "") == read_rows(b, row, "")).all()) for row in range(a.shape[0]))
