"""How one dimension of a weight is cut over tensor-parallel ranks: pure integers, no torch.

A dimension is a row of blocks; a block is a row of equal units that are never cut (attention heads, neurons,
vocabulary entries). Each block is dealt out by itself, and a rank's shard is its pieces side by side:

    GPT-2's fused [q|k|v], 4 heads, tp_size=2     q0 q1 q2 q3 | k0 k1 k2 k3 | v0 v1 v2 v3
        tp_rank 0                                 q0 q1         k0 k1         v0 v1
        tp_rank 1                                       q2 q3         k2 k3         v2 v3

    one KV head, tp_size=2 (replicated)           k0          -> k0 on both ranks, num_copies = 2

    vocabulary of 131 units, tp_size=2 (padded)   0..65 and 66..130 + one row of padding
"""

from dataclasses import dataclass

from hf_tpp.errors import ConfigurationError

__all__ = ["Block", "Layout", "Segment", "padded_vocabulary", "whole_vocabulary"]

# Below this size the padding of a vocabulary shard would be a visible share of the work.
_ALIGN_FROM = 4096
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Block:
    """A run of `num_units` equal units of `unit_size` channels each."""

    num_units: int
    unit_size: int = 1

    @property
    def size(self) -> int:
        """Channels in the whole block."""
        return self.num_units * self.unit_size


@dataclass(frozen=True, slots=True)
class Segment:
    """A contiguous piece of a full dimension that lies on this rank.

    Attributes:
        start: First channel in the full dimension.
        stop: One past the last channel in the full dimension.
        local_start: Where the piece begins in this rank's shard.
        num_copies: How many tensor-parallel ranks hold this very piece (more than 1 for replicated KV heads).
    """

    start: int
    stop: int
    local_start: int
    num_copies: int = 1

    @property
    def size(self) -> int:
        """Channels in the piece."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Layout:
    """One dimension as a row of blocks, with an optional padded size per shard.

    Attributes:
        blocks: The blocks in the order in which the weight stores them.
        padded_local_size: Size of every rank's shard when it is padded (vocabulary), else 0.
    """

    blocks: tuple[Block, ...]
    padded_local_size: int = 0

    @property
    def size(self) -> int:
        """Channels in the full dimension, without padding."""
        return sum(block.size for block in self.blocks)

    def segments(self, tp_rank: int, tp_size: int) -> tuple[Segment, ...]:
        """The pieces of the full dimension that `tp_rank` of `tp_size` holds, in local order."""
        if self.padded_local_size:
            start = min(tp_rank * self.padded_local_size, self.size)
            stop = min(start + self.padded_local_size, self.size)
            return (Segment(start, stop, 0),) if stop > start else ()
        pieces: list[Segment] = []
        block_start = local_start = 0
        for block in self.blocks:
            first, last, copies = _deal(block.num_units, tp_rank, tp_size)
            if last > first:
                start = block_start + first * block.unit_size
                piece = Segment(start, start + (last - first) * block.unit_size, local_start, copies)
                pieces.append(piece)
                local_start += piece.size
            block_start += block.size
        return tuple(pieces)

    def local_size(self, tp_rank: int, tp_size: int) -> int:
        """Channels in `tp_rank`'s shard, padding included."""
        if self.padded_local_size:
            return self.padded_local_size
        return sum(piece.size for piece in self.segments(tp_rank, tp_size))

    def valid_size(self, tp_rank: int, tp_size: int) -> int:
        """Channels in `tp_rank`'s shard that exist in the full dimension."""
        return sum(piece.size for piece in self.segments(tp_rank, tp_size))


def _deal(num_units: int, tp_rank: int, tp_size: int) -> tuple[int, int, int]:
    """Units [first, last) of `tp_rank` and the number of ranks that hold them.

    With fewer units than ranks every unit goes to tp_size / num_units neighbouring ranks.

    Raises:
        ConfigurationError: The ranks cannot share the units evenly.
    """
    if num_units >= tp_size:
        quotient, remainder = divmod(num_units, tp_size)
        first = tp_rank * quotient + min(tp_rank, remainder)
        return first, first + quotient + (tp_rank < remainder), 1
    if tp_size % num_units:
        raise ConfigurationError(
            f"tp={tp_size} is no multiple of the {num_units} units to replicate: "
            f"use a tp that divides {num_units} or is a multiple of it"
        )
    copies = tp_size // num_units
    unit = tp_rank // copies
    return unit, unit + 1, copies


def padded_vocabulary(vocab_size: int, tp_size: int) -> Layout:
    """A vocabulary cut into equal shards, padded so that each shard is aligned for matrix products.

    Args:
        vocab_size: Entries in the full vocabulary.
        tp_size: Number of tensor-parallel ranks.

    Returns:
        Layout whose shards all have the same size; entries past `vocab_size` are padding.
    """
    local_size = -(-vocab_size // tp_size)
    if tp_size > 1:
        local_size = _aligned(local_size)
    return Layout((Block(vocab_size),), padded_local_size=local_size)


def whole_vocabulary(vocab_size: int, aligns: bool) -> Layout:
    """A vocabulary in one piece, padded for the same reason if `aligns`."""
    return Layout((Block(vocab_size),), padded_local_size=_aligned(vocab_size) if aligns else vocab_size)


def _aligned(size: int) -> int:
    return size if size < _ALIGN_FROM else -(-size // _ALIGNMENT) * _ALIGNMENT
