"""How Hugging Face's tensors lie in Megatron's: each transform beside its inverse.

Drawn for 4 query heads in 2 groups:

    separate     q: q0 q1 q2 q3     k: k0 k1     v: v0 v1           Llama
    blocks       [q0 q1 q2 q3 | k0 k1 | v0 v1]                      GPT-2, Phi-3
    grouped      [q0 q1 k0 v0 | q2 q3 k1 v1]                        Megatron; GPT-NeoX, where every head is a group

A `Transform` says how one tensor of Megatron is made of one or several of Hugging Face's. `join` fills the former part
by part, `split` takes one part out, so that no more than the one tensor and a part of it are in memory.
"""

import itertools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

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
    """Reads a part: into contiguous memory that is given, or into its own."""

    @property
    def dtype(self) -> npt.DTypeLike:
        """Type of the integers that carry the bits."""

    def __call__(self, into: Array | None = None) -> Array:
        """The part."""


class Transform(Protocol):
    """One tensor of Megatron <-> one or several of Hugging Face's."""

    def part_shapes(self, shape: Shape, model: Architecture) -> list[Shape]:
        """Shapes of the parts of a tensor of `shape`."""

    def join(self, reads: Sequence[Read], shape: Shape, model: Architecture) -> Array:
        """Parts, read one after the other, -> the tensor."""

    def split(self, whole: Array, part: int, model: Architecture) -> list[Array]:
        """The tensor -> part number `part`, as views whose bytes follow one another."""


class _Same:
    def part_shapes(self, shape: Shape, model: Architecture) -> list[Shape]:
        return [shape]

    def join(self, reads: Sequence[Read], shape: Shape, model: Architecture) -> Array:
        return reads[0]()

    def split(self, whole: Array, part: int, model: Architecture) -> list[Array]:
        return [whole]


class _Transposed:
    """[in, out] of GPT-2's Conv1D <-> [out, in]."""

    def part_shapes(self, shape: Shape, model: Architecture) -> list[Shape]:
        return [shape[::-1]]

    def join(self, reads: Sequence[Read], shape: Shape, model: Architecture) -> Array:
        return reads[0]().T

    def split(self, whole: Array, part: int, model: Architecture) -> list[Array]:
        return [whole.T]


class _Separate:
    """q [heads d, ...], k and v [groups d, ...] <-> grouped [(heads + 2 groups) d, ...]."""

    def part_shapes(self, shape: Shape, model: Architecture) -> list[Shape]:
        query, key = model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
        return [(size, *shape[1:]) for size in (query, key, key)]

    def join(self, reads: Sequence[Read], shape: Shape, model: Architecture) -> Array:
        first = reads[0]()
        whole = np.empty(shape, first.dtype)
        _group_slice(whole, 0, model)[...] = first.reshape(_group_slice(whole, 0, model).shape)
        del first
        for part in (1, 2):
            target = _group_slice(whole, part, model)
            target[...] = reads[part]().reshape(target.shape)
        return whole

    def split(self, whole: Array, part: int, model: Architecture) -> list[Array]:
        taken = _group_slice(whole, part, model)
        return [taken.reshape(-1, *whole.shape[1:])]


class _Blocks:
    """[q | k | v] in one tensor <-> grouped."""

    def part_shapes(self, shape: Shape, model: Architecture) -> list[Shape]:
        return [shape]

    def join(self, reads: Sequence[Read], shape: Shape, model: Architecture) -> Array:
        fused = reads[0]()
        bounds = np.cumsum([0, *(part[0] for part in SEPARATE.part_shapes(shape, model))]).tolist()
        parts = [_InMemory(fused[start:stop]) for start, stop in itertools.pairwise(bounds)]
        return SEPARATE.join(parts, shape, model)

    def split(self, whole: Array, part: int, model: Architecture) -> list[Array]:
        return [piece for index in range(3) for piece in SEPARATE.split(whole, index, model)]


class _TransposedBlocks:
    """[in, q | k | v] of GPT-2's Conv1D <-> grouped."""

    def part_shapes(self, shape: Shape, model: Architecture) -> list[Shape]:
        return [shape[::-1]]

    def join(self, reads: Sequence[Read], shape: Shape, model: Architecture) -> Array:
        return BLOCKS.join([_InMemory(reads[0]().T)], shape, model)

    def split(self, whole: Array, part: int, model: Architecture) -> list[Array]:
        return [np.concatenate(BLOCKS.split(whole, 0, model)).T]


class _GateUp:
    """gate and up, one tensor each <-> [all gate; all up]."""

    def part_shapes(self, shape: Shape, model: Architecture) -> list[Shape]:
        return [(shape[0] // 2, *shape[1:])] * 2

    def join(self, reads: Sequence[Read], shape: Shape, model: Architecture) -> Array:
        half, dtype = shape[0] // 2, reads[0].dtype
        whole = np.empty(shape, dtype)
        reads[0](whole[:half])
        reads[1](whole[half:])
        return whole

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


class _InMemory:
    """A part that was read already."""

    def __init__(self, values: Array) -> None:
        self._values, self.dtype = values, values.dtype

    def __call__(self, into: Array | None = None) -> Array:
        if into is None:
            return self._values
        into[...] = self._values
        return into


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
