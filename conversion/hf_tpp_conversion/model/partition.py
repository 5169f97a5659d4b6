"""Which rank holds what: layers over stages and chunks, experts over ranks, rows and columns over tp, and padding.

Eight layers, pp=2, vpp=2 (chunks of two layers; chunk v of stage p is called model{v} in stage p's files):

    stage 0     model0: layers 0 1     model1: layers 4 5
    stage 1     model0: layers 2 3     model1: layers 6 7
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hf_tpp.errors import ConfigurationError
from hf_tpp_conversion.files.dtypes import Array
from hf_tpp_conversion.model.architecture import Architecture
from hf_tpp_conversion.model.tensors import TensorSpec

__all__ = ["Partition", "Place", "cut", "join", "local_shape", "padded_vocabulary", "place"]


@dataclass(frozen=True, slots=True)
class Partition:
    """How a Megatron checkpoint is cut.

    Attributes:
        tp: Tensor-parallel ranks.
        pp: Pipeline stages.
        vpp: Chunks of layers per stage (virtual pipeline); 1: plain.
        ep: Expert-parallel ranks.
        stages: Layers of each chunk, `stages[v * pp + p]` those of chunk v on stage p; empty: even.
        divisible_by: The vocabulary is padded to a multiple of this times tp; 0: not at all.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    stages: tuple[int, ...] = ()
    divisible_by: int = 128

    def check(self, model: Architecture) -> None:
        """Refuse sizes that Megatron cannot build.

        Raises:
            ConfigurationError: With the sizes that can.
        """
        for name in ("tp", "pp", "vpp", "ep"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name}={getattr(self, name)}: use 1 or more")
        if model.num_attention_heads % self.tp:
            raise ConfigurationError(
                f"tp={self.tp} does not divide the {model.num_attention_heads} attention heads: use one of "
                f"{_divisors(model.num_attention_heads)}"
            )
        groups = model.num_query_groups
        if groups % self.tp and self.tp % groups:
            raise ConfigurationError(
                f"tp={self.tp} neither divides the {groups} key/value heads nor is a multiple of it"
            )
        self._check_neurons(model)
        if self.vpp > 1 and self.pp == 1:
            raise ConfigurationError(f"vpp={self.vpp} needs pp > 1: pass --pp")
        self.layers(model.num_layers)
        if self.ep > 1 and model.experts is None:
            raise ConfigurationError(f"ep={self.ep}, but the model has no experts: leave --ep out")
        if model.experts is not None and model.experts.num_experts % self.ep:
            raise ConfigurationError(
                f"ep={self.ep} does not divide the {model.experts.num_experts} experts: use one of "
                f"{_divisors(model.experts.num_experts)}"
            )

    def _check_neurons(self, model: Architecture) -> None:
        sizes = [] if all(model.has_experts(layer) for layer in range(model.num_layers)) else [model.ffn_hidden_size]
        if model.experts is not None:
            sizes += [model.experts.ffn_hidden_size, model.experts.shared_ffn_hidden_size]
        for size in sizes:
            if size % self.tp:
                raise ConfigurationError(f"tp={self.tp} does not divide the {size} neurons of an MLP: use another tp")

    def layers(self, num_layers: int) -> list[list[range]]:
        """For each stage, the layers of its chunks.

        Raises:
            ConfigurationError: The layers cannot be dealt out like this.
        """
        chunks = self.pp * self.vpp
        counts: Sequence[int] = self.stages
        if not counts:
            if num_layers % chunks:
                raise ConfigurationError(
                    f"{num_layers} layers do not form {chunks} equal chunks (pp={self.pp}, vpp={self.vpp}): use other "
                    f"sizes, or --stages with the layers of each chunk"
                )
            counts = (num_layers // chunks,) * chunks
        if len(counts) != chunks or sum(counts) != num_layers or min(counts) < 0:
            raise ConfigurationError(
                f"stages={tuple(counts)} must be {chunks} counts (pp x vpp) that add up to {num_layers} layers"
            )
        starts = np.cumsum([0, *counts]).tolist()
        return [
            [range(starts[v * self.pp + p], starts[v * self.pp + p + 1]) for v in range(self.vpp)]
            for p in range(self.pp)
        ]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer lies: chunk `chunk` of stage `stage`, as its layer `local`."""

    stage: int
    chunk: int
    local: int


def place(partition: Partition, num_layers: int) -> list[Place]:
    """The place of every layer."""
    places = {
        layer: Place(stage, chunk, local)
        for stage, chunks in enumerate(partition.layers(num_layers))
        for chunk, layers in enumerate(chunks)
        for local, layer in enumerate(layers)
    }
    return [places[layer] for layer in range(num_layers)]


def padded_vocabulary(vocab_size: int, partition: Partition) -> int:
    """Entries of the vocabulary with padding, as Megatron counts them."""
    multiple = max(1, partition.divisible_by) * partition.tp
    return -(-vocab_size // multiple) * multiple if partition.divisible_by else vocab_size


def local_shape(spec: TensorSpec, tp: int, padded: int) -> tuple[int, ...]:
    """Shape of one rank's part of a tensor.

    Args:
        spec: The tensor.
        tp: Ranks.
        padded: Padded vocabulary.

    Raises:
        ConfigurationError: The tensor cannot be cut evenly.
    """
    shape = list(spec.shape)
    if spec.dim is None or spec.layout is None:
        return spec.shape
    if spec.is_vocabulary:
        shape[0] = padded
    if shape[spec.dim] % tp or any(block.size % tp for block in spec.layout.blocks if not spec.is_vocabulary):
        raise ConfigurationError(f"tp={tp} does not divide dimension {spec.dim} of {spec.name} {shape}: use another tp")
    shape[spec.dim] //= tp
    return tuple(shape)


def cut(whole: Array, spec: TensorSpec, rank: int, tp: int, padded: int) -> Iterator[Array]:
    """One rank's part of a tensor, as views whose bytes follow one another; `join` is the inverse.

    Args:
        whole: The tensor, shape `spec.shape`.
        spec: How it is cut.
        rank: The rank.
        tp: Ranks.
        padded: Padded vocabulary; the rows beyond the real ones repeat the last, as Megatron's own converter does.
    """
    if spec.dim is None or spec.layout is None:
        yield whole
    elif spec.is_vocabulary:
        start, stop = rank * padded // tp, (rank + 1) * padded // tp
        yield whole[start : min(stop, len(whole))]
        yield np.broadcast_to(whole[-1], (max(0, stop - max(start, len(whole))), *whole.shape[1:]))
    else:
        for segment in spec.layout.segments(rank, tp):
            yield whole[_along(spec.dim, segment.start, segment.stop)]


def join(target: Array, part: Array, spec: TensorSpec, rank: int, tp: int) -> None:
    """Put one rank's part into the whole tensor: the inverse of `cut`; padding falls away."""
    if spec.dim is None or spec.layout is None:
        target[...] = part
    elif spec.is_vocabulary:
        start = rank * len(part)
        rows = max(0, min(len(part), len(target) - start))
        target[start : start + rows] = part[:rows]
    else:
        for segment in spec.layout.segments(rank, tp):
            local = part[_along(spec.dim, segment.local_start, segment.local_start + segment.size)]
            target[_along(spec.dim, segment.start, segment.stop)] = local


def _along(dim: int, start: int, stop: int) -> tuple[slice, ...]:
    return (slice(None),) * dim + (slice(start, stop),)


def _divisors(number: int) -> list[int]:
    return [value for value in range(1, number + 1) if number % value == 0]
