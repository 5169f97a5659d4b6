"""Hugging Face folders: config.json, safetensors files, and what lies beside them."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from hf_tpp.errors import CheckpointError
from hf_tpp_conversion.families import Family, family_of_config
from hf_tpp_conversion.files.arrays import read_into, read_rows
from hf_tpp_conversion.files.dtypes import Array
from hf_tpp_conversion.files.json_reading import read_json
from hf_tpp_conversion.files.manifest import Manifest
from hf_tpp_conversion.files.stored import StoredArray
from hf_tpp_conversion.formats.checkpoint import Checkpoint, WholeTensor, common_dtype
from hf_tpp_conversion.formats.huggingface_files import MEGATRON_ARGS, SIDE_FILES, list_hf_tensors
from hf_tpp_conversion.model.architecture import Architecture
from hf_tpp_conversion.model.tensors import HEAD, WORDS, TensorSpec, tensor_specs
from hf_tpp_conversion.names import Row, fused_expert_names

__all__ = ["open_huggingface"]

_SHOWN = 6


def open_huggingface(folder: Path, allow_bin: bool = False) -> Checkpoint:
    """Open a folder: everything is checked but the values.

    Args:
        folder: The folder.
        allow_bin: Read pytorch_model.bin (as inert data) where there are no safetensors.

    Raises:
        CheckpointError: Files that are damaged, missing, hostile, or do not hold what config.json says.
        UnsupportedModelError: A model that Megatron cannot represent.
    """
    config = read_json(folder / "config.json")
    family, model = family_of_config(config, str(folder / "config.json"))
    stored = list_hf_tensors(folder, allow_bin)
    manifest = Manifest(folder)
    reader = _Reader(family, model, stored, manifest, folder)
    tensors = {name: reader.whole(spec) for name, spec in tensor_specs(model).items()}
    reader.refuse_leftovers()
    args = read_json(folder / MEGATRON_ARGS) if (folder / MEGATRON_ARGS).is_file() else {}
    side = {name: folder / name for name in SIDE_FILES if (folder / name).is_file()}
    return Checkpoint("huggingface", folder, model, tensors, family=family.model_type, args=args, hf_files=side)


class _Part:
    """Reads one stored tensor (a `Read` of `layouts.py`)."""

    def __init__(self, name: str, stored: StoredArray, manifest: Manifest) -> None:
        self._name, self._stored, self._manifest = name, stored, manifest

    def __call__(self, targets: Iterable[Array]) -> None:
        read_into(self._stored, targets, self._name, self._manifest)


class _Reader:
    """Finds the parts of every tensor of the whole model among the stored ones."""

    def __init__(
        self, family: Family, model: Architecture, stored: Mapping[str, StoredArray], manifest: Manifest, folder: Path
    ) -> None:
        self.family, self.model, self.stored, self.manifest, self.folder = family, model, stored, manifest, folder
        self.used: set[str] = set()

    def whole(self, spec: TensorSpec) -> WholeTensor:
        row = self.family.table.row(spec)
        shapes = row.transform.part_shapes(spec.shape, self.model)
        fused = _fused_experts(row, self.stored, spec)
        if fused is not None:
            return self._from_fused(spec, *fused)
        parts = [self._find(name, shape) for name, shape in zip(row.hf, shapes, strict=True)]
        dtype = common_dtype([part for _, part in parts], row.hf[0])
        reads = [self._read(name, part) for name, part in parts]
        return WholeTensor(spec, dtype, lambda whole: row.transform.join(reads, whole, self.model))

    def _find(self, name: str, shape: tuple[int, ...]) -> tuple[str, StoredArray]:
        base = self.family.table.base
        key = name if name in self.stored else name.removeprefix(base) if name.startswith(base) else base + name
        found = self.stored.get(key)
        if found is None:
            raise CheckpointError(f"{self.folder} lacks the tensor {name!r} that its config.json asks for")
        if found.shape != shape:
            raise CheckpointError(
                f"{found.file}: tensor {key!r} has shape {list(found.shape)}, config.json asks for {list(shape)}"
            )
        self.used.add(key)
        return key, found

    def _from_fused(self, spec: TensorSpec, key: str, stored: StoredArray) -> WholeTensor:
        """One expert of a tensor that holds all of them."""
        expert = spec.expert or 0
        if self.model.experts is None or stored.shape != (self.model.experts.num_experts, *spec.shape):
            raise CheckpointError(f"{stored.file}: tensor {key!r} has shape {list(stored.shape)}, no experts' shape")
        self.used.add(key)
        return WholeTensor(
            spec, common_dtype([stored], key), lambda whole: read_into(stored.entry(expert), [whole], key)
        )

    def _read(self, name: str, stored: StoredArray) -> "_Part":
        return _Part(name, stored, self.manifest)

    def refuse_leftovers(self) -> None:
        """Refuse tensors that nothing needs, and a head that is tied by the configuration but differs.

        Raises:
            CheckpointError: There are such.
        """
        left = [key for key in self.stored if key not in self.used and not self.family.table.is_ignored(key)]
        if self.model.tied:
            head = self.family.table.row(TensorSpec(HEAD, ())).hf[0]
            if head in left:
                words = self._find(self.family.table.row(TensorSpec(WORDS, ())).hf[0], self.stored[head].shape)
                left.remove(head)
                if not _equal(self.stored[head], words[1]):
                    raise CheckpointError(
                        f"{self.stored[head].file}: {head!r} is tied to the embedding in config.json but differs from "
                        f"it: set tie_word_embeddings to false"
                    )
        if left:
            more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
            raise CheckpointError(
                f"{self.stored[left[0]].file} and its neighbours hold tensors that a model of type "
                f"{self.family.model_type} does not have: {', '.join(map(repr, left[:_SHOWN]))}{more}"
            )


def _fused_experts(row: Row, stored: Mapping[str, StoredArray], spec: TensorSpec) -> tuple[str, StoredArray] | None:
    """The stored tensor with all experts in one, where there is none for each."""
    if row.hf[0] in stored:
        return None
    return next(((key, stored[key]) for key in fused_expert_names(spec) if key in stored), None)


def _equal(a: StoredArray, b: StoredArray) -> bool:
    """Whether two stored tensors have the same bits, compared a band at a time."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return all(bool((read_rows(a, i, "") == read_rows(b, i, "")).all()) for i in range(a.shape[0]))
