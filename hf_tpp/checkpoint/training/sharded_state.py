"""Shards as chunks of full tensors, for torch.distributed.checkpoint (DCP).

    qkv.weight, tp_size=2        tp_rank 0 writes chunks [0:2] [4:6] [8:10]
                                 tp_rank 1 writes chunks [2:4] [6:8] [10:12]

What is on disk is therefore an ordinary DCP checkpoint of full tensors, and DCP itself works out which saved chunks a
rank of another layout needs. Padding is in no chunk; a chunk that several ranks hold is written by one of them.
"""

import io
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_local_load_plan,
    create_default_local_save_plan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from hf_tpp.errors import CheckpointError
from hf_tpp.sharding import ShardSpec, local_part, on_this_replica

__all__ = ["Sharded", "ShardedLoadPlanner", "ShardedSavePlanner", "plain_object"]


@dataclass(frozen=True, slots=True)
class Sharded:
    """A shard in memory.

    Attributes:
        tensor: This rank's values, padding included; a DTensor where replicas share them.
        spec: Where a whole replica's values lie in the full tensor.
    """

    tensor: torch.Tensor
    spec: ShardSpec

    def chunks(self) -> list[tuple[ChunkStorageMetadata, torch.Tensor]]:
        """Every piece that lies here: its place in the full tensor, and the view of `tensor` that holds it."""
        spec, local = on_this_replica(self.spec, self.tensor), local_part(self.tensor)
        found = []
        for segment in spec.segments:
            offsets, sizes = [0] * len(spec.full_shape), list(spec.full_shape)
            if spec.rows is not None:
                offsets[0], sizes[0] = spec.rows[0], spec.rows[1] - spec.rows[0]
            if spec.dim == 0:
                start, stop = spec.within_rows(segment)
                offsets[0], sizes[0] = segment.start + start - segment.local_start, stop - start
            elif spec.dim is not None:
                offsets[spec.dim], sizes[spec.dim] = segment.start, segment.size
            if 0 not in sizes:
                place = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                found.append((place, spec.narrow(local, segment)))
        return found

    def view(self, index: MetadataIndex) -> torch.Tensor:
        """The view that holds the chunk of that index."""
        return next(view for place, view in self.chunks() if place.offsets == index.offset)


class ShardedSavePlanner(DefaultSavePlanner):
    """Writes a flat dictionary of `Sharded`, tensors that all ranks hold alike, and plain objects."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """What this rank could write; the coordinator keeps one writer for what several ranks offer."""
        items: list[WriteItem] = []
        for name, value in self.state_dict.items():
            if isinstance(value, Sharded):
                items += [_write_item(name, value, *chunk) for chunk in value.chunks()]
            else:
                items += create_default_local_save_plan({name: value}, self.is_coordinator).items
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The view, tensor or object behind an index."""
        value = self.state_dict[index.fqn]
        return value.view(index) if isinstance(value, Sharded) else value


class ShardedLoadPlanner(DefaultLoadPlanner):
    """Reads into what `ShardedSavePlanner` writes; objects are read without running code that they carry."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Keep the entries as they are, which the default planner would take apart."""
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        """What this rank needs.

        Raises:
            CheckpointError: The checkpoint lacks it, or has it in another shape or type.
        """
        assert self.metadata is not None
        items: list[ReadItem] = []
        for name, value in self.state_dict.items():
            saved = self.metadata.state_dict_metadata.get(name)
            if isinstance(value, Sharded):
                places = [place for place, _ in value.chunks()]
                items += create_read_items_for_chunk_list(name, _check_saved(name, value, saved), places)
            elif saved is None:
                raise CheckpointError(f"the checkpoint has no {name!r}: it was not written by save_training_state")
            else:
                items += create_default_local_load_plan({name: value}, self.metadata).items
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """The local tensor to read into."""
        value = self.state_dict[index.fqn]
        return value.view(index) if isinstance(value, Sharded) else value

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Read an object."""
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def _write_item(name: str, value: Sharded, place: ChunkStorageMetadata, view: torch.Tensor) -> WriteItem:
    properties = TensorProperties.create_from_tensor(view)
    data = TensorWriteData(place, properties, torch.Size(value.spec.full_shape))
    return WriteItem(MetadataIndex(name, place.offsets), WriteItemType.SHARD, tensor_data=data)


def _check_saved(name: str, value: Sharded, saved: Any) -> TensorStorageMetadata:
    if not isinstance(saved, TensorStorageMetadata):
        raise CheckpointError(f"the checkpoint has no tensor {name!r}: resume with the model that it was saved from")
    if tuple(saved.size) != value.spec.full_shape:
        raise CheckpointError(
            f"{name} has shape {list(saved.size)} in the checkpoint and {list(value.spec.full_shape)} in the model: "
            f"resume with the model that it was saved from"
        )
    if saved.properties.dtype != value.tensor.dtype:
        raise CheckpointError(
            f"{name} is {saved.properties.dtype} in the checkpoint and {value.tensor.dtype} in the model: build the "
            f"model in {saved.properties.dtype}, training would not continue where it stopped"
        )
    return saved


def plain_object(name: str, value: Any) -> Any:
    """`value`, if `load_bytes` will be able to read it.

    Raises:
        CheckpointError: It holds more than numbers, strings, tensors and containers of them.
    """
    stream = io.BytesIO()
    try:
        torch.save(value, stream)
        stream.seek(0)
        torch.load(stream, weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{name} cannot be saved: {error}. Keep only numbers, strings, tensors, lists and dictionaries in it "
            f"(a scheduler's state_dict(), not the scheduler)"
        ) from error
    return value
