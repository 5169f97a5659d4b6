"""How Hugging Face's tensors lie in Megatron's: each transform beside its inverse.

Drawn for 4 query heads in 2 groups:

    separate     q: q0 q1 q2 q3     k: k0 k1     v: v0 v1           Llama
    blocks       [q0 q1 q2 q3 | k0 k1 | v0 v1]                      GPT-2, Phi-3
    grouped      [q0 q1 k0 v0 | q2 q3 k1 v1]                        Megatron; GPT-NeoX, where every head is a group

A `Transform` says how one tensor of Megatron is made of one or several of Hugging Face's. `split` shows where a part
lies in it, `join` fills these places from the file, so that no more than the one tensor is in memory.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from hf_tpp_conversion.files.dtypes import Array
from hf_tpp_conversion.model.architecture import Architecture

__all__ = [
    "BLOCKS",
    "GATE_UP",
    "SAME",
    "SEPARATE",
    "TRANSPOSED",
    "TRANSPOSED_BLOCKS",
    "Transform",
    "qkv_from_version",
    "qkv_to_version",
]

Shape = tuple[int, ...]


class Read(Protocol):
    """Reads a part into views whose bytes follow one another in it."""

    def __call__(self, targets: Iterable[Array]) -> None:
        """Fill them."""


class Transform(Protocol):
    """One tensor of Megatron <-> one or several of Hugging Face's."""

    def part_shapes(self, shape: Shape, model: Architecture) -> list[Shape]:
        """Shapes of the parts of a tensor of `shape`."""

    def join(self, reads: Sequence[Read], whole: Array, model: Architecture) -> None:
        """Fill the tensor with its parts, read one after the other."""

    def split(self, whole: Array, part: int, model: Architecture) -> list[Array]:
        """The tensor -> part number `part`, as views whose bytes follow one another."""


class _Views(ABC):
    """A transform whose parts are views of the tensor: they are read straight into place."""

    def join(self, reads: Sequence[Read], whole: Array, model: Architecture) -> None:
        for part, read in enumerate(reads):
            read(self.split(whole, part, model))

    @abstractmethod
    def split(self, whole: Array, part: int, model: Architecture) -> list[Array]: ...


class _Same(_Views):
    def part_shapes(self, shape: Shape, model: Architecture) -> list[Shape]:
        return [shape]

    def split(self, whole: Array, part: int, model: Architecture) -> list[Array]:
        return [whole]


class _Transposed(_Views):
    """[in, out] of GPT-2's Conv1D <-> [out, in]."""

    def part_shapes(self, shape: Shape, model: Architecture) -> list[Shape]:
        return [shape[::-1]]

    def split(self, whole: Array, part: int, model: Architecture) -> list[Array]:
        return [whole.T]


class _Separate(_Views):
    """q [heads d, ...], k and v [groups d, ...] <-> grouped [(heads + 2 groups) d, ...]."""

    def part_shapes(self, shape: Shape, model: Architecture) -> list[Shape]:
        query, key = model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
        return [(size, *shape[1:]) for size in (query, key, key)]

    def split(self, whole: Array, part: int, model: Architecture) -> list[Array]:
        return [_group_slice(whole, part, model)]


class _Blocks(_Views):
    """[q | k | v] in one tensor <-> grouped."""

    def part_shapes(self, shape: Shape, model: Architecture) -> list[Shape]:
        return [shape]

    def split(self, whole: Array, part: int, model: Architecture) -> list[Array]:
        return [_group_slice(whole, index, model) for index in range(3)]


class _TransposedBlocks:
    """[in, q | k | v] of GPT-2's Conv1D <-> grouped."""

    def part_shapes(self, shape: Shape, model: Architecture) -> list[Shape]:
        return [shape[::-1]]

    def join(self, reads: Sequence[Read], whole: Array, model: Architecture) -> None:
        fused = np.empty(whole.shape[::-1], whole.dtype)  # three places in every row: too many views
        reads[0]([fused])
        columns = 0
        for target in BLOCKS.split(whole, 0, model):
            size = math.prod(target.shape[:3])
            target[...] = fused[:, columns : columns + size].T.reshape(target.shape)
            columns += size

    def split(self, whole: Array, part: int, model: Architecture) -> list[Array]:
        blocks = BLOCKS.split(whole, 0, model)
        return [np.concatenate([block.reshape(-1, *whole.shape[1:]) for block in blocks]).T]


class _GateUp(_Views):
    """gate and up, one tensor each <-> [all gate; all up]."""

    def part_shapes(self, shape: Shape, model: Architecture) -> list[Shape]:
        return [(shape[0] // 2, *shape[1:])] * 2

    def split(self, whole: Array, part: int, model: Architecture) -> list[Array]:
        half = len(whole) // 2
        return [whole[part * half : (part + 1) * half]]


SAME, TRANSPOSED, SEPARATE = _Same(), _Transposed(), _Separate()
BLOCKS, TRANSPOSED_BLOCKS, GATE_UP = _Blocks(), _TransposedBlocks(), _GateUp()


def _group_slice(whole: Array, part: int, model: Architecture) -> Array:
    """The view [groups, heads of this part in a group, channels, ...] of a grouped tensor."""
    queries = model.num_attention_heads // model.num_query_groups
    grouped = whole.reshape(model.num_query_groups, queries + 2, model.kv_channels, *whole.shape[1:])
    first = 0 if part == 0 else queries + part - 1
    return grouped[:, first : first + (queries if part == 0 else 1)]


def qkv_from_version(local: Array, version: float, kv_channels: int) -> Array:
    """One rank's query/key/value rows of an old Megatron checkpoint -> [heads, 3, channels], the order since version 2.

    Version 0 had [3, heads, channels], version 1 [heads, channels, 3]; every head has its own key and value there.
    """
    rest = local.shape[1:]
    if version >= 2:
        return local
    if version >= 1:
        return np.ascontiguousarray(local.reshape(-1, kv_channels, 3, *rest).swapaxes(1, 2)).reshape(local.shape)
    return np.ascontiguousarray(local.reshape(3, -1, kv_channels, *rest).swapaxes(0, 1)).reshape(local.shape)


def qkv_to_version(local: Array, version: float, kv_channels: int) -> Array:
    """The inverse of `qkv_from_version`."""
    rest = local.shape[1:]
    if version >= 2:
        return local
    split = local.reshape(-1, 3, kv_channels, *rest)
    return np.ascontiguousarray(split.swapaxes(1, 2) if version >= 1 else split.swapaxes(0, 1)).reshape(local.shape)
