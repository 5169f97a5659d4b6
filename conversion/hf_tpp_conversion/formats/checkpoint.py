"""What formats have in common: tensors that are read when asked for, and files that are laid out before they are."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hf_tpp.errors import CheckpointError
from hf_tpp_conversion.files.dtypes import FLOATS, ITEM_SIZES, Array, carrier
from hf_tpp_conversion.files.stored import StoredArray
from hf_tpp_conversion.files.torch_zip_writing import ZipPlan
from hf_tpp_conversion.model.architecture import Architecture
from hf_tpp_conversion.model.partition import Partition
from hf_tpp_conversion.model.tensors import TensorSpec

__all__ = ["Checkpoint", "Piece", "Plan", "WholeTensor", "common_dtype"]


@dataclass(frozen=True, slots=True)
class WholeTensor:
    """A tensor of the whole model that can be read.

    Attributes:
        spec: Its name and shape.
        dtype: Its type.
        read_into: Reads it into contiguous memory: `spec.shape`, bits in unsigned integers.
    """

    spec: TensorSpec
    dtype: str
    read_into: Callable[[Array], None]

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.spec.shape) * ITEM_SIZES[self.dtype]

    def read(self) -> Array:
        """Read it into memory of its own."""
        whole = np.empty(self.spec.shape, carrier(self.dtype))
        self.read_into(whole)
        return whole


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was opened: everything is known of it but the values.

    Attributes:
        format: "huggingface", "legacy" or "torch_dist".
        path: The folder that holds the weights.
        model: What it is.
        tensors: Name in the whole model -> tensor, in the order in which they are best read.
        partition: How it is cut; None for Hugging Face.
        layer_spec: "te" or "local" for Megatron, else "".
        family: `model_type` of Hugging Face, if it is known.
        args: Megatron's args, plain values only.
        hf_files: Side files of Hugging Face (config.json, tokenizer, ...), name -> path.
        notes: What a user should know.
    """

    format: str
    path: Path
    model: Architecture
    tensors: Mapping[str, WholeTensor]
    partition: Partition | None = None
    layer_spec: str = ""
    family: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    hf_files: Mapping[str, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of one file that come out of one tensor of the whole model.

    Attributes:
        file: Path in the destination.
        position: Where they begin there.
        num_bytes: How many.
        cut: Tensor -> views whose bytes follow one another there.
        archive: The archive (by index in `Plan.archives`) whose storage this is, or None.
        storage: Index of the storage there.
    """

    file: str
    position: int
    num_bytes: int
    cut: Callable[[Array], Iterator[Array]]
    archive: int | None = None
    storage: int = 0


@dataclass(slots=True)
class Plan:
    """Every byte of a destination, before the first is written.

    Attributes:
        pieces: Name in the whole model -> pieces that come out of it.
        small: Whole small files.
        parts: (file, position, bytes) that are no tensors.
        archives: (file, layout) of torch.save's archives, framed after their storages.
        copies: Path in the destination -> file to copy.
        dtypes: Name in the whole model -> type that is written.
        sizes: File -> bytes, for reports.
    """

    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    small: dict[str, bytes] = field(default_factory=dict)
    parts: list[tuple[str, int, bytes]] = field(default_factory=list)
    archives: list[tuple[str, ZipPlan]] = field(default_factory=list)
    copies: dict[str, Path] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, piece: Piece) -> None:
        """Add a piece of the tensor `name`."""
        self.pieces.setdefault(name, []).append(piece)

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole destination."""
        small = sum(map(len, self.small.values())) + sum(path.stat().st_size for path in self.copies.values())
        return sum(self.sizes.values()) + small


def common_dtype(arrays: Sequence[StoredArray], name: str) -> str:
    """The type of the arrays that one tensor is made of.

    Raises:
        CheckpointError: They have several types, or one in which weights are not stored.
    """
    first = arrays[0]
    for array in arrays:
        if array.dtype != first.dtype:
            raise CheckpointError(
                f"{first.file} and {array.file} hold {name!r} in the types {first.dtype} and {array.dtype}: convert "
                f"them to one"
            )
    if first.dtype not in FLOATS:
        raise CheckpointError(f"{first.file}: {name!r} has the type {first.dtype}: weights are {', '.join(FLOATS)}")
    return first.dtype
