"""Laying out Megatron's torch_dist format: the inverse of `torch_dist.py`. The file of rank r is `__{r}_0.distcp`."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hf_tpp_conversion.files.dtypes import ITEM_SIZES, TORCH_NAMES, Array
from hf_tpp_conversion.files.pickle_writing import write_pickle
from hf_tpp_conversion.files.torch_tensors import storage_call
from hf_tpp_conversion.files.torch_zip_writing import ZipPlan
from hf_tpp_conversion.formats.checkpoint import Checkpoint, Piece, Plan
from hf_tpp_conversion.formats.megatron_common import MegatronOptions, iteration_of, output_args, plan_common
from hf_tpp_conversion.formats.megatron_folder import to_namespace
from hf_tpp_conversion.formats.megatron_names import LINEARS
from hf_tpp_conversion.formats.torch_dist_metadata import Chunk, StoredTensor, write_metadata
from hf_tpp_conversion.formats.torch_dist_names import leading, write_key
from hf_tpp_conversion.model.partition import cut, local_shape, padded_vocabulary, place
from hf_tpp_conversion.model.tensors import POSITIONS, WORDS, TensorSpec

__all__ = ["plan_torch_dist"]

_PREFIX = "archive"


def plan_torch_dist(source: Checkpoint, options: MegatronOptions, given: Mapping[str, Any]) -> Plan:
    """Lay out the chunks for the model of `source`, one per layer, expert and tensor-parallel rank.

    Args:
        source: Where the tensors come from.
        options: How it is to be cut.
        given: Args of the command line.

    Raises:
        ConfigurationError: Sizes that do not fit the model.
    """
    options.partition.check(source.model)
    plan = Plan(dtypes={name: options.dtype or tensor.dtype for name, tensor in source.tensors.items()})
    folder = iteration_of(source)
    layout = _Layout(plan, source, options, folder)
    for tensor in source.tensors.values():
        layout.add(tensor.spec)
    args = to_namespace(output_args(source, options, given), TORCH_NAMES[plan.dtypes[WORDS]])
    common = ZipPlan("common", write_pickle({"args": args, "checkpoint_version": 3.0, "iteration": 0}), [])
    plan.archives.append((f"{folder}/common.pt", common))
    plan.sizes[f"{folder}/common.pt"] = common.length
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    backends |= {"common_backend": "torch", "common_backend_version": 1}
    plan.small[f"{folder}/metadata.json"] = json.dumps(backends).encode()
    plan.small[f"{folder}/.metadata"] = write_metadata(layout.tensors, layout.objects)
    plan_common(plan, source, folder)
    return plan


class _Layout:
    """Fills the ranks' files, one chunk behind the other."""

    def __init__(self, plan: Plan, source: Checkpoint, options: MegatronOptions, folder: str) -> None:
        self.plan, self.model, self.options, self.folder = plan, source.model, options, folder
        self.tensors: dict[str, StoredTensor] = {}
        self.objects: dict[str, Chunk] = {}
        self._places = place(options.partition, source.model.num_layers)
        self._padded = padded_vocabulary(source.model.vocab_size, options.partition)

    def add(self, spec: TensorSpec) -> None:
        """Add all chunks of a tensor."""
        tp = self.options.partition.tp
        key, indices = write_key(spec, self.model, self.options.layer_spec)
        own = (self._padded, *spec.shape[1:]) if spec.is_vocabulary else spec.shape
        dtype = self.plan.dtypes[spec.name]
        chunks = []
        for rank in range(tp if spec.dim is not None else 1):
            for start, sizes, cutter in self._cuts(spec, rank):
                offset = tuple(start if dim == spec.dim else 0 for dim in range(len(own)))
                chunk = self._chunk(spec, rank, (*indices, *offset), (1,) * len(indices) + sizes, dtype, cutter)
                chunks.append(chunk)
        shape = leading(spec, self.model) + own
        before = self.tensors.get(key)
        self.tensors[key] = StoredTensor(shape, dtype, (before.chunks if before else ()) + tuple(chunks))
        is_linear = any(f".{name.split('.')[-1]}.weight" in key for name in LINEARS)
        if is_linear:
            self._extra_states(spec, key, indices)

    def _cuts(
        self, spec: TensorSpec, rank: int
    ) -> Iterator[tuple[int, tuple[int, ...], Callable[[Array], Iterator[Array]]]]:
        """A rank's chunks of a tensor: start along the cut dimension, sizes, and how to cut them.

        Gate and up are a chunk each, since they are not neighbours in the whole tensor.
        """
        tp = self.options.partition.tp
        shape = local_shape(spec, tp, self._padded)
        if spec.dim is None or spec.layout is None or spec.is_vocabulary:
            yield rank * shape[0] if spec.is_vocabulary else 0, shape, _cutter(spec, rank, tp, self._padded)
            return
        for segment in spec.layout.segments(rank, tp):
            sizes = tuple(segment.size if dim == spec.dim else size for dim, size in enumerate(shape))
            yield segment.start, sizes, _slicer(spec.dim, segment.start, segment.stop)

    def _chunk(
        self,
        spec: TensorSpec,
        rank: int,
        offsets: tuple[int, ...],
        sizes: tuple[int, ...],
        dtype: str,
        cutter: Callable[[Array], Iterator[Array]],
    ) -> Chunk:
        num_bytes = math.prod(sizes) * ITEM_SIZES[dtype]
        name, file, position = self._end_of_file(spec, rank)
        archive = ZipPlan(_PREFIX, write_pickle(storage_call(sizes, dtype, "0")), [num_bytes], position)
        piece = Piece(file, archive.storage_position(0), num_bytes, cutter, len(self.plan.archives), 0)
        self.plan.add(spec.name, piece)
        self._append(file, archive)
        return Chunk(offsets, sizes, name, position, archive.length)

    def _extra_states(self, spec: TensorSpec, key: str, indices: tuple[int, ...]) -> None:
        """Objects without a value that Megatron's strict loading asks for, one per layer and linear."""
        sizes = leading(spec, self.model) or (1,)
        place_ = ".".join(map(str, indices or (0,))) + "_" + ".".join(map(str, sizes))
        keys = [key.removesuffix("weight") + "_extra_state"]
        if self.options.layer_spec == "te" and key.endswith("linear_qkv.weight"):
            keys.append(key.replace("linear_qkv.weight", "core_attention._extra_state"))
        for extra in keys:
            name, file, position = self._end_of_file(spec, 0)
            archive = ZipPlan(_PREFIX, write_pickle([None]), [], position)
            self._append(file, archive)
            self.objects[f"{extra}/shard_{place_}"] = Chunk((), (), name, position, archive.length)

    def _end_of_file(self, spec: TensorSpec, rank: int) -> tuple[str, str, int]:
        """Name and path of the file of the rank that holds a tensor, and where it ends so far."""
        partition = self.options.partition
        stage = self._places[spec.layer].stage if spec.layer is not None else 0
        if spec.layer is None and spec.name not in (WORDS, POSITIONS):
            stage = partition.pp - 1
        name = f"__{stage * partition.tp + rank}_0.distcp"
        file = f"{self.folder}/{name}"
        return name, file, self.plan.sizes.get(file, 0)

    def _append(self, file: str, archive: ZipPlan) -> None:
        self.plan.archives.append((file, archive))
        self.plan.sizes[file] = self.plan.sizes.get(file, 0) + archive.length


def _cutter(spec: TensorSpec, rank: int, tp: int, padded: int) -> Callable[[Array], Iterator[Array]]:
    return lambda whole: cut(whole, spec, rank, tp, padded)


def _slicer(dim: int, start: int, stop: int) -> Callable[[Array], Iterator[Array]]:
    return lambda whole: iter([whole[(slice(None),) * dim + (slice(start, stop),)]])
